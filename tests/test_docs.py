"""README cannot drift: its commands parse, its options, files and modules exist, and its table of methods is whole."""

import re
import shlex
from pathlib import Path

import pytest

from erase import cli, commandline
from erase.classification import cli as classifier_cli
from erase.classification.presets import PRESETS
from erase.classification.settings import NETWORKS
from erase.classification.settings import Settings as ClassifierSettings
from erase.evaluation.options import Drawing, Options
from erase.evaluation.tasks import ABOUT
from erase.families.scope import SCOPES
from erase.methods import METHODS
from erase.options.recipes import RECIPES
from erase.options.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
(LISTING,) = [block for language, block in BLOCKS if not language]
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for whole in block.splitlines()
    for line in whole.split(" && ")
    if line.strip()
]


def test_every_erase_command_is_accepted(monkeypatch):
    """Up to the point where work would begin."""
    asked: list[Settings] = []

    def run(settings: Settings, **_: object):
        asked.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("erase.runs.job.run", run)
    commands = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("erase-concept ")]
    jobs = [command for command in commands if command[0].startswith("--") and command[0] != "--list"]
    for command in jobs:
        with pytest.raises(SystemExit, match="130"):
            cli.main(command)
    assert len(asked) == len(jobs) >= 5
    for command in commands:
        assert command in jobs or command[0] in cli.COMMANDS


def test_every_eval_command_is_accepted(monkeypatch):
    """Up to the point where work would begin."""
    from erase.evaluation import cli as evaluation

    class Stop(Exception):
        pass

    def stop(self: commandline.Parser, arguments: list[str]) -> None:
        parse(self, arguments)
        raise Stop

    parse = commandline.Parser.parse_args
    monkeypatch.setattr(commandline.Parser, "parse_args", stop)
    commands = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("eval-concept ")]
    for command in commands:
        with pytest.raises(Stop):
            evaluation.main(command)
    assert len(commands) >= 5


def test_every_unlearn_command_is_accepted(monkeypatch):
    """Up to the point where work would begin."""

    class Stop(Exception):
        pass

    def stop(self: commandline.Parser, arguments: list[str]) -> None:
        parse(self, arguments)
        raise Stop

    parse = commandline.Parser.parse_args
    monkeypatch.setattr(commandline.Parser, "parse_args", stop)
    commands = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("unlearn-classifier ")]
    for command in commands:
        with pytest.raises(Stop):
            classifier_cli.main(command)
    assert len(commands) >= 4


def test_every_option_in_the_text_exists():
    known = {f"--{name.replace('_', '-')}" for name in Settings.__dataclass_fields__}
    known |= {
        "--list",
        "--delta",
        "--to",
        "--output",
        "--num_processes",
        "--check",
        "--size",
        "--only",
        "--without",
    }
    known |= {f"--{name.replace('_', '-')}" for name in ClassifierSettings.__dataclass_fields__}
    for asked in (Options, Drawing):
        known |= {f"--{name.replace('_', '-')}" for name in asked.__dataclass_fields__}
    for name in ("evaluation", "classification"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "erase" / name / "cli.py").read_text(encoding="utf-8")))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) <= known


def test_every_file_that_the_text_names_exists():
    named = re.findall(r"\]\(([\w/.-]+)\)|((?:eval|tests)/\w+\.(?:py|sh))", README)
    for name in filter(None, (part for pair in named for part in pair)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\b(\w+\.py)\b", LISTING):
        assert [*(ROOT / "erase").rglob(name), *(ROOT / "eval").glob(name)], name


def test_every_room_is_on_the_file_map():
    for path in (ROOT / "erase").iterdir():
        if not path.name.startswith("_") and path.name != "py.typed":
            assert path.name in LISTING, path.name


@pytest.mark.parametrize("names", [METHODS, RECIPES, SCOPES, ABOUT, PRESETS, NETWORKS])
def test_every_method_recipe_scope_and_task_is_in_a_table(names):
    for name in names:
        assert f"`{name}`" in README, name


def test_no_figure_is_left_to_be_filled_in():
    assert "@@" not in README
