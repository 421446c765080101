"""The embedded world: the concept, its synonyms and every other object."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from erase.concepts import Concept
from erase.evaluation.options import Options
from erase.evaluation.plan import Column, Group, Lines, Plan, lines_of, present
from erase.evaluation.tasks.protocol import Sample, SampleSet, Task, seed_of, where
from erase.words import article

if TYPE_CHECKING:
    from erase.mini.quality import Wish

NONE = "none"  # what the embedded judge says of an image that shows nothing of its world
NUM_FORGET, NUM_SYNONYM, NUM_RETAIN = 100, 40, 16  # NUM_RETAIN for every other object


class MiniWorld(Task):
    """Forget, synonym and retain prompts in the embedded world's language, named by its judge."""

    about = "the embedded model's world: concept, synonyms and all other objects, by the embedded judge"
    judges = ("mini", "thumbnails")
    concept_judges = ("mini",)
    version = 2  # 2: a person is asked for by 24 prompts and more instead of 4
    limits = ("The embedded model is a toy: this says nothing about Stable Diffusion.",)

    def build(self, concept: Concept | None, options: Options) -> SampleSet:
        """Forget, synonym and retain prompts in the embedded world's language, over all colours and styles.

        num_images: forget images; the other numbers keep their proportion to it.
        """
        from erase.mini import quality, world

        assert concept is not None  # concept_judges
        head, target = str(concept.judge["head"]), str(concept.judge["label"])
        scale = (options.num_images or NUM_FORGET) / NUM_FORGET
        num_forget, num_synonym, num_retain = (max(1, round(n * scale)) for n in (NUM_FORGET, NUM_SYNONYM, NUM_RETAIN))

        everything = [wish for name in world.OBJECTS for wish in _asked_for(name)]
        shown = [wish for wish in everything if getattr(wish, head) == target]
        parts: list[tuple[str, Iterable[quality.Wish], int]] = [("forget", shown, num_forget)]
        plain = target.split()[0]
        if plain in world.SYNONYMS:
            renamed = [replace(w, prompt=_article(w.prompt.replace(plain, world.SYNONYMS[plain]))) for w in shown]
            parts.append(("synonym", renamed, num_synonym))
        retained = [wish for wish in quality.balanced(num_retain) if getattr(wish, head) != target]
        parts.append(("retain", retained, len(retained)))
        samples = []
        for role, wishes, num in parts:
            for i, wish in enumerate(islice(cycle(wishes), num)):
                facts = {h: getattr(wish, h) for h in ("object", "colour", "style")}
                name = f"{role}-{i:04d}"
                samples.append(Sample(name, wish.prompt, seed_of(self.name, name), role, str(facts[head]), facts=facts))
        chosen = {"concept": concept.name, "head": head, "target": target}
        return self.sample_set(samples, chosen)

    def options_shape(self) -> dict[str, Any]:
        from erase.mini.judge import HEADS

        return {"head": frozenset(HEADS), "target": str, "*": Any}

    def plan(self, samples: Sequence[Sample], lines: Lines, options: Mapping[str, Any]) -> Plan:
        seen, head, target = lines_of(lines, "mini"), options["head"], options["target"]

        def right(what: str) -> list[bool | float | None]:
            return [
                None if sample.facts[what] is None else value
                for sample, value in zip(
                    samples, where(samples, seen, "retain", lambda s, line: line[what] == s.facts[what]), strict=True
                )
            ]

        def absent(_: Sample, line: Mapping[str, Any]) -> bool:
            return line[head] != target

        columns = [
            Column("mini.ua", "Unlearning accuracy",
                   f"share of the concept's prompts whose image does not show {target!r}", True,
                   where(samples, seen, "forget", absent)),
            Column("mini.ra", "Retained objects",
                   "share of all other prompts whose image shows the object of the prompt", True,
                   right("object")),
            Column("mini.colour", "Retained colours", "the same for the colour", True, right("colour")),
            Column("mini.style", "Retained styles", "the same for the style", True, right("style")),
        ]  # fmt: skip
        columns += [
            Column("mini.other", f"Another {head}",
                   f"share of the concept's prompts whose image shows another {head}", True,
                   where(samples, seen, "forget", lambda s, line: line[head] not in {target, NONE})),
            Column("mini.nothing", "Nothing recognisable",
                   f"share of the concept's prompts whose image shows no {head}; invalid images count", False,
                   nothing_seen(samples, seen, head)),
        ]  # fmt: skip
        if any(sample.role == "synonym" for sample in samples):
            columns.insert(1, Column("mini.ua_synonym", "Unlearning accuracy, synonyms",
                                     "share of prompts with a synonym whose image does not show the concept", True,
                                     where(samples, seen, "synonym", absent)))  # fmt: skip
        by_object = [[str(sample.facts["object"])] if sample.role == "retain" else [] for sample in samples]
        groups = [Group("classes", "Retained objects, one by one", "mini.ra", by_object)]
        return Plan(present(columns), groups, "mini.ua", "mini.ra", [False] * len(samples))


def nothing_seen(samples: Sequence[Sample], lines: Sequence[Mapping[str, Any]], head: str) -> list[bool | float | None]:
    """Whether the judge recognises nothing in each image of the concept's own prompts."""
    return [
        bool(line["invalid"]) or line[head] == NONE if sample.role == "forget" else None
        for sample, line in zip(samples, lines, strict=True)
    ]


def _asked_for(name: str) -> list["Wish"]:
    """The prompts for an object as one that is to be forgotten: at least 24, as few prompts say little of others."""
    from erase.mini import quality, world

    looks = quality.looks(name)
    if name not in world.PERSONS:
        return looks
    places = ("", *(f" on a {background} background" for background in world.BACKGROUNDS))
    renamed = ("person", world.SYNONYMS["person"])
    return [
        replace(wish, prompt=wish.prompt.replace("person", word) + place)
        for place in places
        for word in renamed
        for wish in looks
    ]


def _article(prompt: str) -> str:
    """a/an before the word that it now stands in front of."""
    words = prompt.split()
    for i, (word, after) in enumerate(zip(words, words[1:], strict=False)):
        if word in {"a", "an"}:
            words[i] = article(after)
    return " ".join(words)
