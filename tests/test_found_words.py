"""Words that attacks put into prompts: each is its own token, and none brings in minors."""

import pytest
import torch
from loaded import load_sd

from erase import concepts
from erase.concepts import refusal
from erase.evaluation.attacks.found_words import Words, accepted, random_words, text_with, words_of
from erase.families import loading


@pytest.fixture(scope="module")
def mini():
    return loading.load("mini")


def test_every_word_is_read_as_itself(mini):
    words = words_of(mini, concepts.load("circle", model_family="mini"))
    tokens = words.tokens.tolist()
    assert len(set(tokens)) == len(tokens) > 100
    assert all(
        mini.tokens(mini.text_of([token])) == [token] and mini.text_of([token]).isprintable() for token in tokens
    )
    assert torch.equal(words.embeddings, mini.token_embeddings[words.tokens])
    texts = {mini.text_of([token]) for token in tokens}
    assert {"circle", "purple", "house"} <= texts  # whole words
    assert not {"purpl", ""} & texts


def test_words_that_involve_minors_are_no_words(mini, monkeypatch):
    """The embedded model's vocabulary has none, so one is planted."""
    concept = concepts.load("circle", model_family="mini")
    text_of = mini.text_of
    purple, house = mini.tokens("purple")[0], mini.tokens("house")[0]
    names = {purple: "child"}
    monkeypatch.setattr(mini, "text_of", lambda tokens: names.get(tokens[0], text_of(tokens)))
    monkeypatch.setattr(mini, "tokens", lambda text: [purple] if text == "child" else type(mini).tokens(mini, text))
    tokens = words_of(mini, concept).tokens.tolist()
    assert house in tokens and purple not in tokens


def test_a_text_that_involves_minors_is_replaced_by_the_last_one_that_does_not():
    church = concepts.load("church")
    assert accepted("old stone", "before", church) == "old stone"
    assert accepted("old boy", "before", church) == "before"
    assert not refusal.involves_minors("a small model of a church") and refusal.involves_minors("a church with a girl")
    assert refusal.involves_minors("a small model", is_sexual=True) == bool(refusal.shows_minors("a small model", True))


def test_random_words_depend_on_the_seed_and_the_prompt(toy_pipeline_dir):
    words = words_of(load_sd(toy_pipeline_dir), concepts.load("church"))
    one, again, other = (random_words(words, 4, seed, "a prompt") for seed in (0, 0, 1))
    assert one == again and len(one) == 4 and set(one) <= set(words.tokens.tolist())
    assert one != other and one != random_words(words, 4, 0, "another prompt")


def test_a_text_has_the_words_before_the_prompt(mini):
    tokens = [mini.tokens(word)[0] for word in ("red", "house")]
    assert text_with(mini, tokens, "a circle") == "red house a circle"
    assert text_with(mini, tokens, "") == "red house"


def test_nearest_words_are_by_cosine():
    words = Words(torch.tensor([5, 7]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    assert words.nearest(torch.tensor([[[9.0, 1.0], [0.1, 0.2]]])).tolist() == [[0, 1]]
