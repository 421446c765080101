"""The training loop and SalUn's loss, on a toy pipeline and hand-made latents."""

import re
import shutil
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import damage
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from loaded import load_sd
from torch.nn.functional import mse_loss

from erase import files, masks, tensor_files
from erase.conditioning import Conditioning
from erase.data.latents import Data, ImageLatents
from erase.errors import EraseError
from erase.families import scope, sd, stored_unet
from erase.methods.inputs import Batch
from erase.methods.relabel import Relabel
from erase.optim import MaskedAdam
from erase.training import backward, batches, gradients, loop, memory, saliency_pass


@pytest.fixture
def model(toy_pipeline_dir) -> sd.StableDiffusion:
    return load_sd(toy_pipeline_dir)


@pytest.fixture
def data(model) -> Data:
    draw = torch.Generator().manual_seed(1)
    prompts = ("", "a cat", "a dog", "a tree", "a boat")

    def images(num: int, row: int) -> ImageLatents:
        mean = torch.randn(num, 4, 4, 4, generator=draw)
        return ImageLatents(mean, torch.full_like(mean, 0.1), torch.full((num,), row))

    anchor = torch.full((6,), 2)
    others = torch.tensor([3, 4])
    text = model.encode_text(prompts)
    words, end = torch.zeros(6, 77, dtype=torch.bool), torch.zeros(6, 77, dtype=torch.bool)
    words[:, 2:5], end[:, 5:] = True, True
    return Data(images(6, 1), images(5, 3), anchor, others, words, end, prompts, text, text[:1], "fingerprint", {})


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


RECIPE = batches.Recipe(num_steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2)


def parameters_of(model: sd.StableDiffusion, name: str = "full") -> dict[str, torch.nn.Parameter]:
    return scope.inside(dict(model.unet.named_parameters()), name)


def state_of(model: sd.StableDiffusion) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.view(torch.int32) == b.view(torch.int32)


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        replace(RECIPE, weight_decay=0.1, max_grad_norm=0.5, accumulation=2),
        pytest.param(
            replace(RECIPE, eight_bit=True),
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
        ),
    ],
)
@pytest.mark.parametrize("method", [Relabel(), Relabel(alpha=0.5, frozen_target=False, distill_retain=False)])
@pytest.mark.parametrize("scope_name", ["full", "xattn"])
def test_only_weights_inside_mask_and_scope_move(model, data, accelerator, tmp_path, recipe, method, scope_name):
    """Laws 1 and 2; buffers, VAE and text encoder stay too."""
    before, vae = state_of(model), [p.clone() for p in model.vae.parameters()]
    words = [p.clone() for p in model.text_encoder.parameters()]
    parameters = parameters_of(model, scope_name)
    mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.3, seed=0)
    loop.train(model, method, data, parameters, mask, recipe, accelerator, state_path=tmp_path / "t.pt", quiet=True)
    moved = 0
    for name, tensor in model.unet.state_dict().items():
        same = same_bits(tensor, before[name])
        allowed = mask.get(name, torch.zeros_like(same))
        assert same[~allowed].all(), name
        moved += int((~same).sum())
    assert moved > 0.9 * masks.count(mask)
    assert all(torch.equal(a, b) for a, b in zip(model.vae.parameters(), vae, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.text_encoder.parameters(), words, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in model.unet.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_bit_moves_outside_the_mask_in_mixed_precision(model, data, tmp_path, precision):
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        before, parameters = state_of(model), parameters_of(model)
        mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.3, seed=0)
        recipe = replace(RECIPE, max_grad_norm=1.0)
        path = tmp_path / "t.pt"
        losses = loop.train(model, Relabel(), data, parameters, mask, recipe, accelerator, state_path=path, quiet=True)
    finally:
        AcceleratorState._reset_state()
    assert len(losses) == recipe.num_steps
    moved = {name: ~same_bits(tensor, before[name]) for name, tensor in model.unet.state_dict().items()}
    assert not any((moved[name] & ~mask[name]).any() for name in mask)
    assert sum(int(m.sum()) for m in moved.values()) > 0.5 * masks.count(mask)


def test_the_forget_prompts_prediction_changes_and_no_steps_change_nothing(model, data, accelerator, tmp_path):
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([100, 700]), data.text[[1, 1]]
    before, state = model(x, t, c), state_of(model)
    for steps in (0, 3):
        recipe, path = replace(RECIPE, num_steps=steps), tmp_path / f"{steps}.pt"
        parameters = parameters_of(model)
        losses = loop.train(model, Relabel(), data, parameters, None, recipe, accelerator, state_path=path, quiet=True)
        assert len(losses) == steps
        unchanged = all(torch.equal(tensor, state[name]) for name, tensor in model.unet.state_dict().items())
        assert unchanged == (steps == 0)
        assert torch.equal(model(x, t, c), before) == (steps == 0)


def obviously(model, method, data, parameters, mask, recipe, accelerator, *, joint: bool) -> None:
    """The loop with nothing saved: a second UNet as the base, dense gradients, and with `joint` one backward a step."""
    unet = deepcopy(model.unet)
    optimizer = MaskedAdam(parameters, mask, lr=recipe.learning_rate)

    def base(x, t, text):
        return model.predict(unet, x, t, text)

    with gradients.taking_gradients(model, parameters, checkpointing=False):
        for step in range(recipe.num_steps):
            batch = next(batches.batches(model, data, recipe, step, recipe.batch_size, accelerator))
            terms = backward.one_by_one(method.loss(model, base, batch), accelerator)
            if joint:
                torch.stack([term for _, term in terms]).sum().backward()
            else:
                for _, term in terms:
                    term.backward()
            optimizer.step()
            optimizer.zero_grad()


MOVING = Relabel(alpha=0.5, frozen_target=False, distill_retain=False)


@pytest.mark.parametrize(
    "method, scope_name, density, checkpointing",
    [
        (Relabel(alpha=0.7), "full", 0.1, False),
        (Relabel(alpha=0.7), "full", 0.5, True),
        (Relabel(), "xattn", None, False),
        (MOVING, "xattn", 0.5, False),
        (MOVING, "full", None, True),
    ],
)
def test_what_is_saved_changes_no_bit(
    toy_pipeline_dir, data, accelerator, tmp_path, method, scope_name, density, checkpointing
):
    recipe, results = replace(RECIPE, num_steps=4), []
    for is_saving in (False, True):
        model = load_sd(toy_pipeline_dir)
        parameters = parameters_of(model, scope_name)
        shapes = {name: p.shape for name, p in parameters.items()}
        mask = None if density is None else masks.random_mask(shapes, density, seed=0)
        if is_saving:
            path = tmp_path / "t.pt"
            options = {"state_path": path, "quiet": True, "checkpointing": checkpointing}
            loop.train(model, method, data, parameters, mask, recipe, accelerator, **options)
        else:
            obviously(model, method, data, parameters, mask, recipe, accelerator, joint=True)
        results.append(state_of(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(
        not torch.equal(tensor, results[0][name])
        for name, tensor in stored_unet.load_unet(toy_pipeline_dir).state_dict().items()
    )


def test_the_exchanged_base_is_the_base_in_mixed_precision_too(toy_pipeline_dir, data, tmp_path):
    """autocast keeps rounded weights by tensor; those of the base must not be taken for the model's."""
    AcceleratorState._reset_state()
    try:
        accelerator, results = Accelerator(cpu=True, mixed_precision="bf16"), []
        for is_saving in (False, True):
            model = load_sd(toy_pipeline_dir)
            parameters = parameters_of(model)
            mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.5, seed=0)
            if is_saving:
                options = {"state_path": tmp_path / "t.pt", "quiet": True}
                loop.train(model, Relabel(), data, parameters, mask, RECIPE, accelerator, **options)
            else:
                obviously(model, Relabel(), data, parameters, mask, RECIPE, accelerator, joint=False)
            results.append(state_of(model))
    finally:
        AcceleratorState._reset_state()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# --- a UNet that is rounded while it trains -------------------------------------------------------------------------


def rounded_run(folder, data, accelerator, path, *, recipe=RECIPE, method=None, scope_name="full"):
    model = load_sd(folder)
    parameters = parameters_of(model, scope_name)
    mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.4, seed=0)
    model.round_network(torch.bfloat16)
    losses = loop.train(
        model, method or Relabel(), data, parameters, mask, recipe, accelerator, state_path=path, quiet=True
    )
    return state_of(model), mask, losses


@pytest.mark.parametrize("scope_name", ["full", "xattn"])
def test_rounded_training_ends_with_the_exact_base_outside_the_mask(
    toy_pipeline_dir, data, accelerator, tmp_path, scope_name
):
    """Steps far below bfloat16's resolution add up in the masters; without a step nothing at all has changed."""
    base = stored_unet.load_unet(toy_pipeline_dir).state_dict()
    for steps in (0, 4):
        recipe = replace(RECIPE, num_steps=steps, learning_rate=1e-4)
        path = tmp_path / f"{steps}.pt"
        after, mask, losses = rounded_run(
            toy_pipeline_dir, data, accelerator, path, recipe=recipe, scope_name=scope_name
        )
        assert len(losses) == steps
        moved = 0
        for name, tensor in after.items():
            assert tensor.dtype == torch.float32
            same = same_bits(tensor, base[name])
            assert same[~mask.get(name, torch.zeros_like(same))].all(), name
            assert (tensor - base[name]).abs().max() < 1e-3  # a rounded weight would be off by more
            moved += int((~same).sum())
        assert moved > 0.9 * masks.count(mask) if steps else moved == 0


def test_rounded_training_resumes_bit_for_bit(toy_pipeline_dir, data, accelerator, tmp_path, monkeypatch):
    expected, _, _ = rounded_run(toy_pipeline_dir, data, accelerator, tmp_path / "whole.pt")
    monkeypatch.setattr(Breaking, "calls", 0)
    with pytest.raises(Interrupted):
        rounded_run(toy_pipeline_dir, data, accelerator, tmp_path / "cut.pt", method=Breaking())
    assert len(tensor_files.read_metadata(tmp_path / "cut.pt")["losses"]) == 4
    resumed, _, _ = rounded_run(toy_pipeline_dir, data, accelerator, tmp_path / "cut.pt")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


class Interrupted(Exception):
    pass


class Breaking(Relabel):
    """Relabel that stops at its n-th call, as a power cut would."""

    calls = 0

    def loss(self, model, frozen, batch):
        type(self).calls += 1
        if type(self).calls == 6:
            raise Interrupted
        yield from super().loss(model, frozen, batch)


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    toy_pipeline_dir, data, accelerator, tmp_path, monkeypatch
):
    """Law 4; the interruption comes after step 5, the last checkpoint after step 4."""

    monkeypatch.setattr(Breaking, "calls", 0)

    def run(method: Relabel, path: Path) -> sd.StableDiffusion:
        model = load_sd(toy_pipeline_dir)
        mask = masks.random_mask({name: p.shape for name, p in parameters_of(model).items()}, 0.5, seed=0)
        parameters = parameters_of(model)
        loop.train(model, method, data, parameters, mask, RECIPE, accelerator, state_path=path, quiet=True)
        return model

    expected = run(Relabel(), tmp_path / "whole.pt")
    with pytest.raises(Interrupted):
        run(Breaking(), tmp_path / "cut.pt")
    assert len(tensor_files.read_metadata(tmp_path / "cut.pt")["losses"]) == 4
    resumed = run(Relabel(), tmp_path / "cut.pt")
    for name, tensor in expected.unet.state_dict().items():
        assert torch.equal(tensor, resumed.unet.state_dict()[name]), name


