"""The documentation cannot drift: commands parse, options exist, links resolve, Python compiles and runs, and tables
are whole.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import result_tables
from PIL import Image

from erase import cli, commandline, concepts, guards
from erase.classification import cli as classifier_cli
from erase.classification.presets import PRESETS
from erase.classification.settings import NETWORKS
from erase.classification.settings import Settings as ClassifierSettings
from erase.evaluation import cli as evaluation_cli
from erase.evaluation.attacks.registry import ATTACKS
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.options import AttackOptions, Drawing, Options
from erase.evaluation.tasks.registry import TASKS
from erase.families.scope import SCOPES
from erase.methods import METHODS
from erase.options.recipes import RECIPES
from erase.options.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
}
BLOCK = re.compile(r"(?:<!-- ([^\n]+?) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE, RUNS = "file ", "runs on the embedded model"  # marks before a block
FEW = ["--num-train-steps=2", "--num-forget=2", "--num-retain=2", "--num-inference-steps=2", "--num-samples=0"]
OTHERS = {"pip", "ruff", "pyright", "pytest", "mkdocs", "accelerate", "python"}  # programs that are not ours


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(mark, text) of the page's blocks in a language."""
    return [(mark, text) for mark, found, text in BLOCK.findall(PAGES[page]) if found == language]


def commands(page: str) -> list[list[str]]:
    """Words of every command in the page's shell blocks, without assignments in front."""
    found = []
    for _, text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    found.append(words)
                    words = []
    return [[word for i, word in enumerate(one) if i or not re.match(r"[A-Z_]+=", word)] for one in found]


def of_program(name: str) -> list[list[str]]:
    return [one[1:] for page in PAGES for one in commands(page) if one[0] == name]


def relative_links(page: str) -> list[str]:
    text = BLOCK.sub("", PAGES[page])
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http://", "https://"))]


def anchors(text: str) -> set[str]:
    """Of the page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_names_the_test_command():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 200
    assert sum(line.startswith("ruff check") for line in lines) == 1


def test_every_erase_command_is_accepted(monkeypatch, tmp_path):
    """Up to the point where work would begin."""
    asked: list[Settings] = []

    def run(settings: Settings, **_: object):
        asked.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("erase.runs.job.run", run)
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for mark, text in [*blocks(page, "python"), *blocks(page, "toml")]:
            if mark.startswith(FILE):
                Path(mark.removeprefix(FILE)).write_text(text)
    finished = Path("runs/second/run.json")  # of the run before, in one of the pages
    finished.parent.mkdir(parents=True)
    finished.write_text(json.dumps({"status": "done", "settings": {"concept": ["church"]}}))
    concepts.write(concepts.load("nudity"), "nudity.toml")  # by eval-concept words, in another one
    monkeypatch.syspath_prepend(tmp_path)
    given = of_program("erase-concept")
    jobs = [command for command in given if command[0].startswith("--") and command[0] != "--list"]
    for command in jobs:
        with pytest.raises(SystemExit, match="130"):
            cli.main(command)
    assert len(asked) == len(jobs) >= 5
    for command in given:
        assert command in jobs or command[0] == "--list" or command[0] in cli.COMMANDS


class Parsed(Exception):
    """The command was accepted."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    parse = commandline.Parser.parse_args

    def stop(self: commandline.Parser, arguments: list[str]) -> None:
        parse(self, arguments)
        raise Parsed

    monkeypatch.setattr(commandline.Parser, "parse_args", stop)


@pytest.mark.parametrize(
    ("program", "main", "least"),
    [("eval-concept", evaluation_cli.main, 5), ("unlearn-classifier", classifier_cli.main, 4)],
)
def test_every_command_of_the_other_programs_is_accepted(program, main, least, stop_after_parsing):
    found = of_program(program)
    for command in found:
        with pytest.raises(Parsed):
            main(command)
    assert len(found) >= least


def test_every_command_about_a_finished_run_is_accepted(stop_after_parsing):
    found = [command for command in of_program("erase-concept") if command[0] in cli.COMMANDS]
    for command in found:
        with pytest.raises(Parsed):
            cli.main(command)
    assert {command[0] for command in found} == set(cli.COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_every_other_command_names_a_known_program_and_files_that_exist(page):
    for program, *arguments in commands(page):
        assert program in OTHERS | {"erase-concept", "eval-concept", "unlearn-classifier"}, program
        if program == "python" and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).is_file(), arguments[0]


def known_options() -> set[str]:
    several = (Settings, ClassifierSettings, Options, AttackOptions, Drawing)
    fields = [name for asked in several for name in asked.__dataclass_fields__]
    known = {f"--{name.replace('_', '-')}" for name in fields} | {
        "--list",
        "--num_processes",
        "--use_fsdp",
        "--fsdp_version",
    }
    for path in [*(ROOT / "erase").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]:
        known |= set(re.findall(r'"(--[a-z0-9-]+)"', path.read_text(encoding="utf-8")))
    return known


@pytest.mark.parametrize("page", PAGES)
def test_every_option_in_the_text_exists(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", re.sub(r"<!-- | -->", "", PAGES[page])))
    named -= {word for one in commands(page) if one[0] in OTHERS - {"python"} for word in one}
    assert named <= known_options()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """Links of the pages in docs/ stay inside it, so that MkDocs can follow them."""
    here = (ROOT / page).parent
    for link in relative_links(page):
        name, _, anchor = link.partition("#")
        target = (here / name).resolve() if name else ROOT / page
        assert target.exists(), link
        if page.startswith("docs/"):
            assert target.is_relative_to(ROOT / "docs"), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_the_text_names_exists(page):
    for name in re.findall(r"`((?:eval|erase|tests|prompts|docs)/[\w/.-]+)`", PAGES[page]):
        if name != "eval/results/on-gpu.json":  # which eval/on_gpu.py writes
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_block_can_be_read(page):
    """Python compiles and what it imports is there; JSON and TOML parse."""
    for mark, text in blocks(page, "python"):
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(compile(ast.Module([node], []), page, "exec"), {})
        assert not mark or mark == RUNS or mark.startswith(FILE), mark
    for _, text in blocks(page, "json"):
        json.loads(text)
    for _, text in blocks(page, "toml"):
        tomllib.loads(text)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("README.md", METHODS),
        ("README.md", SCOPES),
        ("README.md", RECIPES),
        ("README.md", TASKS.names()),
        ("README.md", guards.PRESETS),
        ("docs/methods.md", METHODS),
        ("docs/methods.md", SCOPES),
        ("docs/methods.md", RECIPES),
        ("docs/methods.md", guards.PRESETS),
        ("docs/evaluation.md", TASKS.names()),
        ("docs/evaluation.md", JUDGES.names()),
        ("docs/attacks.md", ATTACKS.names()),
        ("docs/classifiers.md", PRESETS),
        ("docs/classifiers.md", NETWORKS),
        (
            "docs/stable-diffusion.md",
            [name for name in concepts.names() if concepts.load(name).judge["type"] != "mini"],
        ),
        ("docs/embedded-model.md", [name for name in concepts.names() if concepts.load(name).judge["type"] == "mini"]),
    ],
)
def test_every_name_is_in_a_table_of_its_page(page, names):
    rows = [line for line in PAGES[page].splitlines() if line.startswith("|")]
    for name in names:
        assert any(f"`{name}`" in row for row in rows), name


def test_the_quickstart_shows_and_explains_every_figure_that_the_evaluation_prints():
    """In the printed table the n, too: as many images as the task has samples of each role."""
    from erase.evaluation import expected
    from erase.evaluation.tasks import registry

    task = registry.build("mini", concepts.load("circle", model_family="mini"), Options())
    names = expected.scores(task.identity(), task.samples, ["mini", "thumbnails"], base=True, gold=False, real=False)
    page = PAGES["docs/quickstart.md"]
    shown = dict(re.findall(r"^(\w+\.\w+) .* (\d+)$", page, re.MULTILINE))
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert list(shown) == list(names)
    assert all(any(f"`{name}`" in row for row in rows) for name in names)
    num = {role: sum(sample.role == role for sample in task.samples) for role in ("forget", "synonym", "retain")}
    assert [int(shown[f"mini.{name}"]) for name in ("ua", "ua_synonym", "ra")] == list(num.values())
    assert f"generates {len(task.samples)} images each" in page


def test_the_attributes_of_a_family_on_the_page_are_declared():
    from erase.families.protocol import Family

    section = PAGES["docs/extending.md"].partition("## A model family")[2]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(names) >= 10
    for name in names:
        assert hasattr(Family, name) or name in Family.__annotations__, name


def test_every_public_name_is_in_the_table_of_the_api():
    import erase

    for name in erase.__all__:
        assert re.search(rf"^\|[^|]*`{name}`", PAGES["docs/python-api.md"], re.MULTILINE), name


