"""The smallest random class-conditional pixel model: 8 x 8 pixels, three classes; it trains in milliseconds."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

CLASSES = ("cat", "dog", "tree")


def write(folder: Path, *, classes: tuple[str, ...] = CLASSES, scheduler: Any = None, **unet: Any) -> Path:
    """A pipeline folder with the class names. unet: options of the network that differ from the toy's."""
    shape: dict[str, Any] = dict(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        num_class_embeds=len(classes) + 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(**(shape | unet))
    DDIMPipeline(unet=network, scheduler=scheduler or DDIMScheduler()).save_pretrained(folder)  # pyright: ignore
    path = folder / "model_index.json"
    labels = {str(label): name for label, name in enumerate(classes)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": labels}))
    return folder
