"""eval/on_gpu.py runs without a GPU at toy size, on a machine that has only what the script says it needs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_parts import models, sliced, steps
from gpu_parts.job import Job

SCRIPT = Path(__file__).resolve().parent.parent / "eval" / "on_gpu.py"
NEEDED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pytest")

# Python runs this file at its start. It hides every distribution but those that are allowed, modules and metadata.
SITECUSTOMIZE = """
import sys
from importlib.machinery import PathFinder
HIDDEN_MODULES, HIDDEN_DISTRIBUTIONS = {modules!r}, {distributions!r}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN_MODULES else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *arguments):
        found = PathFinder.find_distributions(*arguments)
        return (one for one in found if one.metadata["Name"].lower().replace("_", "-") not in HIDDEN_DISTRIBUTIONS)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def on_gpu() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("on_gpu", SCRIPT)
    assert spec and spec.loader
    module = sys.modules["on_gpu"] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["on_gpu"]


@pytest.fixture
def start(on_gpu, monkeypatch, tmp_path):
    """Runs the script with other parts, all in this process; returns the exit code and what the JSON file holds."""

    def run(parts: dict[str, Any], *options: str) -> tuple[int, dict[str, Any]]:
        def part(command: list[str], **_: Any) -> SimpleNamespace:
            try:
                return SimpleNamespace(returncode=on_gpu.main(command[2:]))
            except SystemExit as stop:
                return SimpleNamespace(returncode=stop.code)

        monkeypatch.setattr(on_gpu, "PARTS", parts)
        monkeypatch.setattr(on_gpu.subprocess, "run", part)
        output = tmp_path / "on-gpu.json"
        code = on_gpu.main(["--dry-run", "--output", str(output), "--work", str(tmp_path / "work"), *options])
        return code, json.loads(output.read_text(encoding="utf-8"))["parts"]

    return run


def test_a_part_that_fails_leaves_its_figures_and_its_error_and_the_others_run(start):
    def fails(job: Any) -> Iterator[dict[str, Any]]:
        yield {"seconds": 1.5}
        raise ValueError("first line\nno memory left")

    def works(job: Any) -> Iterator[dict[str, Any]]:
        yield {"device": job.device, "toy": job.toy}

    code, parts = start({"fails": fails, "works": works}, "--only", "fails,works")
    assert code == 1 and list(parts) == ["fails", "works"]
    assert parts["fails"]["seconds"] == 1.5 and parts["fails"]["error"] == "no memory left"
    assert parts["works"].items() >= {"device": "cpu", "toy": True}.items() and "error" not in parts["works"]
    code, parts = start({"fails": works, "works": works}, "--only", "fails")
    assert code == 0 and "error" not in parts["fails"], "figures of an earlier call go"
    assert parts["works"]["toy"], "those of parts that were not asked for stay"


def test_a_process_that_dies_without_a_word_is_recorded_by_the_script(start, on_gpu):
    """As one does whose GPU or memory is gone: nothing in it can write any more."""

    def dies(job: Any) -> Iterator[dict[str, Any]]:
        yield {"begun": True}
        raise SystemExit(139)

    code, parts = start({"dies": dies}, "--only", "dies")
    assert code == 1 and parts["dies"]["begun"] and parts["dies"]["error"] == "the process ended with 139"


def test_slices_end_in_time_and_continue_with_what_is_missing(start, on_gpu, monkeypatch):
    """A slice begins one part at least; a part that was stopped keeps its figures and measures the others."""
    monkeypatch.setattr(on_gpu, "limit", lambda name, dry_run: 1000)
    ran: list[str] = []

    def part(job: Any) -> Iterator[dict[str, Any]]:
        for name in ("a", "b"):
            if name not in job.known:
                ran.append(name)
                yield {name: 1}
                if ran == ["a"]:
                    raise ValueError("stopped")

    parts = {"one": part, "two": part}
    how = ("--only", "one,two", "--slice", "1000")
    code, found = start(parts, *how)
    assert code == 1 and ran == ["a"] and found["one"]["error"] == "ValueError: stopped" and "two" not in found
    code, found = start(parts, *how)
    assert code == 3 and ran == ["a", "b"] and found["one"].keys() == {"a", "b", "part_seconds"}
    code, found = start(parts, *how)
    assert code == 0 and ran == ["a", "b", "a", "b"] and found["two"].keys() == {"a", "b", "part_seconds"}
    assert start(parts, *how)[0] == 0 and len(ran) == 4
    assert start(parts, "--only", "one")[0] == 0 and len(ran) == 6, "without --slice all is measured anew"


