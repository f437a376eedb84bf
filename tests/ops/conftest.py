"""Shared by the tests of operations that are compiled for CPU and CUDA."""

import pytest
import torch

from heptapod_fast.ops import library


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request):
    """The name of an implementation that can run here."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param != "reference" and not library.available(request.param):
        pytest.skip(library.status())
    return request.param
