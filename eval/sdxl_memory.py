"""Memory that runs on Stable Diffusion XL need, computed from shapes: no weight is made.

    python eval/sdxl_memory.py            # writes eval/results/sdxl-memory.json; a minute

The figures are those that `--low-memory` prints before a run (`erase/training/memory.py`), for a GPU, and the images'
generation: all networks in float32, and the UNet once more in 16 bits.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from erase import files
from erase.families.sdxl import StableDiffusionXL
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.runs import planning
from erase.runs.machine import versions

OUTPUT = Path(__file__).resolve().parent / "results" / "sdxl-memory.json"
NUM_WEIGHTS = 2_567_463_684
UNET: dict[str, Any] = {  # of the base model's unet/config.json
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
OTHER_WEIGHTS = 123_060_480 + 694_659_840 + 83_653_863  # both text encoders and the VAE
ROWS: dict[str, dict[str, Any]] = {
    "salun": {},
    "salun --low-memory": {"low_memory": True},
    "salun --low-memory --density 0.1": {"low_memory": True, "density": 0.1},
    "salun --low-memory --scope xattn": {"low_memory": True, "scope": "xattn"},
    "salun --low-memory --scope xattn --density 0.1": {"low_memory": True, "scope": "xattn", "density": 0.1},
    "esd-x --low-memory": {"method": "esd-x", "low_memory": True},
    "uce": {"method": "uce"},
}


def full_size() -> StableDiffusionXL:
    """The published base model's shapes, without content: on the device "meta"."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    if sum(parameter.numel() for parameter in unet.parameters()) != NUM_WEIGHTS:
        raise SystemExit("this is not Stable Diffusion XL's UNet any more; diffusers' defaults have changed")
    scheduler: Any = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    absent: Any = None
    vae: Any = SimpleNamespace(config={"block_out_channels": (1, 1, 1, 1)})  # only its scale is asked for
    tokenizer: Any = SimpleNamespace(model_max_length=77)
    return StableDiffusionXL(
        "sdxl", Path(), unet, vae, absent, tokenizer, scheduler, {}, text_encoder_2=absent, tokenizer_2=tokenizer
    )


def measure() -> dict[str, Any]:
    """Bytes of each phase, for each row of options."""
    model, rows = full_size(), {}
    for name, options in ROWS.items():
        settings = resolve(Settings("nudity", **options), "nudity", {}, can_round=True, part=1)
        needs = planning.needed_memory(settings, model, model.trainable(settings.scope or "full"))
        rows[name] = {"scope": settings.scope, "phases": needs}
        print(name, {phase: round(need / 1e9, 1) for phase, need in needs.items()}, flush=True)
    generating = 4 * (NUM_WEIGHTS + OTHER_WEIGHTS) + 2 * NUM_WEIGHTS
    return {"resolution": model.resolution, "weights": NUM_WEIGHTS, "generating": generating, "rows": rows,
            "versions": versions()}  # fmt: skip


if __name__ == "__main__":
    files.write_json(OUTPUT, measure())
