"""The contract of methods: its defaults, and what is refused when a class is registered, before a run begins."""

import json
import sys
from dataclasses import dataclass, fields
from typing import Any

import pytest

from erase import methods
from erase.errors import EraseError
from erase.methods import METHODS, ClosedForm, TrainedMethod, registry
from erase.methods.relabel import Relabel
from erase.options.model_defaults import read_defaults
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.runs.planning import make_method


@dataclass(frozen=True)
class Plain:
    """A method that does not derive from the protocol."""

    scale: float = 1.0

    def loss(self, model, frozen, batch):
        yield from ()


@dataclass(frozen=True)
class Solved:
    def solve(self, weights, text):
        return {}, {}


def test_a_class_that_does_not_derive_gets_every_default_and_keeps_its_own_parts():
    @dataclass(frozen=True)
    class Own(Plain):
        images = "noise"
        anchors = False
        needs_base = True
        teacher_decay: float = 0.5
        prepare_batches: int = 2

        def shrink(self, moved, step, num_steps): ...

        def prepare(self, weights, gradients, shapes, draw): ...

    plain, own = (methods.make(methods.give(cls)[0], {}, ()) for cls in (Plain, Own))
    assert isinstance(plain, Plain) and isinstance(plain, TrainedMethod) and repr(plain).endswith("Plain(scale=1.0)")
    assert (plain.images, plain.retains, plain.anchors, plain.needs_base) == ("concept", True, True, False)
    assert (plain.balance, plain.teacher_decay, plain.prepares, plain.shrinks) == (None, None, False, False)
    assert (own.images, own.retains, own.anchors, own.needs_base) == ("noise", True, False, True)
    assert (own.balance, own.teacher_decay, own.prepares, own.shrinks) == (None, 0.5, True, True)
    assert own.hyperparameters() == {"scale": 1.0, "teacher_decay": 0.5, "prepare_batches": 2}
    assert isinstance(methods.make(methods.give(Solved)[0], {}, ()), ClosedForm)
    assert methods.load(methods.give(Plain)[0]) is methods.load(methods.give(Plain)[0])


def test_a_method_without_batches_to_prepare_from_prepares_nothing():
    assert methods.make("scissorhands", {}, ()).prepares
    assert not methods.make("scissorhands", {}, ("prepare_batches=0",)).prepares


@pytest.mark.parametrize("base", [Plain, Relabel])
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"needs_bse": True}, "has 'needs_bse', which is neither .*; did you mean needs_base"),
        ({"retain": False}, "has 'retain', .*did you mean retains"),
        ({"teacher_decy": 0.9}, "has 'teacher_decy', .*did you mean teacher_decay"),
        ({"zoom": 2}, "has 'zoom', which is neither a hyperparameter nor a part of a TrainedMethod; start "),
        ({"images": "anchr"}, "has the images 'anchr'; choose concept, anchor, trajectory, noise"),
        ({"prepare": lambda *_: None}, "has prepare but not prepare_batches"),
        ({"solve": lambda *_: ({}, {})}, "has a loss and a solve; a method has one of them"),
    ],
)
def test_a_misspelt_or_contradictory_part_is_refused_when_it_is_registered(base, attributes, message):
    good = type("Bad", (base,), {"_helper": 1, "images": "anchor"})
    methods.give(good)  # control
    with pytest.raises(EraseError, match=message) as error:
        methods.give(type("Bad", (base,), attributes))
    assert "\n" not in str(error.value) and "Bad'" in str(error.value)


@dataclass(frozen=True)
class Tuned(Plain):
    """Brings the settings of its paper, and those for two families of models."""

    alpha: float = 0.3
    settings = {"scope": "xattn", "mask": "saliency", "learning_rate": 3e-4, "nudity": {"num_train_steps": 70}}
    settings_for = {"mini": {"num_train_steps": 9, "set": ["scale=2"]}, "other": {"rank": 4}}


