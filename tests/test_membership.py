"""Attacks on classifiers against closed forms, the published values and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from erase.classification import membership
from erase.classification.data import Images
from erase.classification.membership import Outputs
from erase.classification.svc import Svc
from erase.errors import EraseError


def softmax_outputs(random: np.random.RandomState, n: int, boost: float) -> Outputs:
    """n answers over 10 classes, the true one ahead by `boost`."""
    logits = random.randn(n, 10)
    y = random.randint(0, 10, n)
    logits[np.arange(n), y] += boost
    p = np.exp(logits - logits.max(1, keepdims=True))
    return Outputs(p / p.sum(1, keepdims=True), y)


def confidences(n: int, *boosts: float, seed: int = 5) -> list[np.ndarray]:
    random = np.random.RandomState(seed)
    return [membership.confidence(softmax_outputs(random, n, boost)) for boost in boosts]


def test_the_attack_of_the_reference_gives_its_published_value():
    """P20: members boosted by 6, others by 3, target by 5; mean confidences .94626, .57788, .88060; value .26667."""
    random = np.random.RandomState(5)
    sets = [softmax_outputs(random, n, boost) for n, boost in ((600, 6), (600, 3), (300, 5))]
    members, others, target = (membership.confidence(out).astype(np.float32).astype(np.float64) for out in sets)
    assert [x.mean() for x in (members, others, target)] == pytest.approx([0.94626, 0.57788, 0.88060], abs=1e-5)
    assert membership.svc_attack(members, others, target).mean() == pytest.approx(0.26667, abs=1e-5)


AWKWARD = {
    "near one": lambda r: (1 - 1e-6 * r.rand(300), 1 - 1e-3 * r.rand(300) ** 4),
    "apart": lambda r: (1 - 1e-9 * r.rand(300), 0.3 * r.rand(300)),
    "alike": lambda r: (r.rand(300), r.rand(300)),
    "two points": lambda r: (np.full(300, 1.0), np.full(300, 0.5)),
    "tied": lambda r: (np.round(r.beta(30, 1, 300), 2), np.round(r.beta(5, 1, 300), 2)),
    "of other numbers": lambda r: (r.beta(30, 1, 400), r.beta(5, 1, 50)),
    "wide": lambda r: (r.gamma(1, 0.4, 300), r.gamma(2, 0.8, 300)),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_the_fast_classifier_is_scikit_learns(name):
    """libsvm's decision function over the whole range, at a tolerance of 1e-6 instead of its 1e-3."""
    svm = pytest.importorskip("sklearn.svm")
    members, others = AWKWARD[name](np.random.RandomState(0))
    x = np.concatenate([members, others])
    is_member = np.arange(len(x)) < len(members)
    theirs = svm.SVC(C=3, gamma="auto", kernel="rbf", tol=1e-6).fit(x[:, None], is_member)
    at = np.linspace(x.min(), x.max(), 101)
    assert np.abs(Svc(x, is_member).decide(at) - theirs.decision_function(at[:, None])).max() < 1e-4


def test_the_attack_takes_twenty_thousand_images():
    """The bench `classifier-mia` says how fast."""
    members, others, target = confidences(10_000, 6, 3, 5)
    assert 0.2 < membership.svc_attack(members, others, target).mean() < 0.4


def test_equal_answers_say_nothing():
    same = np.full(50, 0.7)
    assert len(membership.svc_attack(same, same, same)) == 50
    with pytest.raises(EraseError, match="needs images that were trained on and images that were not"):
        Svc(same, np.ones(50, dtype=bool))


