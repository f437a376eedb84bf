"""Tensors in safetensors files: one or several, of one rank or of several, read by any number."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from heptapod_fast import shards
from heptapod_fast.world import ALONE, OtherRankFailed, World
from tests import ranks

SHAPES = {"matrix": (7, 3), "row": (1, 4), "scalar": (), "none": (0, 3), "long": (9,)}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return found | {"half": found["matrix"].half(), "whole": torch.arange(5)}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def test_one_file_that_everybody_can_read(tmp_path):
    shards.write(tmp_path, "model", tensors(), ALONE)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    equal(load_file(tmp_path / "model.safetensors"), tensors())
    equal(shards.read(shards.files(tmp_path, "model")), tensors())


def test_a_file_of_another_origin(tmp_path):
    save_file(tensors(), tmp_path / "weights.safetensors")
    equal(shards.read([tmp_path / "weights.safetensors"]), tensors())


def test_equal_tensors_make_equal_bytes(tmp_path):
    """safetensors orders its notes anew for every file."""
    written = set()
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        shards.write(folder, "model", tensors(), ALONE)
        written.add((folder / "model.safetensors").read_bytes())
    assert len(written) == 1


def test_many_bytes_make_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILE_BYTES", 40)
    large = {name: torch.full((5,), float(ord(name))) for name in "abcde"}  # 20 bytes each
    shards.write(tmp_path, "model", large, ALONE)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == names
    assert [path.name for path in shards.files(tmp_path, "model")] == names
    assert shards.names(tmp_path) == ["model"]
    equal(shards.read(shards.files(tmp_path, "model")), large)
    assert shards.siblings(tmp_path / names[1]) == shards.files(tmp_path, "model")


def test_a_name_is_not_taken_for_the_beginning_of_another(tmp_path):
    for name in ("ema-0.99", "ema-0.9999", "ema"):
        shards.write(tmp_path, name, {"a": torch.zeros(len(name))}, ALONE)
    assert shards.names(tmp_path) == ["ema", "ema-0.99", "ema-0.9999"]
    for name in shards.names(tmp_path):
        assert len(shards.read(shards.files(tmp_path, name))["a"]) == len(name)
    assert shards.files(tmp_path, "other") == []


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_file_of_several_is_refused(tmp_path, monkeypatch, lost):
    """The library would read zeros or stale memory in its place."""
    monkeypatch.setattr(shards, "FILE_BYTES", 4)
    shards.write(tmp_path, "model", {name: torch.ones(3) for name in "abc"}, ALONE)
    shards.files(tmp_path, "model")[lost].unlink()
    with pytest.raises(ValueError, match="expected all files of model, 3 of one set"):
        shards.files(tmp_path, "model")


def test_shapes_and_dtypes_are_known_without_reading(tmp_path):
    shards.write(tmp_path, "model", tensors(), ALONE)
    found = shards.shapes(shards.files(tmp_path, "model"))
    assert found == {name: (tensor.shape, tensor.dtype) for name, tensor in tensors().items()}


def test_tensors_are_filled_in_place(tmp_path):
    shards.write(tmp_path, "model", tensors(), ALONE)
    ours = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in ours.items()}
    shards.read_into(shards.files(tmp_path, "model"), ours)
    equal(ours, tensors())
    assert addresses == {name: tensor.data_ptr() for name, tensor in ours.items()}


# ----------------------------------------------------------------------------------- several ranks


def here():
    """This process among those of `ranks.outcomes`."""
    dist = torch.distributed
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def new_folder(name, fill=lambda folder: None):
    """A folder that all ranks see, with what one of them puts there. Collective call."""
    folder = Path(os.environ["FOLDER"]) / name
    with here().together():
        if here().main:
            folder.mkdir()
            fill(folder)
    return folder


def distributed(full, placement):
    """Every rank has the full tensors: nothing has to be sent."""
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (here().size,))
    return {
        name: distribute_tensor(tensor.clone(), mesh, [placement], src_data_rank=None)
        for name, tensor in full.items()
    }


def sharded_tensors(seed=0):
    from torch.distributed.tensor import Shard

    several = {name: tensor for name, tensor in tensors(seed).items() if tensor.dim()}
    return distributed(several, Shard(0)) | {"scalar": tensors(seed)["scalar"]}


def check_plain_tensors_are_written_once():
    """As those of ddp: the ranks share the work."""
    world = here()
    folder = new_folder("plain")
    shards.write(folder, "model", tensors(), world)
    paths = shards.files(folder, "model")
    equal(shards.read(paths), tensors())
    names = []
    for path in paths:
        with safe_open(path, "pt") as file:
            names += file.keys()
    assert sorted(names) == sorted(tensors()), names


def check_shards_are_put_together():
    world = here()
    folder = new_folder("sharded")
    shards.write(folder, "model", sharded_tensors(), world)
    equal(shards.read(shards.files(folder, "model")), tensors())


def check_whole_tensors_are_cut_into_shards():
    """What one rank wrote, and what shards were read from."""
    folder = new_folder("whole", lambda folder: shards.write(folder, "model", tensors(), ALONE))
    ours = sharded_tensors(seed=1)
    shards.read_into(shards.files(folder, "model"), ours)
    for name, tensor in ours.items():
        full = tensor if name == "scalar" else tensor.full_tensor()
        assert torch.equal(full, tensors()[name]), name


def check_a_failure_of_one_rank_is_everybodys():
    world = here()
    folder = new_folder("failure", lambda folder: (folder / "model.parts").write_text("in the way"))
    try:
        shards.write(folder, "model", tensors(), world)
    except (OSError, OtherRankFailed):
        return
    raise AssertionError("nothing was said")


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_ranks(tmp_path, count):
    ranks.all_well(ranks.outcomes(__file__, count, FOLDER=str(tmp_path)))


if __name__ == "__main__":
    ranks.work(globals())
