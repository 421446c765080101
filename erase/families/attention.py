"""Attention of a UNet: the probabilities of its cross-attention, and the kernels that compute it."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from erase.errors import EraseError, missing
from erase.families.components import one_line


def cross_attention(unet: UNet2DConditionModel, run: Callable[[], object]) -> list[Tensor]:
    """Probabilities of every cross-attention layer while `run` calls the UNet; see `Family.attention`.

    Fused kernels never hold these, so for this pass the plain processor takes their place; nor does checkpointing.
    """
    from diffusers.models.attention_processor import AttnProcessor

    found: list[Tensor] = []
    layers: Any = {name: m for name, m in unet.named_modules() if name.endswith("attn2")}
    before = {name: layer.processor for name, layer in layers.items()}
    checkpointing = unet.is_gradient_checkpointing

    def keep(layer: Any) -> Any:
        plain = type(layer).get_attention_scores

        def scores(*arguments: Any) -> Tensor:
            found.append(plain(layer, *arguments))
            return found[-1]

        return scores

    try:
        for layer in layers.values():
            layer.processor, layer.get_attention_scores = AttnProcessor(), keep(layer)
        unet.disable_gradient_checkpointing()
        run()
    finally:
        for name, layer in layers.items():
            layer.processor = before[name]
            layer.__dict__.pop("get_attention_scores", None)
        if checkpointing:
            unet.enable_gradient_checkpointing()
    return found


def use_xformers(unet: UNet2DConditionModel, device: torch.device) -> None:
    """Let the UNet compute attention with the kernels of xformers.

    Raises:
        EraseError: its package is missing, or it has no kernels for this device.
    """
    if device.type != "cuda":
        raise EraseError(f"xformers needs a CUDA device but the model is on {device}; leave out --attention")
    try:
        unet.enable_xformers_memory_efficient_attention()
    except ModuleNotFoundError as error:
        raise missing("xformers") from error
    except Exception as error:  # diffusers tries the kernels out, and they fail in their own ways
        raise EraseError(f"xformers cannot be used here ({one_line(error)}); leave out --attention") from error
