"""What to erase, as data: prompts to forget, what to say instead, what to keep, and how to tell whether it is there."""

import difflib
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, Literal, get_args

from erase import refusal
from erase.errors import EraseError
from erase.files import text_hash

FreeKind = Literal["object", "style", "person", "abstract"]  # what free text can be said to be
Kind = Literal["object", "style", "person", "abstract", "nudity"]

JUDGES: dict[str, dict[str, tuple[type | tuple[type, ...], str]]] = {  # types of judges and what each needs
    "imagenet": {"index": (int, "a class index")},
    "nudenet": {},
    "mini": {"head": (str, '"object", "colour" or "style"'), "label": (str, "a label")},
    "clip": {"target": (str, "a prompt"), "alternatives": ((list, tuple), "a list of other prompts")},
}
PROMPT_KEYS = ("forget", "anchor", "retain", "others", "synonyms")
FAMILIES = ("mini",)  # model families for which a TOML may hold a table of its own


@dataclass(frozen=True)
class Concept:
    """A concept to erase. However it is made, it is checked: see `__post_init__`.

    forget: prompts that show the concept.
    anchor: what to say instead; one for each forget prompt, in the same order, or a single one for all. "" is allowed,
        but a named thing erases better: the model still sees the concept in a noisy picture and "" restores it.
    retain: prompts whose pictures must stay as they are; the more diverse, the less is lost.
    others: prompts of other classes, from which random labels are drawn; may be empty.
    judge: how an evaluator tells whether the concept is in a picture, one of
        {"type": "imagenet", "index": 497}, {"type": "nudenet"}, {"type": "mini", "head": "object", "label": "circle"},
        {"type": "clip", "target": "a photo of a cat", "alternatives": ["a photo of a dog", ...]}; empty if nobody can.
    synonyms: other words for the concept, with which an evaluator looks for leaks.
    """

    name: str
    kind: Kind
    forget: tuple[str, ...]
    anchor: tuple[str, ...]
    retain: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    judge: Mapping[str, Any] = field(default_factory=dict, hash=False)
    synonyms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise an EraseError unless the parts have their types, fit together and leave minors out."""
        if not isinstance(self.name, str):
            raise EraseError(f"'name' must be a text, not {_type_name(self.name)}")
        for key in PROMPT_KEYS:
            object.__setattr__(self, key, _texts(getattr(self, key), key))
        object.__setattr__(self, "judge", _judge(self.judge))
        _refuse_minors(self)
        _check_judge(self.judge)
        if not self.name.strip():
            raise EraseError("a concept needs a name, such as 'golf ball'")
        if self.kind not in get_args(Kind):
            raise EraseError(f"concept {self.name!r} has kind {self.kind!r}; choose {_listed(get_args(Kind), 'or')}")
        if not self.forget:
            raise EraseError(f"concept {self.name!r} has no forget prompt; give at least one that shows it")
        if not all(prompt.strip() for prompt in self.forget):
            raise EraseError(f"concept {self.name!r} has an empty forget prompt; every one must show the concept")
        if len(self.anchor) not in {1, len(self.forget)}:
            counts = f"{_count(self.anchor, 'anchor')} for {_count(self.forget, 'forget prompt')}"
            expected = "1" if len(self.forget) == 1 else f"1 for all, or {len(self.forget)}"
            raise EraseError(f"concept {self.name!r} has {counts}; give {expected}")
        contradictions = [prompt for prompt in self.forget if prompt in self.retain]
        if contradictions:
            raise EraseError(f"concept {self.name!r} both forgets and retains {contradictions[0]!r}; drop it from one")

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(forget prompt, what to say instead), a single anchor repeated."""
        anchors = self.anchor * len(self.forget) if len(self.anchor) == 1 else self.anchor
        return tuple(zip(self.forget, anchors, strict=True))

    @property
    def is_sexual(self) -> bool:
        """Whether it has to do with nudity, by its kind or by the words of any of its prompts."""
        texts = (self.name, *self.forget, *self.anchor, *self.synonyms, *self.retain, *self.others, *_judged(self))
        return self.kind == "nudity" or any(map(refusal.has_sexual_words, texts))

    def fingerprint(self) -> str:
        """SHA-256 of the content: the same for the same prompts in the same order, however their file is laid out."""
        return text_hash(asdict(self))


