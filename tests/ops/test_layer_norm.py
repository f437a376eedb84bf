"""layer_norm: the definition in float64, the kernels against the reference, operators."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from heptapod_fast.ops import dispatch, layer_norm
from heptapod_fast.ops.dropout_mask import DropoutMask
from heptapod_fast.ops.layer_norm import (
    MAX_WIDTH,
    _add_operator,
    _backward_operator,
    _operator,
    add_layer_norm,
)
from tests.numerics import DEVICE, check_compiles, check_operator, compare, needs_cpu, needs_triton

# A masked part, a full one, two parts, two of which one is masked; more rows than a program has.
SHAPES = [(3, 7), (2, 3, 64), (9, 160), (1, 1160)]


def exact(x, weight=None, bias=None, eps=1e-6):
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.double() + bias.double()


def inputs(dtype=torch.float32, width=64):
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(5, 7, width, generator=generator)
    return x.to(dtype), *torch.randn(2, width, generator=generator)


def draw(shape, dtype, drop=0.0):
    """x and branch, the three parameters, a mask, the gradients of sum and y."""
    x, branch = (
        (3 + 2 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_() for _ in range(2)
    )
    parameters = [torch.randn(shape[-1], device=DEVICE, requires_grad=True) for _ in range(3)]
    upstream = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]
    return x, branch, parameters, draw_mask(shape, drop), upstream


def draw_mask(shape, p):
    if not p:
        return None
    rows, sequences = math.prod(shape[:-1]), shape[0]
    return DropoutMask(
        torch.randint(0, 2**32, (sequences, 2), device=DEVICE),
        torch.randint(0, 2**20, (rows // sequences,), device=DEVICE),
        p,
    )


@pytest.mark.parametrize("affine", [True, False])
def test_definition(affine):
    x, weight, bias = inputs()
    arguments = (weight, bias) if affine else (None, None)
    torch.testing.assert_close(
        layer_norm(x, *arguments).double(),
        exact(x, *(arguments if affine else ())),
        rtol=1e-4,
        atol=1e-5,
    )


def test_eps_default_is_1e_minus_6():
    x = torch.tensor([[1e-3, -1e-3]])
    expected = 1e-3 / (1e-6 + 1e-6) ** 0.5
    torch.testing.assert_close(layer_norm(x, None, None), torch.tensor([[expected, -expected]]))


def test_bf16_has_float32_statistics_and_keeps_float32_parameters():
    x, weight, bias = inputs(torch.bfloat16)
    y = layer_norm(x + 256, weight, bias)
    expected = exact(x + 256, weight.bfloat16(), bias.bfloat16())
    assert y.dtype == torch.bfloat16
    # A rounding of the result, and one of the product inside it.
    assert float((y.double() - expected).abs().max()) < 2**-7 * float(expected.abs().max())


def test_gradients_by_finite_differences():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))


def test_sum_is_defined_by_its_parts():
    x, branch, (shift, weight, bias), mask, _ = draw((4, 6, 16), torch.float32, 0.3)
    total, y = add_layer_norm(x, branch, shift, weight, bias, mask, implementation="reference")
    keep = mask.keep(24, 16).view(x.shape)
    expected = x.double() + torch.where(keep, (branch.double() + shift.double()) / 0.7, 0.0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y.double(), exact(total, weight, bias), rtol=1e-4, atol=1e-5)
    plain, _ = add_layer_norm(x, branch, None, None, None, implementation="reference")
    assert torch.equal(plain, x + branch)


def test_sum_gradients_by_finite_differences():
    x, branch, shift, weight, bias = (
        torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for shape in ((3, 5), (3, 5), (5,), (5,), (5,))
    )
    mask = draw_mask((3, 5), 0.4)
    assert torch.autograd.gradcheck(
        lambda *a: add_layer_norm(*a, mask), (x, branch, shift, weight, bias)
    )


@pytest.mark.parametrize("shape, affine", [*((shape, True) for shape in SHAPES), ((3, 96), False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_kernel_by_the_rule(kernel, shape, dtype, affine):
    x, _, (_, weight, bias), _, upstream = draw(shape, dtype)
    arguments = (x, weight, bias) if affine else (x, None, None)

    def run(implementation):
        return lambda *arguments: layer_norm(*arguments, implementation=implementation)

    compare(run(kernel), run("reference"), arguments, upstream[:1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_sum_kernel_by_the_rule(kernel, shape, dtype, drop):
    x, branch, parameters, mask, upstream = draw(shape, dtype, drop)

    def run(implementation):
        return lambda *a: add_layer_norm(*a, mask, implementation=implementation)

    compare(run(kernel), run("reference"), (x, branch, *parameters), upstream)


@pytest.mark.parametrize(
    "bias, affine, drop, used",
    [
        (False, True, 0.2, (True, True)),
        (True, False, 0.0, (True, True)),
        (False, False, 0.2, (True, True)),
        (False, False, 0.0, (True, True)),
        (True, True, 0.2, (False, True)),
        (True, True, 0.0, (False, True)),
        (True, True, 0.2, (True, False)),
        (True, True, 0.0, (True, False)),
    ],
)
def test_sum_kernel_without_some_of_it(kernel, bias, affine, drop, used):
    """used: whether the sum and its norm have a gradient."""
    x, branch, (shift, *norm), mask, upstream = draw((2, 2, 96), torch.float32, drop)
    arguments = (x, branch, shift if bias else None, *(norm if affine else (None, None)))

    def run(implementation):
        def function(*arguments):
            outputs = add_layer_norm(*arguments, mask, implementation=implementation)
            # Parameters that nothing depends on still get their zeros.
            nothing = sum(0 * a.sum() for a in arguments if a is not None).to(x.dtype)
            return tuple(o + nothing for o, wanted in zip(outputs, used, strict=True) if wanted)

        return function

    compare(
        run(kernel),
        run("reference"),
        arguments,
        [g for g, wanted in zip(upstream, used, strict=True) if wanted],
    )


def test_norm_is_of_the_rounded_sum(kernel):
    x, branch, (shift, weight, bias), mask, _ = draw((6, 96), torch.bfloat16, 0.2)
    total, y = add_layer_norm(x, branch, shift, weight, bias, mask, implementation=kernel)
    assert torch.equal(y, layer_norm(total, weight, bias, implementation=kernel))
    kept = mask.keep(6, 96)
    assert torch.equal(total[~kept], x[~kept]) and float((~kept).float().mean()) > 0.1


def test_statistics_far_from_zero(kernel):
    x, weight, bias = (t.to(DEVICE) for t in inputs())
    compare(
        lambda x: layer_norm(x, weight, bias, implementation=kernel),
        lambda x: layer_norm(x, weight.to(x.dtype), bias.to(x.dtype), implementation="reference"),
        (x + 3000,),
    )


@needs_triton
@pytest.mark.parametrize("width", [20, 64, 96, 110])
def test_slabs_of_several_rows(width, monkeypatch):
    """4, 4, 2 rows a program forward, 3, 3, 3, 1 backward; one part and two, full and masked."""
    from heptapod_fast.kernels import layer_norm as kernels

    monkeypatch.setattr(
        kernels,
        "_tile",
        lambda kernel, width, device: kernels.split_width(
            width,
            dict(
                num_warps=1, STAGES=2, **({"rows": 4} if kernel == "forward" else {"programs": 4})
            ),
        ),
    )
    x, branch, parameters, mask, upstream = draw((5, 2, width), torch.float32, 0.2)
    compare(
        lambda *a: add_layer_norm(*a, mask, implementation="triton"),
        lambda *a: add_layer_norm(*a, mask, implementation="reference"),
        (x, branch, *parameters),
        upstream,
    )


@needs_triton
@pytest.mark.parametrize(
    "width, parts",
    [
        (7, (64, 0)),
        (64, (64, 0)),
        (130, (128, 64)),
        (192, (128, 64)),
        (768, (512, 256)),
        (1000, (1024, 0)),
        (1024, (1024, 0)),
        (1280, (1024, 256)),
        (1160, (1024, 256)),
    ],
)
def test_parts_cover_the_width(width, parts):
    from heptapod_fast.kernels.layer_norm import split_width

    rows, found = split_width(width, dict(rows=8, num_warps=2, STAGES=1))
    assert rows == 8 and (found["MAIN"], found["REST"]) == parts and found["THREADS"] == 64


COMPILE = """
import json, re, triton
from heptapod_fast.kernels import offline
compiled, compile = [], triton.compile
triton.compile = lambda *a, **k: compiled.append(compile(*a, **k)) or compiled[-1]
found = {}
for case in offline.cases("sm_90", ["layer_norm"]):
    if case.name in ("add_layer_norm+dropout backward 768", "add_layer_norm+dropout backward 1024"):
        offline.compile_case(case, "sm_90")
        ptx = compiled[-1].asm["ptx"]
        found[case.constexprs["WIDTH"]] = dict(
            copies=len(re.findall(r"cp[.]async[.]cg", ptx)),
            stores=len(re.findall(r"st[.]global[.]v4", ptx)),
            narrow=len(re.findall(r"(ld|st)[.]global[.][bu]16", ptx)),
            each=case.constexprs["MAIN"] // (8 * case.constexprs["THREADS"]),
            stages=case.constexprs["STAGES"])
