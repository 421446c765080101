"""The batch scripts in eval/ ask the right things of the commands that do the work."""

import argparse
import importlib
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import erase
from erase.evaluation import cli
from erase.files import read_json, write_json
from erase.options.settings import Settings

SCRIPTS = Path(__file__).resolve().parent.parent / "eval"


@pytest.fixture
def start(monkeypatch):
    """Runs a script; nothing is erased or drawn, but every command is parsed and every option of a run checked."""
    asked: list[list[str]] = []
    parse = cli.Parser.parse_args

    class Parsed(Exception):
        pass

    def stop(self: Any, arguments: Any = None) -> None:
        parse(self, arguments)
        raise Parsed

    def command(arguments: list[str]) -> None:
        asked.append(arguments)
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(cli.Parser, "parse_args", stop)
            cli.COMMANDS[arguments[0]](arguments[1:])

    def erased(concept: str, model: str, **options: Any) -> Any:
        Settings(concept=concept, model=model, **options)
        return SimpleNamespace(folder=Path(options["output"]))

    def run(name: str, *arguments: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(cli, "main", command)
        monkeypatch.setattr(erase, "erase_concept", erased, raising=False)
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        return asked

    return run


def test_i2p_takes_many_models_and_the_options_of_run(start):
    (command,) = start("i2p.py", "--models", "a", "b", "--require", "i2p.clean>=0.98")
    assert command[:6] == ["run", "--task", "i2p", "--subset", "sexual", "--models"]


def test_class_forget_erases_and_evaluates_each_class(start):
    commands = start("class_forget.py", "--output", "out", "--num-images", "5")
    assert len(commands) == 10 and all("class-forget" in c and c[-2:] == ["--num-images", "5"] for c in commands)
    assert str(Path("out") / "garbage_truck") in commands[6]


def test_compare_methods_pools_the_seeds_of_each_method(start):
    commands = start("compare_methods.py", "--concept", "circle", "--model", "mini", "--task", "mini", "--seeds", "2")
    assert [c[0] for c in commands] == ["run"] * 8 + ["compare"]
    labels = [text.partition("=")[0] for text in commands[-1][1:9]]
    assert labels == ["salun", "salun", "salun-10", "salun-10", "random-mask", "random-mask", "no-mask", "no-mask"]


def test_published_cells_are_taken_over_unless_the_weights_are_others(monkeypatch, tmp_path, capsys):
    """`mini_methods.py --known` runs only what is new, and never mixes models in one table."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("mini_methods")
    figures = {"pixels.drift": 0.02, "quality.kid_base": 0.001}
    outcomes = {
        "mini.ua": "1110",
        "mini.ua_synonym": "11",
        "mini.ra": "0111",
        "mini.colour": "1-11",
        "mini.style": "----",
    }
    one = {"concept": "circle", "seed": 0, "model": module.model_hash(), "figures": figures, "outcomes": outcomes}
    one |= {"protocol": module.PROTOCOL, "recovered": ["0001"]}
    cells = [one | {"variant": "base"}, one | {"variant": "salun", "seconds": {"train": 2.0}}]
    asked = []
    monkeypatch.setattr(module, "prompts_of", lambda concept: ("a", "b", "b", "c"))
    monkeypatch.setattr(module, "prompts_of_word", lambda: ["a", "a", "b", "b"])
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(module, "cell", lambda folder, *what: asked.append(what))

    def start(known: list[dict[str, Any]]) -> None:
        write_json(tmp_path / "known" / "results.json", {"cells": known})
        (tmp_path / "known" / "gold").mkdir(exist_ok=True)
        (tmp_path / "known" / "gold" / "circle.safetensors").touch()
        arguments = ["--known", str(tmp_path / "known"), "--output", str(tmp_path / "out"), "--concept", "circle"]
        variants = ["--variant", "salun", "--variant", "relabel", "--seeds", "1"]
        monkeypatch.setattr(sys, "argv", ["mini_methods.py", *arguments, *variants])
        module.main()

    start(cells)
    assert asked == [("circle", "base", 0, None, "cpu"), ("circle", "relabel", 0, None, "cpu")]
    line = next(line for line in capsys.readouterr().out.splitlines() if "`salun`" in line)
    columns = [column.strip() for column in line.strip("|").split("|")]
    assert columns[2].startswith("25% [") and columns[3:6] == ["0%", "75%", "100%"] and columns[6] == "-"
    assert columns[11].startswith("25% [") and columns[12] == "2"
    assert read_json(tmp_path / "out" / "results.json")["cells"] == cells
    assert (tmp_path / "out" / "gold" / "circle.safetensors").exists()

    other = one | {"variant": "salun --mask saliency --density 0.05", "outcomes": outcomes | {"mini.ua": "1111"}}
    start([*cells, other, one | {"variant": "salun --mask random --density 0.05"}])
    lines = [[column.strip() for column in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    drawn = [columns[1:] for columns in lines if columns and columns[0] == "drawn"]
    assert [mask[0] for mask in drawn] == ["saliency", "random", "inverse", "random", "all"]
    assert drawn[0][2].startswith("0% [") and drawn[0][5].startswith("25% [") and drawn[1][2].startswith("25% [")
    assert drawn[1][1] == drawn[1][5] == drawn[2][2] == ""
    assert drawn[3][2].startswith("-25.0 [") and drawn[3][1] == drawn[3][5] == drawn[4][2] == ""

    unnamed = {key: value for key, value in cells[0].items() if key != "model"}
    for other in (cells[0] | {"model": "of yesterday"}, unnamed):
        with pytest.raises(SystemExit) as stop:
            start([other])
        assert stop.value.code == 2 and "other weights" in capsys.readouterr().err
    for other in (cells[0] | {"protocol": 1}, {key: value for key, value in cells[0].items() if key != "protocol"}):
        with pytest.raises(SystemExit) as stop:
            start([other])
        assert stop.value.code == 2 and f"with protocol 1; this is {module.PROTOCOL}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--known", "missing"), "missing/results.json cannot be read"),
        (("--gold", "circle"), "--gold is 'circle'; give CONCEPT=DIR, such as circle=runs/without-circle"),
        (("--gold", "moon=runs/without-moon"), "--gold names 'moon'; choose circle, heart, house"),
        (("--gold", "circle=runs/missing"), "runs/missing has no model_index.json"),
    ],
)
def test_bad_options_of_the_pixel_table_are_answered_in_one_line_before_any_cell(
    given, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("pixel_methods")
    cells: list[Any] = []
    monkeypatch.setattr(module, "cell", lambda *what: cells.append(what))
    monkeypatch.setattr(sys, "argv", ["pixel_methods.py", "--output", str(tmp_path), *given])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        module.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.startswith("pixel_methods.py: ") and said.count("\n") == 1
    assert not cells


@pytest.mark.slow
def test_one_step_of_stable_diffusion_xl_is_measured_phase_by_phase(tmp_path):
    """The same run on a network of a few numbers."""
    program = [sys.executable, str(SCRIPTS / "sdxl_step.py"), "--toy", "--size", "64"]
    where = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.json")]
    subprocess.run([*program, *where], check=True, capture_output=True)
    found = read_json(tmp_path / "out.json")
    assert {"loading", "training"} <= found["phases"].keys() <= {"loading", "images", "mask", "training", "writing"}
    assert 0 < found["changed"] <= found["ones"] == found["weights"] // 10


RESUMED = ("attacked_methods", "cifar10", "cifar10_diffusion", "class_forget", "compare_methods", "mini_effect",
           "mini_methods", "on_gpu", "pixel_methods", "sampler_effect")  # fmt: skip


@pytest.mark.parametrize("name", sorted(p.stem for p in SCRIPTS.glob("*.py") if "__main__" in p.read_text("utf-8")))
def test_an_interrupt_of_a_script_is_one_line(name, monkeypatch, capsys):
    """sdxl_memory has no options and computes for seconds; i2p is one call of eval-concept, which reports itself."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if name in ("sdxl_memory", "i2p"):
        pytest.skip("reports elsewhere or nothing")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", interrupted)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 130 and said.startswith(f"{name}.py: interrupted") and said.count("\n") == 1
    assert (name in RESUMED) == ("the same command continues" in said)
