"""A run as a folder: what is in it, that it comes back bit for bit, and whole or not at all."""

import dataclasses
import errno
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from heptapod_fast import load_run
from heptapod_fast.checkpoints import load_step
from heptapod_fast.exports import folder as folders
from heptapod_fast.exports.files import export_weights
from heptapod_fast.exports.folder import export_folder
from heptapod_fast.exports.samples import plan
from heptapod_fast.pictures import grid_of_pixels
from heptapod_fast.rng import Rng
from heptapod_fast.runs import RunDir, RunError
from heptapod_fast.runs.exported import ExportedFolder, Stamp
from heptapod_fast.runs.initial import find_weights
from heptapod_fast.sampling.generate import keys
from heptapod_fast.storage import read_numbers, sha256, write_json
from heptapod_fast.tokenizers import load_tokenizer, to_uint8
from heptapod_fast.tokenizers.autoencoder import file_shapes
from tests.running import tiny_config, train_here

KINDS = {
    "discrete": {},
    "continuous": {
        "tokenizer": "patch",
        "codes": None,
        "diffusion_blocks": 1,
        "diffusion_width": 16,
    },
}
# At this rate four steps are enough for averages that sample otherwise than the raw weights.
SMALL = {"image_size": 12, "images": 32, "ema": (0.9999, 0.1), "lr_per_256": 1.0}


def stamp_anew(folder: ExportedFolder) -> None:
    """Make export.json agree with the files as they are now."""
    index = folder.read_index()
    files = {name: Stamp.of(folder.path / name) for name in index.files}
    write_json(folder.index, dataclasses.replace(index, files=files).plain())


def change_weights(folder: ExportedFolder, change) -> None:
    """Write other weights with a hash that agrees."""
    tensors = load_file(folder.model)
    change(tensors)
    save_file(tensors, folder.model)
    stamp_anew(folder)


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """A finished run of 3 x 3 tokens with two checkpoints and two averages."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    train_here(out, **SMALL | KINDS[request.param])
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder of a run, without samples."""
    out = tmp_path_factory.mktemp("exported") / "folder"
    export_folder(run, out, samples=False)
    return out


@pytest.fixture(scope="module")
def on_codes(tmp_path_factory):
    """A finished run on codes."""
    out = tmp_path_factory.mktemp("codes") / "run"
    train_here(out, **SMALL)
    return out


@pytest.fixture
def discrete(on_codes, tmp_path_factory):
    """A copy of it that a test may spoil."""
    copy = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(on_codes, copy)
    return copy


# ----------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("asked", [{}, {"ema": "0.1"}, {"ema": "none"}, {"checkpoint": 2}])
@pytest.mark.parametrize("settled", [False, True])
def test_it_samples_as_the_run_does_bit_for_bit(run, tmp_path, asked, settled):
    export_folder(run, tmp_path / "folder", **asked, samples=False)
    expected = load_run(run, **asked, device="cpu", only_samples=settled)
    found = load_run(tmp_path / "folder", device="cpu", only_samples=settled)
    weights = found.system.state_dict()
    for name, value in expected.system.state_dict().items():
        assert torch.equal(weights[name], value), name
    classes = torch.arange(len(found.class_names)).repeat(2)
    tokens = found.sample(classes, Rng(3))
    assert torch.equal(tokens, expected.sample(classes, Rng(3)))
    assert torch.equal(found.decode(tokens), expected.decode(tokens))
    assert found.class_names == expected.class_names
    assert found.images_seen == expected.images_seen
    assert found.weights == expected.weights
    assert found.checkpoint.name == expected.checkpoint.name
    assert found.tokenizer.fingerprint == expected.tokenizer.fingerprint


def test_it_needs_nothing_of_the_run(run, tmp_path, monkeypatch):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    export_folder(moved, tmp_path / "folder", samples=False)
    shutil.rmtree(moved)
    monkeypatch.chdir(tmp_path)
    loaded = load_run("folder", device="cpu")
    assert loaded.decode(loaded.sample(torch.tensor([0]), Rng(0))).shape == (1, 3, 12, 12)


