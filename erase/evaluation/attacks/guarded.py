"""A model's prediction with its guard, for attacks that learn: what they find has to pass the guard."""

from functools import partial

from torch import Tensor

from erase.conditioning import Conditioning
from erase.families.protocol import Family
from erase.guards import NAG, SLD, through


def predict(model: Family, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    """The noise that the model sees in `x`, as the conditional branch of guidance sees it behind the guard.

    The prediction e that makes eps(0) + s (e - eps(0)) what guard and guidance make of the model, s the model's own
    guidance: eps(c) - gamma for SLD, without momentum and after the warm-up; for a negative prompt c_S
    eps(c) + (s - 1) / s (eps(0) - eps(c_S)). NAG acts inside the network. Without a guard eps(c).
    """
    guard = model.guard
    if isinstance(guard, NAG):
        text = model.encode_text([guard.text]).to(x.device)
        act = partial(guard.forward, model.network, c_s=text, start=0)
        with through(model.network, act):
            return model(x, t, c)
    predicted = model(x, t, c)
    if guard is None or (isinstance(guard, SLD) and guard.guidance < 1):
        return predicted
    two = (model.encode_text([guard.text]), model.unconditional())
    away, unconditional = (model(x, t, one.to(x.device).expand(len(x))) for one in two)
    if isinstance(guard, SLD):
        gamma, _ = guard.away(unconditional, predicted, away, unconditional.new_zeros(()))
        return predicted - gamma
    s = float(model.defaults.get("guidance_scale", model.guidance_scale))
    return predicted + (s - 1) / s * (unconditional - away)
