"""Masked weights on a GPU: one kernel launch for all tensors, and no wait for the device."""

import functools
import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from erase import device
from erase.optim.places import Places, Update

BLOCK = 1024  # of `kernels`, which is imported only where triton is
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(parameters: Sequence[Parameter]) -> bool:
    """Whether `Fused` can hold these parameters: Triton is there, and they are alike."""
    first = parameters[0]
    alike = all(
        p.device == first.device and p.dtype == first.dtype and p.is_contiguous() and p.numel() < 2**31
        for p in parameters
    )
    return alike and first.dtype in DTYPES and device.has_kernels(first.device) and _compiles(first.device)


@functools.cache
def _compiles(where: torch.device) -> bool:
    """Whether every kernel runs on the device; Triton needs a C compiler, which not every machine has."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Triton's own, which must not end a run
            _run_every_kernel(where)
    except Exception as error:  # of the compiler, the driver or Triton, each with its own classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        warnings.warn(f"Triton cannot be used ({reason:.150}); the optimizer takes a slower path", stacklevel=2)
        return False
    return True


def _run_every_kernel(where: torch.device) -> None:
    """Gather, exchange and update one weight."""
    weight = Parameter(torch.ones(1, device=where))
    fused = Fused({weight: Places("", 1, None)})
    fused.exchange({weight: fused.take()[weight]})
    gradient = fused.gather(weight, torch.ones(1, device=where), None)
    fused.gather(weight, gradient, gradient.clone())
    m, v = (torch.zeros(1, device=where) for _ in range(2))
    update = Update(weight, gradient, True, m, v, None)
    fused.adam([update], step=0, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    fused.sgd({weight: (gradient, m)}, lr=0.0, momentum=0.9, weight_decay=0.0)


class Fused:
    """Gathers, exchanges and updates the masked weights of all parameters; `erase.optim.chunked` is the other way.

    Where the masked weights are takes one bit a weight and 8 bytes for every 1,024 weights. All of it is made once;
    afterwards nothing here waits for the device: addresses go there from pinned memory.
    """

    scales = True  # the clip factor is applied inside the step

    def __init__(self, places: Mapping[Parameter, Places]):
        self._kernels: Any = importlib.import_module("erase.optim.kernels")
        self._places = places
        self.device = next(iter(places)).device
        self._full = all(each.num == each.total for each in places.values())
        counts = [-(-each.total // BLOCK) for each in places.values()]
        starts = np.cumsum([0, *counts])
        self._blocks = {p: (int(start), count) for p, start, count in zip(places, starts[:-1], counts, strict=True)}
        before, bits = np.zeros(starts[-1], np.int32), np.zeros((0 if self._full else starts[-1], BLOCK // 8), np.uint8)
        if not self._full:
            for each, start, count in zip(places.values(), starts[:-1], counts, strict=True):
                rows = bits[start : start + count].reshape(-1)
                rows[: -(-each.total // 8)] = _packed(each)
                ones = np.bitwise_count(bits[start : start + count]).sum(axis=1, dtype=np.int64)
                before[start : start + count] = np.cumsum(ones) - ones
                each.stored = None
        numbers = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        totals = np.array([each.total for each in places.values()], np.int32)
        arrays = (bits.reshape(-1), numbers, before, starts[:-1].astype(np.int32), totals)
        self.stored = tuple(torch.from_numpy(array).to(self.device) for array in arrays)

    def num_masked(self, parameter: Parameter) -> int:
        return self._places[parameter].num

    def take(self) -> dict[Parameter, Tensor]:
        """A copy of the masked weights by parameter, [masked weights]."""
        taken = {p: p.detach().new_empty(each.num) for p, each in self._places.items()}
        self._exchange(taken, swap=False)
        return taken

    def exchange(self, values: Mapping[Parameter, Tensor]) -> None:
        """Swap the masked weights and `values`, in place."""
        self._exchange(values, swap=True)

    def _exchange(self, values: Mapping[Parameter, Tensor], *, swap: bool) -> None:
        assert all(value.dtype == p.dtype and value.is_contiguous() for p, value in values.items())
        rows = [
            [p.data_ptr(), values[p].data_ptr()] if p in values and each.num else [0, 0]
            for p, each in self._places.items()
        ]
        how = {"dtype": self._dtype(next(iter(self._places)).dtype), "SWAP": swap}
        self._launch(self._kernels.exchange, (self._table(rows),), (), **how)

    def gather(self, parameter: Parameter, dense: Tensor, held: Tensor | None) -> Tensor:
        """The masked values of `dense`, [weights], on the parameter's device; added to `held`, if given, in place."""
        dense = dense.contiguous()
        found = dense.new_empty(self._places[parameter].num) if held is None else held
        if len(found):
            self._launch(self._kernels.gather, (dense, found), (), only=parameter, ADD=held is not None)
        return found

    def square(self, gradients: Mapping[Parameter, tuple[Tensor, bool]]) -> Tensor:
        """The square of the norm of the masked values of all gradients, flat, each with whether it is gathered."""
        masked = [
            gradient if is_gathered else self.gather(parameter, gradient, None)
            for parameter, (gradient, is_gathered) in gradients.items()
            if self._places[parameter].num
        ]
        return torch.stack(torch._foreach_norm(masked, dtype=torch.float32)).square().sum()

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
        """Step number `step` + 1 of the parameters in `updates`; see `erase.optim.chunked.Chunked.adam`."""
        by = {update.parameter: update for update in updates}
        first = updates[0]
        kept = []  # keeps a contiguous copy of a gradient until the kernel is queued
        rows = []
        for parameter in self._places:
            update = by.get(parameter)
            if update is None:
                rows.append([0] * 6)
                continue
            gradient = update.gradient.contiguous()
            kept.append(gradient)
            address = gradient.data_ptr()
            masters = 0 if update.master is None else update.master.data_ptr()
            where = (0, address) if update.is_gathered else (address, 0)
            moments = update.exp_avg.data_ptr(), update.exp_avg_sq.data_ptr()
            rows.append([parameter.data_ptr(), *where, *moments, masters])
        (beta1, beta2), t = betas, step + 1
        numbers = (lr / (1 - beta1**t), lr * weight_decay, 1 - beta1, beta2, 1 - beta2, (1 - beta2**t) ** 0.5, eps)
        table = self._table(rows)
        tensors = (table, table if scale is None else scale, table if halt is None else halt)
        flags = {"MASTERS": first.master is not None, "SCALED": scale is not None, "HALTS": halt is not None}
        only = first.parameter if len(updates) == 1 else None
        self._launch(self._kernels.adam, tensors, numbers, only=only, dtype=self._dtype(kept[0].dtype), **flags)

    def sgd(
        self,
        updates: Mapping[Parameter, tuple[Tensor, Tensor | None]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        """A step of SGD, in place.

        updates: of each parameter, its gradient in its own shape, and the momentum of its masked weights, float32
            [masked weights]; None for every parameter if `momentum` is 0.
        """
        gradients = {parameter: gradient.contiguous() for parameter, (gradient, _) in updates.items()}  # until queued
        rows = [[0] * 3 for _ in self._places]
        for row, (parameter, places) in zip(rows, self._places.items(), strict=True):
            if parameter in updates and places.num:
                buffer = updates[parameter][1]
                row[:] = [
                    parameter.data_ptr(),
                    gradients[parameter].data_ptr(),
                    0 if buffer is None else buffer.data_ptr(),
                ]
        how = {"dtype": self._dtype(next(iter(self._places)).dtype), "MOMENTUM": momentum != 0}
        self._launch(self._kernels.sgd, (self._table(rows),), (lr, momentum, weight_decay), **how)

    def num_bytes(self) -> int:
        """Of where the masked weights are."""
        return sum(tensor.nbytes for tensor in self.stored)

    def _table(self, rows: list[list[int]]) -> Tensor:
        return device.staged(torch.tensor(rows, dtype=torch.int64), self.device)

    def _dtype(self, dtype: torch.dtype) -> Any:
        return getattr(self._kernels.tl, str(dtype).removeprefix("torch."))

    def _launch(
        self, kernel: Any, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], *, only: Parameter | None = None,
        **constants: Any,
    ) -> None:  # fmt: skip
        """only: the one tensor that the launch works on; None is all."""
        start, count = (0, len(self.stored[1])) if only is None else self._blocks[only]
        if count:
            kernel[(count,)](*tensors, *self.stored, start, *numbers, **constants, FULL=self._full, BLOCK=BLOCK)


def _packed(places: Places) -> np.ndarray:
    """The bits of one parameter's mask, first bit highest."""
    if places.num == places.total:
        return np.packbits(np.ones(places.total, np.bool_))
    assert places.stored is not None
    return places.stored.numpy()
