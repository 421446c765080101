"""What every registered attack must do, ours and those of other packages."""

import json
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_ddpm
from loaded import load_sd

from erase import concepts
from erase.errors import EraseError
from erase.evaluation import attacked, generate
from erase.evaluation.attacks.protocol import CONTROL, SEEDS, Attack, Finding, Given, Shown, said
from erase.evaluation.attacks.registry import ATTACKS, make
from erase.evaluation.tasks.protocol import Sample
from erase.families import loading
from erase.families.sd import StableDiffusion

NUM = 2


@pytest.fixture(params=ATTACKS.names())
def attack(request) -> Attack:
    return make(request.param, ["mini", "quick"])


@pytest.fixture
def given(attack, toy_pipeline_dir, erased_dir, toy_ddpm_dir, tmp_path) -> Given:
    """The toy's erased copy under attack, with images of noise; for an attack on labels a class-conditional toy."""
    if attack.finds_classes:
        return of_labels(attack, toy_ddpm_dir)
    concept = concepts.load("church")
    noise = torch.Generator().manual_seed(0)

    def images(number: int, prompts: Any) -> Shown:
        return Shown(torch.randn(number, 4, 4, 4, generator=noise), tuple(islice(cycle(prompts), number)))

    asked = attack.asks(concept, ["a chapel", "a tower"], NUM)
    return Given(
        model=load_sd(erased_dir),
        open_base=lambda: load_sd(toy_pipeline_dir),
        concept=concept,
        shown=images(attack.num_shown, concept.forget),
        others=images(attack.num_others, concept.retain),
        samples=[Sample(f"run-0-first-{i}", prompt, i, "forget") for i, prompt in enumerate(asked)],
        steps=2,
        guidance=2.0,
        size=8,
        quiet=True,
    )


def of_labels(attack: Attack, folder: Path) -> Given:
    """The class-conditional toy under attack."""
    concept = concepts.of_class("cat", toy_ddpm.CLASSES)
    shown = torch.randn(attack.num_shown, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Given(
        model=loading.load(folder),
        open_base=lambda: loading.load(folder),
        concept=concept,
        shown=Shown(shown, ("cat",) * len(shown)),
        others=Shown(shown[:0], ()),
        samples=[Sample(f"run-0-first-{i}", p, i, "forget") for i, p in enumerate(attack.asks(concept, [], NUM))],
        steps=2,
        guidance=2.0,
        size=8,
        quiet=True,
    )


def parts_of(model: Any) -> dict[str, Any]:
    if not isinstance(model, StableDiffusion):
        return {"unet": model.network}
    return {"unet": model.unet, "text": model.text_encoder, "vae": model.vae}


def state_of(model: Any) -> dict[str, torch.Tensor]:
    parts = parts_of(model)
    return {f"{part}.{name}": t.clone() for part, module in parts.items() for name, t in module.state_dict().items()}


def is_as_it_was(model: Any, before: dict[str, torch.Tensor]) -> bool:
    after = state_of(model)
    parts = parts_of(model).values()
    hooks = [m for part in parts for m in part.modules() if m._forward_hooks]
    gradients = [p for part in parts for p in part.parameters() if p.grad is not None or p.requires_grad]
    same = list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    return same and not hooks and not gradients


def equal(one: Finding, other: Finding) -> bool:
    tensors = one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )
    return tensors and (one.texts, one.facts) == (other.texts, other.facts)


def drawn(attack: Attack, given: Given, finding: Finding) -> torch.Tensor:
    with attack.attacked(given, finding):
        return attack.draw(given, finding, given.samples, given.guidance)


def test_an_attack_says_what_it_is(attack):
    assert attack.about and attack.needs and attack.unit and attack.version >= 1
    assert attack.points and len(set(attack.points)) == len(attack.points) and CONTROL not in attack.points
    assert all(point.replace("-", "").replace(".", "").isalnum() for point in attack.points)  # parts of names
    assert not any(point.startswith((CONTROL, SEEDS)) for point in attack.points)
    assert attack.looks or attack.controls == ((CONTROL,) if attack.control else ())
    json.dumps(asdict(attack))  # pyright: ignore - settings are in the protocol


