"""Names of weights in a delta: the component that changed, a dot, and the name in the component."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def of_component(component: str, weights: Mapping[str, T]) -> dict[str, T]:
    """The weights of a component, such as "unet", under their names in a delta."""
    return {f"{component}.{name}": tensor for name, tensor in weights.items()}


def in_component(component: str, weights: Mapping[str, T]) -> dict[str, T]:
    """The weights of a delta under their names in the component; the inverse of `of_component`."""
    return {name.removeprefix(f"{component}."): tensor for name, tensor in weights.items()}