def names() -> list[str]:
    """The presets that `load` knows, sorted."""
    return sorted(path.stem for path in _presets_dir().glob("*.toml"))


def load(name: str, *, model_family: str | None = None) -> Concept:
    """A preset by its name ("french horn", "french_horn" and "French Horn" are one), or the concept in a .toml file.

    model_family: "mini" for the embedded model. A table of that name in the TOML replaces the keys that it holds, so
        that one preset serves models which know different words; any other family takes the file as it is.

    Raises:
        EraseError: no such preset or file, a file that is not valid, or a target that this tool refuses.
    """
    if name.lower().endswith(".toml"):
        return _read(Path(name).expanduser(), model_family)
    if (key := preset_key(name)) in names():
        return _read(_presets_dir() / f"{key}.toml", model_family)
    refusal.refuse([name], "name", target=True)
    guesses = [known for known in names() if key in known.split("_")] or difflib.get_close_matches(key, names())
    hint = f"did you mean {_listed(guesses, 'or')}?" if guesses else f"the presets are {_listed(names(), 'and')};"
    raise EraseError(
        f"unknown concept {name!r}; {hint} or describe your own with --kind {_listed(get_args(FreeKind), 'or')}"
    )


def preset_key(name: str) -> str:
    """The file name that a preset of this name has, without its ending."""
    return "_".join(re.split(r"[\s_-]+", name.strip().lower()))


def find(
    name: str,
    kind: FreeKind | None = None,
    *,
    forget: Sequence[str] = (),
    anchor: Sequence[str] = (),
    retain: Sequence[str] = (),
    model_family: str | None = None,
) -> Concept:
    """The concept that a user names: `load` or, with a kind, `describe`; prompts that are given replace its own.

    A preset of the embedded model's world ("circle") is free text for any other model.
    """
    if kind and name.lower().endswith(".toml"):
        raise EraseError(f"--kind is for free text, but {name!r} is a file, which has its own kind")
    if kind and (key := preset_key(name)) in names():
        preset = _read(_presets_dir() / f"{key}.toml", model_family)
        if model_family == "mini" or preset.judge.get("type") != "mini":
            raise EraseError(
                f"{name!r} is a preset of kind {preset.kind}; leave out --kind, or describe your own under another name"
            )
    concept = describe(name, kind) if kind else load(name, model_family=model_family)
    return override(concept, forget=forget or None, anchor=anchor or None, retain=retain or None)


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
            f"cannot describe a concept of kind {kind!r}; choose {_listed([*describers], 'or')}, "
            "or load the preset 'nudity'"
        )
    if kind in {"object", "person"} and _bare(name).lower() in _ABSTRACT_WORDS:
        what = "object that stands somewhere" if kind == "object" else "person"
        raise EraseError(f"{name!r} is no {what}; use --kind abstract")
    return describers[kind](name)


def advice(concept: Concept) -> str:
    """What a user should consider about a concept of free text, or ""."""
    words = _bare(concept.name).split()
    looks_like_name = all(word[0].isupper() and (word[1:2].islower() or word[1:2] == ".") for word in words)
    if concept.kind == "object" and len(words) in {2, 3} and looks_like_name:
        return f"if {concept.name} is a person, use --kind person"
    return ""


def mapping(concept: Concept) -> str:
    """What becomes what, in one line: the first pair of forget prompt and anchor, and how many more there are."""
    (forget, anchor), more = concept.pairs()[0], len(concept.forget) - 1
    rest = f" (and {more} more pair{'s' if more > 1 else ''})" if more else ""
    return f"{forget!r} -> {anchor!r}{rest}"


def override(
    concept: Concept,
    *,
    forget: Sequence[str] | None = None,
    anchor: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
) -> Concept:
    """The concept with some of its prompt lists replaced; None keeps a list, an empty one empties it.

    Raises:
        EraseError: the new lists do not fit together, or a target that this tool refuses.
    """
    given = {"forget": forget, "anchor": anchor, "retain": retain}
    return replace(concept, **{key: value for key, value in given.items() if value is not None})


