"""The options of sampling on the command line: those of the run's system, and of no other."""

import importlib
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from heptapod_fast.config.settings import setting
from heptapod_fast.sampling import SampleOptions
from heptapod_fast.systems import SYSTEMS, configure
from tests.running import ROOT, command, refused
from tests.systems.test_a_new_system import Ripple


@dataclass(frozen=True, kw_only=True)
class WordOptions(SampleOptions):
    """guidance is a word here, a number for Ripple; another default of what both have."""

    temperature: float = setting("How warm.", default=0.5)
    guidance: Literal["weak", "strong"] = setting("How much.", default="weak")
    glow: bool = setting("Whether it glows.", default=False)


class Word(Ripple):
    """A system whose options contradict Ripple's."""

    Options = WordOptions
    REFUSED_OPTIONS = {"position_order": "it has no order"}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "ripple", Ripple)
    monkeypatch.setitem(SYSTEMS, "word", Word)


@pytest.fixture
def run_of(tmp_path):
    """A run directory of a system, as far as flags need one: the configuration."""

    def make(system):
        folder = tmp_path / system
        folder.mkdir()
        (folder / "config.json").write_text(configure("tiny", system).to_json())
        return folder

    return make


@pytest.fixture
def sampling(monkeypatch):
    """The module tools/_sampling.py."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "tools")])
    return importlib.import_module("_sampling")


def test_two_systems_may_have_one_option_each_in_its_own_way(run_of, sampling):
    def parsed(*words):
        return sampling.parse_sampling(sampling.SamplingArguments, list(map(str, words)))[1]

    ripple = run_of("ripple")
    word = run_of("word")
    assert parsed(ripple, "--guidance", 2.5) == {"guidance": 2.5}
    assert parsed(word, "--guidance", "strong", "--glow") == {"guidance": "strong", "glow": True}
    assert parsed("--no-glow", word, "--seed", 3) == {"glow": False}


def test_help_is_about_the_runs_system(run_of):
    ripple = command("sample", run_of("ripple"), "--help").out
    word = command("sample", run_of("word"), "--help").out
    assert "--guidance FLOAT" in ripple
    assert "--guidance {weak,strong}" in word
    assert "(default: 0.5)" in word
    assert "(default: 0.5)" not in ripple
    assert "--positions-per-step" not in ripple + word


def test_help_without_a_run_has_what_all_systems_share():
    text = " ".join(command("sample", "--help").out.split())
    assert "--temperature FLOAT" in text
    assert "--guidance {" not in text and "--guidance FLOAT" not in text
    assert "With RUN_DIR, --help shows the options of its system" in text
    assert "--system word also has --guidance, --glow." in text


@pytest.mark.parametrize(
    "system, words, message",
    [
        ("word", ("--guidance", "2.0"), "--guidance"),  # by its own type
        ("ripple", ("--no-glow",), "--glow: this system samples with --temperature"),
        ("ripple", ("--position_order=random",), "--position-order: this system samples with"),
        ("word", ("--position-order", "random"), "--position-order random: it has no order"),
        ("heptapod", ("--guidance", "2"), "--guidance 2: this system is trained without a null"),
        ("1d-raster", ("--positions-per-step", "2"), "--positions-per-step 2: "),
    ],
)
def test_options_of_other_systems_are_refused_with_the_reason(run_of, system, words, message):
    refused(command("sample", run_of(system), *words), message)


def test_the_run_is_found_among_the_flags(run_of, sampling, tmp_path):
    run = str(run_of("word"))
    for words in (
        [run],
        ["--count", "3", run],
        ["--glow", run, "--count", "3"],
        ["--temperature", "-1", run, "--out", "grid.png"],
        ["--out=grid.png", run],
    ):
        assert sampling.peek_run(words) == run, words
    assert sampling.peek_run(["--count", "3"]) is None
    assert sampling.peek_run(["--count", "3", "no run"]) == "no run"
    refused(command("sample", "--guidance", "2", tmp_path / "none"), "is not a run directory")
