"""What an attack is: it tries to make an erased model generate the concept again."""
# pyright: strict

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from erase.families.protocol import Family


class Attack(ABC):
    """An attack with its settings: it learns something from images of the concept and applies it to the model."""

    about: ClassVar[str] = ""  # one line: what it changes, and what it needs to know
    needs_images: ClassVar[bool] = True  # False: `learn` asks for no images of the concept

    @abstractmethod
    def learn(self, model: "Family", latents: "Tensor", *, quiet: bool = False) -> Any:
        """What the attack found. The model stays as it is.

        latents: of images of the concept, scaled for the network, [n, c, h, w].
        """

    @abstractmethod
    def apply(self, model: "Family", found: Any) -> None:
        """Change the model by what `learn` found."""

    @abstractmethod
    def prompts(self, num: int) -> list[str]:
        """`num` prompts that ask the attacked model for the concept."""
