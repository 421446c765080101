"""Concepts as data: forget prompts, their anchors, retain prompts, and how a judge recognises the concept."""
# pyright: strict

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, cycle, islice
from typing import Any, Literal, cast, get_args

from erase.concepts import refusal
from erase.errors import EraseError
from erase.files import text_hash
from erase.words import counted, listed

FreeKind = Literal["object", "style", "person", "abstract"]  # kinds of free-text concepts
Kind = Literal["object", "style", "person", "abstract", "nudity"]
JUDGES: dict[str, dict[str, tuple[type | tuple[type, ...], str]]] = {  # types of judges and what each needs
    "imagenet": {"index": (int, "a class index")},
    "nudenet": {},
    "mini": {"head": (str, '"object", "colour" or "style"'), "label": (str, "a label")},
    "classes": {"label": (str, "a class")},
    "clip": {"target": (str, "a prompt"), "alternatives": ((list, tuple), "a list of other prompts")},
}
PROMPT_KEYS = ("forget", "anchor", "retain", "others", "synonyms")


@dataclass(frozen=True)
class Concept:
    """A concept to erase. However it is made, it is checked: see `__post_init__`.

    forget: prompts that show the concept.
    anchor: prompts that replace the forget prompts: one for each, in the same order, or one for all. "" is allowed,
        but a named thing erases better: the model still sees the concept in a noisy image and "" restores it.
    retain: prompts whose images must stay as they are; the more diverse, the less is lost.
    others: prompts of other classes, from which random labels are drawn; may be empty.
    judge: how an evaluator tells whether the concept is in an image, one of
        {"type": "imagenet", "index": 497}, {"type": "nudenet"}, {"type": "mini", "head": "object", "label": "circle"},
        {"type": "classes", "label": "airplane"} for a class-conditional model,
        {"type": "clip", "target": "a photo of a cat", "alternatives": ["a photo of a dog", ...]}; empty if there is no
    such judge. synonyms: other words for the concept, with which an evaluator looks for leaks.
    """

    name: str
    kind: Kind
    forget: tuple[str, ...]
    anchor: tuple[str, ...]
    retain: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    judge: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    synonyms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise an EraseError unless the parts have their types, fit together and leave minors out."""
        if not isinstance(self.name, str):  # pyright: ignore[reportUnnecessaryIsInstance] - users give anything
            raise EraseError(f"'name' must be a string, not {type_name(self.name)}")
        for key in PROMPT_KEYS:
            object.__setattr__(self, key, texts(getattr(self, key), key))
        object.__setattr__(self, "judge", read_judge(self.judge))
        _refuse_minors(self)
        _check_judge(self.judge)
        if not self.name.strip():
            raise EraseError("a concept needs a name, such as 'golf ball'")
        if self.kind not in get_args(Kind):
            raise EraseError(f"concept {self.name!r} has kind {self.kind!r}; choose {listed(get_args(Kind), 'or')}")
        if not self.forget:
            raise EraseError(f"concept {self.name!r} has no forget prompt; give at least one that shows it")
        if not all(prompt.strip() for prompt in self.forget):
            raise EraseError(f"concept {self.name!r} has an empty forget prompt; every one must show the concept")
        if len(self.anchor) not in {1, len(self.forget)}:
            counts = f"{counted(self.anchor, 'anchor')} for {counted(self.forget, 'forget prompt')}"
            expected = "1" if len(self.forget) == 1 else f"1 for all, or {len(self.forget)}"
            raise EraseError(f"concept {self.name!r} has {counts}; give {expected}")
        contradictions = [prompt for prompt in self.forget if prompt in self.retain]
        if contradictions:
            raise EraseError(f"concept {self.name!r} both forgets and retains {contradictions[0]!r}; drop it from one")

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of forget prompt and anchor; a single anchor is repeated."""
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


def advice(concept: Concept) -> str:
    """What a user should consider about a concept of free text, or ""."""
    words = bare(concept.name).split()
    looks_like_name = all(word[0].isupper() and (word[1:2].islower() or word[1:2] == ".") for word in words)
    if concept.kind == "object" and len(words) in {2, 3} and looks_like_name:
        return f"if {concept.name} is a person, use --kind person"
    return ""


def mapping(concept: Concept) -> str:
    """One line for the user: the first pair of forget prompt and anchor, and how many more there are."""
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
    parts: list[Concept] = []
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
    return any(share_word(word, prompt) for concept in concepts for word in (concept.name, *concept.synonyms))


def texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise EraseError(f"'{key}' must be a list of strings, not {type_name(value)}")
    found: list[str] = []
    for item in cast(Sequence[Any], value):
        if not isinstance(item, str):
            raise EraseError(f"'{key}' must be a list of strings, but holds {type_name(item)}: {item!r}")
        found.append(item)
    return tuple(found)


def read_judge(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise EraseError(f"'judge' must be a table, not {type_name(value)}")
    judge = dict(cast(Mapping[str, Any], value))
    for key, item in judge.items():
        if not isinstance(item, (str, int)):
            texts(item, f"judge.{key}")
    return judge


def _check_judge(judge: Mapping[str, Any]) -> None:
    """Raise an EraseError unless a judge of a known type has what that type needs."""
    if not judge:
        return
    kind = judge.get("type")
    if not isinstance(kind, str) or kind not in JUDGES:
        raise EraseError(f"judge.type is {kind!r}; choose {listed([*JUDGES], 'or')}")
    for key, (allowed, described) in JUDGES[kind].items():
        if not isinstance(judge.get(key), allowed) or isinstance(judge[key], bool) or judge[key] == []:
            found = f"is {judge[key]!r}" if key in judge else "is missing"
            raise EraseError(f"judge.{key} {found}; a judge of type {kind!r} needs {described}")
    if kind == "imagenet" and not 0 <= judge["index"] < 1000:
        raise EraseError(f"judge.index is {judge['index']}; ImageNet's classes have the indices 0 to 999")


def type_name(value: Any) -> str:
    kinds: dict[type[Any], str] = {
        bool: "true or false",
        str: "a string",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "a table",
    }
    kind = cast(type[Any], type(value))
    return kinds.get(kind, f"a {kind.__name__}")


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


def bare(name: str) -> str:
    """The name without its article."""
    return re.sub(r"(?i)^(?:an?|the|some) ", "", name)


def share_word(a: str, b: str) -> bool:
    """Whether a word of four letters or more, or the whole of `a`, occurs in both; a plural s does not count."""

    def words(text: str) -> set[str]:
        return {word.removesuffix("s") for word in refusal.plain(text).split()}

    common = words(a) & words(b)
    return any(len(word) >= 4 for word in common) or (bool(words(a)) and words(a) <= words(b))
