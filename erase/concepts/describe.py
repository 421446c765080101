"""Concepts from free text: prompts for an object, a style, a person or an abstract word."""

import re

from erase.concepts import refusal
from erase.concepts.concept import Concept, FreeKind, bare, share_word
from erase.errors import EraseError
from erase.words import article, listed


def describe(name: str, kind: FreeKind) -> Concept:
    """A concept from words alone, such as describe("red bicycle", "object") or describe("pixel art", "style").

    object: the anchor is a potted plant, because it has to be a concrete thing: "" or "an object" tells the model
        nothing, and it then restores what it still sees in the noisy image. A potted plant fits most scenes and is
        seldom erased itself. A near neighbour of your concept (bicycle -> scooter) changes the images less; give it as
        `anchor` to `override`.
    style: the anchor is the same subject without a style.
    person: a public figure; the anchor is "a person". "a man" or "a woman" changes the images less.
    abstract: what has no shape of its own, such as violence; the anchor is a peaceful scene.

    Raises:
        EraseError: no name, an unknown kind, an abstract word as an object, or a target that this tool refuses.
    """
    name = " ".join(name.split())
    refusal.refuse([name], "name", target=True)
    if not re.search(r"\w", name):
        raise EraseError(f"a concept needs a name of letters or digits, such as 'golf ball', not {name!r}")
    describers = {
        "object": _describe_object,
        "style": _describe_style,
        "person": _describe_person,
        "abstract": _describe_abstract,
    }
    if kind not in describers:
        raise EraseError(
            f"cannot describe a concept of kind {kind!r}; choose {listed([*describers], 'or')}, "
            "or load the preset 'nudity'"
        )
    if kind in {"object", "person"} and bare(name).lower() in _ABSTRACT_WORDS:
        what = "object that stands somewhere" if kind == "object" else "person"
        raise EraseError(f"{name!r} is no {what}; use --kind abstract")
    return describers[kind](name)


EVERYDAY = (
    "a photo of a person wearing clothes",
    "a photo of a man reading a newspaper",
    "a photo of a woman cooking in a kitchen",
    "a portrait of an old man with a beard",
    "two friends talking in a cafe",
    "a crowd at a market",
    "a photo of a dog running on a beach",
    "a photo of a cat asleep on a sofa",
    "a horse in a field",
    "an eagle in flight",
    "a photo of an elephant by a river",
    "a close-up photo of a butterfly on a flower",
    "a landscape with mountains and a lake",
    "a photo of a forest in autumn",
    "a desert at sunset",
    "waves breaking on a rocky shore",
    "a snowy village at night",
    "a photo of a busy city street",
    "a modern glass building",
    "a photo of a bridge over a river",
    "a photo of a red car on a road",
    "a photo of a bicycle against a wall",
    "a sailing boat on the sea",
    "a photo of a cup of coffee on a table",
    "a bowl of fruit",
    "a photo of a guitar and a violin",
    "an armchair by a window",
    "a photo of a laptop on a desk",
    "an oil painting of a vase of flowers",
    "a watercolor painting of a garden",
    "a pencil drawing of a castle",
    "a black and white photo of a train",
)
_PEOPLE = (
    "Albert Einstein",
    "Marie Curie",
    "Abraham Lincoln",
    "Charlie Chaplin",
    "Audrey Hepburn",
    "Nelson Mandela",
    "Muhammad Ali",
    "Frida Kahlo",
)
_PERSON_TEMPLATES = (
    "a photo of {}",
    "a portrait of {}",
    "a picture of {}",
    "a close-up photo of {}",
    "a painting of {}",
    "a drawing of {}",
    "a photo of {} outdoors",
    "a photo of {} at an event",
)
_CALM = ("a peaceful scene", "an everyday scene")
_ABSTRACT_TEMPLATES = (
    "a photo of {}",
    "an image of {}",
    "a picture of {}",
    "a painting of {}",
    "a drawing of {}",
    "an illustration of {}",
    "a realistic photo of {}",
    "a photo that shows {}",
)
_ABSTRACT_WORDS = frozenset(
    "abuse aggression anger brutality chaos cruelty danger death despair discrimination evil fear freedom gore grief "
    "happiness harassment hate hatred horror hunger illness injustice joy love misery pain peace poverty racism "
    "sadness self-harm sexism shock sorrow suffering suicide terror terrorism time torture truth violence war".split()
)
_THINGS = ("cat", "car", "bicycle", "chair", "bridge", "guitar", "sailing boat", "horse", "cup", "mountain")
_ANCHORS = ("potted plant", "wooden chair", "ceramic mug")
_OBJECT_TEMPLATES = (
    "a photo of {}",
    "an image of {}",
    "a picture of {}",
    "a close-up photo of {}",
    "a painting of {}",
    "a drawing of {}",
    "{} outdoors",
    "{} in a room",
)
_STYLE_SUBJECTS = (
    "a painting",
    "a painting of a house",
    "a portrait of a man",
    "a portrait of a woman",
    "a landscape",
    "a still life with fruit",
    "a city street at night",
    "a drawing of a tree",
    "a vase of flowers",
    "a boat on a river",
)
_ARTISTS = (
    "Vincent van Gogh",
    "Claude Monet",
    "Pablo Picasso",
    "Andy Warhol",
    "Rembrandt",
    "Johannes Vermeer",
    "Katsushika Hokusai",
    "Gustav Klimt",
    "Edvard Munch",
    "Wassily Kandinsky",
    "Edward Hopper",
    "Frida Kahlo",
)


