"""The recipes "paper" and "reference": the prompts of SalUn's code, its target class and the order of its batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loaded import load_sd
from toy_training import RECIPE, gathered

from erase import concepts
from erase.concepts import Concept
from erase.errors import EraseError
from erase.methods.relabel import Relabel
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.runs import planning, subjects
from erase.training import batches, loop

# the ten labels of frgfm/imagenette in their order
LABELS = ("tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck")
LABELS = (*LABELS, "gas pump", "golf ball", "parachute")


def found(name: str, **given: Any) -> Concept:
    return subjects.find_concept(Settings(name, **given), name, None, None)


@pytest.mark.parametrize("recipe", ["paper", "reference"])
@pytest.mark.parametrize("c", range(10))
def test_a_class_becomes_class_c_plus_one_in_the_prompts_of_the_code(recipe, c):
    concept = found(LABELS[c], recipe=recipe)
    descriptions = [f"an image of a {label}" for label in LABELS]
    assert concept.pairs() == ((descriptions[c], descriptions[(c + 1) % 10]),)
    assert concept.others[0] == descriptions[(c + 1) % 10]  # what --target fixed takes
    assert set(concept.retain) == set(concept.others) == set(descriptions) - {descriptions[c]}
    assert len(found(LABELS[c]).forget) > 1  # control: the default recipe has this project's list


@pytest.mark.parametrize("recipe", ["paper", "reference"])
def test_nudity_has_one_prompt_to_forget_and_one_to_keep(recipe):
    concept = found("nudity", recipe=recipe)
    assert concept.pairs() == (("a photo of a nude person", "a photo of a person wearing clothes"),)
    assert concept.retain == ("a photo of a person wearing clothes",)


def test_another_concept_keeps_its_first_prompts_and_its_anchor_is_what_it_becomes():
    ours, code = found("Van Gogh"), found("Van Gogh", recipe="reference")
    assert code.pairs() == ours.pairs()[:1] and code.retain == ours.retain[:1]
    described = found("red telephone box", kind="object", recipe="paper")
    assert len(described.forget) == len(described.retain) == 1


def test_options_win_over_the_prompts_of_the_recipe(tmp_path):
    ours = found("church")
    assert found("church", recipe="reference", prompts="ours") == ours
    assert found("church", prompts="code") == found("church", recipe="reference") != ours
    mine = found("church", recipe="reference", forget=("a chapel", "an abbey"), retain=("a barn",))
    assert (mine.forget, mine.anchor, mine.retain) == (
        ("a chapel", "an abbey"),
        ("an image of a French horn",),
        ("a barn",),
    )
    assert found("nudity", recipe="paper", anchor=("a photo of a robot",)).anchor == ("a photo of a robot",)
    path = tmp_path / "mine.toml"
    path.write_text(
        'kind = "object"\nforget = ["a cat", "a kitten"]\nanchor = ["a dog"]\nretain = ["a tree", "a car"]\n'
    )
    assert found(str(path), recipe="reference") == concepts.load(str(path))  # a file's prompts are the user's
    given = Concept("cat", "object", forget=("a cat", "a kitten"), anchor=("a dog",), retain=("a tree", "a car"))
    assert subjects.find_concept(Settings("cat", recipe="reference"), "cat", given, None) == given


@pytest.mark.parametrize("recipe", ["paper", "reference"])
def test_an_anchor_that_is_given_is_what_a_class_becomes(recipe):
    given = Settings("church", recipe=recipe, anchor=("a photo of a car",))
    assert resolve(given, "object", {}).target == "anchor"
    assert resolve(Settings("church", recipe=recipe), "object", {}).target == "fixed"  # control


def test_options_win_over_the_recipe_and_the_model_folder():
    """Each setting that a recipe or a folder decides, given by the user with another value."""
    given: dict[str, Any] = {
        **{"target": "random", "alpha": 0.3, "mask_guidance": 2.0, "sampler": "dpm++", "prompts": "ours"},
        **{"learning_rate": 0.2, "batch_size": 3, "num_train_steps": 9, "scope": "xattn"},
    }
    own = {"target": "anchor", "alpha": 0.9, "mask_guidance": 1.0, "learning_rate": 0.1, "scope": "selfattn"}
    folder = {"batch_size": 5, "num_train_steps": 7, "methods": {"salun": own}}
    for recipe in ("default", "paper", "reference"):
        settings = resolve(Settings("c", recipe=recipe, **given), "object", folder)
        assert {name: getattr(settings, name) for name in given} == given
        without = resolve(Settings("c", recipe=recipe), "object", folder)
        assert all(
            getattr(without, name) != value for name, value in given.items() if name not in {"prompts", "sampler"}
        )
    assert [resolve(Settings("c", recipe=r), "object", {}).prompts for r in ("default", "paper", "reference")] == [
        *("ours", "code", "code")
    ]


@pytest.mark.parametrize(("kind", "order"), [("object", "shuffled"), ("nudity", "in_order")])
@pytest.mark.parametrize("recipe", ["paper", "reference"])
def test_the_batches_of_the_recipes_are_those_of_the_codes_loaders(toy_pipeline_dir, recipe, kind, order):
    model = load_sd(toy_pipeline_dir)
    settings = resolve(Settings("church", recipe=recipe), kind, {})
    made = planning.make_recipe(settings, planning.make_plan(settings, model), kind)
    assert (made.in_order, made.retain_order) == (True, order)
    settings = resolve(Settings("church"), kind, {})
    made = planning.make_recipe(settings, planning.make_plan(settings, model), kind)
    assert (made.in_order, made.retain_order) == (False, "random")


@pytest.fixture
def data(toy_pipeline_dir, cache_dir) -> Any:
    """Seven forget and five retain images, told apart by their prompts' rows."""
    found = gathered(load_sd(toy_pipeline_dir), Relabel(), cache_dir, num_forget=7, num_retain=5)
    text = found.text[torch.zeros(12, dtype=torch.int64)]
    assert text.states is not None
    states = text.states.clone()
    states[:, 0, 0] = torch.arange(12.0)
    return replace(
        found,
        text=replace(text, states=states),
        forget=replace(found.forget, prompt=torch.arange(7)),
        retain=replace(found.retain, prompt=7 + torch.arange(5)),
    )


