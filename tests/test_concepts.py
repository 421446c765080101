"""Laws of concepts: presets are sound, mistakes are named, and a target that involves minors has no way in."""

import re
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest

from erase import concepts, words
from erase.concepts import Concept, describe, load, names, override, presets
from erase.errors import EraseError

REFUSAL = "this tool does not accept targets that involve minors"
IMAGENETTE = {
    "tench": 0,
    "english_springer": 217,
    "cassette_player": 482,
    "chain_saw": 491,
    "church": 497,
    "french_horn": 566,
    "garbage_truck": 569,
    "gas_pump": 571,
    "golf_ball": 574,
    "parachute": 701,
}
ARTISTS = ("van_gogh", "claude_monet", "pablo_picasso", "andy_warhol")
MINI_OBJECTS = "circle square triangle diamond star heart cross moon house tree fish".split()
MINI_STYLES = "solid outline striped checked".split()
MINI_COLOURS = "red yellow green blue purple pink".split()
MINI_SYNONYMS = "disc box crescent cottage pine stripy chequered outlined filled naked mannequin".split()
MINI_GRAMMAR = re.compile(
    r"(?:an? (?:photo|picture|drawing|image) of )?"
    rf"an? (?:(?:(?:{'|'.join([*MINI_STYLES, *MINI_SYNONYMS])}) )?(?:(?:{'|'.join(MINI_COLOURS)}) )?"
    rf"(?:{'|'.join([*MINI_OBJECTS, *MINI_SYNONYMS])})"
    rf"|(?:nude|naked) (?:person|mannequin)|(?:person|mannequin) wearing (?:(?:{'|'.join(MINI_COLOURS)}) )?clothes)"
    r"(?: on a (?:light|dark) background)?"
)
MEDIUM = re.compile(r"(?:an? (?:close-up )?[a-z]+ of )?")
EVERY_PRESET = [*((name, None) for name in names()), ("nudity", "mini")]
MINI_PRESETS = [*MINI_OBJECTS, *MINI_STYLES, "nudity"]

TOML = """
kind = "object"
forget = ["a photo of a lamp", "a lamp"]
anchor = ["a photo of a candle", "a candle"]
retain = ["a photo of a sofa"]
judge = { type = "imagenet", index = 846 }
"""


def lamp(**changes) -> Concept:
    return replace(Concept("lamp", "object", ("a photo of a lamp", "a lamp"), ("a candle",), ("a sofa",)), **changes)


def write(tmp_path: Path, text: str, name: str = "lamp.toml") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def mentions(text: str, words: tuple[str, ...]) -> bool:
    return any(re.search(rf"\b{re.escape(word)}s?\b", text, re.IGNORECASE) for word in words)


def words_of(concept: Concept) -> tuple[str, ...]:
    return (concept.name, *concept.synonyms)


# --- Presets


def test_presets_are_nudity_the_imagenette_classes_artists_and_the_miniature_world():
    assert names() == sorted(["nudity", *IMAGENETTE, *ARTISTS, *MINI_OBJECTS, *MINI_STYLES])


@pytest.mark.parametrize(("name", "family"), EVERY_PRESET)
def test_every_preset_forgets_its_concept_and_neither_anchors_nor_retains_it(name, family):
    concept = load(name, model_family=family)
    words = words_of(concept)
    assert len(concept.anchor) == len(concept.forget) == len(set(concept.forget))
    assert all(mentions(prompt, words) for prompt in concept.forget)
    assert not [prompt for prompt in (*concept.anchor, *concept.retain, *concept.others) if mentions(prompt, words)]
    assert len(set(concept.retain)) == len(concept.retain) >= 50
    assert concept.others
    assert "type" in concept.judge


