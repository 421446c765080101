"""Words that attacks put into prompts: whole words of the model's vocabulary, none of which involves minors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.concepts import Concept, refusal
from erase.errors import EraseError
from erase.evaluation.attacks.protocol import SEEDS, Finding, Given
from erase.families.protocol import Family
from erase.training.batches import generator


@dataclass(frozen=True, eq=False)
class Words:
    """The words that an attack chooses from. tokens: int64, [v]. embeddings: [v, d], on the model's device."""

    tokens: Tensor
    embeddings: Tensor

    def nearest(self, embeddings: Tensor) -> Tensor:
        """Rows of `tokens` whose embeddings have the largest cosine with these, [n, k, d]: int64, [n, k]."""
        return (F.normalize(embeddings, dim=-1) @ F.normalize(self.embeddings, dim=-1).T).argmax(-1)


def words_of(model: Family, concept: Concept) -> Words:
    """Tokens of the vocabulary that are whole words: the text of one is read as this token again.

    Raises:
        EraseError: the model has no table of token embeddings.
    """
    table, found = model.token_embeddings.detach(), []
    for token in range(len(table)):
        text = model.text_of([token])
        if text and text.isprintable() and not refusal.involves_minors(text, concept.is_sexual):
            if model.tokens(text) == [token]:
                found.append(token)
    if not found:
        raise EraseError(f"{model.name}'s vocabulary has no whole words to choose from; choose another attack")
    tokens = torch.tensor(found)
    return Words(tokens, table[tokens.to(table.device)])


def require_room(model: Family, num: int) -> None:
    """Raise an EraseError if the text encoder does not read `num` words."""
    if num > model.max_tokens - 2:
        raise EraseError(f"num_tokens is {num}, but {model.name} reads {model.max_tokens - 2} tokens of a prompt")


def random_words(words: Words, num: int, seed: int, *what: object) -> list[int]:
    """Tokens of random words. what: any other values that the choice depends on, such as the prompt."""
    rows = torch.randint(len(words.tokens), (num,), generator=generator(seed, "random words", *what))
    return words.tokens[rows].tolist()


def text_with(model: Family, tokens: Sequence[int], prompt: str) -> str:
    """The text of the tokens, then the prompt."""
    return f"{model.text_of(tokens)} {prompt}".strip()


def accepted(text: str, before: str, concept: Concept) -> str:
    """The text; `before`, the last accepted one, if words that are harmless by themselves involve minors together."""
    return before if refusal.involves_minors(text, concept.is_sexual) else text


def as_findings(texts: Mapping[str, Mapping[str, str]], concept: Concept) -> dict[str, Finding]:
    """The texts of every point by prompt, as findings.

    A text that involves minors is replaced by that of the point before, and at the first point by the prompt.
    """
    before: Mapping[str, str] = {}
    found: dict[str, Finding] = {}
    for point, said in texts.items():
        before = {prompt: accepted(text, before.get(prompt, prompt), concept) for prompt, text in said.items()}
        found[point] = Finding(texts=before)
    return found


def random_findings(
    names: Sequence[str], prompts: Sequence[str], concept: Concept, text: Callable[[str, str], str]
) -> dict[str, Finding]:
    """The controls of these names: of each prompt a text with random words, for `SEEDS` the prompt as it is.

    text: gives it for the name of a control and a prompt.
    """
    found: dict[str, Finding] = {}
    for name in names:
        texts = {prompt: text(name, prompt) for prompt in prompts if not name.startswith(SEEDS)}
        found |= as_findings({name: texts}, concept)
    return found


def images_of(given: Given, prompts: Sequence[str]) -> Tensor:
    """Latents of an image of the concept for each prompt, [n, c, h, w]: one that the base generated from the prompt, if
    there is one, and another one otherwise."""
    shown = given.shown
    rows = [shown.prompts.index(p) if p in shown.prompts else i % len(shown.prompts) for i, p in enumerate(prompts)]
    return shown.latents[rows]