class Diverging(Relabel):
    """Relabel whose fourth step has one bad term; the last term comes when the others are backpropagated already."""

    calls, bad = 0, ""

    def loss(self, model, frozen, batch):
        type(self).calls += 1
        for name, term in super().loss(model, frozen, batch):
            yield name, term * float("nan") if (name, type(self).calls) == (self.bad, 4) else term


@pytest.mark.parametrize("bad", ["forget", "retain"])
def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_good_weights(
    model, data, accelerator, tmp_path, monkeypatch, bad
):
    monkeypatch.setattr(Diverging, "calls", 0)
    monkeypatch.setattr(Diverging, "bad", bad)
    path, parameters = tmp_path / "t.pt", parameters_of(model)
    with pytest.raises(EraseError, match="not finite at step 4 of 6"):
        loop.train(model, Diverging(), data, parameters, None, RECIPE, accelerator, state_path=path, quiet=True)
    kept, header = tensor_files.read_own(path, kind="training state")
    assert len(header["losses"]) == 3
    assert all(torch.isfinite(kept[f"weights/{name}"]).all() for name in parameters)
    assert all(torch.equal(parameter.reshape(-1), kept[f"weights/{name}"]) for name, parameter in parameters.items())


def test_a_batch_that_does_not_divide_is_refused(model, data, accelerator, tmp_path):
    recipe = replace(RECIPE, accumulation=3)
    with pytest.raises(EraseError, match="--batch-size 4 does not divide into 1 processes x .* 3"):
        loop.train(
            model, Relabel(), data, parameters_of(model), None, recipe, accelerator, state_path=tmp_path / "t.pt"
        )


def test_accumulated_gradients_are_those_of_the_whole_batch(toy_pipeline_dir, data, accelerator, tmp_path):
    """Means of equal parts are the mean of all, up to float32 rounding; Adam's first steps only see directions."""
    results = []
    for accumulation in (1, 2, 4):
        model = load_sd(toy_pipeline_dir)
        recipe = replace(RECIPE, accumulation=accumulation, num_steps=2, learning_rate=1e-3)
        path = tmp_path / f"{accumulation}.pt"
        losses = loop.train(
            model, Relabel(), data, parameters_of(model), None, recipe, accelerator, state_path=path, quiet=True
        )
        results.append((losses, model))
    for losses, _ in results[1:]:
        for step, values in enumerate(losses):
            assert values == pytest.approx(results[0][0][step], rel=1e-3)


@pytest.mark.parametrize("target", ["anchor", "random", "fixed"])
def test_the_target_prompt_is_the_one_that_was_chosen(model, data, accelerator, target):
    recipe = replace(RECIPE, target=target, batch_size=64)
    batch = next(batches.batches(model, data, recipe, 0, 64, accelerator))
    rows = {int((data.text.text_states - c).abs().sum((1, 2)).argmin()) for c in batch.c_target.text_states}
    assert rows == {"anchor": {2}, "random": {3, 4}, "fixed": {3}}[target]


def test_random_targets_without_other_classes_are_refused(model, data, accelerator, tmp_path):
    data = replace(data, others=data.others[:0])
    with pytest.raises(EraseError, match="--target random needs prompts of other classes"):
        loop.train(
            model,
            Relabel(),
            data,
            parameters_of(model),
            None,
            replace(RECIPE, target="random"),
            accelerator,
            state_path=tmp_path / "t.pt",
        )


def test_in_order_goes_through_the_forget_images_epoch_by_epoch(model, data, accelerator):
    rows = torch.tensor([0, 1, 2, 3, 4, 0])  # a prompt of its own for (nearly) every image, to tell them apart
    data = replace(data, forget=replace(data.forget, prompt=rows))
    for in_order in (True, False):
        recipe = replace(RECIPE, in_order=in_order, batch_size=3)
        parts = [next(batches.batches(model, data, recipe, s, 3, accelerator)).c_forget for s in range(4)]
        expected = data.text[torch.cat([rows, rows])].text_states
        assert torch.equal(Conditioning.cat(parts).text_states, expected) == in_order


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(data) -> Batch:
    draw = torch.Generator().manual_seed(2)
    x, eps = torch.randn(3, 4, 4, 4, generator=draw), torch.randn(3, 4, 4, 4, generator=draw)
    t = torch.tensor([10, 400, 900])
    c = data.text[[1, 1, 1]]
    others = (data.text[[2, 2, 2]], data.text[[3, 3, 3]], data.text[[0, 0, 0]])
    return Batch(x, x, eps, t, t, eps, eps, c, *others, data.words[:3], data.end[:3])


