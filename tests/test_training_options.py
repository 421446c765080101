"""Options of every trained method: learning rate over the steps, empty prompts and anchor images among retain rows."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from loaded import load_sd
from toy_training import CONCEPT, RECIPE, erased, gathered, made, state_of

from erase import erase_concept, methods
from erase.data.latents import Data
from erase.errors import EraseError
from erase.families import sd
from erase.methods import balance
from erase.methods.relabel import Relabel
from erase.options.settings import Settings
from erase.runs import planning
from erase.training import batches, loop

TRAINED = [name for name in methods.METHODS if isinstance(made(name), methods.TrainedMethod)]
SMALL: dict[str, Any] = dict(num_forget=4, num_retain=2, num_inference_steps=2, num_train_steps=4, batch_size=2)
SMALL |= dict(num_samples=0, save=("delta",), quiet=True, learning_rate=1e-2)


@pytest.fixture
def model(toy_pipeline_dir) -> sd.StableDiffusion:
    return load_sd(toy_pipeline_dir)


@pytest.fixture
def data(model, cache_dir) -> Data:
    return gathered(model, Relabel(), cache_dir, num_anchor=3)


def seen(model: sd.StableDiffusion, data: Data, step: int, **options: Any) -> list[Any]:
    recipe = replace(RECIPE, **options)
    share = recipe.batch_size // recipe.accumulation
    return list(batches.batches(model, data, recipe, step, share, Accelerator(cpu=True)))


# --- the learning rate


def test_cosine_is_diffusers_schedule():
    """diffusers' own scheduler, without warm-up, on an optimizer that is never stepped otherwise."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=7)
    cosine, constant = (
        batches.Recipe(num_steps=7, batch_size=1, learning_rate=0.3, schedule=name) for name in ("cosine", "constant")
    )
    for step in range(7):
        assert cosine.learning_rate_at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        assert constant.learning_rate_at(step) == 0.3
        optimizer.step()
        theirs.step()
    assert theirs.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_loop_steps_with_the_rate_of_its_step_also_after_a_checkpoint(
    toy_pipeline_dir, cache_dir, tmp_path, monkeypatch, schedule
):
    data, rates = gathered(load_sd(toy_pipeline_dir), Relabel(), cache_dir), []
    plain = loop.MaskedAdam.step

    def step(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        if len(rates) == 4:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(loop.MaskedAdam, "step", step)
    recipe = replace(RECIPE, num_steps=5, schedule=schedule)
    how: dict[str, Any] = {"recipe": recipe, "accelerator": Accelerator(cpu=True), "path": tmp_path / "t.pt"}
    with pytest.raises(KeyboardInterrupt):
        erased(toy_pipeline_dir, Relabel(), data, **how)
    erased(toy_pipeline_dir, Relabel(), data, **how)
    expected = [recipe.learning_rate_at(number) for number in (0, 1, 2, 3, 2, 3, 4)]
    assert rates == expected and (len({*expected}) == 1) == (schedule == "constant")


# --- retain rows under the empty prompt


def test_a_share_of_the_retain_rows_has_the_empty_prompt_and_all_else_stays(model, data):
    """Over 200 steps of two rows; the empty rows of a binomial share lie within four standard deviations."""
    share, num = 0.3, 0
    for step in range(200):
        (plain,), (changed,) = seen(model, data, step), seen(model, data, step, proportion_empty=share)
        for name in ("x_forget", "x_target", "x_retain", "t_forget", "t_retain", "eps_forget", "eps_retain"):
            assert torch.equal(getattr(plain, name), getattr(changed, name))
        assert torch.equal(plain.c_forget.text_states, changed.c_forget.text_states)
        for own, now in zip(plain.c_retain.text_states, changed.c_retain.text_states, strict=True):
            is_empty = torch.equal(now, data.unconditional.text_states[0])
            assert is_empty or torch.equal(now, own)
            num += is_empty
    assert abs(num - 400 * share) < 4 * math.sqrt(400 * share * (1 - share))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 2)])
def test_none_and_all_of_the_retain_rows_are_empty(model, data, share, expected):
    (batch,) = seen(model, data, 0, proportion_empty=share)
    empty = data.unconditional.text_states
    assert sum(torch.equal(row, empty[0]) for row in batch.c_retain.text_states) == expected


# --- anchor images among the retain rows


