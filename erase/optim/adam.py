"""Adam whose state exists only for the weights that may move, and that cannot move any other."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim.adamw import adamw

from erase.errors import EraseError
from erase.optim.eight_bit import MOMENTS, EightBit
from erase.optim.places import Places, flat, put, take


class MaskedAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba, 2015) with decoupled weight decay (Loshchilov & Hutter, 2019), inside the mask only.

    Zeroing gradients does not freeze a weight: weight decay and momentum move a weight whose gradient is zero. Here a
    weight outside the mask is never written at all, whatever its gradient. State per masked weight: two float32
    moments, for bfloat16 and float16 parameters also a float32 master, which the parameter is rounded from; a step
    smaller than the parameter's resolution is thus not lost. Masks cost at most one bit a weight, or 4 bytes per one.
    With eight_bit the moments lie in one byte each (Dettmers et al., ICLR 2022: a scale for every 256, bitsandbytes'
    code), in float32 only while their tensor's turn lasts; results are then approximate.

    named_parameters: those to train, by name.
    mask: bool tensors of the parameters' shapes under the same names; None trains every weight.
    lr: size of a step, in units of the weights. betas: memory of the two moments, in [0, 1).
    weight_decay: share of a masked weight that a step takes away, in units of lr.

    Raises:
        EraseError: names or shapes of mask and parameters differ, or a setting is out of its range.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Parameter] | Iterable[tuple[str, Parameter]],
        mask: Mapping[str, torch.Tensor] | None,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eight_bit: bool = False,
    ):
        self._code = EightBit() if eight_bit else None
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not 0 <= value < math.inf:
                raise EraseError(f"{name} {value} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise EraseError(f"betas {betas} must lie in [0, 1)")
        parameters = dict(named_parameters)
        if not parameters:
            raise EraseError("there is no parameter to train; is the scope empty?")
        for name in mask or {}:
            if name not in parameters:
                raise EraseError(f"'{name}' has a mask but is not among the parameters to train")
        self._places = {
            parameter: Places(name, parameter.numel(), None if mask is None else _mask_of(name, parameter, mask))
            for name, parameter in parameters.items()
        }
        self._gathered: dict[Parameter, torch.Tensor] = {}
        super().__init__(parameters.values(), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside, every gradient shrinks to its masked weights as soon as a backward pass has made it.

        So the dense gradients of two tensors are never in memory together. Several backward passes add up as they do
        in `.grad`, bit for bit; `step` and `zero_grad` do what they do without this.
        """
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._gather)
            for parameter, places in self._places.items()
            if places.num < places.total
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _gather(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, Parameter) and parameter.grad is not None
        places, grads = self._places[parameter], parameter.grad.reshape(-1)
        parameter.grad = None
        if parameter in self._gathered:
            held = self._gathered[parameter]
            for part, where in places.chunks(parameter.device):
                held[part] += take(grads, where)
        elif places.num:
            held = self._gathered[parameter] = grads.new_empty(places.num)
            for part, where in places.chunks(parameter.device):
                held[part] = take(grads, where)

    def gradients(self) -> Iterator[torch.Tensor]:
        """Every gradient there is, in the order of the parameters: gathered, [masked weights], or dense."""
        for parameter in self._places:
            held = self._gathered.get(parameter, parameter.grad)
            if held is not None:
                yield held

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._gathered.clear()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `max_norm`, counting masked weights only; returns the norm before.

        Weights that never move must not decide how far the others go.
        """
        squares: list[torch.Tensor] = []
        for parameter, places in self._places.items():
            held = self._gathered.get(parameter)
            if held is not None:
                squares.append(held.float().square().sum())
            elif parameter.grad is not None:
                grads = parameter.grad.reshape(-1)
                chunks = places.chunks(parameter.device)
                squares += [take(grads, where).float().square().sum() for _, where in chunks]
        norm = torch.stack(squares).sum().sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in self.gradients():
            gradient.mul_(scale)
        return norm

    @torch.no_grad()
    def masked_weights(self) -> dict[str, torch.Tensor]:
        """A copy of every masked weight as it is now, by parameter, [masked weights]."""
        return {places.name: places.take(parameter) for parameter, places in self._places.items()}

    @torch.no_grad()
    def exchange(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put `values` into the masked weights and what was there into `values`; twice is nothing, bit for bit."""
        for parameter, places in self._places.items():
            with flat(parameter) as weights:
                for part, where in places.chunks(parameter.device):
                    before = take(weights, where).clone()
                    put(weights, where, values[places.name][part])
                    values[places.name][part] = before
        torch.clear_autocast_cache()  # it holds the weights in another precision, by tensor

    @torch.no_grad()
    def keep_masters(self, exact: Mapping[str, torch.Tensor]) -> None:
        """Begin with masters of the masked weights taken from `exact`, of which the parameters are a rounded copy."""
        for parameter, places in self._places.items():
            self.state[parameter].update(self._initial_state(parameter, places))
            self.state[parameter]["master"] = places.take(exact[places.name]).float().to(parameter.device)

    def give_masters(self) -> dict[str, torch.Tensor]:
        """The masters, by parameter, [masked weights]; ready for `exchange`. The moments are given up."""
        masters = {places.name: self.state[parameter]["master"] for parameter, places in self._places.items()}
        self.state.clear()
        return masters

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = self._gathered.get(parameter, parameter.grad)
                if gradient is not None and self._places[parameter].num:
                    self._update(parameter, gradient.reshape(-1), group)
        return loss

    def _update(self, parameter: Parameter, gradient: torch.Tensor, group: Mapping[str, Any]) -> None:
        """gradient: gathered, [masked weights], or dense, [weights]."""
        places, state = self._places[parameter], self.state[parameter]
        if not state:
            state.update(self._initial_state(parameter, places))
        is_gathered = parameter in self._gathered
        num_steps = torch.empty((), dtype=torch.float32, device=parameter.device)
        (beta1, beta2), options = group["betas"], {name: group[name] for name in ("lr", "weight_decay", "eps")}
        moments = state if self._code is None else {name: self._code.read(state, name) for name in MOMENTS}
        with flat(parameter) as weights:
            for part, where in places.chunks(parameter.device):
                g = (gradient[part] if is_gathered else take(gradient, where)).float()
                w = state["master"][part] if "master" in state else take(weights, where)
                m, v = moments["exp_avg"][part], moments["exp_avg_sq"][part]
                num_steps.fill_(state["step"])  # for every chunk anew, since torch counts its calls in it
                adamw(
                    *([w], [g], [m], [v], [], [num_steps]),
                    fused=True,  # one pass over the values instead of nine
                    amsgrad=False,
                    maximize=False,
                    beta1=beta1,
                    beta2=beta2,
                    **options,
                )
                put(weights, where, w)
        if self._code is not None:
            for name, moment in moments.items():
                self._code.write(state, name, moment)
        state["step"] += 1

    def _initial_state(self, parameter: Parameter, places: Places) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0, "mask": places.checksum}
        for name in MOMENTS:
            state[name] = torch.zeros(places.num, dtype=torch.float32, device=parameter.device)
            if self._code is not None:
                self._code.write(state, name, state[name])
        if parameter.element_size() < 4:
            state["master"] = places.take(parameter).float()
        return state

    def num_bytes(self) -> int:
        """Of the state as it is, and of where the masked weights are."""
        state = (t for each in self.state.values() for t in each.values() if torch.is_tensor(t))
        where = (places.stored for places in self._places.values() if places.stored is not None)
        return sum(tensor.nbytes for tensor in (*state, *where))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()`, bit for bit.

        Raises:
            EraseError: it belongs to another mask.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        states = {p: state_dict["state"][i] for i, p in zip(saved, own, strict=False) if i in state_dict["state"]}
        for parameter, state in states.items():
            places = self._places[parameter]
            if state["mask"] != places.checksum:
                raise EraseError(f"the optimizer's state of '{places.name}' was made with another mask; start again")
        super().load_state_dict(state_dict)
        for parameter, state in states.items():  # again, because torch casts moments to the parameter's dtype
            self.state[parameter] = {
                key: value.to(parameter.device, copy=True) if torch.is_tensor(value) else value
                for key, value in state.items()
            }


def _mask_of(name: str, parameter: Parameter, mask: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name not in mask:
        raise EraseError(f"'{name}' is to be trained but has no mask; leave it out or add one")
    if mask[name].shape != parameter.shape:
        raise EraseError(f"'{name}' has shape {[*parameter.shape]} but its mask {[*mask[name].shape]}")
    return mask[name]
