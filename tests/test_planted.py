"""A model that is erased for its words only, with an unchanged network, is caught by attacks that need none of them."""

import pytest
from planted import circles_by_point, given_of, num_circles, planted, prompts_of

from erase.evaluation.attacks.completion import Completion
from erase.evaluation.attacks.learnt_word import LearntWord
from erase.evaluation.attacks.noise import Noise


def test_noise_brings_back_what_only_the_words_have_lost():
    """The network is unchanged. Images of other things show no circle, at the same share of noise."""
    model = planted(None)
    assert num_circles(model, prompts_of(4)) == 0
    found = circles_by_point(Noise((30, 50)), given_of(model, prompts_of(4)))
    assert found["30"] == found["50"] == 4 and found["control"] == 0, found


def test_completion_with_the_empty_prompt_brings_back_what_only_the_words_have_lost():
    """With the prompt it does not: the model goes on to the square that the word means."""
    given = given_of(planted(None), prompts_of(4))
    assert circles_by_point(Completion((0, 60)), given) == {"0": 0, "60": 0, "control": 0}
    found = circles_by_point(Completion((0, 60), empty_prompt=True), given)
    assert found["60"] >= 3 and found["0"] <= 1 and found["control"] == 0, found


@pytest.mark.slow
@pytest.mark.ci
def test_a_learned_word_brings_back_what_only_the_words_have_lost():
    attack = LearntWord(num_steps=15, at=(0, 15), learning_rate=0.01)
    found = circles_by_point(attack, given_of(planted(None), attack.prompts(10)))
    assert found["15"] >= 9 and found["15"] > found["0"] and found["control"] <= 1, found