@pytest.mark.parametrize(("name", "family"), EVERY_PRESET)
def test_an_anchor_begins_as_its_forget_prompt_does_and_then_differs(name, family):
    """ "a drawing of a circle" becomes "a drawing of a square", not "a photo of a square"."""
    for forget, anchor in load(name, model_family=family).pairs():
        assert forget != anchor
        assert MEDIUM.match(forget)[0] == MEDIUM.match(anchor)[0]  # pyright: ignore[reportOptionalSubscript]


def test_a_preset_is_found_by_any_spelling_and_by_its_own_name():
    expected = load("french_horn")
    assert [load(text) for text in ("french horn", "French Horn", "FRENCH-HORN", " french  horn ")] == [expected] * 4
    assert all(load(load(name).name) == load(name) for name in names())


def test_presets_come_from_the_wheel_when_installed_and_else_from_the_repository(tmp_path, monkeypatch):
    (tmp_path / "erase" / "concepts").mkdir(parents=True)
    (tmp_path / "prompts").mkdir()
    write(tmp_path / "prompts", TOML)
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "erase" / "concepts" / "presets.py"))
    assert names() == ["lamp"]
    (tmp_path / "erase" / "_prompts").mkdir()
    write(tmp_path / "erase" / "_prompts", TOML, "desk_lamp.toml")
    assert names() == ["desk_lamp"]
    assert load("desk lamp").name == "desk lamp"


def test_nudity_begins_with_the_reference_pair_and_retains_clothed_people():
    concept = load("nudity")
    assert concept.kind == "nudity"
    assert concept.pairs()[0] == ("a photo of a nude person", "a photo of a person wearing clothes")
    assert "a photo of a person wearing clothes" in concept.retain
    assert concept.judge == {"type": "nudenet"}


def test_imagenette_classes_are_those_of_the_reference():
    """The fixed target is the next of the ten classes; the template is "an image of a ..."; indices are ImageNet's."""
    labels = [load(name).name for name in IMAGENETTE]
    for c, (name, index) in enumerate(IMAGENETTE.items()):
        concept = load(name)
        assert re.fullmatch(f"an image of an? {labels[c]}", concept.forget[0])
        assert re.fullmatch(f"an image of an? {labels[(c + 1) % 10]}", concept.anchor[0])
        assert concept.judge == {"type": "imagenet", "index": index}
        assert len(concept.others) == 9
        assert set(concept.others) <= set(concept.retain)
    assert "an image of an English springer" in load("tench").anchor


@pytest.mark.parametrize("name", MINI_PRESETS)
def test_the_miniature_world_knows_every_word_and_retains_every_style_in_every_colour(name):
    concept = load(name, model_family="mini")
    prompts = (*concept.forget, *concept.anchor, *concept.retain, *concept.others)
    assert [prompt for prompt in prompts if not MINI_GRAMMAR.fullmatch(prompt)] == []
    retained = " ".join(concept.retain)
    styles = [style for style in MINI_STYLES if style != name]
    assert [pair for pair in product(styles, MINI_COLOURS) if " ".join(pair) not in retained] == []
    objects = [thing for thing in MINI_OBJECTS if thing != name]
    assert [thing for thing in objects if thing not in retained] == []
    assert concept.judge["type"] == "mini"


def test_the_grammar_check_rejects_words_that_the_miniature_world_does_not_know():
    assert not MINI_GRAMMAR.fullmatch("a photo of a red dog")
    assert not [prompt for prompt in load("nudity").retain if "cat" in prompt and MINI_GRAMMAR.fullmatch(prompt)]


def test_a_family_table_replaces_the_keys_that_it_holds_for_that_family_only(tmp_path):
    path = write(
        tmp_path, TOML + '[mini]\nretain = ["a star"]\njudge = { type = "mini", head = "object", label = "star" }\n'
    )
    general, mini = load(path), load(path, model_family="mini")
    assert general.retain == ("a photo of a sofa",)
    assert mini == replace(general, retain=("a star",), judge={"type": "mini", "head": "object", "label": "star"})
    assert load(path, model_family="sd1") == general
    assert load("circle", model_family="mini") == load("circle")


