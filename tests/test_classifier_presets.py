"""Laws of presets.toml and of the registry of methods: every line can be run, and a wrong one is one clear line."""

import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

from erase import registry
from erase.classification import methods, run
from erase.classification.methods import REGISTRY, Descends, Plan, Solves, Task, Values
from erase.classification.methods import registry as method_registry
from erase.classification.presets import PATH, PRESETS, TRAINING, TUNED, Preset, read
from erase.classification.settings import NETWORKS, Settings
from erase.errors import EraseError

ENOUGH = '[training.default]\nnetwork = "mlp"\nbatch_size = 8\nepochs = 1\nlearning_rate = 0.1\n'


def test_every_preset_names_a_registered_method_with_options_that_it_has():
    named = [*PRESETS.items(), *(pair for table in TUNED.values() for pair in table.items())]
    for name, preset in named:
        if preset.method:
            options = {key: str(value) for key, value in preset.options}
            method = methods.make(methods.find(name), name, options)
            assert type(method).__name__ == preset.method.partition(":")[2]
        else:
            assert name == "retrain"
    assert [name for name in PRESETS if name != "retrain"] == REGISTRY.names()
    assert {training.network for training in TRAINING.values()} <= set(NETWORKS)


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_registered_method_is_a_frozen_dataclass_that_descends_or_solves(name):
    cls: Any = methods.find(name)
    assert cls.__dataclass_params__.frozen
    assert issubclass(cls, Descends) != issubclass(cls, Solves)
    assert cls.__doc__ and cls.__module__.startswith("erase.classification.methods.")


def test_a_method_with_a_misspelt_part_cannot_be_made():
    """The control has the right name."""

    @dataclass(frozen=True)
    class Wrong(Descends):
        def plam(self, task: Task) -> Plan: ...

    @dataclass(frozen=True)
    class Right(Descends):
        def plan(self, task: Task) -> Plan:
            return Plan(passes=lambda: [task.forget])

    with pytest.raises(TypeError, match="abstract"):
        Wrong()  # pyright: ignore[reportAbstractUsage]
    with pytest.raises(TypeError, match="settel"):
        Plan(passes=lambda: [], settel=None)  # pyright: ignore[reportCallIssue]
    assert isinstance(Right(), Descends)


def test_an_unknown_method_is_one_line():
    with pytest.raises(EraseError, match="unknown method 'salum'; did you mean salun?"):
        methods.find("salum")


@dataclass(frozen=True)
class Towards(Descends):
    """A method as another package writes it, with its own defaults."""

    epochs = 3
    learning_rate = 0.02
    strength: float = 1.0

    def plan(self, task: Task) -> Plan:
        loss = F.cross_entropy
        return Plan(passes=lambda: [task.retain], loss=lambda x, y, at: self.strength * loss(task.model(x), y))


@dataclass(frozen=True)
class Nameless(Solves):
    where: str = "here"

    def solve(self, task: Task) -> Values:
        return {}


class Plain(Solves):
    def solve(self, task: Task) -> Values:
        return {}


def installed(monkeypatch, **paths: str) -> None:
    """As if packages registered these classes."""
    points = [EntryPoint(name, path, "erase.classification.methods") for name, path in paths.items()]
    monkeypatch.setattr(
        registry, "entry_points", lambda group: points if group == "erase.classification.methods" else []
    )
    monkeypatch.setattr(method_registry, "REGISTRY", method_registry.made_registry())


