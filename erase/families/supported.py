"""What a family says about the kinds of models that it is tested on: the rows of the table of supported models."""

from dataclasses import dataclass

DISTILLED = "--sampler model --steps 4 --guidance 0"


@dataclass(frozen=True)
class Model:
    """One kind of model. `tests/contract/test_supported_models.py` must know a tiny one of every name.

    name: as users know it. read, written: whether single checkpoint files of it are.
    guided: whether it generates with guidance above 1, which all guards but NAG need.
    options: of `erase-concept`, without which it generates no good images.
    """

    name: str
    read: bool = True
    written: bool = True
    guided: bool = True
    options: str = ""
