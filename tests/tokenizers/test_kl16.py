"""KL-16: every layer and the whole against float64 formulas, the posterior, chunks, dtypes."""

import pytest
import torch

import heptapod_fast.tokenizers.autoencoder as layers
from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers import KL16, pretrained
from heptapod_fast.tokenizers.kl16 import SCALE, posterior_tokens
from tests.tokenizers.reference import Reference, ReferenceKL16, gap, images, random_weights

IMAGES = images(3, 32)


@pytest.fixture(scope="module")
def tokenizer():
    return KL16(random_weights("kl16"), 32)


@pytest.fixture(scope="module")
def reference():
    return ReferenceKL16(random_weights("kl16"))


def randomised(module, seed=0):
    """The module with random weights of all sizes, and its reference."""
    generator = torch.Generator().manual_seed(seed)
    for value in module.parameters():
        value.data = torch.randn(value.shape, generator=generator) / max(
            1.0, value[0].numel() ** 0.5
        )
    weights = {f"x.{key}": value for key, value in module.state_dict().items()}
    return module.requires_grad_(False), Reference(weights)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: layers.ResnetBlock(64, 64), "resnet"),
        (lambda: layers.ResnetBlock(64, 96), "resnet"),
        (lambda: layers.AttnBlock(64), "attention"),
        (lambda: layers.Downsample(64), "down"),
        (lambda: layers.Upsample(64), "up"),
    ],
)
def test_layers_are_the_formulas(make, name):
    module, reference = randomised(make())
    # A mean far from 0 and rows unlike columns.
    x = torch.randn(2, 64, 6, 10, generator=torch.Generator().manual_seed(1)) * 2 + 1
    kept = x.clone()
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert gap(module(given), getattr(reference, name)(x.double(), "x")) < 1e-5
        assert torch.equal(given, kept)


def test_the_edges_of_downsampling():
    module, _ = randomised(layers.Downsample(32))
    x = torch.randn(1, 32, 8, 8)
    changed = x.clone()
    changed[:, :, 0, 0] += 1.0  # seen by the first output as its upper left weight
    difference = (module(changed) - module(x))[0, :, 0, 0]
    torch.testing.assert_close(difference, module.conv.weight[:, :, 0, 0].sum(1))


def test_norm_keeps_float32_statistics_in_bf16(monkeypatch):
    kinds = []  # on a CPU mixed dtypes hide the difference
    true_norm = layers.F.group_norm
    monkeypatch.setattr(
        layers.F, "group_norm", lambda x, *others: kinds.append(x.dtype) or true_norm(x, *others)
    )
    norm = layers.Norm(64).requires_grad_(False)
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (x + 60.0).bfloat16()  # steps of 0.25: a mean or a spread in bf16 would be far off
    expected = torch.nn.functional.silu(true_norm(x.double(), 32, eps=1e-6))
    assert norm(x).dtype == torch.bfloat16 and kinds == [torch.float32]
    assert (norm(x).double() - expected).abs().max() < 0.02


@pytest.mark.parametrize("ratio", [0, 10, 1000])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norm_keeps_a_small_spread_around_a_large_mean(ratio, layout):
    x = torch.randn(2, 64, 16, 16, generator=torch.Generator().manual_seed(0)) + ratio
    norm = layers.Norm(64, silu=False).requires_grad_(False)
    expected = torch.nn.functional.group_norm(x.double(), 32, eps=1e-6)
    assert (norm(x.to(memory_format=layout)) - expected).abs().max() < 3e-4 * (1 + ratio / 100)
    if ratio <= 10:
        assert (norm(x.to(memory_format=layout)) - expected).abs().max() < 2e-5


def test_float32_means_float32(tokenizer, monkeypatch):
    seen = []

    def encode(images):
        seen.append(
            (
                torch.get_float32_matmul_precision(),
                torch.backends.cudnn.allow_tf32,
                torch.backends.cudnn.deterministic,
            )
        )
        return torch.zeros(len(images), 32, 2, 2, dtype=torch.float64)

    monkeypatch.setattr(tokenizer.network, "encode", encode)
    torch.set_float32_matmul_precision("high")
    torch.set_default_dtype(torch.float64)
    try:
        mean, _ = tokenizer.encode_moments(IMAGES)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
    assert seen == [("highest", False, True)] and torch.backends.cudnn.allow_tf32
    assert mean.dtype == torch.float32 and mean.is_contiguous()


