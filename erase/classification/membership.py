"""How well a classifier has forgotten: accuracies, and attacks that guess what it was trained on.

UA, RA and TA are SalUn's (Fan et al., ICLR 2024): error on what is to be forgotten, accuracy on what is kept, accuracy
on the test set. An attack's figure is the share of forgotten pictures that it takes for pictures never seen. None of
these is good when high or low; each is good when it is that of a model retrained without them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import nn

from erase import statistics
from erase.classification.data import Images
from erase.classification.descent import in_eval
from erase.errors import EraseError
from erase.statistics import Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MAX_ROUNDS, TOLERANCE, SMALLEST_STEP = 60, 1e-8, 1e-13  # of the interior-point method
SMALLEST = 1e-30  # below which a probability counts as this
GAP_OVER = ("UA", "RA", "TA", "MIA")  # what SalUn's average gap is over


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model says of pictures: probabilities, float64, [n, classes], and true labels, [n]."""

    p: "Array"
    y: "NDArray[np.int64]"

    def __getitem__(self, positions: "NDArray[np.int64]") -> "Outputs":
        return Outputs(self.p[positions], self.y[positions])

    def __len__(self) -> int:
        return len(self.y)


def outputs(model: nn.Module, images: Images, *, batch_size: int = 512) -> Outputs:
    """In eval mode, without augmentation."""
    with in_eval(model), torch.no_grad():
        logits = torch.cat([model(batch.pixels) for batch in images.batches(batch_size)])
    if not torch.isfinite(logits).all():
        raise EraseError("the model answers with numbers that are not finite; did its training diverge?")
    return Outputs(logits.double().softmax(1).cpu().numpy(), images.y.cpu().numpy())


# --- what an attack looks at, one number a picture --------------------------------------------------------------------


def confidence(out: Outputs) -> "Array":
    """p_y."""
    return out.p[np.arange(len(out)), out.y]


def correctness(out: Outputs) -> "Array":
    """1 where the largest probability is the true class's, else 0."""
    return (out.p.argmax(1) == out.y).astype(np.float64)


def entropy(out: Outputs) -> "Array":
    """-sum_i p_i log p_i."""
    return -(out.p * np.log(np.maximum(out.p, SMALLEST))).sum(1)


def modified_entropy(out: Outputs) -> "Array":
    """-(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i) (Song & Mittal, 2021): small only when sure and right."""
    p_y = confidence(out)
    others = out.p * np.log(np.maximum(1 - out.p, SMALLEST))
    others[np.arange(len(out)), out.y] = 0
    return -(1 - p_y) * np.log(np.maximum(p_y, SMALLEST)) - others.sum(1)


def logit_confidence(out: Outputs) -> "Array":
    """log p_y - log sum_{i != y} p_i, which is near normal over models (Carlini et al., 2022)."""
    p_y = confidence(out)
    others = out.p.sum(1) - p_y
    return np.log(np.maximum(p_y, SMALLEST)) - np.log(np.maximum(others, SMALLEST))


# --- attacks ----------------------------------------------------------------------------------------------------------


class Svc:
    """The support vector classifier of libsvm for one number a sample, kernel exp(-(x - y)^2), solved in O(n).

    In one dimension the kernel is a short sum of products, exp(-x^2 - y^2) sum_k (2 x y)^k / k!, so n samples have a
    few dozen features instead of an n x n matrix. The dual problem, min a'Qa / 2 - sum a with 0 <= a <= C and y'a = 0,
    is then solved by an interior-point method with small linear systems (Ferris & Munson, 2002), beyond libsvm's own
    tolerance of 1e-3.

    x: [n]. members: bool, [n], both kinds present. C: price of a sample on the wrong side.
    """

    def __init__(self, x: "Array", members: "NDArray[np.bool_]", C: float = 3.0):
        if members.all() or not members.any():
            raise EraseError("the attack needs pictures of both kinds, trained on and not")
        self.centre = float((x.min() + x.max()) / 2)
        self.radius = float(x.max() - x.min()) / 2
        y = np.where(members, 1.0, -1.0)
        features = self._features(x)
        a = _box_qp(features * y[:, None], y, C)
        self.weights = features.T @ (a * y)
        self.bias = self._bias(features @ self.weights, a, y, C)

    def _features(self, x: "Array") -> "Array":
        """exp(-x^2) sqrt(2^k / k!) x^k, [n, k], as far as the terms matter up to twice the training samples' range."""
        x, largest = x - self.centre, 4 * max(self.radius, 1e-3) ** 2
        columns, term, k = [np.exp(-(x**2))], 1.0, 0
        while term > 1e-16 or k < largest:
            k += 1
            columns.append(columns[-1] * x * np.sqrt(2 / k))
            term *= largest / k
        return np.stack(columns, axis=1)

    @staticmethod
    def _bias(scores: "Array", a: "Array", y: "Array", C: float) -> float:
        """From the samples strictly between the bounds, which lie on the margin; else the middle of what is open."""
        slack, residual = 1e-4 * C, y - scores
        free = (a > slack) & (a < C - slack)
        if free.any():
            return float(residual[free].mean())
        lower = residual[(y > 0) == (a <= slack)]
        upper = residual[(y > 0) == (a > slack)]
        return float((lower.max() + upper.min()) / 2) if len(upper) and len(lower) else 0.0

    def decide(self, x: "Array") -> "Array":
        """Positive for what looks like a member, [n]; what is further away counts as at twice the training range."""
        reach = 2 * self.radius
        return self._features(np.clip(x, self.centre - reach, self.centre + reach)) @ self.weights + self.bias


