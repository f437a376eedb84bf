"""Which implementation runs each operation of a run, and what is said where one cannot."""

import pytest

from heptapod_fast import ops
from heptapod_fast.ops.dispatch import Unavailable
from heptapod_fast.systems import build_system, configure
from heptapod_fast.train.operators import choose_operators
from tests.running import CPU, start_here, tiny_config

HEADS_OF_32 = {"width": 64, "heads": 2}  # a width that the kernels take
OF_EVERY_RUN = {"attention", "adamw_ema", "global_norm", "layer_norm", "philox"}


def chosen(config):
    """{operation: what was chosen for it}."""
    return {choice.operation: choice for choice in choose_operators(config, CPU.device).choices}


@pytest.mark.parametrize("name, reason", [("reference", "asked for"), ("auto", "not triton: ")])
def test_one_flag_decides_about_every_operation_with_a_kernel(name, reason):
    config = tiny_config("out", kernels=name)
    found = chosen(config)
    assert OF_EVERY_RUN <= found.keys()
    assert found["layer_norm"].reason.startswith(reason)
    # What the operation itself is told when the system calls it.
    operators = choose_operators(config, CPU.device)
    assert operators["layer_norm"] == name
    assert build_system(config, 2, operators=operators).operators["layer_norm"] == name


def test_the_choice_of_one_run_holds_for_it_alone(tmp_path):
    first, _ = start_here(tmp_path / "a", kernels="reference")
    second, _ = start_here(tmp_path / "b")
    assert first.system.operators["layer_norm"] == "reference"
    assert second.system.operators["layer_norm"] == "auto"


def test_many_codes_are_said_to_go_in_chunks():
    found = chosen(configure("B", "llamagen", data="synthetic", batch=8, device="cpu"))
    assert found["linear_cross_entropy"].implementation == "chunked"
    few = chosen(tiny_config("out"))["linear_cross_entropy"]
    assert few.implementation == "reference"
    assert "not chunked: logits are few enough to be held" in few.reason
    asked = configure("B", "llamagen", data="synthetic", batch=8, kernels="reference", device="cpu")
    assert chosen(asked)["linear_cross_entropy"].implementation == "reference"


def test_the_optimizers_flag_decides_about_its_two_operations():
    operators = choose_operators(tiny_config("out", adamw_ema="reference"), CPU.device)
    assert operators["adamw_ema"] == "reference"
    assert operators["global_norm"] == "reference"
    assert operators["layer_norm"] == "auto"


def test_what_cannot_run_names_the_flag_that_asked(monkeypatch):
    with pytest.raises(Unavailable, match="--adamw-ema cuda: .*Leave --adamw-ema away"):
        choose_operators(tiny_config("out", adamw_ema="cuda"), CPU.device)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(Unavailable, match="--kernels triton: .*Leave --kernels away"):
        choose_operators(tiny_config("out", kernels="triton"), CPU.device)


@pytest.fixture
def everything_runs(monkeypatch):
    """As where the kernels and flash-attn can run."""
    avoided = {"triton": None, "flash": "only when asked for", "reference": None}
    entries = {
        name: (lambda *_: None, lambda *_, avoid=avoid: avoid) for name, avoid in avoided.items()
    }
    monkeypatch.setitem(ops.dispatch._registry, "attention", entries)


@pytest.mark.parametrize(
    "settings, name, why",
    [
        ({"width": 96, "heads": 2}, "triton", "heads are 48 wide"),
        ({"image_size": 128, "patch_size": 4}, "triton", "1025 keys, at most 1024 fit"),
        ({"head": "local", "window": 4, "density": 2}, "flash", "it has no such mask"),
    ],
)
def test_attention_that_cannot_take_this_model_is_refused_and_not_chosen(
    everything_runs, settings, name, why
):
    settings = HEADS_OF_32 | settings
    with pytest.raises(Unavailable, match=f"--attention {name}: .*{why}"):
        choose_operators(tiny_config("out", attention=name, **settings), CPU.device)
    automatic = chosen(tiny_config("out", **settings))["attention"]
    # Kernels first; where they cannot, the next that can and needs no asking.
    expected = "reference" if name == "triton" else "triton"
    assert automatic.implementation == expected


@pytest.mark.parametrize(
    "settings, name",
    [({"head": "local", "window": 4, "density": 2}, "triton"), ({}, "flash"), ({}, "triton")],
)
def test_attention_that_can_take_this_model_is_taken_when_asked_for(
    everything_runs, settings, name
):
    settings = HEADS_OF_32 | settings
    found = chosen(tiny_config("out", attention=name, **settings))["attention"]
    assert found.implementation == name
    assert found.reason == "asked for"


def test_the_limits_are_those_of_the_systems_attention(everything_runs, monkeypatch):
    """Each kind that a step runs is asked for; the first reason against an implementation stays."""
    asked = []

    def limits(head_width, keys, visible):
        asked.append((head_width, keys))
        return {"triton": f"not with {keys} keys", "reference": None}

    monkeypatch.setattr(ops, "attention_limits", limits)
    found = chosen(tiny_config("out"))["attention"]
    assert sorted(set(asked)) == [(16, 36), (16, 37)]
    assert found.implementation == "reference"
