"""Laws of the settings: what the user gives wins, numbers have a range, and options that do nothing are refused."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from erase import cli, methods
from erase.classification import methods as classification_methods
from erase.classification.settings import Settings as ClassifierSettings
from erase.errors import EraseError
from erase.methods import METHODS
from erase.options import model_defaults
from erase.options.declare import flag, forms_of
from erase.options.effect import require_consistent
from erase.options.model_defaults import read_defaults
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.runs.job import run
from erase.runs.planning import make_method

# Two values that each setting may have: the user's and the model folder's.
VALUES: dict[str, tuple[Any, Any]] = {
    "scope": ("selfattn", "xattn"),
    "target": ("random", "fixed"),
    "sampler": ("dpm++", "model"),
    "lr_scheduler": ("constant", "cosine"),
    **{
        name: (3, 5) if forms_of(Settings)[name].type is int else (0.3, 0.7)
        for name in model_defaults._OF_METHOD
        if forms_of(Settings)[name].type in (int, float)
    },
}


def folder_defaults(tmp_path, content: Any) -> dict[str, Any]:
    path = tmp_path / "erase_defaults.json"
    path.write_text(json.dumps(content))
    return read_defaults(path)


# --- what the user gives wins


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", sorted({*model_defaults._OF_METHOD} - {"set"}))
def test_an_option_wins_over_the_model_folder(name, method, tmp_path):
    """The control: without the option the folder's value counts, and the one of the method wins over the general one.
    (3.7)
    """
    mine, theirs = VALUES[name]
    content: dict[str, Any] = {"methods": {method: {name: theirs}}}
    content |= {name: mine} if name in model_defaults.OF_MODEL else {}
    defaults = folder_defaults(tmp_path, content)
    given: dict[str, Any] = {name: mine}
    assert getattr(resolve(Settings("c", method=method, **given), "object", defaults), name) == mine
    assert getattr(resolve(Settings("c", method=method), "object", defaults), name) == theirs


def made(settings: Settings) -> Any:
    """The method; as Any, because each has other hyperparameters."""
    return make_method(settings)


def hyperparameters() -> list[tuple[str, str]]:
    return [(method, item.name) for method in METHODS for item in fields(methods.load(method))]


@pytest.mark.parametrize(("method", "name"), hyperparameters())
def test_set_wins_over_the_model_folder(method, name):
    """Whatever the order of the two; the folder's `set` then says nothing of that name. (3.7)"""
    defaults = {"methods": {method: {"set": [f"{name}=folder", "other=folder"]}}}
    found = resolve(Settings("c", method=method, set=(f"{name} = mine",)), "object", defaults)
    assert found.set == ("other=folder", f"{name} = mine")


@pytest.mark.parametrize(
    "method", [name for name in METHODS if "alpha" in methods.make(name, {}, ()).hyperparameters()]
)
def test_alpha_wins_over_the_hyperparameters_of_the_model_folder(method):
    """The embedded model's folder has `set` alpha=1 for ga. (3.7)"""
    defaults = {"methods": {method: {"set": ["alpha=1"]}}}
    assert made(resolve(Settings("c", method=method, alpha=0.3), "object", defaults)).alpha == 0.3
    assert made(resolve(Settings("c", method=method, alpha=0.0), "object", defaults)).alpha == 0.0
    assert made(resolve(Settings("c", method=method, set=("alpha=0.4",)), "object", defaults)).alpha == 0.4
    assert made(resolve(Settings("c", method=method), "object", defaults)).alpha == 1


def test_a_recipe_and_a_seed_win_over_the_hyperparameters_of_the_model_folder():
    defaults = {"methods": {"salun": {"set": ["frozen_target=true", "distill_retain=true"]}}}
    assert not made(resolve(Settings("c", recipe="paper"), "object", defaults)).frozen_target
    assert made(resolve(Settings("c"), "object", defaults)).frozen_target
    defaults = {"methods": {"scissorhands": {"set": ["seed=7"]}}}
    assert resolve(Settings("c", method="scissorhands", seed=3), "object", defaults).set == ()


