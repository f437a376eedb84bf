"""linear_cross_entropy from a plain kernel up: one target, one row per program, float32.

Each step is a whole kernel, tested against the reference in ops/linear_cross_entropy.py. Its
docstring says which idea it adds and where kernels/linear_cross_entropy.py has it.
docs/kernels/README.md tells the story in words.
"""

import pytest
import torch
from torch import Tensor

from heptapod_fast.ops import linear_cross_entropy
from tests.numerics import DEVICE

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def loss_kernel(
    logits_ptr,  # (R, V)
    target_ptr,  # (R,) int64
    loss_ptr,  # (R,)
    codes,  # V
    BLOCK: tl.constexpr,  # power of 2, at least V
):
    """Step 1: a row of logits in registers, loss = log sum exp(x) - x[target].

    The maximum is taken off before the exponential, which could overflow otherwise, and added to
    the logarithm again. Codes beyond V become -inf: exp(-inf) = 0 adds nothing.

    The real cross_entropy_rows_kernel does this for up to 16384 codes with 16 warps, the next row
    on its way while one is computed.
    """
    row = tl.program_id(0)
    code = tl.arange(0, BLOCK)  # [BLOCK]
    at = logits_ptr + row * codes + code
    x = tl.load(at, mask=code < codes, other=float("-inf"))
    peak = tl.max(x, axis=0)
    mass = tl.sum(tl.exp(x - peak), axis=0)
    target = tl.load(target_ptr + row)
    chosen = tl.load(logits_ptr + row * codes + target)
    tl.store(loss_ptr + row, peak + tl.log(mass) - chosen)


@triton.jit
def online_loss_kernel(
    logits_ptr,  # (R, V)
    target_ptr,  # (R,) int64
    loss_ptr,  # (R,)
    codes,  # V
    BLOCK: tl.constexpr,  # codes of a chunk, a power of 2
):
    """Step 2: any number of codes, chunk by chunk, in one reading.

    Carried from chunk to chunk are the maximum so far and the sum of exponentials below it. When a
    chunk raises the maximum, the old sum shrinks by exp(old - new): the online softmax, which
    attention uses as well.

    The real cross_entropy_blocks_kernel does this for several rows at once, in base 2, whose
    exponential is one instruction.
    """
    row = tl.program_id(0)
    peak = float("-inf")
    mass = 0.0
    for left in tl.range(0, codes, BLOCK):
        code = left + tl.arange(0, BLOCK)  # [BLOCK]
        at = logits_ptr + row * codes + code
        x = tl.load(at, mask=code < codes, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(x, axis=0))
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), axis=0)
        peak = higher
    target = tl.load(target_ptr + row)
    chosen = tl.load(logits_ptr + row * codes + target)
    tl.store(loss_ptr + row, peak + tl.log(mass) - chosen)


@triton.jit
def gradient_kernel(
    logits_ptr,  # (R, V), overwritten by their gradient
    target_ptr,  # (R,) int64
    loss_ptr,  # (R,)
    codes,  # V
    BLOCK: tl.constexpr,  # codes of a chunk, a power of 2
):
    """Step 3: loss and gradient in one launch, the gradient in place of the logits.

    d loss / d x = softmax(x) - onehot(target), and maximum and sum are at hand: a second reading
    turns each logit into its gradient where it stands. Nothing waits for the gradient of the total
    loss, which is a single factor: the backward pass multiplies by it.

    Both real kernels do the same. Beyond it: row weights, several targets per row, and the bias
    gradient, the sum of these gradients over rows, before they are rounded.
    """
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    chosen = tl.load(logits_ptr + row * codes + target)  # before it is overwritten
    peak = float("-inf")
    mass = 0.0
    for left in tl.range(0, codes, BLOCK):
        code = left + tl.arange(0, BLOCK)  # [BLOCK]
        at = logits_ptr + row * codes + code
        x = tl.load(at, mask=code < codes, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(x, axis=0))
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), axis=0)
        peak = higher
    tl.store(loss_ptr + row, peak + tl.log(mass) - chosen)

    for left in tl.range(0, codes, BLOCK):
        code = left + tl.arange(0, BLOCK)  # [BLOCK]
        at = logits_ptr + row * codes + code
        x = tl.load(at, mask=code < codes, other=float("-inf"))
        share = tl.exp(x - peak) / mass
        gradient = tl.where(code == target, share - 1.0, share)
        tl.store(at, gradient, mask=code < codes)


