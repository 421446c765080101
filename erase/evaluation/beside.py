"""Work on CPU threads beside a GPU that generates: images are written, and judges that need no GPU look at them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

Early = dict[str, dict[str, dict[str, Any]]]  # outputs of judges, by judge and sample


def num_threads() -> int:
    """CPU threads for images that are handled one by one: OMP_NUM_THREADS if it is set, else one for each core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(int(given), cores)) if given.isdecimal() else cores


class Beside:
    """Calls in the order in which they were given; on threads if the device is a GPU, else at once.

    A CPU that generates has no core to spare.
    """

    def __init__(self, device: torch.device):
        self._pool = ThreadPoolExecutor(num_threads()) if device.type == "cuda" else None
        self._waiting: deque[list[Future[Any]]] = deque()

    def give(self, calls: Iterable[Callable[[], Any]]) -> Iterator[list[Any]]:
        """Start these calls; yields the results of those that were given before, as soon as all of these are started.

        At most two lists of calls are open, so images do not pile up in memory.
        """
        if self._pool is None:
            yield [call() for call in calls]
            return
        self._waiting.append([self._pool.submit(call) for call in calls])
        while len(self._waiting) > 1:
            yield [future.result() for future in self._waiting.popleft()]

    def rest(self) -> Iterator[list[Any]]:
        """The results of all calls that are still open."""
        while self._waiting:
            yield [future.result() for future in self._waiting.popleft()]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def beside(device: torch.device) -> Iterator[Beside]:
    """Inside, calls run beside the device."""
    found = Beside(device)
    try:
        yield found
    finally:
        found.close()


def mapped(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The function of each item, on as many threads as pay."""
    num = min(num_threads(), len(items))
    if num < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(function, items))


def looked_at(judges: Sequence[Any], early: Early, record: Mapping[str, Any], pixels: Any, prompt: str) -> None:
    """Keep in `early` what the judges that need no GPU say of an image that has just been written."""
    for judge in judges:
        if judge.runs_beside and not record["invalid"]:
            early.setdefault(judge.name, {})[record["id"]] = judge.score([pixels], [prompt])[0]
