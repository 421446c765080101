"""SGD with momentum and weight decay that cannot change a weight outside the mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class MaskedSGD(torch.optim.SGD):
    """torch's SGD inside the mask, bit for bit; outside it not one bit changes.

    Weight decay is added to the gradient before the mask is laid over both, so that momentum stays zero outside. A
    NaN or an infinity outside the mask is dropped too (a product with zero would spread it).

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
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay if mask is None else 0)
        self._decay = 0.0 if mask is None else weight_decay
        self._outside: dict[Parameter, Tensor] = {}
        for name, parameter in named_parameters.items():
            if mask is not None and not mask[name].all():
                self._outside[parameter] = ~mask[name].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; the gradients are masked in place."""
        trained = [parameter for parameter in self.param_groups[0]["params"] if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained]
        if self._decay and trained:
            torch._foreach_add_(gradients, trained, alpha=self._decay)
        for parameter in trained:
            if parameter in self._outside:
                parameter.grad.masked_fill_(self._outside[parameter], 0)
        return super().step(closure)