@pytest.mark.parametrize("name", ATTACKS.names())
def test_settings_of_every_preset_are_fields_of_the_attack(name):
    for presets in ([], ["sd"], ["mini"], ["sd", "quick"], ["mini", "quick"]):
        assert make(name, presets) == make(name, presets)
    with pytest.raises(EraseError, match=f"the attack {name} has"):
        make(name, [], ["nothing=1"])


def test_an_attack_asks_for_as_many_prompts_as_it_is_told(attack):
    own = ["a chapel", "a tower"]
    assert len(attack.asks(concepts.load("church"), own, 7)) == 7


def test_the_search_finds_something_at_every_point_and_leaves_the_model_as_it_was(attack, given):
    before = state_of(given.model)
    found = attack.search(given, 0)
    assert list(found) == [*attack.points, *attack.controls]
    assert is_as_it_was(given.model, before)
    assert all(isinstance(finding, Finding) for finding in found.values())


def test_the_same_attack_seed_finds_the_same_and_another_one_another(attack, given):
    one, again, other = (attack.search(given, seed) for seed in (0, 0, 1))
    assert all(equal(one[point], again[point]) for point in one)
    assert attack.is_random != all(equal(one[point], other[point]) for point in one) or not attack.keeps_tensors


def test_images_are_of_the_attacked_model_which_is_afterwards_as_it_was(attack, given):
    before, found = state_of(given.model), attack.search(given, 0)
    images = {point: drawn(attack, given, finding) for point, finding in found.items()}
    assert all(
        latents.shape == (NUM, *given.model.latent_shape(given.size)) and latents.isfinite().all()
        for latents in images.values()
    )
    assert is_as_it_was(given.model, before)
    again = drawn(attack, given, found[attack.points[-1]])
    assert torch.equal(again, images[attack.points[-1]])
    texts = [said(found[attack.points[-1]], sample) for sample in given.samples]
    plain = given.model.draw(texts, [s.seed for s in given.samples], steps=2, guidance=2.0, size=8)
    prompts = [sample.prompt for sample in given.samples]
    assert texts != prompts or not torch.equal(plain, again) or type(attack).attacked is Attack.attacked


def test_what_was_found_is_stored_and_read_back_exactly(attack, given, tmp_path: Path):
    for point, finding in attack.search(given, 0).items():
        attacked.write_finding(tmp_path / f"{point}.json", finding, keeps_tensors=attack.keeps_tensors)
        again = attacked.read_finding(tmp_path / f"{point}.json")
        assert equal(finding, again) or not attack.keeps_tensors


def test_a_search_that_is_interrupted_leaves_the_model_as_it_was(attack, given, monkeypatch):
    """Whatever the attack holds while it learns is let go."""
    before, model = state_of(given.model), given.model
    predict, calls = type(model).predict, []

    def stop(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, *arguments)

    monkeypatch.setattr(type(model), "predict", stop)
    try:
        attack.search(given, 0)
    except KeyboardInterrupt:
        pass
    assert is_as_it_was(given.model, before)


def test_steps_are_a_budget_that_the_user_gives(attack):
    if attack.unit != "steps":
        with pytest.raises(EraseError, match="--budget"):
            attack.with_budget([4])
        return
    assert attack.with_budget([4]).points == ("0", "1", "2", "4")
    assert attack.with_budget([3, 9]).points == ("0", "3", "9")
    with pytest.raises(EraseError, match="must rise"):
        attack.with_budget([9, 3])


def test_the_model_that_is_attacked_is_hashed_as_it_is(attack, given):
    """The identity of an arm is the model's own, not that of the attacked one."""
    hashes = generate.model_hashes(given.model)
    attack.search(given, 0)
    assert generate.model_hashes(given.model) == hashes
