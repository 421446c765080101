"""A class of a class-conditional model as a concept: prompts are class names."""
# pyright: strict

from collections.abc import Sequence

from erase.concepts.concept import Concept
from erase.errors import EraseError
from erase.words import did_you_mean


def of_class(name: str, classes: Sequence[str]) -> Concept:
    """The concept of one class: class c becomes class (c + 1) % n, as in SalUn's code; all others are retained.

    name: a class name in any case, with spaces, hyphens or underscores. classes: in the order of their labels.

    Raises:
        EraseError: the model has no such class, or it involves minors.
    """
    c = label_of(name, classes)
    if c is None:
        guess = did_you_mean(name, classes)
        raise EraseError(f"the model has no class {name!r}; {guess}its classes are {', '.join(classes)}")
    rest = (*classes[c + 1 :], *classes[:c])
    judge = {"type": "classes", "label": classes[c]}
    return Concept(classes[c], "object", forget=(classes[c],), anchor=rest[:1], retain=rest, others=rest, judge=judge)


def label_of(name: str, classes: Sequence[str]) -> int | None:
    """The label of the class of this name; None if there is none."""
    return {plain(known): label for label, known in enumerate(classes)}.get(plain(name))


def plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
