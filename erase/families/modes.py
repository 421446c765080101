"""Contexts in which a network computes: evaluation mode, and another precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch

from erase.device import DTYPES, rounded


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode as it was found outside."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


_ROUNDED = {"sample", "hidden_states", "encoder_hidden_states", "pooled_projections"}  # inputs, by forward's names


@contextmanager
def predicting(network: Any, precision: str) -> Iterator[None]:
    """Inside, the network computes in the precision, weights and inputs rounded; what it gives is float32."""
    if precision == "fp32":
        yield
        return
    forward, own, dtype = network.forward, vars(network).get("forward"), DTYPES[precision]
    names = list(signature(forward).parameters)

    def in_precision(*values: Any, **named: Any) -> Any:
        given = dict(zip(names, values, strict=False)) | named
        output: Any = forward(**{name: x.to(dtype) if name in _ROUNDED else x for name, x in given.items()})
        if isinstance(output, tuple):
            return (output[0].float(), *output[1:])
        return type(output)(output.sample.float())

    try:
        network.forward = in_precision
        with rounded(precision, network):
            yield
    finally:
        del network.forward
        if own is not None:
            network.forward = own
