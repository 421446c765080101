"""Imports point one way, `import erase` is cheap, and no optional package is needed before it is used."""

import ast
import functools
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import erase
from erase.options.declare import forms_of
from erase.options.settings import Settings

PACKAGE = Path(erase.__file__).parent
REPOSITORY = Path(__file__).resolve().parent.parent

# A module may import those of its own layer and of the layers before it; files of a folder are in the folder's layer.
LAYERS = (
    {"conditioning", "errors", "locks", "processes", "progress", "version"},
    {"device", "files", "graphs", "optim", "pickles", "statistics"},
    {"registry", "tensor_files", "words"},
    {"concepts", "delta", "masks"},
    {"guards", "methods"},
    {"options"},
    {"commandline", "families", "guiders"},
    {"data", "export"},
    {"mini", "training"},
    {"classification", "runs"},
    {"cli"},
    {"evaluation"},
)
OPTIONAL = {
    "nudenet",
    "sklearn",
    "onnxruntime",
    "cv2",
    "torchmetrics",
    "peft",
    "datasets",
    "tensorboard",
    "wandb",
    "xformers",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package goes by its folder's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, module: str, known: set[str], *, is_package: bool = False) -> set[str]:
    """The modules among `known` that the source imports anywhere, in a function too; not those for type checkers."""
    parent = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in _run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name for alias in node.names for name in _longest(alias.name, known)}
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) - node.level + 1] if node.level else []
            home = ".".join([*base, *filter(None, [node.module])])
            found |= {name for alias in node.names for name in _longest(f"{home}.{alias.name}", known)}
    return found - {module}


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _run_time_nodes(node)


def _longest(name: str, known: set[str]) -> list[str]:
    """[the longest start of a dotted name that is a known module], or []."""
    starts = itertools.accumulate(name.split("."), lambda start, part: f"{start}.{part}")
    return [start for start in starts if start in known][-1:]


@functools.cache
def arrows() -> dict[str, set[str]]:
    """module -> modules of erase that it imports."""
    known = set(modules())
    return {
        name: imported(path.read_text(encoding="utf-8"), name, known, is_package=path.name == "__init__.py")
        for name, path in modules().items()
    }


def layer(module: str) -> int:
    """Of the root, which names what its children have for the users of the package: after all others."""
    if module == "erase":
        return len(LAYERS)
    name = module.split(".")[1]
    return next(number for number, names in enumerate(LAYERS) if name in names)


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_has_a_layer():
    homeless = [name for name in modules() if name != "erase" and not any(name.split(".")[1] in one for one in LAYERS)]
    assert not homeless, "put each into LAYERS, after all that it imports"


def test_imports_point_from_later_layers_to_earlier_ones():
    wrong = [f"{name} -> {to}" for name, targets in arrows().items() for to in targets if layer(to) > layer(name)]
    assert not wrong


def test_imports_have_no_circle():
    """Within a layer too, and counting imports inside functions: peel off what imports nothing that is left."""
    left = dict(arrows())
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        left = {name: targets for name, targets in left.items() if name not in free}
    assert not left


