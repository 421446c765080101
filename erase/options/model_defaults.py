"""erase_defaults.json: default settings in a model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erase.errors import EraseError
from erase.files import read_json
from erase.methods import METHODS, others
from erase.options.declare import checked, forms_of
from erase.options.settings import SD_DEFAULTS, Settings

OF_MODEL = (*SD_DEFAULTS, "num_train_steps", "num_inference_steps", "sampler")
_OF_TRAINING = ("rank", "max_grad_norm", "lr_scheduler", "proportion_empty_prompts", "anchor_every")
_OF_METHOD = (*OF_MODEL, "scope", "target", "alpha", "mask_guidance", *_OF_TRAINING, "set")


def read_defaults(path: Path) -> dict[str, Any]:
    """The settings in a model's erase_defaults.json; empty if there is no such file.

    It holds "family", settings of `_OF_MODEL`, and under "methods" settings of `_OF_METHOD` by method.

    Raises:
        EraseError: an unknown name, or a value that the setting does not take.
    """
    if not path.is_file():
        return {}
    found = read_json(path)
    own = {key: value for key, value in found.items() if key not in {"family", "methods"}}
    _check_defaults(own, OF_MODEL, f"{path}")
    of_methods = found.get("methods", {})
    if not isinstance(of_methods, dict) or not all(isinstance(values, dict) for values in of_methods.values()):
        raise EraseError(f"{path}: methods must hold an object of settings for each method")
    if not isinstance(found.get("family", ""), str):
        raise EraseError(f"{path}: family is {found['family']!r}; it must be a string")
    for method, values in of_methods.items():
        if method not in METHODS and method not in others() and ":" not in method:
            raise EraseError(f"{path}: unknown method {method!r}; choose from {', '.join(METHODS)}")
        _check_defaults(values, _OF_METHOD, f"{path}, {method}")
    return found


def of_family(families: Mapping[str, Any], family: str | None) -> dict[str, Any]:
    """The settings that a method's class brings for models of this family; see `Method.settings_for`.

    Raises:
        EraseError: an unknown name, or a value that the setting does not take.
    """
    values, where = families.get(family or "", {}), f"settings_for {family!r}"
    if not isinstance(values, Mapping):
        raise EraseError(f"{where}: it is {values!r}, which is no mapping of settings")
    _check_defaults(dict(values), _OF_METHOD, where)
    return dict(values)


def _check_defaults(values: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for name, value in values.items():
        if name not in known:
            raise EraseError(f"{where}: unknown setting {name!r}; choose from {', '.join(known)}")
        item = Settings.__dataclass_fields__[name]
        if isinstance(value, bool) or value is None or (name == "set") != isinstance(value, list):
            raise EraseError(
                f"{where}: {name} is {value!r}; it must be {'a list of strings' if name == 'set' else 'a value'}"
            )
        try:
            checked(value, item, forms_of(Settings)[name])
        except EraseError as error:
            raise EraseError(f"{where}: {str(error).removeprefix('--').replace('-', '_', name.count('_'))}") from error
        for text in value if name == "set" else ():
            if "=" not in text:
                raise EraseError(f"{where}: set has {text!r}; it must be NAME=VALUE")