def test_every_part_is_on_the_map():
    page = PAGES["docs/architecture.md"]
    for path in (ROOT / "erase").iterdir():
        if not path.name.startswith("_") and path.name != "py.typed":
            assert f"`{path.name}{'/' if path.is_dir() else ''}`" in page, path.name


def test_the_layers_are_those_of_the_imports():
    from test_imports import LAYERS

    rows = re.findall(r"^\| (\d+) \| (.+?) \|", PAGES["docs/architecture.md"], re.MULTILINE)
    floors = [set(re.findall(r"`(\w+)(?:\.py|/)`", row)) for _, row in rows]
    assert floors == [set(floor) for floor in LAYERS], "docs/architecture.md and LAYERS of test_imports.py differ"


def test_every_page_is_in_the_navigation():
    pages = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(pages) == sorted(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/"))


def test_the_changelog_names_this_version():
    from erase import __version__

    assert f"## {__version__}" in PAGES["CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_is_left_to_be_filled_in_and_no_target_is_told(page):
    assert not re.search(r"@@|TODO|TBD|\bwere wanted\b|\bmisses its target\b", PAGES[page])


def takes_long(table: str) -> bool:
    """The intervals of these are over seeds and images."""
    return table.split()[0] in {"methods", "masks", "scores", "differences", "summary"}


@pytest.mark.parametrize("page", [page for page in PAGES if result_tables.BLOCK.search(PAGES[page])])
def test_tables_of_results_are_those_of_the_json_files(page):
    assert result_tables.filled(PAGES[page], lambda name: not takes_long(name)) == PAGES[page]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("page", [page for page in PAGES if result_tables.BLOCK.search(PAGES[page])])
def test_tables_with_intervals_are_those_of_the_json_files(page):
    assert result_tables.filled(PAGES[page], takes_long) == PAGES[page]


def test_a_table_that_was_edited_is_noticed():
    page = PAGES["docs/results/samplers.md"]
    edited = page.replace("0.0165", "0.0001")
    assert edited != page
    assert result_tables.filled(edited) == page


def test_every_result_is_shown():
    shown = {block[2] for text in PAGES.values() for block in result_tables.BLOCK.finditer(text)}
    assert shown == set(result_tables.TABLES)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("page", [page for page in PAGES if any(mark == RUNS for mark, _ in blocks(page, "python"))])
def test_python_of_the_pages_runs_on_the_embedded_model(page, tmp_path, monkeypatch):
    """In a folder that holds runs/circle; each block by itself, in the page's order."""
    from erase import erase_concept

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERASE_CACHE", str(tmp_path / "cache"))
    erase_concept("circle", "mini", output="runs/circle", method="uce", quiet=True)
    for mark, text in blocks(page, "python"):
        if mark == RUNS:
            exec(compile(text, page, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.ci
def test_the_parts_of_the_page_run_from_the_command_line(tmp_path):
    """As docs/extending.md says, but for two steps on two images and three images to judge."""
    page, few = "docs/extending.md", {"erase-concept": FEW, "eval-concept": ["--num-images", "1", "--steps", "2"]}
    few |= {"unlearn-classifier": ["--train-epochs", "2"]}
    for mark, text in blocks(page, "python"):
        (tmp_path / mark.removeprefix(FILE)).write_text(text)
    (tmp_path / "my_images").mkdir()
    for angle in (0, 90, 180):  # flat images would be invalid
        Image.linear_gradient("L").rotate(angle).resize((64, 64)).convert("RGB").save(
            tmp_path / f"my_images/{angle}.png"
        )
    modules = {"erase-concept": "erase.cli", "eval-concept": "erase.evaluation.cli"}
    modules |= {"unlearn-classifier": "erase.classification.cli"}
    for program, *arguments in commands(page):
        more = [] if "images" in arguments else few[program]
        done = subprocess.run(
            [sys.executable, "-m", modules[program], *arguments, *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "ERASE_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs/pushed/run.json").read_text())
    assert record["method"]["strength"] == 0.5
    assert record["weights"]["changed"] > 0
    found = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/evaluation/*/*/results.json")
    }
    names = {score["name"] for results in found.values() for score in results["scores"]}
    assert {"brightness.mean", "colours.right"} <= names


@pytest.mark.parametrize(
    "name", sorted({one for page in PAGES for one in re.findall(r"`(erase(?:\.\w+)+)`", PAGES[page])})
)
def test_every_name_of_the_package_in_the_text_exists(name):
    if name in {TASKS.group, JUDGES.group}:  # entry points
        return
    module, rest = name, []
    while True:
        try:
            found = import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        found = getattr(found, part)
