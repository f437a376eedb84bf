"""gather_rows and scatter_rows against their peers, and what supervision-density gather is worth.

    python bench/bench_gather_rows.py
    pytest bench/bench_gather_rows.py --benchmark-only

The operations alone: bytes are one read and one write of every row. The whole step, each part
alone, against the masked form:

    masked      the last block runs for every element, the token loss for every position, and a mask
                removes the seen ones afterwards (MAR's way)
    gathered    the last block runs for every element, then only supervised rows reach the loss
    packed      rows are gathered after the last block's attention: what training does

Forward and backward; equal losses are asserted. Size tiny on CPU, B on CUDA.
"""

import functools

import torch

from bench import harness
from bench.case import Case, compiled, fastest
from heptapod_fast import configure, ops
from heptapod_fast import grid as gridlib
from heptapod_fast.data.tokens import SyntheticTokens
from heptapod_fast.model.transformer import Block, Packing, Stream
from heptapod_fast.rng import Rng
from heptapod_fast.systems.heptapod import Heptapod
from heptapod_fast.world import choose_precision

# ------------------------------------------------------------------------ the operations themselves

# Sequences, elements of each, width. The last block of the head gathers, and its input scatters the
# states of the backbone; in the backward pass it is the other way round.
SHAPES = {
    "cuda": {"B": (128, 257, 768), "L": (128, 257, 1024), "H": (128, 257, 1280)},
    "cpu": {"tiny": (8, 37, 48)},
}


def rows_and_index(device, sequences, elements, width):
    """(all rows, packed rows, index): half of the rows, in random order within each sequence."""
    half = elements // 2
    order = torch.rand(sequences, elements, device=device).argsort(1)[:, :half]
    index = (order + torch.arange(sequences, device=device)[:, None] * elements).flatten()
    draw = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    return draw(sequences * elements, width), draw(len(index), width), index


def gathering(function, made):
    """A call of gather_rows."""
    x, _, index = made
    return functools.partial(function, x, index)


def scattering(function, made):
    """A call of scatter_rows."""
    x, packed, index = made
    return functools.partial(function, packed, index, len(x))


def candidates(operation, prepare, device):
    """{name: contender} of one of the two."""
    eager = functools.partial(operation, implementation="reference")
    functions = {
        "ours": functools.partial(operation, implementation=fastest(device)),
        "eager": eager,
        "compiled": compiled(eager),
    }
    return {name: functools.partial(prepare, function) for name, function in functions.items()}


