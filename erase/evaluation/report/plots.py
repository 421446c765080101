"""The report's plots as SVG text for a web page: bars and curves of base and erased model, and what methods trade."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that matplotlib writes, and what the page puts in their place to be legible in light and dark alike.
INK, BASE, ERASED, RULE = "#010101", "#020202", "#030303", "#040404"
PAGE_COLOURS = {INK: "currentColor", BASE: "var(--base)", ERASED: "var(--erased)", RULE: "var(--rule)"}


@dataclass(frozen=True)
class Interval:
    """A value and how far it may be off, None if that is not known; drawn as a bar or point with a line."""

    value: float
    low: float | None
    high: float | None

    @property
    def reach(self) -> list[list[float]] | None:
        """Down and up from the value, as matplotlib wants it; None for no line."""
        if self.low is None or self.high is None:
            return None
        return [[max(0.0, self.value - self.low)], [max(0.0, self.high - self.value)]]


def bars(rows: Sequence[tuple[str, Interval | None, Interval]], *, is_rate: bool, salt: str) -> str:
    """One pair of bars a row: label, base, erased."""

    def draw(ax: "Axes") -> None:
        both = any(base for _, base, _ in rows)
        for place, (_, base, erased) in enumerate(rows):
            if base:
                _bar(ax, place - 0.19, base, BASE, 0.34)
            _bar(ax, place + (0.19 if both else 0), erased, ERASED, 0.34)
        labels = [textwrap.fill(textwrap.shorten(label, 60, placeholder="..."), 22) for label, _, _ in rows]
        ax.set_yticks(range(len(rows)), labels)
        ax.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color=RULE, linewidth=0.6)
        ax.set_axisbelow(True)
        if is_rate:
            _percent(ax, "x")

    return _svg(draw, height=0.55 + 0.45 * len(rows), salt=salt)


def curve(points: Sequence[tuple[float, Interval | None, Interval]], *, axis: str, is_rate: bool, salt: str) -> str:
    """Two lines with their intervals as bands, a single point's as a bar: place on the axis, base, erased."""

    def draw(ax: "Axes") -> None:
        arms = (
            (BASE, [(x, base) for x, base, _ in points if base]),
            (ERASED, [(x, erased) for x, _, erased in points]),
        )
        for colour, line in arms:
            places = [x for x, _ in line]
            if len(line) == 1:  # which has no width for a band
                _error(ax, places[0], line[0][1], colour)
            elif line:
                low = [math.nan if y.low is None else y.low for _, y in line]
                high = [math.nan if y.high is None else y.high for _, y in line]
                ax.fill_between(places, low, high, color=colour, alpha=0.2)
            ax.plot(places, [y.value for _, y in line], "o-", color=colour, linewidth=1.4, markersize=4)
        ax.set_xlabel(axis)
        ax.set_xticks([x for x, _, _ in points])
        ax.grid(axis="y", color=RULE, linewidth=0.6)
        ax.set_axisbelow(True)
        if is_rate:
            _percent(ax, "y")

    return _svg(draw, height=3.0, salt=salt)


def pareto(
    points: Sequence[tuple[str, Interval, Interval, bool]],
    base: tuple[Interval, Interval] | None,
    *,
    titles: tuple[str, str],
    higher_is_better: tuple[bool, bool],
    are_rates: tuple[bool, bool],
) -> str:
    """Methods as points with intervals, better to the upper right; those that no other one beats are joined.

    points: method, x, y, whether it is on the front.
    """

    def draw(ax: "Axes") -> None:
        joined = sorted((x.value, y.value) for _, x, y, on in points if on)
        ax.plot([x for x, _ in joined], [y for _, y in joined], color=ERASED, linewidth=1, linestyle=(0, (4, 3)))
        if base:
            _point(ax, *base, BASE, filled=True)
        for _, x, y, on in points:
            _point(ax, x, y, ERASED, filled=on)
        ax.grid(color=RULE, linewidth=0.6)
        ax.set_axisbelow(True)
        for axis, title, up, is_rate in zip("xy", titles, higher_is_better, are_rates, strict=True):
            getattr(ax, f"set_{axis}label")(f"{title} ({'higher' if up else 'lower'} is better)")
            if not up:
                getattr(ax, f"invert_{axis}axis")()
            if is_rate:
                _percent(ax, axis, limits=False)
        ax.margins(0.08)
        for name, x, y, _ in [*points, *([("base", *base, False)] if base else [])]:
            _name(ax, name, x.value, y.value)

    return _svg(draw, height=4.0, salt="pareto")


def _bar(ax: "Axes", place: float, figure: Interval, colour: str, height: float) -> None:
    ax.barh(place, figure.value, height=height, color=colour)
    if figure.reach:
        ax.errorbar(figure.value, place, xerr=figure.reach, color=INK, linewidth=0.9, capsize=2.2, capthick=0.9)


def _error(ax: "Axes", x: float, y: Interval, colour: str) -> None:
    if y.reach:
        ax.errorbar(x, y.value, yerr=y.reach, color=colour, linewidth=0.9, capsize=2.2, capthick=0.9)


def _point(ax: "Axes", x: Interval, y: Interval, colour: str, *, filled: bool) -> None:
    if x.reach or y.reach:
        ax.errorbar(x.value, y.value, xerr=x.reach, yerr=y.reach, color=colour, linewidth=0.8, alpha=0.6)
    ax.plot(x.value, y.value, "o", color=colour, markersize=6, markerfacecolor=colour if filled else "none")


def _name(ax: "Axes", name: str, x: float, y: float) -> None:
    """Beside its point, on the side where there is room."""
    is_right = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[0] > 0.5
    ax.annotate(
        textwrap.shorten(name, 30, placeholder="..."),
        (x, y),
        (-6 if is_right else 6, 6),
        textcoords="offset points",
        ha="right" if is_right else "left",
    )


def _percent(ax: "Axes", axis: str, *, limits: bool = True) -> None:
    """Shares in per cent. limits: show all from 0 to 100 %; else no tick lies outside of it."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    form = PercentFormatter(1, symbol=" %")
    if limits:
        getattr(ax, f"set_{axis}lim")(0, 1)
        getattr(ax, f"{axis}axis").set_major_formatter(form)
    else:
        form.set_axis(getattr(ax, f"{axis}axis"))
        inside = FuncFormatter(lambda share, place: form(share, place) if -1e-9 <= share <= 1 + 1e-9 else "")
        getattr(ax, f"{axis}axis").set_major_formatter(inside)


def _svg(draw: Callable[["Axes"], None], *, height: float, salt: str) -> str:
    """An <svg> element, the same text each time: no dates, ids from a fixed salt, the page's colours and font."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,  # labels are what users wrote, dollar signs too
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.unicode_minus": True,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has it
        figure = Figure(figsize=(5.2, height), layout="constrained", facecolor="none")
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML header inside HTML
    svg = re.sub(r"<svg [^>]*viewBox", '<svg role="img" viewBox', svg).replace(
        'xmlns="http://www.w3.org/2000/svg" ', ""
    )
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)  # would style the page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1: a page with two plots would have them twice
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg
