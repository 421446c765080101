"""Which parameters may change at all, by name: the scopes of ESD (Gandikota et al., ICCV 2023) and of SalUn."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from erase.errors import EraseError
from erase.words import did_you_mean

T = TypeVar("T")

_OUTSIDE = ("conv_out", "conv_norm_out")  # what CompVis calls `out.`
SCOPES: Mapping[str, Callable[[str], bool]] = {
    "full": lambda name: True,
    "xattn": lambda name: ".attn2." in name,
    "xattn-kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "attn": lambda name: ".attn1." in name or ".attn2." in name,
    "selfattn": lambda name: ".attn1." in name,
    "noxattn": lambda name: ".attn2." not in name and not name.startswith((*_OUTSIDE, "time_embedding")),
    "notime": lambda name: not name.startswith((*_OUTSIDE, "time_embedding")),
}


def inside(
    parameters: Mapping[str, T], scope: str, scopes: Mapping[str, Callable[[str], bool]] = SCOPES
) -> dict[str, T]:
    """The entries whose diffusers name is in the scope, in their order.

    scopes: those of the model's family, by name.

    Raises:
        EraseError: unknown scope, or nothing of this model is in it.
    """
    if scope not in scopes:
        raise no_scope(scope, scopes)
    chosen = {name: value for name, value in parameters.items() if scopes[scope](name)}
    if not chosen:
        raise EraseError(f"scope {scope!r} holds none of this model's {len(parameters)} parameters")
    return chosen


def no_scope(scope: str, scopes: Iterable[str]) -> EraseError:
    """What to say of an unknown scope. scopes: those of the model."""
    known = list(scopes)
    guess = "" if scope in SCOPES else did_you_mean(scope, known)  # a scope of other models is no slip
    hint = guess or "choose one of this model's "
    return EraseError(f"--scope is {scope!r}, which this model does not have; {hint}({', '.join(known)})")
