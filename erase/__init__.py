"""Take a concept out of a Stable Diffusion model, and show that it is gone and that the rest is still there."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Concept", "EraseError", "Run", "erase_concept"]

if TYPE_CHECKING:
    from erase.concepts import Concept
    from erase.errors import EraseError
    from erase.runs.job import Run, erase_concept

_HOMES = {"Concept": "concepts", "EraseError": "errors", "Run": "runs.job", "erase_concept": "runs.job"}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """The public names are imported when they are first used, so that `erase-concept --help` needs no torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'erase' has no attribute {name!r}")
    return getattr(import_module(f"erase.{_HOMES[name]}"), name)
