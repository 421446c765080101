"""The folder of a run: its files, and the record in run.json that identifies it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from erase import delta, device, files
from erase.classification import networks
from erase.classification.data import Dataset
from erase.classification.networks import Classifier, Shape
from erase.classification.settings import Settings
from erase.classification.split import Split
from erase.errors import EraseError
from erase.options.declare import MIXED_PRECISION
from erase.version import __version__

MODEL, DELTA, MASK = "model.safetensors", "delta.safetensors", "mask.safetensors"
SPLIT, RECORD, STATE = "split.json", "run.json", "training.safetensors"
_FREE = {"output", "device", "allow_pickle", "tuned_for"}  # settings that do not change the result of the others
_LATER = {"num_train": None}  # settings that records of 0.1.0 lack, as they were then


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that decide the result, as JSON stores them."""
    decisive = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    return {**decisive, "set": list(settings.set)}


def recorded(found: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a record under today's names; also of a record that version 0.1.0 wrote."""
    found = {**_LATER, **found}
    if "mixed_precision" in found:
        found["precision"] = MIXED_PRECISION[found.pop("mixed_precision")]
    return found


def training_of(settings: Settings) -> dict[str, Any]:
    """The settings that decide an original model, as JSON stores them; of resolved settings."""
    names = ("data", "size", "num_train", "network", "batch_size", "train_epochs", "train_learning_rate", "momentum")
    found = {name: getattr(settings, name) for name in (*names, "weight_decay", "precision", "seed", "split")}
    return found | ({"forget": settings.forget} if Path(settings.forget).is_file() else {})


def open_folder(settings: Settings, more: Mapping[str, Any]) -> Path:
    """The run's folder, which may hold an earlier run with the same settings.

    more: other entries of the record that must be the same.

    Raises:
        EraseError: the folder holds another run, or its record is damaged.
    """
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


def make_record(settings: Settings, dataset: Dataset, chosen: Split, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The content of run.json, except for the hashes of models."""
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


def save(folder: Path, model: Classifier, shape: Shape, chosen: Split, record: dict[str, Any]) -> None:
    """Write model, split and record; the record gets the model's hash and is written last."""
    header = {"data": record["settings"]["data"], "seed": record["settings"]["seed"], "split": record["split"]}
    networks.save(folder / MODEL, model, shape, header)
    chosen.save(folder / SPLIT)
    record["model_hash"] = delta.content_hash(model.state_dict())
    files.write_json(folder / RECORD, record)