print(json.dumps(found))
"""


@needs_triton
def test_accesses_of_16_bytes():
    """In PTX: cp.async.cg copies 16 bytes and no other size; three tensors in, two out."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"768", "1024"}
    for case in found.values():
        assert case["copies"] == 3 * case["each"] * case["stages"], case
        assert case["stores"] >= 2 * case["each"] and not case["narrow"], case


@needs_triton
def test_operators():
    x, branch, (shift, weight, bias), mask, (grad_sum, grad) = draw((2, 2, 40), torch.float32, 0.2)
    stats = torch.rand(4, 2, device=DEVICE)
    check_operator(_operator, x, weight, bias, 1e-6)
    check_operator(_operator, x, None, None, 1e-6)
    for key in ((None, None, 0.0), (*mask.arrays(), mask.p)):
        check_operator(_add_operator, x, branch, shift, weight, bias, *key, 1e-6)
        check_operator(
            _backward_operator, grad, grad_sum, x.detach(), stats, weight.detach(), *key, True
        )
        check_operator(_backward_operator, grad, None, x.detach(), stats, None, *key, False)


@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_compiles(kernel, drop):
    x, branch, parameters, mask, upstream = draw((2, 2, 40), torch.float32, drop)
    check_compiles(
        lambda *a: add_layer_norm(*a, mask, implementation=kernel),
        (x, branch, *parameters),
        upstream,
    )
    check_compiles(
        lambda *a: add_layer_norm(*a, mask, implementation=kernel)[1],
        (x, branch, *parameters),
        upstream[1:],
    )
    check_compiles(
        lambda *a: layer_norm(*a, implementation=kernel), (x, *parameters[1:]), upstream[:1]
    )


