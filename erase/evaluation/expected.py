"""Which scores a report will have, known before there is an image: those that it can be required to reach."""

from collections.abc import Mapping, Sequence
from typing import Any

from erase.errors import EraseError
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.plan import Expected
from erase.evaluation.tasks import registry as tasks
from erase.evaluation.tasks.protocol import Sample, is_kept

RATE = (0.0, 1.0)


def scores(
    task: Mapping[str, Any],
    samples: Sequence[Sample],
    judges: Sequence[str],
    *,
    base: bool,
    gold: bool,
    real: bool,
    dimension: int | None = None,
) -> dict[str, Expected]:
    """The scores by name, in the report's order, if enough of the images turn out valid.

    base, gold, real: whether there will be such an arm. dimension: of the features, if it is known.

    Raises:
        EraseError: no judge, or too few images for KID.
    """
    if not judges:
        raise EraseError(f"the task {task['id']} needs judges: --judge {', '.join(JUDGES.names())}")
    # a rate exists even if no image can be judged, since these count as failures; a mean does not
    unseen = [{"invalid": "not judged"}] * len(samples)
    measured = tasks.stated(task["id"], "the task")
    plan = measured.plan(samples, dict.fromkeys(judges, unseen), task["options"])
    found: dict[str, Expected] = {}
    for column in (*plan.columns, *measured.recorded(samples, [{}] * len(samples), task["options"])):
        is_rate = any(isinstance(value, bool) for value in column.values)
        found[column.name] = Expected(RATE if is_rate else column.range, is_rate)
    kept, roles = sum(map(is_kept, samples)), {"base": base, "gold": gold, "real": real}
    if "thumbnails" in judges and kept:
        pixels = [name for name, there in (("pixels.drift", base), ("pixels.to_gold", gold)) if there]
        found |= dict.fromkeys(pixels, Expected(RATE, is_rate=False, is_compared=False))
    if "features" in judges and any(roles.values()):
        distances = of_features(kept, roles, dimension)
        if not distances:
            from erase.evaluation.kid import MIN_KID

            raise EraseError(f"KID needs at least {MIN_KID} images that show no forgotten concept, not {kept}")
        found |= dict.fromkeys(distances, Expected(None, is_rate=False, is_compared=False))
    return found


def of_features(kept: int, roles: Mapping[str, bool], dimension: int | None) -> list[str]:
    """The distances between sets of images: KID, and FID where there are images enough; none for too few.

    kept: images that are compared. roles: whether there is such an arm. dimension: of the features, if it is known.
    """
    from erase.evaluation import kid, quality

    least = {"kid": kid.MIN_KID, "fid": quality.min_fid(dimension or quality.INCEPTION)}
    kinds = [kind for kind, num in least.items() if kept >= num]
    return [f"quality.{kind}_{role}" for role, there in roles.items() if there for kind in kinds]
