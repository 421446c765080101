"""Attacks by name: one a file in this folder, and those of other packages (entry points `erase.attacks`)."""

from pathlib import Path

from erase.evaluation.attacks.protocol import Attack
from erase.registry import Registry, in_folder

ATTACKS: Registry[Attack] = Registry(
    "attack", base=Attack, group="erase.attacks", own=in_folder("erase.evaluation.attacks", Path(__file__).parent)
)