def test_every_nth_step_has_as_many_anchor_images_under_their_own_prompts(model, data):
    assert data.anchor_images is not None and len(data.anchor_images) == 3
    texts = [data.prompts[row] for row in data.anchor_images.prompt.tolist()]
    assert texts == [CONCEPT.anchor[0], CONCEPT.anchor[1], CONCEPT.anchor[0]]
    told = {states.numpy().tobytes() for states in data.text[data.anchor_images.prompt].text_states}
    for step in range(6):
        (plain,), (batch,) = seen(model, data, step), seen(model, data, step, anchor_every=3)
        assert torch.equal(plain.x_forget, batch.x_forget) and torch.equal(plain.x_retain, batch.x_retain[:2])
        assert torch.equal(plain.c_retain.text_states, batch.c_retain.text_states[:2])
        assert len(batch.x_retain) == len(batch.c_retain) == len(batch.eps_retain) == (4 if step in (2, 5) else 2)
        for row, states in enumerate(batch.c_retain.text_states[2:], 2):
            assert states.numpy().tobytes() in told
            t, eps = batch.t_retain[row : row + 1], batch.eps_retain[row : row + 1]
            clean = data.anchor_images.mean
            noised = [model.add_noise(x[None], eps, t) for x in clean]
            assert any(torch.equal(one[0], batch.x_retain[row]) for one in noised)


def test_parts_hold_the_same_rows_as_the_whole(model, data):
    (whole,) = seen(model, data, 1, anchor_every=2, proportion_empty=0.5)
    parts = seen(model, data, 1, anchor_every=2, proportion_empty=0.5, accumulation=2)
    assert [len(part.x_retain) for part in parts] == [2, 2]
    assert torch.equal(torch.cat([part.x_retain for part in parts]), whole.x_retain)
    assert torch.equal(torch.cat([part.c_retain.text_states for part in parts]), whole.c_retain.text_states)


def test_anchor_images_are_other_data_and_without_them_nothing_changes(model, data, cache_dir):
    plain = gathered(model, Relabel(), cache_dir)
    assert plain.anchor_images is None and "anchor_key" not in plain.record
    assert data.record["anchor_key"] and data.fingerprint != plain.fingerprint


# --- from the command line's settings to the loop


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_method_takes_them_and_goes_on_where_it_was(
    toy_pipeline_dir, cache_dir, tmp_path, monkeypatch, name
):
    """Interrupted and resumed equals uninterrupted; each option changes the weights."""
    method = made(name)
    own: dict[str, Any] = {"schedule": "cosine"}
    own |= {"proportion_empty": 0.5, "anchor_every": 2} if method.retains else {}
    data = gathered(load_sd(toy_pipeline_dir), method, cache_dir, num_anchor=2 if method.retains else 0)
    accelerator = Accelerator(cpu=True)

    def trained(path: Path, **options: Any) -> dict[str, torch.Tensor]:
        how: dict[str, Any] = {"recipe": replace(RECIPE, **options), "density": None}
        return state_of(erased(toy_pipeline_dir, method, data, accelerator, path, **how)[0])

    whole = trained(tmp_path / "whole.pt", **own)
    for option in own:
        without = trained(tmp_path / f"{option}.pt", **{key: own[key] for key in own if key != option})
        assert any(not torch.equal(whole[key], without[key]) for key in whole), option
    step, calls = loop.MaskedAdam.step, []

    def cut(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(loop.MaskedAdam, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.pt", **own)
    monkeypatch.setattr(loop.MaskedAdam, "step", step)
    again = trained(tmp_path / "cut.pt", **own)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_with_two_gradients_takes_a_balancing_rule_and_others_refuse_it(
    toy_pipeline_dir, cache_dir, tmp_path, name
):
    """One step of plain descent tells the rule: the loop's gradient is w_f g_f + w_r g_r of the two that it gets."""
    method, settings = made(name), Settings(concept="church", method=name, balancing="hamu")
    if not method.retains or method.turns or method.balance:
        with pytest.raises(
            EraseError, match=f"--balancing hamu (does not go with|needs a retain gradient, and) {name}"
        ):
            planning.require_two_gradients(settings, planning.make_method(settings))
        return
    planning.require_two_gradients(settings, planning.make_method(settings))
    data, seen = gathered(load_sd(toy_pipeline_dir), method, cache_dir), {}

    def trained(one: Any, label: str) -> dict[str, torch.Tensor]:
        how: dict[str, Any] = {"recipe": replace(RECIPE, num_steps=3), "density": None}
        return state_of(erased(toy_pipeline_dir, one, data, Accelerator(cpu=True), tmp_path / f"{label}.pt", **how)[0])

    for rule in ("conflict", "hamu"):
        balanced = balance.balanced(method, rule)
        assert balanced.hyperparameters() == method.hyperparameters() and balanced.balance is balance.RULES[rule]
        seen[rule] = trained(balanced, rule)
    seen["sum"] = trained(method, "sum")
    for one, other in (("sum", "conflict"), ("sum", "hamu"), ("conflict", "hamu")):
        assert any(not torch.equal(seen[one][key], seen[other][key]) for key in seen[one]), (one, other)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"balancing": "hamu", "alpha": 2}, "--alpha has no effect with --balancing hamu"),
        ({"balancing": "hamu", "set": ("alpha=2",)}, "--alpha has no effect with --balancing hamu"),
        ({"balancing": "conflict", "method": "uce"}, "--balancing conflict has no effect: uce is a closed form"),
        ({"balancing": "conflict", "optimizer": "dual"}, "--optimizer dual does not go with --balancing conflict"),
        ({"balancing": "conflict", "method": "relabel", "set": ("balancing=nash",)}, "relabel, which weighs the two"),
        ({"mask_attack": 0.5, "mask": "none"}, "--mask-attack 0.5 has no effect with --mask none"),
        ({"mask_attack": 0.5, "mask": "random"}, "--mask-attack 0.5 has no effect with --mask random"),
    ],
)
def test_options_without_effect_are_refused(toy_pipeline_dir, tmp_path, options, told):
    small = {name: value for name, value in SMALL.items() if name != "learning_rate"}
    if options.get("method") == "uce":
        small = {name: small[name] for name in ("num_samples", "save", "quiet")}
    with pytest.raises(EraseError, match=told):
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **small, **options)
    assert not (tmp_path / "run").exists()