def _box_qp(z: "Array", y: "Array", C: float) -> "Array":
    """min |Z'a|^2 / 2 - sum a over 0 <= a <= C, y'a = 0, by Mehrotra's predictor and corrector; a is [n]."""
    n = len(z)
    a, nu = np.full(n, C / 2), 0.0
    low, high = np.ones(n), np.ones(n)  # multipliers of a >= 0 and of a <= C; nu is that of y'a = 0
    for _ in range(MAX_ROUNDS):
        room = C - a
        gradient = z @ (z.T @ a) - 1 + nu * y - low + high
        gap = (a @ low + room @ high) / (2 * n)
        if gap < TOLERANCE and np.abs(gradient).max() < TOLERANCE and abs(y @ a) < TOLERANCE * n:
            break
        step = _newton(z, y, a, room, low, high, gradient)
        d_a, _, d_low, d_high = step(0.0, 0.0)
        length = _longest((a, d_a), (room, -d_a), (low, d_low), (high, d_high))
        after = (a + length * d_a) @ (low + length * d_low) + (room - length * d_a) @ (high + length * d_high)
        aim = gap * (after / (2 * n * gap)) ** 3
        d_a, d_nu, d_low, d_high = step(aim - d_a * d_low, aim + d_a * d_high)
        length = min(1.0, 0.995 * _longest((a, d_a), (room, -d_a), (low, d_low), (high, d_high)))
        nu += length * d_nu
        a = np.clip(a + length * d_a, C * SMALLEST_STEP, C * (1 - SMALLEST_STEP))  # rounding must not reach a bound
        low, high = (np.maximum(v, SMALLEST_STEP) for v in (low + length * d_low, high + length * d_high))
    return a


def _newton(
    z: "Array", y: "Array", a: "Array", room: "Array", low: "Array", high: "Array", gradient: "Array"
) -> "Callable[[Array | float, Array | float], tuple[Array, float, Array, Array]]":
    """The step of a, nu, low and high towards given products a low and room high; (ZZ' + W^-1)^-1 is Woodbury's."""
    weight = 1 / (low / a + high / room)
    weighted = weight[:, None] * z
    factor = cho_factor(np.eye(z.shape[1]) + z.T @ weighted)

    def solve(right: "Array") -> "Array":
        return weight * right - weighted @ cho_solve(factor, weighted.T @ right)

    by_y = solve(y)

    def step(low_aim: "Array | float", high_aim: "Array | float") -> "tuple[Array, float, Array, Array]":
        by_right = solve(-gradient + low_aim / a - low - high_aim / room + high)
        d_nu = float((y @ by_right + y @ a) / (y @ by_y))
        d_a = by_right - d_nu * by_y
        return d_a, d_nu, (low_aim - low * d_a) / a - low, (high_aim + high * d_a) / room - high

    return step


def _longest(*pairs: "tuple[Array, Array]") -> float:
    """The largest share, 1 at most, of a step that keeps every value above zero."""
    return min([1.0, *(float((v[d < 0] / -d[d < 0]).min()) for v, d in pairs if (d < 0).any())])


def svc_attack(members: "Array", others: "Array", target: "Array") -> "NDArray[np.bool_]":
    """Which of `target` the reference's attack takes for pictures never seen: SVC(C=3, gamma="auto") on one number."""
    x = np.concatenate([members, others])
    return Svc(x, np.arange(len(x)) < len(members)).decide(target) < 0


def threshold_attack(members: "Array", others: "Array", target: "Array") -> "NDArray[np.bool_]":
    """Which of `target` lie at or below the threshold that tells members (above it) best from others.

    Best in balanced accuracy, the lowest threshold among equals (Song & Mittal, 2021, without their classes).
    """
    values = np.unique(np.concatenate([members, others]))
    kept = 1 - np.searchsorted(np.sort(members), values, side="right") / len(members)
    found = np.searchsorted(np.sort(others), values, side="right") / len(others)
    return target <= values[np.argmax(kept + found)]


def lira(target: "Array", seen: "Array", unseen: "Array") -> "NDArray[np.bool_]":
    """Which pictures the likelihood-ratio attack takes for never seen (Carlini et al., 2022, with a shared variance).

    target: `logit_confidence` of the attacked model, [n]. seen, unseen: the same of shadow models that were trained
        with and without these pictures, [shadows, n]; a normal curve a picture, one variance for each kind.
    """

    def log_likelihood(shadows: "Array") -> "Array":
        variance = max(float(shadows.var(axis=0, ddof=1).mean()), 1e-12) if len(shadows) > 1 else 1.0
        return -((target - shadows.mean(0)) ** 2) / (2 * variance) - np.log(variance) / 2

    return log_likelihood(unseen) >= log_likelihood(seen)


FEATURES: dict[str, Callable[[Outputs], "Array"]] = {  # each larger for members
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
    """UA, RA, TA, MIA (the reference's) and the other attacks, as rates in [0, 1] with intervals over pictures.

    Attacks learn on as many kept pictures as test pictures, drawn by `seed`.
    shadows: `lira`'s seen and unseen, for the pictures to forget; without them there is no LiRA.
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
