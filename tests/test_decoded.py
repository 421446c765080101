"""Images of a folder: decoded once, read from the cache while no file changes; nothing is left half written."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erase.classification import data
from erase.classification.data import decoded
from erase.classification.data.cifar import CIFAR10
from erase.classification.data.pixels import read_pixels
from erase.errors import EraseError

REAL = Path(
    os.environ.get("ERASE_CIFAR10", "no such folder")
)  # a folder with CIFAR-10's images, train/CLASS and test/CLASS


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes, three training and two test images of each, with noise; as JPEG, so decoding is not trivial."""
    draw = np.random.default_rng(0)
    for part, num in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for number in range(num):
                pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / name / f"{number}.jpg")
    return tmp_path / "set"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The images that are decoded, in order."""
    found: list[str] = []

    def counting(path: Path, name: str, size: int | None) -> torch.Tensor:
        found.append(Path(name).name)
        return read_pixels(path, name, size)

    monkeypatch.setattr(decoded, "read_pixels", counting)
    return found


def test_images_are_decoded_once_and_the_same_from_the_cache(folder, reads, tmp_path):
    first = data.load(str(folder), tmp_path / "cache")
    assert len(reads) >= 10
    reads.clear()
    again = data.load(str(folder), tmp_path / "cache")
    assert not reads
    for part in ("train", "test"):
        one, other = getattr(first, part), getattr(again, part)
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
    plain = torch.stack([read_pixels(path, "", None) for path in sorted(folder.glob("train/*/*"))])
    assert torch.equal(again.train.x, plain) and again.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("change", ["content", "name", "class", "size"])
def test_another_folder_is_decoded_again(change, folder, reads, tmp_path):
    """Also a file of the same length and time with another byte."""
    before = data.load(str(folder), tmp_path / "cache")
    reads.clear()
    path, size = folder / "train" / "cat" / "0.jpg", None
    if change == "content":
        stat, content = path.stat(), bytearray(path.read_bytes())
        content[-10] ^= 255
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "name":
        path.rename(path.with_name("9.jpg"))
    elif change == "class":
        path.rename(folder / "train" / "dog" / "7.jpg")
    else:
        size = 4
    after = data.load(str(folder), tmp_path / "cache", size=size)
    assert len(reads) >= 10
    assert after.train.x.shape != before.train.x.shape or not torch.equal(after.train.x, before.train.x)


def test_an_interrupted_decoding_leaves_nothing_and_begins_again(folder, monkeypatch, tmp_path):
    """The control is the whole run after it."""

    def interrupted(path: Path, name: str, size: int | None) -> torch.Tensor:
        if name.endswith("test/dog/1.jpg"):
            raise KeyboardInterrupt
        return read_pixels(path, name, size)

    monkeypatch.setattr(decoded, "read_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load(str(folder), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))
    monkeypatch.setattr(decoded, "read_pixels", read_pixels)
    assert len(data.load(str(folder), tmp_path / "cache").train) == 6


def test_a_damaged_cache_is_one_line_that_says_what_to_do(folder, tmp_path):
    data.load(str(folder), tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(EraseError, match=rf"{path.name} is damaged.*; delete it, and the images are decoded again$"):
        data.load(str(folder), tmp_path / "cache")


def test_decoding_reports_its_progress(folder, tmp_path, capsys):
    data.load(str(folder), tmp_path / "quiet")
    assert not capsys.readouterr().err
    data.load(str(folder), tmp_path / "cache", quiet=False)
    assert "decode: 0 of 10 images" in capsys.readouterr().err
    data.load(str(folder), tmp_path / "cache", quiet=False)
    assert not capsys.readouterr().err


def test_the_first_images_are_equally_many_of_each_class(folder, tmp_path):
    whole = data.load(str(folder), tmp_path)
    few = whole.first(4)
    assert few.train.y.tolist() == [0, 0, 1, 1] and len(few.test) == 4
    assert torch.equal(few.train.x, whole.train.x[torch.tensor([0, 1, 3, 4])])
    for num in (5, 8, 0):
        with pytest.raises(EraseError, match=f"--num-train is {num}; it must be a multiple of the 2 classes and at m"):
            whole.first(num)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="ERASE_CIFAR10 names no folder with CIFAR-10's images")
def test_cifar_10_as_image_files_is_read_whole(tmp_path):
    found = data.load(str(REAL), tmp_path)
    assert found.train.x.shape == (50_000, 3, 32, 32) and found.test.x.shape == (10_000, 3, 32, 32)
    assert torch.bincount(found.train.y).tolist() == [5000] * 10 and found.classes[0] == "airplane"
    assert found.mean == pytest.approx(CIFAR10[0], abs=2e-3) and found.std == pytest.approx(CIFAR10[1], abs=3e-3)
    assert (found.padding, found.flip) == (4, True)
