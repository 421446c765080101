"""--optimizer dual: moments of their own for the forget and the retain gradient."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loaded import load_sd
from toy_training import CONCEPT, RECIPE, erased, gathered, state_of

from erase import erase_concept
from erase.errors import EraseError
from erase.methods.relabel import Relabel
from erase.methods.robust import Robust
from erase.optim import DualAdam, MaskedAdam
from erase.options.settings import Settings
from erase.runs import planning
from erase.training import batches, loop, memory

DUAL = replace(RECIPE, dual=True)


def change(model: Any, base: Any) -> torch.Tensor:
    both = zip(model.parameters(), base.unet.parameters(), strict=True)
    return torch.cat([(new.double() - old.double()).reshape(-1) for new, old in both])


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.slow
@pytest.mark.ci
def test_training_is_that_of_two_adams(toy_pipeline_dir, cache_dir, tmp_path, clip):
    """An independent transcription in float64 with torch's AdamW, 20 steps; one Adam for the sum is far away."""
    recipe = replace(DUAL, num_steps=20, learning_rate=1e-3, checkpoint_every=50, weight_decay=0.1, max_grad_norm=clip)
    accelerator, base, method = Accelerator(cpu=True), load_sd(toy_pipeline_dir), Relabel(alpha=3)
    data = gathered(base, method, cache_dir)
    how: dict[str, Any] = {"density": None}
    model, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "a", recipe=recipe, **how)
    single = replace(recipe, dual=False)
    other, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "b", recipe=single, **how)
    unet, frozen = deepcopy(base.unet).double().requires_grad_(True), deepcopy(base.unet).double()
    parameters = list(unet.parameters())
    adams = {name: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0) for name in ("forget", "retain")}
    for group in adams["retain"].param_groups:
        group["weight_decay"] = 0.1

    def noise(net: Any, x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        return net(x.double(), t, encoder_hidden_states=c.states.double()).sample

    for step in range(20):
        batch = next(batches.batches(base, data, recipe, step, 2, accelerator))
        seen = batch.x_retain, batch.t_retain, batch.c_retain
        with torch.no_grad():
            y, keep = noise(frozen, batch.x_target, batch.t_forget, batch.c_target), noise(frozen, *seen)
        forget = (noise(unet, batch.x_forget, batch.t_forget, batch.c_forget) - y).square().mean()
        retain = 3 * (noise(unet, *seen) - keep).square().mean()
        found = {n: torch.autograd.grad(loss, parameters) for n, loss in (("forget", forget), ("retain", retain))}
        for name in ("retain", "forget"):  # weight decay first
            for parameter, gradient in zip(parameters, found[name], strict=True):
                parameter.grad = gradient
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            adams[name].step()
    ours, one, theirs = change(model.unet, base), change(other.unet, base), change(unet, base)
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    assert (one - theirs).norm() / theirs.norm() > 0.1  # control


def test_no_weight_outside_the_mask_moves_by_one_bit(toy_pipeline_dir, cache_dir, tmp_path):
    """With the words' term of salun-robust, which belongs to the forget gradient."""
    base, method = load_sd(toy_pipeline_dir), Robust()
    data = gathered(base, method, cache_dir)
    recipe = replace(DUAL, weight_decay=0.1)
    model, mask, *_ = erased(toy_pipeline_dir, method, data, Accelerator(cpu=True), tmp_path / "a", recipe=recipe)
    before, after = state_of(base), state_of(model)
    moved = {name: before[name].view(torch.int32) != after[name].view(torch.int32) for name in mask}
    assert not any((moved[name] & ~mask[name]).any() for name in mask) and any(m.any() for m in moved.values())


def test_interrupted_and_resumed_equals_uninterrupted(toy_pipeline_dir, cache_dir, tmp_path, monkeypatch):
    data, accelerator = gathered(load_sd(toy_pipeline_dir), Relabel(), cache_dir), Accelerator(cpu=True)
    whole, *_ = erased(toy_pipeline_dir, Relabel(), data, accelerator, tmp_path / "whole", recipe=DUAL)
    step, calls = DualAdam.step, []

    def cut(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(loop.DualAdam, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        erased(toy_pipeline_dir, Relabel(), data, accelerator, tmp_path / "cut", recipe=DUAL)
    monkeypatch.setattr(loop.DualAdam, "step", step)
    again, *_ = erased(toy_pipeline_dir, Relabel(), data, accelerator, tmp_path / "cut", recipe=DUAL)
    assert all(torch.equal(tensor, again.unet.state_dict()[key]) for key, tensor in whole.unet.state_dict().items())


def test_the_estimate_is_larger_by_a_second_set_of_moments_and_the_gradients_that_are_set_aside(toy_pipeline_dir):
    """8 bytes a masked weight for the moments, as the optimizer has them, and 4 for each of the two gradients."""
    model = load_sd(toy_pipeline_dir)
    parameters = dict(model.unet.named_parameters())
    sizes: dict[str, Any] = {"density": 1.0, "resolution": 8, "mask_batch": None, "part": 2, "checkpointing": False}
    one, two = (
        memory.estimate(model, parameters, **sizes, dtype=torch.float32, copies=2 * dual, dual=bool(dual))["training"]
        for dual in (0, 1)
    )
    bytes_of = []
    for kind in (MaskedAdam, DualAdam):
        optimizer = kind(parameters, None)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(optimizer, DualAdam):
            zeros = [torch.zeros_like(parameter) for parameter in parameters.values()]
            optimizer.give(zeros, zeros)
        optimizer.step()
        bytes_of.append(optimizer.num_bytes())
    masked = sum(parameter.numel() for parameter in parameters.values())
    assert bytes_of[1] - bytes_of[0] == 8 * masked
    assert two - one == 8 * masked + 2 * 4 * masked
    given = Settings("church", optimizer="dual")
    assert planning.make_recipe(planning_settings(given), PLAN).dual


PLAN: Any = type("Plan", (), {"steps": 2, "trajectory_guidance": 3.0})()


def planning_settings(given: Settings) -> Settings:
    from erase.options.recipes import resolve

    return resolve(given, "object", {})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "esd-x"}, "--optimizer dual needs a retain gradient, and esd-x has no retain loss here"),
        ({"method": "erasediff"}, "--optimizer dual does not go with erasediff, which has steps without one"),
        ({"set": ("balancing=nash",)}, "--optimizer dual does not go with salun, which weighs the two gradients"),
        ({"weights": "bf16"}, "--optimizer dual does not go with --weights bf16"),
        ({"precision": "fp16"}, "salun compares gradients, which --precision fp16 scales"),
        ({"method": "uce"}, "--optimizer dual has no effect: uce is a closed form"),
    ],
)
def test_what_it_does_not_go_with_is_refused_before_the_first_image(toy_pipeline_dir, tmp_path, options, told):
    with pytest.raises(EraseError, match=f"^{told}"):
        few = {"quiet": True, "optimizer": "dual", **options}
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **few)
    assert not (tmp_path / "run").exists()


def test_it_reaches_the_weights_and_the_identity_of_a_run(toy_pipeline_dir, tmp_path):
    how: dict[str, Any] = dict(num_forget=4, num_retain=2, num_inference_steps=2, num_train_steps=3, batch_size=2)
    how |= dict(num_samples=0, save=("delta",), quiet=True, learning_rate=1e-2, scope="xattn-kv", mask="random")
    runs = {}
    for optimizer in ("adam", "dual"):
        out = str(tmp_path / optimizer)
        runs[optimizer] = erase_concept(CONCEPT, str(toy_pipeline_dir), output=out, optimizer=optimizer, **how).record
    assert runs["adam"].model.result_hash != runs["dual"].model.result_hash
    with pytest.raises(EraseError, match="differs in --optimizer"):
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "adam"), optimizer="dual", **how)
