"""The stage "unet": train UNet and text encoder on cached latents."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from erase import tensor_files
from erase.mini import world
from erase.mini.architecture import make_scheduler, make_text_encoder, make_unet
from erase.mini.fitting import fit
from erase.mini.job import Job, drawings
from erase.mini.stages.vae import load_vae
from erase.mini.tokenizer import make_tokenizer, tokenize
from erase.progress import each


def load_unet(work: Path) -> dict[str, Any]:
    """The trained UNet and text encoder, under the names that a diffusers pipeline gives them."""
    modules: dict[str, Any] = {"unet": make_unet(), "text_encoder": make_text_encoder(make_tokenizer())}
    nn.ModuleDict(modules).load_state_dict(tensor_files.read_tensors(work / "unet.safetensors"))
    return modules


def _encoded_drawings(job: Job) -> tuple[list[world.Scene], Tensor]:
    vae: Any = load_vae(job.work)
    vae.to(job.device)
    scenes, batches, size = [], [], 100
    for index in each(range(math.ceil(job.budget.num_latents / size)), "latents", "batches", quiet=job.quiet):
        drawn, images = drawings(np.random.default_rng([job.seed, 50, index]), size, job.without)
        scenes += drawn
        with torch.no_grad():
            batches.append(vae.encode(images.to(job.device)).latent_dist.mean * vae.config["scaling_factor"])
    return scenes, torch.cat(batches)


def train_unet(job: Job) -> None:
    """Epsilon prediction with min-SNR weights on cached latents, with new random captions at every step."""
    scenes, latents = _encoded_drawings(job)
    torch.manual_seed(job.seed)
    tokenizer = make_tokenizer()
    text_encoder: Any = make_text_encoder(tokenizer)
    unet: Any = make_unet()
    text_encoder.to(job.device)
    unet.to(job.device)
    alphas = make_scheduler().alphas_cumprod.to(job.device)
    snr = alphas / (1 - alphas)
    num, modules, done, seconds = job.budget.unet_batch, {"unet": unet, "text_encoder": text_encoder}, 0, 0.0

    def loss(step: int, gamma: float) -> Tensor:
        rng = job.rng("unet", step)
        chosen = rng.integers(len(scenes), size=num)
        prompts = ["" if rng.random() < 0.1 else world.caption(scenes[index], rng) for index in chosen]
        x = latents[torch.from_numpy(chosen).to(job.device)]
        eps = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(job.device)
        t = torch.from_numpy(((np.arange(num) + rng.random(num)) / num * 1000).astype(np.int64)).to(job.device)
        a = alphas[t][:, None, None, None]
        text = text_encoder(tokenize(tokenizer, prompts).to(job.device)).last_hidden_state
        predicted = unet(a.sqrt() * x + (1 - a).sqrt() * eps, t, text).sample
        weight = snr[t].clamp(max=gamma) / snr[t]
        return (weight * (predicted - eps).square().mean((1, 2, 3))).mean()

    for cycle, (steps, lr, gamma) in enumerate(job.budget.unet_cycles, start=1):
        finished = job.work / f"unet-{cycle}.safetensors"
        if finished.exists():
            nn.ModuleDict(modules).load_state_dict(tensor_files.read_tensors(finished))
            seconds += tensor_files.read_metadata(finished)["seconds"]
        else:
            path, first = job.work / f"unet-{cycle}.pt", done
            spent = fit(
                path,
                modules,
                lambda step, first=first, gamma=gamma: loss(first + step, gamma),
                steps=steps,
                lr=lr,
                ema_decay=0.998,
                weight_decay=1e-3,
                warmup=100,
                quiet=job.quiet,
            )
            tensor_files.write_tensors(finished, nn.ModuleDict(modules).state_dict(), {"seconds": spent})
            path.unlink(missing_ok=True)
            seconds += spent
        done += steps
    metadata = {"seconds": seconds, "samples": done * num}
    tensor_files.write_tensors(job.work / "unet.safetensors", nn.ModuleDict(modules).state_dict(), metadata)
