"""The system that docs/add-a-system.md builds is assembled from the page, and works."""

import importlib.util
import re
import sys

import pytest
import torch

from heptapod_fast import load_run
from heptapod_fast.rng import Rng
from heptapod_fast.systems import SYSTEMS
from heptapod_fast.train.records import read_metrics
from heptapod_fast.train.session import Ending
from tests.running import ROOT, command, final_files, flags, refused, train_here

PAGE = ROOT / "docs" / "add-a-system.md"
BAG = {"system": "bag", "heads": None, "depth": None, "head_depth": None}


def assembled() -> str:
    """The page's blocks of Python up to where it registers the system."""
    text = PAGE.read_text().split("### 7.")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """The class, from a file made of the page."""
    file = tmp_path_factory.mktemp("docs") / "bag.py"
    file.write_text(assembled())
    spec = importlib.util.spec_from_file_location("bag_of_the_docs", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Dataclasses look their annotations up there.
        patch.setitem(sys.modules, "bag_of_the_docs", module)
        spec.loader.exec_module(module)
        patch.setitem(SYSTEMS, "bag", module.Bag)
        yield module.Bag


def test_it_trains_resumes_and_samples(bag, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(whole, **BAG)
    train_here(parts, stop_at=24, **BAG)
    _, state, ending = train_here(parts, **BAG)
    assert (ending, state.images) == (Ending.FINISHED, 64)
    assert final_files(parts) == final_files(whole)
    run = load_run(whole, device="cpu")
    tokens = run.sample(torch.tensor([0, 3]), Rng(0), temperature=0.5)
    assert tokens.shape == (2, 36)
    assert run.decode(tokens).shape == (2, 3, 24, 24)
    for tool in ("evaluate", "report"):
        result = command(tool, whole)
        assert result.code == 0, result.err


def test_it_learns(bag, tmp_path):
    train_here(tmp_path, **BAG | {"images": 1280, "batch": 64, "log_every": 128})
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.03, losses


def test_its_flops_and_expected_count_are_true(bag, make_batch):
    from torch.utils.flop_counter import FlopCounterMode

    from heptapod_fast import build_system, configure

    config = configure("tiny", "bag", data="synthetic", num_classes=3)
    system = build_system(config, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss = system.loss(make_batch(system, 4), Rng(0))
    assert counter.get_total_flops() == 4 * sum(system.flops_per_image().values())
    assert loss.count == system.expected_count(4)


def test_it_is_dry_run_and_refuses_what_it_cannot_do(bag, tmp_path):
    result = command("train", *flags(**BAG), "--dry-run")
    assert result.code == 0, result.err
    assert "layers" in result.out
    out = tmp_path / "run"
    words = flags(**BAG | {"codes": None, "tokenizer": "patch", "out": out})
    refused(command("train", *words), "--tokenizer patch: --system bag needs discrete tokens")
    assert not out.exists()
