"""A world of three latents with a name each, and models that were trained in it from scratch, in seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conftest import make_pipeline
from torch import Tensor

from erase.families import loading
from erase.families.sd import StableDiffusion

NAMES = ("q", "w", "e")


def prototypes() -> Tensor:
    """What each name means, [3, 4, 4, 4]: signs, three of eight orthogonal patterns."""
    draw = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(64, 3, generator=draw)).Q.T.reshape(3, 4, 4, 4) * 8


def drawn(names: Sequence[int], seed: int) -> Tensor:
    return prototypes()[list(names)] + 0.2 * torch.randn(
        len(names), 4, 4, 4, generator=torch.Generator().manual_seed(seed)
    )


def trained(folder: Path, names: Sequence[int], *, num_steps: int = 600) -> StableDiffusion:
    """A model that was shown these names only, of one text encoder for all."""
    if not folder.exists():
        make_pipeline(
            unet=dict(
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                norm_num_groups=4,
                sample_size=4,
                cross_attention_dim=16,
            ),
            vae_channels=(4, 4),
            text_layers=1,
        ).save_pretrained(folder)
    model: Any = loading.load(folder)
    unet = model.unet.train().requires_grad_(True)
    adam = torch.optim.AdamW(unet.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
    draw, text = torch.Generator().manual_seed(0), model.encode_text([*NAMES, ""]).text_states
    for step in range(num_steps):
        which = torch.tensor(names)[torch.randint(len(names), (32,), generator=draw)]
        x, eps = drawn(which.tolist(), step), torch.randn(32, 4, 4, 4, generator=draw)
        t = torch.randint(1000, (32,), generator=draw)
        said = torch.where(torch.rand(32, generator=draw) < 0.1, len(NAMES), which)
        found = unet(model.add_noise(x, eps, t), t, encoder_hidden_states=text[said]).sample
        F.mse_loss(found, eps).backward()
        adam.step()
        schedule.step()
        adam.zero_grad()
    unet.eval().requires_grad_(False)
    return model


def seen_in(latents: Tensor) -> list[str | None]:
    """The name of what each latent shows; None for what is nothing of this world."""
    distance = (latents[:, None] - prototypes()).square().mean((2, 3, 4))
    return [NAMES[int(row.argmin())] if float(row.min()) < 0.5 else None for row in distance]
