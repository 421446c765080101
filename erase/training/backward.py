"""The gradient of one step: the terms of the loss one after the other, so that only one graph is in memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import Balance, TrainedMethod, Turn
from erase.optim import DualAdam, MaskedAdam
from erase.training.batches import Recipe
from erase.training.losses import exact


def gradients(
    model: Predictor,
    method: TrainedMethod,
    frozen: Predictor,
    parts: Iterator[Batch],
    turn: Turn,
    recipe: Recipe,
    accelerator: Accelerator,
    optimizer: MaskedAdam,
    *,
    together: bool = False,
    reduces: bool = True,
    retain: float = 1.0,
) -> dict[str, Tensor]:
    """Leave the gradient of one step in the parameters; returns its losses. Both are means over all processes.

    frozen: the base, or the model itself if the method needs none. together: see `TrainedMethod.together`.
    reduces: False if the gradients that arrive are means over all processes already.
    retain: a further factor of the retain term.
    """
    values: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {}
    is_apart = method.balance is not None or isinstance(optimizer, DualAdam)
    for batch in parts:
        if together and turn.terms is None:
            with accelerator.autocast():
                terms = dict(method.together(model, frozen, batch))
            if retain != 1:
                terms["retain"] = retain * terms["retain"]
            for name, term in terms.items():
                _add(values, name, exact(term) / recipe.accumulation)
            accelerator.backward(torch.stack([*terms.values()]).sum() / recipe.accumulation)
            continue
        wanted = None if turn.terms is None else dict(turn.terms)
        for name, term in one_by_one(method.loss(model, frozen, batch), accelerator):
            if wanted is not None:
                if name not in wanted:
                    continue
                term = wanted.pop(name) * term
            if name == "retain" and retain != 1:
                term = retain * term
            _add(values, name, exact(term) / recipe.accumulation)
            accelerator.backward(term / recipe.accumulation)
            if is_apart:
                _set_aside(optimizer, found, name)
            if wanted is not None and not wanted:
                break  # the other terms are not even computed
    if is_apart:
        _reduce(found, accelerator)
        _combine(method.balance, optimizer, found)
    elif accelerator.num_processes > 1 and reduces:
        for gradient in optimizer.gradients():
            mean: Any = accelerator.reduce(gradient, reduction="mean")
            gradient.copy_(mean)
    if accelerator.num_processes > 1:
        names = list(values)
        mean: Any = accelerator.reduce(torch.stack([values[n] for n in names]).float(), "mean")
        values = dict(zip(names, mean.unbind(), strict=True))
    return values


def _add(values: dict[str, Tensor], name: str, value: Tensor) -> None:
    values[name] = values[name] + value if name in values else value


def _set_aside(optimizer: MaskedAdam, gradients: dict[str, list[Tensor]], name: str) -> None:
    """Add what the last backward pass left to the gradients of this term, and leave zeros."""
    found = list(optimizer.gradients())
    if name in gradients:
        torch._foreach_add_(gradients[name], found)
    else:
        gradients[name] = list(torch._foreach_mul(found, 1))  # copies, by one launch
    torch._foreach_zero_(found)


def _reduce(gradients: Mapping[str, list[Tensor]], accelerator: Accelerator) -> None:
    """The mean over all processes, in place."""
    if accelerator.num_processes > 1:
        for gradient in (gradient for each in gradients.values() for gradient in each):
            mean: Any = accelerator.reduce(gradient, reduction="mean")
            gradient.copy_(mean)


def _combine(balance: Balance | None, optimizer: MaskedAdam, gradients: Mapping[str, list[Tensor]]) -> None:
    """Replace the gradients by w_f g_f + w_r g_r, or give g_f and g_r to an optimizer that keeps them apart.

    Terms of the loss that are neither "forget" nor "retain", which no balanced method has, belong to g_f.
    """
    forget, retain = gradients["forget"], gradients["retain"]
    for name in sorted(gradients.keys() - {"forget", "retain"}):
        torch._foreach_add_(forget, gradients[name])
    if isinstance(optimizer, DualAdam):
        optimizer.give(forget, retain)
        return
    assert balance is not None
    w_f, w_r = _weights(balance, forget, retain)
    for gradient, weight in ((forget, w_f), (retain, w_r)):
        torch._foreach_mul_(gradient, torch.as_tensor(weight, dtype=gradient[0].dtype, device=gradient[0].device))
    torch._foreach_add_(forget, retain)
    torch._foreach_copy_(list(optimizer.gradients()), forget)


def _weights(balance: Balance, forget: list[Tensor], retain: list[Tensor]) -> tuple[Tensor, Tensor]:
    """w_f and w_r, which `balance` computes from the inner products of the two gradients."""

    products = torch.zeros(3, dtype=torch.float64, device=forget[0].device)
    for part in _batched(forget):
        f, r = (torch.cat([each.view(-1) for each in gradient[part]]).double() for gradient in (forget, retain))
        products += torch.stack([f @ f, f @ r, r @ r])
    return balance(*products)


def _batched(tensors: list[Tensor]) -> Iterator[slice]:
    """Places of tensors that have 2^22 values together, or of one with more, so that few operations see them all."""
    start = size = 0
    for place, tensor in enumerate(tensors):
        if place > start and size + tensor.numel() > 2**22:
            yield slice(start, place)
            start, size = place, 0
        size += tensor.numel()
    yield slice(start, len(tensors))


def one_by_one(loss: Iterator[tuple[str, Tensor]], accelerator: Accelerator) -> Iterator[tuple[str, Tensor]]:
    """The terms one after the other, each computed under autocast when it is asked for; nothing in between is."""
    while True:
        with accelerator.autocast():
            term = next(loss, None)
        if term is None:
            return
        yield term