def test_every_figure_is_on_the_disk_before_the_next_is_measured(start, tmp_path):
    seen = []

    def looks(job: Any) -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {f"figure {number}": number}
            seen.append(json.loads((tmp_path / "on-gpu.json").read_text())["parts"]["looks"])

    start({"looks": looks}, "--only", "looks")
    assert [len(figures) for figures in seen] == [1, 2, 3]


def test_results_of_a_dry_run_do_not_land_among_real_ones(on_gpu, monkeypatch, tmp_path, capsys):
    """Neither the JSON file nor its neighbours, and a real run does not continue the toy cells of its work folder."""
    given: list[Any] = []
    monkeypatch.setattr(on_gpu, "run_parts", lambda names, options: given.append(options) or (0, []))
    monkeypatch.setattr(on_gpu, "has_cuda", lambda: True)
    monkeypatch.chdir(tmp_path)
    assert on_gpu.main([]) == on_gpu.main(["--dry-run"]) == on_gpu.main(["--dry-run", "--work", "w"]) == 0
    real, dry, elsewhere = given
    assert (real.output, real.work) == (str(tmp_path / "eval/results/on-gpu.json"), str(tmp_path / "runs/on-gpu"))
    assert (dry.output, dry.work) == (f"{real.work}/dry-run/on-gpu.json", f"{real.work}/dry-run")
    assert (elsewhere.output, elsewhere.work) == (str(tmp_path / "w/dry-run/on-gpu.json"), str(tmp_path / "w/dry-run"))
    for folder in (str(SCRIPT.parent / "results"), str(SCRIPT.parent / "results" / "mine")):
        with pytest.raises(SystemExit) as stop:
            on_gpu.main(["--dry-run", "--output", f"{folder}/on-gpu.json"])
        assert stop.value.code == 2 and "--dry-run writes no results into" in capsys.readouterr().err


def test_a_part_of_a_dry_run_works_in_the_folder_that_its_parent_made(on_gpu, monkeypatch, tmp_path):
    seen: list[Any] = []
    monkeypatch.setattr(on_gpu, "PARTS", {"looks": lambda job: seen.append(job) or iter(())})
    places = ["--output", str(tmp_path / "x.json"), "--work", str(tmp_path / "work")]
    assert on_gpu.main(["part", "looks", "--dry-run", *places]) == 0
    assert seen[0].work == tmp_path / "work" and seen[0].output == tmp_path / "x.json"


