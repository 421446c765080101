"""Masked weights chunk by chunk with torch's operations, on any device."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from erase.optim.places import Places, Update, flat, put, take


class Chunked:
    """Gathers, exchanges and updates the masked weights, one parameter after the other."""

    scales = False  # gradients are multiplied before the step

    def __init__(self, places: Mapping[Parameter, Places]):
        self._places = places

    def take(self) -> dict[Parameter, Tensor]:
        """A copy of the masked weights by parameter, [masked weights]."""
        return {parameter: places.take(parameter) for parameter, places in self._places.items()}

    def exchange(self, values: Mapping[Parameter, Tensor]) -> None:
        """Swap the masked weights and `values`, in place."""
        for parameter, places in self._places.items():
            with flat(parameter) as weights:
                for part, where in places.chunks(parameter.device):
                    before = take(weights, where).clone()
                    put(weights, where, values[parameter][part])
                    values[parameter][part] = before

    def gather(self, parameter: Parameter, dense: Tensor, held: Tensor | None) -> Tensor:
        """The masked values of `dense`, [weights], on any device; added to `held`, if given, in place."""
        places = self._places[parameter]
        found = dense.new_empty(places.num) if held is None else held
        if places.num:
            for part, where in places.chunks(dense.device):
                if held is None:
                    found[part] = take(dense, where)
                else:
                    found[part] += take(dense, where)
        return found

    def square(self, gradients: Mapping[Parameter, tuple[Tensor, bool]]) -> Tensor:
        """The square of the norm of the masked values of all gradients, flat, each with whether it is gathered."""
        squares: list[Tensor] = []
        for parameter, (gradient, is_gathered) in gradients.items():
            if is_gathered:
                squares.append(gradient.float().square().sum())
            else:
                chunks = self._places[parameter].chunks(parameter.device)
                squares += [take(gradient, where).float().square().sum() for _, where in chunks]
        return torch.stack(squares).sum()

    def adam(
        self,
        updates: Sequence[Update],
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        scale: Tensor | None = None,
        halt: Tensor | None = None,
    ) -> None:
        """Step number `step` + 1 of Adam with decoupled weight decay, in place.

        scale: a factor of the gradients, without dimensions; not for this class. halt: int32 without dimensions; if it
        is not 0, nothing changes.
        """
        assert scale is None
        for update in updates:
            parameter, gradient = update.parameter, update.gradient
            num_steps = torch.empty((), dtype=torch.float32, device=parameter.device)
            with flat(parameter) as weights:
                for part, where in self._places[parameter].chunks(parameter.device):
                    g = (gradient[part] if update.is_gathered else take(gradient, where)).float()
                    w = update.master[part] if update.master is not None else take(weights, where)
                    m, v = update.exp_avg[part], update.exp_avg_sq[part]
                    num_steps.fill_(step)  # for every chunk anew, since torch counts its calls in it
                    adamw(
                        *([w], [g], [m], [v], [], [num_steps]),
                        fused=True,  # one pass over the values instead of nine
                        found_inf=None if halt is None else halt.float(),
                        amsgrad=False,
                        maximize=False,
                        beta1=betas[0],
                        beta2=betas[1],
                        lr=lr,
                        weight_decay=weight_decay,
                        eps=eps,
                    )
                    put(weights, where, w)

    def num_bytes(self) -> int:
        """Of where the masked weights are."""
        return sum(places.stored.nbytes for places in self._places.values() if places.stored is not None)
