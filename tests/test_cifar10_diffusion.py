"""The recipe for class forgetting in pixel diffusion of CIFAR-10, at toy sizes on random images."""

import json
from pathlib import Path
from typing import Any

import cifar10_diffusion as recipe
import numpy as np
import on_gpu
import pytest

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


@pytest.mark.slow
@pytest.mark.ci
def test_slices_end_with_their_state_and_the_last_one_has_every_row(tmp_path: Path):
    data = str(on_gpu.random_cifar(tmp_path / "data", 64, 32))
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
    text = recipe.table(results)
    assert "salun --mask random" in text and "(published)" in text
