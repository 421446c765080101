"""The whole job: data, split, original model, mask, unlearning, files."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase import __version__, delta, device, files, masks
from erase.classification import data, methods, networks, salun_checkpoint, split
from erase.classification.data import Dataset, Images
from erase.classification.descent import Recipe, descend, in_eval, saliency_mask, write
from erase.classification.methods import Descends, Method, Plan, Task
from erase.classification.networks import Classifier, Shape
from erase.classification.settings import Settings, require_use
from erase.classification.split import Split
from erase.errors import EraseError
from erase.options.declare import MIXED_PRECISION

MODEL, DELTA, MASK = "model.safetensors", "delta.safetensors", "mask.safetensors"
SPLIT, RECORD = "split.json", "run.json"


@dataclass
class Run:
    """A finished job: where its files are, the model before (None for a retrained one) and after, and what it saw.

    record: what run.json holds.
    """

    folder: Path
    original: Classifier | None
    model: Classifier
    dataset: Dataset
    split: Split
    record: dict[str, Any] = field(default_factory=dict)


def train(model: nn.Module, images: Images, recipe: Recipe, seed: int, *, num_classes: int, quiet: bool = True) -> None:
    """Train any classifier on labelled pictures, in place; the statistics of batch normalisation follow."""
    data.require_labels(images, num_classes, "the training images")
    require_classes(model, images, num_classes)
    plan = Plan(passes=lambda: [images])
    descend(model, plan, replace(recipe, batch_norm="moving"), torch.Generator().manual_seed(seed), quiet=quiet)


def unlearn(
    model: nn.Module,
    forget: Images,
    retain: Images,
    method: Method,
    recipe: Recipe,
    *,
    num_classes: int,
    seed: int,
    mask: Mapping[str, Tensor] | None = None,
    quiet: bool = True,
) -> None:
    """Unlearn `forget` in any classifier, in place: a module that gives logits of float pictures in [0, 1].

    Weights outside the mask keep their bits, and so do all buffers unless the recipe says batch_norm "moving". Same
    seed, same weights.

    Raises:
        EraseError: nothing to forget or to keep, a label out of range, other classes than the model's, a mask for
            another model, or a loss that is no number.
    """
    data.require_labels(forget, num_classes, "the images to forget")
    data.require_labels(retain, num_classes, "the images to retain")
    require_classes(model, forget, num_classes)
    with in_eval(model):
        task = Task(model, forget, retain, num_classes, torch.Generator().manual_seed(seed))
        if isinstance(method, Descends):
            descend(model, method.plan(task), recipe, task.generator, mask, label="unlearn", quiet=quiet)
        else:
            if mask is not None:
                masks.check(mask, {}, task.parameters())
            write(model, method.solve(task), mask)


def require_classes(model: nn.Module, images: Images, num_classes: int) -> None:
    """Raise an EraseError unless the model gives as many logits as there are classes."""
    with in_eval(model), torch.no_grad():
        logits = model(images[slice(0, 1)].pixels)
    if logits.shape != (1, num_classes):
        raise EraseError(f"the network has {logits.shape[-1]} classes, but the data set has {num_classes}")


def make(settings: Settings) -> Method:
    """The method that the settings name, with its options."""
    return methods.make(methods.find(settings.preset.method), settings.method, settings.method_options())


def recipes(settings: Settings, dataset: Dataset) -> tuple[Recipe, Recipe]:
    """For training a model from nothing, and for unlearning."""
    assert settings.train_epochs is not None and settings.train_learning_rate is not None
    assert settings.epochs is not None and settings.learning_rate is not None and settings.batch_size is not None
    rest: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "padding": dataset.padding,
        "flip": dataset.flip,
        "precision": settings.precision,
    }
    how: dict[str, Any] = {"optimizer": settings.optimizer, "batch_norm": settings.batch_norm}
    training = Recipe(settings.train_epochs, settings.train_learning_rate, schedule="cosine", **rest)
    return training, Recipe(settings.epochs, settings.learning_rate, **how, **rest)


def make_mask(
    settings: Settings, model: nn.Module, forget: Images
) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    """The mask that the settings ask for, None for all weights, and the header of its file.

    Raises:
        EraseError: the mask's file is for another model.
    """
    base_hash = delta.content_hash(model.state_dict())
    header = {"base": f"{settings.network} on {settings.data}", "base_hash": base_hash, "density": settings.density}
    kind = settings.mask
    if kind in (None, "none"):
        return None, header
    if kind in ("saliency", "inverse"):
        how: dict[str, Any] = {
            "per_tensor": settings.per_tensor,
            "largest": kind == "saliency",
            "batch_size": settings.batch_size,
            "precision": settings.precision,
        }
        mask = saliency_mask(model, forget, settings.density, settings.score, **how)
        return mask, {**header, "mask": kind, "score": settings.score, "per_tensor": settings.per_tensor}
    named = dict(model.named_parameters())
    if kind == "random":
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        mask = masks.random_mask(shapes, settings.density, settings.seed, per_tensor=settings.per_tensor)
        return mask, {**header, "mask": kind, "seed": settings.seed}
    if not Path(kind).is_file():
        raise EraseError(f"--mask is {kind!r}; choose saliency, random, inverse, none, or a mask file")
    stored, found = masks.load(kind)
    masks.check(stored, found.made, named, base_hash=base_hash)
    return {name: stored[name] for name in stored}, dict(found.made)


def prepare(settings: Settings, cache_dir: str | Path) -> tuple[Dataset, Split]:
    """The data set on the device, and what of it is to be forgotten; of resolved settings."""
    split.require_request(settings.forget)
    dataset = data.load(settings.data, cache_dir, size=settings.size)
    make_split = split.make_reference if settings.split == "reference" else split.make
    chosen = make_split(dataset, settings.forget, settings.seed)
    here = device_of(settings)
    return replace(dataset, train=dataset.train.to(here), test=dataset.test.to(here)), chosen


def device_of(settings: Settings) -> torch.device:
    return device.choose(settings.device, settings.precision).device


def trained(settings: Settings, dataset: Dataset, images: Images, *, quiet: bool = True) -> tuple[Classifier, Shape]:
    """A new network, trained on the pictures from the settings' seed."""
    assert settings.network is not None
    sizes = (len(dataset.classes), dataset.channels, dataset.size)
    shape = Shape(settings.network, *sizes, dataset.mean, dataset.std)
    model = networks.build(shape, settings.seed).to(device_of(settings))
    how: dict[str, Any] = {"num_classes": len(dataset.classes), "quiet": quiet}
    train(model, images, recipes(settings, dataset)[0], settings.seed, **how)
    return model, shape


