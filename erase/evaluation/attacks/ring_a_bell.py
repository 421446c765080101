"""Ring-A-Bell (Tsai et al., ICLR 2024): texts that mean the concept without its prompts, found in the text space alone.

The concept's direction is c = mean of tau(prompt with it) - tau(prompt without it), where tau are the text encoder's
states. For a prompt p, a genetic algorithm searches the text y that minimizes ||tau(p) + s c - tau(y)||^2, over all
tokens' states. The network is not used, so the texts are the same for every model with the same text encoder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from erase.concepts import Concept, refusal
from erase.concepts.concept import share_word
from erase.errors import EraseError
from erase.evaluation.attacks.found_words import Words, accepted, random_words, require_room, words_of
from erase.evaluation.attacks.protocol import CONTROL, Attack, Finding, Given, budget_of, checked_points
from erase.families.protocol import Family
from erase.progress import progress
from erase.training.batches import generator


@dataclass(frozen=True)
class RingABell(Attack):
    """How the texts are searched. The defaults are the authors' for Stable Diffusion.

    num_tokens: words of the text, which replaces the prompt.
    strength: s, how far the target is moved along the concept's direction.
    num_steps: generations. at: points of the curve, in generations, the last one `num_steps`; empty for 0, 25, 50 and
        100 %. At 0 the text is the best of a random population.
    population: texts of one generation. The better half lives on unchanged, so that the best text is never lost.
    crossover, mutation: probability that a child is crossed with another text at one point, and that one of its words
        becomes a random one.
    named: whether the texts may say the concept's name and synonyms. Without them the texts pass a filter of words.
    donor: whose text encoder is used: the base's, which needs no access to the attacked model, or the attacked one's.
    """

    about = "the prompt: another text, near the concept in the space of the text encoder"
    needs = "the base's text encoder, and prompts with and without the concept"
    finds_words = True
    control = "random words"
    limits = ("The texts were found without the model: an attacker who has it may find better ones.",)

    num_tokens: int = 16
    strength: float = 3.0
    num_steps: int = 3000
    at: tuple[int, ...] = ()
    population: int = 200
    crossover: float = 0.5
    mutation: float = 0.25
    named: bool = True
    donor: Literal["base", "model"] = "base"

    def __post_init__(self) -> None:
        checked_points(self.at, self.num_steps)
        if self.population < 4 or not self.num_tokens:
            raise EraseError(f"population is {self.population}; it must be 4 or more, and num_tokens 1 or more")
        if not (0 <= self.crossover <= 1 and 0 <= self.mutation <= 1):
            raise EraseError("crossover and mutation are probabilities; they must be between 0 and 1")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(map(str, checked_points(self.at, self.num_steps)))

    def with_budget(self, budget: Sequence[int]) -> "RingABell":
        return replace(self, **budget_of(budget))

    def require_possible(self, model: Family, steps: int) -> None:
        require_room(model, self.num_tokens)

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        if self.donor == "model":
            return self._searched(given.model, given, seed)
        if seed not in given.known:
            given.known[seed] = self._searched(given.open_base(), given, seed)
        return given.known[seed]

    @torch.no_grad()
    def _searched(self, donor: Family, given: Given, seed: int) -> dict[str, Finding]:
        prompts, concept = list(dict.fromkeys(sample.prompt for sample in given.samples)), given.concept
        words = words_of(donor, concept)
        words = words if self.named else without_names(words, donor, concept)
        moved = self.strength * direction(donor, concept)
        texts: dict[str, dict[str, str]] = {name: {} for name in (*self.points, *self.controls)}
        with progress(len(prompts) * self.num_steps, "ring-a-bell", "generations", quiet=given.quiet) as bar:
            for prompt in prompts:
                target = donor.encode_text([prompt]).text_states[0] + moved
                for step, found in evolve(donor, target, words, self, generator(seed, "ring-a-bell", prompt)):
                    if str(step) in texts:
                        ordered = (donor.text_of(row) for row in found.tolist())
                        allowed = (text for text in ordered if not refusal.involves_minors(text, concept.is_sexual))
                        texts[str(step)][prompt] = next(allowed, prompt)
                    bar.update(1 if step else 0)
                random = donor.text_of(random_words(words, self.num_tokens, seed, prompt))
                texts[CONTROL][prompt] = accepted(random, prompt, concept)
        return {name: Finding(texts=found) for name, found in texts.items()}


def without_names(words: Words, model: Family, concept: Concept) -> Words:
    """The words that share no word with the concept's name and synonyms."""
    own, said = [concept.name, *concept.synonyms], [model.text_of([token]) for token in words.tokens.tolist()]
    rows = [i for i, text in enumerate(said) if not any(share_word(name, text) for name in own)]
    return Words(words.tokens[rows], words.embeddings[rows])


def direction(model: Family, concept: Concept) -> Tensor:
    """Mean difference of the text states of the concept's forget prompts and of their anchors, [tokens, d]."""
    forget, anchors = zip(*concept.pairs(), strict=True)
    return (model.encode_text(forget).text_states - model.encode_text(anchors).text_states).mean(0)


def distances(model: Family, target: Tensor, rows: Tensor) -> Tensor:
    """||target - tau(y)||^2 of texts that are given as tokens, int64, [n, k]: [n], on the CPU."""
    states = model.encode_tokens(rows.tolist()).text_states
    return (states - target.to(states)).square().sum((1, 2)).cpu()


def evolve(
    model: Family, target: Tensor, words: Words, attack: RingABell, draw: torch.Generator
) -> Iterator[tuple[int, Tensor]]:
    """Yield the generation's number and its texts as tokens, int64, [population, k], the nearest first."""
    size = attack.population
    rows = words.tokens[torch.randint(len(words.tokens), (size, attack.num_tokens), generator=draw)]
    far = distances(model, target, rows)
    for step in range(attack.num_steps + 1):
        order = far.argsort(stable=True)
        rows, far = rows[order], far[order]
        yield step, rows
        if step < attack.num_steps:
            half = size // 2
            young = children(rows[:half], size - half, words, attack, draw)
            rows, far = torch.cat([rows[:half], young]), torch.cat([far[:half], distances(model, target, young)])


def children(parents: Tensor, num: int, words: Words, attack: RingABell, draw: torch.Generator) -> Tensor:
    """`num` new texts, int64, [num, k]: the parents in turn, each perhaps crossed with another and changed."""
    half, k = parents.shape
    first = parents[torch.arange(num) % half]
    second = parents[torch.randint(half, (num,), generator=draw)]
    cut = torch.randint(1, k, (num, 1), generator=draw) if k > 1 else torch.ones(num, 1)
    crossed = torch.rand(num, 1, generator=draw) < attack.crossover
    rows = torch.where(crossed & (torch.arange(k) >= cut), second, first)
    at = torch.randint(k, (num, 1), generator=draw)
    other = words.tokens[torch.randint(len(words.tokens), (num, 1), generator=draw)]
    changed = torch.rand(num, 1, generator=draw) < attack.mutation
    return torch.where(changed & (torch.arange(k) == at), other, rows)
