"""Ring-A-Bell: texts near the prompt plus the concept's direction, in the text encoder's space; no model is needed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from loaded import load_sd
from planted import circle, num_circles, planted

from erase import concepts
from erase.concepts import refusal
from erase.errors import EraseError
from erase.evaluation.attacks.found_words import Words, words_of
from erase.evaluation.attacks.protocol import Given, Shown
from erase.evaluation.attacks.ring_a_bell import RingABell, children, direction, distances, evolve, without_names
from erase.evaluation.tasks.protocol import Sample
from erase.families import loading

FEW = RingABell(num_tokens=4, num_steps=12, population=20)


def given_of(model: Any, base: Any, prompts: list[str], concept: Any = None) -> Given:
    none = Shown(torch.empty(0, 4, 4, 4), ())
    samples = [Sample(f"run-0-0-{i}", prompt, i, "forget") for i, prompt in enumerate(prompts)]
    what: dict[str, Any] = {"concept": concept or concepts.load("church"), "shown": none, "others": none}
    return Given(model, lambda: base, samples=samples, steps=2, guidance=2.0, size=8, quiet=True, **what)


def test_the_direction_is_the_mean_of_the_concepts_prompts_minus_their_anchors(toy_pipeline_dir):
    model = load_sd(toy_pipeline_dir)
    concept = concepts.override(concepts.load("church"), forget=("a church", "old church"), anchor=("a", "old"))
    found = direction(model, concept)
    states = model.encode_text(["a church", "old church", "a", "old"]).text_states
    torch.testing.assert_close(found, (states[0] - states[2] + states[1] - states[3]) / 2)


@pytest.mark.parametrize("folder", ["toy_pipeline_dir", "toy_sdxl_dir"])
def test_the_search_comes_nearer_to_its_target_with_every_generation(folder, request):
    """The best text is never lost; after some generations it is nearer than the best of as many random ones."""
    model = loading.load(request.getfixturevalue(folder))
    words = words_of(model, concepts.load("church"))
    with torch.no_grad():
        target = model.encode_text(["a church"]).text_states[0] + direction(model, concepts.load("church"))
    found = dict(evolve(model, target, words, FEW, torch.Generator().manual_seed(0)))
    best = [distances(model, target, found[step][:1])[0].item() for step in sorted(found)]
    assert best == sorted(best, reverse=True) and best[-1] < best[0]
    seen = FEW.population + FEW.num_steps * (FEW.population - FEW.population // 2)
    random = words.tokens[torch.randint(len(words.tokens), (seen, 4), generator=torch.Generator().manual_seed(1))]
    assert best[-1] < distances(model, target, random).min()


def test_children_cross_two_parents_and_change_one_word():
    words = Words(torch.arange(100, 110), torch.empty(10, 1))
    parents = torch.stack([torch.full((6,), i) for i in range(4)])
    draw = torch.Generator().manual_seed(0)
    crossed = children(parents, 40, words, RingABell(crossover=1.0, mutation=0.0), draw)
    assert crossed.shape == (40, 6) and (crossed.diff(dim=1) != 0).sum(1).max() == 1
    assert {int(v) for v in crossed.flatten()} <= {0, 1, 2, 3}
    mutated = children(parents, 40, words, RingABell(crossover=0.0, mutation=1.0), draw)
    assert ((mutated >= 100).sum(1) == 1).all()
    same = children(parents, 40, words, RingABell(crossover=0.0, mutation=0.0), draw)
    assert torch.equal(same, parents.repeat(10, 1))


def test_it_needs_no_model_and_is_searched_once_for_all(toy_pipeline_dir, erased_dir):
    """Found with the base's text encoder, also where the attacked model has another one; unless the donor is that."""
    base, model = load_sd(toy_pipeline_dir), load_sd(erased_dir)
    with torch.no_grad():
        model.token_embeddings.add_(torch.randn(model.token_embeddings.shape, generator=torch.Generator()))
    given = given_of(model, base, ["a church"])
    found = FEW.search(given, 0)
    assert found["12"].texts == FEW.search(given_of(base, base, ["a church"]), 0)["12"].texts
    own = replace(FEW, donor="model")
    assert own.search(given_of(model, base, ["a church"]), 0)["12"].texts != found["12"].texts
    other = replace(given, model=base, open_base=lambda: pytest.fail("searched twice"))
    assert FEW.search(other, 0) is found


def test_no_text_that_it_finds_involves_minors(toy_pipeline_dir, monkeypatch):
    model = load_sd(toy_pipeline_dir)
    monkeypatch.setattr(refusal, "involves_minors", lambda text, is_sexual=False: len(text) > 1)
    found = FEW.search(given_of(model, model, ["a church"]), 0)
    assert all(dict(finding.texts) == {"a church": "a church"} for finding in found.values())


def test_it_finds_another_word_of_the_concept_and_nothing_where_there_is_none():
    """The embedded model with the circle under "disc" only, and under no word. The attacker knows neither model."""
    concept, prompts = replace(circle(), synonyms=()), ["a photo of a solid red circle", "a drawing of a circle"]
    attack = RingABell(num_tokens=6, num_steps=40, population=100, named=False)
    base = loading.load("mini")
    texts = list(attack.search(given_of(base, base, prompts, concept), 0)["40"].texts.values())
    assert not any("circle" in text for text in texts) and all("disc" in text for text in texts)
    assert num_circles(planted("disc"), texts) == 2 and num_circles(planted(None), texts) == 0


def test_the_concepts_own_words_can_be_left_out():
    model = loading.load("mini")
    words = words_of(model, circle())
    left = {model.text_of([token]) for token in without_names(words, model, circle()).tokens.tolist()}
    assert {model.text_of([token]) for token in words.tokens.tolist()} - left == {"circle", "disc"}


@pytest.mark.parametrize(
    ("more", "message"),
    [({"population": 2}, "population is 2; it must be 4 or more"), ({"mutation": 1.5}, "between 0 and 1")],
)
def test_settings_that_mean_nothing_are_refused(more, message):
    with pytest.raises(EraseError, match=message):
        RingABell(**more)
