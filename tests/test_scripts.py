"""The batch scripts in eval/ ask the right things of the commands that do the work."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import erase
from erase.evaluation import cli
from erase.settings import Settings

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
