"""How kernels are held to their references: FlashAttention's rule, poisoned outputs, same bits."""

import importlib.util
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heptapod_fast.ops import library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def double(tree):
    """Tensors in float64 (integers and anything else as they are), gradients wanted as before."""
    if torch.is_tensor(tree):
        if not tree.is_floating_point():
            return tree
        return tree.detach().double().requires_grad_(tree.requires_grad)
    return tree


def fresh(tree):
    """Leaves of their own for one run."""
    if torch.is_tensor(tree) and tree.is_floating_point():
        return tree.detach().clone().requires_grad_(tree.requires_grad)
    return tree


def run(function: Callable, arguments: Sequence, upstream: Sequence[Tensor] | None = None):
    """(outputs, gradients of the arguments that want one); function returns a tensor or a tuple.

    upstream: gradients of the outputs (default: outputs are not differentiated).
    """
    outputs = function(*arguments)
    outputs = (outputs,) if torch.is_tensor(outputs) else tuple(outputs)
    if upstream is None:
        return outputs, ()
    wanted = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream) if g is not None]
    grads = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs])
    return outputs, grads


def assert_within_rule(
    found: Tensor,
    reference: Tensor,
    exact: Tensor,
    factor: float = 2.0,
    name: str = "result",
    floor: float = 0.0,
) -> None:
    """max |found - exact| <= factor * max |reference - exact| + one rounding of the result + floor.

    The rounding is half a unit of the result's dtype at the largest exact value; float32 gets
    another 4 units for the order of its sums.
    """
    assert found.dtype == reference.dtype, f"{name}: {found.dtype}, not {reference.dtype}"
    assert found.shape == exact.shape, f"{name}: {tuple(found.shape)}, not {tuple(exact.shape)}"
    assert bool(found.isfinite().all()), f"{name} has elements that are not finite (unwritten?)"
    found, reference, exact = found.detach(), reference.detach(), exact.detach()
    unit = torch.finfo(found.dtype).eps * (0.5 if found.dtype != torch.float32 else 4.0)
    allowed = (
        factor * float((reference.double() - exact).abs().max())
        + unit * float(exact.abs().max())
        + floor
    )
    error = float((found.double() - exact).abs().max())
    assert error <= allowed, f"{name}: error {error:.3g} against float64, {allowed:.3g} allowed"


def compare(
    kernel: Callable,
    reference: Callable,
    arguments: Sequence,
    upstream: Sequence[Tensor] | None = None,
    exact: Callable | None = None,
    factor: float = 2.0,
    floor: float = 0.0,
) -> None:
    """Outputs and gradients of `kernel` against `reference` in float64 (or `exact`), by the rule.

    floor: an absolute allowance, for results that cancel to zero. Gradients are allowed one
    rounding in the coarsest dtype of the arguments, those of float32 masters too, which are sums of
    values of that dtype: of few, the reference's error may be small by luck. The kernel runs with
    uninitialised memory filled with NaN, twice, and must give the same bits.
    """
    coarsest = max(torch.finfo(a.dtype).eps for a in arguments if _is_floating(a))
    with torch.random.fork_rng(devices=[]):
        exact_outputs, exact_grads = run(
            exact or reference, [double(a) for a in arguments], upstream
        )
        plain_outputs, plain_grads = run(reference, [fresh(a) for a in arguments], upstream)
        results = []
        for _ in range(2):
            with poisoned():
                results.append(run(kernel, [fresh(a) for a in arguments], upstream))
    outputs, grads = results[0]
    for group, found, plain, true in (
        ("output", outputs, plain_outputs, exact_outputs),
        ("gradient", grads, plain_grads, exact_grads),
    ):
        assert len(found) == len(plain), f"{len(found)} {group}s, the reference has {len(plain)}"
        for i, (f, p, t) in enumerate(zip(found, plain, true, strict=True)):
            allowance = floor
            if group == "gradient":
                allowance += 0.5 * coarsest * float(t.abs().max())
            assert_within_rule(f, p, t.double(), factor, f"{group} {i}", allowance)
    for first, second in zip((*outputs, *grads), (*results[1][0], *results[1][1]), strict=True):
        assert torch.equal(first, second), "another run gave other bits"


def _is_floating(argument: object) -> bool:
    return torch.is_tensor(argument) and argument.is_floating_point()


class poisoned:
    """Context: torch.empty and its kin give memory full of NaN (integers: their largest)."""

    def __enter__(self):
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *error):
        torch.use_deterministic_algorithms(self.before)


def check_operator(op, *arguments) -> None:
    """torch.library.opcheck: schema, fake implementation, autograd registration, AOT dispatch."""
    torch.library.opcheck(op, arguments)


def check_compiles(
    function: Callable, arguments: Sequence, upstream: Sequence[Tensor] | None = None
) -> None:
    """torch.compile(fullgraph=True) gives the bits of eager mode, forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = run(function, [fresh(a) for a in arguments], upstream)
    traced = run(compiled, [fresh(a) for a in arguments], upstream)
    for expected, found in zip((*eager[0], *eager[1]), (*traced[0], *traced[1]), strict=True):
        assert torch.equal(expected, found)


def has_triton() -> bool:
    """Whether there are kernels to compile or interpret."""
    return importlib.util.find_spec("triton") is not None


needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
needs_cpu = pytest.mark.skipif(
    DEVICE != "cpu" or not library.available("cpu"),
    reason=f"for tensors on a CPU, and {library.status()}",
)


class Allocations(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that any call of PyTorch returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if torch.is_tensor(each):
                self.largest = max(self.largest, each.nbytes)
        return found