def _describe_object(name: str) -> Concept:
    thing = _with_article(name)
    anchor = _with_article(next(other for other in _ANCHORS if not share_word(name, other)))
    others = tuple(f"a photo of {_with_article(other)}" for other in _THINGS if not share_word(name, other))
    return Concept(
        name=bare(name),
        kind="object",
        forget=tuple(template.format(thing) for template in _OBJECT_TEMPLATES),
        anchor=tuple(template.format(anchor) for template in _OBJECT_TEMPLATES),
        retain=tuple(prompt for prompt in EVERYDAY if not share_word(name, prompt)),
        others=others,
        judge={"type": "clip", "target": f"a photo of {thing}", "alternatives": list(others)},
    )


def _describe_style(name: str) -> Concept:
    artists = [artist for artist in _ARTISTS if not share_word(name, artist)]
    others = tuple(f"a painting in the style of {artist}" for artist in artists)
    in_styles = tuple(
        f"{_STYLE_SUBJECTS[(i + shift) % len(_STYLE_SUBJECTS)]} in the style of {artist}"
        for i, artist in enumerate(artists)
        for shift in (0, 3)
    )
    return Concept(
        name=name,
        kind="style",
        forget=tuple(f"{subject} in the style of {name}" for subject in _STYLE_SUBJECTS),
        anchor=_STYLE_SUBJECTS,
        retain=tuple(prompt for prompt in in_styles + EVERYDAY if not share_word(name, prompt)),
        others=others,
        judge={"type": "clip", "target": f"a painting in the style of {name}", "alternatives": [*others, "a photo"]},
    )


def _describe_person(name: str) -> Concept:
    people = [other for other in _PEOPLE if not share_word(name, other)]
    others = tuple(f"a photo of {other}" for other in people)
    kept = tuple(template.format(other) for other in people for template in _PERSON_TEMPLATES[:2])
    return Concept(
        name=name,
        kind="person",
        forget=tuple(template.format(name) for template in _PERSON_TEMPLATES),
        anchor=tuple(template.format("a person") for template in _PERSON_TEMPLATES),
        retain=tuple(prompt for prompt in (*kept, *EVERYDAY) if not share_word(name, prompt)),
        others=others,
        judge={"type": "clip", "target": f"a photo of {name}", "alternatives": [*others, "a photo of a person"]},
    )


def _describe_abstract(name: str) -> Concept:
    calm = next(other for other in _CALM if not share_word(name, other.replace("peaceful", "peace")))
    others = tuple(f"a photo of {_with_article(other)}" for other in _THINGS if not share_word(name, other))
    return Concept(
        name=name,
        kind="abstract",
        forget=tuple(template.format(name) for template in _ABSTRACT_TEMPLATES),
        anchor=tuple(template.format(calm) for template in _ABSTRACT_TEMPLATES),
        retain=tuple(prompt for prompt in EVERYDAY if not share_word(name, prompt)),
        others=others,
        judge={"type": "clip", "target": f"a photo of {name}", "alternatives": [f"a photo of {calm}", *others]},
    )


def _with_article(name: str) -> str:
    """ "an apple"; proper names ("Mickey Mouse"), plurals and names that bring their own article stay as they are."""
    words = name.split()
    if words[0].lower() in {"a", "an", "the", "some"}:
        return name
    is_proper_name = len(words) > 1 and all(word[0].isupper() for word in words)
    is_plural = name.endswith("s") and not name.endswith(("ss", "us", "is"))
    if is_proper_name or is_plural:
        return name
    return f"{article(name)} {name}"
