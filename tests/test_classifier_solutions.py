"""Closed forms of unlearning, and the mask, against their published equations, written down again here in float64."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifier_toy import Toy, flat, key, task_of, toy
from torch import Tensor, nn

from erase.classification.data import Images
from erase.classification.descent import saliency_mask, saliency_scores
from erase.classification.methods import FisherForgetting, Influence, Task

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-13}  # float64, sums in another order


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in grads]).numpy()


def test_influence_is_its_equation():
    """theta + alpha H^-1 v by WoodFisher's recursion as SalUn's code has it, over the first N + 2 retained images."""
    task, alpha, num = task_of(3, num_retain=40), 2.5, 7
    model, f, r = toy(3), len(task.forget), len(task.retain)
    of_forget, of_retain = (
        [gradient(model, x[None], y[None]) for x, y in zip(part.pixels, part.y, strict=True)]
        for part in (task.forget, task.retain)
    )
    v = np.sum(of_forget, 0) / (f + r) - np.sum(of_retain, 0) * f / ((f + r) * r)
    k, o = v.copy(), of_retain[0].copy()
    for g in of_retain[1 : num + 2]:
        k, o = k - (k @ g) / (num + o @ g) * o, o - (o @ g) / (num + o @ g) * o
    found = Influence(alpha=alpha, num_samples=num).solve(task)
    ours = torch.cat([w.reshape(-1) for w in found.values()]).numpy() - flat(model)
    np.testing.assert_allclose(ours, alpha * k, rtol=1e-8, atol=1e-12)
    assert np.abs(k - v).max() > 1e-6 * np.abs(v).max()  # the control: H is not the identity


@pytest.mark.parametrize("is_class", [False, True])
def test_fisher_forgetting_is_its_equation(is_class):
    """var = alpha clamp(1 / (F + 1e-8), 1000), the last layer's clamped at 100; means over dimension 1; the last layer
    and vectors x 10; a forgotten class: mean 0 and variance 1e-4 (x 10) in its row. F over batches of 32 and 8."""
    task, alpha = task_of(3, num_retain=40), 1e-3
    if is_class:
        keep = task.retain.y != 1
        gone = Images(task.forget.x, torch.ones_like(task.forget.y))
        task = Task(task.model, gone, task.retain[keep.nonzero()[:, 0]], 3, task.generator, 4)
    task.generator.manual_seed(11)
    found = FisherForgetting(alpha=alpha).solve(task)
    model, generator = toy(3), torch.Generator().manual_seed(11)
    named = dict(model.named_parameters())
    information = {name: torch.zeros_like(p) for name, p in named.items()}
    batches = list(zip(task.retain.pixels.split(32), task.retain.y.split(32), strict=True))
    assert len(batches) > 1 or is_class
    for x, _ in batches:
        p = model(x).softmax(1).detach()
        for y in range(3):
            grads = torch.autograd.grad(F.cross_entropy(model(x), torch.full((len(x),), y)), list(named.values()))
            for name, g in zip(named, grads, strict=True):
                information[name] += p[:, y].mean() * g**2 / len(batches)
    for name, w in named.items():
        mean, last = w.detach().clone(), name.startswith("fc")
        var = alpha * (1 / (information[name] + 1e-8)).clamp(max=100 if last or len(w) == 3 else 1000)
        if var.dim() > 1:
            var = torch.ones_like(var) * var.mean(1, keepdim=True)
        if is_class and len(w) == 3:  # the code decides by the number of rows
            mean[1], var[1] = 0, 1e-4
        if len(w) == 3 or w.dim() == 1:
            var = var * 10
        noise = torch.randn(w.shape, generator=generator).double()
        torch.testing.assert_close(found[name], mean + var.sqrt() * noise, **EXACT)


# The mask


@pytest.mark.parametrize("score", ["abs_sum", "sum_abs", "sum_sq"])
def test_the_mask_weighs_batches_as_the_code_does(score):
    """Sums over batches of gradients of their mean loss: six images in batches of four and two. float32 sums."""
    task = task_of(3)
    model = toy(3)
    parts = zip(task.forget.pixels.split(4), task.forget.y.split(4), strict=True)
    each = [gradient(model, x, y) for x, y in parts]
    expected = {
        "abs_sum": np.abs(np.sum(each, 0)),
        "sum_abs": np.sum(np.abs(each), 0),
        "sum_sq": np.sum(np.square(each), 0),
    }[score]
    found = saliency_scores(toy(3), task.forget, score, batch_size=4)
    np.testing.assert_allclose(torch.cat([s.view(-1) for s in found.values()]), expected, rtol=1e-5, atol=1e-7)
    if score == "abs_sum":
        mask = torch.cat([bits.view(-1) for bits in saliency_mask(toy(3), task.forget, 0.3, batch_size=4).values()])
        largest = np.argsort(-expected)[: int(0.3 * len(expected))]
        assert set(mask.nonzero()[:, 0].tolist()) == set(largest.tolist())


def test_the_mask_of_a_generator_shuffles_and_augments():
    task = task_of(3)
    Toy.seen.clear()
    saliency_scores(toy(3), task.forget, batch_size=4, generator=torch.Generator().manual_seed(3))
    shuffled = torch.cat([x for _, x in Toy.seen])
    assert not torch.equal(shuffled, task.forget.pixels)
    assert {key(x) for x in shuffled} == {key(x) for x in task.forget.pixels}
    Toy.seen.clear()
    saliency_scores(toy(3), task.forget, batch_size=4, generator=torch.Generator().manual_seed(3), padding=2)
    assert {key(x) for _, batch in Toy.seen for x in batch} != {key(x) for x in task.forget.pixels}


def test_a_loader_gives_every_image_once_and_augments_as_told():
    task = task_of(3)
    in_order = torch.cat([batch.x for batch in task.loader(task.retain, 3, shuffle=False)])
    assert torch.equal(in_order, task.retain.x)
    sizes = [len(batch) for batch in task.loader(task.retain)]
    assert sizes == [4, 4, 4, 2]
    flipped = Task(
        *(getattr(task, name) for name in ("model", "forget", "retain", "num_classes", "generator")), flip=True
    )
    xs = torch.cat([batch.x for batch in islice(flipped.loader(task.retain, 1, shuffle=False), 14)])
    mirrored = [
        torch.equal(x, old.flip(2)) and not torch.equal(x, old) for x, old in zip(xs, task.retain.x, strict=True)
    ]
    assert 0 < sum(mirrored) < 14