def test_a_concept_says_its_pairs_and_repeats_a_single_anchor():
    assert lamp().pairs() == (("a photo of a lamp", "a candle"), ("a lamp", "a candle"))
    assert lamp(anchor=("x", "y")).pairs() == (("a photo of a lamp", "x"), ("a lamp", "y"))


# --- Fingerprints


def test_a_fingerprint_is_stable_under_reformatting_and_changes_with_any_content(tmp_path):
    original = load(write(tmp_path, TOML))
    reformatted = """
    # the same, laid out otherwise
    judge.index = 846
    judge.type = 'imagenet'
    retain = [ 'a photo of a sofa', ]
    anchor = [
      'a photo of a candle',
      'a candle', ]
    forget = ["a photo of a lamp",
              "a l\\u0061mp"]
    kind = 'object'
    """
    assert load(write(tmp_path, reformatted)).fingerprint() == original.fingerprint()
    changes = {
        "name": "light",
        "kind": "style",
        "forget": ("a lamp", "a photo of a lamp"),
        "anchor": ("a candle",),
        "retain": (),
        "others": ("a sofa",),
        "judge": {},
        "synonyms": ("lantern",),
    }
    assert changes.keys() == asdict(original).keys()
    prints = {replace(original, **{key: value}).fingerprint() for key, value in changes.items()}
    assert len(prints | {original.fingerprint()}) == len(changes) + 1


def test_lists_and_tuples_make_the_same_hashable_concept():
    same = Concept("lamp", "object", ["a photo of a lamp", "a lamp"], ["a candle"], ["a sofa"])  # pyright: ignore[reportArgumentType]
    assert same == lamp()
    assert hash(same) == hash(lamp())


# --- Free text and overrides


def test_a_described_object_is_anchored_to_a_concrete_thing_in_the_same_words():
    concept = describe("red bicycle", "object")
    assert concept.pairs()[0] == ("a photo of a red bicycle", "a photo of a potted plant")
    assert all("red bicycle" in prompt for prompt in concept.forget)
    assert not mentions(" ".join((*concept.anchor, *concept.retain, *concept.others)), ("bicycle",))
    assert len(concept.retain) >= 25
    assert concept.judge["target"] == "a photo of a red bicycle"
    assert "a photo of a bicycle against a wall" in describe("lamp", "object").retain


def test_a_described_object_is_never_its_own_anchor():
    assert "plant" not in " ".join(describe("potted plants", "object").anchor)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("apple", "an apple"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass", "an hourglass"),
        ("bus", "a bus"),
        ("fireworks", "fireworks"),
        ("Mickey Mouse", "Mickey Mouse"),
        ("the Eiffel Tower", "the Eiffel Tower"),
    ],
)
def test_a_described_object_gets_the_right_article(name, phrase):
    assert describe(name, "object").forget[0] == f"a photo of {phrase}"


def test_a_described_style_is_anchored_to_the_same_subject_without_a_style():
    concept = describe("Picasso", "style")
    assert all(forget == f"{anchor} in the style of Picasso" for forget, anchor in concept.pairs())
    assert "Picasso" not in " ".join((*concept.retain, *concept.others, *concept.judge["alternatives"]))
    assert any("Rembrandt" in prompt for prompt in concept.retain)
    assert any("Picasso" in prompt for prompt in describe("pixel art", "style").retain)


def test_an_override_replaces_what_it_names_and_leaves_the_rest():
    concept = override(lamp(), forget=["a lantern"], anchor=["a moon"])
    assert concept == lamp(forget=("a lantern",), anchor=("a moon",))
    assert override(lamp()) == lamp()
    assert override(lamp(), retain=[]).retain == ()


