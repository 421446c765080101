"""Factors of the forget and the retain gradient, from their inner products: ff = <g_f, g_f>, fr = <g_f, g_r>, rr.

Each needs both gradients of the masked weights at once, which a weighted sum of the losses does not.
"""

import math


def nash(ff: float, fr: float, rr: float) -> tuple[float, float]:
    """w = 1 / (||g|| sqrt(1 + cos)) for each: both losses fall alike (MUNBa, Wu & Harandi, 2024).

    Their closed form simplified; the step has length sqrt(2) whatever the gradients' lengths. As cos goes to -1 it has
    no solution; there each gradient gives up what opposes the other (PCGrad, Yu et al., NeurIPS 2020).
    """
    if ff == 0 or rr == 0:
        return 1.0, 1.0
    cos = fr / math.sqrt(ff * rr)
    if 1 + cos < 1e-3:
        return 1 - fr / ff, 1 - fr / rr
    return 1 / math.sqrt(ff * (1 + cos)), 1 / math.sqrt(rr * (1 + cos))


def projected(ff: float, fr: float, rr: float) -> tuple[float, float]:
    """g_f - min(0, <g_f, g_r>) / ||g_r||^2 g_r, plus g_r: forgetting may not raise the retain loss.

    GEM (Lopez-Paz & Ranzato, NeurIPS 2017) with one constraint.
    """
    return 1.0, 1.0 if rr == 0 else 1 - min(0.0, fr) / rr