def test_no_rows(kernel):
    x = torch.randn(0, 8, device=DEVICE, requires_grad=True)
    parameters = [torch.ones(8, device=DEVICE, requires_grad=True) for _ in range(3)]
    total, y = add_layer_norm(x, x, *parameters, implementation=kernel)
    (total.sum() + y.sum()).backward()
    assert total.shape == y.shape == x.grad.shape == (0, 8)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)


@needs_cpu
def test_compiled_operators():
    norm, add, backward = (
        getattr(torch.ops.heptapod_fast, f"{name}_cpu").default
        for name in ("layer_norm", "add_layer_norm", "layer_norm_backward")
    )
    x, branch, (shift, weight, bias), mask, (grad_sum, grad) = draw((2, 2, 40), torch.float32, 0.2)
    stats = torch.rand(4, 2)
    check_operator(norm, x, weight, bias, 1e-6)
    for key in ((None, None, 0.0), (*mask.arrays(), mask.p)):
        check_operator(add, x, branch, shift, weight, bias, *key, 1e-6)
        check_operator(add, x, branch, None, None, None, *key, 1e-6)
        check_operator(backward, grad, grad_sum, x.detach(), stats, weight.detach(), *key, True)
        check_operator(backward, grad, None, x.detach(), stats, None, *key, False)


@needs_cpu
def test_compiled_operators_on_any_number_of_threads():
    """Sums over rows are taken in an order that follows from the shape alone."""
    x, branch, parameters, mask, upstream = draw((7, 43, 96), torch.float32, 0.2)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs = add_layer_norm(x, branch, *parameters, mask, implementation="cpu")
            gradients = torch.autograd.grad(outputs, (x, branch, *parameters), upstream)
            found.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@needs_cpu
def test_compiled_operators_refuse_second_derivatives():
    x = torch.randn(3, 8, requires_grad=True)
    y = layer_norm(x, None, None, implementation="cpu")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@needs_cpu
def test_compiled_operators_refuse_what_they_cannot_read():
    """The library's own checks, for who calls an operator by its name."""
    norm = torch.ops.heptapod_fast.layer_norm_cpu.default
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="contiguous tensors only"):
        norm(x.t(), None, None, 1e-6)
    with pytest.raises(RuntimeError, match="float32 or bfloat16 only"):
        norm(x.half(), None, None, 1e-6)
    with pytest.raises(RuntimeError, match="of the width of a row"):
        norm(x, torch.ones(7), torch.ones(7), 1e-6)
    with pytest.raises(RuntimeError, match="together, or neither"):
        norm(x, torch.ones(8), None, 1e-6)


def test_refusals():
    x, branch, (shift, weight, bias), mask, _ = draw((4, 5, 8), torch.float32, 0.2)
    with pytest.raises(ValueError, match="one of them is None"):
        layer_norm(x, weight, None)
    with pytest.raises(ValueError, match=r"weight and bias of shape \(8,\), got \(4,\)"):
        layer_norm(x, weight[:4], bias)
    with pytest.raises(ValueError, match=r"branch like x, torch.float32 \(4, 5, 8\), got"):
        add_layer_norm(x, branch.bfloat16(), shift, weight, bias)
    with pytest.raises(ValueError, match=r"branch_bias of shape \(8,\), got \(3,\)"):
        add_layer_norm(x, branch, shift[:3], weight, bias)
    with pytest.raises(ValueError, match="dividing 15 rows"):
        add_layer_norm(x[:3], branch[:3], shift, weight, bias, mask)


@needs_triton
def test_wide_rows_are_the_references():
    from heptapod_fast.kernels import tuning

    assert {tuning.largest("layer_norm", k) for k in ("forward", "backward")} == {MAX_WIDTH}
    x = torch.randn(2, MAX_WIDTH + 1, device=DEVICE)
    with pytest.raises(dispatch.Unavailable, match="4097 wide, at most 4096"):
        layer_norm(x, None, None, implementation="triton")
    torch.testing.assert_close(layer_norm(x, None, None).double(), exact(x), rtol=1e-4, atol=1e-5)
