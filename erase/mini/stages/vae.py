"""The stages "vae" and "decoder": train the VAE on crops, then its decoder alone on whole images."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from erase import tensor_files
from erase.errors import EraseError
from erase.mini.architecture import make_vae
from erase.mini.fitting import fit
from erase.mini.job import Job, drawings


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + chroma + edges. Without the chroma term a model of this size gets stuck at grey images."""
    error = output - target
    chroma = (error[:, 0] - error[:, 1]).abs().mean() + (error[:, 2] - error[:, 1]).abs().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.3 * chroma + 0.5 * edges


def train_vae(job: Job) -> None:
    torch.manual_seed(job.seed)
    vae: Any = make_vae()
    vae.to(job.device)

    def loss(step: int) -> Tensor:
        rng = job.rng("vae", step)
        _, images = drawings(rng, (job.budget.vae_batch + 1) // 2)
        crops = []
        for image in images:  # two crops per drawing, because drawing takes longer than cropping
            for _ in range(2):
                y, x = rng.integers(4, 29, 2)
                crops.append(image[:, y : y + 32, x : x + 32])
        target = torch.stack(crops).to(job.device)
        posterior = vae.encode(target).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32)).to(job.device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / target[0].numel()
        return reconstruction_loss(output, target) + 3e-3 * kl

    path = job.work / "vae.pt"
    seconds = fit(path, {"vae": vae}, loss, steps=job.budget.vae_steps, lr=2e-3, ema_decay=0.99, quiet=job.quiet)
    vae.eval().requires_grad_(False)
    _, images = drawings(np.random.default_rng([job.seed, 98]), 256)
    with torch.no_grad():
        latents = vae.encode(images.to(job.device)).latent_dist.mean
    metadata = {"seconds": seconds, "scaling_factor": 1 / latents.std().item()}
    tensor_files.write_tensors(job.work / "vae.safetensors", vae.state_dict(), metadata)
    path.unlink(missing_ok=True)


def load_vae(work: Path, name: str = "vae") -> AutoencoderKL:
    """The VAE of a finished stage, "vae" or "decoder".

    Raises:
        EraseError: the stage "vae" is not finished.
    """
    if not (work / "vae.safetensors").exists():
        raise EraseError(f"{work} has no trained VAE yet; run the stage 'vae' first")
    vae = make_vae()
    vae.load_state_dict(tensor_files.read_tensors(work / f"{name}.safetensors"))
    vae.register_to_config(scaling_factor=tensor_files.read_metadata(work / "vae.safetensors")["scaling_factor"])
    return vae.eval().requires_grad_(False)


def train_decoder(job: Job) -> None:
    """Train the decoder with the encoder frozen, so that latents do not change."""
    vae: Any = load_vae(job.work)
    vae.to(job.device)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def loss(step: int) -> Tensor:
        rng = job.rng("decoder", step)
        _, images = drawings(rng, job.budget.decoder_batch)
        target = images.to(job.device)
        with torch.no_grad():
            latents = vae.encode(target).latent_dist.mean
            jitter = rng.standard_normal(latents.shape, dtype=np.float32)
            latents = latents + 0.03 / vae.config["scaling_factor"] * torch.from_numpy(jitter).to(job.device)
        return reconstruction_loss(vae.decode(latents).sample, target)

    path = job.work / "decoder.pt"
    steps = job.budget.decoder_steps
    seconds = fit(path, {"vae": vae}, loss, steps=steps, lr=1.5e-3, ema_decay=0.995, quiet=job.quiet)
    _, images = drawings(np.random.default_rng([job.seed, 97]), 256)
    with torch.no_grad():
        latents = vae.eval().encode(images.to(job.device)).latent_dist.mean
        mse = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), images.to(job.device)).item()
    metadata = {"seconds": seconds, "psnr": 10 * math.log10(4 / mse)}
    tensor_files.write_tensors(job.work / "decoder.safetensors", vae.state_dict(), metadata)
    path.unlink(missing_ok=True)
