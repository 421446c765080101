"""Rules for the forget and the retain gradient: `conflict` of AEGIS and `hamu`, which other methods have as options."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loaded import load_sd
from scipy.optimize import minimize
from toy_training import RECIPE, erased, gathered

from erase.errors import EraseError
from erase.methods.balance import conflicting, hamu
from erase.methods.relabel import Relabel
from erase.training import batches

CASES = [[1.0, 0.5], [1.0, -0.7], [0.2, 2.0], [-1.0, 0.1], [3.0, 0.3]]  # g_r, where g_f is [1, 0]


def combined(rule: Any, g_f: torch.Tensor, g_r: torch.Tensor) -> torch.Tensor:
    w_f, w_r = rule(*(torch.dot(a, b) for a, b in ((g_f, g_f), (g_f, g_r), (g_r, g_r))))
    return w_f * g_f + w_r * g_r


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("g_r", CASES)
def test_hamu_is_the_solution_of_its_problem(g_r, share):
    """Against scipy's constrained optimiser, from several starts."""
    g_f, g_r = torch.tensor([1.5, 0.0], dtype=torch.float64), torch.tensor(g_r, dtype=torch.float64)
    d = combined(lambda *numbers: hamu(*numbers, share=share), g_f, g_r)
    assert d.norm() <= g_f.norm() + 1e-9 and torch.dot(g_f, d) >= share * g_f.square().sum() - 1e-9
    limits = [
        {"type": "ineq", "fun": lambda x: g_f.numpy() @ x - share * 2.25},
        {"type": "ineq", "fun": lambda x: 2.25 - x @ x},
    ]
    starts = ([1.0, 0.5], [1.0, -0.5], [1.4, 0.0])
    best = min(minimize(lambda x: -(g_r.numpy() @ x), x, constraints=limits).fun for x in starts)
    assert -float(torch.dot(g_r, d)) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("g_r", CASES)
def test_conflict_takes_as_much_of_the_retain_gradient_as_opposes_forgetting(g_r):
    g_f, g_r = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor(g_r, dtype=torch.float64)
    d = combined(conflicting, g_f, g_r)
    opposes = torch.dot(g_f, g_r) < 0
    assert torch.equal(d, g_f) or opposes
    assert not opposes or torch.dot(d, g_r).abs() < 1e-12


@pytest.mark.parametrize("rule", [conflicting, lambda *numbers: hamu(*numbers, share=0.5)])
def test_a_gradient_of_zero_is_no_division_by_zero(rule):
    one, zero = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for g_f, g_r in ((one, zero), (zero, one), (zero, zero), (one, one), (one, -one)):
        assert combined(rule, g_f, g_r).isfinite().all()
    assert torch.equal(combined(rule, one, zero), one)


@pytest.mark.parametrize("balancing", ["conflict", "hamu"])
def test_training_is_that_of_the_equations(toy_pipeline_dir, cache_dir, tmp_path, balancing):
    """An independent transcription in float64 on flattened gradients, 20 steps; the plain sum is far away."""
    recipe = replace(RECIPE, num_steps=20, learning_rate=1e-3, checkpoint_every=50)
    accelerator, base = Accelerator(cpu=True), load_sd(toy_pipeline_dir)
    data = gathered(base, Relabel(), cache_dir)
    how: dict[str, Any] = {"density": None, "recipe": recipe}
    model, other = (
        erased(toy_pipeline_dir, Relabel(balancing=name), data, accelerator, tmp_path / name, **how)[0]
        for name in (balancing, "sum")
    )
    unet, frozen = deepcopy(base.unet).double().requires_grad_(True), deepcopy(base.unet).double()
    parameters, num_conflicts = list(unet.parameters()), 0
    adam = torch.optim.Adam(parameters, lr=1e-3)

    def noise(net: Any, x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        return net(x.double(), t, encoder_hidden_states=c.states.double()).sample

    for step in range(20):
        b = next(batches.batches(base, data, recipe, step, 2, accelerator))
        with torch.no_grad():
            y, keep = (
                noise(frozen, *seen)
                for seen in ((b.x_target, b.t_forget, b.c_target), (b.x_retain, b.t_retain, b.c_retain))
            )
        losses = (
            (noise(unet, b.x_forget, b.t_forget, b.c_forget) - y).square().mean(),
            (noise(unet, b.x_retain, b.t_retain, b.c_retain) - keep).square().mean(),
        )
        g_f, g_r = (torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]) for loss in losses)
        size, other_size, cos = g_f.norm(), g_r.norm(), 0.0
        if other_size > 0:
            cos = float(g_f @ g_r / size / other_size)
        if balancing == "conflict":
            d = g_f - (g_f @ g_r) / other_size**2 * g_r if cos < 0 else g_f
        elif other_size == 0:
            d = g_f
        elif cos >= 0.5:
            d = size * g_r / other_size
        else:
            aside = g_r - (g_r @ g_f) / size**2 * g_f
            d = 0.5 * g_f + 0.75**0.5 * size * aside / aside.norm()
        num_conflicts += cos < 0
        for parameter, part in zip(parameters, d.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        adam.step()

    def change(net: Any) -> torch.Tensor:
        both = zip(net.parameters(), base.unet.parameters(), strict=True)
        return torch.cat([(new.double() - old.double()).reshape(-1) for new, old in both])

    ours, plain, theirs = map(change, (model.unet, other.unet, unet))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    assert (plain - theirs).norm() > 0.01 * theirs.norm() and num_conflicts  # controls


def test_a_share_out_of_range_or_without_effect_is_refused():
    for wrong in (0, 1.1):
        with pytest.raises(EraseError, match="forget_share is"):
            Relabel(balancing="hamu", forget_share=wrong)
    with pytest.raises(EraseError, match="forget_share is for balancing=hamu"):
        Relabel(forget_share=0.3)