def run_training(settings: Settings, cache_dir: str | Path, *, without_forget: bool, quiet: bool = True) -> Run:
    """Train the original model, or the retrained one: without what is to be forgotten. Writes model and record."""
    require_use(settings)
    settings = settings.resolved()
    dataset, chosen = prepare(settings, cache_dir)
    folder = _open(settings, {"without_forget": without_forget})
    seconds: dict[str, float] = {}
    with _timing(seconds, "train"):
        model, shape = trained(settings, dataset, training_images(dataset, chosen, without_forget), quiet=quiet)
    record = {**_record(settings, dataset, chosen, seconds), "without_forget": without_forget}
    _save(folder, model, shape, chosen, record)
    return Run(folder, None, model, dataset, chosen, record)


def run(
    settings: Settings, cache_dir: str | Path, *, quiet: bool = True, tell: Callable[[str], None] = lambda line: None
) -> Run:
    """Unlearn, and write model, delta, mask, split and record. Without a model the original is trained first.

    tell: hears what was noticed about the model's file.
    """
    require_use(settings)
    settings = settings.resolved()
    check_method(settings)
    dataset, chosen = prepare(settings, cache_dir)
    folder = _open(settings, {})
    original, shape, seconds = _original(settings, dataset, chosen, folder, quiet, tell)
    done = unlearned(settings, dataset, chosen, original, shape, quiet=quiet)
    before, after = original.state_dict(), done.model.state_dict()
    record = _record(settings, dataset, chosen, seconds | done.seconds)
    record["original_hash"] = delta.content_hash(before)
    record["weights"] = {"total": sum(parameter.numel() for parameter in done.model.parameters())}
    if settings.preset.method:
        provenance = {"made_for": f"{shape.network} on {dataset.name}", "settings": record["settings"]}
        change = delta.difference(before, after, provenance)
        delta.save(folder / DELTA, change)
        record["weights"]["changed"] = sum(change.changed.values())
    if done.mask is not None:
        masks.save(folder / MASK, done.mask, done.header)
        record["weights"]["may_move"] = masks.count(done.mask)
    _save(folder, done.model, shape, chosen, record)
    return Run(folder, original, done.model, dataset, chosen, record)


def check_method(settings: Settings) -> None:
    """Raise an EraseError for a misspelt option, before any training."""
    if settings.preset.method:
        make(settings)
    elif settings.set:
        raise EraseError("retrain has no options for --set; see --train-epochs and --train-learning-rate")


@dataclass
class Unlearned:
    """A model after a method, and the mask inside which it moved, with its header; None where all weights could."""

    model: Classifier
    mask: Mapping[str, Tensor] | None
    header: dict[str, Any]
    seconds: dict[str, float]


