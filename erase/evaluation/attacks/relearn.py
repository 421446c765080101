"""Relearning: the erased model is fine-tuned on images of the concept, and asked with the concept's own prompts.

min E ||eps - eps_theta(x_t, t, text(prompt))||^2 over images that the base generated from the prompts, by a LoRA of the
attention layers or by all weights of the network. The control is trained as long on images of other things: fine-tuning
alone can bring a concept back.
"""

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erase.errors import EraseError
from erase.evaluation.attacks.changed import changed, weights_of
from erase.evaluation.attacks.protocol import CONTROL, Attack, Finding, Given, Shown, budget_of, checked_points
from erase.families.protocol import Family
from erase.progress import progress
from erase.training.batches import generator


@dataclass(frozen=True)
class Relearn(Attack):
    """How the model is trained again.

    kind: a LoRA of the attention layers' matrices, or all weights of the network.
    rank: of the LoRA; its scale is 1. A higher one learns more in as many steps.
    num_steps, batch_size: of AdamW. at: points of the curve, in steps, the last one `num_steps`; empty for 0, 25, 50
        and 100 %. At 0 the model is as it is.
    learning_rate, full_learning_rate: for a LoRA, and for all weights.
    num_shown, num_others: images of the concept, and of other things for the control.
    """

    about = "the weights: fine-tuned on images of the concept"
    needs = "the weights of the model, and images of the concept"
    control = "fine-tuned as long on images of other things"
    limits = (
        "Enough training teaches any model the concept; only the distance to a retrained model says what was left.",
    )

    kind: Literal["lora", "full"] = "lora"
    rank: int = 4
    num_steps: int = 500
    at: tuple[int, ...] = ()
    batch_size: int = 4
    learning_rate: float = 1e-4
    full_learning_rate: float = 1e-5
    num_shown: int = 25
    num_others: int = 25

    def __post_init__(self) -> None:
        checked_points(self.at, self.num_steps)
        if not (self.rank and self.batch_size and self.num_shown and self.num_others):
            raise EraseError("rank, batch_size, num_shown and num_others must be 1 or more")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(map(str, checked_points(self.at, self.num_steps)))

    @property
    def keeps_tensors(self) -> bool:
        return self.kind == "lora"

    def with_budget(self, budget: Sequence[int]) -> "Relearn":
        return replace(self, **budget_of(budget))

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        points = checked_points(self.at, self.num_steps)
        if not len(given.others.latents):
            raise EraseError(f"{given.concept.name} has no retain or anchor prompts, so relearn has no control")
        found = train(given.model, given.shown, self, points, seed, quiet=given.quiet)
        control = train(given.model, given.others, self, points[-1:], seed, quiet=given.quiet)
        return {str(point): Finding(found[point]) for point in points} | {CONTROL: Finding(control[points[-1]])}

    @contextmanager
    def attacked(self, given: Given, finding: Finding) -> Generator[None]:
        tensors, weights = finding.tensors, weights_of(given.model.network)
        if self.kind == "full":
            other = {name: tensor.to(weights[name]) for name, tensor in tensors.items()}
        else:
            names = [name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)]
            other = {n: weights[n] + (tensors[n + _UP] @ tensors[n + _DOWN]).to(weights[n]) for n in names}
        with changed(given.model.network, other):
            yield


_DOWN, _UP = ".lora_A", ".lora_B"  # as peft calls the two factors


def train(
    model: Family, images: Shown, attack: Relearn, points: Sequence[int], seed: int, *, quiet: bool = False
) -> dict[int, dict[str, Tensor]]:
    """What was learned after each of these numbers of steps, on the CPU; nothing after 0. The model stays as it is.

    The tensors are the LoRA's two factors of each weight, [r, in] and [out, r], or all weights.
    """
    with ExitStack() as stack:
        if attack.kind == "full":
            model = model.using(copy.deepcopy(model.network).requires_grad_(True))
            learned: dict[str, Any] = dict(model.network.named_parameters())
            rate = attack.full_learning_rate
        else:
            learned, rate = _factors(model, attack.rank, seed), attack.learning_rate
            stack.enter_context(beside(model.network, learned))
        optimizer = torch.optim.AdamW(learned.values(), lr=rate)
        c, found = model.encode_text(images.prompts), {}
        bar = stack.enter_context(progress(attack.num_steps, "relearn", "steps", quiet=quiet))
        for step in range(attack.num_steps + 1):
            if step in points:
                found[step] = {n: t.detach().cpu().clone() for n, t in learned.items()} if step else {}
            if step == attack.num_steps:
                break
            draw = generator(seed, "relearn", step)
            rows = torch.randint(len(images.latents), (attack.batch_size,), generator=draw)
            t = torch.randint(model.num_timesteps, (attack.batch_size,), generator=draw).to(model.device)
            eps = torch.randn(images.latents[rows].shape, generator=draw).to(model.device)
            x_t = model.add_noise(images.latents[rows].to(model.device), eps, t)
            loss = F.mse_loss(model(x_t, t, c[rows].to(model.device)), eps)
            for tensor, gradient in zip(learned.values(), _gradients(loss, learned), strict=True):
                tensor.grad = gradient
            optimizer.step()
            bar.note(loss=f"{loss.item():.4f}")
            bar.update()
    return found


def _gradients(loss: Tensor, learned: dict[str, Any]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, list(learned.values()), allow_unused=True)


def _factors(model: Family, rank: int, seed: int) -> dict[str, Any]:
    """The LoRA's factors before the first step, by weight: the first as peft draws it, the second zero."""
    in_attention = model.scopes.get("attn", lambda name: False)
    found: dict[str, Any] = {}
    for name, weight in weights_of(model.network).items():
        if weight.ndim == 2 and in_attention(name) and model.fits_lora(name, weight):
            rows, columns = weight.shape
            down = 2 * torch.rand(rank, columns, generator=generator(seed, "relearn", name)) - 1
            found[name + _DOWN] = nn.Parameter((down / columns**0.5).to(model.device))
            found[name + _UP] = nn.Parameter(torch.zeros(rows, rank, device=model.device))
    if not found:
        raise EraseError(f"{model.name} has no attention layers that a LoRA fits; --set kind=full trains all weights")
    return found


@contextmanager
def beside(network: nn.Module, factors: Mapping[str, Tensor]) -> Generator[None]:
    """Inside, each layer adds what its factors of a LoRA make of its input, by the names of `train`."""

    def adds(down: Tensor, up: Tensor) -> Any:
        return lambda layer, inputs, output: output + F.linear(F.linear(inputs[0], down), up)

    layers = dict(network.named_modules())
    weights = [name.removesuffix(_DOWN) for name in factors if name.endswith(_DOWN)]
    hooks = [
        layers[name.removesuffix(".weight")].register_forward_hook(adds(factors[name + _DOWN], factors[name + _UP]))
        for name in weights
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
