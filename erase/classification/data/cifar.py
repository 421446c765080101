"""CIFAR-10 and CIFAR-100 from their own files: the "python version" (pickles) and the "binary version"."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erase.classification.data.labelled import Dataset, Images
from erase.errors import EraseError

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # mean and standard deviation of each channel
CIFAR100 = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))


def num_classes_in(folder: Path) -> int | None:
    """10 or 100 if the folder holds CIFAR's files, else None."""
    if any((folder / file).is_file() for file in ("data_batch_1", "data_batch_1.bin")):
        return 10
    if any((folder / file).is_file() for file in ("train", "train.bin")):
        return 100
    return None


def cifar(folder: Path, num_classes: int) -> Dataset:
    """CIFAR-10 or CIFAR-100 from a folder with its files. Pickles are read without running code that they name.

    CIFAR-10 may have any number of the files data_batch_1 to data_batch_5.

    Raises:
        EraseError: a file is missing or is not one of CIFAR's.
    """
    is_ten = num_classes == 10
    suffix = ".bin" if (folder / ("data_batch_1.bin" if is_ten else "train.bin")).is_file() else ""
    parts = [f"data_batch_{i}" for i in range(1, 6)] if is_ten else ["train"]
    train = [folder / (name + suffix) for name in parts if (folder / (name + suffix)).is_file()]
    test = folder / (("test_batch" if is_ten else "test") + suffix)
    read = _read_binary if suffix else _read_pickle
    pieces = [read(path, num_classes) for path in train]
    images = Images(torch.cat([piece.x for piece in pieces]), torch.cat([piece.y for piece in pieces]))
    mean, std = CIFAR10 if is_ten else CIFAR100
    classes = tuple(_class_names(folder, num_classes))
    return Dataset(f"cifar{num_classes}", images, read(test, num_classes), classes, mean, std, padding=4, flip=True)


class _Unpickler(pickle.Unpickler):
    """Builds numpy arrays and plain values, and refuses everything else that a pickle could call."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(path: Path) -> Mapping[bytes | str, Any]:
    try:
        with open(path, "rb") as file:
            value = _Unpickler(file, encoding="bytes").load()
    except OSError as error:
        raise EraseError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise EraseError(f"{path} is not one of CIFAR's files: {error}") from error
    if not isinstance(value, dict):
        raise EraseError(f"{path} is not one of CIFAR's files: it holds no dict")
    return {key.decode() if isinstance(key, bytes) else key: entry for key, entry in value.items()}


def _read_pickle(path: Path, num_classes: int) -> Images:
    batch = _unpickle(path)
    key = "labels" if num_classes == 10 else "fine_labels"
    if "data" not in batch or key not in batch:
        raise EraseError(f"{path} is not one of CIFAR's files: it has no 'data' or no '{key}'")
    x, y = np.asarray(batch["data"]), np.asarray(batch[key])
    if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072 or y.shape != (len(x),):
        raise EraseError(f"{path} is not one of CIFAR's files: data {x.dtype} {list(x.shape)}, labels {list(y.shape)}")
    return Images(torch.from_numpy(x.reshape(-1, 3, 32, 32).copy()), torch.from_numpy(y.astype(np.int64)))


def _read_binary(path: Path, num_classes: int) -> Images:
    """Records of one label byte (CIFAR-100: a coarse and a fine one) and 3,072 pixel bytes."""
    num_labels = 1 if num_classes == 10 else 2
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise EraseError(f"{path} cannot be read ({error.strerror})") from error
    if not content.size or content.size % (num_labels + 3072):
        raise EraseError(
            f"{path} is not one of CIFAR's files: its size, {content.size} bytes, is not a whole number of images"
        )
    records = content.reshape(-1, num_labels + 3072)
    x = torch.from_numpy(records[:, num_labels:].reshape(-1, 3, 32, 32).copy())
    return Images(x, torch.from_numpy(records[:, num_labels - 1].astype(np.int64)))


def _class_names(folder: Path, num_classes: int) -> Sequence[str]:
    text, meta = ("batches.meta.txt", "batches.meta") if num_classes == 10 else ("fine_label_names.txt", "meta")
    if (folder / text).is_file():
        return (folder / text).read_text(encoding="utf-8").split()
    if (folder / meta).is_file():
        names = _unpickle(folder / meta).get("label_names" if num_classes == 10 else "fine_label_names", ())
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    return [str(number) for number in range(num_classes)]
