"""CUDA graphs: a network's forward and backward pass as one launch each instead of one for every operation."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from erase import device

NOT_EQUAL = 0.05  # of the norm; bf16 passes in another order differ by about 0.01


class Replayed:
    """The output of a module for tensors; calls of one shape are replayed from CUDA graphs, all others are computed.

    Passes of small networks, and of large ones for few images, are bound by launches. A replay is one launch. The
    graphs are made by `torch.cuda.make_graphed_callables` and compared with the module itself before they are used.
    Where they cannot be made or differ, a warning says so and the module computes every call.

    Of the passes with gradients only the first of each step is replayed, see `new_step`: the graph has one set of
    activations and gradients, which a second pass would overwrite. Results without gradients are copied, so they may
    be kept.

    module: returns one tensor for tensors. Its parameters and buffers must stay where they are in memory.
    gradients: replay calls with gradients; otherwise those without.
    after: such calls that are computed before the graphs are made, which takes as long as some ten calls.
    """

    def __init__(self, module: nn.Module, *, gradients: bool = True, after: int = 0):
        self._module, self._compute, self._gradients = module, module.forward, gradients
        self._left, self._is_free = after, True
        self._shapes: tuple[Any, ...] | None = None  # of the calls that are replayed
        self._graph: Callable[..., Tensor] | None = None
        first = next(module.parameters(), None)
        self._is_possible = first is not None and device.has_graphs(first.device)

    def new_step(self) -> None:
        """The gradients of the last step are not needed any more."""
        self._is_free = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        fits = torch.is_grad_enabled() == self._gradients and not any(tensor.requires_grad for tensor in inputs)
        if not self._is_possible or not fits:
            return self._compute(*inputs)
        if self._gradients:
            if not self._is_free:
                return self._compute(*inputs)
            self._is_free = False
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if self._shapes is None and self._left:
            self._left -= 1
            return self._compute(*inputs)
        if self._shapes is None:
            self._shapes, self._graph = shapes, self._made(inputs)
        if self._graph is None or shapes != self._shapes:
            return self._compute(*inputs)
        return self._graph(*inputs) if self._gradients else self._graph(*inputs).clone()

    def _made(self, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor] | None:
        """The graphs; None if there are none that compute what the module computes. Buffers stay as they are."""
        before = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch, which must not end a run
                expected = self._outcome(self._compute, inputs)
                samples = tuple(tensor.detach().clone() for tensor in inputs)
                graphed: Any = torch.cuda.make_graphed_callables(self._module, samples, allow_unused_input=True)
                found = self._outcome(graphed, inputs)
            apart = max(_apart(a, b) for a, b in zip(found, expected, strict=True))
            if not apart < NOT_EQUAL:
                raise RuntimeError(f"it differs from the network by {apart:.2g}")
            return graphed
        except Exception as error:  # of torch, the driver or a library, each with its own classes
            self._is_possible = False
            with suppress(AttributeError):
                del self._module.forward  # which torch may have replaced
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            warnings.warn(f"a CUDA graph cannot be used ({reason:.150}); steps are slower", stacklevel=2)
            return None
        finally:
            for buffer, value in before:
                buffer.copy_(value)

    def _outcome(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Copies of the output, and with gradients of those of its mean square for some parameters."""
        output = compute(*inputs)
        if not output.requires_grad:
            return [output.clone()]
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        some = trained[:: max(1, len(trained) // 8)]
        found = torch.autograd.grad(output.float().square().mean(), some, allow_unused=True)
        return [output.detach().clone(), *(g.clone() for g in found if g is not None)]


def _apart(one: Tensor, other: Tensor) -> float:
    """The norm of the difference as a share of the larger norm."""
    one, other = one.float(), other.float()
    return float((one - other).norm() / torch.maximum(one.norm(), other.norm()).clamp(min=1e-20))
