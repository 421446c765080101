"""Methods with a closed form: solve, and put the weights in place inside the mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from erase.errors import EraseError
from erase.families.protocol import Family
from erase.methods.inputs import Text
from erase.methods.protocol import ClosedForm


@torch.no_grad()
def solve(
    model: Family,
    method: ClosedForm,
    text: Text,
    parameters: Mapping[str, Parameter],
    mask: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    """Put a closed form's weights in place, inside the mask only; returns what the method notes of its solution.

    Raises:
        EraseError: the scope holds a parameter that such forms do not know.
    """
    for name in parameters:
        if not model.is_text_map(name):
            raise EraseError(f"closed forms change maps of the text states only, not {name}; use --scope xattn-kv")
    solved = {n: p.detach().cpu() for n, p in parameters.items() if not method.values_only or model.is_value_map(n)}
    new, notes = method.solve(solved, text)
    for name, weights in new.items():
        parameter = parameters[name]
        weights = weights.to(parameter)
        parameter.copy_(weights if mask is None else torch.where(mask[name].to(parameter.device), weights, parameter))
    return notes
