"""Pictures with labels: digits and drawings that need no network, CIFAR's own files, image folders, hub data sets."""

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from erase import tensor_files
from erase.classification.settings import MOST_SIZE
from erase.data.images import SUFFIXES, BadImage, image_files, is_system
from erase.data.images import read as read_image
from erase.errors import EraseError, missing


@dataclass(frozen=True, eq=False)
class Images:
    """x: uint8, [n, c, h, w]. y: labels, int64, [n], from 0."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, positions: Tensor | slice) -> "Images":
        return Images(self.x[positions], self.y[positions])

    def to(self, device: str | torch.device) -> "Images":
        return Images(self.x.to(device), self.y.to(device))

    def batches(self, size: int) -> Iterator["Images"]:
        """In order; the last one may be smaller."""
        return (Images(x, y) for x, y in zip(self.x.split(size), self.y.split(size), strict=True))

    @property
    def pixels(self) -> Tensor:
        """float32 in [0, 1]: what a model is given. On a CPU channels lie last, as its convolutions like it."""
        pixels = self.x.float() / 255
        return pixels.contiguous(memory_format=torch.channels_last) if pixels.device.type == "cpu" else pixels

    def with_labels(self, y: Tensor) -> "Images":
        return Images(self.x, y)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test pictures, and how a network sees them.

    mean, std: of each channel, on pixels in [0, 1]; the normalisation is a part of the network.
    padding: pixels of zeros around a picture before a random crop back to its size; 0 for none.
    flip: mirror half of the training pictures.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise EraseError(f"{self.name} has {len(self.classes)} class ({', '.join(self.classes)}); it needs two")
        for part, images in (("training", self.train), ("test", self.test)):
            require_labels(images, len(self.classes), f"the {part} pictures of {self.name}")
        for index, name in enumerate(self.classes):
            if not (self.train.y == index).any():
                raise EraseError(f"class {index} ({name}) of {self.name} has no training picture")

    @property
    def channels(self) -> int:
        return self.train.x.shape[1]

    @property
    def size(self) -> int:
        return self.train.x.shape[2]


def require_labels(images: Images, num_classes: int, what: str) -> None:
    """Raise an EraseError unless there are pictures and every label is one of the classes."""
    if not len(images):
        raise EraseError(f"there are no pictures among {what}")
    low, high = int(images.y.min()), int(images.y.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise EraseError(
            f"a label among {what} is {wrong}; with {num_classes} classes it must be 0 to {num_classes - 1}"
        )


def augment(x: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each picture of a batch cropped from its padded self and mirrored at random, all at once, on its device.

    generator: on the CPU, so that every device sees the same draws.
    """
    n, size = len(x), x.shape[2:]
    if padding:
        down, right = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(x.device)
        windows = F.pad(x, [padding] * 4).unfold(2, size[0], 1).unfold(3, size[1], 1)
        x = windows[torch.arange(n, device=x.device), :, down, right]
    if flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x


# --- which data set ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A data set of the hub, its training and test splits, its columns, and the statistics that papers use for it."""

    repository: str
    config: str | None
    splits: tuple[str, str]
    columns: tuple[str, str]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int
    flip: bool = True


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
_SVHN = ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052))
_TRAIN_TEST, _TRAIN_VALID = ("train", "test"), ("train", "validation")
SOURCES: dict[str, _Source] = {
    "cifar10": _Source("uoft-cs/cifar10", None, _TRAIN_TEST, ("img", "label"), 32, *_CIFAR10, 4),
    "cifar100": _Source("uoft-cs/cifar100", None, _TRAIN_TEST, ("img", "fine_label"), 32, *_CIFAR100, 4),
    "svhn": _Source("ufldl-stanford/svhn", "cropped_digits", _TRAIN_TEST, ("image", "label"), 32, *_SVHN, 0, False),
    "tiny-imagenet": _Source("zh-plus/tiny-imagenet", None, ("train", "valid"), ("image", "label"), 64, *_IMAGENET, 4),
    "imagenette": _Source("frgfm/imagenette", "160px", _TRAIN_VALID, ("image", "label"), 128, *_IMAGENET, 16),
}
OFFLINE = ("digits", "drawings")


