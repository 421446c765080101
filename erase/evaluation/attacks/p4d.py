"""P4D, Prompting4Debugging (Chin et al., ICML 2024): words with which the erased model predicts what the base does.

min over words d of E ||eps_theta(x_t, t, text(d)) - eps_base(x_t, t, text(prompt))||^2, where the base generates the
image x from the prompt. The words are embeddings that are optimized freely; the text is read with the nearest word of
each, whose gradient moves the embedding (PEZ, Wen et al., 2023).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.evaluation.attacks.found_words import (
    Words,
    as_findings,
    images_of,
    random_findings,
    random_words,
    require_room,
    text_with,
    words_of,
)
from erase.evaluation.attacks.guarded import predict
from erase.evaluation.attacks.protocol import Attack, Finding, Given, budget_of, checked_points
from erase.families.protocol import Family
from erase.progress import progress
from erase.training.batches import generator


@dataclass(frozen=True)
class P4D(Attack):
    """How the words are searched. The defaults are the authors' P4D-N for Stable Diffusion.

    num_tokens: words that are searched. keeps_prompt: put them before the prompt, in place of replacing it.
    every: 3 for the authors' P4D-K: the prompt stays, with one word before it and after every 3 of its tokens (at the
        end of a word), as far as the text encoder reads. `num_tokens` then has no effect. 0 for P4D-N.
    num_steps, draws: of AdamW, and how many timesteps and noises each takes, spread over the schedule. With more of
        them a step costs more and its gradient is less noisy.
    at: points of the curve, in steps, the last one `num_steps`; empty for 0, 25, 50 and 100 %. At 0 the words are
        random. The authors look at images every 50 steps.
    learning_rate, weight_decay: of AdamW, on the embeddings.
    batch_size: prompts that are attacked at once; each has its own noise, so the words are the same in any batch.
    num_shown: images of the concept; a prompt's own image is noised, or another's if it has none.
    """

    about = "the prompt: words with which the model predicts what the base predicts for the concept"
    needs = "the model's gradients, the base, and an image of the concept for each prompt"
    finds_words = True
    control = "random words"
    limits = ("Only one set of words was searched for each prompt; a learned embedding may find more.",)
    looks = True

    num_tokens: int = 16
    keeps_prompt: bool = False
    every: int = 0
    num_steps: int = 3000
    at: tuple[int, ...] = ()
    draws: int = 1
    learning_rate: float = 0.1
    weight_decay: float = 0.1
    batch_size: int = 1
    num_shown: int = 40

    def __post_init__(self) -> None:
        checked_points(self.at, self.num_steps)
        if not (self.num_tokens and self.draws and self.batch_size and self.num_shown):
            raise EraseError("num_tokens, draws, batch_size and num_shown must be 1 or more")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(map(str, checked_points(self.at, self.num_steps)))

    def with_budget(self, budget: Sequence[int]) -> "P4D":
        return replace(self, **budget_of(budget))

    def require_possible(self, model: Family, steps: int) -> None:
        require_room(model, self.num_tokens)

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        model, concept = given.model, given.concept
        prompts = list(dict.fromkeys(sample.prompt for sample in given.samples))
        words, images = words_of(model, concept), images_of(given, prompts)
        found: dict[str, dict[str, str]] = {point: dict.fromkeys(prompts, "") for point in self.points}
        with progress(len(prompts) * self.num_steps, "p4d", "steps", quiet=given.quiet) as bar:
            for rows in self._batches(model, prompts):
                some = [prompts[row] for row in rows]
                for step, tokens in find(model, given.open_base(), images[rows], some, words, self, seed):
                    if str(step) in found:
                        for prompt, own in zip(some, tokens.tolist(), strict=True):
                            found[str(step)][prompt] = text_of(model, own, parts_of(model, prompt, self))
                    bar.update(len(rows) if step else 0)

        def random(name: str, prompt: str) -> str:
            parts = parts_of(model, prompt, self)
            num = len(places(template(model, parts, self)))
            return text_of(model, random_words(words, num, seed, name, prompt), parts)

        return as_findings(found, concept) | random_findings(self.controls, prompts, concept, random)

    def _batches(self, model: Family, prompts: Sequence[str]) -> Iterator[list[int]]:
        """Rows of prompts that are attacked at once: their words have the same places."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            alike.setdefault(tuple(places(template(model, parts_of(model, prompt, self), self))), []).append(row)
        for rows in alike.values():
            yield from (rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size))