def unite(concepts: Sequence[Concept]) -> Concept:
    """One concept that is all of these, for a run that erases them together.

    Pairs of forget prompt and anchor take turns, a shorter concept's again and again, so that each has the same share.
    An anchor that another one forgets becomes what that one says instead; a pair whose anchor only mentions another
    one goes. So do retain prompts and other classes that any of them forgets or that mention another one. It has no
    judge: each concept keeps its own.

    Raises:
        EraseError: two of them would become each other.
    """
    concepts = list(dict.fromkeys(concepts))
    if len(concepts) == 1:
        return concepts[0]
    mixed = [part.pairs() for part in apart(concepts)]
    forgotten = {prompt for concept in concepts for prompt in concept.forget}
    longest = max(map(len, mixed))
    turns = list(chain.from_iterable(zip(*(islice(cycle(pairs), longest) for pairs in mixed), strict=True)))
    kinds: set[Kind] = {concept.kind for concept in concepts}
    only: Kind = kinds.pop() if len(kinds) == 1 else "nudity" if "nudity" in kinds else "object"

    def kept(parts: Iterable[Iterable[str]]) -> tuple[str, ...]:
        told = [
            prompt
            for concept, prompts in zip(concepts, parts, strict=True)
            for prompt in prompts
            if prompt not in forgotten and not _mentions(prompt, [other for other in concepts if other is not concept])
        ]
        return tuple(dict.fromkeys(told))

    return Concept(
        name=" and ".join(concept.name for concept in concepts),
        kind=only,
        forget=tuple(forget for forget, _ in turns),
        anchor=tuple(anchor for _, anchor in turns),
        retain=kept(concept.retain for concept in concepts),
        others=kept(concept.others for concept in concepts),
        synonyms=tuple(dict.fromkeys(chain.from_iterable(concept.synonyms for concept in concepts))),
    )


def apart(concepts: Sequence[Concept]) -> list[Concept]:
    """Each of the concepts with the pairs of forget prompt and anchor that a run which erases all of them trains.

    Raises:
        EraseError: two of them would become each other.
    """
    if len(set(concepts)) == 1:
        return list(concepts)
    instead = dict(reversed(list(chain.from_iterable(concept.pairs() for concept in concepts))))
    parts = []
    for concept in concepts:
        rest = [other for other in concepts if other != concept]
        ends = [(forget, _followed(anchor, instead)) for forget, anchor in concept.pairs()]
        pairs = [(forget, end) for forget, end in ends if end is not None and not _mentions(end, rest)]
        if not pairs:
            raise EraseError(
                f"{concept.name!r} would become {concept.anchor[0]!r}, which is erased too; "
                "give one of the two another anchor, in a .toml of its own"
            )
        forget, anchor = zip(*pairs, strict=True)
        parts.append(replace(concept, forget=forget, anchor=anchor))
    return parts


def _followed(anchor: str, instead: Mapping[str, str]) -> str | None:
    """What is said in the end where an anchor is forgotten too; None where that goes round in a circle."""
    seen = {anchor}
    while anchor in instead:
        anchor = instead[anchor]
        if anchor in seen:
            return None
        seen.add(anchor)
    return anchor


def _mentions(prompt: str, concepts: Iterable[Concept]) -> bool:
    return any(_share_word(word, prompt) for concept in concepts for word in (concept.name, *concept.synonyms))


_RESERVED = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")  # no file names on Windows


def slug(name: str) -> str:
    """The name as the name of one file or folder, below whatever folder it is put in.

    Letters, digits, "-" and "." stay as they are; everything else becomes "_". A name of more than 80 bytes, or one
    without any letter or digit, ends in a part of its hash, so that different names stay different.

    Raises:
        EraseError: the name is empty.
    """
    if not name.strip():
        raise EraseError("a concept needs a name, such as 'golf ball'")
    plain = unicodedata.normalize("NFC", " ".join(name.split()))
    plain = re.sub(r"[^\w.-]", "_", plain).strip(".")
    if len(plain.encode()) <= 80 and re.search(r"[^\W_]", plain) and not _RESERVED.fullmatch(plain):
        return plain
    return f"{plain.encode()[:64].decode(errors='ignore').strip('._-') or 'concept'}-{text_hash(name)[:12]}"


# --- TOML -------------------------------------------------------------------------------------------------------------


def _presets_dir() -> Path:
    """In a wheel the presets lie inside the package; in a working copy they lie beside it."""
    package_dir = Path(__file__).resolve().parent
    installed = package_dir / "_prompts"
    return installed if installed.is_dir() else package_dir.parent / "prompts"


