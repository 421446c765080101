"""Relearning: a LoRA or all weights learn images of the concept; the model itself stays as it was."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from loaded import load_sd
from planted import circle, num_circles, planted

from erase import concepts
from erase.errors import EraseError
from erase.evaluation.attacks.changed import weights_of
from erase.evaluation.attacks.protocol import CONTROL, Given, Shown
from erase.evaluation.attacks.registry import make
from erase.evaluation.attacks.relearn import Relearn, beside, train
from erase.families import loading

FEW = Relearn(rank=2, num_steps=6, batch_size=2, num_shown=2, num_others=2)


def images(seed: int, prompts: tuple[str, ...] = ("a church", "an old church")) -> Shown:
    noise = torch.randn(len(prompts), 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return Shown(noise + (3 if seed == 0 else -3), prompts)


def given_of(model: Any, shown: Shown, others: Shown, size: int = 8) -> Given:
    what: dict[str, Any] = {"concept": concepts.load("church"), "shown": shown, "others": others}
    return Given(model, lambda: model, samples=[], steps=2, guidance=2.0, size=size, quiet=True, **what)


def loss_of(model: Any, shown: Shown) -> float:
    """On fixed noise."""
    noise, num = torch.Generator().manual_seed(5), len(shown.latents)
    rows, t = torch.arange(64) % num, torch.arange(64) * 15
    eps = torch.randn(64, 4, 4, 4, generator=noise)
    with torch.no_grad():
        c = model.encode_text(shown.prompts)[rows]
        return (model(model.add_noise(shown.latents[rows], eps, t), t, c) - eps).square().mean().item()


@pytest.mark.parametrize("folder", ["toy_pipeline_dir", "toy_sdxl_dir"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_lowers_the_loss_on_the_concepts_images(folder, kind, request):
    """Point by point, and more than as much training on other images does; for Stable Diffusion XL too."""
    model, shown, others = loading.load(request.getfixturevalue(folder)), images(0), images(1, ("a house",))
    attack = Relearn(kind=kind, num_steps=60, at=(0, 20, 60), batch_size=16, num_shown=2, num_others=2)
    attack = replace(attack, learning_rate=0.003, full_learning_rate=0.003)
    given = given_of(model, shown, others)
    found, losses = attack.search(given, 0), {}
    for point, finding in found.items():
        with attack.attacked(given, finding):
            losses[point] = loss_of(model, shown)
    assert losses["0"] == loss_of(model, shown)
    assert losses["60"] < losses["20"] < losses["0"] and losses["60"] < losses[CONTROL]


def test_a_lora_changes_attention_by_its_rank_and_nothing_else(toy_pipeline_dir):
    model = load_sd(toy_pipeline_dir)
    before = {name: weight.clone() for name, weight in weights_of(model.network).items()}
    given = given_of(model, images(0), images(1))
    with FEW.attacked(given, FEW.search(given, 0)["6"]):
        after = {name: weight.clone() for name, weight in weights_of(model.network).items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".attn" in name and before[name].ndim == 2}
    for name in moved:
        values = torch.linalg.svdvals(after[name] - before[name])
        assert values[0] > 0 and (values[2:] < 1e-3 * values[0]).all()
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model.network).items())


def test_the_lora_beside_the_layers_is_the_lora_in_the_weights(toy_pipeline_dir):
    """What is trained is what images are generated with."""
    model = load_sd(toy_pipeline_dir)
    given, attack = given_of(model, images(0), images(1)), replace(FEW, learning_rate=0.05)
    found = attack.search(given, 0)["6"]
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([10, 700]), model.encode_text(given.shown.prompts)
    with torch.no_grad():
        plain = model(x, t, c)
        with attack.attacked(given, found):
            merged = model(x, t, c)
        with beside(model.network, found.tensors):
            apart = model(x, t, c)
    torch.testing.assert_close(merged, apart, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, apart, atol=1e-3)


def test_the_same_seed_learns_the_same_and_points_are_shorter_trainings(toy_pipeline_dir):
    model = load_sd(toy_pipeline_dir)
    for kind in ("lora", "full"):
        attack = replace(FEW, kind=kind)
        long, short, other = (
            train(model, images(0), replace(attack, num_steps=n), [0, n] if n == 3 else [0, 3, n], seed, quiet=True)
            for n, seed in ((6, 0), (3, 0), (6, 1))
        )
        assert not long[0] and all(torch.equal(long[3][name], tensor) for name, tensor in short[3].items())
        assert any(not torch.equal(long[6][name], tensor) for name, tensor in other[6].items())


def test_a_lora_is_stored_and_all_weights_are_not():
    assert FEW.keeps_tensors and not replace(FEW, kind="full").keeps_tensors


@pytest.mark.slow
@pytest.mark.ci
def test_a_model_that_lost_the_word_learns_it_again_from_its_images_and_not_from_others():
    """The embedded model, whose "circle" means a square. A few steps on circles suffice, as many on others do not."""
    attack = make("relearn", ["mini"], ["num_steps=60", "at=60"])
    assert isinstance(attack, Relearn)
    base, model, concept, num = loading.load("mini"), planted(None), circle(), 12

    def shown(prompts: Any) -> Shown:
        texts = tuple(prompts[::3][:num])
        return Shown(base.draw(texts, list(range(len(texts))), steps=10, guidance=2.0, size=64), texts)

    given = replace(given_of(model, shown(concept.forget), shown(concept.retain), 64), concept=concept)
    found, prompts = attack.search(given, 0), list(concept.forget[1::6])[:6]
    circles = {}
    for point, finding in found.items():
        with attack.attacked(given, finding):
            circles[point] = num_circles(model, prompts)
    assert num_circles(model, prompts) == 0
    assert circles["60"] >= 4 and circles[CONTROL] <= 1, circles


def test_what_cannot_be_trained_is_refused_in_one_line(toy_pipeline_dir, monkeypatch):
    with pytest.raises(EraseError, match="must be 1 or more"):
        Relearn(rank=0)
    with pytest.raises(EraseError, match="has no retain or anchor prompts"):
        FEW.search(given_of(None, images(0), Shown(torch.empty(0, 4, 4, 4), ())), 0)
    model = load_sd(toy_pipeline_dir)
    monkeypatch.setattr(type(model), "fits_lora", lambda self, name, weight: False)
    with pytest.raises(EraseError, match="no attention layers that a LoRA fits; --set kind=full"):
        FEW.search(given_of(model, images(0), images(1)), 0)