def test_a_described_person_becomes_a_person_and_other_people_are_retained():
    """People are no objects: the anchor is a person, in the same words, and others stay who they are (3.8)."""
    concept = describe("Albert Einstein", "person")
    assert concept.pairs()[0] == ("a photo of Albert Einstein", "a photo of a person")
    assert all("Albert Einstein" in prompt for prompt in concept.forget)
    assert not mentions(" ".join((*concept.anchor, *concept.retain, *concept.others)), ("Einstein",))
    assert any("Marie Curie" in prompt for prompt in concept.retain)
    assert concept.judge["target"] == "a photo of Albert Einstein"


def test_a_described_abstract_concept_becomes_a_peaceful_scene():
    """Violence stands nowhere as a thing does; as an object it is refused, since no plant is its neighbour (3.8)."""
    concept = describe("violence", "abstract")
    assert concept.pairs()[0] == ("a photo of violence", "a photo of a peaceful scene")
    assert not mentions(" ".join(concept.retain), ("violence",))
    assert "peace" not in " ".join(describe("peace", "abstract").anchor)
    for word in ("violence", "Hate", "war"):
        with pytest.raises(EraseError, match=f"'{word}' is no object that stands somewhere; use --kind abstract"):
            describe(word, "object")


@pytest.mark.parametrize(("name", "kind"), [("the violence", "object"), ("Violence", "person"), ("a War", "person")])
def test_an_abstract_word_is_neither_an_object_nor_a_person(name, kind):
    """With an article or without; the control is a name that holds such a word. (3.8)"""
    with pytest.raises(EraseError, match="use --kind abstract"):
        concepts.describe(name, kind)
    assert concepts.describe(f"{name} Smith", "person").kind == "person"


def test_a_persons_name_in_any_alphabet_is_noticed():
    """(3.8)"""
    for name in ("Albert Einstein", "Ólafur Arnalds", "Лев Толстой", "Jean-Luc Godard"):
        assert "--kind person" in concepts.advice(concepts.describe(name, "object")), name
    assert not concepts.advice(concepts.describe("golf ball", "object"))


def test_a_kind_never_replaces_a_preset():
    """`--concept nudity --kind object` would train "a photo of a nudity" towards a potted plant (3.8)."""
    for name in ("nudity", "Van Gogh", "french-horn"):
        with pytest.raises(
            EraseError, match=f"'{name}' is a preset of kind .*; leave out --kind, or describe your own"
        ):
            concepts.find(name, "object")
    with pytest.raises(EraseError, match="'circle' is a preset of kind object"):
        concepts.find("circle", "object", model_family="mini")
    assert concepts.find("circle", "object").forget[0] == "a photo of a circle"  # for other models it is free text


def test_a_concept_says_what_becomes_what_and_that_a_name_may_be_a_persons():
    assert concepts.mapping(lamp()) == "'a photo of a lamp' -> 'a candle' (and 1 more pair)"
    assert concepts.mapping(lamp(forget=("a lamp",))) == "'a lamp' -> 'a candle'"
    assert concepts.mapping(load("church")).endswith(" -> 'an image of a French horn' (and 7 more pairs)")
    assert concepts.advice(describe("Taylor Swift", "object")) == "if Taylor Swift is a person, use --kind person"
    assert concepts.advice(describe("Taylor Swift", "person")) == concepts.advice(describe("red car", "object")) == ""


# --- Names as file names


def test_a_plain_name_keeps_its_folder():
    assert [words.slug(name) for name in ("Van Gogh", "golf ball", "church and tench", "Dr. Who", "R2-D2")] == [
        "Van_Gogh",
        "golf_ball",
        "church_and_tench",
        "Dr._Who",
        "R2-D2",
    ]
    assert all(words.slug(load(name).name).lower() == name for name in names())


@pytest.mark.parametrize(
    "name",
    ["../../a/b", "AC/DC", "..", ".", "/etc/passwd", "a\\b", "x" * 300, "\N{BABY BOTTLE}", "~", "C:", "nul", "é" * 70]
    + ["a\x00b", "猫" * 60, "a\nb", "-rf"],
)
def test_a_name_is_one_file_below_its_folder_whatever_it_holds(name, tmp_path):
    """Never another folder, never empty, never too long for a file system (2.10)."""
    slug = words.slug(name)
    (tmp_path / slug).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [slug]
    assert slug.strip(".") and len(slug.encode()) <= 80


