"""Optimizers that change masked weights only."""

from erase.optim.adam import MaskedAdam as MaskedAdam
