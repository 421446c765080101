"""Gradients for some parameters of a model, for a time."""

from collections.abc import Mapping

from torch.nn import Parameter

from erase.families.protocol import Family


class taking_gradients:
    """Inside, exactly `parameters` take gradients; outside, none of the model does. The network stays in eval mode."""

    def __init__(self, model: Family, parameters: Mapping[str, Parameter], checkpointing: bool):
        self._network, self._parameters, self._checkpointing = model.network, parameters, checkpointing

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
