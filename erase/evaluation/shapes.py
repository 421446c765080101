"""Is a JSON value what its reader expects? One check for every file that the evaluation reads back.

A shape is written as an example of the value:

    str, int, float, bool   a value of this type; float takes int too, and must be finite
    float | None            one of several types
    (shape, None)           null or the shape
    [shape]                 a list of it
    [shape, shape, ...]     a list of exactly these
    {"a": shape, "b?": ...} an object with these keys; one with ? may be missing
    {"*": shape}            any further keys, each with a value of this shape
    {"x", "y"}              one of these values
    Any                     any JSON value
"""

import json
import math
import typing
from typing import Any

from erase.errors import EraseError


def check(value: Any, shape: Any, place: str) -> None:
    """Refuse a value of another shape.

    place: what the value is called in the error, such as "results".

    Raises:
        EraseError: a key is missing or unknown, a value has another type, or is NaN or infinite; with its place.
    """
    if isinstance(shape, tuple):
        if value is not None:
            check(value, shape[0], place)
    elif isinstance(shape, (set, frozenset)):
        if isinstance(value, (list, dict)) or value not in shape:
            raise EraseError(f"{place} is {value!r:.60}; it must be one of {sorted(shape)}")
    elif isinstance(shape, list):
        _check_type(value, list, place)
        if 1 < len(shape) != len(value):
            raise EraseError(f"{place} has {len(value)} values; it must have {len(shape)}")
        for i, (item, of) in enumerate(zip(value, shape if len(shape) > 1 else shape * len(value), strict=True)):
            check(item, of, f"{place}[{i}]")
    elif isinstance(shape, dict):
        _check_type(value, dict, place)
        known = {key.removesuffix("?") for key in shape}
        missing = [key for key in shape if not key.endswith("?") and key != "*" and key not in value]
        unknown = [] if "*" in shape else [key for key in value if key not in known]
        if missing or unknown:
            what = f"lacks '{missing[0]}'" if missing else f"has an unknown key '{unknown[0]}'"
            raise EraseError(f"{place} {what}; its keys are {', '.join(shape)}")
        for key, item in value.items():
            check(item, shape.get(key, shape.get(f"{key}?", shape.get("*"))), f"{place}.{key}")
    elif shape is Any:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise EraseError(f"{place} is no JSON value ({error})") from error
    else:
        _check_type(value, shape, place)


def _check_type(value: Any, shape: Any, place: str) -> None:
    kinds = typing.get_args(shape) or (shape,)
    is_right = type(value) in kinds or (type(value) is int and float in kinds)
    if not is_right or (isinstance(value, float) and not math.isfinite(value)):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise EraseError(f"{place} is {_short(value)}; it must be a {wanted}, and finite")


def _short(value: Any) -> str:
    return repr(str(value)[:60])
