"""What the CUDA operators must do in every order of threads, at every alignment and tail.

Each check compares the emulated operators with the library's CPU operators or with float64, bit for
bit where both promise that. All of them pass on csrc/ as it is; a planted bug must fail one.

    python -m tests.csrc.battery     reads {"library": PATH, "seed": N, "checks": NAMES} line by
                                     line, and answers {"caught": text or null}: what these checks
                                     say to that library

Every library is loaded in a process of its own, which may crash or hang.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from heptapod_fast.ops import library, philox
from tests.csrc.emulator import NAMESPACE, ORDERS, Emulation

SECONDS = 60  # for one library; a few are needed
# Around threads (1024 elements of a block at once), chunks (16384) and groups of 4 and 8.
SIZES = (1, 3, 4, 7, 8, 31, 1023, 1024, 1029, 4096, 16_383, 16_390)


def emulated(name: str):
    """An operator of the emulation."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def compiled(name: str):
    """The library's CPU operator."""
    return getattr(torch.ops.heptapod_fast, name).default


def bits(tensor: Tensor) -> Tensor:
    """Integers of the same bits."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])


def placed(values: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` elements after an address of 64 bytes' alignment."""
    room = torch.empty(values.numel() + offset, dtype=values.dtype)
    assert room.data_ptr() % 64 == 0
    return room[offset:].copy_(values)


# The optimizer step.


def step_arguments(
    sizes: Sequence[int], averages: int, grad_dtype: torch.dtype, copies: bool
) -> list:
    """Arguments of adamw_ema in the middle of a training run.

    In tensor i, list i modulo (the number of lists + 1) is the one that is not aligned for vectors;
    where that is none of them, all are.
    """
    lists = [
        [torch.randn(n) for n in sizes],
        [torch.randn(n).to(grad_dtype) for n in sizes],
        [torch.randn(n) for n in sizes],
        [torch.rand(n) for n in sizes],
        *([torch.randn(n) for n in sizes] for _ in range(averages)),
    ]
    if copies:
        lists.append([torch.randn(n).bfloat16() for n in sizes])
    shifted = [
        [
            placed(tensor, (1 + i % 3) * (i % (len(lists) + 1) == k))
            for i, tensor in enumerate(tensors)
        ]
        for k, tensors in enumerate(lists)
    ]
    emas = [tensor for tensors in shifted[4 : 4 + averages] for tensor in tensors]
    scalars = [torch.tensor(value) for value in (1e-2, 3.0, 0.7)]
    decays = torch.tensor([1 - 0.6**e for e in range(averages)])
    weight_decays = [0.05 * (i % 4) for i in range(len(sizes))]
    kept = shifted[-1] if copies else []
    return [*shifted[:4], emas, kept, *scalars, decays, weight_decays, 0.9, 0.95, 1e-8]


def cloned(arguments: list) -> list:
    """The same, of tensors of their own at the same alignments."""

    def clone(tensor: Tensor) -> Tensor:
        return placed(tensor, tensor.storage_offset())

    return [list(map(clone, tensors)) for tensors in arguments[:6]] + arguments[6:]


def assert_same_step(emulation: Emulation, arguments: list) -> None:
    """A step leaves the bits that the CPU operator leaves, in every order of threads."""
    expected = cloned(arguments)
    compiled("adamw_ema")(*expected)
    for order in ORDERS:
        emulation.order(order, seed=1)
        found = cloned(arguments)
        emulated("adamw_ema")(*found)
        for k, (ours, theirs) in enumerate(zip(found[:6], expected[:6])):
            for i, (mine, other) in enumerate(zip(ours, theirs)):
                assert torch.equal(bits(mine), bits(other)), f"{order}: argument {k}, tensor {i}"


def step(emulation: Emulation) -> None:
    """Every kernel, at every alignment and tail."""
    for averages, grad_dtype, copies in (
        (0, torch.float32, False),
        (1, torch.bfloat16, True),
        (2, torch.float32, True),
        (3, torch.bfloat16, False),
        (4, torch.float32, True),
    ):
        assert_same_step(emulation, step_arguments(SIZES, averages, grad_dtype, copies))


def further_averages(emulation: Emulation) -> None:
    """Five to eight averages take a second pass, nine a third."""
    for averages in range(5, 10):
        sizes = (5, 1024, 16_385 if averages == 9 else 1030, *range(60, 75))
        arguments = step_arguments(sizes, averages, torch.float32, False)
        assert_same_step(emulation, arguments)


def many_tensors(emulation: Emulation) -> None:
    """More than the argument of one launch holds."""
    sizes = [1 + i % 5 for i in range(700)]
    assert_same_step(emulation, step_arguments(sizes, 4, torch.float32, True))


def skipped_step(emulation: Emulation) -> None:
    """A gradient scale of zero leaves every bit, whatever the gradients are."""
    arguments = step_arguments((5, 1024, 70), 6, torch.float32, True)
    arguments[8] = torch.tensor(0.0)
    arguments[1][1].fill_(math.nan)
    assert_same_step(emulation, arguments)


# Norms.