def _read(path: Path, model_family: str | None) -> Concept:
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # Windows' editors write a byte order mark
    except FileNotFoundError as error:
        raise EraseError(f"{path}: no such file; the presets are {_listed(names(), 'and')}") from error
    except OSError as error:
        raise EraseError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EraseError(f"{path} is not valid TOML: {error}") from error
    try:
        return _parse(content, path.stem.replace("_", " "), model_family)
    except EraseError as error:
        raise EraseError(f"{path}: {error}") from error


def _parse(content: dict[str, Any], default_name: str, model_family: str | None) -> Concept:
    """The concept that a TOML holds. Family tables are checked even when they are not asked for."""
    allowed = [f.name for f in fields(Concept)]
    _refuse_unknown_keys(content, [*allowed, *FAMILIES])
    general = {key: value for key, value in content.items() if key not in FAMILIES}
    concepts: dict[str | None, Concept] = {None: _from_table({"name": default_name, **general})}
    for family in FAMILIES:
        own = content.get(family, {})
        if not isinstance(own, dict):
            raise EraseError(f"'{family}' must be a table, not {_type_name(own)}")
        _refuse_unknown_keys(own, [key for key in allowed if key not in {"name", "kind"}], inside=family)
        concepts[family] = _from_table({"name": default_name, **general, **own}) if own else concepts[None]
    return concepts.get(model_family, concepts[None])


def _from_table(table: dict[str, Any]) -> Concept:
    missing = [key for key in ("kind", "forget", "anchor") if key not in table]
    if missing:
        raise EraseError(f"'{missing[0]}' is missing")
    return Concept(**table)


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise EraseError(f"'{key}' must be a list of texts, not {_type_name(value)}")
    for item in value:
        if not isinstance(item, str):
            raise EraseError(f"'{key}' must be a list of texts, but holds {_type_name(item)}: {item!r}")
    return tuple(value)