def test_options_reach_the_weights_and_the_identity_of_a_run(toy_pipeline_dir, tmp_path):
    def run(folder: str, **options: Any) -> Any:
        how = {**SMALL, "scope": "xattn-kv", "mask": "none", **options}
        return erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / folder), **how)

    plain = run("plain").record
    assert {name: plain.settings[name] for name in ("lr_scheduler", "proportion_empty_prompts", "anchor_every")} == {
        "lr_scheduler": "constant",
        "proportion_empty_prompts": 0.0,
        "anchor_every": 0,
    }
    for option in (
        {"lr_scheduler": "cosine"},
        {"proportion_empty_prompts": 0.5},
        {"anchor_every": 2},
        {"balancing": "conflict"},
    ):
        (name,) = option
        changed = run(name, **option).record
        assert changed.model.result_hash != plain.model.result_hash
        with pytest.raises(EraseError, match=f"differs in --{name.replace('_', '-')}\\)"):
            run("plain", **option)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "esd-x", "anchor_every": 2}, "--anchor-every is 2, but esd-x has no retain loss here"),
        (
            {"method": "salun", "alpha": 0, "proportion_empty_prompts": 0.5},
            "--proportion-empty-prompts is 0.5, but salun has no retain loss here; use --proportion-empty-prompts 0",
        ),
        ({"method": "uce", "anchor_every": 1}, "--anchor-every is 1, but uce has no retain loss here"),
    ],
)
def test_options_about_retain_rows_need_a_retain_loss(toy_pipeline_dir, tmp_path, options, told):
    small = {name: value for name, value in SMALL.items() if name != "learning_rate"}
    with pytest.raises(EraseError, match=f"^{told}"):
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **small, **options)
    assert not (tmp_path / "run").exists()
    plain = {**options, "anchor_every": 0, "proportion_empty_prompts": 0}  # control
    planning.require_retain_rows(Settings("cat", **plain), planning.make_method(Settings("cat", **plain)))


def test_the_estimate_counts_the_further_rows():
    given = Settings("cat", batch_size=8, gradient_accumulation_steps=2)
    assert planning.rows_of_pass(given) == 4
    assert planning.rows_of_pass(replace(given, anchor_every=3)) == 8


# --- options without effect


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr_scheduler": "cosine"}, "--lr-scheduler cosine has no effect: uce is a closed form"),
        ({"learning_rate": 1e-3}, "--learning-rate 0.001 has no effect: uce is a closed form"),
        (
            {"num_train_steps": 10, "mask": "saliency"},
            "--num-train-steps 10 has no effect: uce is a closed form; leave",
        ),
        ({"moments": "8bit"}, "--moments 8bit has no effect"),
        ({"num_forget": 5}, "--num-forget 5 has no effect: uce is a closed form and needs no images; leave it out"),
        ({"retain_images": "a"}, "--retain-images a has no effect"),
    ],
)
def test_a_closed_form_refuses_options_of_training_and_of_images_that_it_does_not_use(
    toy_pipeline_dir, tmp_path, options, told
):
    with pytest.raises(EraseError, match=f"^{told}"):
        erase_concept(
            "church", str(toy_pipeline_dir), method="uce", output=str(tmp_path / "run"), quiet=True, **options
        )
    assert not (tmp_path / "run").exists()


def test_images_and_batches_have_an_effect_on_a_closed_form_with_a_saliency_mask(toy_pipeline_dir, tmp_path):
    how: dict[str, Any] = {name: SMALL[name] for name in ("num_forget", "num_retain", "batch_size", "num_samples")}
    how |= {"method": "uce", "mask": "saliency", "num_inference_steps": 2, "save": ("delta",), "quiet": True}
    run = erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **how)
    assert run.record.settings["num_forget"] == 4


def test_anchor_images_that_no_step_would_use_are_refused(toy_pipeline_dir, tmp_path):
    given: dict[str, Any] = {**SMALL, "scope": "xattn-kv", "mask": "none"}
    with pytest.raises(EraseError, match="^--anchor-every 5 has no effect in 4 optimizer steps; use a number up to 4"):
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **given, anchor_every=5)
    erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **given, anchor_every=4)  # control
