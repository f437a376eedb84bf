"""Caches on a GPU: the same batches in every mode, without waiting for the device."""

import pytest
import torch

from tests.caches import small_cache
from tests.tokenizers.reference import random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module", params=["patch-vq", "kl16"])
def cache(request, tmp_path_factory):
    """A cache that was built on the CPU."""
    for package in ("zarr", "google_crc32c"):
        pytest.importorskip(package)
    from heptapod_fast.tokenizers import KL16

    path = tmp_path_factory.mktemp(request.param)
    if request.param == "kl16":
        return small_cache(path, KL16(random_weights("kl16"), 32), count=20)
    return small_cache(path)


@pytest.mark.parametrize("mode", ["gpu", "ram", "stream"])
def test_batches_are_those_of_the_cpu(cache, mode):
    from heptapod_fast.data.cache import CacheTokens

    index = torch.arange(7, 27)
    expected = CacheTokens(cache, 3, flip=True).batch(index)
    source = CacheTokens(cache, 3, flip=True, device="cuda", mode=mode)
    source.batch(index)  # loads kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = source.batch(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tokens.device.type == found.labels.device.type == "cuda"
    assert torch.equal(found.labels.cpu(), expected.labels)
    torch.testing.assert_close(found.tokens.cpu(), expected.tokens, rtol=1e-5, atol=1e-5)
    source.check()


def test_auto_takes_the_gpu(cache):
    from heptapod_fast.data.cache.reader import choose_mode

    assert choose_mode(cache, torch.device("cuda"), "auto")[0] == "gpu"
    assert choose_mode(cache, torch.device("cuda"), "auto", reserved=2**50)[0] == "ram"


def test_moments_agree_with_the_cpu():
    """float32 convolutions without TF32: to rounding."""
    from heptapod_fast.tokenizers import KL16

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cpu = KL16(random_weights("kl16"), 64).encode_moments(images)
    gpu = KL16(random_weights("kl16"), 64).to("cuda").encode_moments(images)
    for expected, found in zip(cpu, gpu, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
