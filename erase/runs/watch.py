"""Ends this process when another process of the run has died, instead of waiting for it."""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from erase.errors import EraseError
from erase.processes import rank_and_world

INTERVAL = 10.0  # seconds between two signs of life
PATIENCE = 300.0  # seconds without one after which a process counts as dead; far longer than any work that blocks it
FAILED = "failed"
_runs = itertools.count()  # of this process, the same in all processes


@contextmanager
def watched() -> Iterator[None]:
    """Inside, all processes of the run watch one another.

    A process may work alone for hours while others wait for it. If one dies, others may get an error from what they
    exchange with it (gloo), or wait on without end (NCCL); each then ends with one line.

    Raises:
        EraseError: an exchange with another process failed.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield
        return
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
    watch = Watch(store, rank, world, f"erase/{next(_runs)}", _end)
    with watch.running():
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, EraseError) or not _is_of_exchange(error):
                raise
            raise EraseError(
                "another process of this run has ended; see its message, and repeat the command to continue"
            ) from error


class Watch:
    """Signs of life of all processes, in a store that they share.

    store: a connection of its own, since one that is asked waits. end: called once, in a thread, with the reason.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, prefix: str, end: Callable[[str], None]):
        self._store, self._rank, self._world, self._prefix, self._end = store, rank, world, prefix, end
        self._is_over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, this process gives signs of life and looks at those of the others."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        said = FAILED
        try:
            yield
            said = "done"
        finally:
            self._is_over.set()
            thread.join(1.0)
            if not thread.is_alive():  # else it waits for a store that has gone
                with suppress(RuntimeError):  # process 0, which holds the store, has ended: nobody is left to tell
                    self._store.set(self._key(self._rank), said)

    def _run(self) -> None:
        if (reason := self._first_death()) and not self._is_over.is_set():
            self._end(reason)

    def _first_death(self) -> str | None:
        """Waits for it; None when this process is done."""
        seen = {rank: ("", time.monotonic()) for rank in range(self._world) if rank != self._rank}
        for number in itertools.count():
            try:
                self._store.set(self._key(self._rank), str(number))
                found = {rank: self._of(rank) for rank in seen}
            except RuntimeError:
                return "process 0, which holds the list of all processes, has ended"
            now = time.monotonic()
            for rank, sign in found.items():
                if sign == FAILED:
                    return f"process {rank} of {self._world} has failed"
                if sign != seen[rank][0] or sign == "done":
                    seen[rank] = sign, now
                elif now - seen[rank][1] > PATIENCE:
                    return f"process {rank} of {self._world} has given no sign of life for {PATIENCE:g} s"
            if self._is_over.wait(INTERVAL):
                return None

    def _of(self, rank: int) -> str:
        return self._store.get(self._key(rank)).decode() if self._store.check([self._key(rank)]) else ""

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"


def _is_of_exchange(error: RuntimeError) -> bool:
    """Whether it comes from an exchange between processes; gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _end(reason: str) -> None:
    """The main thread may wait inside a library and cannot be asked; all files are whole or absent at any moment."""
    print(f"erase-concept: {reason}; repeat the command to continue", file=sys.stderr, flush=True)
    os._exit(2)
