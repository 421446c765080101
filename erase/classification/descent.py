"""The training loop of classifiers, the writing of new weights, and saliency masks. Only masked weights change."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from erase import masks
from erase.classification.checkpoint import Checkpoint
from erase.classification.data import Images, loader
from erase.classification.methods import Plan, Progress, Values
from erase.classification.replayed import replaying
from erase.device import LOSS_SCALE, Compute
from erase.errors import EraseError
from erase.optim import MaskedAdam
from erase.optim.sgd import MaskedSGD
from erase.options.declare import Precision
from erase.progress import progress


class Diverged(EraseError):
    """The loss or the model's answer is not finite; a smaller learning rate may help."""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training loop.

    schedule: of the learning rate: "constant", "cosine" to zero, or "steps", a tenth after half and a hundredth after
        three quarters of the epochs, as SalUn's code trains its original models.
    batch_norm: "moving" normalises with the batch's statistics and updates the model's, as in SalUn's code, outside any
        mask; "frozen" normalises with the model's statistics and does not change them, and bears smaller steps.
    padding, flip: see `augment`. precision: see `computing`.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 256
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    batch_norm: Literal["frozen", "moving"] = "moving"
    padding: int = 0
    flip: bool = False
    precision: Precision = "fp32"

    def learning_rate_at(self, epoch: int) -> float:
        share = epoch / self.epochs
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * share)) / 2
        if self.schedule == "steps":
            return self.learning_rate * 0.1 ** ((share >= 0.5) + (share >= 0.75))
        return self.learning_rate


def descend(
    model: nn.Module,
    plan: Plan,
    recipe: Recipe,
    generator: torch.Generator,
    mask: Mapping[str, Tensor] | None = None,
    *,
    label: str = "train",
    checkpoint: Checkpoint | None = None,
    quiet: bool = True,
) -> None:
    """Carry out a plan, in place. Modes and gradient flags of the model are restored afterwards.

    mask: bool tensors by parameter name; a parameter without one does not change. None: every weight may change.
    label: name of the progress bar, which counts epochs.
    checkpoint: where an interrupted training continues; only for a plan with no more than `passes` and `loss`, whose
        functions keep no state.

    Raises:
        Diverged: the loss is not finite.
        EraseError: the mask is for another model.
    """
    named = dict(model.named_parameters())
    if mask is not None:
        masks.check(mask, {}, named)
        mask = {name: mask[name].to(named[name].device) for name in mask}
    moving = named if mask is None else {name: named[name] for name in mask}
    if recipe.epochs == 0 or not moving:
        return
    optimizers = _optimizers(moving, mask, plan, recipe)
    with (
        _training(model, moving, recipe.batch_norm),
        computing(model, recipe.precision),
        replaying(model) as new_step,
    ):
        descent = _Descent(model, plan, recipe, generator, mask, *optimizers, new_step)
        begun = checkpoint.restore(model, descent.optimizer, generator) if checkpoint else 0
        if plan.start:
            write(model, plan.start(), mask)
        with progress(recipe.epochs, label, "epochs", done=begun, quiet=quiet) as bar:
            for epoch in range(begun, recipe.epochs):
                loss = descent.run(epoch)
                if not torch.isfinite(loss):  # once an epoch, because looking at it waits for the device
                    raise Diverged(f"the loss is {loss.item()} in epoch {epoch + 1}; lower --learning-rate")
                if checkpoint:
                    checkpoint.keep(model, descent.optimizer, generator, epoch + 1, last=epoch + 1 == recipe.epochs)
                bar.update()


@dataclass
class _Descent:
    """What an epoch of a descent needs.

    forget_optimizer: of the steps on D_f, if it is another one. new_step: see `replaying`.
    """

    model: nn.Module
    plan: Plan
    recipe: Recipe
    generator: torch.Generator
    mask: Mapping[str, Tensor] | None
    optimizer: torch.optim.Optimizer
    forget_optimizer: torch.optim.Optimizer | None
    new_step: Callable[[], None]
    step: int = 0

    def run(self, epoch: int) -> Tensor:
        """Train for one epoch; returns the last loss."""
        loss, recipe = torch.zeros(()), self.recipe
        passes = self.plan.passes()
        steps = recipe.epochs * sum(math.ceil(len(images) / recipe.batch_size) for images in passes)
        how: dict[str, Any] = {"padding": recipe.padding, "flip": recipe.flip}
        for part, images in enumerate(passes):
            for batch in loader(images, recipe.batch_size, self.generator, **how):
                loss = self._step(batch, Progress(epoch, recipe.epochs, self.step, steps, part))
                self.step += 1
        return loss

    def _step(self, batch: Images, at: Progress) -> Tensor:
        optimizer, x = self._optimizer(at), batch.pixels
        self.new_step()
        loss = self.plan.loss(x, batch.y, at) if self.plan.loss else F.cross_entropy(self.model(x), batch.y)
        optimizer.zero_grad()
        (loss * LOSS_SCALE[self.recipe.precision]).backward()
        if self.recipe.precision == "fp16":
            for parameter in (*self.model.parameters(), *self.plan.extra.values()):
                if parameter.grad is not None:
                    parameter.grad /= LOSS_SCALE["fp16"]
        if self.plan.bend:
            self.plan.bend(at)
        optimizer.step()
        if self.plan.settle:
            write(self.model, self.plan.settle(at), self.mask)
        return loss

    def _optimizer(self, at: Progress) -> torch.optim.Optimizer:
        """The optimizer of a step, with its learning rate."""
        optimizer, size = self.optimizer, self.recipe.learning_rate_at(at.epoch)
        own, forgets = self.plan.forget_optimizer, self.plan.forgets
        if self.forget_optimizer and own and forgets and forgets(at):
            optimizer, size = self.forget_optimizer, own.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = size * (self.plan.rate(at) if self.plan.rate else 1)
        return optimizer