def test_the_files(run, exported):
    names = {path.name for path in exported.iterdir()}
    expected = {"model.safetensors", "config.json", "export.json", "README.md"}
    has_codebook = RunDir(run).codebook.exists()
    assert names == (expected | {"tokenizer.safetensors"} if has_codebook else expected)
    index = json.loads((exported / "export.json").read_text())
    assert index["class_names"] == ["2-fold", "3-fold"]
    assert (index["weights"], index["checkpoint"]) == ("ema-0.9999", "step-00000004")
    assert index["images_seen"] == 32
    assert index["files"].keys() == names - {"export.json", "README.md"}
    for name, stamp in index["files"].items():
        file = exported / name
        assert stamp == {"bytes": file.stat().st_size, "sha256": sha256(file)}
    saved = load_step(RunDir(run).checkpoints, None).read("ema-0.9999")
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def test_nothing_in_it_tells_of_the_machine(run, exported):
    """Not where the run was, nor the folder."""
    for file in exported.iterdir():
        for place in (run, exported, run.parent.parent):
            assert str(place).encode() not in file.read_bytes(), file
    assert str(run) in (run / "config.json").read_text()


def test_a_run_starts_from_it_as_from_the_run(run, exported):
    """Weights, class names and tokenizer."""
    of_run = find_weights(str(run))
    found = find_weights(str(exported))
    assert found.class_names == of_run.class_names and found.tokenizer == of_run.tokenizer
    assert found.file == exported / "model.safetensors"


def test_weights_alone_of_a_folder(exported, tmp_path):
    """From a folder that somebody passed on to the layout of published files."""
    done = export_weights(exported, tmp_path / "w.pt")
    found = read_numbers(tmp_path / "w.pt")["model"]
    weights = load_file(exported / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert done.values == sum(value.numel() for value in weights.values())


# ------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize(
    "classes, of_each, columns", [(2, 8, 8), (5, 8, 8), (10, 6, 6), (20, 3, 6), (64, 1, 8)]
)
def test_the_plan_of_a_grid(classes, of_each, columns):
    labels, found = plan(classes)
    assert found == columns
    assert [labels.count(label) for label in range(classes)] == [of_each] * classes
    assert labels == sorted(labels) and len(labels) <= 64


def test_of_many_classes_some_are_shown():
    labels, columns = plan(1000)
    assert len(set(labels)) == 64 and columns == 8
    assert max(labels) > 900 and labels == sorted(labels)


def test_the_grid_is_drawn_by_the_weights_of_the_folder(run, tmp_path):
    """With the seed that the card names, and by no other weights."""
    grids = []
    for ema in ("0.9999", "none"):
        done = export_folder(run, tmp_path / ema, ema=ema, device="cpu")
        assert done.remark == ""
        assert "![samples](samples.png)" in (tmp_path / ema / "README.md").read_text()
        loaded = load_run(run, ema=ema, device="cpu", only_samples=True)
        labels = torch.tensor([0] * 8 + [1] * 8)
        images = loaded.decode(loaded.sample(labels, Rng(0), index=keys(labels)))
        with Image.open(tmp_path / ema / "samples.png") as grid:
            grids.append(torch.from_numpy(np.array(grid)))
        assert torch.equal(grids[-1], grid_of_pixels(to_uint8(images), columns=8))
    assert not torch.equal(*grids)


