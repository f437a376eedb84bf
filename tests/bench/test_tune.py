"""bench/tune.py without a GPU: what it tries and what it keeps."""

import time

import pytest

from bench import bench_attention, tune
from heptapod_fast.kernels import tuning

KEY = ("attention", "forward", "sm_90", 64)


@pytest.fixture
def config(monkeypatch):
    found = dict(BLOCK_Q=64, BLOCK_K=64, STAGES=2, num_warps=4)
    monkeypatch.setattr(tuning, "row", lambda *key: found)
    return found


def improved(monkeypatch, config, seconds, tunable=lambda kernel, config: True):
    tried = []

    def total(cases):
        tried.append(dict(config))
        return seconds(config)

    monkeypatch.setattr(tune, "total", total)
    tune.improve(KEY, [], time.monotonic() + 100, tunable)
    return tried


def test_a_tile_grows_together_with_its_warps(monkeypatch, config):
    def seconds(c):
        return 1.0 / min(c["BLOCK_Q"], 128) + 0.1 * (c["num_warps"] != c["BLOCK_Q"] // 16)

    improved(monkeypatch, config, seconds)
    assert config == dict(BLOCK_Q=128, BLOCK_K=64, STAGES=2, num_warps=8)


def test_stages_go_by_one(monkeypatch, config):
    improved(monkeypatch, config, lambda c: 1.0 + abs(c["STAGES"] - 3))
    assert config["STAGES"] == 3


def test_what_fails_or_saves_too_little_is_put_back(monkeypatch, config):
    before = dict(config)
    improved(monkeypatch, config, lambda c: 1.0 if c == before else None)
    assert config == before
    improved(monkeypatch, config, lambda c: 1.0 if c == before else 0.99)
    assert config == before


@pytest.mark.parametrize(
    "kernel",
    ["forward", "forward_tail", "forward_masked", "backward", "backward_tail", "backward_masked"],
)
def test_no_tile_is_tried_that_the_kernels_do_not_know(monkeypatch, config, kernel):
    monkeypatch.setattr(tune, "GAIN", 2.0)  # everything is a gain: as far as it may go

    def tunable(_, config):
        return bench_attention.tunable(kernel, config)

    tried = improved(monkeypatch, config, lambda c: 1.0, tunable)
    assert len(tried) > 5
    for each in tried:
        smallest = 32 if kernel.startswith("backward") else 64
        assert each["BLOCK_Q"] in (smallest, 64, 128) and each["BLOCK_K"] in (64, 128)
        if kernel in ("forward_tail", "forward_masked"):
            assert each["BLOCK_K"] == 64


def test_the_committed_tables_of_attention_are_tunable():
    for arch, kernels in tuning.table("attention").items():
        for kernel, rows in kernels.items() if arch.startswith("sm_") else ():
            assert all(bench_attention.tunable(kernel, config) for config in rows.values())


def test_other_tables_have_other_names(monkeypatch):
    """Rows of a chunk without warps, a switch that is no number."""
    found = dict(rows=512, SWAP=False)
    monkeypatch.setattr(tuning, "row", lambda *key: found)
    improved(monkeypatch, found, lambda c: abs(c["rows"] - 2048) + 1.0)
    assert found == dict(rows=2048, SWAP=False)
