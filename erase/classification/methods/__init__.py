"""Unlearning methods for classifiers: one paper per file, each a frozen dataclass with the paper's formula.

A method subclasses `Descends` or `Solves` (protocol.py) and has one line in presets.toml.

In the docstrings: f are the model's logits, D_f and D_r the images to forget and to retain, CE the cross-entropy and
theta_o the original weights.
"""

from erase.classification.methods.boundary import BoundaryExpand, BoundaryShrink
from erase.classification.methods.dual_optim import DualOptim, DualRandomLabel, DualScrub, DualSFRon
from erase.classification.methods.fine_tune import FineTune
from erase.classification.methods.fisher import FisherForgetting
from erase.classification.methods.gradient_ascent import GradientAscent
from erase.classification.methods.influence import Influence
from erase.classification.methods.l1_sparse import L1Sparse
from erase.classification.methods.protocol import (
    Descends,
    ForgetOptimizer,
    Loss,
    Method,
    Plan,
    Progress,
    Solves,
    Task,
    Values,
)
from erase.classification.methods.random_label import RandomLabel, RandomLabelJoint
from erase.classification.methods.registry import REGISTRY, find, make, others, preset
from erase.classification.methods.scissorhands import Scissorhands
from erase.classification.methods.scrub import Scrub
from erase.classification.methods.sfron import SFRon
from erase.classification.methods.soft_threshold import SoftThreshold

__all__ = [
    "REGISTRY",
    "BoundaryExpand",
    "BoundaryShrink",
    "Descends",
    "DualOptim",
    "DualRandomLabel",
    "DualSFRon",
    "DualScrub",
    "FineTune",
    "FisherForgetting",
    "ForgetOptimizer",
    "GradientAscent",
    "Influence",
    "L1Sparse",
    "Loss",
    "Method",
    "Plan",
    "Progress",
    "RandomLabel",
    "RandomLabelJoint",
    "SFRon",
    "Scissorhands",
    "Scrub",
    "SoftThreshold",
    "Solves",
    "Task",
    "Values",
    "find",
    "make",
    "others",
    "preset",
]