def test_synthetic_tokens_have_no_grid(tmp_path):
    train_here(tmp_path / "run", data="synthetic", logogram_count=None, num_classes=3, images=8)
    done = export_folder(tmp_path / "run", tmp_path / "folder")
    assert "synthetic tokens" in done.remark
    assert (
        "There are none here: the run was trained on synthetic tokens"
        in (tmp_path / "folder" / "README.md").read_text()
    )
    assert not (tmp_path / "folder" / "samples.png").exists()
    assert not (tmp_path / "folder" / "tokenizer.safetensors").exists()
    expected = load_run(tmp_path / "run", device="cpu").sample(torch.tensor([0, 2]), Rng(0))
    found = load_run(tmp_path / "folder", device="cpu")
    assert torch.equal(found.sample(torch.tensor([0, 2]), Rng(0)), expected)
    with pytest.raises(RunError, match="synthetic tokens: nothing can be decoded"):
        found.decode(expected)


# ----------------------------------------------------------------------------- published tokenizers


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(a run on kl16, the file of its weights, which are random)."""
    folder = tmp_path_factory.mktemp("published")
    generator = torch.Generator().manual_seed(0)
    shapes = file_shapes("kl16")
    weights = folder / "kl16.safetensors"
    drawn = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file({key: value * 0.02 for key, value in drawn.items()}, weights)
    out = folder / "run"
    train_here(
        out,
        tokenizer="kl16",
        tokenizer_weights=str(weights),
        image_size=32,
        codes=None,
        logogram_count=8,
        images=8,
        diffusion_blocks=1,
        diffusion_width=16,
    )
    return out, weights


def test_published_weights_are_referred_to(published, tmp_path):
    run, weights = published
    export_folder(run, tmp_path / "folder", samples=False)
    record = json.loads((tmp_path / "folder" / "tokenizer.json").read_text())
    saved = json.loads((run / "tokenizer.json").read_text())
    assert record["weights"] == "kl16.safetensors"
    assert saved["weights"] == str(weights)
    for name in ("tokenizer", "weights_sha256", "fingerprint", "image_size"):
        assert record[name] == saved[name]
    assert not (tmp_path / "folder" / "tokenizer.safetensors").exists()
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "MAR's KL-16 VAE" in card and record["weights_sha256"] in card
    assert 'tokenizer_weights="kl16.safetensors"' in card
    with pytest.raises(FileNotFoundError, match="folder/kl16.safetensors: no such .*-weights FILE"):
        load_run(tmp_path / "folder", device="cpu")
    expected = load_run(run, device="cpu").sample(torch.tensor([0]), Rng(0), diffusion_steps=2)
    found = load_run(tmp_path / "folder", device="cpu", tokenizer_weights=str(weights))
    assert torch.equal(found.sample(torch.tensor([0]), Rng(0), diffusion_steps=2), expected)
    # Or the file is put where the card says.
    (tmp_path / "folder" / "kl16.safetensors").symlink_to(weights)
    found = load_run(tmp_path / "folder", device="cpu")
    assert found.tokenizer.fingerprint == record["fingerprint"]


def test_without_its_weights_there_is_no_grid(published, tmp_path):
    run, weights = published
    moved = weights.rename(weights.with_name("moved.safetensors"))
    try:
        done = export_folder(run, tmp_path / "folder")
        assert "the weights of kl16 were not at hand" in done.remark
        assert done.remark in (tmp_path / "folder" / "README.md").read_text()
        with pytest.raises(FileNotFoundError, match="gone.safetensors: no such file"):
            export_folder(run, tmp_path / "other", tokenizer_weights="gone.safetensors")
        assert not (tmp_path / "other").exists()
    finally:
        moved.rename(weights)


def test_what_a_run_says_of_other_weights_is_not_passed_on(published, tmp_path):
    """Of a run that was moved to another tokenizer its checkpoint knows better."""
    run = tmp_path / "run"
    shutil.copytree(published[0], run)
    record = json.loads((run / "tokenizer.json").read_text())
    write_json(run / "tokenizer.json", record | {"fingerprint": "0" * 64})
    export_folder(run, tmp_path / "folder", samples=False)
    found = json.loads((tmp_path / "folder" / "tokenizer.json").read_text())
    assert found == {
        "tokenizer": "kl16",
        "weights": None,
        "fingerprint": record["fingerprint"],
    }


def test_a_record_names_no_file_elsewhere(published, tmp_path):
    """Somebody else's folder reads no file of ours."""
    run, weights = published
    export_folder(run, tmp_path / "folder", samples=False)
    folder = ExportedFolder(tmp_path / "folder")
    record = json.loads(folder.tokenizer_record.read_text())
    write_json(folder.tokenizer_record, record | {"weights": str(weights)})
    assert folder.published_weights() == str(folder.path / weights.name)


