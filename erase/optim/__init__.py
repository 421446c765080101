"""Optimizers that move masked weights only."""

from erase.optim.adam import MaskedAdam as MaskedAdam