def test_a_recipe_wins_over_the_same_settings_of_the_model_folder():
    """Its target, alpha, mask guidance and sampler are what the user asked for by its name. (3.7)

    The control: with the default recipe, and for what no recipe says, the folder's count.
    """
    own = {"target": "random", "alpha": 0.7, "mask_guidance": 3.0, "sampler": "dpm++", "learning_rate": 0.3}
    defaults = {"num_inference_steps": 7, "methods": {"salun": own}}
    names = ("target", "alpha", "mask_guidance", "sampler", "learning_rate", "num_inference_steps")

    def found(defaults: dict[str, Any], **given: Any) -> tuple[Any, ...]:
        settings = resolve(Settings("c", **given), "object", defaults)
        return tuple(getattr(settings, name) for name in names)

    assert found(defaults) == ("random", 0.7, 3.0, "dpm++", 0.3, 7)
    assert found(defaults, recipe="reference") == ("fixed", 0.5, 7.5, "model", 0.3, 7)
    assert found(defaults, recipe="reference", alpha=0.2, target="anchor")[:3] == ("anchor", 0.2, 7.5)
    defaults = {"methods": {name: {"set": ["alpha=0.9"]} for name in ("salun", "ga")}}
    cases: list[tuple[str, Any, float]] = [("salun", "paper", 0.5), ("salun", "default", 0.9), ("ga", "paper", 0.9)]
    for method, recipe, alpha in cases:
        settings = resolve(Settings("c", method=method, recipe=recipe), "object", defaults)
        assert made(settings).alpha == alpha  # ga has an alpha of its own, whatever the recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"famly": "mini"}, "unknown setting 'famly'"),
        ({"family": 3}, "family is 3; it must be a string"),
        ({"output": "elsewhere"}, "unknown setting 'output'"),
        ({"batch_size": "many"}, "batch_size is 'many'; it must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": None}, "batch_size is None"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": True}, "learning_rate is True"),
        ({"num_inference_steps": [25]}, r"num_inference_steps is \[25\]"),
        ({"methods": []}, "methods must hold an object"),
        ({"methods": {"ga": [1]}}, "methods must hold an object"),
        ({"methods": {"gaa": {}}}, "unknown method 'gaa'"),
        ({"methods": {"ga": {"set": "alpha=1"}}}, "ga: set is 'alpha=1'; it must be a list"),
        ({"methods": {"ga": {"set": [1]}}}, "ga: set is 1; it must be a string"),
        ({"methods": {"ga": {"set": ["alpha"]}}}, "ga: set has 'alpha'; it must be NAME=VALUE"),
        ({"methods": {"ga": {"scope": "all"}}}, "ga: scope is 'all'"),
        ({"methods": {"ga": {"forget_images": "/etc"}}}, "ga: unknown setting 'forget_images'"),
    ],
)
def test_a_model_folders_defaults_are_checked(content, message, tmp_path):
    """One line that names the file, the method, and the name or the value. (4.10)"""
    with pytest.raises(EraseError, match=rf"erase_defaults.json(:|, ).*{message}") as error:
        folder_defaults(tmp_path, content)
    assert "\n" not in str(error.value)


def test_a_folder_without_defaults_has_none(tmp_path):
    assert read_defaults(tmp_path / "erase_defaults.json") == {}


# --- numbers


@pytest.mark.parametrize("options", [Settings, ClassifierSettings])
def test_every_number_has_a_range(options):
    """No value is above all bounds, infinite, or NaN; a whole number that fills the memory is refused. (2.9, 4.10)"""
    required = {"concept": "c"} if options is Settings else {}
    for name, form in forms_of(options).items():
        for value in {int: [10**20, -1], float: [1e300, math.inf, math.nan, -1]}.get(form.type, []):
            with pytest.raises(EraseError, match=rf"^{flag(name)} is "):
                options(**required, **{name: value})


