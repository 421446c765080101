"""Factors of the forget and the retain gradient, from their inner products: ff = <g_f, g_f>, fr = <g_f, g_r>, rr.

Each needs both gradients of the masked weights at once, which a weighted sum of the losses does not. All numbers are
float64 tensors without dimensions, on the gradients' device, so that no step waits for a GPU.
"""

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from erase.methods.protocol import Balance, TrainedMethod


def nash(ff: Tensor, fr: Tensor, rr: Tensor) -> tuple[Tensor, Tensor]:
    """w = 1 / (||g|| sqrt(1 + cos)) for each: both losses fall alike (MUNBa, Wu & Harandi, 2024).

    Their closed form simplified; the step has length sqrt(2) whatever the gradients' lengths. As cos goes to -1 it has
    no solution; there each gradient gives up what opposes the other (PCGrad, Yu et al., NeurIPS 2020).
    """
    cos = fr / (ff * rr).sqrt()
    is_zero, is_opposite = (ff == 0) | (rr == 0), 1 + cos < 1e-3
    w_f, w_r = (
        torch.where(is_opposite, 1 - fr / own, 1 / (own * (1 + cos)).sqrt()).masked_fill(is_zero, 1) for own in (ff, rr)
    )
    return w_f, w_r


def conflicting(ff: Tensor, fr: Tensor, rr: Tensor) -> tuple[Tensor, Tensor]:
    """g_f - min(0, <g_f, g_r>) / ||g_r||^2 g_r: the retain gradient only as far as forgetting raises the retain loss.

    The conflict rule of AEGIS (ICLR 2026) at its full strength, omega = 1. As `projected`, without the retain gradient
    itself.
    """
    return torch.ones_like(ff), (-fr.clamp(max=0) / rr).masked_fill(rr == 0, 0)


def hamu(ff: Tensor, fr: Tensor, rr: Tensor, *, share: float) -> tuple[Tensor, Tensor]:
    """The d that lowers the retain loss most, max <g_r, d>, with <g_f, d> >= Q and ||d|| <= R (HAMU, ICML 2026).

    d is the direction of the descent, R = ||g_f|| and Q = share ||g_f||^2: as long as a plain step, it forgets at least
    this share of what that step does. If g_r alone forgets enough, d = R g_r / ||g_r||; else
    d = Q g_f / ||g_f||^2 + sqrt(R^2 - Q^2 / ||g_f||^2) g / ||g|| with g = g_r - <g_r, g_f> / ||g_f||^2 g_f.

    share: in (0, 1]; at 1 the retain gradient has no effect.
    """
    across = (rr - fr.square() / ff).clamp(min=0)  # ||g||^2
    is_enough = fr >= share * (ff * rr).sqrt()
    aside = ((1 - share**2) * ff / across).sqrt().masked_fill(across == 0, 0)
    w_f = (share - aside * fr / ff).masked_fill(is_enough, 0)
    w_r = torch.where(is_enough, (ff / rr).sqrt(), aside)
    is_zero = (ff == 0) | (rr == 0)
    return w_f.masked_fill(is_zero, 1), w_r.masked_fill(is_zero, 1)


def projected(ff: Tensor, fr: Tensor, rr: Tensor) -> tuple[Tensor, Tensor]:
    """g_f - min(0, <g_f, g_r>) / ||g_r||^2 g_r, plus g_r: forgetting may not raise the retain loss.

    GEM (Lopez-Paz & Ranzato, NeurIPS 2017) with one constraint.
    """
    w_r = (1 - fr.clamp(max=0) / rr).masked_fill(rr == 0, 1)
    return torch.ones_like(ff), w_r


RULES: dict[str, Balance] = {"conflict": conflicting, "hamu": partial(hamu, share=0.5)}  # of --balancing


def balanced(method: TrainedMethod, rule: str) -> TrainedMethod:
    """The same method, whose forget and retain gradient are put together by one of `RULES`; all else stays as it is."""
    kind: Any = type(method)
    own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    derived = type(kind.__name__, (kind,), own | {"balance": property(lambda self: RULES[rule])})
    return derived(**{item.name: getattr(method, item.name) for item in fields(kind)})
