"""`unlearn-classifier compare --jobs`: cells in several processes, with the figures of one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erase import files
from erase.classification import at_once, cells
from erase.classification.compare import compare, rows
from erase.classification.settings import Settings
from erase.errors import EraseError

OPTIONS = "--network mlp --forget 20% --train-epochs 2 --epochs 1 --batch-size 8 --device cpu"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of small images; a process of its own finds no data set that a test has registered."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, num in (("train", 12), ("test", 6)):
        for label in range(3):
            for i in range(num):
                path = folder / part / "abc"[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = draw.integers(0, 90, (8, 8, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def settings(images: Path, **changes: Any) -> Settings:
    plain: dict[str, Any] = {"data": str(images), "network": "mlp", "forget": "20%", "train_epochs": 2, "epochs": 1}
    return Settings(**{**plain, "batch_size": 8, "device": "cpu", **changes})


def without_seconds(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: without_seconds(value) for name, value in found.items() if not name.startswith("seconds")}
    return [without_seconds(one) for one in found] if isinstance(found, list) else found


def content(folder: Path) -> dict[str, Any]:
    """Every cell, and the results but for their seconds; the models' bytes."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in sorted((folder / "originals").iterdir())}
    found |= {path.name: without_seconds(files.read_json(path)) for path in sorted((folder / "cells").iterdir())}
    return found | {"results": without_seconds(files.read_json(folder / "results.json"))}


def in_this_process(monkeypatch, log: list[str], fails: str = "") -> None:
    """Calls are made here, the last given first: what several processes do, without the seconds of their start."""

    class Here(at_once.Processes):
        def __init__(self, num: int):
            super().__init__(0)
            log.append(f"{num} processes")

        def results(self) -> Any:
            while self._waiting:
                label, function, arguments = self._waiting.pop()
                log.append(label)
                if label == fails:
                    raise EraseError("stopped here")
                yield function(*arguments)

    monkeypatch.setattr(at_once, "Processes", Here)


def test_any_order_of_cells_gives_the_same_results_and_the_first_line_of_a_seed_comes_first(
    images, tmp_path, monkeypatch
):
    one, log, told = settings(images), [], []
    lines = rows(one, ["ft", "rl"])
    expected = compare(one, lines, [0, 1], tmp_path / "one", tmp_path)
    in_this_process(monkeypatch, log)
    found = compare(one, lines, [0, 1], tmp_path / "two", tmp_path, jobs=2, tell=told.append)
    assert without_seconds(found) == without_seconds(expected)
    assert content(tmp_path / "one") == content(tmp_path / "two") and len(told) == 2 * len(lines)
    order = [label for label in log if label.endswith("seed 1")]
    assert log[0] == "2 processes" and order[0] == "original, seed 1" and len(order) == len(lines)


def test_what_is_finished_is_not_computed_again(images, tmp_path, monkeypatch, capsys):
    one, log = settings(images), []
    lines = rows(one, ["ft"])
    in_this_process(monkeypatch, log, fails="ft, seed 0")
    with pytest.raises(EraseError, match="stopped here"):
        compare(one, lines, [0], tmp_path, tmp_path, jobs=3, quiet=False)
    assert log == ["3 processes", "original, seed 0", "ft, seed 0"]
    log.clear()
    monkeypatch.undo()
    in_this_process(monkeypatch, log)
    results = compare(one, lines, [0], tmp_path, tmp_path, jobs=2, quiet=False)
    assert "original, seed 0" not in log and "ft, seed 0" in log
    assert "compare: 1 of 4 cells" in capsys.readouterr().err
    log.clear()
    assert compare(one, lines, [0], tmp_path, tmp_path, jobs=2) == results and log == []


