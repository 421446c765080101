"""Registries list without importing, load when used, and say what is wrong with a part and whose it is."""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import pytest

from erase.errors import EraseError
from erase.registry import OWN, Registry, in_folder, misspelt


class Shape(ABC):
    """The base of the parts in these tests."""

    num_sides = 0
    colours: tuple[str, ...] = ()

    @abstractmethod
    def area(self) -> float: ...


class Square(Shape):
    num_sides = 4

    def area(self) -> float:
        return 1.0


def registry(**options) -> Registry[Shape]:
    own = {"square": f"{__name__}:Square"}
    return Registry("shape", base=Shape, group="erase.test_shapes", own=own, **options)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This module under its name, also where pytest imported it in another way."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Square.__module__])


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with entry points and one module on the path, as pip would."""
    modules = []

    def put(distribution: str, points: dict[str, str], source: str = "") -> None:
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[erase.test_shapes]", *lines, ""]))
        module = distribution.replace("-", "_")
        (folder / f"{module}.py").write_text(f"from {__name__} import Shape\n{source}")
        modules.append(module)
        monkeypatch.syspath_prepend(folder)

    yield put
    for module in modules:
        sys.modules.pop(module, None)


DISC = """
class Disc(Shape):
    def area(self):
        return 3.0
"""


def test_our_own_part_is_loaded():
    assert registry().load("square") is Square
    assert registry().names() == ["square"]
    assert registry().entry("square").distribution == OWN


def test_parts_of_other_packages_are_listed_without_import_and_loaded_on_use(install):
    install("round-shapes", {"disc": "round_shapes:Disc"}, DISC)
    shapes = registry()
    assert shapes.names() == ["square", "disc"]
    assert "round_shapes" not in sys.modules
    assert shapes.load("disc")().area() == 3.0
    assert "round_shapes" in sys.modules


def test_an_unknown_name_gets_a_suggestion_from_all_parts(install):
    install("round-shapes", {"disc": "round_shapes:Disc"}, DISC)
    with pytest.raises(EraseError, match=r"^unknown shape 'dics'; did you mean disc\? \(square, disc\)$"):
        registry().load("dics")
    with pytest.raises(EraseError, match=r"^unknown shape 'zzz' \(square, disc\)$"):
        registry().load("zzz")


def test_a_name_that_two_packages_have_is_refused_with_both_and_their_classes_still_load(install):
    install("copy-cat", {"square": "copy_cat:Disc"}, DISC)
    shapes = registry()
    wanted = f"'square' is in 2 installed packages, {OWN} and copy-cat; .*{__name__}:Square or copy_cat:Disc"
    with pytest.raises(EraseError, match=wanted):
        shapes.load("square")
    assert shapes.load(f"{__name__}:Square") is Square
    assert shapes.load("copy_cat:Disc")().area() == 3.0
    assert shapes.names() == ["square"]


def test_a_broken_package_is_an_error_that_names_it_and_only_for_its_own_parts(install):
    install("broken-shapes", {"disc": "broken_shapes:Disc"}, "import no_such_module")
    install("rude-shapes", {"cube": "rude_shapes:Cube"}, "raise RuntimeError('not today')")
    install("empty-shapes", {"cone": "empty_shapes:Cone"})
    shapes = registry()
    assert shapes.load("square") is Square
    with pytest.raises(EraseError, match="'disc' of the package broken-shapes cannot be imported .*no_such_module"):
        shapes.load("disc")
    with pytest.raises(EraseError, match="'cube' of the package rude-shapes cannot be imported .*not today"):
        shapes.load("cube")
    with pytest.raises(EraseError, match="'cone' of the package empty-shapes cannot be imported .*Cone"):
        shapes.load("cone")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Part: ...", r"is not derived from .*\.Shape"),
        ("Part = 3", "is not a class but int"),
        ("class Part(Shape): ...", "does not define area"),
        (DISC.replace("Disc", "Part") + "    num_side = 3\n", "defines 'num_side'; did you mean num_sides"),
    ],
)
def test_a_class_that_is_no_such_part_is_refused_when_it_is_loaded(install, source, message):
    install("odd-shapes", {"part": "odd_shapes:Part"}, source)
    with pytest.raises(EraseError, match=f"^the shape 'part' of the package odd-shapes {message}"):
        registry().load("part")
    with pytest.raises(EraseError, match=f"^the shape 'odd_shapes:Part' {message}"):
        registry().load("odd_shapes:Part")


def test_a_further_check_is_made():
    assert registry(check=lambda cls: None).load("square") is Square
    with pytest.raises(EraseError, match="'square' of the package erase-concept has 4 sides"):
        registry(check=lambda cls: f"has {cls.num_sides} sides").load("square")


def test_a_class_by_its_module_is_loaded_or_refused():
    assert registry().load(f"{__name__}:Square") is Square
    with pytest.raises(EraseError, match=r"'no_such:Thing' cannot be imported .*; write package\.module:Class"):
        registry().load("no_such:Thing")
    with pytest.raises(EraseError, match="':' cannot be imported"):
        registry().load(":")


def test_a_class_that_is_given_is_found_by_its_name():
    """A local class cannot be imported: it is found only because it was given."""

    class Local(Square):
        pass

    shapes = registry()
    name = f"{__name__}:{Local.__qualname__}"
    with pytest.raises(EraseError, match="cannot be imported"):
        shapes.load(name)
    assert shapes.give(Local) == name
    assert shapes.load(name) is Local
    with pytest.raises(EraseError, match="is not derived from"):
        shapes.give(int)  # pyright: ignore[reportArgumentType]


def test_a_folder_is_a_registry_of_one_part_a_file(tmp_path, monkeypatch):
    package = tmp_path / "shape_folder"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__", "protocol", "registry", "_hidden", "inner/__init__"):
        (package / f"{name}.py").write_text("raise AssertionError('imported')" if name == "_hidden" else "")
    (package / "right_angle.py").write_text(f"from {__name__} import Shape, Square\nclass Own(Square): ...")
    (package / "two.py").write_text(f"from {__name__} import Square\nclass A(Square): ...\nclass B(Square): ...")
    monkeypatch.syspath_prepend(tmp_path)
    own = in_folder("shape_folder", package)
    assert own == {"right-angle": "shape_folder.right_angle", "two": "shape_folder.two"}
    shapes = Registry("shape", base=Shape, group="erase.test_shapes", own=own)
    assert shapes.load("right-angle").__name__ == "Own"
    with pytest.raises(EraseError, match="defines 2 classes derived from Shape; name one as module:Class"):
        shapes.load("two")
    for name in [name for name in sys.modules if name.partition(".")[0] == "shape_folder"]:
        del sys.modules[name]


def test_options_and_names_of_its_own_are_not_misspelt():
    @dataclass
    class Striped(Square):
        colour: str = "red"
        stripes = 3

    assert misspelt(Striped, Shape) == {}

    class Painted(Square):
        colour = "red"

    assert misspelt(Painted, Shape) == {"colour": "colours"}


def test_the_registry_needs_only_the_standard_library():
    import ast

    import erase.registry

    tree = ast.parse(Path(erase.registry.__file__).read_text())
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    named |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(name) for name in named if str(name).split(".")[0] not in sys.stdlib_module_names} == {
        "erase.errors",
        "erase.words",
    }
