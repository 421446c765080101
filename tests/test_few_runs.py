"""Plots and tables of one run, one seed or one point: a figure without an interval is shown without one."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from erase import statistics
from erase.classification import summary
from erase.classification.cells import RETRAIN
from erase.evaluation.report import plots
from erase.evaluation.report.plots import Interval
from erase.evaluation.report.words import interval_of

SCRIPTS = Path(__file__).parent.parent / "eval"
ALONE, KNOWN = Interval(0.5, None, None), Interval(0.5, 0.4, 0.6)


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """The figures that are saved, as matplotlib has them."""
    from matplotlib.figure import Figure

    found: list[Any] = []
    save = Figure.savefig

    def kept(self: Any, *arguments: Any, **more: Any) -> None:
        found.append(self)
        save(self, *arguments, **more)

    monkeypatch.setattr(Figure, "savefig", kept)
    return found


def error_bars(ax: Any) -> int:
    """Of any kind, a line of some length or the caps alone."""
    return sum(len(group.lines[2]) + len(group.lines[1]) for group in ax.containers if hasattr(group, "has_xerr"))


def test_a_score_without_an_interval_is_a_value_alone():
    score = {"value": 0.5, "low": None, "high": None}
    assert interval_of(score) == ALONE and interval_of({"value": 0.5, "low": 0.4, "high": 0.6}) == KNOWN


def test_bars_and_points_without_an_interval_have_no_error_bar(drawn):
    """Ends at the value itself would say that the figure is exact."""
    for figure in (ALONE, KNOWN):
        plots.bars([("a", None, figure)], is_rate=True, salt="a")
        plots.pareto([("a", figure, figure, True)], None, titles=("x", "y"), higher_is_better=(True, False),
                     are_rates=(True, False))  # fmt: skip
    assert [error_bars(one.axes[0]) > 0 for one in drawn] == [False, False, True, True]


def test_a_curve_of_one_point_has_its_interval_as_a_bar_and_many_have_a_band(drawn):
    for num in (1, 3):
        plots.curve([(float(i), None, KNOWN) for i in range(num)], axis="steps", is_rate=True, salt="c")
    one, many = (figure.axes[0] for figure in drawn)
    assert error_bars(one) and not one.collections[1:]  # the bar itself is a collection
    assert (
        not error_bars(many) and len([c for c in many.collections if type(c).__name__.startswith("FillBetween")]) == 1
    )


def test_a_band_has_a_gap_where_a_point_has_no_interval(drawn):
    plots.curve([(0.0, None, KNOWN), (1.0, None, KNOWN), (2.0, None, ALONE)], axis="steps", is_rate=True, salt="c")
    (band,) = (c for c in drawn[0].axes[0].collections if type(c).__name__.startswith("FillBetween"))
    assert max(path.vertices[:, 0].max() for path in band.get_paths()) == 1.0


@pytest.mark.parametrize("place", [0.0, 1.0])
def test_no_tick_says_less_than_none_or_more_than_all(place):
    """One method that keeps everything: the axis has room around the point, and no share above 100 %."""
    svg = plots.pareto([("a", Interval(place, None, None), Interval(place, None, None), True)], None,
                       titles=("x", "y"), higher_is_better=(True, True), are_rates=(True, True))  # fmt: skip
    ticks = [float(text.replace("\N{MINUS SIGN}", "-")) for text in re.findall(r">([^<>]*) %<", svg)]
    assert ticks and min(ticks) >= 0 and max(ticks) <= 100


# --- classifiers


def comparison(num_seeds: int) -> dict[str, Any]:
    figures = [0.01 * (1 + seed) for seed in range(num_seeds)]
    row = {"gap": vars(summary.over_seeds("gap", figures))}
    return {
        "rows": {"ft": row, RETRAIN: row},
        "settings": {"data": "digits", "forget": "10%"},
        "seeds": [0] * num_seeds,
    }


@pytest.mark.parametrize(("num_seeds", "label"), [(1, "one seed"), (3, "mean and 95 % interval over 3 seeds")])
def test_the_plot_of_one_seed_promises_no_interval(drawn, tmp_path, num_seeds, label):
    summary.plot(tmp_path / "plot.png", comparison(num_seeds))
    ax = drawn[0].axes[0]
    assert ax.get_xlabel() == f"average gap to retraining, points; {label}"
    assert bool(error_bars(ax)) == (num_seeds > 1)


def test_a_comparison_in_which_every_method_diverged_has_a_plot(drawn, tmp_path):
    found = comparison(1)
    found["rows"]["ft"] = {"diverged": 1}
    summary.plot(tmp_path / "plot.png", found)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


# --- the table of methods


@pytest.fixture
def methods(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "mini_methods", raising=False)
    return importlib.import_module("mini_methods")


def row(**changed: Any) -> dict[str, Any]:
    outcomes = [False] * 39 + [True]
    found = statistics.pooled("rate", [outcomes], higher_is_better=True)
    kept = statistics.pooled("rate", [[not one for one in outcomes]], higher_is_better=True)
    return {"concept": "circle", "variant": "salun", "kept_forget": kept, "recovered": found,
            "drift": (0.02, 0.02, 0.02), **changed}  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [[], [row()], [row(recovered=None)], [row(drift=(0.0, 0.0, 0.0))], [row(drift=None)], [row(variant="base")]],
    ids=["none", "one", "no attack", "no drift", "drift not measured", "base alone"],
)
def test_the_plot_of_methods_takes_what_there_is(methods, tmp_path, rows, drawn):
    methods.plot(rows, tmp_path / "plot.png")
    if rows:
        (ax,) = drawn[0].axes
        placed = [line for line in ax.lines if line.get_marker() not in ("None", None)]
        is_placed = bool(rows[0]["recovered"] and rows[0]["drift"]) and rows[0]["variant"] != "base"
        assert len(placed) == is_placed
        if is_placed:
            low, high = ax.get_xlim()
            assert low <= placed[0].get_xdata()[0] <= high
    else:
        assert not drawn and not (tmp_path / "plot.png").exists()


def test_a_share_without_an_interval_says_so(methods):
    alone = statistics.Score("a", 0.25, 4, None, None, True, 1)
    assert methods.share(alone, inverted=True, interval=True) == "75% [cannot tell]"
    assert methods.share(alone) == "25%"