def test_a_seed_whose_original_model_diverges_goes_to_one_process(images, tmp_path, monkeypatch):
    """The others would all train it at once, from the same state file."""
    one, log = settings(images, train_learning_rate=1e25), []
    lines = rows(one, ["ft"])
    in_this_process(monkeypatch, log)
    with pytest.raises(EraseError, match="retraining diverged"):
        compare(one, lines, [0], tmp_path, tmp_path, jobs=3)
    assert log == ["3 processes", "original, seed 0", "retrain, seed 0"]
    cells_of = [files.read_json(path) for path in (tmp_path / "cells").iterdir()]
    assert len(cells_of) == len(lines) and all("diverged" in each for each in cells_of)


# --- processes ------------------------------------------------------------------------------------------------------


def doubled(number: int) -> int:
    return 2 * number


def refuses(text: str) -> None:
    raise EraseError(text)


def breaks() -> None:
    raise KeyError("a bug")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.ci
def test_calls_in_processes_return_and_fail_as_here():
    with at_once.processes(2) as several:
        for number in range(4):
            several.give(f"call {number}", doubled, number)
        found = []
        for result in several.results():
            found.append(result)
            if result == 0:
                several.give("one more", doubled, 10)
        assert sorted(found) == [0, 2, 4, 6, 20]
        several.give("a refusal", refuses, "one line")
        with pytest.raises(EraseError, match="^one line$"):
            list(several.results())
    with at_once.processes(1) as several:
        several.give("a broken one", breaks)
        with pytest.raises(RuntimeError, match=r"(?s)a broken one failed:.*in breaks.*KeyError: 'a bug'"):
            list(several.results())
    with at_once.processes(1) as several:
        several.give("a dead one", dies)
        with pytest.raises(EraseError, match=r"process of a dead one was ended \(exit code -9\).*smaller --jobs"):
            list(several.results())


def started(images: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "erase.classification.cli", "compare", "--data", str(images), *OPTIONS.split()]
    command += ["--methods", "ft", "rl", "--seeds", "1", "--output", str(output), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def alive(group: int) -> list[int]:
    """Processes of the group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            found += [int(path.parent.name)] if int(of_group) == group and state != "Z" else []
    return found


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_an_interrupt_ends_the_processes_and_the_same_command_continues(images, tmp_path, monkeypatch):
    """As a terminal sends it, to all processes of the group. The figures are those of one process."""
    monkeypatch.setenv("ERASE_CACHE", str(tmp_path / "cache"))
    running = started(images, tmp_path / "two", "--jobs", "2")
    ends = time.monotonic() + 120
    while not list((tmp_path / "two").glob("cells/*.json")) and time.monotonic() < ends:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1].endswith("the same command continues after the last finished line")
    ends = time.monotonic() + 20
    while alive(running.pid) and time.monotonic() < ends:  # the one that multiprocessing itself starts ends last
        time.sleep(0.1)
    assert not alive(running.pid)
    assert not list((tmp_path / "two").rglob("*.part*"))
    for name, jobs in (("two", "2"), ("one", "1")):
        running = started(images, tmp_path / name, "--jobs", jobs)
        out, err = running.communicate(timeout=240)
        assert running.returncode == 0, err
        assert "compare: " in err or jobs == "1"
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(list((tmp_path / "one" / "cells").iterdir())) == 5 and "results.json" in out


def test_a_wrong_number_of_jobs_is_one_line(capsys, tmp_path):
    from erase.classification import cli

    for jobs in ("0", "65"):
        with pytest.raises(SystemExit) as end:
            cli.main(["compare", "--data", "digits", "--jobs", jobs, "--output", str(tmp_path)])
        assert end.value.code == 2 and capsys.readouterr().err.count(f"--jobs is {jobs}; it must be at least 1") == 1


def test_a_cell_has_one_file_name(tmp_path):
    row = cells.Row("salun, no mask", Settings())
    bench = cells.Bench(Settings(seed=3), tmp_path, tmp_path)
    assert bench.path_of(row) == tmp_path / "cells" / "salun-no-mask-3.json"