def test_float32_in_several_threads_leaves_nothing_behind():
    exact, seen = pretrained._exact_float32, []
    torch.set_float32_matmul_precision("high")
    try:
        exact.__enter__()
        exact.__enter__()  # another thread, which the first one does not outlive
        exact.__exit__()
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        exact.__exit__()
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False), ("high", True)]


def test_whole_network_against_float64(tokenizer, reference):
    mean, std = tokenizer.encode_moments(IMAGES)
    expected_mean, expected_std = reference.moments(IMAGES)
    assert mean.shape == std.shape == (3, 16, 2, 2) and mean.dtype == std.dtype == torch.float32
    assert gap(mean, expected_mean) < 1e-4 and gap(std, expected_std) < 1e-4
    tokens = tokenizer.encode(IMAGES)
    assert tokens.shape == (3, 4, 16) and tokens.dtype == torch.float32
    # Token 1 is row 0, column 1.
    assert gap(tokens[:, 1], 0.2325 * expected_mean[:, :, 0, 1]) < 1e-4
    assert gap(tokens[:, 2], 0.2325 * expected_mean[:, :, 1, 0]) < 1e-4
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == (3, 3, 32, 32) and decoded.dtype == torch.float32
    assert gap(decoded, reference.decode(expected_mean)) < 1e-4
    assert tokenizer.decode(100 * tokens).abs().max() > 1.0  # not clipped


def test_other_sizes(reference):
    tokenizer = KL16(random_weights("kl16"), 48)
    assert tokenizer.spec.num_tokens == 9
    x = images(1, 48)
    assert gap(tokenizer.encode_moments(x)[0], reference.moments(x)[0]) < 1e-4
    assert tokenizer.decode(tokenizer.encode(x)).shape == (1, 3, 48, 48)


def test_log_variance_is_clamped():
    weights = dict(random_weights("kl16"))
    bias = weights["quant_conv.bias"].clone()
    bias[16], bias[17], bias[0] = 1000.0, -1000.0, 50.0
    tokenizer = KL16(weights | {"quant_conv.bias": bias}, 32)
    mean, std = tokenizer.encode_moments(IMAGES)
    torch.testing.assert_close(std[:, 0], torch.full((3, 2, 2), 22026.4658))
    torch.testing.assert_close(std[:, 1], torch.full((3, 2, 2), 3.0590232e-7))
    assert mean[:, 0].mean() > 40  # the mean is not


def test_samples_have_the_posterior_s_moments():
    mean = torch.randn(16, 4, 4)
    std = torch.rand(16, 4, 4) + 0.5
    count = 4000
    tokens = posterior_tokens(mean.expand(count, -1, -1, -1), std.expand(count, -1, -1, -1), Rng(3))
    tokens = tokens.double().transpose(1, 2).unflatten(2, (4, 4)) / 0.2325
    standard = (tokens.mean(0) - mean) / std * count**0.5
    assert standard.abs().max() < 4.5 and abs(standard.std() - 1) < 0.2
    assert (tokens.std(0) / std - 1).abs().max() < 0.06
    centred = ((tokens - mean) / std).flatten(1)
    correlation = centred.T @ centred / count - torch.eye(256)
    assert correlation.abs().max() < 0.1  # every place has noise of its own


def test_samples_are_keyed_by_index(tokenizer):
    rng, index = Rng(7), torch.tensor([5, 2**40, 11])
    tokens = tokenizer.encode(IMAGES, rng, index)
    moments = tokenizer.encode_moments(IMAGES)
    assert torch.equal(tokens, posterior_tokens(*moments, rng, index))  # as from a cache
    turned = posterior_tokens(*(m.flip(0) for m in moments), rng, index.flip(0)).flip(0)
    assert torch.equal(tokens, turned)
    noise = (tokens / SCALE - moments[0].flatten(2).transpose(1, 2)) / moments[1].flatten(
        2
    ).transpose(1, 2)
    expected = rng.normal("kl16.posterior", index, 64).view(3, 4, 16)
    torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-3)
    for other in (
        tokenizer.encode(IMAGES, rng),
        tokenizer.encode(IMAGES, Rng(8), index),
        tokenizer.encode(IMAGES, rng.at(1), index),
        tokenizer.encode(IMAGES),
    ):
        assert not torch.isclose(tokens, other).all(-1).any()
    assert torch.equal(
        tokenizer.encode(IMAGES, rng), tokenizer.encode(IMAGES, rng, torch.arange(3))
    )


