"""Methods of unlearning for classifiers: each a frozen dataclass and its paper's formula.

Those that descend say what an epoch trains on and with which loss; the loop is in `run.py`. Those that do not say new
values for the weights. Either way the runner writes inside the mask only.

f: the model's logits. D_f, D_r: pictures to forget and to keep. CE: cross-entropy. theta_o: the original weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from erase import masks
from erase.classification.data import Images
from erase.errors import EraseError


@dataclass(frozen=True, eq=False)
class Task:
    """What every method is given.

    model: in eval mode, logits of pictures in [0, 1]. generator: every draw of a method is its.
    """

    model: nn.Module
    forget: Images
    retain: Images
    num_classes: int
    generator: torch.Generator

    def parameters(self) -> dict[str, Parameter]:
        return dict(self.model.named_parameters())


@dataclass(frozen=True)
class Progress:
    """Where training is: this epoch of so many, this step of so many, from 0."""

    epoch: int
    epochs: int
    step: int
    steps: int


Values = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor, Progress], Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a method that descends does.

    passes: what one epoch trains on, in this order, each shuffled by itself.
    loss: of a batch of pictures and labels; the plain cross-entropy without it.
    start: new values of weights before the first step.
    extra: parameters beside the model's, trained without a mask and dropped in the end.
    bend: changes the gradients between backward pass and step.
    settle: new values of weights after each step.
    """

    passes: Callable[[], list[Images]]
    loss: Loss | None = None
    start: Values = field(default_factory=dict)
    extra: Mapping[str, Parameter] = field(default_factory=dict)
    bend: Callable[[], None] | None = None
    settle: Callable[[Progress], Values] | None = None


@runtime_checkable
class Descends(Protocol):
    def plan(self, task: Task) -> Plan: ...


@runtime_checkable
class Solves(Protocol):
    def solve(self, task: Task) -> Values: ...


def cross_entropy(model: nn.Module, images: Images) -> Tensor:
    return F.cross_entropy(model(images.pixels), images.y)


def _require(method: object, **bounds: tuple[float, float]) -> None:
    """Raise an EraseError for an option outside its bounds, which are included."""
    for name, (low, high) in bounds.items():
        value = getattr(method, name)
        if not low <= value <= high:
            raise EraseError(f"{name} is {value}; it must lie in [{low:g}, {high:g}]")


# --- labels -----------------------------------------------------------------------------------------------------------


def random_labels(y: Tensor, num_classes: int, generator: torch.Generator, *, may_be_true: bool = False) -> Tensor:
    """A label for each, uniform over all other classes than its own, or over all as in SalUn's code."""
    if may_be_true:
        return torch.randint(0, num_classes, y.shape, generator=generator).to(y.device)
    return (y + torch.randint(1, num_classes, y.shape, generator=generator).to(y.device)) % num_classes


def adversarial_labels(model: nn.Module, images: Images, bound: float, *, may_be_true: bool = False) -> Tensor:
    """The class on the other side of the nearest boundary: argmax f(x + bound sign grad_x CE(f(x), y)), [n].

    The moved picture is clipped to [0, 1] and rounded to 255 steps. Among the other classes only, unless `may_be_true`.
    """
    x = images.pixels.requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), images.y, reduction="sum"), x)
    moved = ((x.detach() + bound * slope.sign()).clamp(0, 1) * 255).round() / 255
    with torch.no_grad():
        logits = model(moved)
    if not may_be_true:
        logits = logits.scatter(1, images.y[:, None], -torch.inf)
    return logits.argmax(1)


# --- methods that descend ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FineTune:
    """min CE(f(x), y) over D_r (Warnecke et al., 2023): hopes that what is not repeated is forgotten."""

    def plan(self, task: Task) -> Plan:
        return Plan(passes=lambda: [task.retain])


@dataclass(frozen=True)
class GradientAscent:
    """min -CE(f(x), y) over D_f (Thudi et al., 2022); has no bound."""

    def plan(self, task: Task) -> Plan:
        return Plan(passes=lambda: [task.forget], loss=lambda x, y, at: -F.cross_entropy(task.model(x), y))


