"""The contract of methods: its defaults, and what is refused when a class is registered, before a run begins."""

import sys
from dataclasses import dataclass, fields
from typing import Any

import pytest

from erase import methods
from erase.errors import EraseError
from erase.methods import METHODS, ClosedForm, TrainedMethod, registry
from erase.methods.relabel import Relabel
from erase.options.settings import Settings


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
