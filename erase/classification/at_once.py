"""Calls in several processes at once, which end with this one."""

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from erase.errors import EraseError


class Processes:
    """Processes that each work on one call at a time; see `processes`."""

    def __init__(self, num: int):
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
        self._waiting: deque[tuple[str, Callable[..., Any], tuple[Any, ...]]] = deque()
        self._free: list[Connection] = []
        self._busy: dict[Connection, str] = {}
        self._processes: dict[Connection, Any] = {}
        for _ in range(num):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(theirs, torch.get_num_threads()), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process
            self._free.append(ours)

    def give(self, label: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Call the function of a module with these arguments, all of which can be pickled, when a process is free."""
        self._waiting.append((label, function, arguments))

    def results(self) -> Iterator[Any]:
        """What the calls return, in the order in which they end; more may be given meanwhile.

        Raises:
            EraseError: a call did, or its process was ended, or the GPU has no memory for so many calls.
            RuntimeError: a call raised something else, whose traceback this shows.
        """
        while self._waiting or self._busy:
            while self._waiting and self._free:
                label, function, arguments = self._waiting.popleft()
                one = self._free.pop()
                one.send((function, arguments))
                self._busy[one] = label
            for one in wait([*self._busy]):
                assert isinstance(one, Connection)
                yield self._received(one)

    def _received(self, one: Connection) -> Any:
        label = self._busy.pop(one)
        try:
            result, error, shown = one.recv()
        except (EOFError, ConnectionResetError):
            self._processes[one].join()
            code = self._processes[one].exitcode
            raise EraseError(
                f"the process of {label} was ended (exit code {code}), for want of memory perhaps; try a smaller --jobs"
            ) from None
        if isinstance(error, torch.OutOfMemoryError):
            raise EraseError(f"{label} does not fit into the GPU's memory beside others; choose a smaller --jobs")
        if isinstance(error, EraseError):
            raise error
        if error is not None:
            raise RuntimeError(f"{label} failed:\n{shown}")
        self._free.append(one)
        return result

    def end(self) -> None:
        """End all processes at once; whatever they write is written whole or not at all."""
        for process in self._processes.values():
            process.terminate()
        for one, process in self._processes.items():
            process.join()
            one.close()


@contextmanager
def processes(num: int) -> Iterator[Processes]:
    """`num` processes. All are ended at the end of the block, also by an error or an interrupt."""
    found = Processes(num)
    try:
        yield found
    finally:
        found.end()


def _work(parent: Connection, num_threads: int) -> None:
    """Answer calls until the other process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the command, which ends this process
    torch.set_num_threads(num_threads)  # the last bit of a sum depends on it
    while True:
        try:
            function, arguments = parent.recv()
        except EOFError:
            return
        try:
            parent.send((function(*arguments), None, ""))
        except BrokenPipeError:
            return
        except Exception as error:
            known = isinstance(error, (EraseError, torch.OutOfMemoryError))
            parent.send((None, error if known else RuntimeError(str(error)), traceback.format_exc()))
