"""Other weights for a while, for attacks that change the network."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from erase.families.protocol import Family


@contextmanager
def changed(network: nn.Module, weights: Mapping[str, Tensor]) -> Generator[None]:
    """Inside, the parameters of these names have these values; outside, they have their own, bit by bit."""
    parameters = dict(network.named_parameters())
    before = {name: parameters[name].detach().clone() for name in weights}
    try:
        _put(parameters, weights)
        yield
    finally:
        _put(parameters, before)


def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The network's parameters by name, without gradients; they share memory with the network."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def networks(model: Family) -> list[Any]:
    """The networks whose weights an attack changes: the one that is trained by default, and the text encoders."""
    return [model.network, *model.text_encoders]
