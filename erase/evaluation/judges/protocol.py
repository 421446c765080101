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
    """What a judge is made for.

    options: of the task's sample set: the concept as judges name it. imagenet_classes: that the task asks for.
    source: the judge's weights, a hub id, folder or file; None for its default. device: to compute on.
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
    """Something that looks at images.

    The class alone, without weights, reads and interprets stored outputs; an instance makes them.
    """

    name: str = ""  # of its files of scores; the registry sets the one that it is registered under
    about: ClassVar[str] = ""  # one line: what it says of an image
    outputs: ClassVar[Mapping[str, Any]] = {}  # shape of what `score` says of a valid image, see `shapes`
    identity_shape: ClassVar[Mapping[str, Any]] = {"*": Any}  # of what `identity` returns
    size: int | None = None  # the only height and width of images that it can look at; None: any
    place: ClassVar[int] = 100  # of its figures in a report on own images: judges with lower ones come first

    @classmethod
    def make(cls, assignment: Assignment) -> "Judge":
        """The judge with its weights.

        Raises:
            EraseError: its package or its weights are missing, or it cannot judge this concept.
        """
        return cls()

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that its outputs depend on, as JSON values; scores of another identity are not continued."""

    @abstractmethod
    def score(self, images: "Sequence[np.ndarray]", prompts: Sequence[str]) -> list[dict[str, Any]]:
        """What it says of each image, in the shape of `outputs`.

        images: uint8, [h, w, 3]. prompts: that they were generated from.
        """

    @classmethod
    def figures(cls, lines: Lines, options: Mapping[str, Any]) -> Figures:
        """What its scores say of a user's own images, beside a task that knows what was asked for.

        lines: of every judge, its own among them.
        """
        return Figures()

    @classmethod
    def knows(cls, options: Mapping[str, Any]) -> bool:
        """Whether `shows` can tell, for the concept that a sample set's options name."""
        return False

    @classmethod
    def shows(cls, line: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
        """Whether a valid image shows the concept that the options name. line: the output for the image."""
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
