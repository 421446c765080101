"""Contexts in which a network computes: evaluation mode, and another precision."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import torch

from erase.device import DTYPES, place_of, rounded, staged


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
    """Inside, the network computes in the precision, weights and inputs rounded; what it gives is float32.

    A network on a GPU takes timesteps from the CPU without a wait.
    """
    where: torch.device = place_of(network)
    if precision == "fp32" and where.type != "cuda":
        yield
        return
    forward, own = network.forward, vars(network).get("forward")
    dtype = None if precision == "fp32" else DTYPES[precision]
    names = list(signature(type(network).forward).parameters)[1:]  # of the class: the instance's may be wrapped

    def in_precision(*values: Any, **named: Any) -> Any:
        given = dict(zip(names, values, strict=False)) | named
        if isinstance(given["timestep"], torch.Tensor):
            given["timestep"] = staged(given["timestep"], where)
        if dtype is not None:
            given = {name: x.to(dtype) if name in _ROUNDED else x for name, x in given.items()}
        output: Any = forward(**given)
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


@contextmanager
def compiling(network: Any, is_wanted: bool) -> Iterator[None]:
    """Inside, if wanted, passes of the first batch size are compiled by `torch.compile`; others are not.

    Where it fails, for want of a compiler for instance, a warning says so and nothing is compiled.
    """
    if not is_wanted:
        yield
        return
    forward, own = network.forward, vars(network).get("forward")
    compiled: Any = torch.compile(forward)
    first: int | None = None
    failed = False

    @wraps(forward)
    def dispatched(*values: Any, **named: Any) -> Any:
        nonlocal first, failed
        num = len(next(iter((*values, *named.values()))))  # the latents, in every network
        first = num if first is None else first
        if num != first or failed:
            return forward(*values, **named)
        try:
            with warnings.catch_warnings(action="ignore"):  # of the compiler, which must not end a run
                return compiled(*values, **named)
        except Exception as error:  # of the compiler or Triton, each with its own classes
            if isinstance(error, torch.OutOfMemoryError):
                raise
            failed = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            warnings.warn(f"the network cannot be compiled ({reason:.150}); images take longer", stacklevel=2)
            return forward(*values, **named)

    network.forward = dispatched
    try:
        yield
    finally:
        del network.forward
        if own is not None:
            network.forward = own
