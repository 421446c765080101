"""Adam whose state exists only for the weights that may move, and that cannot move any other."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

from erase.errors import EraseError


class MaskedAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba, 2015) with decoupled weight decay (Loshchilov & Hutter, 2019), inside the mask only.

    Zeroing gradients does not freeze a weight: weight decay and momentum move a weight whose gradient is zero. Here a
    weight outside the mask is never written at all, whatever its gradient. State per masked weight: two float32
    moments, for bfloat16 and float16 parameters also a float32 master, which the parameter is rounded from; a step
    smaller than the parameter's resolution is thus not lost. Masks cost at most one bit a weight, or 4 bytes per one.

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
    ):
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
            parameter: _Places(name, parameter.numel(), None if mask is None else _mask_of(name, parameter, mask))
            for name, parameter in parameters.items()
        }
        super().__init__(parameters.values(), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and self._places[parameter].num:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Parameter, group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        places = self._places[parameter]
        weights, grads = parameter.reshape(-1), parameter.grad.reshape(-1)
        state = self.state[parameter]
        if not state:
            state.update(self._initial_state(weights, places))
        state["step"] += 1
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        step_size = lr / (1 - beta1 ** state["step"])
        correction = math.sqrt(1 - beta2 ** state["step"])
        for part, where in places.chunks(parameter.device):
            g = _take(grads, where).float()
            w = state["master"][part] if "master" in state else _take(weights, where)
            m, v = state["exp_avg"][part], state["exp_avg_sq"][part]
            w.mul_(1 - lr * group["weight_decay"])
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w.addcdiv_(m, v.sqrt().div_(correction).add_(eps), value=-step_size)
            _put(weights, where, w)
        if weights.data_ptr() != parameter.data_ptr():  # channels-last: the flat weights are a copy
            parameter.copy_(weights.view_as(parameter))

    @staticmethod
    def _initial_state(weights: torch.Tensor, places: "_Places") -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0, "mask": places.checksum}
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros(places.num, dtype=torch.float32, device=weights.device)
        if weights.element_size() < 4:
            masked = [_take(weights, where) for _, where in places.chunks(weights.device)]
            state["master"] = torch.cat(masked).float()
        return state

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


def clip_masked_grad_norm_(
    parameters: Mapping[str, Parameter], mask: Mapping[str, torch.Tensor] | None, max_norm: float
) -> torch.Tensor:
    """Zero every gradient outside the mask, then scale what is left to a norm of at most `max_norm`.

    Returns the norm of what is left, over all parameters, before the scaling. The other order would let weights that
    never move decide how far the others go. Keep the mask where the parameters are: it is copied there otherwise.
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.grad is not None}
    if mask is not None:
        for name, parameter in trained.items():
            assert parameter.grad is not None
            outside = _mask_of(name, parameter, mask).to(parameter.device).logical_not()
            parameter.grad.masked_fill_(outside, 0)  # not a product, because 0 * NaN is NaN
    return torch.nn.utils.clip_grad_norm_(trained.values(), max_norm)


def _mask_of(name: str, parameter: Parameter, mask: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name not in mask:
        raise EraseError(f"'{name}' is to be trained but has no mask; leave it out or add one")
    if mask[name].shape != parameter.shape:
        raise EraseError(f"'{name}' has shape {[*parameter.shape]} but its mask {[*mask[name].shape]}")
    return mask[name]


class _Places:
    """Where one parameter's masked weights are: everywhere, at int32 indices (few), or in packed bits (many).

    Indices take 32 bits per one, bits 1 per weight and longer to walk: below a quarter of ones indices are faster.
    """

    def __init__(self, name: str, total: int, mask: torch.Tensor | None):
        self.name, self.total = name, total
        self.num = total if mask is None else int(mask.count_nonzero())
        self.checksum = 0  # of a mask that is all ones
        self._stored: torch.Tensor | None = None
        if mask is not None and self.num < total:
            bits = mask.detach().cpu().reshape(-1)
            packed = np.packbits(bits.numpy())
            self.checksum = zlib.crc32(packed.tobytes())
            self._stored = _nonzero(bits).int() if self.num < total / 4 else torch.from_numpy(packed)

    def chunks(self, device: torch.device) -> Iterator[tuple[slice, slice | torch.Tensor]]:
        """Pairs of a slice of the compact state [num] and its places in the flat parameter [total], cache by cache."""
        size = 1 << 18 if device.type == "cpu" else 1 << 25
        if self._stored is None:
            for start in range(0, self.total, size):
                yield slice(start, start + size), slice(start, start + size)
            return
        self._stored = self._stored.to(device)
        if self._stored.dtype == torch.int32:
            for start in range(0, self.num, size):
                yield slice(start, start + size), self._stored[start : start + size].long()
            return
        table, done = _BYTES.to(device), 0
        for number, packed in enumerate(self._stored.split(size // 8)):
            bits = table.index_select(0, packed.int()).view(torch.bool)
            where = _nonzero(bits).add_(number * size)
            yield slice(done, done + len(where)), where
            done += len(where)


# The eight bools of every byte, as one int64 that is made of them.
_BYTES = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)).view(np.int64))


def _nonzero(bits: torch.Tensor) -> torch.Tensor:
    """Indices of the ones, int64; numpy's is 6 to 10 times as fast as torch's on a CPU."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(bits.numpy()))
    return bits.nonzero().view(-1)


def _take(flat: torch.Tensor, where: slice | torch.Tensor) -> torch.Tensor:
    return flat[where] if isinstance(where, slice) else flat.index_select(0, where)


def _put(flat: torch.Tensor, where: slice | torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(where, slice):
        flat[where] = values
    else:
        flat.scatter_(0, where, values.to(flat.dtype))  # on a CPU twice as fast as index_copy_
