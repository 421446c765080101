"""Contexts in which a network computes: evaluation mode, and another precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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


@contextmanager
def predicting(unet: Any, precision: str) -> Iterator[None]:
    """Inside, the UNet computes in the precision, weights and inputs rounded; what it gives is float32."""
    if precision == "fp32":
        yield
        return
    forward, own, dtype = unet.forward, vars(unet).get("forward"), DTYPES[precision]

    def in_precision(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **more: Any) -> Any:
        output: Any = forward(sample.to(dtype), timestep, encoder_hidden_states.to(dtype), **more)
        if isinstance(output, tuple):
            return (output[0].float(), *output[1:])
        return type(output)(output.sample.float())

    try:
        unet.forward = in_precision
        with rounded(precision, unet):
            yield
    finally:
        del unet.forward
        if own is not None:
            unet.forward = own
