"""Training steps of classifiers whose passes are replayed from CUDA graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from erase import device
from erase.graphs import Replayed

AFTER = 20  # passes that are computed first, so that a short training makes no graphs


class _Pass(nn.Module):
    """The model's forward pass, whatever its `forward` will be."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._compute: Callable[..., Any] = model.forward
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(x)


@contextmanager
def replaying(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside, on a GPU, the model's first pass with gradients of every step is replayed; gives what begins a step.

    Passes in eval mode, of a copy of the model, and while a module of it has hooks are computed.
    """
    if not device.has_graphs(next(model.parameters()).device):
        yield lambda: None
        return
    own: Any = vars(model).get("forward")
    replayed = Replayed(_Pass(model), after=AFTER)

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        if module is model and module.training and not _is_hooked(module):
            return replayed(x)
        return type(module).forward(module, x) if own is None else own.__func__(module, x)

    model.forward = MethodType(forward, model)  # bound, so that a copy of the model calls itself
    try:
        yield replayed.new_step
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _is_hooked(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
