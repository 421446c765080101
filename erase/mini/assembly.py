"""The finished stages as a diffusers pipeline folder, with the judge and recommended settings for erasure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from erase import files, tensor_files
from erase.families import pipeline_folder
from erase.mini.architecture import make_scheduler
from erase.mini.job import STAGES
from erase.mini.stages.unet import load_unet
from erase.mini.stages.vae import load_vae
from erase.mini.tokenizer import make_tokenizer

# Settings for a model of this size, where SD v1.4's do not fit. `erase-concept` reads them from the model folder.
DEFAULTS: dict[str, Any] = {
    "family": "mini",
    "guidance_scale": 2.0,
    "num_inference_steps": 25,
    "learning_rate": 5e-4,
    "batch_size": 16,
    "num_forget": 96,
    "num_retain": 192,
    "generation_batch_size": 32,
    "num_train_steps": 100,
    # closed forms must edit the end tokens too: they repeat the concept, and this UNet attends to them
    "methods": {
        "salun-robust": {"num_train_steps": 150},
        "stereo": {
            "learning_rate": 1e-4,
            "num_train_steps": 120,
            "set": ["words=2", "word_steps=60", "word_batch=16", "word_lr=0.003"],
        },
        "recare": {
            "learning_rate": 1e-4,
            "num_train_steps": 120,
            "set": ["word_steps=60", "word_batch=16", "word_lr=0.003"],
        },
        "advunlearn": {
            "learning_rate": 1e-3,
            "num_train_steps": 40,
            "batch_size": 4,
            "set": ["warm_up=10", "attack_steps=4", "attack_lr=0.01"],
        },
        "hirm": {"learning_rate": 1e-3, "num_train_steps": 50, "set": ["toward=anchor"]},  # two layers: random destroys
        "uce": {"set": ["tokens=tail", "retain_tokens=all"]},
        "rece": {"set": ["lamb_1=1", "epochs=1"]},
        "speed": {"set": ["tokens=tail", "retain_tokens=tail", "rho=0.05", "filter=false"]},
        "oce": {"set": ["tokens=tail", "least=0.1", "erase_scale=300"]},
        "dp": {"set": ["tokens=tail", "retain_tokens=tail", "threshold=0.3", "least=0.1"]},
        "ga": {"learning_rate": 1e-4, "num_train_steps": 30, "set": ["alpha=1"]},
        "esd-x": {"learning_rate": 0.0004, "batch_size": 4},
        "esd-strict": {"learning_rate": 0.0004, "batch_size": 4},
        "leco": {"learning_rate": 0.001, "batch_size": 4},
        "esd-u": {"learning_rate": 0.00005, "batch_size": 4},
        "esd-full": {"learning_rate": 0.00005, "batch_size": 4},
        "fmn": {"learning_rate": 5e-05, "num_train_steps": 35, "batch_size": 8},
        "ca": {"learning_rate": 0.0005},
        "sdd": {"learning_rate": 0.001, "batch_size": 4, "set": ["teacher_decay=0.98"]},
        "erasediff": {"learning_rate": 0.0002},
        "scissorhands": {"learning_rate": 0.0001},
        "sa": {"num_train_steps": 300, "set": ["surrogate=anchor"]},
    },
}


def assemble(output: str | Path) -> Path:
    """Write the trained parts as an fp16 pipeline folder with the files judge, erase_defaults and training."""
    output = Path(output)
    work = output / "work"
    tokenizer, modules = make_tokenizer(), load_unet(work)
    pipeline = StableDiffusionPipeline(
        vae=load_vae(work, "decoder"),
        **modules,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    pipeline.text_encoder.float()  # stock diffusers loads its own parts in float32, transformers as they are stored
    pipeline_folder.write_pipeline(pipeline, output)
    return finish(output, STAGES, DEFAULTS)


def finish(output: Path, stages: Sequence[str], defaults: Mapping[str, Any]) -> Path:
    """Write the files judge, erase_defaults and training, the last one from what the stages left in `output/work`."""
    work = output / "work"
    files.copy(work / "judge.safetensors", output / "judge.safetensors")
    files.write_json(output / "erase_defaults.json", defaults)
    recipe: dict[str, Any] = {
        "identity": json.loads((work / "identity.json").read_text()),
        "stages": {stage: tensor_files.read_metadata(work / f"{stage}.safetensors") for stage in stages},
        "torch": str(torch.__version__),
        "num_threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    files.write_json(output / "training.json", recipe)
    return output