def norm_inputs(sizes: Sequence[int]) -> list[Tensor]:
    """float32 and bfloat16 by turns, at every alignment."""
    dtypes = (torch.float32, torch.bfloat16)
    drawn = [torch.randn(n).to(dtypes[i % 2]) for i, n in enumerate(sizes)]
    return [placed(tensor, i // 2 % 5) for i, tensor in enumerate(drawn)]


def assert_same_norm(emulation: Emulation, tensors: list[Tensor]) -> None:
    """Right to a rounding, and of the same bits in every order and at every alignment."""
    exact = math.fsum(x * x for tensor in tensors for x in tensor.double().tolist())
    norm = float(emulated("global_norm")(tensors))
    assert abs(norm - math.sqrt(exact)) <= 2**-24 * math.sqrt(exact)
    sums = []
    aligned = [placed(tensor, 0) for tensor in tensors]
    for order, moved in zip(ORDERS, (tensors, aligned, tensors)):
        emulation.order(order, seed=2)
        sums.append(float(emulated("sum_of_squares")(moved)))
    assert abs(sums[0] - exact) <= 1e-12 * exact
    assert len(set(sums)) == 1, f"other orders and alignments, other bits: {sums}"


def norms(emulation: Emulation) -> None:
    """Every tail, in both dtypes and at every alignment."""
    assert_same_norm(emulation, norm_inputs([n for n in SIZES for _ in range(4)]))


def norms_of_many(emulation: Emulation) -> None:
    """More tensors than one launch takes, more partial sums than the last block has threads."""
    assert_same_norm(emulation, norm_inputs([1 + i % 9 for i in range(1200)]))


# Random words.


def words(emulation: Emulation) -> None:
    """The reference's bits."""
    for shape, blocks in (((1,), 1), ((3,), 5), ((7, 13), 3), ((700,), 2), ((64,), 4)):
        index = torch.randint(-(2**62), 2**62, shape)
        slot = torch.randint(0, 2**32, shape)
        expected = philox.reference(index, slot, blocks, (0xDEADBEEF, 0xFFFFFFFF))
        for order in ORDERS:
            emulation.order(order, seed=3)
            found = emulated("philox")(index, slot, blocks, 0xDEADBEEF, 0xFFFFFFFF)
            assert torch.equal(found, expected), order


# Sizes beyond 31 bits.

HUGE = 2**31 + 20


def holes(folder: str, name: str, dtype: torch.dtype) -> Tensor:
    """HUGE zeros that take no memory: a file full of holes."""
    path = Path(folder, name)
    with open(path, "wb") as file:
        file.truncate(HUGE * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=HUGE, dtype=dtype)


def ends_of_huge_tensors(emulation: Emulation) -> None:
    """The last block reaches the last elements; the other blocks, which would take hours, do not
    run."""
    with tempfile.TemporaryDirectory() as folder, emulation.only_last(1):
        names = ("p", "g", "m", "v", "e")
        kinds = [torch.bfloat16 if name == "g" else torch.float32 for name in names]
        params, grads, means, squares, average = map(holes, [folder] * 5, names, kinds)
        for tensor in (params, grads, means, squares, average):
            tensor[-20:] = torch.rand(20)
        emulated("sum_of_squares")([grads])
        rest = (torch.tensor(1e-2), torch.tensor(3.0), torch.tensor(0.7), torch.tensor([0.9]))
        rest = ([], *rest, [0.1], 0.9, 0.95, 1e-8)
        lists = [[params], [grads], [means], [squares], [average]]
        tails = [[tensor[-20:].clone()] for (tensor,) in lists]
        emulated("adamw_ema")(*lists, *rest)
        compiled("adamw_ema")(*tails, *rest)
        for (tensor,), (tail,) in zip(lists, tails):
            assert torch.equal(bits(tensor[-20:]), bits(tail))


CHECKS: dict[str, Callable[[Emulation], None]] = {
    check.__name__: check
    for check in (
        words,
        norms,
        step,
        further_averages,
        skipped_step,
        ends_of_huge_tensors,
        norms_of_many,
        many_tensors,
    )
}


# Other processes.


def judge(path: str, seed: int, checks: Sequence[str]) -> str | None:
    """What some checks say to a library, in a forked process; None if they are content."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        said = _say(path, seed, checks)
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return said or None


def _say(path: str, seed: int, checks: Sequence[str]) -> str:
    """The first error, with the check's name; "" if there is none."""
    torch.manual_seed(seed)
    doing = "loading"
    try:
        emulation = Emulation(Path(path))
        for doing in checks:
            CHECKS[doing](emulation)
    except Exception as error:
        return f"{doing}: {error}"
    return ""


def main() -> None:
    """Answers until the input ends."""
    assert library.available("cpu"), library.status()
    # What the parent has started when it forks would be missing in the child.
    torch.set_num_threads(1)
    # Memory that nobody has written shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for line in sys.stdin:
        request = json.loads(line)
        caught = judge(request["library"], request["seed"], request["checks"])
        print(json.dumps({"caught": caught}), flush=True)


if __name__ == "__main__":
    main()
