"""Named parts that other packages may add to: model families, methods, tasks, judges, attacks.

A registry knows our own parts, the parts that installed packages name in their entry points, and any class that is
given as "module:Class". It lists names without importing a part, and imports a part when it is used.
"""
# pyright: strict

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

from erase.errors import EraseError
from erase.words import closest, did_you_mean

T = TypeVar("T")
OWN = "erase-concept"  # the distribution of our own parts


@dataclass(frozen=True)
class Entry:
    """Where a part is.

    path: "module:Class", or "module" if the module defines one class of the registry's base.
    distribution: the installed package that it belongs to; empty for a class that was given as "module:Class".
    """

    name: str
    path: str
    distribution: str = ""

    def __str__(self) -> str:
        return f"{self.name!r} of the package {self.distribution}" if self.distribution else f"{self.name!r}"


class Registry(Generic[T]):
    """Classes of one kind by name.

    kind: what a part is called in messages, such as "judge". base: the class that every part derives from.
    group: the entry points under which other packages name their parts, such as "erase.judges".
    own: our own parts, name to path (see `Entry`); `in_folder` finds them.
    has_option: whether the user chooses the part by an option, which also takes "module:Class".
    check: what else is wrong with a class, in words, such as "has no loss"; None if nothing is.
    """

    def __init__(
        self,
        kind: str,
        *,
        base: type[T],
        group: str,
        own: Mapping[str, str],
        check: Callable[[type[T]], str | None] | None = None,
        has_option: bool = True,
    ) -> None:
        self.kind, self.base, self.group = kind, base, group
        self._own = [Entry(name, path, OWN) for name, path in own.items()]
        self._check, self._has_option = check, has_option
        self._given: dict[str, type[T]] = {}
        self._loaded: dict[str, type[T]] = {}

    @cached_property
    def _plugins(self) -> list[Entry]:
        found = entry_points(group=self.group)
        return sorted((Entry(p.name, p.value, _distribution(p)) for p in found), key=lambda e: (e.name, e.distribution))

    def names(self) -> list[str]:
        """Our own names in their order, then those of other packages. Nothing is imported."""
        return list(dict.fromkeys(entry.name for entry in [*self._own, *self._plugins]))

    def entry(self, name: str) -> Entry:
        """Where the part of this name is.

        Raises:
            EraseError: no part has the name, or two packages have one each.
        """
        if ":" in name:
            return Entry(name, name)
        found = [entry for entry in [*self._own, *self._plugins] if entry.name == name]
        if not found:
            guess = did_you_mean(name, self.names()).rstrip()
            hint = f"; {guess}" if guess else ""
            raise EraseError(f"unknown {self.kind} {name!r}{hint} ({', '.join(self.names())})")
        if len(found) > 1:
            packages = " and ".join(entry.distribution for entry in found)
            by_class = f", or choose one by its class: {' or '.join(entry.path for entry in found)}"
            raise EraseError(
                f"the {self.kind} {name!r} is in {len(found)} installed packages, {packages}; uninstall all but one"
                f"{by_class if self._has_option else ''}"
            )
        return found[0]

    def load(self, name: str) -> type[T]:
        """The class of this name, imported now if it was not before.

        Raises:
            EraseError: see `entry`; or it cannot be imported, or is not such a class.
        """
        if name in self._given:
            return self._given[name]
        if name not in self._loaded:
            entry = self.entry(name)
            self._loaded[name] = self._checked(self._imported(entry), str(entry))
        return self._loaded[name]

    def stated(self, name: str, where: str) -> type[T]:
        """The class of a name that a file states. A file does not choose modules to import.

        where: the file and the place in it, for the message.

        Raises:
            EraseError: see `load`; or the name is a "module:Class" that was not loaded before in this process.
        """
        if ":" in name and name not in self._given and name not in self._loaded:
            raise EraseError(
                f"{where}: the {self.kind} {name!r} is named by its class, which is not imported because a file says "
                f"so; give --{self.kind} {name} to the command, or install it with an entry point in {self.group}"
            )
        try:
            return self.load(name)
        except EraseError as error:
            raise EraseError(f"{where}: {error}") from error

    def give(self, cls: type[T]) -> str:
        """The name, "module:Class", by which `load` finds this class from now on.

        Raises:
            EraseError: it is not such a class.
        """
        name = f"{getattr(cls, '__module__', '')}:{getattr(cls, '__qualname__', cls)}"
        self._given[name] = self._checked(cls, repr(name))
        _GROUPS_WITH_GIVEN.add(self.group)
        return name

    def _imported(self, entry: Entry) -> object:
        module_name, colon, attribute = entry.path.partition(":")
        try:
            found: object = import_module(module_name)
            for part in attribute.split(".") if colon else ():
                found = getattr(found, part)
        except Exception as error:  # a module runs any code when it is imported
            hint = "" if entry.distribution else "; write package.module:Class"
            reason = f"{type(error).__name__}: {error}"
            raise EraseError(f"the {self.kind} {entry} cannot be imported ({reason}){hint}") from error
        if isinstance(found, ModuleType):
            return self._only_class(found, entry)
        return found

    def _only_class(self, module: ModuleType, entry: Entry) -> type[T]:
        found = [
            value
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, self.base) and value is not self.base
            if value.__module__ == module.__name__ and not name.startswith("_")
        ]
        if len(found) != 1:
            raise EraseError(
                f"the {self.kind} {entry} names the module {module.__name__}, which defines {len(found)} classes "
                f"derived from {self.base.__name__}; name one as module:Class"
            )
        return found[0]

    def _checked(self, cls: object, named: str) -> type[T]:
        if not isinstance(cls, type):
            raise EraseError(f"the {self.kind} {named} is not a class but {type(cls).__name__}")
        if not issubclass(cls, self.base):
            base = f"{self.base.__module__}.{self.base.__qualname__}"
            raise EraseError(f"the {self.kind} {named} is not derived from {base}")
        if inspect.isabstract(cls):
            lacking = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
            raise EraseError(f"the {self.kind} {named} does not define {lacking}")
        for wrong, right in misspelt(cls, self.base).items():
            raise EraseError(f"the {self.kind} {named} defines {wrong!r}; did you mean {right}?")
        if problem := self._check(cls) if self._check else None:
            raise EraseError(f"the {self.kind} {named} {problem}")
        return cls


