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
from torch.nn import Parameter

from erase import masks
from erase.methods.relabel import Relabel
from erase.optim import DualAdam, MaskedAdam, cuda
from erase.training import loop


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


def train(folder: Path, tmp_path: Path, scope: str, method: Any, **changes: Any) -> tuple[float, int]:
    """Operations of a step, and the number of tensors that are trained."""
    model: Any = load_sd(folder)
    data = toy.gathered(model, method, tmp_path / "cache")
    parameters = {name: p for name, p in model.unet.named_parameters() if scope in name}
    mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.5, seed=0)
    accelerator = Accelerator(cpu=True)

    def take(num: int) -> None:
        recipe = replace(toy.RECIPE, num_steps=num, checkpoint_every=100, max_grad_norm=1.0, **changes)
        path = tmp_path / "none.safetensors"
        loop.train(model, method, data, parameters, mask, recipe, accelerator, state_path=path, quiet=True)

    return launches.num_launches(launches.per_step(take, 1, 3)), len(parameters)


SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize("how", ["plain", pytest.param("nash", marks=SLOW), pytest.param("dual", marks=SLOW)])
def test_a_training_step_loops_over_no_tensors(kernels, monkeypatch, toy_pipeline_dir, tmp_path, how):
    """Between cross-attention alone and the whole UNet the backward passes grow, by the operations that make the
    gradients: at most two for a tensor in each of two branches. Balancing adds six for its inner products."""
    method = Relabel(balancing="nash") if how == "nash" else Relabel()
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: torch.ones(self.shape, dtype=torch.bool))
    changes: dict[str, Any] = {"dual": True} if how == "dual" else {}
    some, few = train(toy_pipeline_dir, tmp_path, ".attn2.", method, **changes)
    more, many = train(toy_pipeline_dir, tmp_path, "", method, **changes)
    each = (more - some) / (many - few)
    assert few < 25 and many > 200 and some > 300
    assert each <= {"plain": 2.2, "nash": 14, "dual": 2.2}[how]
