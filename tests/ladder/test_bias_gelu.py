"""bias_gelu with a dropout mask from a plain kernel up, one row per program, float32.

Each step is a whole kernel, tested against the reference in heptapod_fast/ops/bias_gelu.py. Its
docstring says which idea it adds and where kernels/bias_gelu.py has it. docs/kernels/README.md
tells the story in words.
"""

import pytest
import torch

from heptapod_fast.ops import DropoutMask, bias_gelu
from tests.numerics import DEVICE

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def bias_gelu_kernel(
    x_ptr,  # (R, F) a product without its bias
    bias_ptr,  # (F,)
    y_ptr,  # (R, F)
    width,  # F
    BLOCK: tl.constexpr,  # power of 2, at least F
):
    """Step 1: bias and GELU in one pass, one read and one write.

    GELU is u Phi(u) with the normal CDF by erf. The fused GELU that cuBLASLt has in its epilogue is
    the tanh form, another function.

    The real kernel (bias_gelu_forward_kernel) does the same in tiles of several rows, so that a
    program has more bytes in flight, and has SiLU for the diffusion MLP.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)
    u = x + tl.load(bias_ptr + column, mask=inside, other=0.0)
    cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
    tl.store(y_ptr + row * width + column, u * cdf, mask=inside)


@triton.jit
def mix(x):
    """32 bits to 32 bits, each depending on all: the "lowbias32" hash."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(
    key_ptr,  # (P, 2) int64, two words for each sequence
    counter_ptr,  # (N,) int64, what each row of a sequence counts as
    row,  # scalar
    column,  # [BLOCK]
    rows_per_key,  # R / P
    counters,  # N
    width,  # F
    threshold,  # p * 2**32: hashes below it are dropped
):
    """[BLOCK] booleans: the mask of a row, a function of its key, its counter and the column."""
    key = key_ptr + 2 * (row // rows_per_key)
    key0 = tl.load(key).to(tl.uint32)
    key1 = tl.load(key + 1).to(tl.uint32)
    counter = tl.load(counter_ptr + row % counters)
    element = (counter * width + column).to(tl.uint32)
    hashed = mix(mix(element ^ key0) ^ key1)
    return hashed.to(tl.int64) >= threshold


@triton.jit
def bias_gelu_dropout_kernel(
    x_ptr,  # (R, F)
    bias_ptr,  # (F,)
    y_ptr,  # (R, F)
    key_ptr,  # (P, 2) int64
    counter_ptr,  # (N,) int64
    rows_per_key,  # R / P
    counters,  # N
    width,  # F
    threshold,  # p * 2**32
    scale,  # 1 / (1 - p)
    BLOCK: tl.constexpr,  # power of 2, at least F
):
    """Step 2: dropout whose mask is computed, not stored.

    A mask of bytes would be another tensor to write here and to read in the backward pass, and a
    generator with a state would make it depend on what ran before. A hash of (key, counter, column)
    is a dozen integer instructions in a kernel that waits for memory, and depends on nothing else:
    not on the launch, the rank or the micro-batch.

    The real kernel takes `keep` and `row_keys` from kernels/randomness.py, as all do that drop; the
    threshold is a constant there, and so is whether anything is dropped.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)
    u = x + tl.load(bias_ptr + column, mask=inside, other=0.0)
    y = u * 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
    keep = kept(key_ptr, counter_ptr, row, column, rows_per_key, counters, width, threshold)
    y = tl.where(keep, y * scale, 0.0)
    tl.store(y_ptr + row * width + column, y, mask=inside)


@triton.jit
def bias_gelu_dropout_backward_kernel(
    grad_ptr,  # (R, F)
    x_ptr,  # (R, F)
    bias_ptr,  # (F,)
    dx_ptr,  # (R, F)
    key_ptr,  # (P, 2) int64
    counter_ptr,  # (N,) int64
    rows_per_key,  # R / P
    counters,  # N
    width,  # F
    threshold,  # p * 2**32
    scale,  # 1 / (1 - p)
    BLOCK: tl.constexpr,  # power of 2, at least F
):
    """Step 3: the backward pass makes activation and mask again, from x alone.

    Kept for it is x, which is there anyway as the product's result: neither u nor y nor the mask.
    The bias gradient is the sum of dx over rows; here PyTorch takes it from dx.

    The real kernel (bias_gelu_backward_kernel) adds dx up over a slab of rows while it has it in
    registers and leaves one row of partials per program, as in tests/ladder/test_layer_norm.py.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0)
    u = x + tl.load(bias_ptr + column, mask=inside, other=0.0)
    cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
    dx = grad * (cdf + u * density)
    keep = kept(key_ptr, counter_ptr, row, column, rows_per_key, counters, width, threshold)
    dx = tl.where(keep, dx * scale, 0.0)
    tl.store(dx_ptr + row * width + column, dx, mask=inside)


# Rows, width; every two rows share a key.
SHAPES = [(2, 1), (4, 7), (6, 64), (4, 100)]


def draw(rows, width):
    """x (R, F) and bias (F,)."""
    return torch.randn(rows, width, device=DEVICE), torch.randn(width, device=DEVICE)


def draw_mask(rows, p=0.25):
    """Sequences of two rows each."""
    keys = torch.randint(0, 2**32, (rows // 2, 2), device=DEVICE)
    return DropoutMask(keys, torch.randint(0, 2**20, (2,), device=DEVICE), p)


def mask_arguments(mask, width):
    """What the kernels take: keys, counters, two sizes, the width, threshold and scale."""
    return *mask.arrays(), 2, 2, width, mask.threshold(), 1.0 / (1.0 - mask.p)


@pytest.mark.parametrize("rows, width", SHAPES)
def test_step_1_bias_and_gelu_in_one_pass(rows, width):
    x, bias = draw(rows, width)
    y = torch.full_like(x, torch.nan)
    bias_gelu_kernel[(rows,)](x, bias, y, width, BLOCK=triton.next_power_of_2(width))
    torch.testing.assert_close(y, bias_gelu(x, bias, implementation="reference"))


@pytest.mark.parametrize("rows, width", SHAPES)
def test_step_2_a_mask_that_is_computed(rows, width):
    x, bias = draw(rows, width)
    mask = draw_mask(rows)
    y = torch.full_like(x, torch.nan)
    block = triton.next_power_of_2(width)
    bias_gelu_dropout_kernel[(rows,)](x, bias, y, *mask_arguments(mask, width), BLOCK=block)
    torch.testing.assert_close(y, bias_gelu(x, bias, mask, "gelu", "reference"))
    # GELU itself rounds to 0 far below 0.
    is_zero = bias_gelu(x, bias, None, "gelu", "reference") == 0
    assert torch.equal(y == 0, ~mask.keep(rows, width) | is_zero)


@pytest.mark.parametrize("rows, width", SHAPES)
def test_step_3_the_backward_pass_makes_it_again(rows, width):
    x, bias = draw(rows, width)
    mask = draw_mask(rows)
    grad = torch.randn_like(x)
    leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    y = bias_gelu(*leaves, mask, "gelu", "reference")
    expected_dx, expected_dbias = torch.autograd.grad(y, leaves, grad)

    dx = torch.full_like(x, torch.nan)
    block = triton.next_power_of_2(width)
    bias_gelu_dropout_backward_kernel[(rows,)](
        grad, x, bias, dx, *mask_arguments(mask, width), BLOCK=block
    )
    torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dx.sum(0), expected_dbias, rtol=1e-4, atol=1e-5)
