"""SCRUB, SFRon and DualOptim against their published equations, written down again here in float64.

As in test_classifier_fidelity.py, the transcription trains on the batches that the model was given.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifier_toy import Toy, flat, looked_up, task_of, toy
from test_classifier_fidelity import DECAY, LR, MOMENTUM, RECIPE, assert_same_change, given, trained
from torch import Tensor, nn

from erase.classification.descent import descend
from erase.classification.methods import DualOptim, DualRandomLabel, DualScrub, DualSFRon, FineTune, Scrub, SFRon, Task
from erase.classification.methods.sfron import salient
from erase.errors import EraseError


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)


def kl(f: Tensor, original: Tensor, T: float) -> Tensor:
    """T^2 sum_i q_i log(q_i / p_i), the mean over images; q is the original model's."""
    q, p = (original / T).softmax(1), (f / T).softmax(1)
    return T**2 * (q * (q / p).log()).sum(1).mean()


# --- SCRUB ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "ascent_epochs"), [(1.0, 0), (4.0, 2)])
def test_scrub_ends_where_its_equation_does(T, ascent_epochs):
    """-d over D_f in the first epochs, then alpha d + gamma CE over D_r, with d = T^2 KL(p_o^T || p^T)."""
    task, epochs = task_of(3), 5
    method = Scrub(alpha=0.3, gamma=0.7, temperature=T, ascent_epochs=ascent_epochs)
    model, seen = trained(method, task, epochs)
    theirs, original, order = toy(3).train(), toy(3), ""
    optimizer = sgd(theirs)
    for x in given(seen):
        y, gone = looked_up(task, x)
        assert gone.all() or not gone.any()
        order += "f" if gone.all() else "r"
        logits = theirs(x)
        far = kl(logits, original(x).detach(), T)
        loss = -far if gone.all() else 0.3 * far + 0.7 * F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert order == (5 * "ffrrrr" if not ascent_epochs else 2 * "ffrrrr" + 3 * "rrrr")
    assert_same_change(model, theirs, 3)


# --- SFRon ------------------------------------------------------------------------------------------------------------


def squared(task: Task, xs: list[Tensor]) -> np.ndarray:
    """Mean over batches of the squared gradient of the mean cross-entropy, in eval mode."""
    total = np.zeros(len(flat(toy(3))))
    for x in xs:
        model = toy(3)
        F.cross_entropy(model(x), looked_up(task, x)[0]).backward()
        total += np.concatenate([p.grad.view(-1).numpy() for p in model.parameters() if p.grad is not None]) ** 2
    return total / len(xs)


def masked_and_clipped(model: nn.Module, mask: np.ndarray) -> float:
    """Apply M, then scale to a norm of at most 7; returns the norm before."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    g = np.concatenate([one.reshape(-1).numpy() for one in found]) * mask
    norm = float(np.linalg.norm(g))
    g *= min(1.0, 7 / (norm + 1e-6))
    for one, new in zip(found, torch.from_numpy(g).split([one.numel() for one in found]), strict=True):
        one.copy_(new.view_as(one))
    return norm


def sfron_steps(task: Task, seen: list[tuple[bool, Tensor]], alpha: float, lam: float, period: int, epochs: int):
    """Of each step: is it on D_f, its images, and the cosine of its time. The first passes are those of M."""
    xs = given(seen)
    num, r = 4, 0  # batches of D_r in an epoch
    for x in xs:
        gone = bool(looked_up(task, x)[1].all())
        yield gone, x, (1 + math.cos(math.pi * r / (epochs * num))) / 2
        assert not gone or r % period == 0
        r += not gone
    assert r == epochs * num


@pytest.mark.parametrize("alpha", [0.4, 400.0])
def test_sfron_ends_where_its_equation_does(alpha):
    """A step on D_f before every third of D_r: grad of -alpha_t sum c CE / sum c, c = CE^-lam, times M, at most 7 long.

    M = 1 where F_f >= F_r. The second alpha is so large that the norm is cut.
    """
    task, lam, period, epochs = task_of(3), 0.5, 3, 5
    Toy.seen.clear()
    plan = SFRon(alpha=alpha, lam=lam, period=period).plan(task)
    at_start = [x for is_training, x in Toy.seen if not is_training]
    gone = [bool(looked_up(task, x)[1].all()) for x in at_start]
    forget, retain = ([x for x, g in zip(at_start, gone, strict=True) if g is kind] for kind in (True, False))
    mask = (squared(task, forget) + 1e-15) / (squared(task, retain) + 1e-15) >= 1
    assert (len(forget), len(retain)) == (2, 4) and 0.05 < mask.mean() < 0.95
    Toy.seen.clear()
    descend(task.model, plan, replace(RECIPE, epochs=epochs), task.generator)
    theirs, norms = toy(3).train(), []
    optimizer = sgd(theirs)
    for is_gone, x, cosine in sfron_steps(task, list(Toy.seen), alpha, lam, period, epochs):
        for group in optimizer.param_groups:
            group["lr"] = LR * cosine
        losses = F.cross_entropy(theirs(x), looked_up(task, x)[0], reduction="none")
        c = losses.detach() ** -lam
        optimizer.zero_grad()
        (-alpha * cosine * (c * losses).sum() / c.sum() if is_gone else losses.mean()).backward()
        if is_gone:
            norms.append(masked_and_clipped(theirs, mask))
        optimizer.step()
    assert len(norms) == 7 and (max(norms) > 7) == (alpha > 1)
    assert_same_change(task.model, theirs, 3)


def test_the_mask_of_sfron_is_larger_with_a_smaller_threshold():
    counts = [sum(int(m.sum()) for m in salient(task_of(3), threshold).values()) for threshold in (0, 0.5, 1, 2, 1e30)]
    assert counts[0] == len(flat(toy(3))) and counts[-1] == 0
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 5


# --- DualOptim --------------------------------------------------------------------------------------------------------

TOLERANCE = 3e-3  # Adam enlarges rounding where gradients are small: torch's own in float32 is as far from float64
DUAL: dict[str, Any] = {"forget_learning_rate": 0.004, "forget_decay": 1.0}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), DUAL["forget_learning_rate"], weight_decay=DUAL["forget_decay"])


def single(task: Task) -> Task:
    """The task with a model in float32, which the product's Adam needs; the transcriptions stay in float64."""
    return replace(task, model=task.model.float())


