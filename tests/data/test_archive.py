"""Archives stand for the folders that they unpack to."""

import gzip
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from heptapod_fast.data import ImageFolder
from heptapod_fast.data.archive import ArchiveError, ZipFile, list_archive
from heptapod_fast.data.entries import FolderFile, list_folder
from heptapod_fast.data.files import find_images
from tests.caches import contents, image_folder
from tests.running import command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU tar is compared with")
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("set") / "images", 30)


def add(tar: tarfile.TarFile, name: str, data: bytes, **changes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def shuffled(folder: Path) -> list[Path]:
    """The files of a folder in an order that is not the sorted one."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    random.shuffle(paths)
    return paths


def tar_of(folder: Path, path: Path, prefix: str = "", format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for file in shuffled(folder):
            add(tar, prefix + file.relative_to(folder).as_posix(), file.read_bytes())
    return path


def zip_of(folder: Path, path: Path, prefix: str = "", how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for file in shuffled(folder):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def tar_of_tars(folder: Path, path: Path) -> Path:
    """As ImageNet's training set comes."""
    with tarfile.open(path, "w") as tar:
        for name in sorted(CLASSES, reverse=True):
            inner = tar_of(folder / name, path.with_name(f"{name}.tar"))
            add(tar, f"{name}.tar", inner.read_bytes())
            inner.unlink()
    return path


def tar_of_zips(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in CLASSES:
            inner = zip_of(folder / name, path.with_name(f"{name}.zip"))
            add(tar, f"{name}.zip", inner.read_bytes())
            inner.unlink()
    return path


def folder_of_tars(folder: Path, path: Path) -> Path:
    path.mkdir()
    for name in CLASSES:
        tar_of(folder / name, path / f"{name}.tar", "./")
    (path / "readme.txt").write_text("how to unpack")
    return path


def tar_with_debris(folder: Path, path: Path) -> Path:
    """As macOS's tar packs a folder."""
    tar_of(folder, path)
    with tarfile.open(path, "a") as tar:
        for name in ("ant/._000.png", "._ant", "__MACOSX/ant/001.png", ".hidden/x.png"):
            add(tar, name, b"no image")
    return path


def with_debris(folder: Path, path: Path) -> Path:
    """As macOS packs a folder."""
    zip_of(folder, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/ant/._000.png", b"no image")
        archive.writestr("ant/.DS_Store", b"no image")
        archive.writestr("bee/Thumbs.db", b"no image")
    return path


FORMS = {
    "tar": lambda folder, out: tar_of(folder, out / "images.tar"),
    "tar, gnu": lambda folder, out: tar_of(folder, out / "images.tar", "./", tarfile.GNU_FORMAT),
    "folder in a tar": lambda folder, out: (
        tar_of(folder, out / "a.tar", "set/train/") / "set/train"
    ),
    "tar of tars": lambda folder, out: tar_of_tars(folder, out / "images.tar"),
    "tar of zips": lambda folder, out: tar_of_zips(folder, out / "images.tar"),
    "folder of tars": lambda folder, out: folder_of_tars(folder, out / "images"),
    "zip": lambda folder, out: zip_of(folder, out / "images.zip"),
    "zip, stored": lambda folder, out: zip_of(folder, out / "images.ZIP", how=zipfile.ZIP_STORED),
    "folder in a zip": lambda folder, out: zip_of(folder, out / "a.zip", "x/train/") / "x/train",
    "tar of macOS": lambda folder, out: tar_with_debris(folder, out / "images.tar"),
    "zip of macOS": lambda folder, out: with_debris(folder, out / "images.zip"),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_is_the_set_of_its_folder(folder, tmp_path, form):
    """Order, labels, class names, pixels, and what runs and caches know the set by."""
    expected = ImageFolder(folder, 16)
    found = ImageFolder(FORMS[form](folder, tmp_path), 16)
    assert found.class_names == expected.class_names == CLASSES
    assert torch.equal(found.labels, expected.labels)
    ids = torch.arange(len(expected))
    assert torch.equal(found.images(ids), expected.images(ids))
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("form", ["tar of tars", "zip"])
def test_a_cache_of_an_archive_is_that_of_its_folder(folder, tmp_path, form):
    """Byte for byte but for where the images lay; begun on one, it can be finished on the other."""
    folder = Path(shutil.copytree(folder, tmp_path / "images"))
    whole = (folder / "bee" / "010.png").read_bytes()
    (folder / "bee" / "010.png").write_bytes(whole[: len(whole) // 2])
    archive = FORMS[form](folder, tmp_path)
    words = ["--tokenizer", "patch", "--image-size", 16, "--patch-size", 4, "--max-broken", 1]
    words += ["--decoder", "pillow", "--shard-rows", 16, "--views", "flip"]
    of_folder = tmp_path / "folder.zarr"
    of_archive = tmp_path / "archive.zarr"
    assert command("cache", "--data", folder, "--out", of_folder, *words).code == 0
    result = command("cache", "--data", archive, "--out", of_archive, *words)
    assert result.code == 0, result.err
    assert "left out  bee/010.png" in result.out
    ours = contents(of_archive)
    theirs = contents(of_folder)
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if ours[name] != theirs[name]]
    assert differing == ["manifest.json"]
    # The folder is looked at again and found to be the cache's.
    again = command("cache", "--data", folder, "--out", of_archive, *words)
    assert again.code == 0, again.err


def test_a_run_on_an_archive(folder, tmp_path):
    archive = tar_of(folder, tmp_path / "images.tar")
    words = ["--size", "tiny", "--data", archive, "--width", 32, "--heads", 2, "--depth", 1]
    words += ["--head-depth", 1, "--batch", 8, "--codes", 16, "--image-size", 16, "--device", "cpu"]
    words += ["--sample-every", 0]
    out = tmp_path / "run"
    first = command("train", *words, "--out", out, "--images", 16)
    assert first.code == 0, first.err
    assert "classes   0 ant, 1 bee, 2 cat" in first.out
    words[3] = folder  # the same set, unpacked
    second = command("train", *words, "--out", out, "--images", 32)
    assert second.code == 0, second.err
    assert "continuing with --data" in second.out and "resumed   at 16 images" in second.out
    words[3] = image_folder(tmp_path / "other", 31)
    third = command("train", *words, "--out", out, "--images", 48)
    assert third.code == 1 and "was trained on other data" in third.err


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_files_are_read_from_any_thread(tmp_path, kind, how):
    source = tmp_path / "files"
    source.mkdir()
    generator = np.random.default_rng(int(torch.randint(2**31, ())))
    for number in range(40):
        size = int(generator.integers(1, 3000))
        (source / f"{number}.bin").write_bytes(generator.bytes(size))
    make = tar_of if kind == "tar" else zip_of
    options = {} if kind == "tar" else {"how": how}
    files = list_archive(make(source, tmp_path / f"a.{kind}", **options)).files
    assert len(files) == 40
    wrong = []

    def read(file):
        with file.open() as stream:
            data = stream.read()
        expected = (source / file.inner).read_bytes()
        if data != expected or file.size() != len(expected):
            wrong.append(file.inner)

    threads = [threading.Thread(target=read, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_links_and_files_that_were_added_again(tmp_path):
    """What unpacking makes of them."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/first.png", b"old")
        add(tar, "./x/again.png", b"again")
        add(tar, "x/first.png", b"new")
        add(tar, "x/hard.png", b"", type=tarfile.LNKTYPE, linkname="x/again.png")
        add(tar, "y/soft.png", b"", type=tarfile.SYMTYPE, linkname="../x/first.png")
        add(tar, "y/softer.png", b"", type=tarfile.SYMTYPE, linkname="soft.png")
        add(tar, "y/turned.png", b"", type=tarfile.SYMTYPE, linkname="soft.png")
        add(tar, "y/turned.png", b"a file again")
        add(tar, "x/turned.png", b"a file")
        add(tar, "x/turned.png", b"", type=tarfile.SYMTYPE, linkname="first.png")
        add(tar, "x/", b"", type=tarfile.DIRTYPE)
    found = list_archive(tmp_path / "a.tar")
    data = {file.inner: file.open().read() for file in found.files}
    assert data == {
        "x/first.png": b"new",
        "x/again.png": b"again",
        "x/hard.png": b"again",
        "y/soft.png": b"new",
        "y/softer.png": b"new",
        "y/turned.png": b"a file again",
        "x/turned.png": b"new",
    }
    assert found.folders == {"x", "y"}
    subprocess.run(["tar", "xf", "a.tar"], cwd=tmp_path, check=True)
    (tmp_path / "a.tar").unlink()
    unpacked = {file.inner: file.open().read() for file in list_folder(tmp_path).files}
    assert unpacked == data


@pytest.mark.parametrize("target", ["nowhere.png", "b.png", "/etc/hostname"])
def test_links_that_lead_nowhere_are_broken_files_as_in_a_folder(tmp_path, target):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.png", b"", type=tarfile.SYMTYPE, linkname=target)
        add(tar, "b.png", b"", type=tarfile.SYMTYPE, linkname="a.png")
        add(tar, "notes.txt", b"", type=tarfile.SYMTYPE, linkname="../../elsewhere")
    with pytest.raises(ValueError, match=r"(?s)2 of 2 image.*a\.tar/a\.png: a link to .*not in"):
        ImageFolder(tmp_path / "a.tar", 16)


def test_names_that_are_not_ascii(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("größe/画像.png", b"1")
    raw = (tmp_path / "a.zip").read_bytes()
    # Without the mark that says UTF-8, as macOS writes names.
    unmarked = bytearray(raw)
    for at in (raw.index(b"PK\x03\x04") + 6, raw.index(b"PK\x01\x02") + 8):
        flags = int.from_bytes(unmarked[at : at + 2], "little") & ~0x800
        unmarked[at : at + 2] = flags.to_bytes(2, "little")
    (tmp_path / "b.zip").write_bytes(unmarked)
    for name in ("a.zip", "b.zip"):
        (file,) = list_archive(tmp_path / name).files
        assert file.inner == "größe/画像.png" and file.open().read() == b"1"
    latin = os.fsdecode("größe.png".encode("latin-1"))
    with tarfile.open(tmp_path / "c.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, latin, b"2")
    (file,) = list_archive(tmp_path / "c.tar").files
    assert file.inner == latin


def test_compressed_tars_are_refused_with_what_to_do(folder, tmp_path):
    path = tar_of(folder, tmp_path / "images.tar")
    (tmp_path / "images.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ArchiveError, match="compressed tar.*unpack it to a plain .tar"):
        ImageFolder(tmp_path / "images.tar.gz", 16)


def test_damage_is_an_error_that_names_the_archive(folder, tmp_path):
    whole = tar_of(folder, tmp_path / "images.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "no.zip").write_bytes(b"<html>404</html>" * 100)
    for name in ("cut.tar", "no.tar", "no.zip"):
        with pytest.raises(ArchiveError, match=f"{name} is damaged or no such archive"):
            ImageFolder(tmp_path / name, 16)
    with pytest.raises(ArchiveError, match="inside"):
        with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
            archive.write(tmp_path / "images.tar", "ant.tar")
        ImageFolder(tmp_path / "z.zip", 16)


def test_an_archive_that_is_cut_while_it_is_read(folder, tmp_path):
    path = tar_of(folder, tmp_path / "images.tar")
    files = find_images(path).files
    with open(path, "r+b") as stream:
        stream.truncate(2000)
    last = max((file for file, _ in files), key=lambda file: file.offset)
    with pytest.raises(ValueError, match=r"images\.tar ends in the middle of it"):
        last.open()


def test_damage_in_a_zip_leaves_out_that_image_alone(folder, tmp_path):
    path = zip_of(folder, tmp_path / "images.zip", how=zipfile.ZIP_STORED)
    file = next(f for f, _ in find_images(path).files if f.inner == "bee/010.png")
    assert isinstance(file, ZipFile)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"IDAT", file.header) + 40
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"(?s)1 of 30.*bee/010\.png: damaged in its archive"):
        ImageFolder(path, 16)
    assert len(ImageFolder(path, 16, max_broken=1)) == 29


@pytest.mark.parametrize(
    "name, change, why",
    [
        ("encrypted.zip", {"flag_bits": 1}, "x.png is encrypted"),
        ("packed.zip", {"compress_type": zipfile.ZIP_LZMA}, "method 14"),
    ],
)
def test_what_a_zip_may_not_hold(tmp_path, monkeypatch, name, change, why):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("x.png", b"1")
    entries = zipfile.ZipFile.infolist

    def changed(self):
        found = entries(self)
        for info in found:
            for key, value in change.items():
                setattr(info, key, value)
        return found

    monkeypatch.setattr(zipfile.ZipFile, "infolist", changed)
    with pytest.raises(ArchiveError, match=why):
        list_archive(tmp_path / name)


def test_paths_that_lead_out_of_the_archive(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "../x.png", b"1")
    with pytest.raises(ArchiveError, match="outside of it"):
        list_archive(tmp_path / "a.tar")


def test_a_folder_that_is_not_in_the_archive(folder, tmp_path):
    path = tar_of(folder, tmp_path / "images.tar")
    with pytest.raises(FileNotFoundError, match="holds no folder dog"):
        ImageFolder(path / "dog", 16)


def test_archives_beside_images_are_left_aside_and_named(folder, tmp_path):
    folder = Path(shutil.copytree(folder, tmp_path / "images"))
    tar_of(folder / "ant", folder / "ant.tar")
    found = find_images(folder)
    assert found.class_names == CLASSES and len(found.files) == 30
    assert all(isinstance(file, FolderFile) for file, _ in found.files)
    assert found.notes == ["left aside, for they are no images that can be read: 1 .tar"]


def test_progress_of_a_long_table_of_contents(tmp_path):
    calls = []
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2100):
            add(tar, f"{number}.png", b"")
        add(tar, "z.png", bytes(2**20))
    list_archive(tmp_path / "a.tar", progress=lambda *at: calls.append(at))
    assert calls == [(0, 2), (0, 2), (2, 2)] or calls == [(0, 2), (1, 2), (2, 2)]


def test_a_million_files_do_not_pile_up_in_the_reader(tmp_path):
    """Python's tarfile keeps what it has seen: at a kilobyte each, gigabytes for ImageNet."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(500):
            add(tar, f"{number}.png", b"1")
    seen = []
    members = tarfile.TarFile.next

    def watched(self):
        seen.append(len(self.members))
        return members(self)

    tarfile.TarFile.next = watched
    try:
        assert len(list_archive(tmp_path / "a.tar").files) == 500
    finally:
        tarfile.TarFile.next = members
    assert max(seen) <= 1


def test_links_to_folders(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/deep/1.png", b"1")
        add(tar, "y", b"", type=tarfile.SYMTYPE, linkname="x/deep")
        add(tar, "z/2.png", b"", type=tarfile.LNKTYPE, linkname="/x/deep/1.png")
    found = list_archive(tmp_path / "a.tar")
    assert found.folders == {"x", "y", "z"}
    data = {file.inner: file.open().read() for file in found.files}
    assert data == {"x/deep/1.png": b"1", "y/1.png": b"1", "z/2.png": b"1"}


@pytest.mark.parametrize("inside", ["", "set"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_empty_class_folders_are_refused_as_in_a_folder(tmp_path, kind, inside):
    source = image_folder(tmp_path / "set", 3)
    (source / "dog").mkdir()
    shutil.make_archive(tmp_path / "a", kind, *((tmp_path, "set") if inside else (source, None)))
    for root in (source, tmp_path / f"a.{kind}" / inside):
        with pytest.raises(FileNotFoundError, match="(?s)1 class folders .* hold no images.*dog"):
            find_images(root)


def whole_tar(tmp_path) -> bytes:
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for number in range(10):
            add(tar, f"{number}.png", bytes([number]) * 700)
    return (tmp_path / "whole.tar").read_bytes()


@pytest.mark.parametrize("where", ["header", "cut in a header", "cut between two", "no end"])
def test_a_tar_that_is_damaged_loses_nothing_in_silence(tmp_path, where):
    """Python's tarfile takes a header that it cannot read for the end of the archive."""
    raw = bytearray(whole_tar(tmp_path))
    header = 7 * (512 + 1024)
    if where == "header":
        raw[header + 150] ^= 1
    lengths = {"cut in a header": header + 100, "cut between two": header, "no end": 10 * 1536}
    (tmp_path / "a.tar").write_bytes(raw[: lengths.get(where, len(raw))])
    with pytest.raises(ArchiveError, match=r"a\.tar (ends|is damaged) at byte 1"):
        list_archive(tmp_path / "a.tar")
    assert len(list_archive(tmp_path / "whole.tar").files) == 10


def test_tars_that_were_joined_with_cat(tmp_path):
    raw = whole_tar(tmp_path)
    (tmp_path / "a.tar").write_bytes(raw + raw)
    with pytest.raises(ArchiveError, match="goes on behind its end.*tar --concatenate"):
        list_archive(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(raw + bytes(100_000))
    assert len(list_archive(tmp_path / "b.tar").files) == 10


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_files_of_a_name_in_a_zip_the_last_one_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.png", b"old")
        archive.writestr("1.png", b"new")
    (file,) = list_archive(tmp_path / "a.zip").files
    assert file.open().read() == b"new"


def test_fields_behind_the_names_in_a_zip(tmp_path):
    """As Info-ZIP writes them: other lengths in front of the data than in the table."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("1.png")
        info.extra = b"UT\x05\x00\x03abcd"
        archive.writestr(info, b"data")
        archive.writestr("2.png", b"more")
    data = {file.inner: file.open().read() for file in list_archive(tmp_path / "a.zip").files}
    assert data == {"1.png": b"data", "2.png": b"more"}


def test_zips_of_windows_and_links_in_zips(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("x")
        info.filename = "ant\\1.png"
        info.create_system = 0
        archive.writestr(info, b"1")
    (file,) = list_archive(tmp_path / "a.zip").files
    assert file.inner == "ant/1.png"
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        info = zipfile.ZipInfo("2.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, b"1.png")
    with pytest.raises(ArchiveError, match=r"2\.png is a link; unpack the zip"):
        list_archive(tmp_path / "b.zip")


def test_compressed_tars_among_others(folder, tmp_path):
    tar_of(folder / "ant", tmp_path / "ant.tar")
    (tmp_path / "bee.TAR.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(ArchiveError, match=r"bee\.TAR\.gz: a compressed tar"):
        find_images(tmp_path)
    (tmp_path / "really.tar").write_bytes(gzip.compress((tmp_path / "ant.tar").read_bytes()))
    with pytest.raises(ArchiveError, match=r"really\.tar: a compressed tar"):
        find_images(tmp_path / "really.tar")


def test_archives_that_stand_for_one_folder(folder, tmp_path):
    tar_of(folder / "ant", tmp_path / "ant.tar")
    zip_of(folder / "ant", tmp_path / "ant.zip")
    with pytest.raises(ValueError, match=r"ant\.zip and ant\.tar are one class"):
        find_images(tmp_path)


def test_archives_deeper_down_are_left_aside(folder, tmp_path):
    (tmp_path / "more").mkdir()
    tar_of(folder / "ant", tmp_path / "more" / "deep.tar")
    tar_of(folder / "bee", tmp_path / "bee.tar")
    with pytest.raises(FileNotFoundError, match="hold no images"):
        find_images(tmp_path)
    (tmp_path / "bee.tar").unlink()
    with pytest.raises(FileNotFoundError, match="found no images.*there are 1 .tar"):
        find_images(tmp_path)


def test_odd_names(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/..y.png", b"1")
        add(tar, "x/z..png", b"1")
    assert sorted(f.inner for f in list_archive(tmp_path / "a.tar").files) == ["x/z..png"]
    with pytest.raises(FileNotFoundError, match="no such folder or archive"):
        find_images(tmp_path / "none.tar")
    assert len(list_archive(tmp_path / "a.tar", "x").files) == 1
    assert find_images(tmp_path / "a.tar" / "y" / ".." / "x").class_names == ("x",)