@dataclass(frozen=True)
class RandomLabel:
    """min CE(f(x), y') over D_f, then CE(f(x), y) over D_r, epoch by epoch, new y' each (SalUn's code for CIFAR-10)."""

    may_be_true: Annotated[bool, "whether y' may equal y, as in SalUn's code"] = False

    def plan(self, task: Task) -> Plan:
        return Plan(passes=lambda: [_relabelled(task, self.may_be_true), task.retain])


@dataclass(frozen=True)
class RandomLabelJoint:
    """min CE(f(x), y') + CE(f(x), y) over D_f and D_r shuffled together (SalUn's code for CIFAR-100)."""

    may_be_true: Annotated[bool, "whether y' may equal y, as in SalUn's code"] = False

    def plan(self, task: Task) -> Plan:
        return Plan(passes=lambda: [_together(_relabelled(task, self.may_be_true), task.retain)])


@dataclass(frozen=True)
class SoftThreshold:
    """RandomLabelJoint whose change shrinks after each step (SalUn-soft, Fan et al., 2024, appendix).

    theta <- theta_o + sign(D) max(|D| - tau, 0) with D = theta - theta_o, where tau is the z-th smallest |D| and
    z = ratio (1 - step / steps) n: that share of the weights is back at its original value.
    """

    ratio: Annotated[float, "share of the weights that the first steps leave where they were, in [0, 1]"] = 0.5

    def __post_init__(self) -> None:
        _require(self, ratio=(0, 1))

    def plan(self, task: Task) -> Plan:
        original = {name: parameter.detach().clone() for name, parameter in task.parameters().items()}
        total = sum(tensor.numel() for tensor in original.values())

        def settle(at: Progress) -> Values:
            z = int(self.ratio * (1 - (at.step + 1) / at.steps) * total)
            change = {name: parameter.detach() - original[name] for name, parameter in task.parameters().items()}
            return {name: original[name] + shrunk for name, shrunk in soft_threshold(change, z).items()}

        return Plan(passes=lambda: [_together(_relabelled(task, False), task.retain)], settle=settle)


def soft_threshold(change: Mapping[str, Tensor], z: int) -> Values:
    """sign(D) max(|D| - tau, 0) with tau the z-th smallest |D| of all; D itself for z = 0."""
    if z == 0:
        return dict(change)
    tau = torch.cat([tensor.abs().reshape(-1) for tensor in change.values()]).kthvalue(z).values
    return {name: tensor.sign() * (tensor.abs() - tau).clamp(min=0) for name, tensor in change.items()}


@dataclass(frozen=True)
class L1Sparse:
    """min CE(f(x), y) + alpha_t |theta|_1 over D_r (Jia et al., 2023): forgets more easily as weights become few."""

    alpha: Annotated[float, "weight of the penalty at first; it falls linearly, epoch by epoch"] = 5e-4
    free_epochs: Annotated[int, "last epochs without penalty"] = 0

    def __post_init__(self) -> None:
        _require(self, alpha=(0, 1e30), free_epochs=(0, 100_000))

    def plan(self, task: Task) -> Plan:
        def loss(x: Tensor, y: Tensor, at: Progress) -> Tensor:
            alpha = l1_weight(self.alpha, at.epoch, at.epochs, self.free_epochs)
            fit = F.cross_entropy(task.model(x), y)
            return fit + alpha * sum(w.abs().sum() for w in task.model.parameters()) if alpha else fit

        return Plan(passes=lambda: [task.retain], loss=loss)


def l1_weight(alpha: float, epoch: int, epochs: int, free_epochs: int) -> float:
    """alpha (1 - e / (E - E_0)), and 0 from epoch E - E_0 on."""
    falling = epochs - free_epochs
    return alpha * (1 - epoch / falling) if epoch < falling else 0.0


@dataclass(frozen=True)
class BoundaryShrink:
    """min CE(f(x), y') over D_f, y' the nearest other class of theta_o (Chen et al., 2023); see adversarial_labels."""

    bound: Annotated[float, "how far a picture is moved to find y', of pixels in [0, 1]"] = 0.1
    may_be_true: Annotated[bool, "whether y' may equal y, as in the authors' code"] = False

    def __post_init__(self) -> None:
        _require(self, bound=(0, 1))

    def plan(self, task: Task) -> Plan:
        how = {"bound": self.bound, "may_be_true": self.may_be_true}
        labels = [adversarial_labels(task.model, batch, **how) for batch in task.forget.batches(256)]
        relabelled = task.forget.with_labels(torch.cat(labels))
        return Plan(passes=lambda: [relabelled])


