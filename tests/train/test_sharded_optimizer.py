"""The optimizer's operations on DTensors, over processes of this machine (gloo).

Every process runs all functions named `check_...` below (tests/ranks.py).
"""

import sys
from pathlib import Path

import pytest
import torch

from heptapod_fast.ops import library
from heptapod_fast.ops.adamw_ema import adamw_ema
from heptapod_fast.ops.global_norm import global_norm
from tests import ranks
from tests.csrc import emulator

ROOT = Path(__file__).resolve().parents[2]
# Uneven over 2 and 4 ranks, with fewer rows than ranks, and nothing at all.
SHAPES = [(5, 3), (1, 4), (6,), (7, 2, 3), (0, 3), (8, 40)]
DECAYS = (0.9, 0.99, 0.5, 0.0, 0.7)
IMPLEMENTATIONS = ["reference"]
if library.available("cpu"):
    IMPLEMENTATIONS.append("cpu")
    if emulator.why_not() is None:
        IMPLEMENTATIONS.append("emulated")  # the CUDA code, run on the CPU


def each_implementation():
    """The name to ask for each of them by; what one needs is in place until the next."""
    for name in IMPLEMENTATIONS:
        with emulator.running(name) as implementation:
            yield implementation


def tensors(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def mesh_of(*sizes):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[-len(sizes) :])


def spread(full, mesh, placements):
    """Every rank has the full tensors: nothing has to be sent."""
    from torch.distributed.tensor import distribute_tensor

    return [distribute_tensor(t.clone(), mesh, placements, src_data_rank=None) for t in full]


