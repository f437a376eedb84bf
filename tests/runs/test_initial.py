"""--init-from: what is taken, what is drawn anew, what does not fit."""

import argparse
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from heptapod_fast.checkpoints import CheckpointError, listed
from heptapod_fast.runs import RunError
from heptapod_fast.runs.initial import Weights, find_weights, report, start_from
from heptapod_fast.systems import build_system
from tests.caches import image_folder
from tests.running import (
    NO_HEAD,
    command,
    final_tensors,
    flags,
    refused,
    start_here,
    tiny_config,
    train_here,
)

TABLE = "backbone.label.weight"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two sets: ant, bee, cat, and bee, dog."""
    path = tmp_path_factory.mktemp("sets")
    first = image_folder(path / "first", 30)
    second = image_folder(path / "second", 30)
    shutil.rmtree(second / "ant")
    (second / "cat").rename(second / "dog")
    return first, second


def on(folder) -> dict:
    return {"data": str(folder), "image_size": 16, "logogram_count": None, "images": 16}


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    train_here(out, **on(pictures[0]))
    return out


def of_checkpoint(run, name="ema-0.9999"):
    return load_file(listed(run / "checkpoints")[-1] / f"{name}.safetensors")


def said(out, **settings):
    """(session, the lines that it said)."""
    lines = []
    session, _ = start_here(out, say=lines.append, **settings)
    return session, "\n".join(lines)


def test_the_same_settings_take_everything_from_the_average(pictures, trained, tmp_path):
    session, text = said(tmp_path / "run", init_from=str(trained), **on(pictures[0]))
    expected = of_checkpoint(trained)
    parameters = dict(session.system.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    for average in session.optimizer.emas.values():
        for name, tensor in zip(session.optimizer.names, average, strict=True):
            assert torch.equal(tensor, expected[name])
    assert all(not moment.any() for moment in session.optimizer.exp_avgs)
    count = len(expected)
    assert f"weights   {count} of {count} tensors" in text and "ema-0.9999 of" in text
    assert "drawn anew" not in text and "not used" not in text and "WARNING" not in text


def test_classes_are_found_by_their_names(pictures, trained, tmp_path):
    session, text = said(tmp_path / "run", init_from=str(trained), **on(pictures[1]))
    fresh, _ = said(tmp_path / "fresh", **on(pictures[1]))
    assert session.source.class_names == ("bee", "dog")
    table = dict(session.system.named_parameters())[TABLE]
    drawn = dict(fresh.system.named_parameters())[TABLE]
    assert torch.equal(table[0], of_checkpoint(trained)[TABLE][1])
    assert torch.equal(table[1], drawn[1])
    assert "classes: 1 of 2 by their names" in text
    # The codebook was fitted on other images.
    assert "tokens of another tokenizer" in text


@pytest.mark.parametrize("names", [("c", "a"), None])
def test_the_row_of_no_class_stays_behind_the_classes(names, tmp_path):
    """Of a table of another run, and of a published file that names nothing."""
    config = tiny_config(tmp_path / "run", system="llamagen", **NO_HEAD)
    system = build_system(config, 3)
    name = system.class_table()
    theirs = {key: torch.randn_like(value) for key, value in system.state_dict().items()}
    theirs[name] = torch.arange(3.0)[:, None].expand(3, 32).contiguous()  # two classes, and none
    save_file(theirs, tmp_path / "x.safetensors")
    weights = Weights(tmp_path / "x.safetensors", "x", class_names=names)
    before = system.state_dict()[name].clone()
    taken = start_from(system, weights, ("a", "b", "c"))
    table = system.state_dict()[name]
    assert bool((table[3] == 2).all())
    if names is None:
        assert taken.classes == 0 and torch.equal(table[:3], before[:3])
    else:
        assert taken.classes == 2
        assert bool((table[0] == 1).all()) and bool((table[2] == 0).all())
        assert torch.equal(table[1], before[1])


def test_another_grid_and_depth_are_listed(pictures, trained, tmp_path):
    """image_size 24 has 36 positions where 16 has 16."""
    settings = on(pictures[0]) | {"image_size": 24, "allow_upscale": True, "depth": 2}
    session, text = said(tmp_path / "run", init_from=str(trained), **settings)
    assert "drawn anew: backbone.position.weight ((36, 32) here, (16, 32) there)" in text
    assert "not there" in text  # blocks of the second layer
    parameters = dict(session.system.named_parameters())
    expected = of_checkpoint(trained)
    assert torch.equal(parameters["backbone.token.weight"], expected["backbone.token.weight"])
    fresh, _ = said(tmp_path / "fresh", **settings)
    assert torch.equal(
        parameters["backbone.position.weight"],
        dict(fresh.system.named_parameters())["backbone.position.weight"],
    )


def test_a_run_that_goes_on_keeps_its_own_weights(pictures, trained, tmp_path):
    settings = on(pictures[0]) | {"init_from": str(trained), "images": 48}
    train_here(tmp_path / "whole", **settings)
    train_here(tmp_path / "cut", stop_at=16, **settings)
    shutil.move(trained, tmp_path / "away")  # it is not looked at again
    try:
        train_here(tmp_path / "cut", **settings)
    finally:
        shutil.move(tmp_path / "away", trained)
    assert final_tensors(tmp_path / "cut").keys() == final_tensors(tmp_path / "whole").keys()
    for name, tensor in final_tensors(tmp_path / "whole").items():
        assert torch.equal(final_tensors(tmp_path / "cut")[name], tensor)


def test_files_and_folders_of_weights(pictures, trained, tmp_path):
    weights = of_checkpoint(trained, "model")
    save_file(weights | {"something.else": torch.zeros(2)}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = find_weights(str(path))
        config = tiny_config(tmp_path / "x", **on(pictures[0]))
        system = build_system(config, 3)
        taken = start_from(system, found, ("ant", "bee", "cat"))
        assert sorted(taken.whole) == sorted(weights) and taken.unused == ["something.else"]
        lines = report(taken, found, system, ("ant", "bee", "cat"), None)
        assert lines[1:] == [
            "          classes: by their numbers, the file does not name them",
            "          not used: something.else",
        ]
        for name, parameter in system.named_parameters():
            assert torch.equal(parameter, weights[name])


def test_nothing_that_fits(trained, tmp_path, pictures):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    system = build_system(tiny_config(tmp_path / "y", **on(pictures[0])), 3)
    with pytest.raises(RunError, match="nothing in .*x.safetensors fits"):
        start_from(system, find_weights(str(tmp_path / "x.safetensors")), ("a", "b", "c"))
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RunError, match="x.safetensors cannot be read"):
        start_from(system, find_weights(str(tmp_path / "x.safetensors")), ("a", "b", "c"))


def test_what_is_no_weights_is_refused_before_anything_is_made(trained, tmp_path):
    words = flags(out=tmp_path / "run", images=16)
    refused(command("train", *words, "--init-from", tmp_path / "none"), "no such file or folder")
    refused(command("train", *words, "--init-from", tmp_path), "neither a run, nor a folder with")
    step = listed(trained / "checkpoints")[-1]
    result = command("train", *words, "--init-from", step)
    refused(result, f"belongs to the run directory {trained}: name that")
    assert not (tmp_path / "run").exists()
    shutil.copytree(trained, tmp_path / "bare")
    for folder in listed(tmp_path / "bare" / "checkpoints"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_weights(str(tmp_path / "bare"))


def test_a_path_into_a_run_names_the_run(trained):
    step = listed(trained / "checkpoints")[-1]
    named = f"belongs to the run directory {trained}: name that"
    refused(command("train", *flags(out=step, images=16)), named)
    refused(command("train", *flags(out=trained / "checkpoints" / "mine", images=16)), named)
    assert not (trained / "checkpoints" / "mine").exists()
    for path in (step, trained / "checkpoints", step / "model.safetensors"):
        refused(command("sample", path), named)
        refused(command("verify", path), named)


def test_a_file_of_a_checkpoint_knows_its_classes(trained):
    found = find_weights(str(listed(trained / "checkpoints")[-1] / "model.safetensors"))
    assert found.class_names == ("ant", "bee", "cat") and found.tokenizer is not None


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_state_that_says_nothing_of_classes(tmp_path, text):
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(RunError, match="state.json does not say on which classes"):
        find_weights(str(tmp_path))


def test_one_run_however_the_path_is_spelt(tmp_path):
    settings = [tiny_config(tmp_path, init_from=text) for text in ("runs/a", "runs/a/", "./runs/a")]
    assert len({config.run.init_from for config in settings}) == 1


@pytest.mark.parametrize(
    "wrap, part",
    [
        (lambda w: w, ""),
        (lambda w: {"model": w, "args": argparse.Namespace(lr=1), "epoch": 3}, "model of "),
        (lambda w: {"model": {}, "model_ema": w}, "model_ema of "),
        (lambda w: {"model": w, "model_ema": {}}, "model of "),
        (lambda w: {"module": {f"module.{n}": t for n, t in w.items()}}, "module of "),
        (lambda w: {f"_orig_mod.module.{n}": t for n, t in w.items()}, ""),
        (lambda w: {f"module._orig_mod.{n}": t for n, t in w.items()}, ""),
    ],
)
def test_what_other_trainers_save(pictures, trained, tmp_path, wrap, part):
    weights = of_checkpoint(trained, "model")
    torch.save(wrap(weights), tmp_path / "theirs.pt")
    session, text = said(tmp_path / "run", init_from=str(tmp_path / "theirs.pt"), **on(pictures[0]))
    for name, parameter in session.system.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert f"from {part}{tmp_path}/theirs.pt" in text


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content, why",
    [
        (Harmful(), "cannot be read"),
        ({"epoch": 3}, "holds no state dict"),
        ([torch.zeros(2)], "holds no state dict"),
    ],
)
def test_files_that_hold_no_weights(pictures, tmp_path, capsys, content, why):
    torch.save(content, tmp_path / "x.pt")
    system = build_system(tiny_config(tmp_path / "y", **on(pictures[0])), 3)
    with pytest.raises(RunError, match=f"x.pt {why}"):
        start_from(system, find_weights(str(tmp_path / "x.pt")), ("a", "b", "c"))
    assert "executed" not in capsys.readouterr().out
