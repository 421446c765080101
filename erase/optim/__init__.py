"""Optimizers that change masked weights only."""

from erase.optim.adam import MaskedAdam as MaskedAdam
from erase.optim.dual import DualAdam as DualAdam
