"""The recipe for class forgetting in pixel diffusion of CIFAR-10, at toy sizes on random images."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cifar10_diffusion as recipe
import numpy as np
import pytest
import torch
from gpu_parts import models
from torch import nn

from erase.evaluation import quality


def test_the_frechet_distance_is_that_of_the_evaluation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 8)).astype(np.float32), 1.5 * rng.normal(size=(80, 8)).astype(np.float32) + 0.3
    assert recipe.frechet(a, b) == pytest.approx(quality.fid(a, b), rel=1e-4)
    assert recipe.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_the_network_of_the_protocol_has_about_ten_million_weights():
    from diffusers import UNet2DModel

    sizes, levels = recipe.Sizes(), 4
    blocks: Any = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
    unet = UNet2DModel(block_out_channels=sizes.channels, layers_per_block=2, add_attention=False,
                       norm_num_groups=8, num_class_embeds=11, **blocks)  # fmt: skip
    assert unet.num_parameters() == pytest.approx(10.4e6, rel=0.1)


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The exit code of the script."""
    monkeypatch.setattr(sys, "argv", ["cifar10_diffusion.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        recipe.main()
    return stop.value.code


def test_bad_input_is_one_line_and_an_interrupt_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    """A machine without a GPU, a folder that is not there, one that holds other classes, and Ctrl-C."""
    output = ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start(monkeypatch, "--data", str(tmp_path), *output) == 2
    assert capsys.readouterr().err == (
        "cifar10_diffusion.py: torch sees no CUDA device; --device cpu --smoke shows that everything runs\n"
    )
    cpu = ["--device", "cpu", "--smoke", *output]
    assert start(monkeypatch, "--data", str(tmp_path / "missing"), *cpu) == 2
    said = capsys.readouterr().err
    assert "missing" in said and said.count("\n") == 1
    assert start(monkeypatch, "--data", "digits", *cpu) == 2
    assert capsys.readouterr().err.endswith("has no class 'airplane'; give the folder of CIFAR-10's images\n")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "work", interrupted)
    assert start(monkeypatch, "--data", "digits", *cpu) == 130
    assert "the same command continues from its state of a minute before" in capsys.readouterr().err


def test_a_training_that_is_killed_continues_from_a_state_of_a_minute_before(tmp_path, monkeypatch):
    """The clock goes half a minute a step, so the state of every third step is kept."""
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(recipe, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run: Any = SimpleNamespace(folder=tmp_path, device="cpu", ends=9_000)
    ran: list[int] = []

    def training(killed_at: int) -> nn.Linear:
        torch.manual_seed(0)
        module = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

        def step(number: int) -> None:
            if number == killed_at:
                raise KeyboardInterrupt
            ran.append(number)
            optimizer.zero_grad()
            (module(torch.ones(2)) - number).square().sum().backward()
            optimizer.step()

        recipe.sliced(run, "some", module, optimizer, 8, step, {})
        return module

    with pytest.raises(KeyboardInterrupt):
        training(killed_at=4)
    continued = training(killed_at=-1)
    assert ran == [0, 1, 2, 3, *range(2, 8)]
    (tmp_path / "some.pt").unlink()
    assert torch.equal(continued.weight, training(killed_at=-1).weight)


@pytest.mark.slow
@pytest.mark.ci
def test_slices_end_with_their_state_and_the_last_one_has_every_row(tmp_path: Path):
    data = str(models.random_cifar(tmp_path / "data", 64, 32))
    how: Any = {"device": "cpu", "sizes": recipe.SMOKE}
    assert recipe.work(data, tmp_path / "out", seconds=-1, **how) is None
    assert (tmp_path / "out" / "judge.pt").is_file()
    results = recipe.work(data, tmp_path / "out", seconds=600, **how)
    assert results is not None and [one["variant"] for one in results["cells"]][:3] == [
        "real images",
        "base",
        "row copy",
    ]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert {one["num_real"] for one in results["cells"]} == {36}, "four images of each class, whatever the folder holds"
    text = recipe.table(results)
    assert "salun --mask random" in text and "(published)" in text
