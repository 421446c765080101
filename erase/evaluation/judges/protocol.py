"""The contract of a judge: it returns raw outputs for images, which are stored and from which figures are computed."""
# pyright: strict

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from erase.errors import EraseError
from erase.evaluation.plan import Figures, Lines

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Assignment:
    """What a judge is created for.

    options: those of the task's sample set; they name the concept. imagenet_classes: classes that the task needs.
    source: the judge's weights: a hub id, folder or file; None for its default. device: on which it computes.
    """

    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    imagenet_classes: tuple[int, ...] = ()
    source: str | None = None
    device: str = "cpu"

    @property
    def given(self) -> dict[str, Any]:
        """The source as an argument, if there is one."""
        return {"source": self.source} if self.source else {}


class Judge(ABC):
    """A judge of images.

    An instance has the weights and computes raw outputs. The class alone reads and interprets stored outputs.
    """

    name: str = ""  # name of its score files; the registry sets it to the registered name
    about: ClassVar[str] = ""  # one line for `eval-concept list`: what it outputs for an image
    outputs: ClassVar[Mapping[str, Any]] = {}  # shape of the output for a valid image, see `shapes`
    identity_shape: ClassVar[Mapping[str, Any]] = {"*": Any}  # shape of what `identity` returns
    size: int | None = None  # the only height and width of images that it accepts; None: any
    runs_beside: bool = False  # on CPU threads, of which several may call `score` at once, beside a GPU that generates
    place: ClassVar[int] = 100  # order of its figures in a report on own images; lower ones come first

    @classmethod
    def make(cls, assignment: Assignment) -> "Judge":
        """The judge with its weights.

        Raises:
            EraseError: its package or its weights are missing, or it cannot judge this concept.
        """
        return cls()

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that its outputs depend on, as JSON values; scores of another identity are not continued."""

    @abstractmethod
    def score(self, images: "Sequence[np.ndarray]", prompts: Sequence[str]) -> list[dict[str, Any]]:
        """The output for each image, in the shape of `outputs`.

        images: uint8, [h, w, 3]. prompts: from which they were generated.
        """

    @classmethod
    def figures(cls, lines: Lines, options: Mapping[str, Any]) -> Figures:
        """The figures for a user's own images (tasks `prompts` and `images`).

        lines: the outputs of every judge, its own included.
        """
        return Figures()

    @classmethod
    def knows(cls, options: Mapping[str, Any]) -> bool:
        """Whether `shows` works for the concept that a sample set's options name."""
        return False

    @classmethod
    def shows(cls, line: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
        """Whether a valid image shows the concept that the options name. line: its output for the image."""
        raise EraseError(f"the judge {cls.__name__} cannot tell whether an image shows a concept; choose another")

    @classmethod
    def agrees(cls, stored: Any, again: Any) -> bool:
        """Whether two outputs for one image are the same up to another machine's rounding (1e-4)."""
        if isinstance(stored, dict) and isinstance(again, dict):
            one, other = cast(dict[str, Any], stored), cast(dict[str, Any], again)
            return one.keys() == other.keys() and all(cls.agrees(one[key], other[key]) for key in one)
        if isinstance(stored, list) and isinstance(again, list):
            first, second = cast(list[Any], stored), cast(list[Any], again)
            return len(first) == len(second) and all(map(cls.agrees, first, second))
        if isinstance(stored, float) and isinstance(again, float):
            return abs(stored - again) <= 1e-4 * max(1.0, abs(stored))
        return stored == again
