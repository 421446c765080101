"""Memory that runs on Stable Diffusion XL need, computed from shapes: no weight is made.

    python eval/sdxl_memory.py            # writes eval/results/sdxl-memory.json; a minute

The figures are those that `--low-memory` prints before a run on a GPU that computes in bf16.
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
from erase.training import memory

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
OTHER_WEIGHTS = (123_060_480, 694_659_840, 83_653_863)  # both text encoders and the VAE
ROWS: dict[str, dict[str, Any]] = {
    "salun": {},
    "salun --low-memory": {"low_memory": True},
    "salun --low-memory --density 0.1": {"low_memory": True, "density": 0.1},
    "salun --low-memory --scope xattn": {"low_memory": True, "scope": "xattn"},
    "salun --low-memory --scope xattn --generation-batch-size 2": {
        "low_memory": True,
        "scope": "xattn",
        "generation_batch_size": 2,
    },
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
    first, second, vae = (_sized(number) for number in OTHER_WEIGHTS)
    vae.config = {"block_out_channels": (1, 1, 1, 1)}  # only its scale is asked for
    tokenizer: Any = SimpleNamespace(model_max_length=77)
    return StableDiffusionXL(
        "sdxl", Path(), unet, vae, first, tokenizer, scheduler, {}, text_encoder_2=second, tokenizer_2=tokenizer
    )


def _sized(num: int) -> Any:
    """A part of which only the number of weights is asked for."""
    return SimpleNamespace(parameters=lambda: [torch.empty(num, device="meta")])


def measure() -> dict[str, Any]:
    """Bytes of each phase, for each row of options."""
    model, rows = full_size(), {}
    for name, options in ROWS.items():
        given = Settings("nudity", precision="bf16", **options)
        settings = resolve(given, "nudity", {}, can_round=True, part=1, guidance_scale=StableDiffusionXL.guidance_scale)
        needs = planning.needed_memory(settings, model, model.trainable(settings.scope or "full"))
        rows[name] = {"scope": settings.scope, "phases": needs}
        print(name, {phase: round(need / 1e9, 1) for phase, need in needs.items()}, flush=True)
    loading = memory.LIBRARIES + 4 * (NUM_WEIGHTS + sum(OTHER_WEIGHTS))  # everything in float32, in main memory
    return {"resolution": model.resolution, "weights": NUM_WEIGHTS, "loading": loading, "rows": rows,
            "versions": versions()}  # fmt: skip


if __name__ == "__main__":
    files.write_json(OUTPUT, measure())
