"""How many operations a step starts.

On a GPU torch's profiler counts the launches of kernels, copies and graphs. On a CPU torch's dispatcher counts the
operators that compute or copy something, for each of which a GPU would launch a kernel or more; views and allocations
are left out.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")  # or longer
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "_local_scalar_dense")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "_unsafe_view"}


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0].removeprefix("aten::")
        if not func.is_view and name not in ALLOCATIONS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def counted(work: Callable[[], Any]) -> Counter[str]:
    """What was started while `work` ran, by name."""
    if not torch.cuda.is_available():
        with _Operators() as operators:
            work()
        return operators.seen
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
    events: Any = found.events()
    return Counter(event.name for event in events if event.name.startswith((*LAUNCHES, *WAITS)))


def per_step(steps: Callable[[int], Any], few: int = 2, more: int = 5) -> dict[str, float]:
    """What one steady step starts, by name: the difference between `more` steps and `few`, over their number."""
    steps(few)  # allocates, and chooses kernels
    before, after = counted(lambda: steps(few)), counted(lambda: steps(more))
    found = {name: (after[name] - before[name]) / (more - few) for name in after | before}
    return {name: value for name, value in found.items() if value}


def num_launches(found: dict[str, float]) -> float:
    """All but the waits."""
    return sum(value for name, value in found.items() if not name.startswith(WAITS))
