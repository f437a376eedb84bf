"""Outputs of a job that was stopped anywhere: gone on with, they end in the same bytes."""

import json
import random
import zipfile

import numpy as np
import pytest
import torch

from heptapod_fast.sampling import outputs
from heptapod_fast.sampling.job import Job, digest
from heptapod_fast.sampling.outputs import OLDEST, Arrays, Grid, Singles, Tarred
from heptapod_fast.storage import InUseError

COUNT = 23
BATCH = 4
LABELS = torch.arange(COUNT) // 5
PIXELS = torch.randint(
    256, (COUNT, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
SETTINGS = {"--seed": 0, "--count": COUNT, "--temperature": 1.0, "several": (1, 2)}


class Stopped(Exception):
    """What a test stops a job with."""


def job_in(folder, settings=SETTINGS, **more):
    """Four outputs; the grid is full before the job is over."""
    made = [
        Grid(folder / "grid.png", 3),
        Arrays(folder / "a.npz", LABELS),
        Tarred(folder / "deep" / "a.tar"),
        Singles(folder / "singles", LABELS),
    ]
    return Job(made, COUNT, settings, folder / ".journal", **more)


def draw(job, stop_at=None, of_stop=0):
    """Batches into all outputs.

    Args:
        stop_at: number of images from which a batch is not recorded.
        of_stop: outputs that this batch still gets into.

    Returns:
        Images that were there before.
    """
    with job:
        before = job.done
        for first in range(before, COUNT, BATCH):
            these = slice(first, first + BATCH)
            is_last = first == stop_at
            for output in job.outputs[: of_stop if is_last else None]:
                output.add(LABELS[these], PIXELS[these])
            if is_last:
                raise Stopped
            job.record(min(first + BATCH, COUNT))
    return before


def files_in(folder):
    """{path: bytes} of all that is there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def short_grids(monkeypatch):
    """Two rows, so that the grid is full after six images."""
    monkeypatch.setattr(outputs, "MOST_ROWS", 2)


@pytest.fixture
def undisturbed(tmp_path):
    draw(job_in(tmp_path / "undisturbed"))
    return files_in(tmp_path / "undisturbed")


def test_outputs_are_what_was_given(undisturbed, tmp_path):
    folder = tmp_path / "undisturbed"
    with np.load(folder / "a.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], PIXELS.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(arrays["labels"], LABELS.numpy())
    assert len(undisturbed) == 3 + COUNT  # no journal, and no parts


@pytest.mark.parametrize("seed", range(6))
def test_stopped_within_a_batch_any_number_of_times(undisturbed, tmp_path, seed):
    """With garbage behind what was recorded, as of a write that was cut off."""
    chance = random.Random(seed)
    folder = tmp_path / "run"
    stops = sorted(chance.sample(range(BATCH, COUNT, BATCH), chance.randint(1, 3)))
    said = []
    for stop in stops:
        job = job_in(folder, say=said.append)
        with pytest.raises(Stopped):
            draw(job, stop, of_stop=chance.randint(0, 4))
        assert job.done == stop and said[-1].startswith(f"stopped after {stop} of {COUNT} images")
        assert not (folder / "a.npz").exists() and not (folder / "grid.png").exists()
        for part in folder.rglob(".*.part"):
            with open(part, "ab") as file:
                file.write(chance.randbytes(chance.randint(0, 5000)))
        with open(folder / ".journal", "a") as file:
            file.write('{"images": 23, "marks": [{}')
    assert draw(job_in(folder)) == stops[-1]
    assert files_in(folder) == undisturbed


@pytest.mark.parametrize(
    "point",
    ["complete", "publish=grid.png", "publish=a.npz", "publish=a.tar", "publish=singles"],
)
def test_stopped_while_it_is_finished(undisturbed, tmp_path, monkeypatch, point):
    folder = tmp_path / "run"
    monkeypatch.setenv("HEPTAPOD_FAULT", f"raise@{point}")
    for _ in range(2):
        with pytest.raises(ValueError, match="asked to fail"):
            draw(job_in(folder))
    monkeypatch.delenv("HEPTAPOD_FAULT")
    assert draw(job_in(folder)) == COUNT
    assert files_in(folder) == undisturbed


def test_an_interrupted_job_says_what_was_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="stopped after 4 of 23 images.*the same command"):
        with job_in(tmp_path) as job:
            for output in job.outputs:
                output.add(LABELS[:4], PIXELS[:4])
            job.record(4)
            raise KeyboardInterrupt


def test_what_has_recorded_nothing_leaves_nothing(tmp_path):
    with pytest.raises(Stopped):
        draw(job_in(tmp_path), stop_at=0, of_stop=3)
    assert files_in(tmp_path) == {}
    (tmp_path / "deep").rmdir()
    (tmp_path / "deep").write_text("a file")
    with pytest.raises(OSError):
        draw(job_in(tmp_path))
    assert files_in(tmp_path) == {"deep": b"a file"}


def stopped_in(folder, at=8):
    with pytest.raises(Stopped):
        draw(job_in(folder), stop_at=at)


def test_other_settings_are_refused_and_named(undisturbed, tmp_path):
    folder = tmp_path / "run"
    stopped_in(folder)
    before = files_in(folder)
    other = SETTINGS | {"--seed": 1, "--top-k": 5, "--temperature": None}
    with pytest.raises(ValueError) as raised:
        draw(job_in(folder, other))
    text = str(raised.value)
    assert "--seed is 1, there 0" in text and "--top-k is 5, there not given" in text
    assert "--temperature is not given, there 1.0" in text and "8 images" in text
    assert "--start-over" in text and "--count" not in text
    assert files_in(folder) == before
    assert draw(job_in(folder)) == 8
    assert files_in(folder) == undisturbed


def test_starting_over_removes_what_the_other_job_left(undisturbed, tmp_path):
    folder = tmp_path / "run"
    stopped_in(folder)
    assert draw(job_in(folder, SETTINGS | {"--seed": 1}, start_over=True)) == 0
    assert files_in(folder) == undisturbed  # the drawing here knows of no seed
    stopped_in(folder)
    assert draw(job_in(folder, start_over=True)) == 0


@pytest.mark.parametrize("name", [".a.npz.*.part", "deep/.a.tar.*.part", ".grid.png.*.pixels"])
def test_a_part_that_is_gone_or_too_short_is_said(undisturbed, tmp_path, name):
    folder = tmp_path / "run"
    stopped_in(folder)
    (part,) = folder.glob(name)
    data = part.read_bytes()
    for damaged in (None, data[:50]):
        part.unlink(missing_ok=True)
        if damaged is not None:
            part.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{part.name}: expected at least .* found "):
            draw(job_in(folder))
    part.write_bytes(data)
    assert draw(job_in(folder)) == 8
    assert files_in(folder) == undisturbed


def test_a_single_image_that_is_gone_is_said(tmp_path):
    stopped_in(tmp_path)
    (tmp_path / "singles" / "000003-class0.png").unlink()
    with pytest.raises(ValueError, match="1 are missing, such as 000003-class"):
        draw(job_in(tmp_path))


def test_one_process_at_a_time(tmp_path):
    with job_in(tmp_path) as job:
        for output in job.outputs:
            output.add(LABELS, PIXELS)
        job.record(COUNT)
        with pytest.raises(InUseError, match="another process is writing these files"):
            draw(job_in(tmp_path))
    assert (tmp_path / "a.npz").exists()


def test_a_journal_is_a_line_for_each_batch(tmp_path):
    stopped_in(tmp_path)
    first, *lines = map(json.loads, (tmp_path / ".journal").read_text().splitlines())
    assert first["job"]["--seed"] == 0 and len(first["parts"]) == 4
    assert [line["images"] for line in lines] == [4, 8]
    npz = lines[-1]["marks"][1]
    assert (tmp_path / first["parts"][2]).stat().st_size >= npz["bytes"] > 8 * 108


def test_archives_are_those_of_zipfile(undisturbed, tmp_path):
    """What it writes of the same members, one by one, with the same time."""
    path = tmp_path / "theirs.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in (("arr_0", PIXELS.permute(0, 2, 3, 1)), ("labels", LABELS)):
            member = zipfile.ZipInfo(f"{name}.npy", OLDEST)
            with archive.open(member, "w", force_zip64=name == "arr_0") as stream:
                np.lib.format.write_array(stream, array.contiguous().numpy())
    assert undisturbed["a.npz"] == path.read_bytes()


def test_archives_above_4_gib(tmp_path):
    """A file with a hole stands for the images."""
    arrays = Arrays(tmp_path / "a.npz", LABELS)
    arrays.belong_to("job")
    arrays.parts[0].touch()
    size = 5 * 2**30
    with open(arrays.parts[0], "wb") as file:
        file.truncate(size)
    arrays.begin(COUNT, {"bytes": size, "crc32": 7})
    arrays.complete()
    arrays.publish()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        first, second = archive.infolist()
        assert (first.file_size, first.CRC) == (size - 59, 7)
        assert second.header_offset == size
        archive.open("arr_0.npy").close()  # its own header says the same name
        with archive.open("labels.npy") as stream:
            assert np.array_equal(np.lib.format.read_array(stream), LABELS.numpy())


def test_a_digest_is_of_names_types_and_values():
    value = torch.tensor([1.0, 2.0])
    other = [{"a": value.to(torch.bfloat16)}, {"b": value}, {"a": value + 1}, {"a": value[None]}]
    found = {digest(tensors) for tensors in [{"a": value}, *other]}
    assert len(found) == 5 and digest({"a": value.clone()}) in found
    assert digest({"a": torch.tensor(3)}) != digest({"a": torch.tensor(4)})


def test_single_images_of_other_samples_are_not_mixed_with_these(tmp_path):
    folder = tmp_path / "singles"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "000001-class7.png").write_bytes(b"another sample")
    with pytest.raises(ValueError, match="found 1 images of others, such as 000001-class7.png"):
        Singles(folder, LABELS).begin(0, {})
    Singles(folder, LABELS, replaces=True).begin(0, {})
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    # The same ones may be written again.
    (folder / f"000000-class{int(LABELS[0])}.png").write_bytes(b"one of these")
    Singles(folder, LABELS).begin(0, {})
    assert len(list(folder.iterdir())) == 2
