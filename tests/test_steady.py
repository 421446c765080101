"""Steady training steps do not wait for a GPU, and a bad step that is found late leaves what one found at once leaves.

On a pretended GPU, which sees every number that the host reads, and once on a real one.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
import toy_training as toy
from accelerate import Accelerator
from loaded import load_sd

from erase import masks, methods, tensor_files
from erase.errors import EraseError
from erase.methods.relabel import Relabel
from erase.methods.robust import Robust
from erase.methods.sdd import SelfDistillation
from erase.methods.soft import Soft
from erase.optim import MaskedAdam
from erase.training import loop, losses

TRAINED = [name for name in methods.METHODS if isinstance(toy.made(name), methods.TrainedMethod)]
RECIPE = replace(toy.RECIPE, num_steps=14, checkpoint_every=100, trajectory_steps=3, max_grad_norm=1.0)


@contextmanager
def ten_steps(begin: Any, end: Any) -> Iterator[None]:
    """Inside, `begin` is called after the second step of an optimizer and `end` after the twelfth."""
    plain, taken = MaskedAdam.step, [0]

    def step(self: MaskedAdam, *arguments: Any) -> Any:
        result = plain(self, *arguments)
        taken[0] += 1
        if taken[0] in (2, 12):
            (begin if taken[0] == 2 else end)()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedAdam, "step", step)
        yield
    assert taken[0] >= 12


def train(folder: Path, method: Any, path: Path, *, device: str, recipe: Any = RECIPE) -> Any:
    """Train the toy pipeline, masked; returns its model, on the device."""
    model = load_sd(folder, device=device)
    data = toy.gathered(model, method, path.parent / "cache")
    model = model.for_scope(scope := toy.scope_of(method, "full"))
    parameters = {name: p for name, p in model.trainable(scope).items() if ".attn2." in name or scope == "text"}
    mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.5, seed=0)
    accelerator = Accelerator(cpu=device == "cpu")
    loop.train(model, method, data, parameters, mask, recipe, accelerator, state_path=path, quiet=True)
    return model


def waits_of(
    folder: Path, method: Any, path: Path, free: int = 10**12, graphs: bool = False, **options: Any
) -> list[str]:
    """What made the host wait in ten steady steps on the pretended GPU."""
    found: list[str] = []
    with pretend_device.gpu(free=free, graphs=graphs), pretend_device.waits() as seen:
        with ten_steps(seen.clear, lambda: found.extend(seen)):
            train(folder, method, path, device="cuda", **options)
    return found


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", TRAINED)
def test_ten_steady_steps_wait_for_nothing(toy_pipeline_dir, tmp_path, name):
    """EraseDiff and STEREO read their losses when the weights are put back, and not in the ten steps before."""
    steps = 60 if name in {"erasediff", "stereo", "recare"} else 14
    recipe = replace(RECIPE, num_steps=steps)
    assert waits_of(toy_pipeline_dir, toy.made(name), tmp_path / "t.pt", recipe=recipe) == []


def test_ten_steps_that_are_replayed_wait_for_nothing(toy_pipeline_dir, tmp_path):
    recipe = replace(RECIPE, num_steps=loop.REPAYS)
    assert waits_of(toy_pipeline_dir, Relabel(), tmp_path / "t.pt", graphs=True, recipe=recipe) == []


def test_without_room_for_a_copy_ten_steady_steps_wait_for_nothing_either(toy_pipeline_dir, tmp_path):
    assert waits_of(toy_pipeline_dir, toy.made("esd-x"), tmp_path / "t.pt", free=0) == []


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "method",
    [Relabel(balancing="nash"), replace(toy.made("scissorhands"), balancing="gem"), Soft(distill_retain=False)],
    ids=["nash", "gem", "soft"],
)
def test_gradients_are_weighed_without_waiting(toy_pipeline_dir, tmp_path, method):
    assert waits_of(toy_pipeline_dir, method, tmp_path / "t.pt") == []


class Reading(Relabel):
    """Relabel that looks at its loss."""

    def loss(self, model: Any, frozen: Any, batch: Any) -> Any:
        for name, term in super().loss(model, frozen, batch):
            float(term.detach())
            yield name, term


@pytest.mark.slow
@pytest.mark.ci
def test_a_method_that_reads_its_loss_is_seen(toy_pipeline_dir, tmp_path):
    """Control."""
    assert waits_of(toy_pipeline_dir, Reading(), tmp_path / "t.pt", free=0) == ["_local_scalar_dense"] * 20


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0])],
        lambda x: x.cpu(),
        lambda x: torch.ones(1).to("cuda"),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x.copy_(torch.ones(1)),
        lambda x: torch.ones(1).copy_(x),
        lambda x: x.repeat_interleave(torch.ones(1, dtype=torch.int64, device="cuda")),
    ],
)
def test_the_pretended_gpu_sees_who_waits(waiting):
    with pretend_device.gpu():
        x = torch.ones(1).to("cuda")
        with pretend_device.waits() as found:
            waiting(x)
    assert found


def test_the_pretended_gpu_does_not_see_what_nobody_waits_for():
    with pretend_device.gpu():
        x = torch.ones(3).to("cuda")
        with pretend_device.waits() as found:
            y = (x * 2.0 + torch.zeros(3, device="cuda"))[x.long()]
            y[0] = 1.0
            torch.where(y > 0, y, x).sum()
            torch.ones(3).to("cuda", non_blocking=True)
            torch.ones(3).sum().item()
    assert found == []


# --- a bad step ---------------------------------------------------------------------------------------------------


class Diverging(Relabel):
    """The forget term of step 4 is NaN; a step asks for the loss once."""

    calls = 0

    def loss(self, model: Any, frozen: Any, batch: Any) -> Any:
        type(self).calls += 1
        for name, term in super().loss(model, frozen, batch):
            yield name, term * float("nan") if (name, type(self).calls) == ("forget", 4) else term


class DivergingSoft(Diverging, Soft):
    pass


class DivergingTeacher(SelfDistillation):
    calls = 0

    def loss(self, model: Any, frozen: Any, batch: Any) -> Any:
        type(self).calls += 1
        for name, term in super().loss(model, frozen, batch):
            yield name, term * float("nan") if type(self).calls == 4 else term


class DivergingWords(Robust):
    calls = 0

    def loss(self, model: Any, frozen: Any, batch: Any) -> Any:
        type(self).calls += 1
        for name, term in super().loss(model, frozen, batch):
            yield name, term * float("nan") if (name, type(self).calls) == ("words", 4) else term


@pytest.mark.parametrize(
    ("kind", "eight_bit", "every"),
    [
        (Diverging, False, 6),
        (Diverging, True, 25),
        (DivergingSoft, False, 25),
        (DivergingTeacher, False, 25),
        (DivergingWords, False, 25),
    ],
)
def test_a_bad_step_that_is_found_late_leaves_what_one_found_at_once_leaves(
    toy_pipeline_dir, tmp_path, monkeypatch, kind, eight_bit, every
):
    """Weights, moments, the count of steps and the average, bit for bit: on the CPU losses are read before each step.

    The GPU reads them after the last step, or before the sixth, which was not taken then. Control: that the stored
    weights are not the base's.
    """
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(losses, "READ_EVERY", every)
    recipe = replace(RECIPE, num_steps=10, eight_bit=eight_bit)
    stored = {}
    for where in ("cpu", "cuda"):
        monkeypatch.setattr(kind, "calls", 0)
        path = tmp_path / where / "state.safetensors"
        path.parent.mkdir()
        with pretend_device.gpu(free=0) if where == "cuda" else nullcontext():
            with pytest.raises(EraseError, match="not finite at step 4 of 10"):
                train(toy_pipeline_dir, kind(), path, device=where, recipe=recipe)
        stored[where] = tensor_files.read_own(path, kind="training state")
        assert kind.calls == {"cpu": 4, "cuda": 10 if every == 25 else 6}[where]
    (ours, header), (theirs, expected) = stored["cuda"], stored["cpu"]
    assert len(header["losses"]) == 3 and json.dumps(header) == json.dumps(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)), name
    base = load_sd(toy_pipeline_dir).unet.state_dict()
    sums = {name: base[name.removeprefix("weights/")].sum() for name in ours if name.startswith("weights/")}
    assert any(ours[name].sum() != value for name, value in sums.items())


def test_losses_are_those_of_the_cpu_and_read_in_order(toy_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "READ_EVERY", 3)
    found = {}
    for where in ("cpu", "cuda"):
        path = tmp_path / where / "state.safetensors"
        path.parent.mkdir()
        with pretend_device.gpu(free=0) if where == "cuda" else nullcontext():
            recipe = replace(RECIPE, num_steps=8, checkpoint_every=7)
            train(toy_pipeline_dir, Relabel(), path, device=where, recipe=recipe)
        found[where] = tensor_files.read_metadata(path)["losses"]
    assert found["cpu"] == found["cuda"] and len(found["cpu"]) == 7


@pytest.mark.parametrize("k", [1, 50, 101, 400])
def test_the_threshold_on_a_gpu_is_the_cpus_and_nobody_waits(k):
    draw = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(300, generator=draw), "ties": torch.rand(100, generator=draw).mul(5).round()}
    with pretend_device.gpu():
        there = {name: score.to("cuda") for name, score in scores.items()}
        with pretend_device.waits() as found:
            threshold = masks.threshold(there, k)
        assert found == [] and threshold.cpu().item() == masks.kth_largest(scores, k) == masks.threshold(scores, k)


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TRAINED)
def test_torch_sees_no_wait_in_ten_steady_steps(toy_pipeline_dir, tmp_path, name):
    def mode(name: str) -> Any:
        return lambda: torch.cuda.set_sync_debug_mode(name)

    recipe = replace(RECIPE, num_steps=60 if name == "erasediff" else 14)
    try:
        with ten_steps(mode("error"), mode("default")):
            train(toy_pipeline_dir, toy.made(name), tmp_path / "t.pt", device="cuda", recipe=recipe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
