"""Figures that need the images of two models: drift on the same seeds, KID and FID."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from erase import statistics
from erase.delta import content_hash
from erase.errors import EraseError
from erase.evaluation import arm, score
from erase.evaluation.figures import score_row
from erase.evaluation.judges import thumbnails
from erase.evaluation.plan import Column
from erase.evaluation.tasks.protocol import Sample, is_kept

FEW_PROMPTS = 20  # below it, images of one prompt count as independent in distances to real images


def drift(
    base: Path | None, erased: Path, gold: Path | None, samples: Sequence[Sample], judges: Sequence[str]
) -> list[dict[str, Any]]:
    """How far the erased model's retained images are from the base's, and from those of the model without it."""
    if "thumbnails" not in judges:
        return []
    rows, here = [], score.load(erased, "thumbnails")
    for other, name, title in ((base, "drift", "Drift from the base"), (gold, "to_gold", "Distance to retrained")):
        if other is None or other.is_file():
            continue
        there = score.load(other, "thumbnails")
        values = [
            thumbnails.distance(a, b) if is_kept(s) else None for s, a, b in zip(samples, here, there, strict=True)
        ]
        about = "mean absolute difference of retained images on the same seeds, 0 to 1, at 16 x 16"
        column = Column(f"pixels.{name}", title, about, False, values, range=(0.0, 1.0))
        if any(value is not None for value in values):
            rows.append(score_row(column, None, samples))
    return rows


def distribution(
    base: Path | None, erased: Path, gold: Path | None, real: Path | None, samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    """KID, and FID where there are images enough, of the erased model to the base, and of both to real images and
    to those of the model that was trained without the concept.

    Only retained images are compared: those of the concept should differ.
    """
    from erase.evaluation import kid, quality

    how = score.identity(erased, "features")
    prompts = [sample.cluster for sample in samples if is_kept(sample)]
    # class names: pairs of images of one prompt, left out on one side only, would be a distance of their own
    of_real = prompts if len(set(prompts)) >= FEW_PROMPTS else [str(i) for i in range(len(prompts))]
    rows: list[dict[str, Any]] = []
    vectors_of = {"erased": _vectors(erased, samples, how)}
    vectors_of |= {"base": _vectors(base, samples, how)} if base else {}
    targets = [("base", vectors_of["base"])] if base else []
    targets += [("gold", _vectors(gold, samples, how))] if gold else []
    targets += [("real", _vectors(real, None, how))] if real else []
    called = {"base": "the base's", "gold": "those of the model trained without the concept", "real": "real ones"}
    for target, vector in targets:
        n = min(np.isfinite(f).all(1).sum() for f in (vector, *vectors_of.values()))
        if n < kid.MIN_KID:
            continue  # such as a model whose images are all black: the verdict says so
        for kind in ("kid", "fid") if n >= quality.min_fid(vector.shape[1]) else ("kid",):
            of = {
                role: None
                if role == target
                else _figure(kind, f, vector, prompts if target != "real" else of_real, how, are_pairs=target != "real")
                for role, f in vectors_of.items()
            }
            about = f"{kind.upper()} of the retained images to {called[target]}; 0 is the same"
            row = {"name": f"quality.{kind}_{target}", "title": f"{kind.upper()} to {target}", "about": about}
            row |= {"higher_is_better": False, "base": of.get("base"), "erased": of["erased"], "comparison": None}
            row["target"] = None if target == "base" else content_hash({"features": torch.tensor(vector)})
            rows.append(row)
    return rows


def _vectors(folder: Path, samples: Sequence[Sample] | None, how: Mapping[str, Any]) -> np.ndarray:
    """[n, d], of the retained images among the samples, or of all images; a row of NaN for a broken image.

    folder: an arm, or a file of features. how: identity of the features.
    """
    from erase.evaluation import quality
    from erase.evaluation.judges import features

    if folder.is_file():
        return quality.load_features(folder, how)
    different = arm.differences(how, score.identity(folder, "features"))
    if different:
        raise EraseError(f"{folder} has features of another kind ({'; '.join(different)})")
    lines = score.load(folder, "features")
    if samples is not None:
        lines = [line for sample, line in zip(samples, lines, strict=True) if is_kept(sample)]
    found = [None if line["invalid"] else features.decode(line) for line in lines]
    widths = {len(one) for one in found if one is not None}
    if len(widths) > 1:
        raise EraseError(f"{folder} has features of several lengths; delete scores/features.jsonl and score again")
    width = widths.pop() if widths else 1
    return np.stack([np.full(width, np.nan, np.float32) if one is None else one for one in found])


def _figure(
    kind: Literal["fid", "kid"],
    a: np.ndarray,
    b: np.ndarray,
    prompts: Sequence[str],
    how: Mapping[str, Any],
    *,
    are_pairs: bool,
) -> dict[str, Any]:
    """The distance of two sets of features, of valid images.

    prompts: of each row of a. are_pairs: the rows of a and b are of the same prompts and seeds.
    """
    from erase.evaluation import kid, quality

    whole: list[np.ndarray] = [np.asarray(np.isfinite(one).all(1)) for one in (a, b)]
    if are_pairs and len(a) != len(b):
        raise EraseError(f"features of {len(a)} and of {len(b)} retained images are not of the same prompts")
    if are_pairs:
        whole = [whole[0] & whole[1]] * 2
    a, b = a[whole[0]], b[whole[1]]
    if kind == "fid":
        found = kid.Kid(quality.fid(a, b), None, None, min(len(a), len(b)), "none")
    else:
        of = [prompt for prompt, is_whole in zip(prompts, whole[0], strict=True) if is_whole]
        found = (kid.kid_of_pairs if are_pairs else kid.kid_of_sets)(a, b, of)
    named = quality.metric_id("kid-pairs" if kind == "kid" and are_pairs else kind, how, found.n)
    return statistics.to_json(
        statistics.Score(named, found.value, found.n, found.low, found.high, False, interval=found.interval)
    )


def dimension(folder: Path) -> int | None:
    """Of the features that were stored for a folder; None if all its images are invalid."""
    from erase.evaluation.judges import features

    line = next((line for line in score.load(folder, "features") if not line["invalid"]), None)
    return len(features.decode(line)) if line else None
