"""Methods against independent transcriptions of their published code in float64: losses, and the change over 20 steps.

A transcription uses diffusers and torch alone. It is given the same random draws as this project's loop: latents, noise
and timesteps of each step.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import toy_training
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from toy_training import RECIPE

from erase import methods
from erase.data.latents import Data
from erase.families import loading, scope, sd
from erase.methods.inputs import Batch
from erase.training import batches, loop

NUM_STEPS = 20
SHORT = replace(RECIPE, num_steps=NUM_STEPS, learning_rate=1e-3, checkpoint_every=100)


@pytest.fixture
def model(toy_pipeline_dir) -> sd.StableDiffusion:
    return loading.load(toy_pipeline_dir)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def gathered(model, cache_dir) -> Callable[..., Data]:
    return lambda method, **options: toy_training.gathered(model, method, cache_dir, **options)


def noise_in(unet: Any, x: Tensor, t: Tensor, c: Any) -> Tensor:
    return unet(x.double(), t, encoder_hidden_states=c.states.double()).sample


def flat(unet: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1).double() for parameter in unet.parameters()])


def total_change(
    folder: Any, method: Any, data: Data, accelerator: Accelerator, path: Any, recipe: Any = SHORT, scope_name="full"
) -> Tensor:
    """By this project's loop, of all weights."""
    model = loading.load(folder)
    before = flat(model.unet)
    parameters = scope.inside(dict(model.unet.named_parameters()), scope_name)
    loop.train(model, method, data, parameters, None, recipe, accelerator, state_path=path, quiet=True)
    return flat(model.unet) - before


def float64(model: sd.StableDiffusion, *parts: str) -> tuple[Any, list[nn.Parameter]]:
    """A copy of the UNet in float64, and its parameters whose names hold one of the parts."""
    unet = deepcopy(model.unet).double()
    chosen = [p for name, p in unet.named_parameters() if not parts or any(part in name for part in parts)]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return unet, chosen


def drawn(model: sd.StableDiffusion, data: Data, accelerator: Accelerator, recipe: Any = SHORT) -> Iterator[Batch]:
    """The batches of one step after the other, for images that do not depend on the training."""
    for step in range(recipe.num_steps):
        yield next(batches.batches(model, data, recipe, step, recipe.batch_size, accelerator))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||."""
    return ((ours - theirs).norm() / theirs.norm()).item()


# --- EraseDiff ------------------------------------------------------------------------------------------------------


def published_erasediff(
    model: sd.StableDiffusion, steps: Iterator[Batch], *, epochs: int, rounds: int, length: int, weight: float
) -> Tensor:
    """The total change after the published loop: in each epoch, `rounds` times, `length` steps of Adam down L_f, back
    to the weights that the epoch began with, and `length` steps down L_r + weight L_f. There is one Adam in all.
    """
    unet, parameters = float64(model)
    before, adam = flat(unet), torch.optim.Adam(parameters, lr=SHORT.learning_rate)

    def forget(batch: Batch) -> Tensor:
        pseudo = noise_in(unet, batch.x_target, batch.t_forget, batch.c_target).detach()
        return mse_loss(noise_in(unet, batch.x_forget, batch.t_forget, batch.c_forget), pseudo)

    for _ in range(epochs):
        start = [parameter.detach().clone() for parameter in parameters]
        for _ in range(rounds):
            for _ in range(length):
                adam.zero_grad()
                forget(next(steps)).backward()
                adam.step()
            for parameter, value in zip(parameters, start, strict=True):
                parameter.data.copy_(value)
            for _ in range(length):
                adam.zero_grad()
                batch = next(steps)
                retain = mse_loss(noise_in(unet, batch.x_retain, batch.t_retain, batch.c_retain), batch.eps_retain)
                (retain + weight * forget(batch)).backward()
                adam.step()
    return flat(unet) - before


@pytest.mark.parametrize(
    ("options", "epochs", "rounds", "weight"),
    [((), 2, 1, 1.0), (("epochs=1", "rounds=2", "forget_weight=0.5"), 1, 2, 0.5)],
)
def test_erasediffs_change_is_that_of_the_published_loop_with_its_one_adam(
    toy_pipeline_dir, model, gathered, accelerator, tmp_path, options, epochs, rounds, weight
):
    method = methods.make("erasediff", {}, options)
    data = gathered(method)
    ours = total_change(toy_pipeline_dir, method, data, accelerator, tmp_path / "t.safetensors")
    steps, length = drawn(model, data, accelerator), NUM_STEPS // (2 * epochs * rounds)
    theirs = published_erasediff(model, steps, epochs=epochs, rounds=rounds, length=length, weight=weight)
    assert next(steps, None) is None
    assert apart(ours, theirs) < 1e-4  # float32 against float64
    joint = replace(method, epochs=1, rounds=1)  # control: another order of the same steps is far away
    other = total_change(toy_pipeline_dir, joint, data, accelerator, tmp_path / "other.safetensors")
    assert apart(other, theirs) > 0.1
