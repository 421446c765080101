"""P4D: words with which the erased model predicts what the base does; they find a planted back door, else nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from loaded import load_sd
from planted import SECRET, circle, images_of, num_circles, planted, prompts_of

from erase import concepts, guards
from erase.errors import EraseError
from erase.evaluation.attacks.found_words import random_words, words_of
from erase.evaluation.attacks.p4d import P4D, find, parts_of, places, template, text_of
from erase.evaluation.attacks.protocol import Given, Shown
from erase.evaluation.attacks.registry import make
from erase.evaluation.tasks.protocol import Sample
from erase.families import loading

PROMPTS = ["a church", "an old chapel"]
FEW = P4D(num_tokens=3, num_steps=8)


def latents(num: int = 2) -> torch.Tensor:
    return torch.randn(num, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def last(model: Any, base: Any, attack: P4D, seed: int = 0, prompts: list[str] = PROMPTS) -> list[list[int]]:
    words = words_of(model, concepts.load("church"))
    *_, (step, rows) = find(model, base, latents(len(prompts)), prompts, words, attack, seed)
    assert step == attack.num_steps
    return rows.tolist()


@pytest.mark.parametrize("folder", ["toy_pipeline_dir", "toy_sdxl_dir"])
def test_the_words_bring_the_prediction_nearer_to_the_bases(folder, request):
    """On fixed noise, nearer than random words do on average; for Stable Diffusion XL too."""
    model = loading.load(request.getfixturevalue(folder))
    words, base = words_of(model, concepts.load("church")), loading.load(request.getfixturevalue(folder))
    attack = P4D(num_tokens=4, num_steps=40)
    eps, t = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(5)), torch.arange(64) * 15
    x_t = model.add_noise(latents(1).expand(64, -1, -1, -1), eps, t)

    @torch.no_grad()
    def far(tokens: list[int]) -> float:
        own, goal = model.encode_tokens([tokens]).expand(64), base.encode_text(PROMPTS[:1]).expand(64)
        return (model(x_t, t, own) - base(x_t, t, goal)).square().mean().item()

    random = [far(random_words(words, 4, seed)) for seed in range(12)]
    assert far(last(model, base, attack, prompts=PROMPTS[:1])[0]) < sum(random) / 12


def test_more_draws_are_spread_over_the_schedule(toy_pipeline_dir, erased_dir, monkeypatch):
    model, base, seen = load_sd(erased_dir), load_sd(toy_pipeline_dir), []
    add_noise = type(model).add_noise
    monkeypatch.setattr(type(model), "add_noise", lambda self, x, e, t: (seen.append(t), add_noise(self, x, e, t))[1])
    last(model, base, replace(FEW, num_steps=5, draws=4))
    assert len(seen) == 5 and all((t.view(2, 4) // 250 == torch.arange(4)).all() for t in seen)


def test_words_do_not_depend_on_the_batch_and_do_on_the_seed(toy_pipeline_dir, erased_dir):
    model, base = load_sd(erased_dir), load_sd(toy_pipeline_dir)
    both = last(model, base, FEW)
    assert last(model, base, FEW, prompts=PROMPTS[:1]) == both[:1]
    assert last(model, base, FEW, seed=1) != both


def test_it_searches_through_the_guard(toy_pipeline_dir):
    model, base = load_sd(toy_pipeline_dir), load_sd(toy_pipeline_dir)
    plain = last(model, base, FEW)
    model.guard = guards.make("sld-max", "a church")
    assert last(model, base, FEW) != plain


def given_of(model: Any, base: Any) -> Given:
    samples = [Sample(f"run-0-0-{i}", prompt, i, "forget") for i, prompt in enumerate(PROMPTS)]
    what: dict[str, Any] = {"concept": concepts.load("church"), "shown": Shown(latents(), tuple(PROMPTS))}
    none = Shown(latents(0), ())
    return Given(model, lambda: base, samples=samples, others=none, steps=2, guidance=2.0, size=8, quiet=True, **what)


def test_the_words_replace_the_prompt_or_stand_before_it(toy_pipeline_dir, erased_dir):
    given = given_of(load_sd(erased_dir), load_sd(toy_pipeline_dir))
    for attack in (FEW, replace(FEW, keeps_prompt=True)):
        found = attack.search(given, 0)
        assert list(found) == ["0", "2", "4", "8", *attack.controls]
        for point in ("0", "8", "control.2"):
            for prompt, text in found[point].texts.items():
                assert text.endswith(f" {prompt}") == attack.keeps_prompt
                own = len(given.model.tokens(prompt)) if attack.keeps_prompt else 0
                assert len(given.model.tokens(text)) == 3 + own
        assert found["0"].texts != found["8"].texts and not found["seeds"].texts


def test_p4d_k_puts_a_word_before_the_prompt_and_after_every_three_tokens(toy_pipeline_dir, erased_dir):
    """A word of many tokens stays whole (the toy's tokens are letters); a full last part is followed by a word."""
    given = given_of(load_sd(erased_dir), load_sd(toy_pipeline_dir))
    model, attack = given.model, replace(FEW, every=3, num_tokens=1)
    expected = {
        "a b c d e": ["a b c", "d e"],
        "a b c": ["a b c", ""],
        "church": ["church", ""],
        "a b church c": ["a b church", "c"],
        "": [""],
    }
    assert {prompt: parts_of(model, prompt, attack) for prompt in expected} == expected
    found = attack.search(given, 0)
    for point in ("0", "8", "control.2"):
        for prompt, text in found[point].texts.items():
            parts = parts_of(model, prompt, attack)
            own = template(model, parts, attack)
            read = [token for token, place in zip(model.tokens(text), own, strict=True) if place is not None]
            assert read == model.tokens(prompt) and own.count(None) == len(parts) > 1
    assert found["0"].texts != found["8"].texts


def test_p4d_k_stops_where_the_text_encoder_does(toy_pipeline_dir):
    model, attack = load_sd(toy_pipeline_dir), replace(FEW, every=3)
    for num in range(50, 80):
        tokens = template(model, parts_of(model, " ".join("a" * num), attack), attack)
        limit, whole = model.max_tokens - 2, num + num // 3 + 1
        assert places(tokens) == list(range(0, min(limit, whole), 4))


def test_prompts_of_any_length_are_searched_in_batches(toy_pipeline_dir, erased_dir):
    given = given_of(load_sd(erased_dir), load_sd(toy_pipeline_dir))
    one, some = (replace(FEW, every=3, batch_size=size).search(given, 0) for size in (1, 2))
    assert {point: finding.texts for point, finding in one.items()} == {p: f.texts for p, f in some.items()}


def test_no_text_that_it_finds_involves_minors(toy_pipeline_dir, monkeypatch):
    model = load_sd(toy_pipeline_dir)
    monkeypatch.setattr(model, "text_of", lambda tokens: "?" if len(tokens) == 1 else "young girl")
    monkeypatch.setattr(model, "tokens", lambda text: [3] if text == "?" else [1, 2])
    found = FEW.search(given_of(model, model), 0)
    assert all(text == prompt for finding in found.values() for prompt, text in finding.texts.items())


@pytest.mark.parametrize("more", [["num_tokens=3", "keeps_prompt=true"], ["every=3"]], ids=["before", "P4D-K"])
def test_it_finds_a_planted_back_door_and_nothing_where_there_is_none(more):
    """The embedded model with the circle under a secret word only, and under none."""
    attack = make("p4d", ["mini"], ["num_steps=24", *more])
    prompts, base = prompts_of(3), loading.load("mini")
    assert isinstance(attack, P4D)
    x, said = images_of(prompts), {}
    for secret in (SECRET, None):
        model = planted(secret)
        *_, (_, rows) = find(model, base, x, prompts, words_of(model, circle()), attack, 0)
        parts = [parts_of(model, prompt, attack) for prompt in prompts]
        said[secret] = [text_of(model, row, part) for row, part in zip(rows.tolist(), parts, strict=True)]
        shown = num_circles(model, said[secret])
        assert shown >= 2 if secret else shown <= 1, said
    assert sum(SECRET in text for text in said[SECRET]) >= 2


@pytest.mark.parametrize(("more", "message"), [({"num_tokens": 0}, "must be 1 or more"), ({"at": (5, 3)}, "must rise")])
def test_settings_that_mean_nothing_are_refused(more, message):
    with pytest.raises(EraseError, match=message):
        P4D(**more)
