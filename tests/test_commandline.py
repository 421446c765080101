"""Laws of what all commands share: a reader that closes the pipe ends them quietly."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from erase import delta

MODULES = ("erase.cli", "erase.evaluation.cli", "erase.classification.cli")


def run_into_closed_pipe(*arguments: str, streams: tuple[str, ...], unbuffered: str = "") -> tuple[int, str]:
    """Exit code, and what arrives on the streams that are open, when nobody reads the others."""
    read, write = os.pipe()
    os.close(read)
    places: dict[str, Any] = {name: write if name in streams else subprocess.PIPE for name in ("stdout", "stderr")}
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run([sys.executable, "-m", *arguments], text=True, env=environment, **places)
    finally:
        os.close(write)
    return done.returncode, (done.stdout or "") + (done.stderr or "")


@pytest.mark.parametrize("module", MODULES)
def test_a_reader_that_closes_the_pipe_ends_a_command_without_a_traceback(module):
    """As in `erase-concept --help | head -1`."""
    code, told = run_into_closed_pipe(module, "--help", streams=("stdout",))
    assert code in (0, 1) and not told  # 0 where argparse itself has met the closed pipe
    code, told = run_into_closed_pipe(module, "--nonsense", streams=("stdout", "stderr"))
    assert code == 2 and not told
    code, told = run_into_closed_pipe(module, "--nonsense", streams=("stdout",))  # control
    assert code == 2 and told.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.slow
@pytest.mark.ci
def test_inspect_ends_quietly_when_its_reader_does(tmp_path: Path, unbuffered: str):
    base = {"unet.w": torch.zeros(8)}
    delta.save(tmp_path / "delta.safetensors", delta.difference(base, {"unet.w": torch.ones(8)}))
    inspect = ("erase.cli", "inspect", str(tmp_path / "delta.safetensors"))
    assert run_into_closed_pipe(*inspect, streams=("stdout",), unbuffered=unbuffered) == (1, "")
    code, told = run_into_closed_pipe(*inspect, streams=(), unbuffered=unbuffered)  # control
    assert code == 0 and "all" in told
    missing = run_into_closed_pipe("erase.cli", "inspect", "nowhere", streams=("stderr",), unbuffered=unbuffered)
    assert missing == (1, "")


def test_another_broken_pipe_is_a_traceback():
    """A helper process that died is no reader that went away."""
    code = "from erase.commandline import reporting\nwith reporting('x'):\n    raise BrokenPipeError(32, 'Broken pipe')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr
