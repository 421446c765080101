"""Few launches: beside the network's own passes a step starts no operation for each tensor but the one that gathers it.

Counted by torch's profiler on a CPU. The Triton kernels of the optimizer are counted but not run, so that losses and
weights mean nothing here; `test_kernels.py` runs them.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import toy_training as toy
from accelerate import Accelerator
from bench import launches
from loaded import load_sd
from test_null_space import few_states
from torch.nn import Parameter

from erase import masks
from erase.methods.relabel import Relabel
from erase.optim import DualAdam, MaskedAdam, cuda
from erase.training import loop
from erase.training.null_space import NullSpace


@pytest.fixture
def kernels(monkeypatch) -> Iterator[list[str]]:
    """The names of the kernels that are launched; the optimizers hold their masked weights as on a GPU."""
    found: list[str] = []
    names = mock.MagicMock()
    for name in ("adam", "gather", "exchange", "sgd"):
        getattr(names, name).kernel = name
    monkeypatch.setitem(sys.modules, "erase.optim.kernels", names)
    monkeypatch.setattr(cuda, "fits", lambda parameters: True)
    monkeypatch.setattr(cuda.Fused, "_launch", lambda self, kernel, *_, **__: found.append(kernel.kernel))
    yield found


def steps(num_tensors: int, kind: Any = MaskedAdam) -> Any:
    """Takes steps of an optimizer of so many tensors, each with a gathered gradient, clipped."""
    named = {f"w{i}": Parameter(torch.ones(6)) for i in range(num_tensors)}
    optimizer = kind(named, {name: torch.arange(6) % 2 == 0 for name in named})

    def take(num: int) -> None:
        for _ in range(num):
            ones = [torch.ones(3) for _ in named]
            optimizer.set_gradients(dict(zip(named.values(), ones, strict=True)))
            if isinstance(optimizer, DualAdam):
                optimizer.give(ones, [torch.ones(3) for _ in named])
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()

    return take


def overhead(num: int, kind: Any) -> float:
    """Operations of a step, without those that made its gradients."""
    found = launches.per_step(steps(num, kind))
    return launches.num_launches(found) - found["ones"]


def test_a_step_of_the_optimizer_is_one_kernel_however_many_tensors_there_are(kernels):
    """And clipping a fixed number of operations: torch counts a foreach operator once. Control: a loop over tensors."""
    few, many = overhead(4, MaskedAdam), overhead(40, MaskedAdam)
    assert few == many <= 16
    kernels.clear()
    steps(40)(3)
    assert kernels == ["adam"] * 3
    loop_over = lambda self, given: torch.stack([g.square().sum() for g, _ in given.values()]).sum()  # noqa: E731
    with mock.patch.object(cuda.Fused, "square", loop_over):
        assert overhead(40, MaskedAdam) - overhead(4, MaskedAdam) >= 36


def train(folder: Path, tmp_path: Path, name: str, scope: tuple[str, ...], **changes: Any) -> tuple[float, int]:
    """Operations of a step, and the number of tensors that are trained."""
    model: Any = load_sd(folder)
    method: Any = Relabel(balancing="nash") if name == "nash" else toy.made("sdd" if name == "sdd" else "relabel")
    data = toy.gathered(model, method, tmp_path / "cache")
    parameters = {n: p for n, p in model.unet.named_parameters() if any(part in n for part in scope)}
    shapes = {n: p.shape for n, p in parameters.items()}
    mask = masks.random_mask(shapes, 0.5, seed=0, by_rows=model.is_text_map)
    accelerator = Accelerator(cpu=True)
    null = NullSpace(model, few_states(model), 0, parameters, mask) if name == "null space" else None

    def take(num: int) -> None:
        recipe = replace(toy.RECIPE, num_steps=num, checkpoint_every=100, max_grad_norm=1.0, dual=name == "dual")
        path = tmp_path / "none.safetensors"
        how: dict[str, Any] = {"state_path": path, "quiet": True, "null": null}
        loop.train(model, method, data, parameters, mask, recipe, accelerator, **how)

    return launches.num_launches(launches.per_step(take, 1, 3)), len(parameters)


SLOW = [pytest.mark.slow, pytest.mark.ci]
OTHERS = ("nash", "dual", "sdd", "null space")


@pytest.mark.parametrize("how", ["plain", *(pytest.param(how, marks=SLOW) for how in OTHERS)])
def test_a_training_step_loops_over_no_tensors(kernels, monkeypatch, toy_pipeline_dir, tmp_path, how):
    """Between cross-attention alone and the whole UNet the backward passes grow, by the operations that make the
    gradients: 1.25 for a tensor in both branches together, half of that with one branch."""
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: torch.ones(self.shape, dtype=torch.bool))
    some, few = train(toy_pipeline_dir, tmp_path, how, (".attn2.",))
    more, many = train(toy_pipeline_dir, tmp_path, how, ("",))
    each = (more - some) / (many - few)
    assert few < 25 and many > 200 and some > 300
    assert each <= (0.7 if how == "sdd" else 1.3)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_projections_are_few_operations_however_many_text_maps_there_are(toy_pipeline_dir, density):
    model, found = load_sd(toy_pipeline_dir), []
    for part in ("mid_block.attentions.0.transformer_blocks.0.attn2.", ".attn2."):
        parameters = {n: p for n, p in model.unet.named_parameters() if part in n and model.is_text_map(n)}
        mask = masks.random_mask({n: p.shape for n, p in parameters.items()}, density, 0, by_rows=model.is_text_map)
        null = NullSpace(model, few_states(model), 0, parameters, mask)
        moved = {name: torch.ones(int(bits.sum())) for name, bits in mask.items()}
        found.append((len(parameters), launches.counted(lambda null=null, moved=moved: null.project(moved))))
    (few, of_few), (many, of_many) = found
    assert few < many and of_few == of_many and of_few["mm"] == 1