def changed(model: nn.Module, num_classes: int) -> np.ndarray:
    """The total change of all weights but one bias, whose gradient is zero but for rounding, because batch
    normalisation follows: Adam would compare the rounding."""
    named, start = (dict(one.named_parameters()) for one in (model, toy(num_classes)))
    kept = [name for name in named if name != "layer3.0.bias"]
    return np.concatenate([(named[name] - start[name]).detach().view(-1).numpy() for name in kept])


def losses_of(name: str, task: Task, model: nn.Module, x: Tensor) -> Tensor:
    """The host's loss of a batch."""
    y, gone = looked_up(task, x)
    if name == "salun-do":
        return F.cross_entropy(model(x), torch.where(gone, 1 - y, y))
    logits = model(x)
    far = kl(logits, toy(2)(x).detach(), 1)
    return -far if gone.all() else 0.5 * far + F.cross_entropy(logits, y)


@pytest.mark.parametrize(("name", "method"), [("salun-do", DualRandomLabel(**DUAL)), ("scrub-do", DualScrub(**DUAL))])
def test_dual_optim_steps_with_an_adam_of_its_own_on_the_forget_set(name, method):
    """AdamW on D_f and SGD with momentum on D_r, on the same weights. With one optimizer for both kinds of steps the
    change is another one."""
    task, epochs = single(task_of(2)), 4
    model, seen = trained(method, task, epochs)
    ends = []
    for is_dual in (True, False):
        theirs = toy(2).train()
        forget, retain = adamw(theirs), sgd(theirs)
        for x in given(seen):
            stepping = forget if is_dual and looked_up(task, x)[1].all() else retain
            stepping.zero_grad()
            losses_of(name, task, theirs, x).backward()
            stepping.step()
        ends.append(changed(theirs, 2))
    ours = changed(model, 2)
    assert np.linalg.norm(ours - ends[0]) < TOLERANCE * np.linalg.norm(ends[0])
    assert np.linalg.norm(ours - ends[1]) > 1e-2 * np.linalg.norm(ends[1])


def test_dual_optim_over_sfron_lets_both_learning_rates_fall():
    task, epochs, alpha, period = single(task_of(3)), 5, 0.4, 5
    method = DualSFRon(**DUAL, alpha=alpha, period=period)
    mask = np.concatenate([m.view(-1).numpy() for m in salient(single(task_of(3)), 1.0).values()])
    model, seen = trained(method, task, epochs)
    theirs = toy(3).train()
    forget, retain = adamw(theirs), sgd(theirs)
    for is_gone, x, cosine in sfron_steps(task, seen, alpha, 0.5, period, epochs):
        stepping, size = (forget, DUAL["forget_learning_rate"]) if is_gone else (retain, LR)
        for group in stepping.param_groups:
            group["lr"] = size * cosine
        losses = F.cross_entropy(theirs(x), looked_up(task, x)[0], reduction="none")
        c = losses.detach() ** -0.5
        stepping.zero_grad()
        (-alpha * cosine * (c * losses).sum() / c.sum() if is_gone else losses.mean()).backward()
        if is_gone:
            masked_and_clipped(theirs, mask)
        stepping.step()
    change = changed(theirs, 3)
    assert np.linalg.norm(changed(model, 3) - change) < TOLERANCE * np.linalg.norm(change)


def test_dual_optim_needs_a_method_that_names_its_steps_on_the_forget_set():
    class Wrong(DualOptim, FineTune):
        pass

    with pytest.raises(EraseError, match="DualOptim needs a method whose plan says which steps train on the forget"):
        Wrong().plan(task_of(2))


def passes_of(seen: list[tuple[bool, Tensor]], task: Task) -> Iterator[str]:
    for x in given(seen):
        yield "f" if looked_up(task, x)[1].all() else "r"


def test_sfron_uses_every_retained_image_once_an_epoch():
    task = task_of(3)
    _, seen = trained(SFRon(period=2), task, 3)
    assert "".join(passes_of(seen, task)) == 3 * "frrfrr"
    xs = [x for x in given(seen) if not looked_up(task, x)[1].any()]
    for epoch in range(3):
        images = torch.cat(xs[4 * epoch : 4 * epoch + 4]).flatten(1)
        assert len(images) == len(images.unique(dim=0)) == 14
