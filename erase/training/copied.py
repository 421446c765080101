"""The base as a second network, on a GPU that has room for it; the first network keeps its weights meanwhile."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from erase.conditioning import Conditioning
from erase.families.protocol import Family
from erase.methods.inputs import Predictor
from erase.training.replayed import ReplayedModel


class Copied:
    """The model with a copy of its network as it is now, in `dtype`; answers calls as `Exchanged` does.

    replays: calls without gradients are replayed from a CUDA graph.
    """

    def __init__(self, model: Family, dtype: torch.dtype, *, replays: bool = False):
        self._twin = model.using(copied(model.network, dtype))
        self._call: Predictor = ReplayedModel(self._twin, gradients=False) if replays else self._twin

    @contextmanager
    def inside(self) -> Iterator[Family]:
        yield self._twin

    def __call__(self, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        return self._call(x, t, c)

    def attention(self, x: Tensor, t: Tensor, c: Conditioning) -> list[Tensor]:
        return self._twin.attention(x, t, c)

    def text_attention(self, c: Conditioning) -> Tensor:
        return self._twin.text_attention(c)


def copied(network: Any, dtype: torch.dtype) -> Any:
    """A copy of the network in `dtype`, in evaluation mode and without gradients; no second one in another dtype."""
    known: dict[int, Any] = {}
    for parameter in network.parameters():
        data = parameter.detach().to(dtype, copy=True) if parameter.is_floating_point() else parameter.detach().clone()
        known[id(parameter)] = Parameter(data, requires_grad=False)
    found: nn.Module = copy.deepcopy(network, known)
    for buffer in found.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return found.eval()
