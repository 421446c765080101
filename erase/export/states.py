"""Weights of a UNet by name, with and without their prefix, and their dtype in the base."""

from typing import Any

import torch

from erase.delta import Delta, State, of_component


def base_dtype(change: Delta, base: State) -> torch.dtype | None:
    """The dtype in which the base's UNet lies on the disk, if the delta says so and its values fit.

    base: the restored weights.
    """
    name = change.provenance.get("base_dtype")
    if name not in ("float64", "float32", "float16", "bfloat16"):
        return None
    dtype: torch.dtype = getattr(torch, name)
    floats = [tensor for tensor in base.values() if tensor.is_floating_point()]
    return dtype if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in floats) else None


def unet_state(unet: Any) -> dict[str, Any]:
    """The UNet's weights on the CPU under names that say which part they belong to, as deltas want them."""
    return of_component("unet", {name: tensor.detach().cpu() for name, tensor in unet.state_dict().items()})