_GROUPS_WITH_GIVEN: set[str] = set()


def file_name(name: str) -> str:
    """The name of a part for files and folders: a colon is no part of a name on Windows, nor for tar."""
    return name.replace(":", "+")


def name_of_file(name: str) -> str:
    """The inverse of `file_name`."""
    return name.replace("+", ":")


def has_others(group: str) -> bool:
    """Whether another package, or a class given in this process, has parts in this group of entry points."""
    return group in _GROUPS_WITH_GIVEN or bool(entry_points(group=group))


def in_folder(package: str, folder: str | Path, *, skip: tuple[str, ...] = ("protocol", "registry")) -> dict[str, str]:
    """One part a file: name to module, for each module in the folder of a package.

    "class_forget.py" is the part "class-forget". Subfolders and names with an underscore in front are left out.
    """
    modules = [one.name for one in pkgutil.iter_modules([str(folder)]) if not one.ispkg]
    names = [name for name in modules if name not in skip and not name.startswith("_")]
    return {name.replace("_", "-"): f"{package}.{name}" for name in names}


def misspelt(cls: type, base: type) -> dict[str, str]:
    """Public attributes of a class that are almost the name of one that its base declares: attribute to that name.

    Fields of a dataclass are left out: they are the part's own options.
    """
    known = {name for name in dir(base) if not name.startswith("_")}
    options = {field.name for field in fields(cls)} if is_dataclass(cls) else set[str]()
    own = {name for name in dir(cast(type[Any], cls)) if not name.startswith("_")} - known - options
    guesses = {name: closest(name, known, cutoff=0.8) for name in sorted(own)}
    return {name: guess[0] for name, guess in guesses.items() if guess}


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown"
