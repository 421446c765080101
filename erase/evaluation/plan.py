"""What a task measures: columns of one outcome per sample, and groups of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from erase.errors import EraseError

Lines = Mapping[str, Sequence[Mapping[str, Any]]]  # of every judge, one a sample


@dataclass(frozen=True)
class Column:
    """One outcome per sample (None: not looked at): bools make a rate, floats a mean.

    copy_of: name of the column that this one repeats or inverts; the two are one test in a corrected table.
    range: least and largest value of a mean, which no requirement may lie outside of; None if it is not known.
    """

    name: str
    title: str
    about: str
    higher_is_better: bool
    values: Sequence[bool | float | None]
    copy_of: str | None = None
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Expected:
    """A score that a report will have, as far as it is known before there is an image.

    range: least and largest value; None if they are not known. is_compared: its difference to the base is a figure.
    """

    range: tuple[float, float] | None
    is_rate: bool
    is_compared: bool = True


@dataclass(frozen=True)
class Group:
    """A column once more, by label; a sample may have several."""

    name: str
    title: str
    column: str
    labels: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Curve:
    """One figure at several values of a setting, such as a judge's threshold; of the points none is tested by itself.

    axis: title of the setting. columns: by its value.
    """

    name: str
    title: str
    axis: str
    columns: Mapping[float, Column]


@dataclass(frozen=True)
class Plan:
    """What a task measures: erasure and retention (names of columns) make the verdict."""

    columns: Sequence[Column]
    groups: Sequence[Group]
    erasure: str | None
    retention: str | None
    flagged: Sequence[bool]  # images to be blurred
    curves: Sequence[Curve] = ()


@dataclass(frozen=True)
class Figures:
    """What a judge reports for images without known prompts: its columns, and images to be blurred, if any."""

    columns: Sequence[Column] = ()
    flagged: Sequence[bool] | None = None
    curves: Sequence[Curve] = ()


def present(columns: Sequence[Column]) -> list[Column]:
    """Those that look at any sample."""
    return [column for column in columns if any(value is not None for value in column.values)]


def lines_of(lines: Lines, judge: str) -> Sequence[Mapping[str, Any]]:
    """The lines of a judge that the figures need.

    Raises:
        EraseError: the judge did not score the images.
    """
    if judge not in lines:
        raise EraseError(f"the images have no score of {judge}; run eval-concept score --judge {judge}")
    return lines[judge]


def whole(lines: Sequence[Mapping[str, Any]]) -> Column:
    """Share of valid images."""
    return Column("quality.whole", "Whole images", "share that is neither black nor broken", True,
                  [not line["invalid"] for line in lines])  # fmt: skip


def column_of(plan: Plan | None, name: str | None) -> Column | None:
    """The plan's column of this name, if there is one."""
    return next((column for column in plan.columns if column.name == name), None) if plan else None


def clip_score(lines: Sequence[Mapping[str, Any]]) -> Column:
    """Mean CLIP score of valid images."""
    values = [None if line["invalid"] else line["clip_score"] for line in lines]
    return Column("quality.clip_score", "CLIP score", "100 x cosine of image and prompt, of whole images", True,
                  values, range=(-100, 100))  # fmt: skip


def absent(
    name: str, about: str, lines: Sequence[Mapping[str, Any]], holds: Callable[[Mapping[str, Any]], bool]
) -> Column:
    """Unlearning accuracy on images of any prompts: the share of valid images of which it holds."""
    values = [not line["invalid"] and holds(line) for line in lines]
    return Column(name, "Unlearning accuracy", about, True, values)
