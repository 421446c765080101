"""SGD with momentum and weight decay that cannot change a weight outside the mask."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from erase.errors import EraseError
from erase.optim import cuda
from erase.optim.places import Places


class MaskedSGD(torch.optim.SGD):
    """torch's SGD inside the mask, bit for bit on a CPU; outside it not one bit changes.

    Weight decay is added to the gradient before the mask is laid over both, so that momentum stays zero outside. A
    NaN or an infinity outside the mask is dropped too (a product with zero would spread it). On a GPU one Triton kernel
    updates all tensors where it can (`erase.optim.cuda`), with momentum for masked weights only; results are the same
    up to rounding.

    mask: bool tensors of the parameters' shapes under their names; None trains every weight.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter],
        mask: Mapping[str, Tensor] | None,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ):
        parameters = list(named_parameters.values())
        self._fused = cuda.Fused(_places(named_parameters, mask)) if cuda.fits(parameters) else None
        adds_decay = mask is not None and self._fused is None
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=0 if adds_decay else weight_decay)
        self._decay = weight_decay if adds_decay else 0.0
        self._outside: dict[Parameter, Tensor] = {}
        for name, parameter in named_parameters.items():
            if mask is not None and self._fused is None and not mask[name].all():
                self._outside[parameter] = ~mask[name].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; without the kernel the gradients are masked in place."""
        trained = [parameter for parameter in self.param_groups[0]["params"] if parameter.grad is not None]
        if self._fused is not None:
            assert closure is None
            return self._step_on_gpu(self._fused, trained)
        gradients = [parameter.grad for parameter in trained]
        if self._decay and trained:
            torch._foreach_add_(gradients, trained, alpha=self._decay)
        for parameter in trained:
            if parameter in self._outside:
                parameter.grad.masked_fill_(self._outside[parameter], 0)
        return super().step(closure)

    def _step_on_gpu(self, fused: cuda.Fused, trained: Sequence[Parameter]) -> None:
        how = {name: self.param_groups[0][name] for name in ("lr", "momentum", "weight_decay")}
        updates = {}
        for parameter in trained:
            if how["momentum"] and "momentum_buffer" not in self.state[parameter]:
                num = fused.num_masked(parameter)
                self.state[parameter]["momentum_buffer"] = torch.zeros(
                    num, dtype=torch.float32, device=parameter.device
                )
            buffer = self.state[parameter].get("momentum_buffer")
            if buffer is not None and buffer.numel() != fused.num_masked(parameter):
                raise EraseError("the optimizer's state was made on a CPU or with another mask; start again")
            updates[parameter] = parameter.grad, buffer
        fused.sgd(updates, **how)


def _places(parameters: Mapping[str, Parameter], mask: Mapping[str, Tensor] | None) -> dict[Parameter, Places]:
    return {
        parameter: Places(name, parameter.numel(), None if mask is None else mask[name], only_bits=True)
        for name, parameter in parameters.items()
    }
