"""The whole job on a pretended GPU: nothing computes with tensors of two devices, and all of it in the run's precision.

`pretend_device` is what refuses mixed operands; the first tests show that it does.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pretend_device
from erase import erase_concept, models
from erase.concepts import Concept
from erase.methods import METHODS

CONCEPT = Concept(
    "cat", "object", forget=("a cat",), anchor=("a dog",), retain=("a tree", "a boat"), others=("a bird", "a car")
)
OPTIONS: dict[str, Any] = {
    "num_forget": 2,
    "num_retain": 2,
    "num_inference_steps": 2,
    "num_train_steps": 2,
    "batch_size": 2,
    "num_samples": 1,
    "generation_batch_size": 2,
    "quiet": True,
}


@pytest.fixture
def gpu():
    with pretend_device.gpu():
        yield


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(2, 3),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: torch.where(torch.ones(2, 3, dtype=torch.bool), x, x),
        lambda x: torch.ones(3)[torch.tensor([0, 1]).to("cuda")],
        lambda x: torch.nn.Linear(3, 2)(x),
        lambda x: torch.nn.Linear(3, 2).to("cuda")(x.cpu()),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: torch.randn(2, device="cuda", generator=torch.Generator()),
    ],
)
def test_the_pretended_gpu_refuses_what_a_real_one_refuses(gpu, mixed):
    with pytest.raises((RuntimeError, TypeError), match="same device|to numpy|'cuda' device type"):
        mixed(torch.ones(2, 3).to("cuda"))


def test_the_pretended_gpu_allows_what_a_real_one_allows(gpu):
    x = torch.ones(2, 3).to("cuda")
    for result in (x * torch.tensor(2.0), x[torch.tensor([0])], x[0], x.t(), torch.zeros_like(x), x.new_zeros(2)):
        assert result.device == pretend_device.GPU
    host = torch.zeros(2, 3)
    assert host.copy_(x).device == x.cpu().device == torch.device("cpu")
    layer = torch.nn.Linear(3, 2).to(x.device)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.device == layer.weight.device == x.device


def erase(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    record = erase_concept(CONCEPT, str(model), output=str(output), **{**OPTIONS, **options}).record
    assert record["compute"]["device"] == "cuda:0" and (output / "samples.png").is_file()
    return record


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_to_one_device(gpu, toy_pipeline_dir, tmp_path, method):
    record = erase(toy_pipeline_dir, tmp_path / "run", method=method)
    assert record["compute"] == {"device": "cuda:0", "precision": "bf16", "name": "pretended GPU"}
    assert record["settings"]["precision"] == "bf16" and record["weights"]["changed"] > 0