def test_the_modified_entropy_is_song_and_mittals():
    """P21: -(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i), by a loop; the plain entropy does not see the truth."""
    out = softmax_outputs(np.random.RandomState(0), 20, 1)
    for p, y, value in zip(out.p, out.y, membership.modified_entropy(out), strict=True):
        expected = -(1 - p[y]) * math.log(p[y]) - sum(p[i] * math.log(1 - p[i]) for i in range(10) if i != y)
        assert value == pytest.approx(expected, rel=1e-12)
    turned = Outputs(out.p, (out.y + 1) % 10)
    assert np.array_equal(membership.entropy(out), membership.entropy(turned))
    assert not np.allclose(membership.modified_entropy(out), membership.modified_entropy(turned))


def test_certain_answers_have_finite_features():
    """A probability of 0 or 1: no NaN; certain and right is 0, certain and wrong is huge."""
    sure = Outputs(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0]))
    assert membership.entropy(sure).tolist() == [0, 0]
    right, wrong = membership.modified_entropy(sure)
    assert right == 0 and 100 < wrong < np.inf
    assert np.isfinite(membership.logit_confidence(sure)).all()
    assert membership.correctness(sure).tolist() == [1, 0]


def test_logit_confidence_is_the_logit_of_the_true_class():
    out = softmax_outputs(np.random.RandomState(0), 20, 1)
    p = membership.confidence(out)
    assert membership.logit_confidence(out) == pytest.approx(np.log(p / (1 - p)), rel=1e-9)


def test_the_threshold_tells_members_best():
    members, others = np.array([0.9, 0.8, 0.7, 0.2]), np.array([0.1, 0.3, 0.75])
    unseen = membership.threshold_attack(members, others, np.array([0.1, 0.3, 0.31, 0.75, 0.76, 1.0]))
    assert unseen.tolist() == [True, True, True, True, False, False]  # .75: 2 of 4 kept, 3 of 3 found, beats .3


def test_the_likelihood_ratio_finds_who_was_seen():
    """Ten shadow models a side, unit noise, three apart: the error of the best guess is P(N > 1.5) = .067."""
    random = np.random.RandomState(0)
    middle = random.randn(2000)
    seen, unseen = (middle + shift + random.randn(10, 2000) for shift in (3, 0))
    assert membership.lira(middle + 3 + random.randn(2000), seen, unseen).mean() == pytest.approx(0.067, abs=0.025)
    assert membership.lira(middle + random.randn(2000), seen, unseen).mean() == pytest.approx(0.933, abs=0.025)


class Remembers(nn.Module):
    """Answers right, and surely, only where the first pixel is bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = x[:, 0, 0, 0]
        return torch.stack([bright * 0 + 0.5, bright * 10], dim=1)


def images(*brightness: int, n: int = 40) -> Images:
    x = torch.tensor(brightness, dtype=torch.uint8).repeat(n // len(brightness))[:, None, None, None]
    return Images(x, torch.ones(len(x), dtype=torch.int64))


def test_measures_are_counts_of_what_the_model_answers():
    """Bright images are remembered, dark ones are not; the mode of the model is left as it was."""
    model = Remembers().train()
    scores = membership.measure(model, images(255, 0), images(255), images(0, 255), seed=0)
    assert {name: scores[name].value for name in ("UA", "RA", "TA")} == {"UA": 0.5, "RA": 1, "TA": 0.5}
    assert scores["MIA"].value == scores["MIA correctness"].value == 0.5 and scores["MIA"].n == 40
    assert model.training and "LiRA" not in scores
    with_shadows = membership.measure(
        model, images(255, 0), images(255), images(0), shadows=(np.full((2, 40), 9.0), np.full((2, 40), -1.0))
    )
    assert with_shadows["LiRA"].value == 0.5


def test_the_average_gap_is_over_four_measures():
    retrained = {"UA": 0.05, "RA": 1.0, "TA": 0.95, "MIA": 0.1}
    assert membership.average_gap(retrained, retrained) == 0
    other = {"UA": 0.0, "RA": 0.98, "TA": 0.96, "MIA": 0.0, "LiRA": 1.0}
    assert membership.average_gap(other, retrained) == pytest.approx((0.05 + 0.02 + 0.01 + 0.1) / 4)
