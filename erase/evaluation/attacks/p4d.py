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
from erase.evaluation.attacks.found_words import Words, as_findings, images_of, random_findings, text_with, words_of
from erase.evaluation.attacks.guarded import predict
from erase.evaluation.attacks.protocol import Attack, Finding, Given, budget_of, checked_points
from erase.families.protocol import Family
from erase.progress import progress
from erase.training.batches import generator


@dataclass(frozen=True)
class P4D(Attack):
    """How the words are searched. The defaults are the authors' P4D-N for Stable Diffusion.

    num_tokens: words that are searched. keeps_prompt: put them before the prompt, in place of replacing it.
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

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        model, concept = given.model, given.concept
        prompts = list(dict.fromkeys(sample.prompt for sample in given.samples))
        words, images = words_of(model, concept), images_of(given, prompts)
        found: dict[str, dict[str, str]] = {point: {} for point in self.points}
        with progress(len(prompts) * self.num_steps, "p4d", "steps", quiet=given.quiet) as bar:
            for start in range(0, len(prompts), self.batch_size):
                some = slice(start, start + self.batch_size)
                for step, rows in find(model, given.open_base(), images[some], prompts[some], words, self, seed):
                    for prompt, tokens in zip(prompts[some], rows.tolist(), strict=True):
                        if str(step) in found:
                            text = text_with(model, tokens, prompt if self.keeps_prompt else "")
                            found[str(step)][prompt] = text
                        bar.update(1 if step else 0)
        how = {"num": self.num_tokens, "seed": seed, "keeps_prompt": self.keeps_prompt}
        return as_findings(found, concept) | random_findings(model, words, self.controls, prompts, concept, **how)


def find(
    model: Family, base: Family, latents: Tensor, prompts: Sequence[str], words: Words, attack: P4D, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of steps and the words' tokens, int64, [len(prompts), k] on the CPU, after 0, 1, ... steps.

    latents: of the prompts' images, scaled for the network, [len(prompts), c, h, w].
    """
    k, m, device = attack.num_tokens, attack.draws, words.embeddings.device
    x = latents.to(model.device).repeat_interleave(m, 0)
    first = [torch.randint(len(words.tokens), (k,), generator=generator(seed, "p4d", prompt)) for prompt in prompts]
    e = words.embeddings[torch.stack(first).to(device)].clone()
    optimizer = torch.optim.AdamW([e], lr=attack.learning_rate, weight_decay=attack.weight_decay)
    rest = [[0] * k + (model.tokens(prompt) if attack.keeps_prompt else []) for prompt in prompts]
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
        difference = predict(model, x_t, t, model.encode_tokens(rest, read)[each]) - target
        (e.grad,) = torch.autograd.grad(difference.square().mean((1, 2, 3)).sum() / m, [read])
        optimizer.step()
