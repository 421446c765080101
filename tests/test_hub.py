"""Data sets of the hub and folders of parquet files, from files that the tests write: nothing here needs a network."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erase.classification import data
from erase.data import sources
from erase.errors import EraseError

datasets = pytest.importorskip("datasets")

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> None:
    """What datasets makes of the files stays out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def pixels(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def write_parquet(
    folder: Path, splits: dict[str, int], *, size: int = 8, columns: tuple[str, str] = ("image", "label")
) -> None:
    """One file a split, with so many images of random pixels, their classes in turns."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=list(CLASSES))})
    for split, n in splits.items():
        images = [Image.fromarray(image) for image in pixels(n, size)]
        labels = [i % len(CLASSES) for i in range(n)]
        table = datasets.Dataset.from_dict({columns[0]: images, columns[1]: labels}, features=features)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


@pytest.mark.parametrize("test", ["test", "validation"])
def test_a_folder_of_parquet_files_is_read_pixel_by_pixel(test, tmp_path):
    write_parquet(tmp_path / "set", {"train": 6, test: 4}, columns=("image", "kind"))
    found = data.load(str(tmp_path / "set"), tmp_path)
    assert found.classes == CLASSES
    assert found.train.y.tolist() == [0, 1, 2, 0, 1, 2] and found.test.y.tolist() == [0, 1, 2, 0]
    assert torch.equal(found.train.x, torch.from_numpy(pixels(6, 8)).permute(0, 3, 1, 2))
    assert torch.equal(found.test.x, torch.from_numpy(pixels(4, 8)).permute(0, 3, 1, 2))
    shares = found.train.x.double() / 255
    assert found.mean == pytest.approx(shares.mean((0, 2, 3)).tolist())
    assert data.load(str(tmp_path / "set"), tmp_path, size=4).size == 4


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """A folder that stands where the hub's CIFAR-10 does."""
    folder = tmp_path / "hub"
    monkeypatch.setitem(data.SOURCES, "cifar10", replace(data.SOURCES["cifar10"], repository=str(folder)))
    return folder


def test_a_data_set_of_the_hub_has_its_own_size_and_statistics(hub, tmp_path):
    """The columns are CIFAR-10's; images of another size are brought to its 32 pixels."""
    write_parquet(hub, {"train": 6, "test": 3}, size=40, columns=("img", "label"))
    found = data.load("cifar10", tmp_path)
    assert found.name == "cifar10" and found.classes == CLASSES and found.train.x.shape == (6, 3, 32, 32)
    assert (found.mean, found.std) == (data.SOURCES["cifar10"].mean, data.SOURCES["cifar10"].std)
    assert found.padding == 4 and found.flip
    assert data.load("cifar10", tmp_path, size=16).size == 16


@pytest.mark.parametrize(
    ("splits", "columns", "message"),
    [
        ({"train": 3, "test": 3}, ("image", "label"), "cifar10 has the columns image, label; it needs img and label"),
        ({"train": 3}, ("img", "label"), "cifar10 has the splits train; it needs train and test"),
    ],
)
def test_a_data_set_of_the_hub_that_is_another_than_expected_is_one_line(splits, columns, message, hub, tmp_path):
    write_parquet(hub, splits, columns=columns)
    with pytest.raises(EraseError, match=message):
        data.load("cifar10", tmp_path)


def test_a_folder_without_a_test_split_or_labels_is_one_line(tmp_path):
    write_parquet(tmp_path / "a", {"train": 3})
    with pytest.raises(EraseError, match=r"a has the splits train; it needs train and test \(or validation\)"):
        data.load(str(tmp_path / "a"), tmp_path)
    (tmp_path / "b").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["x"], "label": [0]}).to_parquet(str(tmp_path / "b" / f"{split}.parquet"))
    with pytest.raises(EraseError, match="b has the columns text, label; one must be an Image and one a ClassLabel"):
        data.load(str(tmp_path / "b"), tmp_path)


def test_a_split_without_rows_is_one_line(tmp_path):
    write_parquet(tmp_path / "a", {"train": 3, "test": 0})
    with pytest.raises(EraseError, match=r"a could not be loaded \(.*no data!\)$"):
        data.load(str(tmp_path / "a"), tmp_path)


def test_a_damaged_parquet_file_and_images_of_two_sizes_are_one_line(tmp_path):
    write_parquet(tmp_path / "a", {"train": 3, "test": 3})
    (tmp_path / "a" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(EraseError, match=r"a could not be loaded \(.*\)$"):
        data.load(str(tmp_path / "a"), tmp_path)
    write_parquet(tmp_path / "b", {"train": 3})
    write_parquet(tmp_path / "b", {"test": 3}, size=9)
    with pytest.raises(EraseError, match="test of .*b has images of 9x9 pixels, but the first is 8x8; give --size"):
        data.load(str(tmp_path / "b"), tmp_path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach\n'cifar10' on the Hub"), "Couldn't reach 'cifar10' on the Hub"),
        (TimeoutError(), "TimeoutError"),
        (OSError(""), "OSError"),
    ],
)
def test_a_hub_out_of_reach_says_what_to_do(error, reason, monkeypatch, tmp_path):
    def load_dataset(*_: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EraseError) as caught:
        data.load("cifar10", tmp_path)
    expected = f"cifar10 could not be loaded ({reason}); give --data a folder with its files instead"
    assert str(caught.value) == expected


def test_without_datasets_one_line_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EraseError, match="cifar10 is read with the package datasets; pip install datasets$"):
        data.load("cifar10", tmp_path)


def test_images_of_a_concept_come_from_a_data_set_too(tmp_path):
    """Not for classifiers: what --forget-images reads; a text beside an image is its prompt."""
    table = {"image": [Image.fromarray(image) for image in pixels(2, 8)], "text": ["a cat", "an owl"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    found = sources._from_datasets(str(tmp_path / "set"))
    assert [text for _, text in found] == ["a cat", "an owl"]
    expected = torch.from_numpy(pixels(2, 8)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(torch.stack([image.pixels(8) for image, _ in found]), expected, atol=1e-6)