def layouts():
    """(mesh, placements) of every kind that this number of ranks allows."""
    from torch.distributed.tensor import Replicate, Shard

    ranks = torch.distributed.get_world_size()
    line = mesh_of(ranks)
    found = [(line, [Shard(0)]), (line, [Replicate()])]
    for mesh in [mesh_of(ranks // 2, 2), mesh_of(2, ranks // 2)]:
        found += [
            (mesh, [Replicate(), Shard(0)]),
            (mesh, [Shard(0), Replicate()]),
            (mesh, [Shard(0), Shard(0)]),
            (mesh, [Replicate(), Replicate()]),
        ]
    return found


class State:
    """What adamw_ema updates; `place` turns a list of full tensors into what it is given."""

    def __init__(self, place):
        self.place = place
        self.params, self.emas = place(tensors(0)), [place(tensors(0)) for _ in DECAYS]
        self.moments = [place([torch.zeros_like(t) for t in tensors(0)]) for _ in range(2)]
        self.copies = place([t.bfloat16() for t in tensors(0)])

    def step(self, now, implementation):
        adamw_ema(
            self.params,
            self.place(tensors(now)),
            *self.moments,
            self.emas,
            lr=torch.tensor(1e-2),
            step=torch.tensor(float(now)),
            grad_scale=torch.tensor(0.5),
            ema_decays=torch.tensor(DECAYS),
            weight_decays=[0.1 * i for i in range(len(SHAPES))],
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            copies=self.copies,
            implementation=implementation,
        )

    def everything(self):
        return [t for list_ in (self.params, *self.moments, *self.emas, self.copies) for t in list_]


def check_the_update_has_the_bits_of_the_unsharded_one():
    for implementation in each_implementation():
        whole = State(lambda full: full)
        parts = [State(lambda full, at=at: spread(full, *at)) for at in layouts()]
        for now in (1, 2):
            for state in (whole, *parts):
                state.step(now, implementation)
        for state in parts:
            for part, full in zip(state.everything(), whole.everything()):
                assert torch.equal(part.full_tensor(), full), (implementation, part.placements)


def check_some_local_shard_is_empty():
    from torch.distributed.tensor import Shard

    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    local = spread(tensors(0), mesh_of(ranks), [Shard(0)])[1].to_local()
    assert local.shape[0] == (1 if rank == 0 else 0)


def same_everywhere(value):
    found = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, value)
    return all(torch.equal(value, other) for other in found)


def check_the_norm_is_that_of_the_full_tensors():
    for implementation in each_implementation():
        expected = global_norm(tensors(3), implementation)
        for mesh, placements in layouts():
            norm = global_norm(spread(tensors(3), mesh, placements), implementation)
            assert norm.shape == () and norm.dtype == torch.float32
            torch.testing.assert_close(norm, expected, rtol=2**-23, atol=0.0)
            assert same_everywhere(norm)


def check_the_norm_of_mixed_layouts():
    from torch.distributed.tensor import Shard

    places = [*layouts(), None, (mesh_of(torch.distributed.get_world_size()), [Shard(1)])]
    full = tensors(4, [(5, 6 + i) for i in range(len(places))])
    full[0] = full[0].bfloat16()
    mixed = [t if at is None else spread([t], *at)[0] for t, at in zip(full, places)]
    for implementation in each_implementation():
        expected = global_norm(full, implementation)
        norm = global_norm(mixed, implementation)
        torch.testing.assert_close(norm, expected, rtol=2**-23, atol=0.0)
        assert same_everywhere(norm)


def check_a_bad_element_of_one_rank_shows_on_all():
    full = tensors(5)
    full[0][-1, 0] = float("inf")
    mesh, placements = layouts()[0]
    assert float(global_norm(spread(full, mesh, placements))) == float("inf")
    full[0][0, 0] = float("nan")
    assert global_norm(spread(full, mesh, placements)).isnan()


def check_partial_sums_and_other_layouts_are_refused():
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = layouts()[0]
    state = State(lambda full: spread(full, mesh, placements))
    before = [t.to_local().clone() for t in state.params]
    partial = [DTensor.from_local(t, mesh, [Partial()], run_check=False) for t in tensors(1)]
    with pytest.raises(ValueError, match=r"global_norm .* number 0 holds partial sums.*reduce it"):
        global_norm(partial)
    others = [
        (lambda full: partial, r"grads\[0\] is \(5, 3\), \(Partial"),
        (lambda full: full, r"grads\[0\] is \(5, 3\), not distributed, params\[0\]"),
        (lambda full: spread(full, mesh, [Replicate()]), r"grads\[0\].*Replicate.*params"),
    ]
    for place, message in others:
        state.place = place
        with pytest.raises(ValueError, match=message):
            state.step(1, "auto")
    state = State(lambda full: partial)
    with pytest.raises(ValueError, match=r"params\[0\] holds partial sums"):
        state.step(1, "auto")
    state = State(lambda full: spread(full, mesh, placements))
    assert all(torch.equal(t.to_local(), b) for t, b in zip(state.params, before))


def check_a_model_under_fully_shard_trains_as_without():
    """FSDP2's own parameters and gradients; gloo has no average, hence the sum."""
    from torch.distributed.fsdp import fully_shard

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

    ranks = torch.distributed.get_world_size()
    ours, theirs, norms = model(), model(), []
    fully_shard(ours, mesh=mesh_of(ranks))
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for network in (ours, theirs):
        network(x).square().sum().backward()  # every rank has the same data: averages are it
        params = [p.detach() for p in network.parameters()]
        grads = [p.grad for p in network.parameters()]
        norms.append(global_norm(grads))
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        adamw_ema(
            params,
            grads,
            *moments,
            [],
            lr=torch.tensor(1e-2),
            step=torch.tensor(1.0),
            grad_scale=1.0 / norms[-1],
            ema_decays=torch.empty(0),
            beta1=0.9,
            beta2=0.95,
            weight_decays=[0.1] * len(params),
            eps=1e-8,
            implementation="auto",
        )
    torch.testing.assert_close(norms[0], norms[1])
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine.full_tensor(), other)


needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no distributed package"
)


@needs_distributed
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks(count):
    ranks.all_well(ranks.outcomes(__file__, count))


def test_plain_tensors_need_no_distributed_package(monkeypatch):
    """The operations neither need it nor import it."""
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor", raising=False)
    assert float(global_norm([torch.full((4,), 2.0)])) == 4.0
    state = State(lambda full: full)
    state.step(1, "auto")
    assert not torch.equal(state.params[0], tensors(0)[0])
    assert "torch.distributed.tensor" not in sys.modules


if __name__ == "__main__":
    ranks.work(globals())