def cases(device):
    """Both operations at every size."""
    found = []
    for size, (sequences, elements, width) in SHAPES[device].items():
        rows, packed = sequences * elements, sequences * (elements // 2)
        kinds = [
            ("gather_rows", ops.gather_rows, gathering, 2 * packed),
            ("scatter_rows", ops.scatter_rows, scattering, packed + rows),
        ]
        for name, operation, prepare, moved in kinds:
            case = Case(
                name,
                f"{size}, {packed} of {rows} x {width}",
                functools.partial(rows_and_index, device, sequences, elements, width),
                candidates(operation, prepare, device),
                bytes=moved * width * 2,
                gate=">= 1x best peer",
            )
            found.append(case)
    return found


# ------------------------------------------------------------------------------------ whole steps


class Masked(Heptapod):
    """Neither saving."""

    def global_head(self, h_BND, order_BN, steps_Bn, index_B, rng):
        """All positions as rows, most of them with weight 0."""
        rank_BN = gridlib.ranks(order_BN)
        rows = gridlib.padded_rows(rank_BN, steps_Bn, self.settings.loss_weight)
        return rows, self.whole_head(h_BND, order_BN, steps_Bn)[:, 1:].flatten(0, 1)

    def whole_head(self, h_BND, order_BN, steps_Bn):
        """Every block for every element: (S, L, D)."""
        stream = Stream(self.head.assemble(h_BND, order_BN, steps_Bn))
        for block in self.head.blocks:
            stream = block(stream)
        return stream.normed(self.head.norm)[1]


class Gathered(Masked):
    """Only the token loss is spared."""

    def global_head(self, h_BND, order_BN, steps_Bn, index_B, rng):
        """Supervised positions as rows, gathered behind the head."""
        rows = gridlib.packed_rows(order_BN, steps_Bn, self.settings.loss_weight)
        z_SLD = self.whole_head(h_BND, order_BN, steps_Bn)
        pair_R = rows.pair_R(self.settings.density)
        index_R = pair_R * z_SLD.shape[1] + rows.position_R + 1
        return rows, ops.gather_rows(z_SLD.flatten(0, 1), index_R)


STEPS = {
    "gather alone": {"ours": Gathered, "masked": Masked},
    "last block alone": {"ours": Heptapod, "gathered": Gathered},
    "both": {"ours": Heptapod, "masked": Masked},
}
TOKENS = {
    "discrete": {"cpu": "patch-vq", "cuda": "vq16"},
    "continuous": {"cpu": "patch", "cuda": "kl16"},
}
SIZES = {"cpu": ("tiny", 16), "cuda": ("B", 128)}


class TrainingPass:
    """A call: one forward and backward pass of a system of this kind."""

    def __init__(self, kind, device, tokenizer, losses):
        size, batch = SIZES[device]
        config = configure(size, data="synthetic", tokenizer=tokenizer, dropout=0.0, batch=batch)
        with torch.device(device):
            self.system = kind(config.model, config.spec, 10)
        self.system.initialise(0)
        self.system.set_dtype(choose_precision("auto", torch.device(device)))
        source = SyntheticTokens(config.spec, 10, 0, device=device)
        self.batch = source.batch(torch.arange(batch)).to(device)
        self._compare(losses)

    def _compare(self, losses):
        """All kinds compute the same loss. losses: of those that came before."""
        losses.append(self().item())
        assert all(abs(loss / losses[0] - 1) < 2e-2 for loss in losses), losses

    def __call__(self):
        loss = self.system.loss(self.batch, Rng(0)).mean
        loss.backward()
        for parameter in self.system.parameters():
            parameter.grad = None
        return loss.detach()


def step_case(device, part, tokens):
    """One saving, for one kind of tokens."""
    size, batch = SIZES[device]
    tokenizer = TOKENS[tokens][device]
    contenders = {
        name: functools.partial(TrainingPass, kind, device, tokenizer)
        for name, kind in STEPS[part].items()
    }
    return Case(
        "supervision-density gather, whole step",
        f"{part}, {tokens}, {size}, batch {batch}",
        list,  # the losses so far
        contenders,
        images=batch,
    )


def step_cases(device):
    """Every saving and kind of tokens."""
    return [step_case(device, part, tokens) for part in STEPS for tokens in TOKENS]


# ----------------------------------------------------------------------- the last block by itself

LAST_BLOCK = {"cpu": (32, 36), "cuda": (128, 256)}


def block_inputs(device):
    """(block, x, Packing of the supervised rows)."""
    config = configure(SIZES[device][0], data="synthetic")
    batch, tokens = LAST_BLOCK[device]
    dtype = choose_precision("auto", torch.device(device))
    with torch.device(device):
        block = Block(config.model.width, config.model.heads)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x = torch.randn(batch, tokens + 1, config.model.width, dtype=dtype, requires_grad=True)
        index = torch.arange(batch)
    order = gridlib.random_orders(index, tokens, Rng(0))
    steps = gridlib.draw_steps(index, tokens, 1, "antithetic", Rng(0))
    rows = gridlib.packed_rows(order, steps, "position")
    return block, x, Packing(rows.pair_R(1), rows.position_R + 1)


def gather_inside(block, x, packing):
    """Rows leave the block after attention."""
    block(Stream(x), packing=packing).value().sum().backward()


def gather_after(block, x, packing):
    """The whole block for every element, then the rows."""
    row_R = packing.sequence_R * x.shape[1] + packing.element_R
    ops.gather_rows(block(Stream(x)).value().flatten(0, 1), row_R).sum().backward()


def block_case(function, made):
    """A call of one of the two."""
    return functools.partial(function, *made)


def last_block_cases(device):
    """One."""
    size = SIZES[device][0]
    batch, tokens = LAST_BLOCK[device]
    return [
        Case(
            "supervision-density gather, last block",
            f"{size}, {batch} x {tokens + 1}",
            functools.partial(block_inputs, device),
            {
                "ours": functools.partial(block_case, gather_inside),
                "gather after": functools.partial(block_case, gather_after),
            },
            images=batch,
        )
    ]


bench_operations = harness.bench(cases)
bench_step = harness.bench(step_cases)
bench_last_block = harness.bench(last_block_cases)

if __name__ == "__main__":
    harness.main(cases, step_cases, last_block_cases)
