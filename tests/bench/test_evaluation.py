"""bench/evaluation.py: what it counts as memory, and a smallest measurement."""

import pytest
import torch

from bench import evaluation
from heptapod_fast.evaluation import extractors, fidelity
from heptapod_fast.evaluation.image_sets import open_images_at


def test_memory_that_is_taken_is_seen():
    """200 MB are written to, and let go of: the peak has them, what is in memory then has not."""
    evaluation.forget_peak()
    before = evaluation.memory("VmRSS")
    taken = torch.ones(200_000_000, dtype=torch.uint8)
    assert taken[-1] == 1
    del taken
    assert 190e6 < evaluation.memory("VmHWM") - before < 400e6
    evaluation.forget_peak()
    assert evaluation.memory("VmHWM") - before < 150e6


def test_images_are_many_and_different(tmp_path):
    evaluation.write_images(tmp_path / "a.npz", 300, 32, seed=0)
    found = torch.cat(list(open_images_at(str(tmp_path / "a.npz"), 32, "--samples").batches()))
    assert found.shape == (300, 3, 32, 32)
    assert len(found.flatten(1).unique(dim=0)) > 290


def test_its_network_has_as_many_numbers_as_inception():
    features = evaluation.Light()(torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8))
    assert features.pooled.shape == (3, 2048) and features.logits.shape == (3, 1008)
    of_inception = extractors.place_by_place(torch.zeros(3, 192, 17, 17))
    assert features.spatial.shape == of_inception.shape
    assert all(values.dtype == torch.float32 for values in features)


def test_a_row_has_the_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "POOLED", 16)
    monkeypatch.setattr(evaluation, "SPATIAL", 14)
    monkeypatch.setattr(evaluation, "LOGITS", 10)
    (row,) = evaluation.measure(tmp_path, 300, 200, 32, evaluation.METRICS)
    assert row["name"] == "300 samples of 32 px against 200 images"
    assert 0 <= row["extra_info"]["GB until all samples were seen"]
    assert row["extra_info"]["GB beyond the networks"] < 2
    assert row["extra_info"]["metrics"] == "fid, sfid, is, kid, precision, recall"
    assert row["stats"]["median"] > 0


@pytest.mark.parametrize("room, times", [(40_000, 1.25), (1, 1.8)])
def test_features_are_kept_once(room, times):
    """Of 40,000 images: no second copy at the end. Where fewer were expected, the last time that
    there was no room 32,768 of them are moved."""

    class Wide:
        def __call__(self, pixels):
            values = torch.ones(len(pixels), 2048)
            return extractors.Features(values, values, values)

    pixels = torch.zeros(64, 3, 1, 1, dtype=torch.uint8)
    evaluation.forget_peak()
    before = evaluation.memory("VmRSS")
    kept = fidelity.Kept(Wide(), {"pooled"}, room)
    for _ in range(625):
        kept.add(pixels)
    assert kept.of("pooled").shape == (40_000, 2048)
    size = 40_000 * 2048 * 4
    assert evaluation.memory("VmHWM") - before < times * size
