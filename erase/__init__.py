"""Remove a concept from a Stable Diffusion model, and measure that it is gone and that the rest is still there."""
# pyright: strict

from typing import TYPE_CHECKING, Any

from erase.version import __version__ as __version__

__all__ = ["Concept", "EraseError", "Method", "Run", "apply", "erase_concept", "load_delta", "remove"]

if TYPE_CHECKING:
    from erase.concepts import Concept
    from erase.delta import apply, remove
    from erase.delta import load as load_delta
    from erase.errors import EraseError
    from erase.methods.protocol import Method
    from erase.runs.job import Run, erase_concept

_HOMES = {  # module and name
    "Concept": ("concepts", "Concept"),
    "EraseError": ("errors", "EraseError"),
    "Method": ("methods.protocol", "Method"),
    "Run": ("runs.job", "Run"),
    "apply": ("delta", "apply"),
    "erase_concept": ("runs.job", "erase_concept"),
    "load_delta": ("delta", "load"),
    "remove": ("delta", "remove"),
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """The public names are imported when they are first used, so that `erase-concept --help` needs no torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'erase' has no attribute {name!r}")
    module, name = _HOMES[name]
    return getattr(import_module(f"erase.{module}"), name)
