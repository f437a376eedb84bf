"""flow_loss and diffusion_loss from a plain kernel up, one row per program, float32.

Each step is a whole kernel, tested against the references in ops/philox.py, ops/flow_loss.py and
ops/diffusion_loss.py. Its docstring says which idea it adds and where kernels/randomness.py,
kernels/flow_loss.py and kernels/diffusion_loss.py have it. docs/kernels/README.md tells the story
in words.
"""

import math

import pytest
import torch

from heptapod_fast.ops import (
    Draws,
    cosine_betas,
    diffusion_inputs,
    diffusion_loss,
    flow_inputs,
    flow_loss,
    schedule_tables,
)
from heptapod_fast.ops.philox import philox
from tests.numerics import DEVICE

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

RECIP_MINUS_ONE = tl.constexpr(3)  # rows of the tables
MEAN_X0 = tl.constexpr(4)
LOG_BETA = tl.constexpr(6)
LOG_POSTERIOR = tl.constexpr(7)


@triton.jit
def words(
    index,  # int64 scalar: which sample
    slot,  # int64 scalar: which row of the sample
    block,  # [BLOCKS]: which four words of the row
    key0,  # int64 scalar below 2**32
    key1,  # int64 scalar below 2**32
):
    """Step 1: 128 random bits from a counter and a key, by Philox4x32-10.

    A counter of four words goes through ten rounds of multiplying and mixing with a key. There is
    no state: whoever knows the counter can make the same bits anywhere, at any time, in any order.

    The real one is `philox_words` in kernels/randomness.py.
    """
    c0 = block.to(tl.uint32)
    c1 = slot.to(tl.uint32)
    c2 = index.to(tl.uint32)
    c3 = (index >> 32).to(tl.uint32)
    k0 = key0.to(tl.uint32)
    k1 = key1.to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words_kernel(
    index_ptr,  # (R,) int64
    slot_ptr,  # (R,) int64
    out_ptr,  # (R, BLOCKS, 4) int64
    key0,
    key1,
    BLOCKS: tl.constexpr,  # power of 2
):
    """Writes the words of step 1."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)  # [BLOCKS]
    index = tl.load(index_ptr + row)
    slot = tl.load(slot_ptr + row)
    w0, w1, w2, w3 = words(index, slot, block, key0, key1)
    at = out_ptr + (row * BLOCKS + block) * 4
    tl.store(at, w0.to(tl.int64))
    tl.store(at + 1, w1.to(tl.int64))
    tl.store(at + 2, w2.to(tl.int64))
    tl.store(at + 3, w3.to(tl.int64))


@triton.jit
def uniform(word):
    """float32 on (0, 1) from a word: 24 bits and a half, never 0, never 1."""
    high_bits = (word >> 8).to(tl.int32).to(tl.float32)
    return tl.minimum((high_bits + 0.5) / 16777216.0, 1.0 - 1.0 / 16777216.0)


@triton.jit
def pair(word0, word1):
    """Two standard normal numbers from two words, by Box-Muller."""
    radius = tl.sqrt(-2.0 * tl.log(uniform(word0)))
    angle = 6.283185307179586 * uniform(word1)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(
    index,  # int64 scalar
    slot,  # int64 scalar
    key0,
    key1,
    BLOCK: tl.constexpr,  # channels, a power of 2, at least 4
):
    """[BLOCK] standard normal numbers of a row: channels 4b..4b+3 from the words of block b.

    `row_normals` in kernels/randomness.py does this for a tile of rows, with a sine and cosine of
    its own: an angle below a full turn needs no reduction of large arguments.
    """
    w0, w1, w2, w3 = words(index, slot, tl.arange(0, BLOCK // 4), key0, key1)
    n0, n1 = pair(w0, w1)
    n2, n3 = pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def flow_inputs_kernel(
    x0_ptr,  # (M, C)
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    xt_ptr,  # (M * repeat, C)
    time_ptr,  # (M * repeat,)
    repeat,  # rows per token
    channels,  # C
    time0,
    time1,
    noise0,
    noise1,
    BLOCK: tl.constexpr,  # power of 2, at least C and 4
):
    """Step 2: a time and noise for each row, x_t written, the noise forgotten.

    Row m * repeat + k is repeat k of token m and draws with the slot slot[m] * repeat + k. Time and
    noise are streams of two keys. The noise is never stored: it would be as large as x_t.

    The real flow_inputs_kernel does this in tiles of several rows; diffusion_inputs_kernel draws an
    integer time and mixes by two rows of the schedule's tables.
    """
    row = tl.program_id(0)
    token = row // repeat
    index = tl.load(index_ptr + token)
    slot = tl.load(slot_ptr + token) * repeat + row % repeat

    word, _, _, _ = words(index, slot, tl.zeros((1,), tl.int32), time0, time1)
    time = uniform(word)  # [1]
    noise = normals(index, slot, noise0, noise1, BLOCK)  # [BLOCK]

    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    x0 = tl.load(x0_ptr + token * channels + channel, mask=inside, other=0.0)
    tl.store(xt_ptr + row * channels + channel, (1.0 - time) * x0 + time * noise, mask=inside)
    tl.store(time_ptr + row + tl.arange(0, 1), time)


@triton.jit
def flow_loss_kernel(
    prediction_ptr,  # (M * repeat, C)
    x0_ptr,  # (M, C)
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    grad_ptr,  # (M,) the gradient of each token's loss
    loss_ptr,  # (M,)
    dprediction_ptr,  # (M * repeat, C)
    repeat,  # rows per token
    channels,  # C
    noise0,
    noise1,
    BLOCK: tl.constexpr,  # power of 2, at least C and 4
):
    """Step 3: the error against noise that is made again, and its gradient.

    The same counter gives the same noise, so the velocity eps - x_0 costs some arithmetic instead
    of a read. A program takes a token with its repeats: the mean over them is a sum in a register.

    The real flow_loss_forward_kernel and flow_loss_backward_kernel are two, because the gradient of
    the loss is not known in the forward pass; each makes the noise once more.
    """
    token = tl.program_id(0)
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = channel < channels
    x0 = tl.load(x0_ptr + token * channels + channel, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + token)
    index = tl.load(index_ptr + token)
    total = 0.0
    for k in tl.range(0, repeat):
        at = (token * repeat + k) * channels + channel
        slot = tl.load(slot_ptr + token) * repeat + k
        noise = normals(index, slot, noise0, noise1, BLOCK)
        guess = tl.load(prediction_ptr + at, mask=inside, other=0.0)
        error = tl.where(inside, guess - (noise - x0), 0.0)
        total += tl.sum(error * error, axis=0)
        tl.store(dprediction_ptr + at, 2.0 * error * grad / (channels * repeat), mask=inside)
    tl.store(loss_ptr + token, total / (channels * repeat))


@triton.jit
def diffusion_loss_kernel(
    prediction_ptr,  # (M * repeat, 2 C): eps_hat, v
    t_ptr,  # (M * repeat,) int64, none of them 0
    table_ptr,  # (8, T)
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    loss_ptr,  # (M,)
    repeat,  # rows per token
    channels,  # C
    steps,  # T
    noise0,
    noise1,
    BLOCK: tl.constexpr,  # power of 2, at least C and 4
):
    """Step 4: the variational bound without x_0 and x_t.

    The bound compares the posterior's mean mu, made of x_0 and x_t, with mu_hat, made of the
    predicted x_0 and x_t. With e = eps_hat - eps both differences are multiples of e:

        x_0 - x0_hat = sqrt(1 / abar_t - 1) e        mu - mu_hat = a_t sqrt(1 / abar_t - 1) e

    The noise, made again, is all that is needed: no x_t is read, and nothing of the size of
    x_t / sqrt(abar_t), 20,000 at the last step, is subtracted from its like.

    The real diffusion_loss_forward_kernel has the likelihood of t = 0 besides, where x_0 is read
    after all, and diffusion_loss_backward_kernel the derivatives.
    """
    token = tl.program_id(0)
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = channel < channels
    index = tl.load(index_ptr + token)
    total = 0.0
    for k in tl.range(0, repeat):
        row = token * repeat + k
        at = prediction_ptr + row * 2 * channels + channel
        slot = tl.load(slot_ptr + token) * repeat + k
        noise = normals(index, slot, noise0, noise1, BLOCK)
        error = tl.load(at, mask=inside, other=0.0) - noise

        table = table_ptr + tl.load(t_ptr + row)
        log_posterior = tl.load(table + LOG_POSTERIOR * steps)
        span = tl.load(table + LOG_BETA * steps) - log_posterior
        factor = tl.load(table + MEAN_X0 * steps) * tl.load(table + RECIP_MINUS_ONE * steps)
        v = tl.load(at + channels, mask=inside, other=0.0)
        rise = 0.5 * (v + 1.0) * span  # log s^2 - log beta~_t
        distance = factor * error * tl.exp(-0.5 * log_posterior)  # (mu - mu_hat) / sqrt(beta~_t)
        kl = 0.5 * (rise - 1.0 + tl.exp(-rise) * (1.0 + distance * distance))
        bits = kl * 1.4426950408889634
        total += tl.sum(tl.where(inside, error * error + bits, 0.0), axis=0)
    tl.store(loss_ptr + token, total / (channels * repeat))


TIME_KEY = (0x12345678, 9)
NOISE_KEY = (0xDEADBEEF, 0xFFFFFFFF)
# Tokens, rows per token, channels.
SHAPES = [(1, 1, 1), (3, 2, 4), (2, 4, 7), (4, 3, 16)]


def draw(tokens, repeat, channels):
    """x_0 (M, C) and where its draws come from, large indices among them."""
    index = torch.randint(-(2**62), 2**62, (tokens,), device=DEVICE)
    slot = torch.randint(0, 2**32, (tokens,), device=DEVICE)
    x0 = torch.randn(tokens, channels, device=DEVICE)
    return x0, Draws(index, slot, repeat, TIME_KEY, NOISE_KEY)


def block_of(channels):
    return max(4, triton.next_power_of_2(channels))


@pytest.mark.parametrize("key", [TIME_KEY, NOISE_KEY])
def test_step_1_words_from_a_counter(key):
    _, draws = draw(5, 1, 1)
    out = torch.full((5, 2, 4), -1, device=DEVICE)
    words_kernel[(5,)](draws.index_M, draws.slot_M, out, *key, BLOCKS=2)
    assert torch.equal(out.flatten(1), philox(draws.index_M, draws.slot_M, 2, key))


@pytest.mark.parametrize("tokens, repeat, channels", SHAPES)
def test_step_2_noise_that_is_not_stored(tokens, repeat, channels):
    x0, draws = draw(tokens, repeat, channels)
    rows = tokens * repeat
    xt = torch.full((rows, channels), torch.nan, device=DEVICE)
    time = torch.full((rows,), torch.nan, device=DEVICE)
    flow_inputs_kernel[(rows,)](
        x0,
        draws.index_M,
        draws.slot_M,
        xt,
        time,
        repeat,
        channels,
        *TIME_KEY,
        *NOISE_KEY,
        BLOCK=block_of(channels),
    )
    expected_xt, expected_time = flow_inputs(x0, draws, "reference")
    assert torch.equal(time, expected_time)
    torch.testing.assert_close(xt, expected_xt, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens, repeat, channels", SHAPES)
def test_step_3_noise_that_is_made_again(tokens, repeat, channels):
    x0, draws = draw(tokens, repeat, channels)
    prediction = torch.randn(tokens * repeat, channels, device=DEVICE, requires_grad=True)
    grad = torch.randn(tokens, device=DEVICE)
    expected = flow_loss(prediction, x0, draws, "reference")
    (expected_gradient,) = torch.autograd.grad(expected, prediction, grad)

    loss = torch.full((tokens,), torch.nan, device=DEVICE)
    gradient = torch.full_like(prediction, torch.nan)
    flow_loss_kernel[(tokens,)](
        prediction.detach(),
        x0,
        draws.index_M,
        draws.slot_M,
        grad,
        loss,
        gradient,
        repeat,
        channels,
        *NOISE_KEY,
        BLOCK=block_of(channels),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens, repeat, channels", SHAPES)
def test_step_4_the_bound_from_the_noise_alone(tokens, repeat, channels):
    x0, draws = draw(tokens, repeat, channels)
    tables = schedule_tables(cosine_betas()).to(DEVICE)
    xt, t = diffusion_inputs(x0, draws, tables, "reference")
    t = t.clamp(1, 900)  # the reference loses digits where x_t / sqrt(abar_t) is large
    at_t = tables[:, t, None]
    noise = draws.noise(channels)
    xt = at_t[0] * x0.repeat_interleave(repeat, 0) + at_t[1] * noise
    prediction = torch.randn(tokens * repeat, 2 * channels, device=DEVICE)
    prediction[:, :channels] = noise + 0.1 * prediction[:, :channels]
    expected = diffusion_loss(prediction, x0, xt, t, draws, tables, True, "reference")

    loss = torch.full((tokens,), torch.nan, device=DEVICE)
    diffusion_loss_kernel[(tokens,)](
        prediction,
        t,
        tables,
        draws.index_M,
        draws.slot_M,
        loss,
        repeat,
        channels,
        tables.shape[1],
        *NOISE_KEY,
        BLOCK=block_of(channels),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    assert math.isclose(float(at_t[1][0] / at_t[0][0]), float(at_t[3][0]), rel_tol=1e-4)