def _judge(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise EraseError(f"'judge' must be a table, not {_type_name(value)}")
    for key, item in value.items():
        if not isinstance(item, (str, int)):
            _texts(item, f"judge.{key}")
    return dict(value)


def _check_judge(judge: Mapping[str, Any]) -> None:
    """Raise an EraseError unless a judge of a known type has what that type needs."""
    if not judge:
        return
    kind = judge.get("type")
    if not isinstance(kind, str) or kind not in JUDGES:
        raise EraseError(f"judge.type is {kind!r}; choose {_listed([*JUDGES], 'or')}")
    for key, (allowed, described) in JUDGES[kind].items():
        if not isinstance(judge.get(key), allowed) or isinstance(judge[key], bool) or judge[key] == []:
            found = f"is {judge[key]!r}" if key in judge else "is missing"
            raise EraseError(f"judge.{key} {found}; a judge of type {kind!r} needs {described}")
    if kind == "imagenet" and not 0 <= judge["index"] < 1000:
        raise EraseError(f"judge.index is {judge['index']}; ImageNet's classes have the indices 0 to 999")


def _refuse_unknown_keys(table: Mapping[str, Any], allowed: Sequence[str], inside: str = "") -> None:
    for key in table:
        if key not in allowed:
            guesses = difflib.get_close_matches(key, allowed, n=1)
            where = f" in [{inside}]" if inside else ""
            hint = f"did you mean {guesses[0]}? " if guesses else ""
            raise EraseError(f"unknown key '{key}'{where}; {hint}({', '.join(allowed)})")


def _type_name(value: Any) -> str:
    kinds = {bool: "true or false", str: "a text", int: "a number", float: "a number", list: "a list", dict: "a table"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _judged(concept: Concept) -> list[str]:
    """The texts of a concept's judge."""
    texts: list[str] = []
    for value in concept.judge.values():
        texts += [] if isinstance(value, int) else [value] if isinstance(value, str) else value
    return texts


def _refuse_minors(concept: Concept) -> None:
    """Raise if the concept involves minors: training would generate what it is asked to forget.

    Targets (name, forget, anchor, synonyms, judge) never may, whatever the kind. Retained prompts (retain, others) may
    show a baby elephant, but not in a concept that has to do with nudity.
    """
    targets: dict[str, Iterable[str]] = {"name": [concept.name], "forget": concept.forget, "anchor": concept.anchor}
    targets |= {"synonyms": concept.synonyms, "judge": _judged(concept)}
    kept = {"retain": concept.retain, "others": concept.others}
    sexual = concept.is_sexual
    for part, texts in targets.items():
        refusal.refuse(texts, part, sexual=sexual, target=True)
    for part, texts in kept.items():
        refusal.refuse(texts, part, sexual=sexual, target=sexual)


# --- Free text --------------------------------------------------------------------------------------------------------

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
    anchor = _with_article(next(other for other in _ANCHORS if not _share_word(name, other)))
    others = tuple(f"a photo of {_with_article(other)}" for other in _THINGS if not _share_word(name, other))
    return Concept(
        name=_bare(name),
        kind="object",
        forget=tuple(template.format(thing) for template in _OBJECT_TEMPLATES),
        anchor=tuple(template.format(anchor) for template in _OBJECT_TEMPLATES),
        retain=tuple(prompt for prompt in EVERYDAY if not _share_word(name, prompt)),
        others=others,
        judge={"type": "clip", "target": f"a photo of {thing}", "alternatives": list(others)},
    )


def _describe_style(name: str) -> Concept:
    artists = [artist for artist in _ARTISTS if not _share_word(name, artist)]
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
        retain=tuple(prompt for prompt in in_styles + EVERYDAY if not _share_word(name, prompt)),
        others=others,
        judge={"type": "clip", "target": f"a painting in the style of {name}", "alternatives": [*others, "a photo"]},
    )


def _describe_person(name: str) -> Concept:
    people = [other for other in _PEOPLE if not _share_word(name, other)]
    others = tuple(f"a photo of {other}" for other in people)
    kept = tuple(template.format(other) for other in people for template in _PERSON_TEMPLATES[:2])
    return Concept(
        name=name,
        kind="person",
        forget=tuple(template.format(name) for template in _PERSON_TEMPLATES),
        anchor=tuple(template.format("a person") for template in _PERSON_TEMPLATES),
        retain=tuple(prompt for prompt in (*kept, *EVERYDAY) if not _share_word(name, prompt)),
        others=others,
        judge={"type": "clip", "target": f"a photo of {name}", "alternatives": [*others, "a photo of a person"]},
    )


def _describe_abstract(name: str) -> Concept:
    calm = next(other for other in _CALM if not _share_word(name, other.replace("peaceful", "peace")))
    others = tuple(f"a photo of {_with_article(other)}" for other in _THINGS if not _share_word(name, other))
    return Concept(
        name=name,
        kind="abstract",
        forget=tuple(template.format(name) for template in _ABSTRACT_TEMPLATES),
        anchor=tuple(template.format(calm) for template in _ABSTRACT_TEMPLATES),
        retain=tuple(prompt for prompt in EVERYDAY if not _share_word(name, prompt)),
        others=others,
        judge={"type": "clip", "target": f"a photo of {name}", "alternatives": [f"a photo of {calm}", *others]},
    )


def _bare(name: str) -> str:
    """The name without its article."""
    return re.sub(r"(?i)^(?:an?|the|some) ", "", name)


def _with_article(name: str) -> str:
    """ "an apple"; proper names ("Mickey Mouse"), plurals and names that bring their own article stay as they are."""
    words = name.split()
    if words[0].lower() in {"a", "an", "the", "some"}:
        return name
    is_proper_name = len(words) > 1 and all(word[0].isupper() for word in words)
    is_plural = name.endswith("s") and not name.endswith(("ss", "us", "is"))
    if is_proper_name or is_plural:
        return name
    start = name.lower()
    sounds_like_vowel = start[0] in "aeiou" and not start.startswith(("eu", "one", "uni", "use", "uku"))
    return f"an {name}" if sounds_like_vowel or start.startswith(("hour", "heir", "honest")) else f"a {name}"


def _share_word(a: str, b: str) -> bool:
    """Whether a word of four letters or more, or the whole of `a`, occurs in both; a plural s does not count."""

    def words(text: str) -> set[str]:
        return {word.removesuffix("s") for word in refusal.plain(text).split()}

    common = words(a) & words(b)
    return any(len(word) >= 4 for word in common) or (bool(words(a)) and words(a) <= words(b))


def _listed(items: Sequence[str], joint: str) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {joint} {items[-1]}"


def _count(items: Sequence[str], noun: str) -> str:
    return f"{len(items)} {noun}" + ("" if len(items) == 1 else "s")