def test_long_and_unspeakable_names_stay_different():
    assert words.slug("x" * 300) != words.slug("x" * 301)
    assert words.slug("\N{BABY BOTTLE}") != words.slug("\N{SLICE OF PIZZA}")
    with pytest.raises(EraseError, match="a concept needs a name"):
        words.slug("  ")


def test_a_name_without_letters_cannot_be_described():
    """An emoji has no word that the anchor could be told from (4.10)."""
    for name in ("\N{BABY BOTTLE}", "!!", "..."):
        with pytest.raises(EraseError, match="a concept needs a name of letters or digits"):
            describe(name, "object")


# --- Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget": ()}, "concept 'lamp' has no forget prompt"),
        ({"forget": ("a lamp", " ")}, "has an empty forget prompt"),
        ({"anchor": ()}, "has 0 anchors for 2 forget prompts; give 1 for all, or 2"),
        ({"anchor": ("a", "b", "c")}, "has 3 anchors for 2 forget prompts"),
        ({"forget": ("a lamp",), "anchor": ("a", "b")}, "has 2 anchors for 1 forget prompt; give 1$"),
        ({"retain": ("a lamp",)}, "both forgets and retains 'a lamp'"),
        ({"kind": "thing"}, "has kind 'thing'; choose object, style, person, abstract or nudity"),
        ({"name": " "}, "a concept needs a name"),
        ({"forget": "a lamp"}, "'forget' must be a list of strings, not a string"),
        ({"retain": ("a", 3)}, "'retain' must be a list of strings, but holds a number: 3"),
        ({"judge": "nudenet"}, "'judge' must be a table, not a string"),
    ],
)
def test_a_concept_that_does_not_fit_together_is_one_clear_line(changes, message):
    with pytest.raises(EraseError, match=message) as caught:
        lamp(**changes)
    assert "\n" not in str(caught.value)