def in_chunks(z: Tensor, weight: Tensor, bias: Tensor, target: Tensor, chunk: int):
    """Step 4: total and all gradients without ever holding the (R, V) logits of a batch.

    A chunk of rows has its logits made by a product, turned into gradients by step 3, and used up
    by two more products. One buffer serves all chunks: at 16384 codes, 16448 rows in bfloat16 would
    be 539 MB of logits, and as much again for their gradient.

    `forward` in kernels/linear_cross_entropy.py is this loop, with products that give float32
    weight gradients of bfloat16 factors.
    """
    rows = len(z)
    loss = torch.empty(rows, device=z.device)
    dz = torch.empty_like(z)
    dweight = torch.zeros_like(weight)
    dbias = torch.zeros_like(bias)
    buffer = torch.empty(chunk, len(weight), device=z.device)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        logits = buffer[: part.stop - part.start]
        torch.addmm(bias, z[part], weight.t(), out=logits)
        gradient_kernel[(len(logits),)](logits, target[part], loss[part], len(weight), BLOCK=16)
        dz[part] = logits @ weight
        dweight += logits.t() @ z[part]
        dbias += logits.sum(0)
    return loss.sum(), loss, dz, dweight, dbias


# Rows, width, codes.
SHAPES = [(1, 2, 1), (5, 3, 7), (6, 8, 16), (7, 4, 100)]


def draw(rows, width, codes):
    """z (R, D), weight (V, D), bias (V,), target (R,)."""
    z = torch.randn(rows, width, device=DEVICE)
    weight = 3 * torch.randn(codes, width, device=DEVICE)
    return (
        z,
        weight,
        torch.randn(codes, device=DEVICE),
        torch.randint(codes, (rows,), device=DEVICE),
    )


def reference(z, weight, bias, target):
    """Total, losses and the gradients of z, weight and bias."""
    leaves = [each.clone().requires_grad_() for each in (z, weight, bias)]
    total, loss = linear_cross_entropy(*leaves, target, implementation="reference")
    return total.detach(), loss, *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("rows, width, codes", SHAPES)
def test_step_1_a_row_in_registers(rows, width, codes):
    z, weight, bias, target = draw(rows, width, codes)
    logits = torch.addmm(bias, z, weight.t()) + 200  # exp(200) is above the largest float32
    loss = torch.full((rows,), torch.nan, device=DEVICE)
    loss_kernel[(rows,)](logits, target, loss, codes, BLOCK=triton.next_power_of_2(codes))
    _, expected, *_ = reference(z, weight, bias, target)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("rows, width, codes", SHAPES)
def test_step_2_chunks_of_codes(rows, width, codes, block):
    z, weight, bias, target = draw(rows, width, codes)
    logits = torch.addmm(bias, z, weight.t()) + 200
    loss = torch.full((rows,), torch.nan, device=DEVICE)
    online_loss_kernel[(rows,)](logits, target, loss, codes, BLOCK=block)
    _, expected, *_ = reference(z, weight, bias, target)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, width, codes", SHAPES)
def test_step_3_gradients_in_place(rows, width, codes):
    z, weight, bias, target = draw(rows, width, codes)
    logits = torch.addmm(bias, z, weight.t())
    expected = logits.softmax(1) - torch.nn.functional.one_hot(target, codes)
    loss = torch.full((rows,), torch.nan, device=DEVICE)
    gradient_kernel[(rows,)](logits, target, loss, codes, BLOCK=16)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, reference(z, weight, bias, target)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [2, 5, 8])
@pytest.mark.parametrize("rows, width, codes", SHAPES)
def test_step_4_chunks_of_rows(rows, width, codes, chunk):
    arguments = draw(rows, width, codes)
    for a, b in zip(in_chunks(*arguments, chunk), reference(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