@pytest.mark.parametrize(
    "arguments",
    [
        "--num-inference-steps 1001",
        "--num-forget 99999999999999999999",
        "--rank 99999999999999999999999",
        "--rank 1e23",
        "--lora-rank 1000000",
        "--seed 4294967296",
        "--batch-size 1000000",
        "--num-samples 1000",
        "--resolution 100000",
        "--checkpointing-steps 99999999999",
        "--guidance-scale inf",
        "--alpha nan",
        "--weight-decay inf",
        "--max-grad-norm nan",
    ],
)
def test_a_number_out_of_range_is_one_line(arguments, capsys):
    """(4.10)"""
    with pytest.raises(SystemExit) as end:
        cli.main(["--concept", "church", *arguments.split()])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and arguments.split()[0] in err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_hyperparameters_are_finite(value):
    with pytest.raises(EraseError, match=f"--set is 'alpha={value}'; it must be a number"):
        methods.make("ga", {}, (f"alpha={value}",))
    with pytest.raises(EraseError, match=f"alpha of IU is '{value}'; it must be a number"):
        classification_methods.make(classification_methods.Influence, "IU", {"alpha": value})


# --- options that do nothing


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resume": True, "overwrite": True}, "--resume continues what --overwrite deletes"),
        ({"lora_rank": 8}, "--lora-rank 8 is for --save lora"),
        ({"alpha": 0.3, "set": ("alpha=0.5",)}, "--alpha 0.3 and --set alpha are both given"),
        ({"num_forget": 3, "forget_images": "d"}, "--num-forget 3 has no effect with --forget-images"),
        ({"num_retain": 3, "retain_images": "d"}, "--num-retain 3 has no effect with --retain-images"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_the_model_is_loaded(given, message):
    with pytest.raises(EraseError, match=f"^{message}"):
        require_consistent(Settings("church", **given))
    with pytest.raises(EraseError, match=f"^{message}"):
        run(Settings("church", model="nowhere", **given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "esd-x", "density": 0.1}, "--density has no effect without a mask; add --mask saliency"),
        ({"mask": "none", "score": "sum_sq"}, "--score has no effect without a mask"),
        ({"mask": "none", "per_tensor": True}, "--per-tensor has no effect without a mask"),
        ({"mask": "random", "score": "sum_sq"}, "--score has no effect with --mask random"),
        ({"mask": "a.safetensors", "density": 0.1}, "--density has no effect with --mask a.safetensors"),
    ],
)
def test_options_about_a_mask_that_is_not_made_are_refused(given, message):
    with pytest.raises(EraseError, match=f"^{re.escape(message)}"):
        resolve(Settings("church", **given), "object", {})


def test_the_documented_defaults_are_those_that_are_read(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page.partition("## erase_defaults.json")[2]
    folder_defaults(tmp_path, json.loads(section.partition("```json")[2].partition("```")[0]))
    named = set(re.findall(r"`(\w+)`", section.partition("Top-level keys")[2]))
    assert named == {*model_defaults._OF_METHOD}


def test_what_the_authors_use_for_nudity_is_the_methods_default_there_and_loses_to_all_that_is_given():
    def found(kind: str, defaults: dict[str, Any] | None = None, **given: Any) -> tuple[Any, ...]:
        settings = resolve(Settings("c", method="erasediff", **given), kind, defaults or {})
        return settings.scope, settings.num_train_steps, made(settings).epochs, made(settings).rounds

    assert found("object") == ("full", 200, 2, 1)
    assert found("nudity") == ("noxattn", 1000, 5, 2)
    folder = {"methods": {"erasediff": {"num_train_steps": 40, "scope": "xattn", "set": ["epochs=3"]}}}
    assert found("nudity", folder) == ("xattn", 40, 3, 2)
    assert found("nudity", folder, scope="selfattn", num_train_steps=8, set=("epochs=1", "rounds=1")) == (
        *("selfattn", 8, 1, 1),
    )