def test_the_same_words_for_the_same_latent_cost_exactly_nothing(model, batch):
    """P10: with one latent and c = c' the loss and its gradient are zero; with other words they are not."""
    same = replace(batch, c_target=batch.c_forget)
    parameters = list(model.unet.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    method = Relabel(alpha=0, frozen_target=False, distill_retain=False)
    loss = dict(method.loss(model, model, same))["forget"]
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, parameters))
    assert dict(method.loss(model, model, batch))["forget"].item() > 0


def test_the_target_takes_no_gradient(model, batch):
    """P10: the gradient is that of a constant target."""
    parameters = list(model.unet.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    method = Relabel(alpha=0, frozen_target=False, distill_retain=False)
    ours = torch.autograd.grad(dict(method.loss(model, model, batch))["forget"], parameters)
    target = model(batch.x_target, batch.t_forget, batch.c_target).detach().clone()
    loss = (model(batch.x_forget, batch.t_forget, batch.c_forget) - target).square().mean()
    for a, b in zip(ours, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_retain_loss_is_the_diffusion_loss_of_diffusers(model, batch):
    """P9: mean over all elements, no weighting, times alpha."""
    with torch.no_grad():
        terms = dict(Relabel(alpha=0.3, distill_retain=False).loss(model, model, batch))
        predicted = model.unet(batch.x_retain, batch.t_retain, encoder_hidden_states=batch.c_retain.states).sample
    assert terms["retain"].item() == pytest.approx(0.3 * mse_loss(predicted, batch.eps_retain).item(), rel=1e-6)


def test_distillation_costs_nothing_before_training(model, batch):
    with torch.no_grad():
        assert dict(Relabel(distill_retain=True).loss(model, model, batch))["retain"].item() == 0
        assert dict(Relabel(distill_retain=False).loss(model, model, batch))["retain"].item() > 0


def test_guidance_inside_the_masks_loss_has_the_references_values():
    """P6: golden values from numpy's RandomState(2), g = 7.5; the ratio of the two gradients is (1 + g) / g."""
    draw = np.random.RandomState(2)
    c, u, n = (torch.from_numpy(draw.randn(2, 4, 8, 8)).requires_grad_(True) for _ in range(3))
    loss = -(n - saliency_pass.guided(c, u, 7.5)).square().mean()
    assert loss.item() == pytest.approx(-123.29648287942993, rel=1e-9)
    grad_c, grad_u = torch.autograd.grad(loss, (c, u))
    assert grad_c.abs().sum().item() == pytest.approx(152.08686078155858, rel=1e-9)
    assert grad_u.abs().sum().item() == pytest.approx(134.19428892490464, rel=1e-9)
    torch.testing.assert_close(saliency_pass.guided(c, u, 7.5), u + 8.5 * (c - u))


# --- the mask -------------------------------------------------------------------------------------------------------


def scores_of(model, data, accelerator, tmp_path, **options):
    settings = {"score": "abs_sum", "guidance": 0.0, "batch_size": 2, "seed": 0, "quiet": True, **options}
    path = tmp_path / "sums.pt"
    return saliency_pass.accumulate(model, data, parameters_of(model), accelerator, state_path=path, **settings)


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_the_score_is_the_gradient_of_the_summed_batch_losses(model, data, accelerator, tmp_path, guidance):
    """Against one obvious backward pass over the sum of all batches' losses, drawn by the same generators."""
    scores = scores_of(model, data, accelerator, tmp_path, guidance=guidance)
    parameters = parameters_of(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss = torch.zeros(())
    for start in (0, 2, 4):
        rows = torch.tensor([start, start + 1])
        draw = batches.generator(0, "mask", start)
        x = batches.sample(data.forget, rows, draw)
        t = torch.randint(0, 1000, (2,), generator=draw)
        eps = torch.randn(x.shape, generator=draw)
        x_t = model.add_noise(x, eps, t)
        seen = saliency_pass.guided(model(x_t, t, data.text[[1, 1]]), model(x_t, t, data.text[[0, 0]]), guidance)
        loss = loss + (eps - seen).square().mean()
    for (name, score), g in zip(scores.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
        torch.testing.assert_close(score, g.abs(), rtol=1e-3, atol=1e-5, msg=name)


def test_the_score_under_attack_is_the_gradient_at_the_moved_text(model, data, accelerator, tmp_path):
    """Against a transcription in float64: one signed step from a random start in the box of r standard deviations.

    The network's own passes are float32, so the sums are equal up to their rounding; a step of the wrong sign is not.
    """
    r, parameters = 0.5, parameters_of(model)
    found = scores_of(model, data, accelerator, tmp_path, radius=r)
    assert all(torch.equal(found[n], s) for n, s in scores_of(model, data, accelerator, tmp_path, radius=r).items())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    box = r * data.text.states.double().std().item()

    def sums(step: float) -> dict[str, torch.Tensor]:
        total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
        for start in (0, 2, 4):
            rows, draw = torch.tensor([start, start + 1]), batches.generator(0, "mask", start)
            x = batches.sample(data.forget, rows, draw)
            t = torch.randint(0, 1000, (2,), generator=draw)
            eps = torch.randn(x.shape, generator=draw)
            c = data.text[[1, 1]]
            d = (box * (2 * torch.rand(c.states.shape, generator=draw) - 1)).requires_grad_(True)
            x_t = model.add_noise(x, eps, t)

            def loss(moved: torch.Tensor, x_t=x_t, t=t, c=c, eps=eps) -> torch.Tensor:
                return (eps - model(x_t, t, replace(c, states=c.states + moved))).double().square().mean()

            (g,) = torch.autograd.grad(loss(d), [d])
            attacked = (d.detach() - step * box * g.sign()).clamp(-box, box)
            assert loss(attacked) < loss(d.detach()) or step < 0
            for name, g in zip(total, torch.autograd.grad(loss(attacked), [*parameters.values()]), strict=True):
                total[name] += g
        return {name: g.abs() for name, g in total.items()}

    right, wrong = sums(1), sums(-1)
    for name, score in found.items():
        torch.testing.assert_close(score.double(), right[name], rtol=1e-3, atol=1e-5, msg=name)
    assert any(not torch.allclose(found[name].double(), wrong[name], rtol=1e-2, atol=1e-4) for name in found)


def test_parts_of_a_batch_are_attacked_alike(model, data, accelerator, tmp_path):
    whole, parts = (scores_of(model, data, accelerator, tmp_path, radius=0.5, part=part) for part in (None, 1))
    for name, score in whole.items():
        torch.testing.assert_close(parts[name], score, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("num", [4, 5])
@pytest.mark.parametrize("box", [0.0, 0.1])
def test_the_mean_loss_of_the_processes_shares_of_a_batch_is_that_of_the_batch(model, data, accelerator, num, box):
    """Of four images each of two processes has two; five do not divide, so each process has all."""

    def loss(drawn: saliency_pass.Drawn) -> torch.Tensor:
        (found,) = saliency_pass._losses(model, data, [drawn], num, 0.0, accelerator, box, 1.0)
        return found.detach()

    batch = saliency_pass._drawn(model, data, torch.arange(num), torch.Generator().manual_seed(0), box)
    of_two: list[Any] = [SimpleNamespace(num_processes=2, process_index=i) for i in (0, 1)]
    shares = [saliency_pass._share(batch, each) for each in of_two]
    assert [len(share[0]) for share in shares] == ([2, 2] if num == 4 else [5, 5])
    torch.testing.assert_close(sum(map(loss, shares)) / 2, loss(batch))


def test_an_interrupted_mask_continues_bit_for_bit(model, data, accelerator, tmp_path, monkeypatch):
    expected = scores_of(model, data, accelerator, tmp_path)
    monkeypatch.setattr(saliency_pass, "SAVE_EVERY_SECONDS", -1.0)
    original, calls = sd.StableDiffusion.__call__, []

    def cut(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted
        return original(self, *args)

    monkeypatch.setattr(sd.StableDiffusion, "__call__", cut)
    with pytest.raises(Interrupted):
        scores_of(model, data, accelerator, tmp_path)
    monkeypatch.setattr(sd.StableDiffusion, "__call__", original)
    assert tensor_files.read_metadata(tmp_path / "sums.pt")["done"] == 2
    resumed = scores_of(model, data, accelerator, tmp_path)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("score", ["abs_sum", "sum_abs", "sum_sq"])
def test_collecting_gradients_as_they_come_changes_no_bit_of_a_score(model, data, accelerator, tmp_path, score):
    """Against adding whole gradients after each pass; checkpointing must not show a gradient in two parts."""
    fast = {c: scores_of(model, data, accelerator, tmp_path, score=score, checkpointing=c) for c in (False, True)}
    sums = masks.Saliency(parameters_of(model), score)
    with gradients.taking_gradients(model, sums.parameters, checkpointing=False):
        for start in (0, 2, 4):
            draw, rows = batches.generator(0, "mask", start), torch.tensor([start, start + 1])
            x = batches.sample(data.forget, rows, draw)
            t = torch.randint(0, 1000, (2,), generator=draw)
            eps = torch.randn(x.shape, generator=draw)
            (eps - model(model.add_noise(x, eps, t), t, data.text[[1, 1]])).square().mean().backward()
            sums.add()
    slow = sums.scores()
    for name in slow:
        assert torch.equal(fast[False][name], slow[name]), name
        torch.testing.assert_close(fast[True][name], slow[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_parts_of_a_batch_add_up_to_its_score(model, data, accelerator, tmp_path, monkeypatch, guidance):
    """Batches of 4 and 2 in parts of 3 at most: 3 + 1 and 2, each weighted by its share, up to float32 rounding.

    The scores that take |g| of each batch are not sums over parts; they keep whole batches, to the bit.
    """
    original, seen = sd.StableDiffusion.__call__, []

    def spy(self, x, t, text):
        seen.append(len(x))
        return original(self, x, t, text)

    monkeypatch.setattr(sd.StableDiffusion, "__call__", spy)
    for score in ("abs_sum", "sum_abs", "sum_sq"):
        options = {"batch_size": 4, "score": score, "guidance": guidance}
        whole = scores_of(model, data, accelerator, tmp_path, **options)
        seen.clear()
        parts = scores_of(model, data, accelerator, tmp_path, part=3, **options)
        assert seen[:: 2 if guidance else 1] == ([3, 1, 2] if score == "abs_sum" else [4, 2])
        for name in whole:
            if score == "abs_sum":
                torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5, msg=name)
            else:
                assert torch.equal(parts[name], whole[name]), name


@pytest.mark.parametrize(("size", "passes"), [(2, [4, 2]), (4, [4, 2])])
def test_batches_that_go_through_a_gpu_together_have_the_score_of_each_alone(
    model, data, accelerator, tmp_path, monkeypatch, size, passes
):
    """Up to rounding; the last of 4 + 2 is short and goes alone."""
    alone = scores_of(model, data, accelerator, tmp_path, batch_size=size)
    seen: list[int] = []
    forward = type(model.unet).forward

    def counted(self: Any, sample: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(len(sample))
        return forward(self, sample, *arguments, **options)

    monkeypatch.setattr(type(model.unet), "forward", counted)
    monkeypatch.setattr(saliency_pass, "_batches_at_once", lambda *_, **__: 2)
    together = scores_of(model, data, accelerator, tmp_path, batch_size=size)
    assert seen == passes
    for name, score in alone.items():
        torch.testing.assert_close(together[name], score, rtol=1e-3, atol=1e-3 * float(score.max()) + 1e-12)


def test_free_memory_decides_how_many_batches_go_together(model, data, monkeypatch):
    each = memory.activations(model, 1, 4 * model.resolution // model.latent_shape(model.resolution)[-1],
                              torch.float32, checkpointing=False)  # fmt: skip
    for free, size, expected in ((0, 8, 1), (5 * each, 2, 2), (10**15, 8, 4), (10**15, 20, 1), (10**15, 64, 1)):
        monkeypatch.setattr(saliency_pass.device, "free_memory", lambda where, free=free: free)
        assert saliency_pass._batches_at_once(model, data, size, guided=False) == expected


def test_gradient_checkpointing_changes_no_score(model, data, accelerator, tmp_path):
    plain = scores_of(model, data, accelerator, tmp_path)
    saving = scores_of(model, data, accelerator, tmp_path, checkpointing=True)
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name], rtol=1e-5, atol=1e-7)
    assert not model.unet.is_gradient_checkpointing


# --- damaged state --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture
def interrupted(interrupted_dir, toy_pipeline_dir, data, accelerator) -> Path:
    """The state of a training that was interrupted after its fourth step; read it only."""
    path = interrupted_dir / "training.safetensors"
    if path.exists():
        return path
    Breaking.calls = 0
    with pytest.raises(Interrupted):
        resumed(toy_pipeline_dir, data, accelerator, path, Breaking())
    return path


def resumed(folder: Path, data: Data, accelerator, path: Path, method: Relabel) -> sd.StableDiffusion:
    model = load_sd(folder)
    parameters = parameters_of(model)
    mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.5, seed=0)
    loop.train(model, method, data, parameters, mask, RECIPE, accelerator, state_path=path, quiet=True)
    return model


def other_losses(header: dict) -> None:
    header["losses"] = header["losses"][:-1]


HEADERS = {"other losses": other_losses, "no optimizer": lambda header: header.pop("optimizer")}


@pytest.mark.parametrize("kind", [*damage.DAMAGES, *HEADERS])
def test_a_damaged_training_state_is_one_line_that_says_what_to_do(
    kind, interrupted, toy_pipeline_dir, data, accelerator, tmp_path
):
    """It is never used: whoever deletes it trains again from the first step (2.1, 4.10)."""
    path = Path(shutil.copy(interrupted, tmp_path / "training.safetensors"))
    damage.DAMAGES.get(kind, damage._header(HEADERS.get(kind, len)))(path)
    with pytest.raises(EraseError, match=f"{re.escape(str(path))}.*; delete it, and the same command trains") as caught:
        resumed(toy_pipeline_dir, data, accelerator, path, Relabel())
    assert "\n" not in str(caught.value)


def test_the_training_state_holds_no_weight_outside_the_mask(interrupted, toy_pipeline_dir):
    """So that whatever it holds, no such weight can move (2.1)."""
    tensors, _ = tensor_files.read_own(interrupted)
    parameters = parameters_of(load_sd(toy_pipeline_dir))
    mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.5, seed=0)
    assert {n: len(t) for n, t in tensors.items() if n.startswith("weights/")} == {
        f"weights/{name}": int(bits.sum()) for name, bits in mask.items()
    }


def test_a_state_of_another_training_is_refused(interrupted, toy_pipeline_dir, data, accelerator, tmp_path):
    """Whole files that do not belong here: of fewer weights, and of more steps."""
    path = tmp_path / "training.safetensors"
    tensors, header = tensor_files.read_own(interrupted)
    name = next(name for name in tensors if name.startswith("weights/"))
    tensor_files.write_tensors(path, tensors | {name: tensors[name][1:]}, header)
    with pytest.raises(EraseError, match="holds the weights of another training; delete it"):
        resumed(toy_pipeline_dir, data, accelerator, path, Relabel())
    header["losses"] = header["losses"] * 2
    header["state"] = files.text_hash({k: v for k, v in header.items() if k not in {"state", tensor_files.CONTENT}})
    tensor_files.write_tensors(path, tensors, header)
    with pytest.raises(EraseError, match="holds 8 steps of 6; delete it"):
        resumed(toy_pipeline_dir, data, accelerator, path, Relabel())


@pytest.mark.parametrize("kind", damage.DAMAGES)
def test_damaged_saliency_sums_are_one_line_that_says_what_to_do(kind, model, data, accelerator, tmp_path):
    """(2.2, 4.10)"""
    path, sums = tmp_path / "sums.pt", masks.Saliency(parameters_of(model))
    header = {"kind": "saliency sums", "score": "abs_sum", "done": 1}
    tensor_files.write_tensors(path, {n: t + 1 for n, t in sums.state_dict()["sums"].items()}, header)
    damage.DAMAGES[kind](path)
    with pytest.raises(EraseError, match="sums.pt.*; delete it, and the same command computes the mask again"):
        scores_of(model, data, accelerator, tmp_path)
