"""The laws of erasure for every registered method, and for one of another package, on a toy pipeline."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loaded import load_sd
from toy_training import CONCEPT, RECIPE, erased, gathered, made, masked, scope_of, solved, state_of

from erase import delta, erase_concept, masks, methods, tensor_files
from erase.families.protocol import Family
from erase.methods import METHODS
from erase.methods.scissorhands import Scissorhands
from erase.options.effect import OF_TRAINING
from erase.training import loop

EXAMPLE = "contract.example_method:Unconditional"
NAMES = [*METHODS, EXAMPLE]
FORMULAS = [*{METHODS[name].path: name for name in METHODS}.values(), EXAMPLE]  # one name of each class
TRAINED = [name for name in FORMULAS if issubclass(methods.load(name), methods.TrainedMethod)]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.mark.parametrize("density", [0.3, None])
@pytest.mark.parametrize("name", NAMES)
def test_the_laws(toy_pipeline_dir, cache_dir, accelerator, tmp_path, name, density):
    """Nothing outside mask and scope moves by one bit, what is inside does and the forget prediction with it; no step
    changes nothing; same seed, same bits; what is saved comes back exactly, and off again.

    With a mask the scope is full, without one it is xattn-kv; that of closed forms is always xattn-kv.
    """
    method = made(name)
    base = load_sd(toy_pipeline_dir).for_scope(scope_of(method, "full"))
    before = state_of(base)

    def once(number: int, steps: int) -> tuple[Family, Any, Any]:
        if isinstance(method, methods.ClosedForm):
            return solved(toy_pipeline_dir, method, density=density)
        model, mask, parameters, losses = erased(
            toy_pipeline_dir,
            method,
            gathered(load_sd(toy_pipeline_dir), method, cache_dir),
            accelerator,
            tmp_path / f"{number}.pt",
            recipe=replace(RECIPE, num_steps=steps, weight_decay=0.01),
            scope_name="xattn-kv" if density is None else "full",
            density=density,
        )
        assert len(losses) == steps and all(math.isfinite(value) for step in losses for value in step.values())
        return model, mask, parameters

    model, mask, parameters = once(0, 3)
    after = state_of(model)
    moved = moved_inside(before, after, parameters, mask)
    if isinstance(method, methods.ClosedForm):
        assert mask is None or moved > 0.4 * masks.count(mask)
    else:
        nothing, *_ = once(1, 0)
        assert all(torch.equal(tensor, before[key]) for key, tensor in nothing.network.state_dict().items())
    assert moved > 0
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([100, 700]), base.encode_text(list(CONCEPT.forget))
    assert not torch.equal(model(x, t, c), base(x, t, c))
    assert not any(p.requires_grad or p.grad is not None for p in model.network.parameters())

    again, *_ = once(2, 3)
    assert all(torch.equal(tensor, after[key]) for key, tensor in again.network.state_dict().items())

    path = tmp_path / "delta.safetensors"
    delta.save(path, delta.difference(before, after, {"made_for": "toy"}))
    restored = delta.apply(before, delta.load(path))
    assert all(torch.equal(restored[key], after[key]) for key in after)
    removed = delta.remove(restored, delta.load(path))
    assert all(torch.equal(removed[key], before[key]) for key in before)


def moved_inside(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], parameters: Any, mask: Any) -> int:
    """How many weights changed; an assertion fails if one outside the mask or the scope did, by one bit."""
    moved = 0
    for key, tensor in after.items():
        same = tensor.view(torch.int32) == before[key].view(torch.int32)
        may_move = torch.zeros_like(same)
        if key in parameters:
            may_move = torch.ones_like(same) if mask is None else mask[key]
        assert same[~may_move].all(), key
        moved += int((~same).sum())
    return moved


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", TRAINED)
def test_interrupted_and_resumed_equals_uninterrupted(
    toy_pipeline_dir, cache_dir, accelerator, tmp_path, name, monkeypatch
):
    """The cut comes in the fourth step; the last checkpoint is of the second."""
    method = made(name)
    data = gathered(load_sd(toy_pipeline_dir), method, cache_dir)
    whole, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "whole.pt")
    step, calls = loop.MaskedAdam.step, []

    def cut(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return step(self, *arguments)

    monkeypatch.setattr(loop.MaskedAdam, "step", cut)
    with pytest.raises(Interrupted):
        erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "cut.pt")
    monkeypatch.setattr(loop.MaskedAdam, "step", step)
    assert len(tensor_files.read_metadata(tmp_path / "cut.pt")["losses"]) == 2
    resumed, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "cut.pt")
    for key, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[key]), key


@pytest.mark.parametrize("name", TRAINED)
def test_parts_of_a_batch_and_checkpointing_give_what_the_whole_gives(
    toy_pipeline_dir, cache_dir, accelerator, tmp_path, name
):
    """One step's losses, up to float32 rounding: all are means over images."""
    method, results = made(name), []
    if isinstance(method, Scissorhands):
        method = replace(method, sparsity=1 - 1e-3)  # rounding must not choose other weights
    data = gathered(load_sd(toy_pipeline_dir), method, cache_dir)
    for accumulation in (1, 2):
        model, parameters, _ = masked(toy_pipeline_dir, scope_of(method, "full"), None)
        recipe = replace(RECIPE, num_steps=1, accumulation=accumulation)
        path = tmp_path / f"{accumulation}.pt"
        options = {"state_path": path, "quiet": True, "checkpointing": accumulation > 1}
        results += loop.train(model, method, data, parameters, None, recipe, accelerator, **options)
        assert not model.unet.is_gradient_checkpointing
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_every_method_says_what_it_costs_and_breaks():
    for name in METHODS:
        text = str(methods.load(name).__doc__)
        assert "=" in text and "Costs" in text and "Known weakness" in text, name