# ------------------------------------------------------------------------------- whole or not there


@pytest.mark.parametrize("step", ["write_safetensors", "draw_samples", "card", "write_tokenizer"])
def test_what_fails_leaves_nothing_behind(discrete, tmp_path, monkeypatch, step):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, step, full)
    with pytest.raises(OSError, match="No space left"):
        export_folder(discrete, tmp_path / "folder", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_files_in_the_way_are_refused_and_left_alone(discrete, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="holds thesis.tex; move it away, or name another folder"):
        export_folder(discrete, tmp_path / "folder")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(RunError, match="notes exists; move it away"):
        export_folder(discrete, tmp_path / "notes")
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "notes"}
    with pytest.raises(RunError, match="run exists and holds"):
        export_folder(discrete, discrete)


def test_a_run_without_its_codebook_is_refused(discrete, tmp_path):
    run = RunDir(discrete)
    tokenizer = load_tokenizer("patch-vq", run.codebook)
    tokenizer.codebook_VE[0, 0] += 0.01
    tokenizer.save(run.codebook)
    with pytest.raises(RunError, match="is not what .* was trained with.*--out FILE.safetensors"):
        export_folder(discrete, tmp_path / "folder")
    run.codebook.unlink()
    with pytest.raises(RunError, match="tokenizer.safetensors is missing.*--out FILE.safetensors"):
        export_folder(discrete, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    export_weights(discrete, tmp_path / "w.safetensors")


# ----------------------------------------------------------------------------------------- refusals


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of a folder that a test may spoil."""
    shutil.copytree(exported, tmp_path / "folder")
    return ExportedFolder(tmp_path / "folder")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "lost"])
def test_a_damaged_file_is_named(folder, name, how):
    file = folder.path / name
    data = bytearray(file.read_bytes())
    said = f"{name} has {len(data) - 9:,} bytes, expected {len(data):,}"
    if how == "cut":
        file.write_bytes(data[:-9])
    elif how == "flipped":
        data[-9] ^= 1
        file.write_bytes(data)
        said = f"{name} has another SHA-256"
    else:
        file.unlink()
        said = f"{name} is missing"
    with pytest.raises(RunError, match=f"folder is damaged: {said}.*copy the folder again"):
        load_run(folder.path, device="cpu")
    if name == "model.safetensors":
        with pytest.raises(RunError, match=said):
            find_weights(str(folder.path))


def test_a_damaged_codebook_is_named(discrete, tmp_path):
    export_folder(discrete, tmp_path / "folder", samples=False)
    (tmp_path / "folder" / "tokenizer.safetensors").unlink()
    with pytest.raises(RunError, match="damaged: tokenizer.safetensors is missing"):
        load_run(tmp_path / "folder", device="cpu")


def test_weights_that_do_not_fit_are_named(folder):
    """Although their hash agrees: somebody wrote both."""
    name = next(iter(load_file(folder.model)))

    def change(tensors):
        tensors["unheard.of"] = torch.zeros(2)
        tensors[name] = torch.zeros(3, 7, 11)

    change_weights(folder, change)
    told = rf"model.safetensors does not fit.*{name} is \(3, 7, 11\), expected .*unheard.of is unk"
    with pytest.raises(RunError, match=told):
        load_run(folder.path, device="cpu")


def test_weights_that_lack_a_tensor_are_named(folder):
    name = next(iter(load_file(folder.model)))
    change_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(RunError, match=f"model.safetensors does not fit .*{name} is missing"):
        load_run(folder.path, device="cpu")


def test_no_pickle_is_read(folder):
    """Whatever the file is called."""
    folder.model.write_bytes(b"\x80\x04.")
    stamp_anew(folder)
    with pytest.raises(RunError, match="model.safetensors cannot be read .*expected safetensors"):
        load_run(folder.path, device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.pop("files"),
        lambda plain: plain.pop("weights"),
        lambda plain: plain["files"].pop("config.json"),
        lambda plain: plain.update(class_names=[]),
        lambda plain: plain.update(class_names=[1, 2]),
        lambda plain: plain.update(images_seen="many"),
        lambda plain: plain.update(surprise=1),
        lambda plain: plain["files"].update({"model.safetensors": {"bytes": "2", "sha256": ""}}),
    ],
)
def test_an_index_that_says_something_else_is_refused(folder, change):
    plain = json.loads(folder.index.read_text())
    change(plain)
    write_json(folder.index, plain)
    with pytest.raises(RunError, match="export.json cannot be read .*: copy the folder again"):
        load_run(folder.path, device="cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"text"', "null"])
def test_an_index_that_is_none_is_refused(folder, text):
    folder.index.write_text(text)
    with pytest.raises(RunError, match="export.json cannot be read"):
        load_run(folder.path, device="cpu")


def test_a_later_format_asks_for_an_update(folder):
    plain = json.loads(folder.index.read_text())
    write_json(folder.index, plain | {"format": 2})
    with pytest.raises(RunError, match="format 2, this heptapod_fast reads 1: update it"):
        load_run(folder.path, device="cpu")


def test_a_folder_of_another_library_is_refused(folder):
    """The hub has many with these two files."""
    folder.index.unlink()
    folder.config.write_text('{"architectures": ["Other"]}')
    with pytest.raises(RunError, match="no export.json: expected a run directory, or a folder as"):
        load_run(folder.path)


def test_weights_alone_are_no_run(folder):
    for file in (folder.index, folder.config):
        file.unlink()
    with pytest.raises(RunError, match="is not a run directory: it has no config.json"):
        load_run(folder.path)


def test_it_holds_one_set_of_weights(folder):
    assert load_run(folder.path, checkpoint=4, ema="0.9999", device="cpu").images_seen == 32
    with pytest.raises(RunError, match="--checkpoint 2: .*folder holds step-00000004 alone"):
        load_run(folder.path, checkpoint=2, device="cpu")
    for ema in ("none", "0.1", "ema-0.1"):
        with pytest.raises(RunError, match=f"--ema {ema}: .*folder holds ema-0.9999 alone"):
            load_run(folder.path, ema=ema, device="cpu")


def test_raw_weights_are_called_none(discrete, tmp_path):
    export_folder(discrete, tmp_path / "folder", ema="none", samples=False)
    assert load_run(tmp_path / "folder", ema="none", device="cpu").weights == "model"
    with pytest.raises(RunError, match="--ema 0.1: .*folder holds model alone"):
        load_run(tmp_path / "folder", ema="0.1", device="cpu")


def test_it_is_no_place_for_a_run(folder):
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    for config in (folder.read_config(), tiny_config(folder.path, seed=5)):
        with pytest.raises(RunError, match="no place for a run: it holds an exported one"):
            RunDir(folder.path).claim(config)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_folder_is_not_exported_again(folder, tmp_path):
    with pytest.raises(RunError, match="is such a folder already: copy it"):
        export_folder(folder.path, tmp_path / "second")


def test_kinds_are_what_they_are_called():
    assert tiny_config("x", **SMALL).spec.kind == "discrete"
    assert tiny_config("x", **SMALL | KINDS["continuous"]).spec.kind == "continuous"
