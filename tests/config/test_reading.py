"""config.json: written, read back, and what earlier versions wrote."""

import json
from pathlib import Path

import pytest

from heptapod_fast.runs import RunDir
from heptapod_fast.systems import configure, draft, read_config

# config.json files as version 1 wrote them, with the flags and the directory it gave the run.
VERSION_1 = Path(__file__).parent / "version_1"
RUNS_OF_VERSION_1 = {
    "default": ({"size": "tiny"}, "runs/heptapod-tiny-logograms-patch-vq-24px-38a31e9c"),
    "local-head": (
        {
            "size": "tiny",
            "head": "local",
            "window": 9,
            "density": 8,
            "ema": (0.9, 0.999),
            "minutes": 3.0,
            "batch": 32,
        },
        "runs/heptapod-tiny-logograms-patch-vq-24px-49461aa2",
    ),
    "diffusion": (
        {"size": "B", "data": "synthetic", "micro_batch": 64, "diffusion_repeat": 2},
        "runs/heptapod-B-synthetic-kl16-256px-21b834bf",
    ),
    "1d-random": (
        {"size": "L", "system": "1d-random", "data": "folders/birds", "dropout": 0.0},
        "runs/1d-random-L-birds-kl16-256px-939c21a7",
    ),
}


@pytest.mark.parametrize(
    "flags", [{}, {"ema": ()}, {"ema": (0.5, 0.9), "window": 9}, {"system": "1d-raster"}]
)
def test_json_round_trip(flags):
    config = configure("tiny", **flags)
    assert read_config(config.to_json()) == config


def test_settings_stand_in_their_groups():
    plain = json.loads(configure("tiny").to_json())
    assert plain["version"] == 2
    assert plain["data"]["image_size"] == 24
    assert plain["recipe"]["batch"] == 64
    assert plain["run"]["keep_checkpoints"] == 2
    assert plain["model"]["density"] == 2


def test_unknown_settings_in_a_file_are_refused():
    text = configure("tiny").to_json().replace('"seed"', '"sead"')
    with pytest.raises(ValueError, match="sead"):
        read_config(text)


def test_unknown_groups_in_a_file_are_refused():
    plain = json.loads(configure("tiny").to_json()) | {"weather": {}}
    with pytest.raises(ValueError, match="weather"):
        read_config(json.dumps(plain))


def test_a_newer_version_is_refused_saying_so():
    plain = json.loads(configure("tiny").to_json()) | {"version": 3}
    with pytest.raises(ValueError, match="version 3, this heptapod_fast reads 1 to 2: update it"):
        read_config(json.dumps(plain))


# -------------------------------------------------------------------------------------- version 1


@pytest.mark.parametrize("name", RUNS_OF_VERSION_1)
def test_version_1_is_read(name):
    flags, _ = RUNS_OF_VERSION_1[name]
    assert read_config((VERSION_1 / f"{name}.json").read_text()) == configure(**flags)


@pytest.mark.parametrize("name", RUNS_OF_VERSION_1)
def test_the_same_flags_find_the_directory_of_version_1(name, tmp_path, monkeypatch):
    flags, directory = RUNS_OF_VERSION_1[name]
    monkeypatch.chdir(tmp_path)
    config = configure(**flags)
    assert str(RunDir.of(config).path) == config.run_dir() != directory
    Path(directory).mkdir(parents=True)
    assert str(RunDir.of(config).path) == directory
    Path(config.run_dir()).mkdir()  # a run of its own goes before an old one
    assert str(RunDir.of(config).path) == config.run_dir()


def test_a_run_of_version_1_goes_on_and_is_written_anew(tmp_path):
    flags, _ = RUNS_OF_VERSION_1["default"]
    run = RunDir(tmp_path)
    run.config.write_text((VERSION_1 / "default.json").read_text())
    run.metrics.write_text("")
    config = configure(**flags, out=str(tmp_path), images=777)
    changed = run.claim(config)
    assert changed == [f"--images 777 (was {configure(**flags).recipe.images})"]
    assert json.loads(run.config.read_text())["version"] == 2


@pytest.mark.parametrize(
    "change, message",
    [({"sead": 1}, "sead"), ({"sead": None}, "sead"), ({"system": "var"}, "--system var")],
)
def test_a_version_1_that_cannot_be_understood_is_refused(change, message):
    plain = json.loads((VERSION_1 / "default.json").read_text()) | change
    with pytest.raises(ValueError, match=message):
        read_config(json.dumps(plain))


def test_a_baseline_of_version_1_with_a_head_is_refused():
    plain = json.loads((VERSION_1 / "1d-random.json").read_text()) | {"head": "global"}
    with pytest.raises(ValueError, match="does not know: head"):
        read_config(json.dumps(plain))


# ------------------------------------------------------------------------------- foreign settings


def test_a_flag_of_another_system_is_refused_with_the_reason():
    with pytest.raises(ValueError) as error:
        draft("tiny", "1d-raster", window=9)
    said = str(error.value)
    assert "--window 9 belongs to --system heptapod" in said
    assert "--system 1d-raster has no such setting" in said


def test_a_flag_that_no_system_has_is_refused():
    with pytest.raises(ValueError, match="--hights: no system has such a setting"):
        draft("tiny", hights=3)


def test_a_setting_replaced_by_name_lands_in_its_group():
    config = configure("tiny").replace(density=5, batch=16, out="elsewhere", num_classes=3)
    assert config.model.density == 5
    assert config.recipe.batch == 16
    assert config.run.out == "elsewhere"
    assert config.data.num_classes == 3
    with pytest.raises(ValueError, match="--hights: there is no such setting"):
        config.replace(hights=3)
