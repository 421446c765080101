"""SD v1.4's UNet at full size with random weights: the mask of 429,760,482 ones, one SalUn step, seconds and memory.

    python eval/full_size.py --output runs/full_size.json

Shows that the job fits a machine, not that it works on real weights: none are used. Needs about 18 GB of memory.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from erase.commandline import reporting

NUM_WEIGHTS, NUM_ONES = 859_520_964, 429_760_482


def measure(density: float = 0.5, latent_size: int = 64, checkpointing: bool = False) -> dict[str, Any]:
    """Mask and one training step, batch 1 + 1, float32; seconds and peak memory (bytes) after each phase."""
    import torch
    from accelerate import Accelerator
    from bench.jobs import random_model

    from erase import masks
    from erase.conditioning import Conditioning
    from erase.data.latents import Data, ImageLatents
    from erase.methods.relabel import Relabel
    from erase.runs.machine import peak_memory, versions
    from erase.training import batches, loop, saliency_pass

    accelerator = Accelerator()
    model = random_model("full", str(accelerator.device))
    parameters = dict(model.unet.named_parameters())
    if sum(p.numel() for p in parameters.values()) != NUM_WEIGHTS:
        raise SystemExit("this is not SD v1.4's UNet any more; diffusers' defaults have changed")
    shape = (1, 4, latent_size, latent_size)

    def images(row: int) -> ImageLatents:
        return ImageLatents(torch.randn(shape), torch.zeros(shape), torch.tensor([row]))

    text = Conditioning(torch.randn(4, 77, 768))
    places = torch.zeros(1, 77, dtype=torch.bool)
    instead, names = torch.tensor([2]), ("", "f", "a", "r")
    data = Data(images(1), images(3), instead, torch.tensor([]), places, places, names, text, text[:1], "random", {})
    phases: dict[str, Any] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        phases[name] = {"seconds": round(time.perf_counter() - clock, 1), "peak_bytes": peak_memory()}
        print(f"{name:12} {phases[name]['seconds']:7.1f} s   peak {phases[name]['peak_bytes']['process'] / 1e9:.2f} GB")
        clock = time.perf_counter()

    lap("built")
    with tempfile.TemporaryDirectory() as folder:
        scores = saliency_pass.accumulate(
            model,
            data,
            parameters,
            accelerator,
            score="abs_sum",
            guidance=0.0,
            batch_size=1,
            seed=0,
            state_path=Path(folder) / "sums.pt",
            checkpointing=checkpointing,
            quiet=True,
        )
        lap("gradients")
        mask = masks.select(scores, density)
        del scores
        ones = masks.count(mask)
        lap("selection")
        masks.save(Path(folder) / "mask.safetensors", mask, {"density": density})
        mask_bytes = (Path(folder) / "mask.safetensors").stat().st_size
        lap("mask file")
        before = model.unet.conv_in.weight.clone()
        recipe = batches.Recipe(num_steps=1, batch_size=1, learning_rate=1e-5)
        loop.train(
            model,
            Relabel(),
            data,
            parameters,
            mask,
            recipe,
            accelerator,
            state_path=Path(folder) / "training.safetensors",
            checkpointing=checkpointing,
            quiet=True,
        )
        lap("one step")
    inside = mask["conv_in.weight"].to(before.device)
    moved = before != model.unet.conv_in.weight
    if density == 0.5 and ones != NUM_ONES or moved[~inside].any() or not moved[inside].any():
        raise SystemExit(f"the mask has {ones:,} ones, and conv_in moved in {int(moved.sum())} places: this is wrong")
    return {
        "weights": NUM_WEIGHTS,
        "ones": ones,
        "mask_file_bytes": mask_bytes,
        "latent_size": latent_size,
        "gradient_checkpointing": checkpointing,
        "phases": phases,
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/full_size.json", help="JSON to write")
    parser.add_argument("--density", type=float, default=0.5, help="share of the weights that may change")
    parser.add_argument("--latent-size", type=int, default=64, help="side of the latents; 64 is 512 pixels")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations to save memory")
    given = parser.parse_args()
    result = measure(given.density, given.latent_size, given.gradient_checkpointing)
    from erase import files

    files.write_json(given.output, result)


if __name__ == "__main__":
    with reporting("full_size.py"):
        main()
