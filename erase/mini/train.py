"""The training of the embedded model from a seed: judge, VAE, UNet with text encoder, decoder, assembly.

Each stage trains on drawings that depend on (seed, stage, step) alone, saves its state regularly and continues from it.
Stages that do not need each other (judge and VAE; UNet and decoder) may run at the same time in two processes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from erase import files, tensor_files
from erase.errors import EraseError
from erase.mini import world
from erase.mini.assembly import assemble
from erase.mini.job import STAGES, Budget, Job
from erase.mini.stages.judge import train_judge
from erase.mini.stages.unet import train_unet
from erase.mini.stages.vae import train_decoder, train_vae

_TRAIN: dict[str, Callable[[Job], None]] = {
    "judge": train_judge,
    "vae": train_vae,
    "unet": train_unet,
    "decoder": train_decoder,
}


def train(
    output: str | Path,
    *,
    seed: int = 0,
    without: str | None = None,
    stages: tuple[str, ...] = STAGES,
    budget: Budget | None = None,
    device: str = "cpu",
    parts_from: str | Path | None = None,
    quiet: bool = False,
) -> Path:
    """Train the embedded model and write it as a diffusers pipeline folder that includes the judge.

    output: the pipeline folder. Unfinished work is in `output/work`, and the same call continues it.
    without: an object, colour, style or "nude" that the UNet's data never shows; the result is the reference for
        unlearning it. VAE and judge are trained on the whole world, because they are not unlearned.
    parts_from: folder of a trained model whose judge and VAE are reused; UNet and text encoder are trained.

    Returns the pipeline folder when all stages are done, else the work folder.

    Raises:
        EraseError: the world has no such thing to leave out, or `output` holds another training.
    """
    budget = budget or Budget()
    output = Path(output)
    work = output / "work"
    identity = {"seed": seed, "without": without, "parts_from": parts_from and str(parts_from), **asdict(budget)}
    identity = json.loads(json.dumps(identity))
    if without is not None and without not in {*world.OBJECTS, *world.COLOURS, *world.STYLES, "nude", "clothed"}:
        raise EraseError(f"the embedded world has no '{without}'; it has {', '.join([*world.OBJECTS, *world.STYLES])}")
    if (work / "identity.json").exists() and json.loads((work / "identity.json").read_text()) != identity:
        raise EraseError(f"{work} holds another training; choose another --output or delete it")
    files.write_json(work / "identity.json", identity)
    if parts_from is not None:
        _take_parts(Path(parts_from), work)
    job = Job(work, seed, budget, torch.device(device), without, quiet)
    for stage in stages:
        if not (work / f"{stage}.safetensors").exists():
            _TRAIN[stage](job)
    if any(not (work / f"{stage}.safetensors").exists() for stage in STAGES):
        return work
    return assemble(output)


def _take_parts(folder: Path, work: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32, local_files_only=True)
    metadata = {"scaling_factor": vae.config["scaling_factor"], "taken_from": str(folder)}
    for part in ("vae", "decoder"):
        tensor_files.write_tensors(work / f"{part}.safetensors", vae.state_dict(), metadata)
    files.copy(folder / "judge.safetensors", work / "judge.safetensors")