def parts_of(model: Family, prompt: str, attack: P4D) -> list[str]:
    """The prompt in parts, each of which gets words before it; of P4D-N one empty part.

    P4D-K cuts after the word with which a part has `every` tokens; behind a full last part comes an empty one.
    """
    if not attack.every:
        return [prompt if attack.keeps_prompt else ""]
    parts, read, limit = [""], 1, model.max_tokens - 2  # read: tokens up to the end of the last part, its word included
    for word in prompt.split():
        parts[-1] = f"{parts[-1]} {word}".strip()
        num = len(model.tokens(parts[-1]))
        if num >= attack.every:
            read += num + 1
            if read > limit:
                break
            parts.append("")
    return parts


def template(model: Family, parts: Sequence[str], attack: P4D) -> list[int | None]:
    """Tokens of the text; None where a word is searched."""
    num = 1 if attack.every else attack.num_tokens
    return [token for part in parts for token in [None] * num + model.tokens(part)]


def places(tokens: Sequence[int | None]) -> list[int]:
    return [place for place, token in enumerate(tokens) if token is None]


def text_of(model: Family, words: Sequence[int], parts: Sequence[str]) -> str:
    """The text of the parts, with the same number of words before each."""
    num = len(words) // len(parts)
    return " ".join(text_with(model, words[i * num : (i + 1) * num], part) for i, part in enumerate(parts))


def find(
    model: Family, base: Family, latents: Tensor, prompts: Sequence[str], words: Words, attack: P4D, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of steps and the words' tokens, int64, [len(prompts), k] on the CPU, after 0, 1, ... steps.

    latents: of the prompts' images, scaled for the network, [len(prompts), c, h, w]. prompts: with words at the same
        places.
    """
    texts = [template(model, parts_of(model, prompt, attack), attack) for prompt in prompts]
    where, tokens = places(texts[0]), [[token or 0 for token in text] for text in texts]
    k, m, device = len(where), attack.draws, words.embeddings.device
    x = latents.to(model.device).repeat_interleave(m, 0)
    first = [torch.randint(len(words.tokens), (k,), generator=generator(seed, "p4d", prompt)) for prompt in prompts]
    e = words.embeddings[torch.stack(first).to(device)].clone()
    optimizer = torch.optim.AdamW([e], lr=attack.learning_rate, weight_decay=attack.weight_decay)
    goal = base.encode_text(prompts).to(base.device)
    for step in range(attack.num_steps + 1):
        nearest = words.nearest(e)
        yield step, words.tokens[nearest.cpu()]
        if step == attack.num_steps:
            return
        draws = [generator(seed, "p4d", prompt, step) for prompt in prompts]
        at = torch.cat([torch.arange(m) + torch.rand(m, generator=one) for one in draws]).to(x.device)
        t = (at * (model.num_timesteps / m)).long()
        eps = torch.cat([torch.randn(m, *x.shape[1:], generator=one) for one in draws]).to(x.device)
        x_t, each = model.add_noise(x, eps, t), torch.arange(len(prompts), device=x.device).repeat_interleave(m)
        with torch.no_grad():
            target = base(x_t, t, goal[each])
        read = words.embeddings[nearest].requires_grad_(True)
        difference = predict(model, x_t, t, model.encode_tokens(tokens, read, where)[each]) - target
        (e.grad,) = torch.autograd.grad(difference.square().mean((1, 2, 3)).sum() / m, [read])
        optimizer.step()
