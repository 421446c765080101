"""A whole run: data, split, original model, mask, unlearning, files. `train` and `unlearn` take any model in memory."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase import delta, device, masks, tensor_files
from erase.classification import data, methods, networks, records, salun_checkpoint, split
from erase.classification.checkpoint import Checkpoint
from erase.classification.data import Dataset, Images
from erase.classification.descent import Recipe, descend, in_eval, write
from erase.classification.masking import make_mask
from erase.classification.methods import Descends, Method, Plan, Solves, Task
from erase.classification.networks import Classifier, Shape
from erase.classification.settings import Settings, require_use
from erase.classification.split import Split
from erase.errors import EraseError


@dataclass
class Run:
    """A finished run: its folder, its models and its data.

    original: the model before unlearning; None if a new model was trained.
    record: the content of run.json.
    """

    folder: Path
    original: Classifier | None
    model: Classifier
    dataset: Dataset
    split: Split
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class Unlearned:
    """A model after a method.

    mask: the weights that could change; None if all could. header: of the mask's file.
    """

    model: Classifier
    mask: Mapping[str, Tensor] | None
    header: dict[str, Any]
    seconds: dict[str, float]


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    seed: int,
    *,
    num_classes: int,
    checkpoint: Checkpoint | None = None,
    quiet: bool = True,
) -> None:
    """Train any classifier on labelled images, in place, batch normalisation statistics included.

    checkpoint: from which an interrupted training continues.
    """
    data.require_labels(images, num_classes, "the training images")
    require_classes(model, images, num_classes)
    plan = Plan(passes=lambda: [images])
    generator = torch.Generator().manual_seed(seed)
    descend(model, plan, replace(recipe, batch_norm="moving"), generator, checkpoint=checkpoint, quiet=quiet)


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
    """Unlearn `forget` in any classifier, in place.

    Weights outside the mask keep their bits; so do all buffers if the recipe has batch_norm "frozen". The same
    seed gives the same weights.
    model: returns logits, [n, num_classes], for float images in [0, 1].

    Raises:
        EraseError: there is nothing to forget or to retain, a label is out of range, the model has another number of
            classes, the mask is for another model, or the loss is not finite.
    """
    data.require_labels(forget, num_classes, "the images to forget")
    data.require_labels(retain, num_classes, "the images to retain")
    require_classes(model, forget, num_classes)
    with in_eval(model):
        how = (recipe.batch_size, recipe.padding, recipe.flip)
        task = Task(model, forget, retain, num_classes, torch.Generator().manual_seed(seed), *how)
        if isinstance(method, Descends):
            descend(model, method.plan(task), recipe, task.generator, mask, label="unlearn", quiet=quiet)
        else:
            assert isinstance(method, Solves), method
            if mask is not None:
                masks.check(mask, {}, task.parameters())
            write(model, method.solve(task), mask)


def require_classes(model: nn.Module, images: Images, num_classes: int) -> None:
    """Raise an EraseError unless the model returns one logit per class."""
    with in_eval(model), torch.no_grad():
        logits = model(images[slice(0, 1)].pixels)
    if logits.shape != (1, num_classes):
        raise EraseError(f"the network has {logits.shape[-1]} classes, but the data set has {num_classes}")


def make(settings: Settings) -> Method:
    """The method of the settings, with its options."""
    return methods.make(methods.find(settings.method), settings.method, settings.method_options())


def check_method(settings: Settings) -> None:
    """Raise an EraseError for a wrong option of the method, before any training."""
    if settings.preset.method:
        make(settings)
    elif settings.set:
        raise EraseError("retrain has no options for --set; see --train-epochs and --train-learning-rate")


def recipes(settings: Settings, dataset: Dataset) -> tuple[Recipe, Recipe]:
    """The recipe for training a new model, and the one for unlearning; of resolved settings."""
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


def prepare(settings: Settings, cache_dir: str | Path, *, quiet: bool = True) -> tuple[Dataset, Split]:
    """The data set on its device, and the split; of resolved settings."""
    split.require_request(settings.forget)
    dataset = data.load(settings.data, cache_dir, size=settings.size, quiet=quiet)
    if settings.num_train is not None:
        dataset = dataset.first(settings.num_train)
    make_split = split.make_reference if settings.split == "reference" else split.make
    chosen = make_split(dataset, settings.forget, settings.seed)
    here = device_of(settings)
    return replace(dataset, train=dataset.train.to(here), test=dataset.test.to(here)), chosen


def device_of(settings: Settings) -> torch.device:
    return device.choose(settings.device, settings.precision).device


def trained(
    settings: Settings, dataset: Dataset, images: Images, *, state: Path | None = None, quiet: bool = True
) -> tuple[Classifier, Shape]:
    """A new network, trained on the images from the settings' seed.

    state: file from which an interrupted training continues; trainings of less than a minute write none.
    """
    shape = _shape(settings, dataset)
    model = networks.build(shape, settings.seed).to(device_of(settings))
    how: dict[str, Any] = {"num_classes": len(dataset.classes), "quiet": quiet}
    if state is not None:
        how["checkpoint"] = Checkpoint(state, _training(settings, dataset, images))
    train(model, images, recipes(settings, dataset)[0], settings.seed, **how)
    return model, shape


def _shape(settings: Settings, dataset: Dataset) -> Shape:
    assert settings.network is not None
    sizes = (len(dataset.classes), dataset.channels, dataset.size)
    return Shape(settings.network, *sizes, dataset.mean, dataset.std)


def _training(settings: Settings, dataset: Dataset, images: Images) -> str:
    """What `trained` trains, as text that differs for every other training."""
    recipe, shape = recipes(settings, dataset)[0], _shape(settings, dataset)
    content = tensor_files.content_hash({"x": images.x.cpu(), "y": images.y.cpu()})
    return f"{recipe} {shape} seed {settings.seed} images {content}"


def training_images(dataset: Dataset, chosen: Split, without_forget: bool) -> Images:
    """The training images of the original model, or of the retrained one."""
    positions = chosen.retain if without_forget else torch.cat([chosen.forget, chosen.retain]).sort().values
    return dataset.train[positions.to(dataset.train.y.device)]


def run_training(settings: Settings, cache_dir: str | Path, *, without_forget: bool, quiet: bool = True) -> Run:
    """Train the original model, or the retrained one, and write model, split and record.

    without_forget: train on the retain set only.
    """
    require_use(settings)
    settings = settings.resolved()
    dataset, chosen = prepare(settings, cache_dir, quiet=quiet)
    folder = records.open_folder(settings, {"without_forget": without_forget})
    seconds: dict[str, float] = {}
    with _timing(seconds, "train"):
        images = training_images(dataset, chosen, without_forget)
        model, shape = trained(settings, dataset, images, state=folder / records.STATE, quiet=quiet)
    record = {**records.make_record(settings, dataset, chosen, seconds), "without_forget": without_forget}
    records.save(folder, model, shape, chosen, record)
    return Run(folder, None, model, dataset, chosen, record)


def run(
    settings: Settings, cache_dir: str | Path, *, quiet: bool = True, tell: Callable[[str], None] = lambda line: None
) -> Run:
    """Unlearn, and write model, delta, mask, split and record. Without --model the original is trained first.

    tell: called with notes on the original model's file.
    """
    require_use(settings)
    settings = settings.resolved()
    check_method(settings)
    dataset, chosen = prepare(settings, cache_dir, quiet=quiet)
    folder = records.open_folder(settings, {})
    original, shape, seconds = _original(settings, dataset, chosen, folder, quiet, tell)
    state = folder / records.STATE
    done = unlearned(settings, dataset, chosen, original, shape, state=state, quiet=quiet)
    before, after = original.state_dict(), done.model.state_dict()
    record = records.make_record(settings, dataset, chosen, seconds | done.seconds)
    record["original_hash"] = delta.content_hash(before)
    record["weights"] = {"total": sum(parameter.numel() for parameter in done.model.parameters())}
    if settings.preset.method:
        provenance = {"made_for": f"{shape.network} on {dataset.name}", "settings": record["settings"]}
        change = delta.difference(before, after, provenance)
        delta.save(folder / records.DELTA, change)
        weights = dict(done.model.named_parameters())  # buffers are in the delta too
        record["weights"]["changed"] = sum(num for name, num in change.changed.items() if name in weights)
    if done.mask is not None:
        masks.save(folder / records.MASK, done.mask, done.header)
        record["weights"]["may_move"] = masks.count(done.mask)
    records.save(folder, done.model, shape, chosen, record)
    return Run(folder, original, done.model, dataset, chosen, record)


def unlearned(
    settings: Settings,
    dataset: Dataset,
    chosen: Split,
    original: Classifier,
    shape: Shape,
    *,
    state: Path | None = None,
    quiet: bool = True,
) -> Unlearned:
    """The original model after mask and method, as a new model. The method "retrain" trains a new model instead.

    settings: resolved. state: of the training of a new model, see `trained`.
    """
    forget, retain, _ = split.parts(dataset, chosen)
    seconds: dict[str, float] = {}
    if not settings.preset.method:
        with _timing(seconds, "unlearn"):
            model, _ = trained(settings, dataset, retain, state=state, quiet=quiet)
        return Unlearned(model, None, {}, seconds)
    model = networks.build(shape, seed=0).to(device_of(settings))
    model.load_state_dict(original.state_dict())
    with _timing(seconds, "mask"):
        mask, header = make_mask(settings, model, forget, padding=dataset.padding, flip=dataset.flip)
    how: dict[str, Any] = {"num_classes": len(dataset.classes), "seed": settings.seed, "mask": mask, "quiet": quiet}
    with _timing(seconds, "unlearn"):
        unlearn(model, forget, retain, make(settings), recipes(settings, dataset)[1], **how)
    return Unlearned(model, mask, header, seconds)


def _original(
    settings: Settings, dataset: Dataset, chosen: Split, folder: Path, quiet: bool, tell: Callable[[str], None]
) -> tuple[Classifier, Shape, dict[str, float]]:
    seconds: dict[str, float] = {}
    if settings.model is None:
        images, path = training_images(dataset, chosen, False), folder / "original" / records.MODEL
        training = _training(settings, dataset, images)
        if path.is_file():  # of this command, which was interrupted after it
            original, shape, header = networks.load(path)
            if header.get("training") == training:
                return original.to(device_of(settings)), shape, {"train": header["seconds"]}
        with _timing(seconds, "train"):
            original, shape = trained(settings, dataset, images, state=path.with_name(records.STATE), quiet=quiet)
        header = {"data": settings.data, "seed": settings.seed, "training": training, "seconds": seconds["train"]}
        networks.save(path, original, shape, header)
        return original, shape, seconds
    if Path(settings.model).suffix in salun_checkpoint.SUFFIXES:
        how: dict[str, Any] = {"allow_pickle": settings.allow_pickle, "tell": tell}
        original, shape = salun_checkpoint.load(settings.model, str(settings.network), dataset, **how)
    else:
        original, shape, _ = networks.load(settings.model)
    networks.require_fit(shape, len(dataset.classes), dataset.channels, dataset.size, settings.model)
    return original.to(device_of(settings)), shape, seconds


@contextmanager
def _timing(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start
