"""A loaded Stable Diffusion, for tests that look at its own parts."""

from typing import Any

from erase.families import loading
from erase.families.sd import StableDiffusion


def load_sd(source: Any, **options: Any) -> StableDiffusion:
    """What `loading.load` gives, known to be a Stable Diffusion."""
    model = loading.load(source, **options)
    assert isinstance(model, StableDiffusion)
    return model
