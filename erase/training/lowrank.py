"""A change of low rank in place of weights: W = W_0 + B A / r, LoRA (Hu et al., ICLR 2022) with alpha 1, as in LECO."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from erase.errors import EraseError
from erase.families.protocol import Family
from erase.words import listed


class _LowRank(nn.Module):
    """Adds B A / r to a weight [m, n, ...]; A: [r, n], uniform within n^-1/2; B: [m, r], zero at first."""

    def __init__(self, weight: Tensor, rank: int, draw: torch.Generator):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        down = torch.empty(rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=draw)
        self.down = Parameter(down.to(weight), requires_grad=False)
        self.up = Parameter(weight.new_zeros(rows, rank), requires_grad=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down / self.down.shape[0]).view_as(weight)


@contextmanager
def factors(
    model: Family, parameters: Mapping[str, Parameter], rank: int, draw: torch.Generator
) -> Iterator[dict[str, Parameter]]:
    """Inside, each matrix among `parameters` that a LoRA can hold is a frozen weight plus a product of rank `rank`.

    Gives the factors by name. Afterwards the weights hold the sums, under their old names.

    parameters: of the network, by name; those that fit no LoRA (biases, norms, convolutions) stay as they are.

    Raises:
        EraseError: none of them fits.
    """
    names = [name for name, parameter in parameters.items() if model.fits_lora(name, parameter)]
    if not names:
        weights = dict(model.network.named_parameters())
        scopes = [
            scope
            for scope, holds in model.scopes.items()
            if any(holds(name) and model.fits_lora(name, weight) for name, weight in weights.items())
        ]
        use = f"use --scope {listed(scopes, 'or')}" if scopes else f"{model.name} has none, leave --rank out"
        raise EraseError(f"--rank needs attention or feed-forward matrices in the scope; {use}")
    added: dict[str, Any] = {name: _LowRank(parameters[name], rank, draw) for name in names}
    modules = {name: model.network.get_submodule(name.removesuffix(".weight")) for name in names}
    try:
        for name, module in modules.items():
            parametrize.register_parametrization(module, "weight", added[name])
        yield {f"{name}.{part}": factor for name in names for part, factor in added[name].named_parameters()}
    finally:
        for module in modules.values():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
