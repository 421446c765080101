"""Erasure methods: one paper, one file; each a frozen dataclass whose `loss` or `solve` is the paper's formula.

`protocol` says what a method consists of, `registry` finds methods by name, and `inputs` is what a formula sees.
"""

from erase.methods.protocol import ClosedForm as ClosedForm
from erase.methods.protocol import Method as Method
from erase.methods.protocol import TrainedMethod as TrainedMethod
from erase.methods.protocol import WordAttack as WordAttack
from erase.methods.registry import METHODS as METHODS
from erase.methods.registry import Preset as Preset
from erase.methods.registry import find as find
from erase.methods.registry import give as give
from erase.methods.registry import load as load
from erase.methods.registry import make as make
from erase.methods.registry import origin as origin
from erase.methods.registry import others as others
