"""Adam with moments of their own for the forget and the retain gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from erase.errors import EraseError
from erase.optim.adam import MaskedAdam

OF_RETAIN = "retain/"  # in front of the names of the retain moments in a state_dict


class DualAdam(MaskedAdam):
    """theta <- theta - lr (m_f / (sqrt(v_f) + eps) + m_r / (sqrt(v_r) + eps)), each m and v corrected for its bias.

    DualOptim (Zhong et al., NeurIPS 2025): with one set of moments the larger of the two gradients decides the step of
    both. Here the forget gradient has the moments m_f and v_f, the retain gradient m_r and v_r, all inside the mask.
    Both gradients are of the same weights; `step` takes them from `give`. Weight decay is applied once.
    A second set of moments takes the memory of the first; on a GPU the mask's packed bits are stored twice.

    Arguments: see `MaskedAdam`. Parameters must be float32: the moments could not share a master.
    """

    def __init__(
        self, named_parameters: Mapping[str, Parameter], mask: Mapping[str, torch.Tensor] | None, **options: Any
    ):
        if any(parameter.element_size() < 4 for parameter in named_parameters.values()):
            raise EraseError("the dual optimizer needs float32 weights; use --weights fp32")
        super().__init__(named_parameters, mask, **{**options, "weight_decay": 0.0})
        self.of_retain = MaskedAdam(named_parameters, mask, **options)
        self._given: dict[str, dict[Parameter, torch.Tensor]] = {}

    def give(self, forget: Sequence[torch.Tensor], retain: Sequence[torch.Tensor]) -> None:
        """The two gradients of the next step, in the order of `gradients`; they replace those that are there."""
        parameters = self.with_gradient()
        both = {"forget": forget, "retain": retain}
        self._given = {name: dict(zip(parameters, gradients, strict=True)) for name, gradients in both.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step by the forget gradient and one by the retain gradient; both must have been given."""
        assert closure is None and self._given
        self.of_retain.halt = self.halt
        self.of_retain.set_gradients(self._given["retain"])
        self.of_retain.step()
        self.of_retain.zero_grad()
        self.set_gradients(self._given["forget"])
        super().step()
        self._given = {}

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, *, summed: Callable[[torch.Tensor], torch.Tensor] = lambda square: square
    ) -> torch.Tensor:
        """Scale each of the two gradients to a norm of at most `max_norm`; returns the larger norm before."""
        norms: list[torch.Tensor] = []
        for gradients in self._given.values():
            of_each = torch._foreach_norm([*gradients.values()], dtype=torch.float32)
            norms.append(summed(torch.stack(of_each).square().sum()).sqrt())
            torch._foreach_mul_([*gradients.values()], (max_norm / (norms[-1] + 1e-6)).clamp(max=1))
        return torch.stack(norms).max()

    def set_learning_rate(self, lr: float) -> None:
        super().set_learning_rate(lr)
        self.of_retain.set_learning_rate(lr)

    def uncount(self, num: int) -> None:
        super().uncount(num)
        self.of_retain.uncount(num)

    def num_bytes(self) -> int:
        return super().num_bytes() + self.of_retain.num_bytes()

    def state_dict(self) -> dict[str, Any]:
        """Of both: the retain moments have names with `OF_RETAIN` in front."""
        found, retain = super().state_dict(), self.of_retain.state_dict()["state"]
        for number, state in found["state"].items():
            found["state"][number] = {**state, **{OF_RETAIN + key: value for key, value in retain[number].items()}}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own: dict[int, dict[str, Any]] = {}
        retain: dict[int, dict[str, Any]] = {}
        for number, state in state_dict["state"].items():
            own[number] = {key: value for key, value in state.items() if not key.startswith(OF_RETAIN)}
            retain[number] = {
                key.removeprefix(OF_RETAIN): value for key, value in state.items() if key.startswith(OF_RETAIN)
            }
        super().load_state_dict({**state_dict, "state": own})
        self.of_retain.load_state_dict({"state": retain, "param_groups": self.of_retain.state_dict()["param_groups"]})
