"""Generated images decide the factor of the retain loss: halved while they show the concept, else rising again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loaded import load_sd
from toy_training import CONCEPT, RECIPE, erased, gathered, state_of

from erase import erase_concept
from erase.errors import EraseError
from erase.methods.relabel import Relabel
from erase.training import loop
from erase.training.watched import LEAST, NUM, Watched

SMALL: dict[str, Any] = dict(num_forget=4, num_retain=2, num_inference_steps=2, num_train_steps=5, batch_size=2)
SMALL |= dict(num_samples=0, save=("delta",), quiet=True)


@pytest.fixture
def data(toy_pipeline_dir, cache_dir) -> Any:
    return gathered(load_sd(toy_pipeline_dir), Relabel(), cache_dir)


def watched(folder: Path, data: Any, every: int = 1, **recipe: Any) -> Watched:
    return Watched(load_sd(folder), data, replace(RECIPE, **recipe), Accelerator(cpu=True), every)


def test_the_factor_follows_the_rule(toy_pipeline_dir, data, monkeypatch):
    """Against its law, written out: halved if any image is shown, else times sqrt(2), between LEAST and 1."""
    one = watched(toy_pipeline_dir, data, num_steps=14)
    shown = [8, 1, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8]
    expected = [1.0]
    for number, num in enumerate(shown):
        near = torch.where((torch.arange(NUM) < num).view(-1, 1, 1, 1), one._concept, one._anchor)
        monkeypatch.setattr(one, "_images", lambda c, near=near: near)
        assert one.factor(number) == pytest.approx(expected[-1], rel=1e-12)
        one.look(number)
        expected.append(max(LEAST, expected[-1] / 2) if num else min(1.0, expected[-1] * 2**0.5))
        assert one.told == {"shown": f"{num}/8", "alpha": f"x {expected[-1]:.3g}"}
    assert expected[2] == 0.25 and expected[6] == pytest.approx(1) and expected[-1] == LEAST
    assert one.notes["watched_shares"] == [num / 8 for num in shown]
    assert one.notes["watched_alpha_factors"] == pytest.approx(expected[1:], rel=1e-12)


def test_the_base_shows_the_concept_and_a_model_that_answers_with_the_anchor_does_not(toy_pipeline_dir, data):
    one = watched(toy_pipeline_dir, data)
    assert one.look(0)["watched/shown"] == 1
    one._asked = data.text[data.anchor[torch.arange(NUM) * len(data.forget) // NUM]]
    assert one.look(1)["watched/shown"] == 0


@pytest.mark.parametrize("together", [False, True])
def test_a_factor_is_another_alpha(toy_pipeline_dir, data, tmp_path, monkeypatch, together):
    """Half of alpha 2 is alpha 1, bit by bit, since a half is exact."""
    room = loop._room

    def joined(*arguments: Any, **more: Any) -> Any:
        return replace(room(*arguments, **more), together=together)

    monkeypatch.setattr(loop, "_room", joined)
    half = watched(toy_pipeline_dir, data, every=100)
    monkeypatch.setattr(half, "factor", lambda step: 0.5)

    def trained(alpha: float, **how: Any) -> dict[str, torch.Tensor]:
        path = tmp_path / f"{alpha}-{len(how)}.pt"
        return state_of(
            erased(toy_pipeline_dir, Relabel(alpha=alpha), data, Accelerator(cpu=True), path, density=None, **how)[0]
        )

    found, expected, other = trained(2.0, watched=half), trained(1.0), trained(2.0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], other[name]) for name in other)


def test_interrupted_and_resumed_is_uninterrupted(toy_pipeline_dir, data, tmp_path, monkeypatch):
    recipe = replace(RECIPE, num_steps=6, checkpoint_every=2)

    def trained(path: Path) -> tuple[dict[str, torch.Tensor], Watched]:
        one, method = watched(toy_pipeline_dir, data, num_steps=6), Relabel(alpha=4.0)
        how: dict[str, Any] = {"recipe": recipe, "density": None, "watched": one}
        return state_of(erased(toy_pipeline_dir, method, data, Accelerator(cpu=True), path, **how)[0]), one

    whole, one = trained(tmp_path / "whole.pt")
    step, calls = loop.MaskedAdam.step, []

    def cut(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(loop.MaskedAdam, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.pt")
    monkeypatch.setattr(loop.MaskedAdam, "step", step)
    again, other = trained(tmp_path / "cut.pt")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert torch.equal(one.values["checks"], other.values["checks"]) and (one.values["checks"] >= 0).all()


def test_a_run_records_what_was_watched_and_is_another_run(toy_pipeline_dir, tmp_path):
    def run(folder: str, **options: Any) -> Any:
        return erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / folder), **SMALL, **options).record

    plain, changed = run("plain", learning_rate=1e-2), run("watched", learning_rate=1e-2, alpha_every=2)
    assert changed.method["watched_shares"][0] >= 0 and len(changed.method["watched_alpha_factors"]) == 2
    assert changed.model.result_hash != plain.model.result_hash or 1.0 in changed.method["watched_alpha_factors"]
    with pytest.raises(EraseError, match=r"differs in --alpha-every\)"):
        run("plain", learning_rate=1e-2, alpha_every=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "esd-x"}, "--alpha-every is 2, but esd-x has no retain loss here"),
        ({"alpha": 0}, "--alpha-every is 2, but salun has no retain loss here"),
        ({"method": "uce"}, "--alpha-every 2 has no effect: uce is a closed form"),
        ({"balancing": "hamu"}, "--alpha-every is 2, but here salun does not add the two losses"),
        ({"optimizer": "dual"}, "--alpha-every is 2, but here salun does not add the two losses"),
        ({"method": "ga"}, "--alpha-every is 2, which compares images with those of the anchor"),
        ({"num_train_steps": 2}, "--alpha-every is 2, which has no effect in 2 optimizer steps"),
    ],
)
def test_it_is_refused_where_it_has_no_effect(toy_pipeline_dir, tmp_path, options, told):
    small = {name: SMALL[name] for name in ("num_samples", "save", "quiet")} if "uce" in options.values() else SMALL
    with pytest.raises(EraseError, match=told):
        how = {**small, **options, "alpha_every": 2}
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **how)
