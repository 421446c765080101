"""Cells of a comparison: one method on one seed, run once and kept in a file."""

import re
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from erase import files
from erase.classification import membership, networks, records, run, split
from erase.classification.data import Dataset
from erase.classification.descent import Diverged
from erase.classification.membership import GAP_OVER
from erase.classification.networks import Classifier, Shape
from erase.classification.settings import Settings
from erase.classification.split import Split
from erase.errors import EraseError

RETRAIN, AGAIN, ORIGINAL = "retrain", "retrain again", "original"
ANOTHER_SEED = 500_000  # added to a seed for a second training on the same split


@dataclass(frozen=True)
class Row:
    """One line of the table: its label, and its settings without the seed."""

    label: str
    settings: Settings

    @property
    def stem(self) -> str:
        """The first part of the names of the line's cell files; the seed follows."""
        return re.sub("[^a-z0-9.]+", "-", self.label)


@dataclass(frozen=True)
class Bench:
    """What all cells of one seed share, computed when a cell first needs it.

    settings: resolved. num_shadows: pairs of shadow models for LiRA.
    originals: folder of the original models, which comparisons of other requests may share; None: in `folder`.
    """

    settings: Settings
    folder: Path
    cache_dir: str | Path
    num_shadows: int = 0
    originals: Path | None = None
    quiet: bool = field(default=True, kw_only=True)

    @cached_property
    def prepared(self) -> tuple[Dataset, Split]:
        return run.prepare(self.settings, self.cache_dir, quiet=self.quiet)

    @cached_property
    def original(self) -> tuple[Classifier, Shape]:
        """The original model, read from its file or trained."""
        path = (self.originals or self.folder / "originals") / f"seed-{self.settings.seed}.safetensors"
        training = records.training_of(self.settings)
        if path.is_file():
            model, shape, header = networks.load(path)
            if header.get("training", training) != training:
                raise EraseError(f"{path} was trained with other settings; choose another --output")
            return model.to(run.device_of(self.settings)), shape
        dataset, chosen = self.prepared
        images = run.training_images(dataset, chosen, False)
        model, shape = run.trained(self.settings, dataset, images, state=self.state("original"), quiet=self.quiet)
        networks.save(path, model, shape, {"training": training})
        return model, shape

    def path_of(self, row: Row) -> Path:
        """The file of a line's cell."""
        return self.folder / "cells" / f"{row.stem}-{self.settings.seed}.json"

    def state(self, name: str) -> Path:
        """The file from which a training of this seed continues if it is interrupted."""
        return self.folder / "states" / f"{name}-{self.settings.seed}.safetensors"

    def shadows(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The arguments `seen` and `unseen` of `membership.lira`; None without shadow models.

        Raises:
            EraseError: their file is damaged.
        """
        if not self.num_shadows:
            return None
        path = self.folder / "shadows" / f"seed-{self.settings.seed}.json"
        if not path.is_file():
            files.write_json(path, {"num": self.num_shadows, **self._confidences()})
        stored = files.read_json(path)
        try:
            seen, unseen = (np.array(stored[kind], dtype=float) for kind in ("seen", "unseen"))
        except (KeyError, TypeError, ValueError) as error:
            raise EraseError(f"{path} is damaged: it holds no confidences of shadow models; delete it") from error
        if seen.ndim != 2 or seen.shape != unseen.shape or not np.isfinite([seen, unseen]).all():
            raise EraseError(f"{path} is damaged: it holds no confidences of shadow models; delete it")
        return seen, unseen

    def _confidences(self) -> dict[str, list[list[float]]]:
        """Train the shadow models, with and without the forget set, and measure them on the forget set."""
        dataset, chosen = self.prepared
        kinds: dict[str, list[list[float]]] = {"seen": [], "unseen": []}
        for i in range(self.num_shadows):
            other = replace(self.settings, seed=self.settings.seed + 2 * ANOTHER_SEED + i)
            for kind, without in (("seen", False), ("unseen", True)):
                images = run.training_images(dataset, chosen, without)
                model, _ = run.trained(other, dataset, images, state=self.state(f"{kind}-{i}"), quiet=self.quiet)
                out = membership.outputs(model, split.parts(dataset, chosen)[0])
                kinds[kind].append(membership.logit_confidence(out).tolist())
        return kinds


def cell(row: Row, bench: Bench) -> dict[str, Any]:
    """Scores and seconds of a line on a seed, read from the cell's file or computed.

    Raises:
        EraseError: the file is damaged, or was made with other settings.
    """
    seed = bench.settings.seed
    settings = replace(row.settings, seed=seed).resolved()
    identity = records.identity(settings) | {"shadows": bench.num_shadows}
    path = bench.path_of(row)
    if path.is_file():
        found = _read(path)
        there = records.recorded(found["settings"])
        if there != identity:
            changed = next((key for key in identity if there.get(key) != identity[key]), "version of this program")
            raise EraseError(f"{path} was made with another {changed}; choose another --output")
        return found
    dataset, chosen = bench.prepared
    made: dict[str, Any] = {"label": row.label, "seed": seed, "settings": identity, "split": chosen.digest}
    try:
        model, seconds = _model(row.label, settings, bench)
        parts = split.parts(dataset, chosen)
        scores = membership.measure(model, *parts, seed=seed, shadows=bench.shadows())
    except Diverged as error:
        made["diverged"] = str(error)
    else:
        made |= {"scores": {name: asdict(score) for name, score in scores.items()}, "seconds": seconds}
    files.write_json(path, made)
    return made


def _read(path: Path) -> dict[str, Any]:
    """Raises EraseError: the file holds no cell."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)

    found = files.read_json(path)
    scores = found.get("scores")
    has_scores = (
        isinstance(scores, dict)
        and set(GAP_OVER) <= scores.keys()
        and all(isinstance(score, dict) and is_number(score.get("value")) for score in scores.values())
        and is_number(found.get("seconds"))
    )
    is_known = isinstance(found.get("label"), str) and isinstance(found.get("settings"), dict)
    if not is_known or not (has_scores or isinstance(found.get("diverged"), str)):
        raise EraseError(f"{path} is damaged: it holds no scores of a method on a seed; delete it, and it is run again")
    return found


def _model(label: str, settings: Settings, bench: Bench) -> tuple[Classifier, float]:
    """The model of a cell, and the seconds of its unlearning, without the training of the original."""
    dataset, chosen = bench.prepared
    original, shape = bench.original
    if label == ORIGINAL:
        return original, 0.0
    if label == AGAIN:
        settings = replace(settings, seed=settings.seed + ANOTHER_SEED)
    state = bench.state("again" if label == AGAIN else "retrain")
    done = run.unlearned(settings, dataset, chosen, original, shape, state=state, quiet=bench.quiet)
    return done.model, sum(done.seconds.values())