def test_slices_of_the_cifar_10_tables_are_longer_and_continue(on_gpu, tmp_path, monkeypatch):
    """Four cells of ft; a slice that is stopped says that it is not finished, and the next one has them all."""
    monkeypatch.setenv("ERASE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()

    def slice_of(seconds: float) -> dict[str, Any]:
        ends = time.monotonic() + seconds
        job = Job(tmp_path / "on-gpu.json", tmp_path / "work", "cpu", True, ends, tmp_path)
        return {name: value for figures in sliced.cifar10(job) for name, value in figures.items()}

    assert on_gpu.limit("cifar10", False) == 540 and on_gpu.limit("mini", False) == 240
    assert not slice_of(1)["finished"]
    whole = slice_of(300)
    assert whole["finished"] and whole["cells"] == 4
    assert json.loads((tmp_path / "classification-cifar10-full.json").read_text())["tables"]["10%"]["cells"]


def test_the_images_of_cifar_10_must_be_there(on_gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(on_gpu, "has_cuda", lambda: True)
    with pytest.raises(SystemExit) as stop:
        on_gpu.main(["--only", "cifar10", "--cifar10", str(tmp_path / "none"), "--work", str(tmp_path / "work")])
    assert stop.value.code == 2 and "give the folder of CIFAR-10's images" in capsys.readouterr().err


def test_an_unknown_part_and_a_missing_gpu_are_one_line(on_gpu, tmp_path, capsys, monkeypatch):
    for options, said in ((["--only", "tests,drawing"], "no part 'drawing'"), ([], "no CUDA device")):
        monkeypatch.setattr(on_gpu, "has_cuda", lambda: False)
        with pytest.raises(SystemExit) as stop:
            on_gpu.main([*options, "--output", str(tmp_path / "x.json"), "--work", str(tmp_path / "work")])
        assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.json").exists()


def test_the_tokenizer_has_the_real_ones_size_and_cuts_at_77_tokens():
    tokenizer = models.make_tokenizer()
    ids = tokenizer("a photo of a person " * 30, truncation=True, max_length=77)["input_ids"]
    assert len(tokenizer) == 49_408 and tokenizer.model_max_length == 77
    assert len(ids) == 77 and ids[0] == 49_406 and ids[-1] == 49_407


def test_ticks_are_the_seconds_of_steady_steps():
    """The first interval allocates and is left out; a loop that passes by less often than twice is noticed."""

    class Method:
        def loss(self, value: int) -> int:
            return value + 1

    somewhere: Any = SimpleNamespace(on_cuda=False)
    ticks = steps.Ticks(somewhere)
    method = steps.with_ticks(Method(), "loss", ticks)
    assert [method.loss(number) for number in range(4)] == [1, 2, 3, 4] and isinstance(method, Method)
    assert len(ticks.seconds()) == 2
    method.loss(0)
    with pytest.raises(RuntimeError, match="no longer passes"):
        ticks.seconds()


def hidden() -> tuple[set[str], set[str]]:
    """Modules and distributions that are installed here but neither needed by the script nor by what it needs."""
    allowed, todo = set(), [*NEEDED, "pip"]
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in allowed:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        allowed.add(name)
        needed = [text for text in requires if "extra ==" not in text.replace("'", '"')]
        todo += [re.split(r"[\s;<>=!~\[(]", text)[0] for text in needed]
    modules = metadata.packages_distributions()
    lower = {module: {one.lower().replace("_", "-") for one in of} for module, of in modules.items()}
    return (
        {module for module, of in lower.items() if not of & allowed} - {"erase"},
        {one for of in lower.values() for one in of} - allowed,
    )


# All parts in one process, which saves the seconds in which each would import torch: commands are called, not started.
IN_ONE_PROCESS = """
import contextlib, importlib, io, json, sys, threading, time, traceback
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import on_gpu

one_at_a_time = threading.Lock()  # a process has one stderr, and one of many other things

class Here(on_gpu.Job):
    def try_process(self, command):
        said = io.StringIO()
        with one_at_a_time, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                if command[1] == "-m":
                    importlib.import_module(command[2]).main(command[3:])
                else:
                    on_gpu.main(command[2:])
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
        return SimpleNamespace(returncode=code, stdout="", stderr=said.getvalue())

folder = Path(sys.argv[2])
job = Here(folder / "on-gpu.json", folder / "work", "cpu", True, time.monotonic() + 3600, folder / "cifar10")
job.work.mkdir()
parts = {}
for name in [name for name in on_gpu.PARTS if name != "tests"]:
    parts[name] = {}
    for figures in on_gpu.PARTS[name](job):
        parts[name].update(figures)
job.output.write_text(json.dumps({"parts": parts}))
"""


@pytest.fixture
def bare(tmp_path):
    """Runs Python with the needed packages only; returns what it wrote and how it ended."""
    modules, distributions = hidden()
    assert {"scipy", "matplotlib", "sklearn", "nudenet", "peft"} <= modules and "torch" not in modules
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(modules=modules, distributions=distributions))
    path = os.pathsep.join([str(tmp_path), str(SCRIPT.parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> tuple[dict[str, Any], int]:
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        output = tmp_path / "on-gpu.json"
        assert output.is_file(), done.stderr[-2000:]
        parts = json.loads(output.read_text(encoding="utf-8"))["parts"]
        errors = {name: figures["error"] for name, figures in parts.items() if "error" in figures}
        assert not errors, done.stderr[-2000:]
        return parts, done.returncode

    return run


@pytest.mark.slow
@pytest.mark.ci
def test_every_part_runs_at_toy_size_with_the_needed_packages_only(bare, tmp_path):
    """No scipy, matplotlib, scikit-learn, nudenet or peft: what needs them says that it is left out, and why (1.4)."""
    parts, _ = bare("-c", IN_ONE_PROCESS, str(SCRIPT.parent), str(tmp_path))
    assert parts["environment"]["versions"]["scipy"] is None and parts["environment"]["toy"]
    assert parts["command"]["samples_png"] and parts["command"]["weights_changed"] > 0
    assert parts["command"]["compute"] == {"device": "cpu", "precision": "fp32"}
    assert (
        parts["low-memory"]["8 GB, --low-memory --density 0.1"]["fits"]
        and parts["low-memory"]["24 GB, no option"]["fits"]
    )
    assert parts["turns"]["8 GB"]["fits"] and parts["turns"]["same images"]
    assert parts["steps"]["training step"]["ratio"] > 0 and parts["steps"]["optimizer"]["repeats"] >= 2
    judged = {name: figures for part in parts.values() for name, figures in part.items() if "is_met" in str(figures)}
    assert len(judged) >= 13 and all(figures.get("ratio", figures.get("value", 1)) > 0 for figures in judged.values())
    assert "scipy" in parts["classifiers"]["cells at once"]["skipped"]
    launches = parts["steps"]["launches_per_step"]
    assert launches["training step"]["launches"] > 300 > 20 > launches["image generation"]["waits"]
    assert parts["mini"]["same_bits_twice"] and parts["mini"]["two steps, low memory"]["train_steps"] == 2
    assert parts["methods"]["uce"]["changed"] > 0
    assert "scipy and matplotlib" in parts["evaluation"]["skipped"] and parts["evaluation"]["images_scored"] == 4
    assert all(parts["classifiers"][name]["weights"]["changed"] for name in ("salun", "ft", "bs"))
    assert "scipy" in parts["cifar10"]["skipped"]


@pytest.mark.slow
def test_the_script_itself_runs_at_toy_size(bare, tmp_path):
    """Every part and every command in a process of its own, the collection of the GPU tests included (1.4)."""
    places = ["--output", str(tmp_path / "on-gpu.json"), "--work", str(tmp_path / "work")]
    parts, code = bare(str(SCRIPT), "--dry-run", *places)
    assert code == 0 and all(figures["part_seconds"] > 0 for figures in parts.values()) and len(parts) == 10
    assert parts["tests"]["tests"] == parts["tests"]["skipped"] > 10, "without a GPU each is skipped, but collected"


def test_commands_of_a_slice_run_side_by_side_and_those_left_are_stopped(tmp_path):
    def job(seconds: float) -> Any:
        return Job(tmp_path / "x.json", tmp_path, "cpu", True, time.monotonic() + seconds, tmp_path)

    def command(text: str) -> list[str]:
        return [sys.executable, "-c", text]

    met = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert sliced.finish([command(met.format(one, other)), command(met.format(other, one))], 2, job(60))
    pid = tmp_path / "pid"
    sleeps = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    assert not sliced.finish([command(sleeps)], 1, job(22))
    if pid.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    with pytest.raises(RuntimeError, match="ended with 1: ValueError: no memory left"):
        sliced.finish([command("raise ValueError('no memory left')")], 1, job(60))
