"""Gradients for some parameters of a model, for a time."""

from collections.abc import Mapping

from torch.nn import Parameter

from erase.families.sd import Model


class taking_gradients:
    """Inside, exactly `parameters` take gradients; outside, none of the model does. The UNet stays in eval mode."""

    def __init__(self, model: Model, parameters: Mapping[str, Parameter], checkpointing: bool):
        self._unet, self._parameters, self._checkpointing = model.unet, parameters, checkpointing

    def __enter__(self) -> None:
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        if self._checkpointing:
            self._unet.enable_gradient_checkpointing()

    def __exit__(self, *_: object) -> None:
        if self._checkpointing:
            self._unet.disable_gradient_checkpointing()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
