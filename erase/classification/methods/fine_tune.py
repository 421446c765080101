"""Fine-tuning on the retain set (Warnecke et al., 2023)."""

from dataclasses import dataclass

from erase.classification.methods.protocol import Descends, Plan, Task


@dataclass(frozen=True)
class FineTune(Descends):
    """min CE(f(x), y) over D_r: relies on the network forgetting what it no longer sees."""

    def plan(self, task: Task) -> Plan:
        return Plan(passes=lambda: [task.retain])
