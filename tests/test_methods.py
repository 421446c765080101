"""Every trained method: the laws of erasure on a toy pipeline, and each formula against an obvious computation."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss

from erase import data as pictures
from erase import delta, methods, models, saliency, scope, train
from erase.concepts import Concept
from erase.data import Data, Pictures
from erase.errors import EraseError
from erase.methods import METHODS, balance
from erase.methods.ablation import Ablation
from erase.methods.ascent import GradientAscent
from erase.methods.erasediff import EraseDiff
from erase.methods.esd import ESD
from erase.methods.fmn import ForgetMeNot
from erase.methods.inputs import Batch
from erase.methods.relabel import Relabel
from erase.methods.scissorhands import Scissorhands
from erase.methods.sdd import SelfDistillation
from erase.methods.soft import Soft

TRAINED = [name for name in METHODS if hasattr(methods.load(name), "loss")]
RECIPE = train.Recipe(num_steps=4, batch_size=2, learning_rate=1e-2, checkpoint_every=2, way_steps=4)
CONCEPT = Concept(
    "cat",
    "object",
    forget=("a photo of a cat", "a kitten"),
    anchor=("a photo of a dog", "a puppy"),
    retain=("a tree",),
)


@pytest.fixture
def model(toy_pipeline_dir) -> models.Model:
    return models.load(toy_pipeline_dir)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def gathered(model, cache_dir):
    """Data as a method asks for it, drawn by the toy model."""

    def gather(method: Any, **options: Any) -> Data:
        plan = pictures.Plan(
            num_forget=4,
            num_retain=3,
            steps=2,
            guidance=2.0,
            size=8,
            batch_size=4,
            seed=0,
            pictures=getattr(method, "pictures", "concept"),
            retains=getattr(method, "retains", True),
        )
        plan = replace(plan, **options)
        return pictures.gather(model, CONCEPT, plan, model_hash="toy", cache_dir=cache_dir, quiet=True)

    return gather


def made(name: str) -> Any:
    """The method, with so few preparing batches and so many new values that a toy shows them."""
    method = methods.make(name, {}, ())
    if isinstance(method, Scissorhands):
        return replace(method, sparsity=0.9, prepare_batches=2)
    return method


def state_of(model: models.Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}


def erased(folder, method, data, accelerator, path, *, recipe=RECIPE, scope_name="full", density: float | None = 0.5):
    model = models.load(folder)
    parameters = scope.inside(dict(model.unet.named_parameters()), scope_name)
    shapes = {name: p.shape for name, p in parameters.items()}
    mask = None if density is None else saliency.random_mask(shapes, density, seed=0)
    losses = train.train(model, method, data, parameters, mask, recipe, accelerator, state_path=path, quiet=True)
    return model, mask, parameters, losses


# --- the laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope_name, density", [("full", 0.3), ("xattn", 0.5), ("xattn-kv", None)])
@pytest.mark.parametrize("name", TRAINED)
def test_the_laws(toy_pipeline_dir, gathered, accelerator, tmp_path, name, scope_name, density):
    """Nothing outside mask and scope moves by one bit, what is inside does and the forget prediction with it; no step
    changes nothing; same seed, same bits; what is saved comes back exactly, and off again.
    """
    method = made(name)
    data = gathered(method)
    base = models.load(toy_pipeline_dir)
    before = state_of(base)
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([100, 700]), data.text[data.forget.prompt[:2]]

    def once(number: int, steps: int):
        recipe = replace(RECIPE, num_steps=steps, weight_decay=0.01)
        path = tmp_path / f"{number}.pt"
        return erased(
            toy_pipeline_dir, method, data, accelerator, path, recipe=recipe, scope_name=scope_name, density=density
        )

    model, mask, parameters, losses = once(0, 3)
    after = state_of(model)
    assert len(losses) == 3 and all(math.isfinite(value) for step in losses for value in step.values())
    moved = 0
    for key, tensor in after.items():
        same = tensor.view(torch.int32) == before[key].view(torch.int32)
        may_move = torch.zeros_like(same)
        if key in parameters:
            may_move = torch.ones_like(same) if mask is None else mask[key]
        assert same[~may_move].all(), key
        moved += int((~same).sum())
    assert moved > 0
    assert not torch.equal(model(x, t, c), base(x, t, c))
    assert not any(p.requires_grad or p.grad is not None for p in model.unet.parameters())

    nothing, *_ = once(1, 0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in nothing.unet.state_dict().items())
    again, *_ = once(2, 3)
    assert all(torch.equal(tensor, after[key]) for key, tensor in again.unet.state_dict().items())

    path = tmp_path / "delta.safetensors"
    delta.save(path, delta.difference(before, after, {"made_for": "toy"}))
    restored = delta.apply(before, delta.load(path))
    assert all(torch.equal(restored[key], after[key]) for key in after)
    removed = delta.remove(restored, delta.load(path))
    assert all(torch.equal(removed[key], before[key]) for key in before)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", TRAINED)
def test_interrupted_and_resumed_equals_uninterrupted(
    toy_pipeline_dir, gathered, accelerator, tmp_path, name, monkeypatch
):
    """The cut comes in the fourth step; the last checkpoint is of the second."""
    method = made(name)
    data = gathered(method)
    whole, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "whole.pt")
    step, calls = train.MaskedAdam.step, []

    def cut(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return step(self, *arguments)

    monkeypatch.setattr(train.MaskedAdam, "step", cut)
    with pytest.raises(Interrupted):
        erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "cut.pt")
    monkeypatch.setattr(train.MaskedAdam, "step", step)
    assert len(torch.load(tmp_path / "cut.pt", weights_only=True)["losses"]) == 2
    resumed, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "cut.pt")
    for key, tensor in whole.unet.state_dict().items():
        assert torch.equal(tensor, resumed.unet.state_dict()[key]), key


@pytest.mark.parametrize("name", TRAINED)
def test_parts_of_a_batch_and_checkpointing_give_what_the_whole_gives(
    toy_pipeline_dir, gathered, accelerator, tmp_path, name
):
    """One step's losses, up to float32 rounding: all are means over pictures."""
    method, results = made(name), []
    if isinstance(method, Scissorhands):
        method = replace(method, sparsity=1 - 1e-3)  # rounding must not choose other weights
    data = gathered(method)
    for accumulation in (1, 2):
        model = models.load(toy_pipeline_dir)
        parameters = dict(model.unet.named_parameters())
        recipe = replace(RECIPE, num_steps=1, accumulation=accumulation)
        path = tmp_path / f"{accumulation}.pt"
        options = {"state_path": path, "quiet": True, "checkpointing": accumulation > 1}
        results += train.train(model, method, data, parameters, None, recipe, accelerator, **options)
        assert not model.unet.is_gradient_checkpointing
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_every_method_says_what_it_costs_and_breaks():
    for name in TRAINED:
        text = str(methods.load(name).__doc__)
        assert "=" in text and "Costs" in text and "Known to break" in text, name
