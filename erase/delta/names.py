"""Names of weights in a delta: the component that changed, a dot, and the name in the component."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


def of_component(component: str, weights: Mapping[str, T]) -> dict[str, T]:
    """The weights of a component, such as "unet", under their names in a delta."""
    return {f"{component}.{name}": tensor for name, tensor in weights.items()}


class Component(Mapping[str, T]):
    """The weights of a component under their names in a delta, each looked up when it is asked for."""

    def __init__(self, component: str, weights: Mapping[str, T]):
        self._prefix, self._weights = f"{component}.", weights

    def __getitem__(self, name: str) -> T:
        if not name.startswith(self._prefix):
            raise KeyError(name)
        return self._weights[name.removeprefix(self._prefix)]

    def __iter__(self) -> Iterator[str]:
        return (self._prefix + name for name in self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def in_component(component: str, weights: Mapping[str, T]) -> dict[str, T]:
    """The weights of a delta under their names in the component; the inverse of `of_component`."""
    return {name.removeprefix(f"{component}."): tensor for name, tensor in weights.items()}
