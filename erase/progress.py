"""Progress of long work on stderr: a bar on a terminal, a line a minute elsewhere, nothing when quiet."""

import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

LINE_SECONDS = 60.0  # between two lines where stderr is no terminal


class Progress(Protocol):
    """Receives the progress of a work."""

    def update(self, n: int = 1) -> object:
        """`n` more are done."""

    def note(self, **values: str) -> None:
        """Values to show beside the numbers, such as the loss."""


@contextmanager
def progress(total: int, label: str, unit: str, *, done: int = 0, quiet: bool = False) -> Iterator[Progress]:
    """Report work of `total` units, of which `done` were done before; silent if nothing is left to do.

    label: of the phase. unit: plural noun of what is counted.
    """
    if quiet or done >= total:
        yield _Silent()
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=label, unit=f" {unit}") as bar:
            yield _Bar(bar)
    else:
        yield _Lines(total, label, unit, done)


def each(items: Collection[Any], label: str, unit: str, *, quiet: bool = False) -> Iterator[Any]:
    """The items, reported one by one."""
    with progress(len(items), label, unit, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def loading() -> Iterator[None]:
    """Inside, transformers and diffusers show no bars of their own: loading or writing weights takes seconds."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    try:
        for library in shown:
            library.disable_progress_bar()
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def hide_downloads() -> None:
    """No bars for downloads: the variables are for libraries not imported yet, the calls for those that are."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    for name in ("huggingface_hub.utils", "datasets"):
        if name in sys.modules:
            sys.modules[name].disable_progress_bars()


class _Silent:
    def update(self, n: int = 1) -> None:
        pass

    def note(self, **values: str) -> None:
        pass


class _Bar:
    def __init__(self, bar: Any):
        self.update, self._bar = bar.update, bar

    def note(self, **values: str) -> None:
        self._bar.set_postfix(values, refresh=False)


class _Lines:
    """One line at the start, then one every LINE_SECONDS: label, done and total, rate, and the time that is left."""

    def __init__(self, total: int, label: str, unit: str, done: int):
        self.total, self.label, self.unit, self.first, self.done = total, label, unit, done, done
        self.values: dict[str, str] = {}
        self.start = self.shown = time.monotonic()
        print(f"{label}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.shown < LINE_SECONDS or self.done == self.first:
            return
        self.shown = now
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        parts = [f"{self.done:,} of {self.total:,} {self.unit}", f"{rate:.3g} a second"]
        parts += [f"{_duration((self.total - self.done) / rate)} left"]
        parts += [f"{name} {value}" for name, value in self.values.items()]
        print(f"{self.label}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def note(self, **values: str) -> None:
        self.values = values


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
