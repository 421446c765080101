"""Each unlearning method of classifiers against its published equation, written down again here in float64.

Methods that train take 20 steps or more, and the total change of the weights is compared. The transcription trains on
the batches that the model was given, so the order of the images is free, but the order of the passes is not.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifier_toy import Toy, flat, looked_up, task_of, toy
from scipy.optimize import nnls
from torch import Tensor, nn

from erase.classification import networks
from erase.classification.descent import Recipe, descend
from erase.classification.methods import (
    BoundaryExpand,
    BoundaryShrink,
    Descends,
    FineTune,
    GradientAscent,
    L1Sparse,
    Progress,
    RandomLabel,
    RandomLabelJoint,
    Scissorhands,
    SoftThreshold,
    Task,
)
from erase.classification.methods import scissorhands as shears
from erase.classification.methods.stages import last_stages, normalisation

LR, MOMENTUM, DECAY = 0.03, 0.9, 5e-4
RECIPE = Recipe(4, LR, batch_size=4, momentum=MOMENTUM, weight_decay=DECAY, batch_norm="moving")


def trained(method: Descends, task: Task, epochs: int) -> tuple[Toy, list[tuple[bool, Tensor]]]:
    """The model after the method, and what it was given on the way."""
    plan = method.plan(task)
    Toy.seen.clear()
    descend(task.model, plan, replace(RECIPE, epochs=epochs), task.generator)
    assert isinstance(task.model, Toy)
    return task.model, list(Toy.seen)


def replayed(
    task: Task, steps: Iterator[Callable[[Toy], Tensor]], settle: Callable[[Toy, int], None] = lambda model, step: None
) -> tuple[Toy, int]:
    """A new network after SGD on the losses, and their number."""
    model = toy(task.num_classes).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)
    num = 0
    for loss in steps:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        settle(model, num)
        num += 1
    return model, num


def assert_same_change(found: nn.Module, expected: nn.Module, num_classes: int) -> None:
    """Compare the total change of every parameter, which must not be zero everywhere."""
    start, ours, theirs = (dict(m.named_parameters()) for m in (toy(num_classes), found, expected))
    for name in start:
        change = theirs[name] - start[name]
        torch.testing.assert_close(ours[name] - start[name], change, rtol=1e-7, atol=1e-11)
    assert any((theirs[name] != start[name]).any() for name in start)


def given(seen: list[tuple[bool, Tensor]]) -> list[Tensor]:
    """The images of the forward passes in train mode."""
    return [x for is_training, x in seen if is_training]


# One pass, one loss

Equation = Callable[[Toy, Tensor, Tensor, Tensor, float], Tensor]  # model, x, y, to be forgotten?, share of epochs done
ONE_LOSS: dict[str, tuple[Descends, str, Equation]] = {
    # CE(f(x), y) over D_r
    "ft": (FineTune(), "r", lambda f, x, y, gone, e: F.cross_entropy(f(x), y)),
    # -CE(f(x), y) over D_f
    "ga": (GradientAscent(), "f", lambda f, x, y, gone, e: -F.cross_entropy(f(x), y)),
    # CE(f(x), y') over D_f, then CE(f(x), y) over D_r; of two classes y' = 1 - y
    "rl": (RandomLabel(), "fr", lambda f, x, y, gone, e: F.cross_entropy(f(x), torch.where(gone, 1 - y, y))),
    "salun-joint": (
        RandomLabelJoint(),
        "joint",
        lambda f, x, y, gone, e: F.cross_entropy(f(x), torch.where(gone, 1 - y, y)),
    ),
    # CE(f(x), y) + alpha (1 - e / E) |theta|_1 over D_r
    "l1-sparse": (
        L1Sparse(alpha=0.01),
        "r",
        lambda f, x, y, gone, e: (
            F.cross_entropy(f(x), y) + 0.01 * (1 - e) * torch.cat([p.view(-1) for p in f.parameters()]).norm(1)
        ),
    ),
}


@pytest.mark.parametrize("name", ONE_LOSS)
def test_a_method_with_one_loss_ends_where_its_equation_does(name):
    method, passes, equation = ONE_LOSS[name]
    task = task_of(2)
    per_epoch = {"r": 4, "f": 2, "fr": 6, "joint": 5}[passes]
    epochs = math.ceil(20 / per_epoch)
    model, seen = trained(method, task, epochs)
    batches = [(x, *looked_up(task, x)) for x in given(seen)]
    order = "".join({0: "r", len(gone): "f"}.get(int(gone.sum()), "x") for _, _, gone in batches)
    assert len(order) == epochs * per_epoch >= 20
    assert passes == "joint" or order == epochs * {"r": "rrrr", "f": "ff", "fr": "ffrrrr"}[passes]

    def losses() -> Iterator[Callable[[Toy], Tensor]]:
        for number, (x, y, gone) in enumerate(batches):
            done = number // per_epoch / epochs
            yield lambda f, x=x, y=y, gone=gone, done=done: equation(f, x, y, gone, done)

    assert_same_change(model, replayed(task, losses())[0], 2)


def test_boundary_shrinking_ends_where_its_equation_does():
    """CE(f(x), y') over D_f, y' = argmax_{k != y} f_o(x'), x' = round_255(clip(x + 0.1 sign grad_x CE(f_o(x), y)))."""
    task, frozen = task_of(3), toy(3)
    model, seen = trained(BoundaryShrink(), task, 10)

    def losses() -> Iterator[Callable[[Toy], Tensor]]:
        for x in given(seen):
            y, gone = looked_up(task, x)
            assert gone.all()
            moving = x.clone().requires_grad_()
            F.cross_entropy(frozen(moving), y).backward()
            assert moving.grad is not None
            moved = torch.round((x + 0.1 * moving.grad.sign()).clamp(0, 1) * 255) / 255
            answers = frozen(moved).detach().numpy()
            answers[np.arange(len(y)), y.numpy()] = -np.inf
            nearest = torch.from_numpy(answers.argmax(1))
            yield lambda f, x=x, nearest=nearest: F.cross_entropy(f(x), nearest)

    expected, num = replayed(task, losses())
    assert num == 20
    assert_same_change(model, expected, 3)


def test_boundary_expanding_ends_where_its_equation_does():
    """CE([f(x), g(x)], C) over D_f, with g a further row of the last layer that is trained too."""
    task, method = task_of(3), BoundaryExpand()
    extra = method.plan(task_of(3)).extra  # the same seed, so the same row
    row, offset = extra["weight"].detach().clone(), extra["bias"].detach().clone()
    assert row.abs().max() <= 5**-0.5 and 0 < offset.abs().max() <= 5**-0.5  # as nn.Linear(5, C + 1) initialises it
    model, seen = trained(method, task, 10)
    wide = toy(3)
    wide.fc = nn.Linear(5, 4).double()
    with torch.no_grad():
        wide.fc.weight.copy_(torch.cat([toy(3).fc.weight, row]))
        wide.fc.bias.copy_(torch.cat([toy(3).fc.bias, offset]))
    optimizer = torch.optim.SGD(wide.train().parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)
    assert len(given(seen)) == 20
    for x in given(seen):
        optimizer.zero_grad()
        F.cross_entropy(wide(x), torch.full((len(x),), 3)).backward()
        optimizer.step()
    expected = toy(3)
    state = wide.state_dict()
    state |= {"fc.weight": state["fc.weight"][:3], "fc.bias": state["fc.bias"][:3]}
    expected.load_state_dict(state)
    assert_same_change(model, expected, 3)


# SalUn-soft


def test_soft_salun_ends_where_its_equation_does_and_its_first_epoch_is_as_sparse():
    """After every step: D = theta - theta_e, tau = the z-th smallest |D|, D <- sign(D) max(|D| - tau, 0),
    z = ratio (T - (e S + 1)) / T n, with S = 2 + 4 batches in the two loaders, although the joint pass has 5."""
    task, ratio, epochs = task_of(2), 0.6, 4
    model, seen = trained(SoftThreshold(ratio=ratio), task, epochs)
    began = [flat(toy(2))]
    shares: list[float] = []

    def settle(f: Toy, step: int) -> None:
        epoch, n = step // 5, len(began[0])
        if step % 5 == 0 and step:
            began.append(last[0])
        change = flat(f) - began[-1]
        z = int(ratio * (epochs * 6 - (epoch * 6 + 1)) / (epochs * 6) * n)
        tau = np.sort(np.abs(change))[z - 1]
        new = torch.from_numpy(began[-1] + np.sign(change) * np.maximum(np.abs(change) - tau, 0))
        nn.utils.vector_to_parameters(new, f.parameters())
        last[:] = [flat(f)]
        shares.append(float(np.mean(flat(f) == began[-1])))

    last: list[np.ndarray] = []
    batches = [(x, *looked_up(task, x)) for x in given(seen)]
    losses = (lambda f, x=x, y=y, g=g: F.cross_entropy(f(x), torch.where(g, 1 - y, y)) for x, y, g in batches)
    expected, num = replayed(task, losses, settle)
    assert num == 20
    assert_same_change(model, expected, 2)
    assert shares[4] == pytest.approx(0.6 * 23 / 24, abs=0.01)
    alone = task_of(2)
    once, _ = trained(SoftThreshold(ratio=0.5), alone, 1)
    unmoved = np.mean(flat(once) == flat(toy(2)))
    assert unmoved == pytest.approx(0.5 * 5 / 6, abs=0.01)  # of one epoch with T = 6


# Scissorhands


def is_late(name: str) -> bool:
    return name.startswith(("layer3", "layer4", "fc"))


def test_scissorhands_trains_as_its_authors_do():
    """CE(f(x_r), y_r) - lam CE(f(x_f), y_f) while there are forget batches; then CE(f(x_r), y_r).

    In steps with both, d = grad in the last stages becomes d + v m if <d, m> < 0, with m = grad of -CE in eval mode at
    the start of the epoch and v the solution of min |d + v m|^2 + 0.001 v^2 subject to v >= 1/2, here as a
    non-negative least squares problem for v - 1/2.
    """
    task, lam = task_of(3), 0.3
    model, seen = trained(Scissorhands(share=0, lam=lam), task, 5)
    theirs, num, changed = toy(3).train(), 0, 0
    optimizer = torch.optim.SGD(theirs.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)
    late = [p for name, p in theirs.named_parameters() if is_late(name)]
    passes = iter(seen)
    for _ in range(5):
        (is_training, x), m = next(passes), None
        assert not is_training and looked_up(task, x)[1].all()
        proxy = copy.deepcopy(theirs).eval()
        (-F.cross_entropy(proxy(x), looked_up(task, x)[0])).backward()
        m = torch.cat([p.grad.view(-1) for name, p in proxy.named_parameters() if is_late(name) and p.grad is not None])
        for step in range(4):
            x, y = (one := next(passes)[1]), looked_up(task, one)[0]
            assert not looked_up(task, x)[1].any()
            optimizer.zero_grad()
            loss = F.cross_entropy(theirs(x), y)
            if step < 2:  # six images to forget in batches of four
                x, (y, gone) = (one := next(passes)[1]), looked_up(task, one)
                assert gone.all()
                loss = loss - lam * F.cross_entropy(theirs(x), y)
            loss.backward()
            d = torch.cat([p.grad.view(-1) for p in late])  # pyright: ignore[reportOptionalMemberAccess]
            if step < 2 and d @ m < 0:
                left = torch.cat([m, torch.tensor([0.001**0.5])]).numpy()[:, None]
                right = -torch.cat([d + 0.5 * m, torch.tensor([0.5 * 0.001**0.5])]).numpy()
                d, changed = d + (0.5 + nnls(left, right)[0][0]) * m, changed + 1
                for p, part in zip(late, d.split([p.numel() for p in late]), strict=True):
                    p.grad = part.view_as(p).clone()
            optimizer.step()
            num += 1
    assert num == 20 and changed
    assert next(passes, None) is None
    assert_same_change(model, theirs, 3)


def test_scissorhands_resets_large_saliences_of_the_last_stages_and_no_normalisation():
    """|g w| on one batch in train mode, above its (1 - share) n-th smallest value; new ones within 1 / sqrt(inputs)."""
    task, share = task_of(3), 0.2
    plan = Scissorhands(share=share).plan(task)
    assert plan.start is not None
    Toy.seen.clear()
    task.model.train()
    start = plan.start()
    ((is_training, x),) = Toy.seen
    assert is_training
    theirs = toy(3).train()
    F.cross_entropy(theirs(x), looked_up(task, x)[0]).backward()
    named = dict(theirs.named_parameters())
    scores = {name: (p.grad * p).abs().detach() for name, p in named.items() if p.grad is not None}
    line = np.sort(torch.cat([s.view(-1) for s in scores.values()]).numpy())
    least = line[int((1 - share) * len(line)) - 1]
    assert start.keys() == {"layer3.0.weight", "layer3.0.bias", "layer4.weight", "layer4.bias", "fc.weight", "fc.bias"}
    num = 0
    for name, new in start.items():
        large = scores[name] > least
        assert torch.equal(new[~large], named[name].detach()[~large])
        assert (new[large].abs() <= (named[name][0].numel() ** -0.5 if new.dim() > 1 else 0)).all()
        assert (new[large] != named[name][large]).all()
        num += int(large.sum())
    early = sum(int((s > least).sum()) for name, s in scores.items() if name not in start)
    assert num and early and num + early == len(line) - int((1 - share) * len(line))


def test_the_line_between_saliences_is_the_authors():
    """The k-th smallest; half the range where that is an end of the range, as with many zeros."""
    random = torch.from_numpy(np.random.RandomState(0).rand(100))
    assert shears.threshold(random, 0.03) == random.sort().values[96]
    many_zeros = torch.cat([torch.zeros(98), torch.tensor([1.0, 3.0])])
    assert shears.threshold(many_zeros, 0.03) == 1.5
    assert (random > shears.threshold(random, 1.0)).all()


@pytest.mark.parametrize(
    ("network", "first"), [("resnet18", "stages.2"), ("mlp", "4.weight"), ("vgg16_bn", "24.weight")]
)
def test_the_last_stages_of_a_resnet_are_the_authors(network, first):
    """layer3, layer4 and fc of their ResNet; of networks without numbered stages the last half of the layers."""
    shape = networks.Shape(network, 10, 3, 32, (0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"):
        model = networks.build(shape, seed=0)
    names = [name for name, _ in model.named_parameters()]
    start = next(i for i, name in enumerate(names) if first in name)
    assert last_stages(model) == set(names[start:])
    if network == "resnet18":
        assert all("stages.2" in n or "stages.3" in n or "classifier" in n for n in last_stages(model))
    assert normalisation(model) == {n for n, p in model.named_parameters() if p.dim() == 1 and is_norm(model, n)}


def is_norm(model: nn.Module, name: str) -> bool:
    return "Norm" in type(model.get_submodule(name.rpartition(".")[0])).__name__


def test_progress_counts_from_zero():
    """The l1 penalty and SalUn-soft read the epoch from it."""
    seen: list[Progress] = []
    task = task_of(2)
    plan = FineTune().plan(task)
    object.__setattr__(plan, "loss", lambda x, y, at: seen.append(at) or F.cross_entropy(task.model(x), y))
    descend(task.model, plan, RECIPE, task.generator)
    assert [(at.epoch, at.step) for at in seen] == [(step // 4, step) for step in range(16)]
