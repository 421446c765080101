"""A process that dies ends the others of its run with one line, and does not let them wait."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import InitProcessGroupKwargs

from erase.concepts import Concept
from erase.device import Compute
from erase.errors import EraseError
from erase.options.settings import Settings
from erase.runs import machine, watch

CONCEPT = Concept("cat", "object", ("a cat",), ("a dog",), retain=("a tree", "a house"), others=("a horse",))


@pytest.fixture
def began(monkeypatch) -> Callable[..., tuple[Any, list[str]]]:
    """Process 0 of 2, watching, and the reasons for which it would end."""
    monkeypatch.setattr(watch, "INTERVAL", 0.02)
    monkeypatch.setattr(watch, "PATIENCE", 0.3)

    def began(store: Any, rank: int = 0) -> tuple[Any, list[str]]:
        reasons: list[str] = []
        return watch.Watch(store, rank, 2, "erase/0", reasons.append), reasons

    return began


def waited(reasons: list[str], seconds: float = 10.0) -> list[str]:
    end = time.monotonic() + seconds
    while not reasons and time.monotonic() < end:
        time.sleep(0.01)
    return reasons


def test_silence_and_failure_of_another_process_end_this_one(began):
    for sign, reason in (
        ("7", "process 1 of 2 has given no sign of life for 0.3 s"),
        (watch.FAILED, "process 1 of 2 has failed"),
    ):
        store = dist.HashStore()
        own, reasons = began(store)
        store.set("erase/0/1", sign)
        with own.running():
            assert waited(reasons) == [reason]


def test_a_process_that_never_began_is_noticed_too(began):
    own, reasons = began(dist.HashStore())
    with own.running():
        assert waited(reasons) == ["process 1 of 2 has given no sign of life for 0.3 s"]


def test_processes_that_live_or_are_done_end_nobody(began):
    store = dist.HashStore()
    (own, reasons), (other, others) = began(store), began(store, rank=1)
    with own.running():
        with other.running():
            assert not waited(reasons, 1.0) and not others
        assert store.get("erase/0/1") == b"done" and not waited(reasons, 1.0)
    assert store.get("erase/0/0") == b"done" and not others


def test_an_error_is_told_to_the_others(began):
    store = dist.HashStore()
    (own, reasons), (other, _) = began(store), began(store, rank=1)
    with own.running():
        with pytest.raises(EraseError), other.running():
            raise EraseError("a full disk")
        assert waited(reasons) == ["process 1 of 2 has failed"]


def test_the_end_of_the_process_with_the_store_is_noticed(began):
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("Connection reset by peer")

    own, reasons = began(Gone())
    with own.running():
        assert waited(reasons) == ["process 0, which holds the list of all processes, has ended"]


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_an_exchange_that_fails_is_one_line_and_other_errors_stay_what_they_are(monkeypatch, error, is_told):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True)
    assert store
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((RuntimeError, EraseError)) as found, watch.watched():
        raise error
    if is_told:
        assert isinstance(found.value, EraseError) and "another process of this run has ended" in str(found.value)
    else:
        assert found.value is error


def test_work_of_one_process_may_take_hours_while_the_others_wait(monkeypatch, tmp_path):
    """The timeout of the process group is not torch's 10 to 30 minutes."""
    seen: dict[str, Any] = {}

    def accelerator(**given: Any) -> None:
        seen.update(given)
        raise EraseError("seen enough")

    monkeypatch.setattr(machine, "Accelerator", accelerator)
    with pytest.raises(EraseError, match="seen enough"):
        machine.make_accelerator(Settings("church"), tmp_path, Compute(torch.device("cpu"), "fp32"))
    (group,) = (one for one in seen["kwargs_handlers"] if isinstance(one, InitProcessGroupKwargs))
    assert group.timeout == timedelta(hours=24)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(toy_pipeline_dir, tmp_path, killed):
    """Without torchrun, which would end the other one itself: as on two machines."""
    concept = tmp_path / "cat.toml"
    concept.write_text(
        'kind = "object"\n'
        + "\n".join(f"{key} = {json.dumps(getattr(CONCEPT, key))}" for key in ("forget", "anchor", "retain", "others"))
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = {**os.environ, "ERASE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    how |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-m", "erase.cli", "--concept", str(concept), "--model", str(toy_pipeline_dir)]
    words += ["--output", str(tmp_path / "run"), "--resolution=8", "--batch-size=2", "--num-train-steps=100000"]
    words += ["--num-forget=4", "--num-retain=4", "--steps=2", "--device=cpu", "--quiet", "--checkpointing-steps=5"]
    processes = [
        subprocess.Popen(words, env={**how, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        while not (tmp_path / "run" / "work" / "training.safetensors").exists():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        processes[killed].send_signal(signal.SIGKILL)
        other = processes[1 - killed]
        errors = other.communicate(timeout=120)[1].decode()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    told = [line for line in errors.splitlines() if line.startswith("erase-concept: ")]
    assert other.returncode == 2 and "Traceback" not in errors, errors
    assert len(told) == 1 and "repeat the command to continue" in told[0], errors
