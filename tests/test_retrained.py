"""Attacks find a concept that is only hidden, and not in a model that was trained without it.

In a world of three names that a model learns in seconds. "q" is hidden where its word means "w": the network knows it
still, and another word, "v", means it. relearn, which teaches the concept again, comes back there with fewer steps;
merge, which adds the base's weights, can find it in any model.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import toy_world as world

from erase.concepts import Concept
from erase.evaluation.attacks.completion import Completion
from erase.evaluation.attacks.learnt_word import LearntWord
from erase.evaluation.attacks.noise import Noise
from erase.evaluation.attacks.p4d import P4D
from erase.evaluation.attacks.protocol import Attack, Given, Shown
from erase.evaluation.attacks.relearn import Relearn
from erase.evaluation.attacks.ring_a_bell import RingABell
from erase.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk
from erase.evaluation.tasks.protocol import Sample
from erase.families import loading
from erase.families.sd import StableDiffusion

pytestmark = [pytest.mark.slow, pytest.mark.ci]
HOW: dict[str, Any] = {"steps": 20, "guidance": 3.0, "size": 8}
ALL, WITHOUT = (0, 1, 2), (1, 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], StableDiffusion]:
    """A fresh copy of "base", "hidden" or "retrained"."""
    root = tmp_path_factory.mktemp("world")
    trained = {"base": world.trained(root / "base", ALL), "retrained": world.trained(root / "retrained", WITHOUT)}

    def load(name: str) -> StableDiffusion:
        source = "retrained" if name == "retrained" else "base"
        model: Any = loading.load(root / source)
        model.unet.load_state_dict(trained[source].unet.state_dict())
        if name == "hidden":
            with torch.no_grad():
                q, w = (model.token_embeddings[model.tokens(word)[0]].clone() for word in ("q", "w"))
            model.set_token(model.tokens("q")[0], w)
            model.set_token(model.tokens("v")[0], q)
        return model

    return load


def found(attack: Attack, load: Callable[[str], StableDiffusion], name: str, num: int = 8) -> dict[str, int]:
    """How many of `num` images show "q", by point of the attack's budget; controls are left out."""
    base, model = load("base"), load(name)
    prompts = attack.prompts(num) if isinstance(attack, LearntWord) else ["q"] * num
    samples = [Sample(f"run-0-0-{i}", prompt, 10 + i, "forget") for i, prompt in enumerate(prompts)]
    shown, others = (Shown(base.draw([word] * 20, range(20), **HOW), (word,) * 20) for word in ("q", "w"))
    concept = Concept("q", "object", forget=("q",), anchor=("w",), retain=("w", "e"))
    what: dict[str, Any] = {"open_base": lambda: base, "concept": concept, "samples": samples}
    given = Given(model, shown=shown, others=others, quiet=True, **what, **HOW)
    counts = {}
    for point, finding in attack.search(given, 0).items():
        if point.isdigit():
            with attack.attacked(given, finding):
                latents = attack.draw(given, finding, samples, given.guidance)
            counts[point] = world.seen_in(latents).count("q")
    return counts


def test_the_worlds_models_are_what_they_are_called(models):
    seen = {
        name: {word: world.seen_in(models(name).draw([word] * 8, range(8), **HOW)).count("q") for word in "qwev"}
        for name in ("base", "hidden", "retrained")
    }
    assert seen["base"]["q"] == 8 and seen["base"]["w"] == seen["base"]["e"] == 0
    assert seen["hidden"]["v"] == 8 and seen["hidden"]["q"] == seen["hidden"]["w"] == seen["hidden"]["e"] == 0
    assert not any(seen["retrained"].values())


ATTACKS: dict[str, Attack] = {
    "learnt-word": LearntWord(num_steps=100, at=(0, 100), learning_rate=0.02, templates=("{}",)),
    "unlearn-diff-atk": UnlearnDiffAtk(num_tokens=2, num_steps=80, at=(0, 80), learning_rate=0.1),
    "p4d": P4D(num_tokens=2, num_steps=80, at=(0, 80)),
    "ring-a-bell": RingABell(num_tokens=2, num_steps=100, at=(0, 100), population=100, named=False),
    "noise": Noise((50, 70)),
    "completion": Completion((0, 60)),
    "completion without a prompt": Completion((20, 60), empty_prompt=True),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_hidden_is_found_and_what_was_never_shown_is_not(models, attack):
    hidden, retrained = (found(ATTACKS[attack], models, name) for name in ("hidden", "retrained"))
    assert max(hidden.values()) >= 6 and max(retrained.values()) <= 1, (hidden, retrained)


def test_what_was_never_shown_takes_longer_to_relearn(models):
    attack = Relearn(kind="full", num_steps=20, at=(0, 20), full_learning_rate=1e-3)
    hidden, retrained = (found(attack, models, name) for name in ("hidden", "retrained"))
    assert hidden["20"] >= 4 and retrained["20"] <= 1, (hidden, retrained)
