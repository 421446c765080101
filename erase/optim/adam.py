"""Adam with state for masked weights only; it cannot change other weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter

from erase.errors import EraseError
from erase.optim import cuda
from erase.optim.chunked import Chunked
from erase.optim.eight_bit import MOMENTS, EightBit
from erase.optim.places import Places, Update


class MaskedAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba, 2015) with decoupled weight decay (Loshchilov & Hutter, 2019), inside the mask only.

    Zeroing gradients does not freeze a weight: weight decay and momentum change a weight whose gradient is zero. Here a
    weight outside the mask is never written at all, whatever its gradient. State per masked weight: two float32
    moments, for bfloat16 and float16 parameters also a float32 master, which the parameter is rounded from; a step
    smaller than the parameter's resolution is thus not lost. Masks cost at most one bit a weight, or 4 bytes per one.
    On a GPU Triton kernels do the work where they can (`erase.optim.cuda`); state and results are the same up to
    rounding, so that one device can continue what another began.
    With eight_bit the moments lie in one byte each (Dettmers et al., ICLR 2022: a scale for every 256, bitsandbytes'
    code), in float32 only while their tensor's turn lasts; results are then approximate.

    named_parameters: those to train, by name.
    mask: bool tensors of the parameters' shapes under the same names; None trains every weight.
    lr: size of a step, in units of the weights. betas: memory of the two moments, in [0, 1).
    weight_decay: share of a masked weight that a step takes away, in units of lr.
    halt: if given, an int32 tensor without dimensions on the parameters' device; while it is not 0, `step` changes no
        weight and no moment, without waiting to learn which it is. The steps are counted all the same; see `uncount`.

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
        is_fused = cuda.fits([*parameters.values()])
        self._places = {
            parameter: Places(
                name,
                parameter.numel(),
                None if mask is None else _mask_of(name, parameter, mask),
                only_bits=is_fused,
            )
            for name, parameter in parameters.items()
        }
        self._engine = cuda.Fused(self._places) if is_fused else Chunked(self._places)
        self._gathered: dict[Parameter, torch.Tensor] = {}
        self._scale: torch.Tensor | None = None  # of the gradients, left to the next step
        self.halt: torch.Tensor | None = None
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
        grads = parameter.grad.reshape(-1)
        parameter.grad = None
        if self._places[parameter].num:
            self._gathered[parameter] = self._engine.gather(parameter, grads, self._gathered.get(parameter))

    def gradients(self) -> Iterator[torch.Tensor]:
        """Every gradient there is, in the order of the parameters: gathered, [masked weights], or dense."""
        for parameter in self._places:
            held = self._gathered.get(parameter, parameter.grad)
            if held is not None:
                yield held

    def with_gradient(self) -> list[Parameter]:
        """The parameters whose gradients `gradients` yields, in its order."""
        return [parameter for parameter in self._places if self._gradient(parameter) is not None]

    def set_gradients(self, gradients: Mapping[Parameter, torch.Tensor]) -> None:
        """Put these in the place of the gradients: gathered, [masked weights], or dense."""
        for parameter, gradient in gradients.items():
            if gradient.numel() == self._places[parameter].num:
                self._gathered[parameter] = gradient.reshape(-1)
            else:
                parameter.grad = gradient

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._gathered.clear()
        self._scale = None

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, *, summed: Callable[[torch.Tensor], torch.Tensor] = lambda square: square
    ) -> torch.Tensor:
        """Scale the gradients to a norm of at most `max_norm`, counting masked weights only; returns the norm before.

        Weights that never change must not influence the step size of the others. Kernels scale while they step.

        summed: adds the squares of the norms up over processes that each hold some of the weights.
        """
        square = self._engine.square({p: self._as_given(p) for p in self._places if self._gradient(p) is not None})
        norm = summed(square).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        if self._engine.scales:
            self._scale = scale.float()
        else:
            for gradient in self.gradients():
                gradient.mul_(scale)
        return norm

    @torch.no_grad()
    def masked_weights(self) -> dict[str, torch.Tensor]:
        """A copy of every masked weight as it is now, by parameter, [masked weights]."""
        return {self._places[parameter].name: taken for parameter, taken in self._engine.take().items()}

    @torch.no_grad()
    def exchange(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put `values` into the masked weights and what was there into `values`; twice is nothing, bit for bit."""
        self._engine.exchange({parameter: values[places.name] for parameter, places in self._places.items()})
        torch.clear_autocast_cache()  # it holds the weights in another precision, by tensor

    @torch.no_grad()
    def keep_masters(self, exact: Mapping[str, torch.Tensor]) -> None:
        """Begin with masters of the masked weights taken from `exact`, of which the parameters are a rounded copy."""
        for parameter, places in self._places.items():
            self.state[parameter].update(self._initial_state(parameter, places))
            self.state[parameter]["master"] = self._masked(parameter, exact[places.name])

    def _masked(self, parameter: Parameter, tensor: torch.Tensor) -> torch.Tensor:
        """The masked values of a tensor of the parameter's shape, float32."""
        values = tensor.detach().to(parameter.device).reshape(-1)
        return self._engine.gather(parameter, values, None).float()

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
            by_step: dict[int, list[Parameter]] = {}
            for parameter in group["params"]:
                if self._gradient(parameter) is not None and self._places[parameter].num:
                    state = self.state[parameter]
                    if not state:
                        state.update(self._initial_state(parameter, self._places[parameter]))
                    by_step.setdefault(state["step"], []).append(parameter)
            for num_steps, parameters in by_step.items():
                self._update(parameters, num_steps, group)
        self._scale = None
        return loss

    def set_learning_rate(self, lr: float) -> None:
        """Size of the steps from the next one on."""
        for group in self.param_groups:
            group["lr"] = lr

    def uncount(self, num: int) -> None:
        """Take `num` steps that `halt` has skipped out of the count of steps."""
        for state in self.state.values():
            state["step"] -= num

    def _gradient(self, parameter: Parameter) -> torch.Tensor | None:
        return self._gathered.get(parameter, parameter.grad)

    def _as_given(self, parameter: Parameter) -> tuple[torch.Tensor, bool]:
        """The gradient, flat, and whether it is gathered."""
        gradient = self._gradient(parameter)
        assert gradient is not None
        return gradient.reshape(-1), parameter in self._gathered

    def _update(self, parameters: list[Parameter], num_steps: int, group: Mapping[str, Any]) -> None:
        """A step of parameters that have taken `num_steps` so far; 8-bit moments are unpacked one tensor at a time."""
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        options |= {"step": num_steps, "scale": self._scale, "halt": self.halt}
        if self._code is None:
            self._engine.adam(
                [self._as_update(parameter, self.state[parameter]) for parameter in parameters], **options
            )
        else:
            for parameter in parameters:
                state = self.state[parameter]
                moments = {name: self._code.read(state, name) for name in MOMENTS}
                self._engine.adam([self._as_update(parameter, {**state, **moments})], **options)
                for name, moment in moments.items():
                    self._code.write(state, name, moment, self.halt)
        for parameter in parameters:
            self.state[parameter]["step"] += 1

    def _as_update(self, parameter: Parameter, state: Mapping[str, Any]) -> Update:
        m, v = (state[name] for name in MOMENTS)
        return Update(parameter, *self._as_given(parameter), m, v, state.get("master"))

    def _initial_state(self, parameter: Parameter, places: Places) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0, "mask": places.checksum}
        for name in MOMENTS:
            state[name] = torch.zeros(places.num, dtype=torch.float32, device=parameter.device)
            if self._code is not None:
                self._code.write(state, name, state[name])
        if parameter.element_size() < 4:
            state["master"] = self._masked(parameter, parameter)
        return state

    @property
    def num_masked(self) -> int:
        """How many weights may change."""
        return sum(places.num for places in self._places.values())

    def num_bytes(self) -> int:
        """Of the state as it is, and of where the masked weights are."""
        state = (t for each in self.state.values() for t in each.values() if torch.is_tensor(t))
        return sum(tensor.nbytes for tensor in state) + self._engine.num_bytes()

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
