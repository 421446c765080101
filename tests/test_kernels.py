"""The Triton kernels in Triton's interpreter, which runs them on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.ci
def test_the_laws_of_the_kernels_hold_in_tritons_interpreter(tmp_path):
    """In a process of its own: the interpreter is chosen when Triton is imported, and would stay."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    laws = Path(__file__).with_name("kernel_laws.py")
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path}", str(laws)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


def test_the_cpus_path_does_not_import_the_kernels():
    """torch imports Triton by itself where it is installed; the kernels need it everywhere."""
    code = (
        "import sys, torch; from erase.optim import MaskedAdam; w = torch.nn.Parameter(torch.ones(3)); "
        "w.grad = torch.ones(3); MaskedAdam({'w': w}, None).step(); sys.exit('erase.optim.kernels' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
