"""Laws of words for users: guesses at misspelt names, and articles."""

import re
from pathlib import Path

import pytest

import erase
from erase import words


def test_a_guess_is_a_known_name_that_is_close():
    known = ["salun", "esd-x", "uce"]
    assert words.did_you_mean("salum", known) == "did you mean salun? "
    assert words.did_you_mean("banana", known) == ""
    assert words.closest("esd-y", ["uce", *known, "esd-u"], num=2) == ["esd-x", "esd-u"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apple", "an"),
        ("English springer", "an"),
        ("golf ball", "a"),
        ("unicorn", "a"),
        ("umbrella", "an"),
        ("European wolf", "a"),
        ("hourglass", "an"),
        ("horse", "a"),
        ("one-way street", "a"),
    ],
)
def test_an_article_follows_the_sound(text, expected):
    assert words.article(text) == expected


def test_guesses_and_articles_are_made_in_one_place():
    """difflib compares prompts elsewhere too, which are no names."""
    again = re.compile(r"get_close_matches|aeiou")
    package = Path(erase.__file__).parent
    found = {path for path in package.rglob("*.py") if again.search(path.read_text(encoding="utf-8"))}
    assert found == {package / "words.py"}