def test_posterior_refusals():
    mean = torch.zeros(3, 16, 2, 2)
    with pytest.raises(ValueError, match="standard deviation"):
        posterior_tokens(mean, None, Rng(0))
    for index in (torch.arange(2), torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"index \(3,\)"):
            posterior_tokens(mean, mean, Rng(0), index)
    half = posterior_tokens(torch.full((1, 16, 2, 2), 2.0).half())
    assert half.dtype == torch.float32 and torch.equal(half, torch.full((1, 4, 16), 2 * 0.2325))


def test_chunks_change_rounding_only(tokenizer, monkeypatch):
    # Convolution libraries choose algorithms by the number of images, so not bit for bit.
    together = tokenizer.encode(IMAGES)
    decoded = tokenizer.decode(together)
    sizes = []
    encode = tokenizer.network.encode
    monkeypatch.setattr(tokenizer.network, "encode", lambda x: sizes.append(len(x)) or encode(x))
    for pixels, expected in ((1, [1, 1, 1]), (2 * 32**2, [2, 1]), (10**9, [3])):
        sizes.clear()
        monkeypatch.setattr(tokenizer, "chunk_pixels", pixels)
        assert gap(tokenizer.encode(IMAGES), together) < 1e-4 and sizes == expected
        assert gap(tokenizer.decode(together), decoded) < 1e-4
    assert tokenizer.encode(IMAGES[:0]).shape == (0, 4, 16)
    assert tokenizer.decode(together[:0]).shape == (0, 3, 32, 32)


def test_bf16_is_close(tokenizer):
    half = KL16(random_weights("kl16"), 32, torch.bfloat16)
    mean, std = half.encode_moments(IMAGES)
    expected_mean, expected_std = tokenizer.encode_moments(IMAGES)
    assert mean.dtype == std.dtype == torch.float32
    # Measured 0.043; float32 would give 1e-6.
    assert 1e-4 < gap(mean, expected_mean) < 0.1 and gap(std, expected_std) < 0.1
    decoded = half.decode(tokenizer.encode(IMAGES))
    assert decoded.dtype == torch.float32
    assert gap(decoded, tokenizer.decode(tokenizer.encode(IMAGES))) < 0.15
    # Only convolutions between the images and the latent are rounded.
    kinds = {key: value.dtype for key, value in half.network.state_dict().items()}
    assert kinds["encoder.mid.1.q.weight"] == kinds["decoder.conv_out.bias"] == torch.bfloat16
    assert kinds["encoder.norm_out.weight"] == kinds["quant_conv.weight"] == torch.float32
    assert half.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="rounded weights"):
        half.state()
    with pytest.raises(ValueError, match=r"torch\.float16"):
        KL16(random_weights("kl16"), 32, torch.float16)


def test_inputs_of_any_float_dtype_and_an_active_autocast(tokenizer):
    expected = tokenizer.encode(IMAGES)
    assert gap(tokenizer.encode(IMAGES.double()), expected) < 1e-5
    assert gap(tokenizer.encode(IMAGES.bfloat16()), expected) < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gap(tokenizer.encode(IMAGES), expected) < 1e-5


def test_tokens_can_be_trained_on_and_nothing_is_recorded(tokenizer):
    x = IMAGES.clone().requires_grad_()
    tokens = tokenizer.encode(x, Rng(0))
    assert not tokens.requires_grad and not tokens.is_inference()
    weight = torch.ones(16, requires_grad=True)
    (tokens * weight).sum().backward()
    assert weight.grad.isfinite().all() and x.grad is None
    assert not tokenizer.decode(tokens.requires_grad_()).requires_grad
    assert not any(p.requires_grad for p in tokenizer.network.parameters())
    weight = tokenizer.network.decoder.conv_blocks[4].res[1].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match="--image-size"):
        tokenizer.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="--image-size"):
        tokenizer.encode(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="to_unit"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected tokens \(B, 4, 16\)"):
        tokenizer.decode(torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="float tokens"):
        tokenizer.decode(torch.zeros(1, 4, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="--image-size 40 is not a multiple"):
        KL16(random_weights("kl16"), 40)