def load(name: str, cache_dir: str | Path, *, size: int | None = None) -> Dataset:
    """The data set of that name, or of a folder.

    name: digits, drawings, one of SOURCES, or a folder with CIFAR's python or binary files, with train/CLASS/picture
        and test/CLASS/picture (or val), or with parquet files.
    cache_dir: where the drawings are kept once they are drawn.
    size: side in pixels that the pictures of a folder are brought to; theirs, which must then be equal, without it.

    Raises:
        EraseError: no such data set, or it is broken; the message names the file.
    """
    if name == "digits":
        return digits()
    if name == "drawings":
        return drawings(cache_dir)
    if name in SOURCES:
        return _from_hub(name, size)
    folder = Path(name)
    if not folder.is_dir():
        raise EraseError(f"{name!r} is no data set and no folder; choose {', '.join([*OFFLINE, *SOURCES])} or a folder")
    if any((folder / file).is_file() for file in ("data_batch_1", "data_batch_1.bin")):
        return cifar(folder, 10)
    if any((folder / file).is_file() for file in ("train", "train.bin")):
        return cifar(folder, 100)
    if (folder / "train").is_dir() and any(folder.glob("train/*/*")):
        return image_folder(folder, size)
    if any(folder.rglob("*.parquet")):
        return _from_parquet(folder, size)
    raise EraseError(f"{folder} holds neither CIFAR's files, nor train/CLASS/pictures, nor parquet files")


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8: 1,000 for training and 797 for testing, always the same."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing("scikit-learn") from error
    pictures, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(np.round(pictures * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    train, test = order[:1000], order[1000:]
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", Images(x[train], y[train]), Images(x[test], y[test]), names, (0.305,), (0.376,))


NUM_DRAWINGS = (300, 100)  # of a class, for training and for testing


def drawings(cache_dir: str | Path, num: tuple[int, int] = NUM_DRAWINGS) -> Dataset:
    """Ten shapes of the embedded model's world at 32 x 32, in all colours, styles and places; drawn once, then cached.

    num: drawings of a class for training and for testing.
    """
    from erase.mini import world

    path = Path(cache_dir) / f"drawings-{num[0]}-{num[1]}.safetensors"
    if not path.is_file():
        tensor_files.write_tensors(path, {key: value for part in _draw(num) for key, value in part.items()})
    tensors = tensor_files.read_tensors(path)
    for part, each in zip(_TRAIN_TEST, num, strict=True):
        x, y = (tensors.get(f"{part}.{kind}", torch.zeros(0)) for kind in "xy")
        known = x.dtype == torch.uint8 and x.shape == (10 * each, 3, 32, 32)
        if not known or not torch.equal(y, torch.arange(10).repeat(each)):
            raise EraseError(f"{path} is damaged: it does not hold the drawings; delete it, to make them again")
    train, test = (Images(tensors[f"{part}.x"], tensors[f"{part}.y"]) for part in _TRAIN_TEST)
    classes = world.SHAPES[:10]
    half = (0.5, 0.5, 0.5)
    return Dataset("drawings", train, test, classes, half, half, padding=2, flip=False)


def _draw(num: tuple[int, int]) -> Iterator[dict[str, Tensor]]:
    from erase.mini import world

    for seed, (part, each) in enumerate(zip(_TRAIN_TEST, num, strict=True)):
        rng = np.random.default_rng(seed)
        pictures = np.empty((each, 10, 32, 32, 3), np.uint8)
        for i in range(each):
            for label, shape in enumerate(world.SHAPES[:10]):
                words = (str(rng.choice(list(choices))) for choices in (world.COLOURS, world.STYLES, world.BACKGROUNDS))
                picture = world.draw(world.Scene(shape, *words), rng)
                pictures[i, label] = np.round(picture.reshape(32, 2, 32, 2, 3).mean((1, 3)))
        x = torch.from_numpy(pictures).view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
        yield {f"{part}.x": x, f"{part}.y": torch.arange(10).repeat(each)}


# --- CIFAR's own files ------------------------------------------------------------------------------------------------


def cifar(folder: Path, num_classes: int) -> Dataset:
    """CIFAR-10 or CIFAR-100 from its "python version" (pickles, read without running their code) or "binary version".

    Any number of files data_batch_1, ... is taken for CIFAR-10.
    """
    is_ten = num_classes == 10
    suffix = ".bin" if (folder / ("data_batch_1.bin" if is_ten else "train.bin")).is_file() else ""
    parts = [f"data_batch_{i}" for i in range(1, 6)] if is_ten else ["train"]
    train = [folder / (name + suffix) for name in parts if (folder / (name + suffix)).is_file()]
    test = folder / (("test_batch" if is_ten else "test") + suffix)
    read = _read_binary if suffix else _read_pickle
    pieces = [read(path, num_classes) for path in train]
    images = Images(torch.cat([piece.x for piece in pieces]), torch.cat([piece.y for piece in pieces]))
    mean, std = _CIFAR10 if is_ten else _CIFAR100
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
    """Records of one label byte, or of a coarse and a fine one, and 3,072 pixels."""
    num_labels = 1 if num_classes == 10 else 2
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise EraseError(f"{path} cannot be read ({error.strerror})") from error
    if not content.size or content.size % (num_labels + 3072):
        raise EraseError(f"{path} is not one of CIFAR's files: {content.size} bytes are no whole number of pictures")
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


# --- folders of pictures and the hub ----------------------------------------------------------------------------------


_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: file, class and box of each validation image


def image_folder(folder: Path, size: int | None = None) -> Dataset:
    """train/CLASS/image and test/CLASS/image (or val); classes in alphabetical order.

    Images may be in folders below their class folder. Tiny ImageNet is read as it is distributed: labels of val/images
    come from val_annotations.txt, class names from words.txt, and its folder test, which has no labels, is ignored.
    """
    annotations = folder / "val" / _ANNOTATIONS
    names = ("val",) if annotations.is_file() else ("test", "val")
    test = next((folder / name for name in names if (folder / name).is_dir()), None)
    if test is None:
        raise EraseError(f"{folder} has a folder train but neither test nor val")
    train = _by_class(folder / "train")
    tested = _annotated(annotations) if annotations.is_file() else _by_class(test)
    unknown = sorted(tested.keys() - train.keys())
    if unknown:
        raise EraseError(f"{test / unknown[0]} is a class that {folder / 'train'} does not have")
    parts = [
        _read_files(part, [(path, y) for y, name in enumerate(train) for path in found.get(name, ())], size)
        for part, found in ((folder / "train", train), (test, tested))
    ]
    classes = _in_words(folder / "words.txt", list(train))
    mean, std = _statistics(parts[0].x)
    return Dataset(str(folder), parts[0], parts[1], classes, mean, std, padding=parts[0].x.shape[2] // 8, flip=True)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """The images of each class folder, in alphabetical order."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not is_system(path.name))
    return {path.name: image_files(path) for path in classes}


def _annotated(path: Path) -> dict[str, list[Path]]:
    """The images of each class by a file with lines "FILE TAB CLASS TAB box"; the images are in images/ beside it."""
    found: dict[str, list[Path]] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        name, *rest = line.split("\t")
        if not rest or not (path.parent / "images" / name).is_file():
            raise EraseError(f"{path}, line {number}: needed are a file of {path.parent / 'images'}, a TAB and a class")
        found.setdefault(rest[0], []).append(path.parent / "images" / name)
    return found


def _in_words(path: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Each class's first name in a file with lines "CLASS TAB name, other name"; itself where that is not unique."""
    if not path.is_file():
        return tuple(classes)
    lines = (line.partition("\t") for line in _text(path).splitlines())
    words = {name: text.split(",")[0].strip() for name, _, text in lines}
    named = [words.get(name) or name for name in classes]
    return tuple(word if named.count(word) == 1 else name for name, word in zip(classes, named, strict=True))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EraseError(f"{path} cannot be read as text ({error})") from error


def _read_files(folder: Path, files: Sequence[tuple[Path, int]], size: int | None) -> Images:
    pictures: list[Tensor] = []
    for path, _ in files:
        pictures.append(_pixels(path, str(path), size))
        if pictures[-1].shape != pictures[0].shape:
            here, first = ("x".join(map(str, one.shape[1:])) for one in (pictures[-1], pictures[0]))
            raise EraseError(f"{path} is {here} pixels, but {files[0][0].name} is {first}; give --size")
    if not pictures:
        raise EraseError(f"{folder} holds no images in class folders ({', '.join(sorted(SUFFIXES))})")
    return Images(torch.stack(pictures), torch.tensor([y for _, y in files]))


def _pixels(source: Path | bytes, name: str, size: int | None) -> Tensor:
    """RGB, uint8, [3, h, w]: the middle square brought to size x size.

    name: of the image, for the message.
    """
    try:
        pixels = read_image(source)
    except BadImage as error:
        raise EraseError(f"{name} cannot be read as an image ({error.reason}); mend or remove it") from error
    if size is None and max(pixels.shape[:2]) > MOST_SIZE:
        here = "x".join(map(str, pixels.shape[:2]))
        raise EraseError(f"{name} is {here} pixels; give --size, or images of at most {MOST_SIZE} a side")
    if size is not None and pixels.shape[:2] != (size, size):
        pixels = np.array(ImageOps.fit(Image.fromarray(pixels), (size, size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _from_hub(name: str, size: int | None) -> Dataset:
    source = SOURCES[name]
    stored = _load_dataset(name, source.repository, source.config)
    return _collect(name, stored, source.splits, source.columns, size or source.size, source)


def _from_parquet(folder: Path, size: int | None) -> Dataset:
    stored = _load_dataset(str(folder), str(folder), None)
    if "train" not in stored or len(stored) < 2:
        raise EraseError(f"{folder} has the splits {', '.join(stored)}; it needs train and test (or validation)")
    test = next((name for name in ("test", "validation", "valid", "val") if name in stored), None) or list(stored)[1]
    features = stored["train"].features
    picture = next((key for key, kind in features.items() if type(kind).__name__ == "Image"), None)
    label = next((key for key, kind in features.items() if type(kind).__name__ == "ClassLabel"), None)
    if picture is None or label is None:
        raise EraseError(f"{folder} has the columns {', '.join(features)}; one must be an Image and one a ClassLabel")
    return _collect(str(folder), stored, ("train", test), (picture, label), size, None)


def _load_dataset(name: str, repository: str, config: str | None) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise missing("datasets", f"{name} is read with the package datasets") from error
    try:
        stored: Any = datasets.load_dataset(repository, config)
    except Exception as error:  # network, disk and format errors of many kinds, each with a message of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "" if Path(repository).is_dir() else "; give --data a folder with its files instead"
        raise EraseError(f"{name} could not be loaded ({reason}){advice}") from error
    return stored


def _collect(
    name: str,
    stored: Mapping[str, Any],
    splits: tuple[str, str],
    columns: tuple[str, str],
    size: int | None,
    source: _Source | None,
) -> Dataset:
    _require(name, "splits", splits, stored)
    parts: list[Images] = []
    for split in splits:
        _require(name, "columns", columns, stored[split].features)
        rows = _encoded(stored[split], columns[0])
        pictures = [_pixels(row, f"image {i} of {split} of {name}", size) for i, row in enumerate(rows)]
        first = (parts[0].x if parts else pictures)[0]
        other = next((picture for picture in pictures if picture.shape != first.shape), first)
        if other is not first:
            here, there = ("x".join(map(str, one.shape[1:])) for one in (other, first))
            raise EraseError(f"{split} of {name} has pictures of {here} pixels, but the first is {there}; give --size")
        parts.append(Images(torch.stack(pictures), torch.tensor(stored[split][columns[1]])))
    classes = tuple(stored[splits[0]].features[columns[1]].names)
    train, test = parts
    if source is None:
        return Dataset(name, train, test, classes, *_statistics(train.x), padding=train.x.shape[2] // 8, flip=True)
    return Dataset(name, train, test, classes, source.mean, source.std, source.padding, source.flip)


def _encoded(split: Any, column: str) -> Iterator[Path | bytes]:
    """The images of a data set's column as files or their bytes; no bytes for an empty row."""
    from datasets import Image as Encoded

    for row in split.cast_column(column, Encoded(decode=False))[column]:
        row = row or {"bytes": b"", "path": None}
        yield row["bytes"] or (Path(row["path"]) if row["path"] else b"")


def _require(name: str, what: str, wanted: tuple[str, str], found: Iterable[str]) -> None:
    if not set(wanted) <= set(found):
        raise EraseError(f"{name} has the {what} {', '.join(found)}; it needs {' and '.join(wanted)}")


def _statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel on pixels in [0, 1], without a float copy of all pictures."""
    counts = torch.stack([torch.bincount(x[:, c].reshape(-1).int(), minlength=256) for c in range(x.shape[1])]).double()
    share, level = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = share @ level
    std = (share @ level.square() - mean.square()).clamp(min=1e-6).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