@pytest.mark.parametrize("name", ["towards", f"{__name__}:Towards"])
def test_a_method_of_another_package_is_found_by_its_name_or_class(name, monkeypatch):
    """It has its own defaults and options; without the package its name is unknown."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or import_module(__name__))
    with pytest.raises(EraseError, match="--method is 'towards'"):
        Settings(method="towards")
    installed(monkeypatch, towards=f"{__name__}:Towards")
    settings = Settings(method=name, set=("strength=2",)).resolved()
    assert (settings.epochs, settings.learning_rate, settings.mask) == (3, 0.02, "none")
    assert run.make(settings) == Towards(strength=2)
    assert "towards" in methods.others() and "salun" not in methods.others()
    with pytest.raises(EraseError, match="no option 'strenth'; did you mean strength?"):
        run.check_method(Settings(method=name, set=("strenth=2",)).resolved())


@pytest.mark.parametrize(
    ("cls", "message"),
    [("Nameless", "the option 'where' without a default that is a number"), ("Plain", "is not a dataclass")],
)
def test_a_class_that_does_not_fit_is_one_line(cls, message):
    with pytest.raises(EraseError, match=message):
        methods.find(f"{__name__}:{cls}")


def test_a_tuned_line_replaces_fields_of_the_methods_general_line(tmp_path):
    path = tmp_path / "presets.toml"
    path.write_text(
        ENOUGH
        + '[presets]\nft = { method = "FineTune", mask = "saliency", epochs = 3, learning_rate = 1 }\n'
        + "[tuned.digits.half]\nft = { learning_rate = 0.5, options = { alpha = 2, share = 1e-6 } }\n"
    )
    found = read(path)
    assert found.general["ft"] == Preset("FineTune", 3, 1.0, "saliency")
    options = (("alpha", 2), ("share", 1e-6))
    assert found.tuned["digits", "half"]["ft"] == Preset("FineTune", 3, 0.5, "saliency", options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[presets", "is not TOML"),
        ("[presetz]", "unknown name 'presetz'; did you mean presets?"),
        ("[presets]\nft = 3", r"\[presets\] ft is 3; it must be a table"),
        ("[presets]\nft = { epoch = 3 }", r"\[presets\] ft: unknown name 'epoch'; did you mean epochs?"),
        ("[presets]\nft = { epochs = 1.5 }", r"\[presets\] ft: epochs is 1.5; it must be a whole number, 0 or more"),
        ("[presets]\nft = { epochs = true }", "epochs is True; it must be a whole number"),
        ("[presets]\nft = { learning_rate = nan }", "learning_rate is nan; it must be a number"),
        ("[presets]\nft = { learning_rate = -1 }", "learning_rate is -1; it must be a number, 0 or more"),
        ("[presets]\nft = { method = 3 }", "method is 3; it must be a string"),
        ('[presets]\nft = { options = { alpha = "1" } }', "options is .*; it must be a table of numbers"),
        ("[tuned.digits.whole]", r"\[tuned.digits\]: unknown name 'whole'; choose share, half, class"),
        ("[tuned.digits.half]\nft = {}", r"\[tuned.digits.half\]: unknown name 'ft'"),
        ('[training.x]\nnetwork = "mlp"', r"\[training.x\] has no batch_size"),
    ],
)
def test_a_wrong_line_is_named_with_its_table(text, message, tmp_path):
    path = tmp_path / "presets.toml"
    path.write_text(ENOUGH + text)
    with pytest.raises(EraseError, match=message) as error:
        read(path)
    assert str(error.value).startswith(str(path))


def test_statistics_move_as_published_unless_a_data_set_says_otherwise():
    assert {name: training.batch_norm for name, training in TRAINING.items()} == {
        "default": "moving",
        "digits": "frozen",
        "drawings": "frozen",
        "cifar10": "moving",
        "cifar10-small": "moving",
        "cifar10-small-frozen": "frozen",
    }
    assert Settings(data="cifar10").resolved().batch_norm == "moving"
    assert Settings(data="digits").resolved().batch_norm == "frozen"
    assert Settings(data="digits", batch_norm="moving").resolved().batch_norm == "moving"


def test_a_file_that_is_not_there_or_has_no_default_is_one_line(tmp_path):
    with pytest.raises(EraseError, match="cannot be read"):
        read(tmp_path / "none.toml")
    (tmp_path / "presets.toml").write_text("[presets]\n")
    with pytest.raises(EraseError, match=r"has no table \[training.default\]"):
        read(tmp_path / "presets.toml")


def test_the_file_ships_beside_its_reader():
    """The wheel holds every file in erase/ that git does not ignore."""
    ignored = subprocess.run(["git", "check-ignore", "-q", str(PATH)], cwd=PATH.parent, capture_output=True)
    assert PATH.is_file() and ignored.returncode != 0
    assert Settings(data="elsewhere").resolved().network == TRAINING["default"].network


def test_the_help_needs_little_time():
    """CPU time of the process, the interpreter's start included; the median of three."""
    code = "import resource, sys; from erase.classification.cli import main\n"
    code += "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "used = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "print('torch' in sys.modules, used.ru_utime + used.ru_stime, file=sys.stderr)"
    pytest.importorskip("resource")
    found = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(PATH).parents[2])
        loaded, seconds = done.stderr.split()
        assert loaded == "False"
        found.append(float(seconds))
    assert sorted(found)[1] < 0.3, found
