"""Which folders are classes, what is left aside, and what is said of it."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image, features

from heptapod_fast.data import entries, files
from heptapod_fast.data.files import find_images, image_endings
from heptapod_fast.data.layout import LayoutError
from tests.running import command


def save(path, text: str | None = None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        Image.new("RGB", (16, 16)).save(path)
    else:
        path.write_text(text)
    return path


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """Nobody may take it for an empty one. As for a user without permission, or a stale handle."""
    save(tmp_path / "a" / "x.png")
    save(tmp_path / "b" / "deep" / "y.png")
    listed = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(entries.os, "scandir", refusing)
    with pytest.raises(PermissionError, match=r"cannot list .*b/deep: Permission denied.*--data"):
        find_images(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_without_permission_for_another_user(tmp_path):
    save(tmp_path / "set" / "a" / "x.png")
    save(tmp_path / "set" / "b" / "y.png")
    (tmp_path / "set" / "b").chmod(0)
    (tmp_path / "set" / "a").chmod(0o755)
    (tmp_path / "set").chmod(0o755)
    image_endings()  # Pillow reads its modules while it may
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(tmp_path / "set")  # the folders above are root's own
        os.setuid(65534)
        try:
            find_images(Path("."))
        except OSError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as said:
        assert "cannot list b: Permission denied" in said.read()


def test_a_link_whose_target_cannot_be_looked_at(tmp_path, monkeypatch):
    """Whether it is a folder is not known: it may be a class."""
    save(tmp_path / "a" / "x.png")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    real = entries.os.scandir

    class Stale:
        def __init__(self, entry):
            self.name = entry.name
            self._entry = entry

        def is_dir(self):
            if self.name == "b":
                raise OSError(116, "Stale file handle", self._entry.path)
            return self._entry.is_dir()

    class Listing:
        def __init__(self, path):
            self._found = real(path)

        def __enter__(self):
            return (Stale(entry) for entry in self._found)

        def __exit__(self, *error):
            self._found.close()

    monkeypatch.setattr(entries.os, "scandir", Listing)
    with pytest.raises(OSError, match=r"cannot list .* \(at .*/b\): Stale file handle"):
        find_images(tmp_path)


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_what_pillow_opens_is_taken(tmp_path, ending):
    image = Image.new("RGB", (16, 16), (200, 30, 90))
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".apng": "PNG", ".pgm": "PPM", ".pbm": "PPM"}
    if ending == ".avif" and not features.check("avif"):
        assert ending not in image_endings()
        pytest.skip("this Pillow is built without AVIF")
    if ending in (".jp2", ".j2k") and not features.check("jpg_2000"):
        pytest.skip("this Pillow is built without JPEG 2000")
    image.save(tmp_path / f"x{ending.upper()}", format=kinds.get(ending))
    found = find_images(tmp_path)
    assert [file.inner for file, _ in found.files] == [f"x{ending.upper()}"]


def test_the_rest_is_counted_and_named(tmp_path):
    save(tmp_path / "a" / "x.png")
    for name in ("1.heic", "2.HEIC", "notes.txt", "noending", "Thumbs.db", ".DS_Store", "._x.png"):
        save(tmp_path / "a" / name, "?")
    save(tmp_path / "a" / ".ipynb_checkpoints" / "x.png")
    save(tmp_path / "__MACOSX" / "a" / "x.png")
    found = find_images(tmp_path)
    assert len(found.files) == 1
    (note,) = found.notes
    assert "2 .heic" in note and "1 .txt" in note and "1 without an ending" in note
    assert "db" not in note and "DS_Store" not in note
    (tmp_path / "a" / "x.png").unlink()
    with pytest.raises(FileNotFoundError, match="found no images .*there are 2 .heic"):
        find_images(tmp_path)


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "test"), ("train",)])
def test_parts_of_a_set_are_no_classes(tmp_path, names):
    for name in names:
        save(tmp_path / name / "ant" / "x.png")
    with pytest.raises(LayoutError, match=f"--data {tmp_path}/{sorted(names)[0]}"):
        find_images(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    save(tmp_path / "train" / "x.png")
    save(tmp_path / "bus" / "x.png")
    assert find_images(tmp_path).class_names == ("bus", "train")


def test_a_flat_folder_whose_names_are_classes(tmp_path):
    for wnid in ("n01440764", "n01443537"):
        for number in (1, 20):
            save(tmp_path / f"{wnid}_{number}.png")
    (note,) = find_images(tmp_path).notes
    assert "one class" in note and "2 ways (n01440764_*, n01443537_*" in note


@pytest.mark.parametrize(
    "names",
    [
        ("ILSVRC2012_val_00000001.png", "ILSVRC2012_val_00000002.png"),  # one beginning
        ("a_1.png", "b_1.png", "c_1.png"),  # nothing in common
        ("a_1.png", "a_2.png", "b_1.png", "b_2.png", "cover.png"),
    ],
)
def test_flat_folders_that_are_what_they_seem(tmp_path, names):
    for name in names:
        save(tmp_path / name)
    found = find_images(tmp_path)
    assert found.notes == [] and len(found.class_names) == 1


def test_one_folder_around_the_classes(tmp_path):
    for name in ("ant", "bee"):
        save(tmp_path / "pictures" / name / "x.png")
    (note,) = find_images(tmp_path).notes
    assert "one class, pictures" in note and "2 folders" in note


def test_numbers_are_sorted_as_text_and_it_is_said(tmp_path):
    for number in range(12):
        save(tmp_path / str(number) / "x.png")
    found = find_images(tmp_path)
    assert found.class_names[:4] == ("0", "1", "10", "11")
    (note,) = found.notes
    assert "label 2 is folder 10" in note


def test_numbers_in_their_order_need_no_word(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number:03}" / "x.png")
    assert find_images(tmp_path).notes == []


def test_labels_beside_the_images(tmp_path):
    """As webdataset keeps them: KEY.jpg and KEY.cls."""
    for number, label in enumerate(("2", "10", "2\n", "010")):
        save(tmp_path / "shard-0" / f"{number:03}.png")
        save(tmp_path / "shard-0" / f"{number:03}.cls", label)
        save(tmp_path / "shard-0" / f"{number:03}.json", "{}")
    found = find_images(tmp_path)
    assert found.class_names == ("2", "10")
    assert [label for _, label in found.files] == [0, 1, 0, 1]
    assert found.notes[0].startswith("labels from the .cls files")
    assert "4 .json" in found.notes[1] and ".cls" not in found.notes[1]
    save(tmp_path / "shard-0" / "009.png")
    with pytest.raises(LayoutError, match=r"4 labels .* for 5 images: .*009\.png has none"):
        find_images(tmp_path)
    save(tmp_path / "shard-0" / "009.cls", "")
    with pytest.raises(LayoutError, match=r"009\.cls: expected a label"):
        find_images(tmp_path)


def test_a_cache_is_not_taken_for_images(tmp_path):
    for name in ("zarr.json", "manifest.json"):
        save(tmp_path / "outer" / "set_v2" / name, "{}")
    with pytest.raises(FileNotFoundError, match=r"holds a cache of tokens, set_v2: name that"):
        find_images(tmp_path / "outer")
    with zipfile.ZipFile(tmp_path / "set.zarr.zip", "w") as archive:
        archive.writestr("set.zarr/zarr.json", "{}")
        archive.writestr("set.zarr/manifest.json", "{}")
    with pytest.raises(FileNotFoundError, match=r"holds a cache of tokens.*unpack"):
        find_images(tmp_path / "set.zarr.zip")


def test_names_that_are_no_utf8(tmp_path):
    """They are escaped where they are shown, and the images are found all the same."""
    raw = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(raw)
    except OSError:
        pytest.skip("this file system takes no such names")
    Image.new("RGB", (16, 16)).save(os.fsdecode(raw + b"/x.png"))
    save(tmp_path / "tea" / "y.png")
    found = find_images(tmp_path)
    assert found.class_names == (r"caf\xe9", "tea")
    assert found.files[0][0].size() > 0 and found.files[0][0].open().read(4) == b"\x89PNG"
    save(tmp_path / r"caf\xe9" / "x.png")
    with pytest.raises(ValueError, match="two class folders have names that read alike"):
        find_images(tmp_path)


def test_a_run_on_names_that_are_no_utf8(tmp_path):
    """Training and sampling to the end, with every output written."""
    folder = tmp_path / "set"
    for name in (b"caf\xe9", b"tea"):
        raw = os.fsencode(folder) + b"/" + name
        try:
            os.makedirs(raw)
        except OSError:
            pytest.skip("this file system takes no such names")
        for number in range(8):
            Image.new("RGB", (16, 16), (number, 9, 9)).save(os.fsdecode(raw + b"/%d.png" % number))
    words = ["--size", "tiny", "--data", folder, "--width", 32, "--heads", 2, "--depth", 1]
    words += ["--head-depth", 1, "--batch", 8, "--codes", 8, "--image-size", 16, "--device", "cpu"]
    words += ["--sample-every", 0, "--images", 16, "--out", tmp_path / "run"]
    result = command("train", *words)
    assert result.code == 0, result.err
    assert r"classes   0 caf\xe9, 1 tea" in result.out
    npz = tmp_path / "s.npz"
    result = command("sample", tmp_path / "run", "--count", 4, "--save-npz", npz)
    assert result.code == 0, result.err
    assert r"classes: 0 caf\xe9, 1 tea" in result.out and npz.exists()


def shards(folder, beside):
    """Two numbered archives of two images, and other files for each of them."""
    for shard in range(2):
        path = folder / f"{shard:05}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for number in range(2):
                picture = io.BytesIO()
                Image.new("RGB", (16, 16)).save(picture, "PNG")
                for ending, data in {"png": picture.getvalue(), **beside}.items():
                    info = tarfile.TarInfo(f"{shard}{number}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def test_shards_without_labels_are_no_classes(tmp_path):
    with pytest.raises(LayoutError, match=r"2 archives \(00000, 00001, ...\) look like shards"):
        find_images(shards(tmp_path, {"json": b"{}", "txt": b"a cat"}))


def test_shards_with_labels(tmp_path):
    found = find_images(shards(tmp_path, {"json": b"{}", "cls": b"7"}))
    assert found.class_names == ("7",) and len(found.files) == 4
    assert found.notes[0] == "2 archives, each read as the folder of its name"


def test_numbered_archives_of_pictures_alone_may_be_classes(tmp_path):
    assert find_images(shards(tmp_path, {})).class_names == ("00000", "00001")


def test_masks_beside_labelled_images_are_no_images(tmp_path):
    for name in ("1.png", "1.seg.png", "2.png"):
        save(tmp_path / "s" / name)
    for name in ("1.cls", "2.cls"):
        save(tmp_path / "s" / name, "0")
    found = find_images(tmp_path)
    assert [file.inner for file, _ in found.files] == ["s/1.png", "s/2.png"]
    assert "1 .png" in found.notes[1]


def test_a_pillow_that_lacks_a_format(tmp_path, monkeypatch):
    """Its files are left aside and named, not taken and then found broken."""
    there = {k: v for k, v in Image.registered_extensions().items() if k != ".avif"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: there)
    save(tmp_path / "x.png")
    save(tmp_path / "y.avif", "?")
    found = find_images(tmp_path)
    assert len(found.files) == 1 and "1 .avif" in found.notes[0]