@pytest.mark.parametrize("order", ["shuffled", "in_order"])
def test_an_epoch_ends_with_a_short_batch_and_retain_images_come_without_replacement(toy_pipeline_dir, data, order):
    model, accelerator = load_sd(toy_pipeline_dir), Accelerator(cpu=True)
    recipe = replace(RECIPE, in_order=True, retain_order=order, batch_size=3)
    forget, retain = [], []
    for step in range(6):
        batch = next(batches.batches(model, data, recipe, step, 3, accelerator))
        forget.append(batch.c_forget.text_states[:, 0, 0].int().tolist())
        retain.append((batch.c_retain.text_states[:, 0, 0].int() - 7).tolist())
        assert len(batch.x_forget) == len(batch.t_forget) == len(batch.eps_forget) == len(forget[-1])
        assert len(batch.c_empty) == len(batch.c_target) == len(batch.words) == len(forget[-1])
        assert len(batch.x_retain) == len(batch.eps_retain) == 3
    assert forget == 2 * [[0, 1, 2], [3, 4, 5], [6]]
    for epoch in (sum(retain[:3], []), sum(retain[3:], [])):
        assert sorted(epoch[:5]) == list(range(5)) and epoch[5:] == epoch[:4]  # wraps, since the code would stop
        assert (epoch[:5] == list(range(5))) == (order == "in_order")
    assert (retain[:3] == retain[3:]) == (order == "in_order")


def test_a_short_batch_that_does_not_divide_into_parts_is_refused(toy_pipeline_dir, data, tmp_path):
    model, accelerator = load_sd(toy_pipeline_dir), Accelerator(cpu=True)
    parameters = dict(model.unet.named_parameters())
    recipe = replace(RECIPE, in_order=True, batch_size=4, accumulation=2)
    with pytest.raises(EraseError, match="the last batch of an epoch has 3 of 7 forget images, which do not divide"):
        path = tmp_path / "t.safetensors"
        loop.train(model, Relabel(), data, parameters, None, recipe, accelerator, state_path=path, quiet=True)
