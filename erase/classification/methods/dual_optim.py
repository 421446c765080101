"""DualOptim: a second optimizer for a method's steps on the forget set (Zhong et al., NeurIPS 2025)."""

from dataclasses import dataclass, replace
from typing import Annotated

from erase.classification.methods.protocol import Descends, ForgetOptimizer, Plan, Task, require_bounds
from erase.classification.methods.random_label import RandomLabel
from erase.classification.methods.scrub import Scrub
from erase.classification.methods.sfron import SFRon
from erase.errors import EraseError


@dataclass(frozen=True)
class DualOptim(Descends):
    """A method's steps on D_f with Adam and those on D_r with the run's optimizer; neither sees the other's moments.

    A class that derives from this one and then from a method is that method with DualOptim. The default learning rate
    is ours, as the paper chooses one for every setting. The decay is that of the authors' code.
    """

    forget_learning_rate: Annotated[float, "learning rate of the steps on D_f"] = 1e-4
    forget_decay: Annotated[float, "decoupled weight decay of the steps on D_f, in units of their learning rate"] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bounds(self, forget_learning_rate=(0, 1e30), forget_decay=(0, 1000))

    def plan(self, task: Task) -> Plan:
        plan = super().plan(task)  # pyright: ignore[reportAbstractUsage]  of the method that follows in the order
        if plan.forgets is None:
            raise EraseError("DualOptim needs a method whose plan says which steps train on the forget set (`forgets`)")
        return replace(plan, forget_optimizer=ForgetOptimizer(self.forget_learning_rate, self.forget_decay))


@dataclass(frozen=True)
class DualRandomLabel(DualOptim, RandomLabel):
    """DualOptim over RandomLabel: with a saliency mask, SalUn with DualOptim."""


@dataclass(frozen=True)
class DualScrub(DualOptim, Scrub):
    """DualOptim over SCRUB."""


@dataclass(frozen=True)
class DualSFRon(DualOptim, SFRon):
    """DualOptim over SFRon."""
