"""Networks that take turns on a device which cannot hold all of them at once, by accelerate's hooks."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from torch import nn


def begin(networks: Sequence[nn.Module], device: torch.device, room: int) -> None:
    """From here on a pass brings its network to the device, and sends the others to the CPU.

    room: bytes of the device for weights. A network with more comes one layer at a time, in each of its passes.
    """
    whole: list[nn.Module] = []
    for network in networks:
        if sum(weights.nbytes for weights in network.parameters()) <= room:
            whole.append(network)
            add_hook_to_module(network, InTurn(device, whole))
        else:
            cpu_offload(network.cpu(), device, offload_buffers=True)


def end(networks: Sequence[nn.Module]) -> None:
    """Each network stays where it is."""
    for network in networks:
        remove_hook_from_module(network, recurse=True)


class InTurn(CpuOffload):
    """Brings a network to the device for a pass, after all `others` went back to the CPU."""

    def __init__(self, device: torch.device, others: Sequence[nn.Module]) -> None:
        super().__init__(device)
        self.others = others

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in self.others:
            if other is not module:
                other.cpu()
        return super().pre_forward(module, *args, **kwargs)
