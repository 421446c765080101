"""Gradients for some parameters of a model, for a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from erase.families.protocol import Family


class taking_gradients:
    """Inside, exactly `parameters` take gradients; outside, none of the model does. The network stays in eval mode."""

    def __init__(self, model: Family, parameters: Mapping[str, Parameter], checkpointing: bool):
        self._network, self._parameters, self._checkpointing = model.denoiser, parameters, checkpointing

    def __enter__(self) -> None:
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        if self._checkpointing:
            self._network.enable_gradient_checkpointing()

    def __exit__(self, *_: object) -> None:
        if self._checkpointing:
            self._network.disable_gradient_checkpointing()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def start_detached(model: Family) -> Iterator[None]:
    """Inside, the maps of the text states pass no gradient through the start token; predictions are the same."""

    def detach(_: Any, __: Any, states: Tensor) -> Tensor | None:
        return torch.cat([states[:, :1].detach(), states[:, 1:]], dim=1) if torch.is_grad_enabled() else None

    maps = [module for name, module in model.denoiser.named_modules() if model.is_text_map(f"{name}.weight")]
    hooks = [module.register_forward_hook(detach) for module in maps]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