def test_a_class_brings_settings_also_for_a_family_of_models():
    """User, model folder, settings for the family, settings of the class, recipe: the first that has a value wins."""
    name = methods.give(Tuned)[0]

    def found(folder: Any, kind: str = "object", **given: Any) -> tuple[Any, ...]:
        settings = resolve(Settings("c", method=name, **given), kind, folder)
        made: Any = make_method(settings)
        return settings.scope, settings.mask, settings.learning_rate, settings.num_train_steps, made.scale, made.alpha

    assert found({}) == ("xattn", "saliency", 3e-4, 500, 1.0, 0.3)
    assert found({}, kind="nudity")[3] == 70
    assert found({}, recipe="paper")[-1] == 0.3
    assert found({"family": "mini"}) == ("xattn", "saliency", 3e-4, 9, 2.0, 0.3)
    folder = {"family": "mini", "methods": {name: {"num_train_steps": 11, "scope": "attn"}}}
    assert found(folder)[::3] == ("attn", 11)
    assert found(folder, num_train_steps=13, set=("scale=4",), scope="full")[::3] == ("full", 13)
    assert found(folder, num_train_steps=13, set=("scale=4",))[4] == 4.0
    plain = resolve(Settings("c", method=methods.give(Plain)[0]), "object", {"family": "mini"})  # control
    assert (plain.scope, plain.mask, plain.learning_rate, plain.num_train_steps) == ("full", "none", 1e-5, 500)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"settings": {"learning_rat": 1}}, r"has the setting 'learning_rat'; did you mean learning_rate\?"),
        ({"settings": {"path": "x"}}, "has the setting 'path'; choose scope, mask, "),
        ({"settings": {"nudity": {"scop": "full"}}}, "has the setting 'scop'; did you mean scope"),
        ({"settings": ["scope"]}, "has settings that are no mapping"),
        (
            {"settings_for": {"mini": {"rank": "four"}}},
            "settings_for 'mini': rank is 'four'; it must be a whole number",
        ),
        ({"settings_for": {"mini": {"mask": "none"}}}, "settings_for 'mini': unknown setting 'mask'"),
        ({"settings_for": {"mini": 3}}, "settings_for 'mini': it is 3, which is no mapping of settings"),
    ],
)
def test_settings_of_a_class_that_do_not_exist_are_refused(attributes, message):
    with pytest.raises(EraseError, match=message):
        name = methods.give(type("Bad", (Plain,), attributes))[0]
        resolve(Settings("c", method=name), "object", {"family": "mini"})


def test_a_model_folder_may_bring_settings_of_a_class(tmp_path):
    path = tmp_path / "erase_defaults.json"
    path.write_text(json.dumps({"methods": {"blur_method:Blur": {"num_train_steps": 4}}}))
    assert read_defaults(path)["methods"]["blur_method:Blur"] == {"num_train_steps": 4}
    path.write_text(json.dumps({"methods": {"blur": {"num_train_steps": 4}}}))
    with pytest.raises(EraseError, match="unknown method 'blur'; choose from salun"):
        read_defaults(path)


def test_a_model_folder_may_bring_settings_of_an_installed_method(installed, tmp_path):
    path = tmp_path / "erase_defaults.json"
    path.write_text(json.dumps({"methods": {"blur": {"num_train_steps": 4}}}))
    assert read_defaults(path)["methods"]["blur"] == {"num_train_steps": 4}


def test_a_class_without_a_formula_or_that_is_no_dataclass_is_refused():
    @dataclass(frozen=True)
    class Empty(TrainedMethod):
        scale: float = 1.0

    class Undecorated(TrainedMethod):
        scale: float = 1.0

        def loss(self, model, frozen, batch):
            yield from ()

    with pytest.raises(EraseError, match="does not define loss"):
        methods.give(Empty)
    with pytest.raises(EraseError, match="is no dataclass with a loss or a solve; see erase.methods.protocol"):
        methods.give(Undecorated)


@pytest.mark.parametrize("name", METHODS)
def test_every_built_in_method_derives_from_the_protocol_and_is_checked_like_any_other(name):
    cls = methods.load(name)
    assert issubclass(cls, TrainedMethod) != issubclass(cls, ClosedForm)
    assert methods.give(cls)[0] == f"{cls.__module__}:{cls.__qualname__}"
    made = methods.make(name, {}, ())
    assert list(made.hyperparameters()) == [item.name for item in fields(cls)]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution with one method, as pip would install it."""
    info = tmp_path / "blur_method-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: blur-method\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[erase.methods]\nblur = blur_method:Blur\n")
    (info / "top_level.txt").write_text("blur_method\n")
    (tmp_path / "blur_method.py").write_text(
        "from dataclasses import dataclass\n\n"
        "@dataclass(frozen=True)\nclass Blur:\n    width: int = 3\n\n"
        "    def loss(self, model, frozen, batch):\n        yield from ()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("erase.methods.registry.REGISTRY", registry.made_registry())
    yield
    sys.modules.pop("blur_method", None)


def test_a_method_of_another_package_is_found_by_its_name_and_its_origin_is_known(installed):
    settings: Any = Settings("church", method="blur", set=("width=5",))
    assert methods.others() == ("blur",)
    assert methods.make(settings.method, {}, settings.set).width == 5
    assert methods.find("blur").defaults() == {"scope": "full", "mask": "none", "target": "anchor"}
    origin = {"class": "blur_method:Blur", "distribution": "blur-method", "version": "1.5"}
    assert methods.origin("blur") == methods.origin("blur_method:Blur") == origin
    with pytest.raises(EraseError, match=r"--method is 'blr'; did you mean blur\? \(salun, .*, blur\)"):
        Settings("church", method="blr")


def test_the_origin_of_our_own_methods_is_not_recorded_and_a_script_has_no_distribution():
    assert methods.origin("salun") is None and methods.origin("erase.methods.esd:ESD") is None
    name = methods.give(Plain)[0]
    assert methods.origin(name) == {"class": name, "distribution": None, "version": None}
    assert methods.others() == ()
    with pytest.raises(EraseError, match="--method is 'blur'"):  # control: it is not installed
        Settings("church", method="blur")