SIZES: dict[str, Any] = dict(num_forget=4, num_retain=2, num_inference_steps=2, num_train_steps=2, batch_size=2)
FEW = {"scissorhands": ("prepare_batches=1", "sparsity=0.5"), "speed": ("threshold=0.5",)}
FEW["advunlearn"] = ("warm_up=1", "attack_steps=2")
FEW["stereo"] = FEW["recare"] = ("words=1", "word_steps=2")


@pytest.mark.parametrize("name", FORMULAS)
def test_a_whole_run_with_a_mask_records_its_method(toy_pipeline_dir, tmp_path, name):
    """--mask saliency needs images of the concept, whatever the method itself looks at."""
    method = made(name)
    concept = CONCEPT if method.retains else replace(CONCEPT, retain=())
    sizes = {**SIZES, "learning_rate": 1e-2}
    if isinstance(method, methods.ClosedForm):
        sizes = {key: value for key, value in sizes.items() if key not in OF_TRAINING}
    run = erase_concept(
        concept,
        str(toy_pipeline_dir),
        method=name,
        mask="saliency",
        scope=scope_of(method, "xattn-kv"),
        output=str(tmp_path / "run"),
        num_samples=0,
        save=("delta",),
        set=FEW.get(name, ()),
        quiet=True,
        **sizes,
    )
    assert run.record.method["name"] == name
    assert run.record.mask and 0 < run.record.weights.changed <= run.record.mask.ones
    assert (run.record.plugin is not None) == (name == EXAMPLE)
    if isinstance(method, methods.TrainedMethod):
        assert len(run.record.losses) == 2
        assert run.record.data["num_retain"] == (2 if method.retains else 1)


@pytest.mark.slow
@pytest.mark.ci
def test_a_method_of_another_package_runs_from_the_command_line(toy_pipeline_dir, tmp_path):
    """Its change is inside the mask, undone exactly, and the same as that of the same call in Python."""
    flags = {"--concept": "cat", "--kind": "object", "--model": str(toy_pipeline_dir), "--method": EXAMPLE}
    flags |= {"--set": "weight=2", "--scope": "xattn-kv", "--mask": "random", "--density": "0.5", "--device": "cpu"}
    flags |= {"--num-samples": "0", "--save": "delta", "--learning-rate": "0.01"}
    flags |= {f"--{name.replace('_', '-')}": str(value) for name, value in SIZES.items()}
    command = [sys.executable, "-m", "erase.cli", "--quiet", *(part for flag in flags.items() for part in flag)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent.parent)])}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["method"] == {"name": EXAMPLE, "weight": 2.0}
    assert record["plugin"] == {"class": EXAMPLE, "distribution": None, "version": None}
    change = delta.load(tmp_path / "run" / "delta.safetensors")
    mask, _ = masks.load(tmp_path / "run" / "mask.safetensors")
    base = {f"unet.{key}": tensor for key, tensor in load_sd(toy_pipeline_dir).unet.state_dict().items()}
    after = delta.apply(base, change)
    inside = {f"unet.{key}": bits for key, bits in mask.items()}
    assert moved_inside(base, after, inside, inside) == record["weights"]["changed"] > 0
    assert all(torch.equal(tensor, base[key]) for key, tensor in delta.remove(after, change).items())
