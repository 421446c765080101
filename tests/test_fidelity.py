"""Methods against independent transcriptions of their published code in float64: losses, and the change over 20 steps.

A transcription uses diffusers and torch alone. It is given the same random draws as this project's loop: latents, noise
and timesteps of each step.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import toy_training
from accelerate import Accelerator
from loaded import load_sd
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from toy_training import RECIPE

from erase import methods
from erase.data.latents import Data
from erase.families import scope, sd
from erase.methods.inputs import Batch
from erase.training import batches, loop

NUM_STEPS = 20
SHORT = replace(RECIPE, num_steps=NUM_STEPS, learning_rate=1e-3, checkpoint_every=100)


@pytest.fixture
def model(toy_pipeline_dir) -> sd.StableDiffusion:
    return load_sd(toy_pipeline_dir)


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
    model = load_sd(folder)
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
    print("apart", ((ours - theirs).norm() / theirs.norm()).item())
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
                retain = mse_loss(
                    noise_in(unet, batch.x_retain, batch.t_retain, batch.c_retain), batch.eps_retain.double()
                )
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


# --- Scissorhands ---------------------------------------------------------------------------------------------------

RESET = ("up_blocks.1.attentions.1.", "up_blocks.2.attentions.1.")  # output_blocks.4 and output_blocks.7
CLASSES: tuple[str, ...] = ("sparsity=0.9", "prepare_batches=3")
NUDITY = (*CLASSES, "forgetting=relabel", "guidance=0", "renewal=kaiming")


def published_scores(model: sd.StableDiffusion, steps: Iterator[Batch], guidance: float) -> dict[str, Tensor]:
    """|w| times the sum of |gradient of the diffusion loss| over the batches, of every parameter."""
    unet, _ = float64(model)
    named = dict(unet.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for batch in steps:
        predicted = noise_in(unet, batch.x_forget, batch.t_forget, batch.c_forget)
        if guidance:
            null = noise_in(unet, batch.x_forget, batch.t_forget, batch.c_empty)
            predicted = (1 + guidance) * predicted - guidance * null
        gradients = torch.autograd.grad(mse_loss(batch.eps_forget.double(), predicted), list(named.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.abs()
    return {name: (sums[name] * parameter).abs().detach() for name, parameter in named.items()}


@pytest.mark.parametrize(("options", "guidance"), [(CLASSES, 7.5), (NUDITY, 0.0)])
def test_scissorhands_resets_sensitive_weights_of_two_blocks_and_no_other(
    tiny_pipeline_dir, cache_dir, accelerator, tmp_path, monkeypatch, options, guidance
):
    """On a network with all blocks of Stable Diffusion; before the first step nothing else has changed."""
    base = load_sd(tiny_pipeline_dir)
    method = methods.make("scissorhands", {}, options)
    data = toy_training.gathered(base, method, cache_dir, size=64)
    result: dict[str, Tensor] = {}

    class Stopped(Exception):
        pass

    def stop(self: Any, *_: Any) -> None:
        raise Stopped

    model = load_sd(tiny_pipeline_dir)
    monkeypatch.setattr(loop.MaskedAdam, "step", stop)
    with pytest.raises(Stopped):
        parameters, path = dict(model.unet.named_parameters()), tmp_path / "t.safetensors"
        loop.train(model, method, data, parameters, None, SHORT, accelerator, state_path=path, quiet=True)
    result = {name: parameter.detach() for name, parameter in model.unet.named_parameters()}

    parts = (next(batches.batches(base, data, SHORT, ("prepare", i), 2, accelerator)) for i in range(3))
    scores = published_scores(base, parts, guidance)
    flat_scores = torch.cat([score.reshape(-1) for score in scores.values()])
    threshold = flat_scores.kthvalue(int(0.9 * len(flat_scores))).values
    num_reset = num_wrong = 0
    for name, before in base.unet.named_parameters():
        changed = result[name] != before
        if ".attn1." not in name or not any(block in name for block in RESET):
            assert not changed.any(), name
            continue
        expected = scores[name] > threshold
        if name.endswith("bias"):
            expected &= before != 0
            assert (result[name][changed] == 0).all()
        elif guidance:  # N(0, 0.02^2)
            assert result[name][changed].abs().lt(0.02 * 6).all()
        else:
            assert result[name][changed].abs().le((6 / before.shape[1]) ** 0.5).all()
        num_reset += int(expected.sum())
        num_wrong += int((changed != expected).sum())
    assert num_reset > 50 and num_wrong <= 0.01 * num_reset  # rounding may swap neighbours at the threshold


@pytest.mark.parametrize("options", [CLASSES, NUDITY])
def test_scissorhands_change_is_that_of_the_published_loss(
    toy_pipeline_dir, model, gathered, accelerator, tmp_path, options
):
    """L_r - lambda L_f with the concept's diffusion loss, for nudity L_r + lambda L_f with the anchor's prediction."""
    method = methods.make("scissorhands", {}, (*options, "prepare_batches=0"))
    data = gathered(method)
    ours = total_change(toy_pipeline_dir, method, data, accelerator, tmp_path / "t.safetensors")
    unet, parameters = float64(model)
    before, adam = flat(unet), torch.optim.Adam(parameters, lr=SHORT.learning_rate)
    for batch in drawn(model, data, accelerator):
        adam.zero_grad()
        seen = noise_in(unet, batch.x_forget, batch.t_forget, batch.c_forget)
        retain = mse_loss(noise_in(unet, batch.x_retain, batch.t_retain, batch.c_retain), batch.eps_retain.double())
        if options == CLASSES:
            loss = retain - 0.1 * mse_loss(seen, batch.eps_forget.double())
        else:
            pseudo = noise_in(unet, batch.x_forget, batch.t_forget, batch.c_target).detach()
            loss = retain + 0.1 * mse_loss(seen, pseudo)
        loss.backward()
        adam.step()
    assert apart(ours, flat(unet) - before) < 1e-4


# --- Selective Amnesia ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ["uniform", "anchor"])
def test_selective_amnesias_change_is_that_of_surrogate_replay_and_the_fisher_penalty(
    toy_pipeline_dir, model, gathered, accelerator, tmp_path, surrogate
):
    """Eq. 8 with F from three batches at the base; control: without the penalty the change is another one."""
    options = (f"surrogate={surrogate}", "lamb=1e4", "curvature_batches=3", "gamma=0.7")
    data = gathered(methods.make("sa", {}, options))
    ours = total_change(
        toy_pipeline_dir, methods.make("sa", {}, options), data, accelerator, tmp_path / "t.safetensors"
    )
    assert (data.forget.mean.abs().max() <= 1) == (surrogate == "uniform")
    unet, parameters = float64(model)
    fisher = [torch.zeros_like(parameter) for parameter in parameters]

    def replay(batch: Batch) -> Tensor:
        return mse_loss(noise_in(unet, batch.x_retain, batch.t_retain, batch.c_retain), batch.eps_retain.double())

    for number in range(3):
        batch = next(batches.batches(model, data, SHORT, ("curvature", number), SHORT.batch_size, accelerator))
        gradients = torch.autograd.grad(replay(batch), parameters)
        for total, gradient in zip(fisher, gradients, strict=True):
            total += gradient.square() / 3
    start, adam = [p.detach().clone() for p in parameters], torch.optim.Adam(parameters, lr=SHORT.learning_rate)
    for batch in drawn(model, data, accelerator):
        adam.zero_grad()
        seen = noise_in(unet, batch.x_forget, batch.t_forget, batch.c_forget)
        penalty = sum((f * (p - p0).square()).sum() for f, p, p0 in zip(fisher, parameters, start, strict=True))
        (mse_loss(seen, batch.eps_forget.double()) + 0.7 * replay(batch) + 1e4 * penalty).backward()
        adam.step()
    theirs = flat(unet) - torch.cat([value.reshape(-1) for value in start])
    assert apart(ours, theirs) < 1e-4
    free = methods.make("sa", {}, (*options, "lamb=0"))
    assert apart(total_change(toy_pipeline_dir, free, data, accelerator, tmp_path / "f.safetensors"), theirs) > 0.1


# --- Concept Ablation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_detached", [True, False])
def test_concept_ablations_change_is_that_of_adamw_with_the_start_token_detached_and_clipping(
    toy_pipeline_dir, model, gathered, accelerator, tmp_path, is_detached
):
    """Control: without the detached start token the transcription is far away."""
    from diffusers.models.attention_processor import Attention

    method = methods.make("ca", {"alpha": 0.0}, ())
    data, recipe = gathered(method), replace(SHORT, weight_decay=0.01, max_grad_norm=1e-3)
    path = tmp_path / "t.safetensors"
    ours = total_change(toy_pipeline_dir, method, data, accelerator, path, recipe, "xattn-kv")
    unet, parameters = float64(model, "attn2.to_k", "attn2.to_v")

    def published(layer: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        states = encoder_hidden_states
        key, value = (to(x if states is None else states) for to in (layer.to_k, layer.to_v))
        if states is not None and is_detached:
            through = torch.ones_like(key)
            through[:, :1] = 0
            key = through * key + (1 - through) * key.detach()
            value = through * value + (1 - through) * value.detach()
        q, k, v = (layer.head_to_batch_dim(part) for part in (layer.to_q(x), key, value))
        out = layer.batch_to_head_dim(layer.get_attention_scores(q, k) @ v)
        return layer.to_out[0](out)

    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(published)  # pyright: ignore[reportArgumentType]
    before, adam = flat(unet), torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01)
    for batch in drawn(model, data, accelerator, recipe):
        adam.zero_grad()
        target = noise_in(unet, batch.x_forget, batch.t_forget, batch.c_target).detach()
        mse_loss(noise_in(unet, batch.x_forget, batch.t_forget, batch.c_forget), target).backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or 0)
        adam.step()
    distance = apart(ours, flat(unet) - before)
    assert distance < 1e-3 if is_detached else distance > 0.03


def test_the_presets_of_concept_ablation_and_sdd_are_those_of_their_scripts():
    ca, sdd = methods.find("ca"), methods.find("sdd")
    assert (ca.num_train_steps, ca.learning_rate, ca.batch_size) == (200, pytest.approx(2e-6 * 4), 4)
    assert (ca.max_grad_norm, ca.weight_decay) == (1.0, 0.01)
    assert ca.defaults("nudity") | {"learning_rate": 0} == {
        **ca.defaults(),
        **{"scope": "attn", "num_train_steps": 800, "alpha": 1.0, "learning_rate": 0},
    }
    assert ca.nudity["learning_rate"] == pytest.approx(4e-6 * 4 * 2)
    assert (sdd.weight_decay, sdd.max_grad_norm, sdd.num_train_steps) == (1e-4, 1.0, 1500)


# --- trajectories: ESD, LECO, SDD -----------------------------------------------------------------------------------


def published_point(unet: Any, model: Any, noise: Tensor, time: Tensor, c: Any, empty: Any, recipe: Any) -> Tensor:
    """Latents on a new trajectory of `unet` by DDIM with guidance, at the timesteps of each row."""
    from diffusers import DDIMScheduler

    ddim: Any = DDIMScheduler.from_config(model.scheduler.config)
    ddim.set_timesteps(recipe.trajectory_steps)
    points = []
    with torch.no_grad():
        for row in range(len(noise)):
            x = noise[row : row + 1].double()
            for t in ddim.timesteps.tolist():
                if t == int(time[row]):
                    break
                at = torch.tensor([t])
                concept, null = (noise_in(unet, x, at, part[row : row + 1]) for part in (c, empty))
                x = ddim.step(null + recipe.trajectory_guidance * (concept - null), t, x).prev_sample
            points.append(x)
    return torch.cat(points)


@pytest.mark.parametrize(("name", "eta"), [("esd-x", 2.0), ("esd-u", 1.0), ("leco", 1.0)])
def test_esds_change_is_that_of_the_published_loop_on_trajectories_of_the_model_that_it_names(
    toy_pipeline_dir, model, gathered, accelerator, tmp_path, name, eta
):
    """The authors' code today follows the frozen model, their first code and LECO the edited one. The other of the two
    is far away.
    """
    method = methods.make(name, {}, ())
    data, recipe = gathered(method), replace(SHORT, learning_rate=1e-2)
    assert not data.forget.mean.any() and len(data.retain) == 1
    path = tmp_path / "t.safetensors"
    ours = total_change(toy_pipeline_dir, method, data, accelerator, path, recipe, "xattn")
    distances = {}
    for follows in ("base", "edited"):
        base, (unet, parameters) = float64(model)[0].requires_grad_(False), float64(model, ".attn2.")
        before, adam = flat(unet), torch.optim.Adam(parameters, lr=recipe.learning_rate)
        for step in range(NUM_STEPS):
            batch = next(batches.batches(model, data, recipe, step, 2, accelerator, lambda: nullcontext(model)))
            walked, t = unet if follows == "edited" else base, batch.t_forget
            x = published_point(walked, model, batch.eps_forget, t, batch.c_forget, batch.c_empty, recipe)
            concept, null = (noise_in(base, x, t, c).detach() for c in (batch.c_forget, batch.c_empty))
            start = concept if name == "esd-x" else null
            adam.zero_grad()
            mse_loss(noise_in(unet, x, t, batch.c_forget), start - eta * (concept - null)).backward()
            adam.step()
        distances[follows] = apart(ours, flat(unet) - before)
    expected = "base" if name == "esd-x" else "edited"
    assert distances.pop(expected) < 1e-3
    assert distances.popitem()[1] > 0.03


def test_sdds_change_is_that_of_the_published_loop_with_its_average_decay_and_clipping(
    toy_pipeline_dir, model, gathered, accelerator, tmp_path
):
    method = methods.make("sdd", {}, ("teacher_decay=0.9",))
    data, recipe = gathered(method), replace(SHORT, learning_rate=1e-2, weight_decay=1e-2, max_grad_norm=1e-3)
    path = tmp_path / "t.safetensors"
    ours = total_change(toy_pipeline_dir, method, data, accelerator, path, recipe, "xattn")
    distances = {}
    for clips in (True, False):
        (teacher, _), (unet, parameters) = float64(model), float64(model, ".attn2.")
        before = flat(unet)
        adam = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        for step in range(NUM_STEPS):
            batch = next(batches.batches(model, data, recipe, step, 2, accelerator, lambda: nullcontext(model)))
            t = batch.t_forget
            x = published_point(teacher, model, batch.eps_forget, t, batch.c_forget, batch.c_empty, recipe)
            adam.zero_grad()
            target = noise_in(unet, x, t, batch.c_empty).detach()
            mse_loss(target, noise_in(unet, x, t, batch.c_forget)).backward()
            if clips:
                torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or 0)
            adam.step()
            for average, parameter in zip(teacher.parameters(), unet.parameters(), strict=True):
                average.data.mul_(0.9).add_(parameter.data, alpha=0.1)
        distances[clips] = apart(ours, flat(teacher) - before)
    assert distances[True] < 1e-3 and distances[False] > 0.05
