"""Folders made with tasks, judges and attacks of other packages: names without a colon, and reports made again."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erase.errors import EraseError
from erase.evaluation import cli
from erase.evaluation.attacks.registry import ATTACKS
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.report import pool
from erase.evaluation.tasks.registry import TASKS
from erase.registry import file_name, name_of_file

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
ATTACK = """
from dataclasses import dataclass
from erase.evaluation.attacks.protocol import Attack, Finding

@dataclass(frozen=True)
class Nothing(Attack):
    about = "changes nothing"
    needs = "nothing"
    points = ("once",)

    def search(self, given, seed):
        return {"once": Finding()}
"""
TASK, JUDGE, OWN_ATTACK = "red_circles:Colours", "brightness:Brightness", "nothing:Nothing"


@pytest.fixture
def parts(tmp_path, monkeypatch) -> Path:
    """The files of docs/extending.md and an attack, in a folder on Python's path."""
    folder = tmp_path / "parts"
    folder.mkdir()
    text = PAGE.read_text(encoding="utf-8")
    for name in ("red_circles.py", "brightness.py"):
        code = text.split(f"<!-- file {name} -->\n```python\n")[1].split("```")[0]
        (folder / name).write_text(code.replace('judges = ("mini",)', f'judges = ("{JUDGE}",)'))
    (folder / "nothing.py").write_text(ATTACK)
    task = (folder / "red_circles.py").read_text().replace('lines_of(lines, "mini")', f'lines_of(lines, "{JUDGE}")')
    (folder / "red_circles.py").write_text(task.replace('line["colour"] == sample.label', 'line["brightness"] > 0.3'))
    monkeypatch.syspath_prepend(folder)
    for name in ("red_circles", "brightness", "nothing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


@pytest.fixture
def fresh(monkeypatch) -> Callable[[], None]:
    """Forgets what was loaded, as a new process does."""

    def fresh() -> None:
        for registry in (TASKS, JUDGES, ATTACKS):
            monkeypatch.setattr(registry, "_loaded", {})

    fresh()
    return fresh


@pytest.fixture
def command(capsys, fresh) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in what is a new process for the registries."""

    def run(*arguments: object) -> tuple[int, str, str]:
        fresh()
        code: Any = 0
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ["mini", TASK, "package.module:Class"])
def test_the_name_of_a_part_is_known_from_its_file(name):
    assert ":" not in file_name(name) and name_of_file(file_name(name)) == name


def test_no_file_has_a_colon_and_report_score_and_verify_name_the_parts(command, parts, toy_pipeline_dir, tmp_path):
    out, few = tmp_path / "out", ("--num-images", 1, "--steps", 2, "--device", "cpu", "--quiet")
    models = ("--model", toy_pipeline_dir, "--base", toy_pipeline_dir)
    code, _, err = command("run", *models, "--task", TASK, *few, "--output", out)
    assert code == 0, err
    assert [path for path in out.rglob("*") if ":" in path.name] == []
    folder = out / toy_pipeline_dir.name / "red_circles+Colours"
    first = pool.read(folder)[0]["scores"]

    code, _, err = command("report", folder)
    assert code == 2 and f"give --task {TASK} to the command" in err
    code, _, err = command("report", folder, "--task", TASK)
    assert code == 2 and f"give --judge {JUDGE} to the command" in err
    (base,) = (path.parent for path in (out / "shared").glob("*red_circles+Colours*/manifest.json"))
    code, _, err = command("report", folder, "--base", base, "--task", TASK, "--judge", JUDGE)
    assert code == 0, err
    assert pool.read(folder)[0]["scores"] == first
    code, _, err = command("export", folder, "--output", tmp_path / "outcomes.csv")  # which needs no task
    assert code == 0, err

    code, _, err = command("verify", folder)
    assert code == 2 and "named by its class" in err and err.count("\n") == 1
    code, text, err = command("verify", folder, "--task", TASK, "--judge", JUDGE)
    assert code == 0 and "2 images are unchanged" in text, err

    for path in (folder / "scores").iterdir():
        path.unlink()
    code, _, err = command("score", folder)
    assert code == 2 and f"give --task {TASK} to the command" in err
    code, _, err = command("score", folder, "--task", TASK, "--judge", JUDGE)
    assert code == 0 and [path.name for path in (folder / "scores").glob("*.json")] == ["brightness+Brightness.json"]


def test_a_part_that_the_folder_was_not_made_with_is_refused(command, parts, toy_pipeline_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("a church\n")
    made = ("--task", "prompts", "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--device", "cpu", "--quiet")
    assert command("generate", "--model", toy_pipeline_dir, *made, "--output", tmp_path / "arm")[0] == 0
    assert command("score", tmp_path / "arm", "--judge", "thumbnails", "--quiet")[0] == 0
    for name in ("report", "verify"):
        code, _, err = command(name, tmp_path / "arm", "--judge", JUDGE)
        assert code == 2 and f"{tmp_path / 'arm'} has no judge {JUDGE}; it has thumbnails" in err
        code, _, err = command(name, tmp_path / "arm", "--task", TASK)
        assert code == 2 and f"{tmp_path / 'arm'} has no task {TASK}; it has prompts" in err
        code, _, err = command(name, tmp_path / "arm", "--attack", OWN_ATTACK)
        assert code == 2 and f"{tmp_path / 'arm'} has no attack" in err
    code, _, err = command("report", tmp_path / "arm", "--task", "no:Such")
    assert code == 2 and "it has prompts" in err


def test_verify_imports_no_module_because_a_file_has_its_name(command, parts, toy_pipeline_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("a church\n")
    made = ("--task", "prompts", "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--device", "cpu", "--quiet")
    assert command("generate", "--model", toy_pipeline_dir, *made, "--output", tmp_path / "arm")[0] == 0
    assert command("score", tmp_path / "arm", "--judge", "thumbnails", "--quiet")[0] == 0
    (parts / "planted_judge.py").write_text("raise SystemError('imported')")
    (tmp_path / "arm" / "scores" / "planted_judge+Judge.json").write_text("{}")
    for name in ("verify", "report"):
        code, _, err = command(name, tmp_path / "arm")
        assert code == 2 and "is not imported because a file says so" in err and "planted_judge" not in sys.modules


def test_an_attack_of_another_package_is_reported_again(command, parts, toy_pipeline_dir, erased_dir, tmp_path):
    pytest.importorskip("nudenet")
    models = ("--model", erased_dir, "--base", toy_pipeline_dir, "--concept", "church", "--judge", "nudenet")
    few = ("--num-images", 2, "--attack-seeds", 1, "--steps", 2, "--device", "cpu", "--quiet")
    out = tmp_path / "out"
    code, _, err = command("attack", *models, "--attack", OWN_ATTACK, *few, "--output", out)
    assert code == 0, err
    assert [path for path in out.rglob("*") if ":" in path.name] == []
    folder = out / "erased" / "attack-nothing+Nothing"
    code, _, err = command("report", folder)
    assert code == 2 and f"give --attack {OWN_ATTACK} to the command" in err
    assert command("report", folder, "--attack", OWN_ATTACK)[0] == 0


def test_a_file_name_that_no_part_has_is_an_error():
    with pytest.raises(EraseError, match="unknown judge"):
        JUDGES.stated(name_of_file("noone"), "here")
