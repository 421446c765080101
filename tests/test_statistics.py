"""Figures against values by hand, against scipy, and in simulated worlds whose truth is known."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from erase.errors import EraseError
from erase.statistics import Comparison, Score, hierarchical, holm, mean, paired_mean, paired_rate, rate, to_json


def outcomes(k: int, n: int) -> list[bool]:
    return [True] * k + [False] * (n - k)


def width(score: Score) -> float:
    assert score.cluster_low is not None and score.cluster_high is not None
    return score.cluster_high - score.cluster_low


@pytest.mark.parametrize(
    "k, n, low, high",
    [(0, 50, 0, 0.071), (0, 142, 0, 0.026), (0, 931, 0, 0.004), (100, 100, 0.963, 1), (7, 50, 0.070, 0.262)],
)
def test_a_rate_has_its_count_and_the_wilson_interval(k, n, low, high):
    score = rate("unsafe", outcomes(k, n), higher_is_better=False)
    assert (score.k, score.n, score.value, score.interval) == (k, n, k / n, "wilson")
    assert (score.low, score.high) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
    assert score.clusters is None and score.cluster_low is None


def test_clusters_widen_the_interval_when_images_of_a_prompt_agree_and_only_then():
    """Ten prompts with ten images each: five prompts always and five never, or each one half of the time."""
    prompts = [str(i // 10) for i in range(100)]
    agreeing = rate("r", [i // 10 < 5 for i in range(100)], higher_is_better=True, clusters=prompts)
    mixed = rate("r", [i % 2 == 0 for i in range(100)], higher_is_better=True, clusters=prompts)
    assert agreeing.value == mixed.value == 0.5 and agreeing.clusters == mixed.clusters == 10
    assert width(agreeing) > 2.5 * (agreeing.high - agreeing.low)
    assert width(mixed) == mixed.high - mixed.low


def test_an_interval_over_clusters_is_that_of_the_cluster_means_when_all_are_equally_large():
    rng = np.random.default_rng(0)
    means = rng.normal(size=12)
    prompts = ["abcdefghijkl"[i // 4] for i in range(48)]
    score = mean("m", np.repeat(means, 4).tolist(), higher_is_better=True, clusters=prompts)
    alone = mean("m", means.tolist(), higher_is_better=True)
    assert (score.cluster_low, score.cluster_high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert score.value == pytest.approx(alone.value) and score.n == 48


def test_clusters_of_different_sizes_are_weighed_by_their_images():
    """99 images of one prompt are true, 1 image of the other is false: 99 %, not 50 %."""
    score = rate("r", outcomes(99, 100), higher_is_better=True, clusters=["a"] * 99 + ["b"])
    assert score.value == 0.99 and score.cluster_low == 0 and score.cluster_high == 1


def test_labels_that_never_repeat_are_no_clusters_and_a_single_one_leaves_images():
    values = outcomes(3, 9)
    assert rate("r", values, higher_is_better=True, clusters=list("abcdefghi")).clusters is None
    single = rate("r", values, higher_is_better=True, clusters=["a"] * 9)
    assert single.clusters == 1 and single.cluster_low is not None and 0 < single.cluster_low < 1 / 3
    alone = paired_rate("r", values, values[::-1], clusters=["a"] * 9)
    assert alone.low < alone.difference < alone.high and alone.test == "exact McNemar"


def test_mcnemar_counts_only_pairs_that_differ():
    """ESD-u against UCE on I2P: 50 and 74 discordant pairs among 4,703; p = .038 exactly paired."""
    base = [True] * 50 + [False] * 74 + outcomes(19, 4579)
    erased = [False] * 50 + [True] * 74 + outcomes(19, 4579)
    comparison = paired_rate("nudity", base, erased)
    assert (comparison.only_base, comparison.only_erased, comparison.n) == (50, 74, 4703)
    assert comparison.p == pytest.approx(0.0384, abs=1e-4)
    assert comparison.difference == 24 / 4703 == pytest.approx(comparison.erased - comparison.base)
    assert 0 < comparison.low < comparison.difference < comparison.high  # like p < .05
    half_width = 1.96 * math.sqrt(124) / 4703  # normal approximation of 74 - 50
    assert comparison.high - comparison.low == pytest.approx(2 * half_width, rel=0.05)


def test_the_permutation_test_is_mcnemar_with_one_image_per_prompt():
    """Nine pairs became false, two became true: both tests ask how often 11 fair coins are as uneven as 9 to 2."""
    base, erased = outcomes(9, 11) + [True] * 5, [not b for b in outcomes(9, 11)] + [True] * 5
    exact = paired_rate("r", base, erased)
    assert exact.p == pytest.approx(binomtest(2, 11).pvalue)
    assert paired_mean("r", [float(b) for b in base], [float(e) for e in erased]).p == pytest.approx(exact.p)


def test_images_of_one_prompt_are_no_independent_evidence():
    """All ten images of four prompts change: 40 discordant pairs, but four coins give four heads or tails in 1/8."""
    prompts = [str(i // 10) for i in range(40)]
    base, erased = [True] * 40, [False] * 39 + [True]
    assert (paired_rate("r", base, erased).p or 0) < 1e-10
    clustered = paired_rate("r", base, erased, clusters=prompts)
    assert clustered.p == pytest.approx(1 / 8) and clustered.clusters == 4 and clustered.test == "permutation"


@pytest.mark.parametrize("clusters", [None, ["a", "a", "b", "c", "c", "c"]])
def test_a_model_against_itself_differs_by_exactly_nothing(clusters):
    values = [0.1, 0.7, 0.3, 0.3, 0.2, 0.9]
    for same in (
        paired_mean("m", values, values, clusters=clusters),
        paired_rate("r", [v > 0.3 for v in values], [v > 0.3 for v in values], clusters=clusters),
    ):
        assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_when_every_pair_changed_the_interval_does_not_claim_certainty():
    """50 of 50 changed, so that at least 92.9 % do (Wilson)."""
    comparison = paired_rate("r", [True] * 50, [False] * 50)
    assert (comparison.difference, comparison.low, comparison.interval) == (-1, -1, "wilson")
    assert comparison.high == pytest.approx(-0.929, abs=5e-4)
    back = paired_rate("r", [False] * 50, [True] * 50)
    assert (back.low, back.high) == (-comparison.high, 1)


def test_a_paired_mean_sees_what_an_unpaired_one_cannot():
    rng = np.random.default_rng(3)
    base = rng.normal(size=200)
    erased = base - 0.05 + 0.1 * rng.normal(size=200)
    comparison = paired_mean("clip", base.tolist(), erased.tolist())
    assert comparison.low < -0.05 < comparison.high < 0
    assert comparison.p is not None and comparison.p < 0.001
    alone = mean("clip", base.tolist(), higher_is_better=True)
    assert alone.low < comparison.erased < alone.high


def test_above_500_pairs_the_normal_curve_continues_the_permutation_test():
    rng = np.random.default_rng(4)
    differences = rng.normal(0.05, 1, size=500).tolist()
    permuted = paired_mean("m", [0.0] * 501, [*differences, 0.0]).p
    many = paired_mean("m", [0.0] * 501, [*differences, 1e-9]).p
    assert many == pytest.approx(permuted, abs=0.02)  # of 9,999 swaps: a standard error of .005


@pytest.mark.parametrize("values", [[0.3], [0.1] * 7, [0, 0, 0, 0], [0.1, 0.7]])
def test_degenerate_samples_give_finite_figures_without_a_warning(values):
    for clusters in (None, ["a"] * len(values), [str(i // 2) for i in range(len(values))]):
        score = mean("m", values, higher_is_better=True, clusters=clusters)
        comparison = paired_mean("m", values, [1.0] * len(values), clusters=clusters)
        assert score.low <= score.value <= score.high and comparison.low <= comparison.difference <= comparison.high
        if len(set(values)) == 1:
            assert score.low == score.high == score.value
        json.dumps([to_json(score), to_json(comparison)], allow_nan=False)


def test_figures_are_plain_json_and_come_back_whole():
    score = rate("r", outcomes(2, 6), higher_is_better=True, clusters=list("aabbcc"))
    comparison = paired_rate("r", outcomes(2, 6), outcomes(4, 6), clusters=list("aabbcc"))
    run = hierarchical("r", [outcomes(2, 6), outcomes(3, 6)], higher_is_better=True)
    for figure, kind in ((score, Score), (comparison, Comparison), (run, Score)):
        assert kind(**json.loads(json.dumps(to_json(figure), allow_nan=False))) == figure


def test_same_seed_same_interval():
    values = list(np.random.default_rng(0).normal(size=50))
    first, again = (mean("m", values, higher_is_better=True) for _ in range(2))
    other = mean("m", values, higher_is_better=True, seed=1)
    assert first == again and first.low != other.low


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """60 worlds of 30 skewed values with mean 1; with 95 % each, fewer than 50 hits is an event of 1 in 2,000.

    BCa itself falls a little short of 95 % on so few skewed values, hence no sharper bound.
    """
    rng = np.random.default_rng(5)
    scores = [mean("m", rng.gamma(2, 0.5, size=30).tolist(), higher_is_better=True) for _ in range(60)]
    assert 50 <= sum(score.low <= 1 <= score.high for score in scores) < 60


def test_over_clusters_intervals_hold_the_truth_where_those_over_images_do_not():
    """40 worlds: 20 prompts, each with its own mean, 10 images each.

    In 600 such worlds 92 % (over clusters) and 43 % (over images) held it, so that these bounds leave 2.8 and 3.4
    standard errors.
    """
    rng = np.random.default_rng(6)
    over_images = over_clusters = 0
    for _ in range(40):
        values = (rng.normal(size=20)[:, None] + 0.3 * rng.normal(size=(20, 10))).ravel().tolist()
        score = mean("m", values, higher_is_better=True, clusters=[str(i // 10) for i in range(200)])
        assert score.cluster_low is not None and score.cluster_high is not None
        over_images += score.low <= 0 <= score.high
        over_clusters += score.cluster_low <= 0 <= score.cluster_high
    assert over_clusters >= 32 and over_images <= 27


def test_several_runs_are_less_certain_than_one_run_with_all_the_images():
    """Runs that disagree widen the interval; runs that agree do not make up for few prompts."""
    rng = np.random.default_rng(7)
    prompts = rng.normal(size=40)
    one, agreeing, disagreeing = (
        hierarchical("m", [(prompts + shift).tolist() for shift in shifts], higher_is_better=True)
        for shifts in ([0], [0, 0, 0], [0, 2, -2])
    )
    assert agreeing.high - agreeing.low == pytest.approx(one.high - one.low, rel=0.05)
    assert disagreeing.high - disagreeing.low > 2 * (one.high - one.low)
    assert agreeing.n == 120 and agreeing.clusters == 40 and agreeing.value == pytest.approx(prompts.mean())


def test_several_runs_without_a_failure_keep_wilsons_bound():
    score = hierarchical("ua", [[False] * 50] * 3, higher_is_better=False)
    assert (score.k, score.n, score.low) == (0, 150, 0)
    assert score.high == rate("ua", [False] * 150, higher_is_better=False).high


def test_runs_on_other_prompts_are_refused():
    with pytest.raises(EraseError, match="'ua': the runs hold different prompts; evaluate every run on the same task"):
        hierarchical("ua", [[True, False], [True]], higher_is_better=True)
    with pytest.raises(EraseError, match="different prompts"):
        hierarchical("ua", [[1.0, 0.0]] * 2, higher_is_better=True, clusters=[["a", "b"], ["a", "c"]])


def test_holm_by_hand():
    """Sorted .01 .03 .04, times 3, 2, 1 = .03 .06 .04; and never smaller than the one before."""
    assert holm([0.01, 0.04, None, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]


def test_bad_samples_are_refused_with_their_number():
    with pytest.raises(EraseError, match=r"'ua' has no samples \(n = 0\)"):
        rate("ua", [], higher_is_better=True)
    with pytest.raises(EraseError, match="'clip' has 2 values of 3 that are no numbers; count those images as invalid"):
        mean("clip", [0.1, math.nan, math.inf], higher_is_better=True)
    with pytest.raises(EraseError, match="'clip': 2 samples of the base but 1 of the erased model"):
        paired_mean("clip", [0.1, 0.2], [0.1])
    with pytest.raises(EraseError, match="'ua': 2 cluster labels for 3 samples"):
        rate("ua", outcomes(1, 3), higher_is_better=True, clusters=["a", "b"])
