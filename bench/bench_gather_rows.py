"""gather_rows and scatter_rows against their peers, and what supervision-density gather is worth.

    pytest bench/bench_gather_rows.py --benchmark-only

The operations alone: bytes are one read and one write of every row. The whole step, each part
alone, against the masked form:

    masked      the last block runs for every element, the token loss for every position, and a mask
                removes the seen ones afterwards (MAR's way)
    gathered    the last block runs for every element, then only supervised rows reach the loss
    packed      rows are gathered after the last block's attention: what training does

Forward and backward; equal losses are asserted. `--size tiny` on CPU, `--size B` on CUDA.
"""

import functools

import pytest
import torch

from bench import harness
from heptapod_fast import grid as gridlib
from heptapod_fast import ops
from heptapod_fast.config import Config
from heptapod_fast.data.tokens import SyntheticTokens
from heptapod_fast.model.transformer import Block, Stream
from heptapod_fast.rng import Rng
from heptapod_fast.runs import choose_precision
from heptapod_fast.systems.heptapod import Heptapod
from heptapod_fast.tokenizers.base import token_spec


class Masked(Heptapod):
    """Neither saving."""

    def global_head(self, h_BND, order_BN, steps_Bn, index_B, rng):
        rows = gridlib.padded_rows(gridlib.ranks(order_BN), steps_Bn, self.config.loss_weight)
        return rows, self.whole_head(h_BND, order_BN, steps_Bn)[:, 1:].flatten(0, 1)

    def whole_head(self, h_BND, order_BN, steps_Bn):
        stream = Stream(self.head.assemble(h_BND, order_BN, steps_Bn))
        for block in self.head.blocks:
            stream = block(stream)
        return stream.normed(self.head.norm)[1]


class Gathered(Masked):
    """Only the token loss is spared."""

    def global_head(self, h_BND, order_BN, steps_Bn, index_B, rng):
        rows = gridlib.packed_rows(order_BN, steps_Bn, self.config.loss_weight)
        z_SLD = self.whole_head(h_BND, order_BN, steps_Bn)
        index_R = rows.pair_R * z_SLD.shape[1] + rows.position_R + 1
        return rows, ops.gather_rows(z_SLD.flatten(0, 1), index_R)


def make(kind, tokenizer, device):
    """(a function that runs one forward and backward pass, its loss)."""
    size, batch = ("B", 128) if device == "cuda" else ("tiny", 64)
    config = Config(size=size, tokenizer=tokenizer, dropout=0.0).resolve()
    spec = token_spec(tokenizer, config.image_size, config.patch_size, config.codes)
    with torch.device(device):
        system = kind(config, spec, 10, "reference")
    system.initialise(0)
    system.set_dtype(choose_precision("auto", torch.device(device)))
    tokens = SyntheticTokens(spec, 10, 0, device=device).batch(torch.arange(batch)).to(device)

    def run():
        loss = system.loss(tokens, Rng(0))
        loss.mean.backward()
        for parameter in system.parameters():
            parameter.grad = None
        return loss.mean.item()

    return run


STEP = {
    "gather alone": (Gathered, Masked),
    "last block alone": (Heptapod, Gathered),
    "both": (Heptapod, Masked),
}
TOKENS = {
    "discrete": {"cpu": "patch-vq", "cuda": "vq16"},
    "continuous": {"cpu": "patch", "cuda": "kl16"},
}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("part", STEP)
@pytest.mark.benchmark(group="supervision-density gather, whole step")
def bench_step(versus, device, part, tokens):
    ours, peer = (make(kind, TOKENS[tokens][device], device) for kind in STEP[part])
    assert ours() == pytest.approx(peer(), rel=2e-2)
    versus(ours, peer)


@pytest.mark.benchmark(group="supervision-density gather, last block")
def bench_last_block(versus, device):
    """The last block of the head by itself: all elements, then gather, against gather inside."""
    config = Config(size="B" if device == "cuda" else "tiny").resolve()
    batch, tokens = (128, 256) if device == "cuda" else (128, 36)
    with torch.device(device):
        block = Block(config.width, config.heads, 0, "reference")
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        dtype = choose_precision("auto", torch.device(device))
        x = torch.randn(batch, tokens + 1, config.width, dtype=dtype, requires_grad=True)
        index = torch.arange(batch)
    order = gridlib.random_orders(index, tokens, Rng(0))
    steps = gridlib.draw_steps(index, tokens, 1, "antithetic", Rng(0))
    rows = gridlib.packed_rows(order, steps, "position")
    flat = rows.pair_R * (tokens + 1) + rows.position_R + 1

    def inside():
        block.forward_rows(Stream(x), rows.pair_R, rows.position_R + 1).value().sum().backward()

    def after():
        ops.gather_rows(block(Stream(x)).value().flatten(0, 1), flat).sum().backward()

    versus(inside, after)


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
    make = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    return make(sequences * elements, width), make(len(index), width), index


def gathering(implementation, wrap=lambda f: f):
    def prepare(made):
        x, _, index = made
        function = wrap(lambda x, index: ops.gather_rows(x, index, implementation))
        return functools.partial(function, x, index)

    return prepare


def scattering(implementation, wrap=lambda f: f):
    def prepare(made):
        x, packed, index = made
        rows = len(x)
        function = wrap(lambda y, index: ops.scatter_rows(y, index, rows, implementation))
        return functools.partial(function, packed, index)

    return prepare


def cases(device):
    found = []
    for size, (sequences, elements, width) in SHAPES[device].items():
        rows, packed = sequences * elements, sequences * (elements // 2)
        for name, make, moved in (
            ("gather_rows", gathering, 2 * packed),
            ("scatter_rows", scattering, packed + rows),
        ):
            found.append(
                harness.Case(
                    name,
                    f"{size}, {packed} of {rows} x {width}",
                    functools.partial(rows_and_index, device, sequences, elements, width),
                    {
                        "ours": make("triton" if device == "cuda" else "auto"),
                        "eager": make("reference"),
                        "compiled": make("reference", harness.compiled),
                    },
                    bytes=moved * width * 2,
                    gate=">= 1x best peer",
                )
            )
    return found


bench_operations = harness.benchmark_of(cases)