def test_an_override_that_does_not_fit_is_refused():
    with pytest.raises(EraseError, match="has 2 anchors for 1 forget prompt"):
        override(lamp(anchor=("a", "b")), forget=["a lantern"])
    with pytest.raises(EraseError, match="'anchor' must be a list of strings, not a string"):
        override(lamp(), anchor="a candle")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("retain =", "retian =", r"unknown key 'retian'; did you mean retain\? \(name, kind"),
        ("retain =", "zzz =", r"unknown key 'zzz'; \(name, kind"),
        ('["a photo of a sofa"]', '"a sofa"', "'retain' must be a list of strings, not a string"),
        ('["a photo of a sofa"]', "[1]", "'retain' must be a list of strings, but holds a number: 1"),
        ('"object"', "7", "has kind 7; choose"),
        ("{ type", "[] #", "'judge' must be a table, not a list"),
        ("index = 846", "index = 1979-05-27", "'judge.index' must be a list of strings, not a date"),
        ('kind = "object"', "", "'kind' is missing"),
        ("retain =", "mini =", "'mini' must be a table, not a list"),
        ("retain =", "[mini]\nretian =", r"unknown key 'retian' in \[mini\]; did you mean retain"),
        ("retain =", "[mini]\nkind =", r"unknown key 'kind' in \[mini\]"),
        ("retain =", "[mini]\nanchor = []\nretain =", "has 0 anchors for 2 forget prompts"),
        ("retain =", "retain", "is not valid TOML: .*line 5"),
        ('"imagenet"', '"imagnet"', "judge.type is 'imagnet'; choose imagenet, nudenet, mini, classes or clip"),
        ('"imagenet"', "5", "judge.type is 5; choose imagenet"),
        ("index = 846", 'index = "846"', "judge.index is '846'; a judge of type 'imagenet' needs a class index"),
        ("index = 846", "index = true", "judge.index is True; a judge of type 'imagenet' needs a class index"),
        ("index = 846", "index = 1000", "judge.index is 1000; ImageNet's classes have the indices 0 to 999"),
        ('{ type = "imagenet", index = 846 }', "{ index = 846 }", "judge.type is None; choose"),
        (
            '"imagenet", index = 846',
            '"clip", target = "a lamp"',
            "judge.alternatives is missing; a judge of type 'clip'",
        ),
        ('"imagenet", index = 846', '"clip", target = "x", alternatives = []', "judge.alternatives is \\[\\]"),
        ("retain =", "name = 3\nretain =", "'name' must be a string, not a number"),
        ("retain =", "synonyms = {}\nretain =", "'synonyms' must be a list of strings, not a table"),
        ("retain =", "forget = []\nretain =", "is not valid TOML: .*overwrite"),
        ("retain =", "x = " + "[" * 5000 + "\nretain =", "is not valid TOML"),
    ],
)
def test_a_mistake_in_a_toml_is_named_with_its_file(tmp_path, old, new, message):
    assert load(write(tmp_path, TOML)).name == "lamp"
    assert old in TOML
    path = write(tmp_path, TOML.replace(old, new))
    with pytest.raises(EraseError, match=message) as caught:
        load(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_lines_of_windows_are_read_over(tmp_path):
    """As Notepad saves a file (4.10)."""
    path = tmp_path / "lamp.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TOML.replace("\n", "\r\n").encode())
    assert load(str(path)) == load(write(tmp_path, TOML))


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.toml").mkdir()
    for name, message in {
        "bytes": "is not valid TOML",
        "folder": "cannot read .*folder",
        "nothing": "nothing.toml: no such file",
    }.items():
        with pytest.raises(EraseError, match=message):
            load(str(tmp_path / f"{name}.toml"))


def test_an_unknown_name_is_answered_with_the_nearest_presets():
    with pytest.raises(EraseError, match=r"unknown concept 'cirle'; did you mean circle\? or describe your own with"):
        load("cirle")
    with pytest.raises(EraseError, match=r"did you mean claude_monet\?"):
        load("Monet")
    with pytest.raises(
        EraseError,
        match="the presets are andy_warhol, .*; or describe your own with --kind object, style, person or abstract",
    ):
        load("zzzzzz")


def test_nudity_cannot_be_described():
    with pytest.raises(EraseError, match="cannot describe a concept of kind 'nudity'; choose object, style, person or"):
        describe("nudity", "nudity")  # pyright: ignore[reportArgumentType]
    with pytest.raises(EraseError, match="a concept needs a name"):
        describe("  ", "object")


# --- Refusal

INVOLVES_MINORS = [
    *"child children child's kid Kids boy GIRL girls teen teens teenager toddler baby babies infant newborn".split(),
    *"minor minors underage under-age under_aged schoolgirl school-girl preteen pre-teen tween loli shota".split(),
    *"adolescent juvenile stepchild kindergartner lolicon babygirl girl2 csam".split(),
    *("12 year old", "12-year-old", "a 12yo person", "7 y/o", "twelve years old", "Seventeen-Year-Old", "3 yr old"),
    *("aged 15", "age 9", "at the age of 16", "under 18", "10 months old", "below the age of eighteen"),
    *(
        "high schooler",
        "young girl",
        "a  boy, outdoors",
        "ｇｉｒｌ",
        "１２ year old",
        "gi\u00adrl",
        "chi\u200bld",
        "gírl",
    ),
    "\N{GIRL}",
]
HARMLESS = [
    *"kidney boycott girlande girlfriend cowboy babylon infantry minority teensy cartoon lolipop kidnap".split(),
    *("minor chord", "in A minor key", "Ursa Minor", "Asa Gray", "112 year old oak", "18 year old whisky", "aged 50"),
    *("Playboy", "babysitter's chair", "an old man", "a 21-year-old car", "stage 3", "page 12", "Childwall"),
]


def test_a_target_that_involves_minors_is_refused_however_it_is_written():
    for text in INVOLVES_MINORS:
        for name, forget in ((text, "a lamp"), ("lamp", f"a photo of a {text}, outdoors")):
            with pytest.raises(EraseError, match=REFUSAL):
                pytest.fail(f"accepted {text!r}: {lamp(name=name, forget=(forget,))}")


@pytest.mark.parametrize("text", ["schoolgirl", "12-year-old"])
def test_a_target_that_involves_minors_is_refused_on_every_path(tmp_path, text):
    attempts = [
        lambda: lamp(name=text),
        lambda: lamp(forget=("a lamp", f"a photo of a {text}")),
        lambda: lamp(anchor=(f"a photo of a {text}",)),
        lambda: lamp(synonyms=(text,)),
        lambda: lamp(judge={"type": "clip", "target": text, "alternatives": ["a sofa"]}),
        lambda: lamp(judge={"type": "clip", "target": "a lamp", "alternatives": [text]}),
        lambda: load(text),
        lambda: describe(text, "object"),
        lambda: describe(f"photos of {text}", "style"),
        lambda: override(lamp(), forget=[text]),
        lambda: override(lamp(), anchor=[text]),
        lambda: override(load("nudity"), retain=[f"a {text} in clothes"]),
        lambda: load(write(tmp_path, TOML.replace("a photo of a lamp", text))),
        lambda: load(write(tmp_path, TOML.replace("a candle", text))),
        lambda: load(write(tmp_path, f'name = "{text}"\n{TOML}')),
        lambda: load(write(tmp_path, f'synonyms = ["{text}"]\n{TOML}')),
        lambda: load(write(tmp_path, f'{TOML}[mini]\nforget = ["{text}", "a lamp"]\n')),
    ]
    for attempt in attempts:
        with pytest.raises(EraseError, match=REFUSAL):
            attempt()


def test_the_name_of_a_file_is_a_target_too(tmp_path):
    with pytest.raises(EraseError, match=REFUSAL):
        load(write(tmp_path, TOML, "school_girl.toml"))


def test_words_that_merely_contain_such_a_word_are_accepted():
    for text in HARMLESS:
        assert text in lamp(name=text, forget=(text,)).forget
        assert text in describe(text, "object").forget[0]


def test_retained_prompts_may_be_harmless_images_but_not_beside_nudity():
    retain = ("a baby elephant",)
    assert lamp(retain=retain).retain == retain
    assert override(lamp(), retain=retain).retain == retain
    for part in ("retain", "others"):
        with pytest.raises(EraseError, match=rf"{REFUSAL} \('baby' in {part}\)"):
            lamp(kind="nudity", **{part: retain})
        with pytest.raises(EraseError, match=REFUSAL):
            lamp(forget=("a nude person",), **{part: retain})
    with pytest.raises(EraseError, match=REFUSAL):
        lamp(retain=("a naked person", "a baby elephant"))


def test_beside_nudity_the_merely_young_are_refused_too():
    assert describe("young tree", "object").name == "young tree"
    assert lamp(retain=("a daughter and a son",))
    with pytest.raises(EraseError, match=REFUSAL):
        describe("naked young person", "object")
    with pytest.raises(EraseError, match=REFUSAL):
        override(load("nudity"), retain=["a youth in clothes"])


def test_a_file_says_which_word_was_refused_and_where(tmp_path):
    path = write(tmp_path, TOML.replace("a candle", "a toddler"))
    with pytest.raises(EraseError, match=rf"lamp.toml: {REFUSAL} \('toddler' in anchor\)"):
        load(path)


# --- Weight


def test_concepts_load_without_torch_diffusers_or_numpy():
    code = (
        "import sys, erase.concepts as c; c.load('nudity'); c.describe('lamp', 'object');"
        "print(*sorted({'torch', 'diffusers', 'transformers', 'numpy', 'erase.concepts.concept'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["erase.concepts.concept"]