@torch.no_grad()
def write(model: nn.Module, values: Values, mask: Mapping[str, Tensor] | None) -> None:
    """Write new values of weights inside the mask; all other weights keep their bits."""
    named = dict(model.named_parameters())
    for name, new in values.items():
        if mask is None:
            named[name].copy_(new)
        elif name in mask:
            named[name].copy_(torch.where(mask[name].to(new.device), new, named[name]))


def saliency_mask(
    model: nn.Module,
    forget: Images,
    density: float,
    score: masks.Score = "abs_sum",
    *,
    per_tensor: bool = False,
    largest: bool = True,
    batch_size: int = 256,
    precision: Precision = "fp32",
    generator: torch.Generator | None = None,
    padding: int = 0,
    flip: bool = False,
) -> masks.Mask:
    """The weights that matter most for the forget set: |grad CE|, one pass in eval mode.

    density: share of the weights in the mask, in (0, 1].
    largest: False selects the smallest scores instead. All others: see `saliency_scores`.
    """
    how: dict[str, Any] = {"generator": generator, "padding": padding, "flip": flip}
    scores = saliency_scores(model, forget, score, batch_size=batch_size, precision=precision, **how)
    return masks.select(scores, density, per_tensor=per_tensor, largest=largest)


def saliency_scores(
    model: nn.Module,
    forget: Images,
    score: masks.Score = "abs_sum",
    *,
    batch_size: int = 256,
    precision: Precision = "fp32",
    generator: torch.Generator | None = None,
    padding: int = 0,
    flip: bool = False,
) -> dict[str, Tensor]:
    """The scores that `saliency_mask` selects from: of the gradients of each batch's mean loss, as in SalUn's code.

    Every batch has the same weight, so an image has a larger weight in a short last batch.
    generator: of the order and the augmentation. None: stored order, no augmentation.
    padding, flip: see `augment`. precision: see `computing`.
    """
    if generator is None:
        batches = forget.batches(batch_size)
    else:
        batches = loader(forget, batch_size, generator, padding=padding, flip=flip)
    with in_eval(model), computing(model, precision):
        accumulated = masks.Saliency(dict(model.named_parameters()), score)
        with accumulated.collecting():
            for batch in batches:
                loss = F.cross_entropy(model(batch.pixels), batch.y)
                (loss * LOSS_SCALE[precision]).backward()  # scaling does not change the order of the scores
    return accumulated.scores()


@contextmanager
def computing(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Compute the model's convolutions and matrix products in a precision; weights and logits stay float32.

    With bf16 and fp16, results differ more between processors than with fp32.
    """
    if precision == "fp32":
        yield
        return

    def forward(module: nn.Module, *inputs: Tensor) -> Tensor:
        with Compute(inputs[0].device, precision).autocast():
            return type(module).forward(module, *inputs).float()

    model.forward = MethodType(forward, model)  # bound, so that a copy of the model calls itself
    try:
        yield
    finally:
        del model.forward


def _optimizers(
    moving: Mapping[str, Parameter], mask: Mapping[str, Tensor] | None, plan: Plan, recipe: Recipe
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
    """The run's optimizer, and the plan's own one for the steps on D_f."""
    clash = plan.extra.keys() & moving.keys()
    assert not clash, clash
    own = plan.forget_optimizer
    second = own and MaskedAdam(moving, mask, lr=own.learning_rate, weight_decay=own.weight_decay)
    named = {**moving, **plan.extra}
    if mask is not None:
        mask = {**mask, **{name: torch.ones(p.shape, dtype=torch.bool) for name, p in plan.extra.items()}}
    if recipe.optimizer == "adam":
        return MaskedAdam(named, mask, lr=recipe.learning_rate, weight_decay=recipe.weight_decay), second
    settings = {"lr": recipe.learning_rate, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    return MaskedSGD(named, mask, **settings), second


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with gradients for every parameter; the mask decides which weights are updated.

    Afterwards every module's mode and every parameter's requires_grad are restored, and no gradients remain.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_()
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
        for parameter, was_wanted in wanted.items():
            parameter.requires_grad_(was_wanted)
        model.zero_grad()


@contextmanager
def _training(model: nn.Module, moving: Mapping[str, Parameter], batch_norm: str) -> Iterator[None]:
    """Put the model in train mode, except for frozen batch normalisation, with gradients for `moving` only."""
    with in_eval(model):
        model.train()
        for module in model.modules():
            if batch_norm == "frozen" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        trained = set(moving.values())
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
        yield
