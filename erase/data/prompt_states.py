"""Prompts as text-encoder states, and where the concept's own words are in them."""

import difflib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from erase.concepts import Concept
from erase.errors import EraseError
from erase.families.protocol import Family, TokenRun
from erase.methods.inputs import Text


def truncated(model: Family, concept: Concept) -> list[str]:
    """The concept's prompts that are longer than the text encoder reads, in order and once each.

    Raises:
        EraseError: what tells a forget prompt from its anchor, or the concept's name in it, is cut off.
    """
    names = [model.all_tokens(word) for word in (concept.name, *concept.synonyms)]
    limit = model.max_tokens - 2
    for forget, anchor in concept.pairs():
        whole, read = model.all_tokens(forget), model.tokens(forget)
        same = read == model.tokens(anchor) and forget != anchor
        if len(whole) > limit and (same or any(_holds(whole, name) and not _holds(read, name) for name in names)):
            raise EraseError(
                f"the forget prompt {forget[:60] + '...'!r} has {len(whole)} tokens; the text encoder reads {limit}, "
                "and the concept comes after them; shorten the prompt, or put the concept first"
            )
    prompts = dict.fromkeys((*concept.forget, *concept.anchor, *concept.retain, *concept.others))
    return [prompt for prompt in prompts if model.truncates(prompt)]


def _holds(tokens: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(tokens[i : i + len(part)]) == list(part) for i in range(len(tokens) - len(part) + 1))


def with_word(prompt: str, anchor: str, word: str) -> str:
    """The prompt with `word` in place of the words that its anchor lacks, all of them if it lacks none.

    "a photo of a cat" beside "a photo of a dog" becomes "a photo of a ~".
    """
    words = prompt.split()
    own, _ = distinguishing(words, anchor.split())
    own = own or [1]
    kept = [one for place, one in enumerate(words, 1) if place not in own or place == own[0]]
    kept[own[0] - 1 : own[0]] = [word]
    return " ".join(kept)


def distinguishing(a: Sequence[Hashable], b: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Places of the tokens that a has and b lacks, and the other way round; all of one that has nothing of its own.

    The start token has place 0, so that the first of `a` has 1.
    """
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    shared_a = {block.a + i for block in blocks for i in range(block.size)}
    shared_b = {block.b + i for block in blocks for i in range(block.size)}
    own_a = [i + 1 for i in range(len(a)) if i not in shared_a] or list(range(1, len(a) + 1))
    own_b = [i + 1 for i in range(len(b)) if i not in shared_b] or list(range(1, len(b) + 1))
    return own_a, own_b


def read_text(model: Family, concept: Concept) -> Text:
    """The concept as closed forms see it; needs no image.

    An empty anchor stands at its start token, the only place that is the same in every prompt.
    """

    def states(prompts: Sequence[str]) -> Tensor:
        return model.encode_text(prompts).text_states

    pairs = concept.pairs()
    ends = [own_places(model, forget, anchor) for forget, anchor in pairs]
    runs = model.token_runs("")
    return Text(
        forget=states([forget for forget, _ in pairs]),
        anchor=states([anchor for _, anchor in pairs]),
        retain=states(concept.retain) if concept.retain else states([""])[:0],
        empty=states([""]),
        forget_at=torch.tensor([_last(runs, own) for own, _ in ends]),
        anchor_at=torch.tensor([_last(runs, own) for _, own in ends]),
        retain_at=torch.tensor(
            [[run.last for run in model.token_runs(prompt)] for prompt in concept.retain], dtype=torch.int64
        ).view(-1, len(runs)),
        runs=tuple((run.begin, run.first, run.stop) for run in runs),
        forget_end=_ends(model, [forget for forget, _ in pairs]),
        anchor_end=_ends(model, [anchor for _, anchor in pairs]),
        retain_end=_ends(model, concept.retain),
    )


def _ends(model: Family, prompts: Sequence[str]) -> Tensor:
    """The place of the first end token of each prompt, int64, [prompts, runs]; of a truncated one the last place."""
    places = [[min(r.first + len(r.tokens), r.stop - 1) for r in model.token_runs(prompt)] for prompt in prompts]
    return torch.tensor(places, dtype=torch.int64).view(len(prompts), len(model.token_runs("")))


def own_places(model: Family, a: str, b: str) -> tuple[list[list[int]], list[list[int]]]:
    """Places in the text states of what prompt a has and b lacks, and the other way round, for each run of states."""
    found = []
    for ours, theirs in zip(model.token_runs(a), model.token_runs(b), strict=True):
        own = distinguishing(ours.tokens, theirs.tokens)
        found.append([[place + ours.first - 1 for place in places] for places in own])
    return [places for places, _ in found], [places for _, places in found]


def _last(runs: Sequence[TokenRun], own: Sequence[Sequence[int]]) -> list[int]:
    return [max(places, default=run.begin) for run, places in zip(runs, own, strict=True)]


def anchors_of(prompts: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What to say instead of each prompt; instead of one that the concept does not know, its first anchor."""
    known = dict(reversed(pairs))
    anchors = []
    for number, prompt in enumerate(prompts):
        own, anchor = pairs[number % len(pairs)]  # one prompt may have several anchors, in turn
        anchors.append(anchor if prompt == own else known.get(prompt, pairs[0][1]))
    return anchors