def test_no_file_imports_a_private_name_of_another():
    """A name with an underscore belongs to its file; tests may look inside."""
    wrong = []
    for path in [*modules().values(), *sorted((REPOSITORY / "eval").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {"erase", "bench"}:
                wrong += [f"{path}: {alias.name}" for alias in node.names if re.match(r"_(?!_)", alias.name)]
    assert not wrong


def test_nothing_but_evaluation_imports_evaluation():
    outside = {name: targets for name, targets in arrows().items() if not name.startswith("erase.evaluation")}
    assert not [name for name, targets in outside.items() if any(to.startswith("erase.evaluation") for to in targets)]


def test_what_stands_below_the_families_knows_neither_diffusers_nor_transformers():
    libraries = {"diffusers", "transformers", "accelerate"}
    for name, path in modules().items():
        if layer(name) < layer("erase.families") and name != "erase.progress":  # which hides the libraries' bars
            assert not imported(path.read_text(encoding="utf-8"), name, libraries), name


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import erase.guards", {"erase.guards"}),
        ("import erase.guards as job, json", {"erase.guards"}),
        ("from erase import guards, __version__", {"erase.guards", "erase"}),
        ("from erase.mini.world import draw", {"erase.mini.world"}),
        ("from erase.mini import world, nothing", {"erase.mini.world", "erase.mini"}),
        ("from . import world", {"erase.mini.world"}),
        ("from ..guards import make", {"erase.guards"}),
        ("def f():\n    try:\n        from erase.guards import make\n    finally:\n        pass", {"erase.guards"}),
        ("if TYPE_CHECKING:\n    from erase.guards import make", set()),
        ("import eraser.guards", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source, expected):
    known = {"erase", "erase.guards", "erase.mini", "erase.mini.world"}
    assert imported(source, "erase.mini.train", known) == expected


def test_no_file_is_named_for_having_no_idea_of_its_own():
    forbidden = {"utils", "util", "common", "base", "core", "helpers", "manager", "misc"}
    files = [path for folder in (PACKAGE, REPOSITORY / "eval", REPOSITORY / "tests") for path in folder.rglob("*")]
    assert not [path for path in files if path.stem in forbidden]


def test_nothing_hides_the_builtin_eval_or_a_library():
    """`import eval` takes the builtin away; `python eval/nudenet.py` would import itself instead of the library."""
    scripts = sorted((REPOSITORY / "eval").glob("*.py"))
    assert not {path.stem for path in scripts} & {*OPTIONAL, "torch", "diffusers", "transformers", "numpy", "scipy"}
    for path in [*modules().values(), *scripts, *(REPOSITORY / "tests").glob("*.py")]:
        assert not imported(path.read_text(encoding="utf-8"), "script", {"eval"}), path


@pytest.mark.parametrize(
    "module",
    [
        "erase",
        "erase.cli",
        "erase.concepts.concept",
        "erase.options.settings",
        "erase.methods",
        "erase.classification.cli",
    ],
)
def test_what_the_help_needs_loads_no_library(module):
    heavy = "{'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'accelerate', 'safetensors', 'huggingface_hub'}"
    code = f"import sys, {module}; print('{module}' in sys.modules, *sorted({heavy} & set(sys.modules)))"
    assert run_python(code).split() == ["True"]


@pytest.mark.slow
@pytest.mark.ci
def test_every_module_imports_without_the_modules_that_windows_lacks():
    """The libraries are there already: they choose other modules on Windows. The memory of the process is then not
    measured. (4.7)
    """
    code = """
import importlib, sys

def import_all():
    for name in sys.argv[1].split(","):
        importlib.import_module(name)

import_all()
for name in [name for name in sys.modules if name.split(".")[0] == "erase"]:
    del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import_all()
from erase.runs.machine import peak_memory
print("process" in peak_memory())
"""
    importable = [name for name in modules() if not name.endswith("__main__")]
    assert run_python(code, ",".join(importable)) == "False\n"


@pytest.mark.slow
@pytest.mark.ci
def test_every_module_imports_without_any_extra():
    """The control is in the same process: the optional packages cannot be imported there."""
    code = """
import importlib, importlib.util, sys

blocked = sys.argv[1].split(",")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

find_spec = importlib.util.find_spec  # libraries ask whether a package is there before they import it
importlib.util.find_spec = lambda name, package=None: None if name in blocked else find_spec(name, package)
sys.meta_path.insert(0, Absent())
for name in blocked:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is not blocked")
for name in sys.argv[2].split(","):
    importlib.import_module(name)
print("imported")
"""
    importable = [name for name in modules() if not name.endswith("__main__")]
    assert run_python(code, ",".join(sorted(OPTIONAL)), ",".join(importable)).split() == ["imported"]


def requirements() -> set[str]:
    """Names of all packages that pyproject.toml asks for, those of extras included."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    return {re.split(r"[^\w-]", line)[0] for line in lines} - {project["name"]}


def test_hints_on_installing_name_packages_of_pyproject():
    """The project itself is on no package index, where anybody could take its name. (4.2)"""
    named, elsewhere = set(), []
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "missing":
                named.add(ast.unparse(node.args[0]).strip("'"))
            if isinstance(node, ast.Constant) and "pip install" in str(node.value) and name != "erase.errors":
                elsewhere.append(name)
    assert not elsewhere, "use erase.errors.missing"
    assert "settings.report_to" in named
    named |= {choice for choice in forms_of(Settings)["report_to"].choices}
    assert named - {"settings.report_to"} <= requirements()
    assert {"nudenet", "scikit-learn", "wandb"} <= named


def test_documentation_installs_the_project_from_a_clone_only():
    for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]:
        for line in re.findall(r"pip install .*", path.read_text(encoding="utf-8")):
            assert "erase-concept" not in line.split("&&")[0], line
