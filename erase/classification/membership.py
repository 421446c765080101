"""How well a classifier has forgotten: accuracies, and membership inference attacks.

UA, RA and TA are SalUn's (Fan et al., ICLR 2024): error on the forget set, accuracy on the retain set, accuracy on the
test set. The score of an attack is the share of the forget set that it classifies as not trained on. None of these
should be as high or as low as possible: each should equal that of a model retrained without the forget set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import entr
from torch import nn

from erase import statistics
from erase.classification.data import Images
from erase.classification.descent import Diverged, in_eval
from erase.classification.svc import Svc
from erase.statistics import Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SMALLEST = 1e-30  # smaller probabilities are replaced by this one in logarithms
GAP_OVER = ("UA", "RA", "TA", "MIA")  # scores that SalUn's average gap is computed from


@dataclass(frozen=True, eq=False)
class Outputs:
    """A model's answers for images. p: probabilities, float64, [n, classes]. y: true labels, [n]."""

    p: "Array"
    y: "NDArray[np.int64]"

    def __getitem__(self, positions: "NDArray[np.int64]") -> "Outputs":
        return Outputs(self.p[positions], self.y[positions])

    def __len__(self) -> int:
        return len(self.y)


def outputs(model: nn.Module, images: Images, *, batch_size: int = 512) -> Outputs:
    """The model's answers in eval mode, without augmentation.

    Raises:
        Diverged: a logit is not finite.
    """
    with in_eval(model), torch.no_grad():
        logits = torch.cat([model(batch.pixels) for batch in images.batches(batch_size)])
    if not torch.isfinite(logits).all():
        raise Diverged("the model returns logits that are not finite; did its training diverge?")
    return Outputs(logits.double().softmax(1).cpu().numpy(), images.y.cpu().numpy())


# --- features that attacks use, one number per image ------------------------------------------------------------------


def confidence(out: Outputs) -> "Array":
    """p_y."""
    return out.p[np.arange(len(out)), out.y]


def correctness(out: Outputs) -> "Array":
    """1 where the largest probability is the true class's, else 0."""
    return (out.p.argmax(1) == out.y).astype(np.float64)


def entropy(out: Outputs) -> "Array":
    """-sum_i p_i log p_i."""
    return entr(out.p).sum(1)


def modified_entropy(out: Outputs) -> "Array":
    """-(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i) (Song & Mittal, 2021): small only if sure and right."""
    p_y = confidence(out)
    others = out.p * np.log(np.maximum(1 - out.p, SMALLEST))
    others[np.arange(len(out)), out.y] = 0
    return -(1 - p_y) * np.log(np.maximum(p_y, SMALLEST)) - others.sum(1)


def logit_confidence(out: Outputs) -> "Array":
    """log p_y - log sum_{i != y} p_i: close to normally distributed over models (Carlini et al., 2022)."""
    p_y = confidence(out)
    others = out.p.sum(1) - p_y
    return np.log(np.maximum(p_y, SMALLEST)) - np.log(np.maximum(others, SMALLEST))


# --- attacks ----------------------------------------------------------------------------------------------------------


def svc_attack(members: "Array", others: "Array", target: "Array") -> "NDArray[np.bool_]":
    """Which of `target` SalUn's attack, SVC(C=3, gamma="auto") on one number, classifies as not trained on."""
    x = np.concatenate([members, others])
    return Svc(x, np.arange(len(x)) < len(members)).decide(target) < 0


def threshold_attack(members: "Array", others: "Array", target: "Array") -> "NDArray[np.bool_]":
    """Which of `target` are at or below the threshold that best separates members (above it) from others.

    The threshold has the highest balanced accuracy, and is the lowest of those that have it (Song & Mittal, 2021, but
    one threshold for all classes).
    """
    values = np.unique(np.concatenate([members, others]))
    kept = 1 - np.searchsorted(np.sort(members), values, side="right") / len(members)
    found = np.searchsorted(np.sort(others), values, side="right") / len(others)
    return target <= values[np.argmax(kept + found)]


def lira(target: "Array", seen: "Array", unseen: "Array") -> "NDArray[np.bool_]":
    """Which images the likelihood-ratio attack classifies as not trained on (Carlini et al., 2022).

    target: `logit_confidence` of the attacked model, [n].
    seen, unseen: the same of shadow models trained with and without these images, [shadows, n]. Each image has a normal
        distribution per kind, whose variance is shared by all images.
    """

    def log_likelihood(shadows: "Array") -> "Array":
        variance = max(float(shadows.var(axis=0, ddof=1).mean()), 1e-12) if len(shadows) > 1 else 1.0
        return -((target - shadows.mean(0)) ** 2) / (2 * variance) - np.log(variance) / 2

    return log_likelihood(unseen) >= log_likelihood(seen)


FEATURES: dict[str, Callable[[Outputs], "Array"]] = {  # all are larger for members
    "correctness": correctness,
    "entropy": lambda out: -entropy(out),
    "modified entropy": lambda out: -modified_entropy(out),
}


def measure(
    model: nn.Module,
    forget: Images,
    retain: Images,
    test: Images,
    *,
    seed: int = 0,
    shadows: "tuple[Array, Array] | None" = None,
) -> dict[str, Score]:
    """UA, RA, TA, MIA (SalUn's attack) and the other attacks, as rates in [0, 1] with intervals over images.

    Attacks are fitted on equally many images of the retain and the test set, sampled by `seed`.
    shadows: the arguments `seen` and `unseen` of `lira` for the forget set; None leaves LiRA out.
    """
    at_forget, at_retain, at_test = (outputs(model, images) for images in (forget, retain, test))
    rng = np.random.default_rng(seed)
    num = min(len(at_retain), len(at_test))
    members, others = (out[rng.choice(len(out), num, replace=False)] for out in (at_retain, at_test))
    guesses = {"MIA": svc_attack(confidence(members), confidence(others), confidence(at_forget))}
    for name, feature in FEATURES.items():
        guesses[f"MIA {name}"] = threshold_attack(feature(members), feature(others), feature(at_forget))
    if shadows is not None:
        guesses["LiRA"] = lira(logit_confidence(at_forget), *shadows)
    scores = [
        statistics.rate("UA", list(correctness(at_forget) == 0), higher_is_better=True),
        statistics.rate("RA", list(correctness(at_retain) == 1), higher_is_better=True),
        statistics.rate("TA", list(correctness(at_test) == 1), higher_is_better=True),
        *(statistics.rate(name, list(unseen), higher_is_better=True) for name, unseen in guesses.items()),
    ]
    return {score.name: score for score in scores}


def average_gap(values: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Mean distance to the retrained model over UA, RA, TA and MIA."""
    return sum(abs(values[name] - retrained[name]) for name in GAP_OVER) / len(GAP_OVER)
