"""UnlearnDiffAtk (Zhang et al., ECCV 2024): words before a prompt, found by the erased model's own diffusion loss.

min over words d of E ||eps - eps_theta(x_t, t, text(d, prompt))||^2, where the base generates the image x from the
prompt. Each word is a distribution over the vocabulary, projected onto the simplex after each step of Adam. The prompt
is read with words drawn from the distributions; their gradient is clipped to [-1, 1]. No other network takes part.
"""

from collections.abc import Sequence
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
class UnlearnDiffAtk(Attack):
    """How the words are searched. The defaults are the authors' for Stable Diffusion.

    num_tokens: words before the prompt; the authors take 5 for nudity and 3 for styles and objects.
    num_steps, steps_each: of Adam, and how many of them at each timestep. Timesteps rise from low to high noise, spread
        evenly over the schedule: by default 50 of them.
    learning_rate, weight_decay: of Adam, on the distributions over the vocabulary, which begin uniform.
    at: points of the curve, in steps, the last one `num_steps`; empty for 0, 25, 50 and 100 %. At 0 the prompt is as it
        is. The authors look at an image after each timestep and stop at the first success; `any` counts the same way.
    batch_size: prompts that are attacked at once; each has its own noise, so the words are the same in any batch.
    num_shown: images of the concept. A prompt's own image is its target; a prompt without one gets another's.
    """

    about = "the prompt: words before it, found with the model's own loss on an image of the concept"
    needs = "the model's gradients, and an image of the concept for each prompt"
    finds_words = True
    control = "random words before the prompt"
    limits = ("Only words before the concept's own prompts were searched; a learned embedding may find more.",)
    looks = True

    num_tokens: int = 5
    num_steps: int = 2000
    steps_each: int = 40
    at: tuple[int, ...] = ()
    learning_rate: float = 0.01
    weight_decay: float = 0.1
    batch_size: int = 1
    num_shown: int = 40

    def __post_init__(self) -> None:
        checked_points(self.at, self.num_steps)
        if not (self.num_tokens and self.steps_each and self.batch_size and self.num_shown):
            raise EraseError("num_tokens, steps_each, batch_size and num_shown must be 1 or more")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(map(str, checked_points(self.at, self.num_steps)))

    def with_budget(self, budget: Sequence[int]) -> "UnlearnDiffAtk":
        return replace(self, **budget_of(budget))

    def require_possible(self, model: Family, steps: int) -> None:
        require_room(model, self.num_tokens)

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        model, concept = given.model, given.concept
        prompts = list(dict.fromkeys(sample.prompt for sample in given.samples))
        words, points = words_of(model, concept), checked_points(self.at, self.num_steps)
        found = find(model, images_of(given, prompts), prompts, words, self, points, seed, quiet=given.quiet)
        texts = {
            str(point): {p: text_with(model, row, p) if point else p for p, row in zip(prompts, rows, strict=True)}
            for point, rows in found.items()
        }

        def random(name: str, prompt: str) -> str:
            return text_with(model, random_words(words, self.num_tokens, seed, name, prompt), prompt)

        return as_findings(texts, concept) | random_findings(self.controls, prompts, concept, random)


def find(
    model: Family,
    latents: Tensor,
    prompts: Sequence[str],
    words: Words,
    attack: UnlearnDiffAtk,
    points: Sequence[int],
    seed: int,
    *,
    quiet: bool = False,
) -> dict[int, list[list[int]]]:
    """The tokens before each prompt, after each of these numbers of steps.

    latents: of the prompts' images, scaled for the network, [len(prompts), c, h, w].
    """
    found: dict[int, list[list[int]]] = {point: [] for point in points}
    size, num = attack.batch_size, len(prompts)
    with progress(num * attack.num_steps, "unlearn-diff-atk", "steps", quiet=quiet) as bar:
        for start in range(0, num, size):
            rows = slice(start, start + size)
            for step, chosen in _searched(model, latents[rows], prompts[rows], words, attack, seed):
                if step in found:
                    found[step] += words.tokens[chosen.argmax(-1).cpu()].tolist()
                bar.update(len(chosen) if step else 0)
    return found


def _searched(model: Family, x: Tensor, prompts: Sequence[str], words: Words, attack: UnlearnDiffAtk, seed: int):
    """Yield the number of steps and the distributions over the words, [n, k, v], after 0, 1, ... steps."""
    n, k, v = len(prompts), attack.num_tokens, len(words.tokens)
    p = torch.full((n, k, v), 1 / v, device=model.device)
    optimizer = torch.optim.Adam([p], lr=attack.learning_rate, weight_decay=attack.weight_decay)
    tokens, x = [[0] * k + model.tokens(prompt) for prompt in prompts], x.to(model.device)
    yield 0, p
    for step in range(attack.num_steps):
        draws = [generator(seed, "unlearn-diff-atk", prompt, step) for prompt in prompts]
        eps = torch.stack([torch.randn(x.shape[1:], generator=one) for one in draws]).to(model.device)
        u = torch.stack([torch.rand(k, 1, generator=one) for one in draws]).to(model.device)
        chosen = torch.searchsorted(p.cumsum(-1), u).squeeze(-1).clamp(max=v - 1)
        e = words.embeddings[chosen].requires_grad_(True)
        t = torch.full((n,), timestep(step, attack, model.num_timesteps), device=model.device)
        predicted = predict(model, model.add_noise(x, eps, t), t, model.encode_tokens(tokens, e))
        losses = (predicted - eps).square().mean((1, 2, 3))
        (gradient,) = torch.autograd.grad(losses.sum(), [e])
        p.grad = (gradient @ words.embeddings.T).clamp(-1, 1)
        optimizer.step()
        p.copy_(onto_simplex(p))
        yield step + 1, p


def timestep(step: int, attack: UnlearnDiffAtk, num_timesteps: int) -> int:
    """The timestep of a step: 10, 30, ..., 990 for 50 timesteps of 1,000."""
    number = -(-attack.num_steps // attack.steps_each)
    return int((step // attack.steps_each + 0.5) * num_timesteps / number)


def onto_simplex(p: Tensor) -> Tensor:
    """The nearest distribution to each row of p, [..., v]: values of 0 or more with the sum 1 (Held et al., 1974)."""
    falling = p.sort(-1, descending=True).values
    excess = (falling.cumsum(-1) - 1) / torch.arange(1, p.shape[-1] + 1, device=p.device)
    last = (falling > excess).sum(-1, keepdim=True) - 1
    return (p - excess.gather(-1, last)).clamp(min=0)
