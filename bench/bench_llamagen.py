"""A training step of llamagen beside the same model in plain PyTorch, and beside its products.

    python bench/bench_llamagen.py
    python bench/bench_llamagen.py --size B --batch 8
    pytest bench/bench_llamagen.py --benchmark-only

"products" are the matrix products of a step's linear layers alone, in bfloat16, at its own shapes:
"ours is 0.85x" means that a step that wastes nothing would take 0.85 of the time. TFLOP/s count the
FLOPs of a step for all of them. The segments of npp are steps of the same images with patches of
more codes; plain PyTorch has no such thing. Size tiny and its codes without --size; other sizes
take synthetic codes.
"""

import functools

from bench import harness
from bench.plain_llamagen import PlainLlamaGen, PlainStep, Products
from bench.steps import CLASSES, case_of, sized
from heptapod_fast import configure

BATCH = {"cpu": 8, "cuda": 128}


def plain_model(settings):
    """The same network by plain PyTorch."""
    config = configure(**settings)
    model, spec = config.model, config.spec
    return PlainLlamaGen(
        depth=model.depth,
        width=model.width,
        heads=model.heads,
        codes=spec.vocabulary,
        classes=CLASSES,
        side=spec.grid,
        dropout=model.dropout,
        label_dropout=model.label_dropout,
    ).to(settings["device"])


def plain(settings, made):
    """The step by plain PyTorch."""
    return PlainStep(plain_model(settings), settings["batch"])


def products(settings, made):
    """The products alone."""
    tokens = configure(**settings).spec.num_tokens
    return Products(plain_model(settings), settings["batch"] * tokens)


def cases_of(device, size, batch):
    """llamagen in turns with plain PyTorch and with its products; npp's first segment."""
    llamagen = sized(size, batch, device, system="llamagen")
    npp = sized(size, batch, device, system="npp")
    return [
        case_of(
            "llamagen",
            llamagen,
            plain_PyTorch=functools.partial(plain, llamagen),
            products=functools.partial(products, llamagen),
        ),
        case_of("npp, patches of 2 x 2", npp),
    ]


def cases(device):
    """Shapes that show that everything works on a CPU, size B on a GPU."""
    return cases_of(device, harness.default_size(device), BATCH[device])


bench_llamagen = harness.bench(cases)

if __name__ == "__main__":
    harness.main_of_sizes(cases_of, BATCH)
