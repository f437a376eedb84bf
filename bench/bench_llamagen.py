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
from bench.case import Case
from bench.plain_llamagen import PlainLlamaGen, PlainStep, Products
from bench.steps import prepared_step
from heptapod_fast import configure
from heptapod_fast.systems import build_system
from heptapod_fast.train.metrics import training_flops

CLASSES = 1000
BATCH = {"cpu": 8, "cuda": 128}


def settings_of(size, batch, device, system):
    """Flags of a step."""
    data = {"logogram_count": 500} if size == "tiny" else {"data": "synthetic"}
    if device == "cuda":
        data |= {"kernels": "triton", "attention": "triton"}
    return dict(size=size, batch=batch, micro_batch=batch, system=system, **data)


def ours(settings, device, made):
    """The trainer's step."""
    return prepared_step(device=device, **settings).call


def plain_model(settings, device):
    """The same network by plain PyTorch."""
    config = configure(**settings)
    model, spec = config.model, config.spec
    return PlainLlamaGen(
        depth=model.depth,
        width=model.width,
        heads=model.heads,
        codes=spec.vocabulary,
        classes=CLASSES,
        side=int(spec.num_tokens**0.5),
        dropout=model.dropout,
        label_dropout=model.label_dropout,
    ).to(device)


def plain(settings, device, made):
    """The step by plain PyTorch."""
    return PlainStep(plain_model(settings, device), settings["batch"])


def products(settings, device, made):
    """The products alone."""
    tokens = configure(**settings).spec.num_tokens
    return Products(plain_model(settings, device), settings["batch"] * tokens)


def flops_of(settings):
    """FLOPs of a step in the first phase, without building anything but shapes."""
    config = configure(**settings)
    system = build_system(config, CLASSES, "meta", fill=False)
    phase = system.phase(0, config.recipe.images)
    return config.recipe.batch * training_flops(system, phase)


def cases_of(device, size, batch):
    """llamagen in turns with plain PyTorch; npp's first segment beside it."""
    found = []
    for system, name in (("llamagen", "llamagen"), ("npp", "npp, patches of 2 x 2")):
        settings = settings_of(size, batch, device, system)
        contenders = {"ours": functools.partial(ours, settings, device)}
        if system == "llamagen":
            contenders["plain PyTorch"] = functools.partial(plain, settings, device)
            contenders["products"] = functools.partial(products, settings, device)
        case = Case(
            f"training step, {size}, batch {batch}",
            name,
            lambda: None,
            contenders,
            flops=flops_of(settings),
            images=batch,
        )
        found.append(case)
    return found


def cases(device):
    """Shapes that show that everything works on a CPU, size B on a GPU."""
    return cases_of(device, harness.default_size(device), BATCH[device])


bench_llamagen = harness.bench(cases)

if __name__ == "__main__":
    harness.main_of_sizes(cases_of, BATCH)