@dataclass(frozen=True)
class BoundaryExpand:
    """min CE([f(x), g(x)], C) over D_f, where g is a new class C beside the C old ones (Chen et al., 2023).

    g is a linear layer on what the model's last linear layer sees. It is dropped in the end, so that the unlearned
    model has the classes that it had.
    """

    def plan(self, task: Task) -> Plan:
        layers = [module for module in task.model.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise EraseError("boundary expanding adds a class beside the last linear layer, but this model has none")
        head = layers[-1]
        width = head.in_features
        row = torch.empty(1, width).uniform_(-(width**-0.5), width**-0.5, generator=task.generator)
        weight, bias = Parameter(row.to(head.weight)), Parameter(torch.zeros(1).to(head.weight))

        def loss(x: Tensor, y: Tensor, at: Progress) -> Tensor:
            seen: list[Tensor] = []
            hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            try:
                logits = task.model(x)
            finally:
                hook.remove()
            logits = torch.cat([logits, F.linear(seen[0].to(weight), weight, bias)], dim=1)
            return F.cross_entropy(logits, torch.full_like(y, task.num_classes))

        return Plan(passes=lambda: [task.forget], loss=loss, extra={"weight": weight, "bias": bias})


@dataclass(frozen=True)
class Scissorhands:
    """New random values for the weights with the largest |sum g w| over D_f, then CE over D_r (Wu & Harandi, 2024).

    g is the gradient of CE over D_f. A step on D_r that would lower the loss over D_f loses that direction:
    g_r <- g_r - g_f <g_r, g_f> / |g_f|^2 where <g_r, g_f> > 0.
    """

    share: Annotated[float, "share of the weights that begin anew, in [0, 1]"] = 0.01
    batch_size: Annotated[int, "pictures of D_f that each step is checked against"] = 64

    def __post_init__(self) -> None:
        _require(self, share=(0, 1), batch_size=(1, 1_000_000))

    def plan(self, task: Task) -> Plan:
        named = task.parameters()
        gradients = _by_name(_gradient_sum(task.model, task.forget), named)
        scores = {name: (gradients[name] * w.detach()).abs() for name, w in named.items()}
        chosen = masks.select(scores, self.share) if self.share else {}
        start: Values = {}
        for name, places in chosen.items():
            old = named[name].detach()
            if old.dim() > 1:
                bound = (6 / old[0].numel()) ** 0.5  # Kaiming's uniform distribution
                new = torch.empty(old.shape).uniform_(-bound, bound, generator=task.generator).to(old)
            else:
                new = torch.zeros_like(old)
            start[name] = torch.where(places, new, old)

        def bend() -> None:
            drawn = torch.randint(0, len(task.forget), (self.batch_size,), generator=task.generator)
            batch = task.forget[drawn.to(task.forget.y.device)]
            weights = [w for w in named.values() if w.grad is not None]
            against = torch.autograd.grad(cross_entropy(task.model, batch), weights, allow_unused=True)
            pairs = [(w.grad, g) for w, g in zip(weights, against, strict=True) if g is not None and w.grad is not None]
            product = torch.stack([(r * f).sum() for r, f in pairs]).sum()
            square = torch.stack([f.square().sum() for _, f in pairs]).sum()
            factor = (product / square.clamp(min=1e-12)).clamp(min=0)
            for r, f in pairs:
                r.sub_(factor * f)

        return Plan(passes=lambda: [task.retain], start=start, bend=bend)


# --- methods that solve -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Influence:
    """theta <- theta + alpha H^-1 v, H^-1 by WoodFisher (Izzo et al., 2021; Singh & Alistarh, 2020; IU of SalUn).

    v = sum_f g / (f + r) - f / (f + r) sum_r g / r over the f pictures of D_f and the r of D_r.
    """

    alpha: Annotated[float, "how far to go; papers search 1 to 20"] = 1.0
    num_samples: Annotated[int, "pictures of D_r in the estimate of H, and its N"] = 1000

    def __post_init__(self) -> None:
        _require(self, alpha=(0, 1e30), num_samples=(1, 1_000_000_000))

    def solve(self, task: Task) -> Values:
        named = task.parameters()
        forget, retain = (_gradient_sum(task.model, images) for images in (task.forget, task.retain))
        v = influence_vector(forget, retain, len(task.forget), len(task.retain))
        order = torch.randperm(len(task.retain), generator=task.generator)[: self.num_samples]
        samples = _single_gradients(task.model, task.retain[order.to(task.retain.y.device)])
        k = woodfisher(samples, v, self.num_samples)
        return {name: named[name].detach() + self.alpha * step for name, step in _by_name(k, named).items()}


def influence_vector(forget_sum: Tensor, retain_sum: Tensor, num_forget: int, num_retain: int) -> Tensor:
    """v = f_sum / (f + r) - r_sum f / ((f + r) r)."""
    total = num_forget + num_retain
    return forget_sum / total - retain_sum * (num_forget / (total * num_retain))


def woodfisher(gradients: Iterator[Tensor], v: Tensor, num: int) -> Tensor:
    """H^-1 v for H = 1 + sum g g^T / num, as SalUn's code has it: one running vector o in place of H^-1 g.

    k, o = v, g_1; then for each further g: tau = o g; k -= (k g) / (num + tau) o; o -= tau / (num + tau) o.
    """
    k, o = v.clone(), None
    for g in gradients:
        if o is None:
            o = g.clone()
            continue
        tau = o @ g
        k -= (k @ g) / (num + tau) * o
        o -= tau / (num + tau) * o
    return k


@dataclass(frozen=True)
class FisherForgetting:
    """theta <- theta + N(0, 1) sqrt(alpha min(1 / F, cap)) (Golatkar et al., 2020).

    F = E_x E_{y ~ f(x)} g^2 over D_r, by one draw of y a picture: noise goes where D_r does not mind.
    """

    alpha: Annotated[float, "variance of the noise where F is 1"] = 1e-7
    cap: Annotated[float, "largest 1 / F"] = 1e3
    num_samples: Annotated[int, "pictures of D_r in the estimate of F"] = 1000

    def __post_init__(self) -> None:
        _require(self, alpha=(0, 1e30), cap=(0, 1e30), num_samples=(1, 1_000_000_000))

    def solve(self, task: Task) -> Values:
        order = torch.randperm(len(task.retain), generator=task.generator)[: self.num_samples]
        chosen = task.retain[order.to(task.retain.y.device)]
        with torch.no_grad():
            shares = torch.cat([task.model(batch.pixels) for batch in chosen.batches(256)]).softmax(1).cpu()
        drawn = torch.multinomial(shares, 1, generator=task.generator)[:, 0].to(chosen.y.device)
        named = task.parameters()
        squares = torch.zeros(sum(w.numel() for w in named.values()), device=chosen.y.device)
        for g in _single_gradients(task.model, chosen.with_labels(drawn)):
            squares += g.square()
        variance = self.alpha * (1 / (squares / len(chosen) + 1e-8)).clamp(max=self.cap)
        noise = torch.randn(len(variance), generator=task.generator).to(variance) * variance.sqrt()
        return {name: named[name].detach() + step for name, step in _by_name(noise, named).items()}


# --- gradients --------------------------------------------------------------------------------------------------------


def _relabelled(task: Task, may_be_true: bool) -> Images:
    return task.forget.with_labels(
        random_labels(task.forget.y, task.num_classes, task.generator, may_be_true=may_be_true)
    )


def _together(one: Images, other: Images) -> Images:
    return Images(torch.cat([one.x, other.x]), torch.cat([one.y, other.y]))


def _gradient_sum(model: nn.Module, images: Images) -> Tensor:
    """sum_i grad CE(f(x_i), y_i), flat, [weights]."""
    weights = list(model.parameters())
    total = torch.zeros(sum(w.numel() for w in weights), device=images.y.device)
    for batch in images.batches(256):
        total += len(batch) * _flat(torch.autograd.grad(cross_entropy(model, batch), weights))
    return total


def _single_gradients(model: nn.Module, images: Images) -> Iterator[Tensor]:
    """grad CE(f(x_i), y_i) for each picture, flat, [weights]."""
    weights = list(model.parameters())
    for one in images.batches(1):
        yield _flat(torch.autograd.grad(cross_entropy(model, one), weights))


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _by_name(flat: Tensor, named: Mapping[str, Tensor]) -> Values:
    """The parts of a flat tensor, in the parameters' shapes."""
    parts = flat.split([tensor.numel() for tensor in named.values()])
    return {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}