def unlearned(
    settings: Settings, dataset: Dataset, chosen: Split, original: Classifier, shape: Shape, *, quiet: bool = True
) -> Unlearned:
    """Mask and method, from an original model that stays as it is; "retrain" begins anew. Settings are resolved."""
    forget, retain, _ = split.parts(dataset, chosen)
    seconds: dict[str, float] = {}
    if not settings.preset.method:
        with _timing(seconds, "unlearn"):
            model, _ = trained(settings, dataset, retain, quiet=quiet)
        return Unlearned(model, None, {}, seconds)
    model = networks.build(shape, seed=0).to(device_of(settings))
    model.load_state_dict(original.state_dict())
    with _timing(seconds, "mask"):
        mask, header = make_mask(settings, model, forget)
    how: dict[str, Any] = {"num_classes": len(dataset.classes), "seed": settings.seed, "mask": mask, "quiet": quiet}
    with _timing(seconds, "unlearn"):
        unlearn(model, forget, retain, make(settings), recipes(settings, dataset)[1], **how)
    return Unlearned(model, mask, header, seconds)


def _original(
    settings: Settings, dataset: Dataset, chosen: Split, folder: Path, quiet: bool, tell: Callable[[str], None]
) -> tuple[Classifier, Shape, dict[str, float]]:
    seconds: dict[str, float] = {}
    if settings.model is None:
        with _timing(seconds, "train"):
            original, shape = trained(settings, dataset, training_images(dataset, chosen, False), quiet=quiet)
        networks.save(folder / "original" / MODEL, original, shape, {"data": settings.data, "seed": settings.seed})
        return original, shape, seconds
    if Path(settings.model).suffix in salun_checkpoint.SUFFIXES:
        how: dict[str, Any] = {"allow_pickle": settings.allow_pickle, "tell": tell}
        original, shape = salun_checkpoint.load(settings.model, str(settings.network), dataset, **how)
    else:
        original, shape, _ = networks.load(settings.model)
    networks.require_fit(shape, len(dataset.classes), dataset.channels, dataset.size, settings.model)
    return original.to(device_of(settings)), shape, seconds


def training_images(dataset: Dataset, chosen: Split, without_forget: bool) -> Images:
    """What the original model is trained on, or the retrained one."""
    positions = chosen.retain if without_forget else torch.cat([chosen.forget, chosen.retain]).sort().values
    return dataset.train[positions.to(dataset.train.y.device)]


@contextmanager
def _timing(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


_FREE = {"output", "device", "allow_pickle"}  # do not change the result


def identity(settings: Settings) -> dict[str, Any]:
    """What decides the result: where it is written to and on which device does not."""
    decisive = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    return {**decisive, "set": list(settings.set)}  # as JSON has it


def recorded(found: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a record, also of version 0.1.0, under today's names."""
    found = dict(found)
    if "mixed_precision" in found:
        found["precision"] = MIXED_PRECISION[found.pop("mixed_precision")]
    return found


def _open(settings: Settings, more: Mapping[str, Any]) -> Path:
    """The run's folder; an EraseError if another run is in it."""
    assert settings.output is not None
    folder = Path(settings.output)
    if (folder / RECORD).is_file():
        found = files.read_json(folder / RECORD)
        there = found.get("settings")
        if not isinstance(there, dict):
            raise EraseError(f"{folder / RECORD} is damaged: it has no settings; choose another --output")
        same = recorded(there) == identity(settings)
        if not same or any(found.get(name) != value for name, value in more.items()):
            raise EraseError(f"{folder} holds a run with other settings; choose another --output")
    return folder


def _record(settings: Settings, dataset: Dataset, chosen: Split, seconds: Mapping[str, float]) -> dict[str, Any]:
    return {
        "settings": identity(settings),
        "split": {
            "request": chosen.request,
            "sha256": chosen.digest,
            "forget": len(chosen.forget),
            "retain": len(chosen.retain),
            "test": len(chosen.test),
        },
        "classes": list(dataset.classes),
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "compute": device.choose(settings.device, settings.precision).record(),
        "versions": {"erase": __version__, "torch": torch.__version__},
    }


def _save(folder: Path, model: Classifier, shape: Shape, chosen: Split, record: dict[str, Any]) -> None:
    header = {"data": record["settings"]["data"], "seed": record["settings"]["seed"], "split": record["split"]}
    networks.save(folder / MODEL, model, shape, header)
    chosen.save(folder / SPLIT)
    record["model_hash"] = delta.content_hash(model.state_dict())
    files.write_json(folder / RECORD, record)
