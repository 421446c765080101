"""The same jobs done the plain way, as SalUn's code and training scripts do them: what `bench` compares with.

Written for the purpose from the published formulas; nothing here is used by a run.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def argsort_mask(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """int64 zeros and ones: the rank of each score, by sorting the sorting, against int(N * density)."""
    every = -torch.cat([score.flatten() for score in scores.values()])
    k = int(len(every) * density)
    ranks = torch.argsort(torch.argsort(every))
    mask, start = {}, 0
    for name, score in scores.items():
        part = ranks[start : start + score.numel()]
        mask[name] = (part < k).long().reshape(score.shape)
        start += score.numel()
    return mask


class DenseAdam:
    """torch's Adam over whole tensors, after each gradient was multiplied in place with its mask, int64 in SalUn's.

    What each step of SalUn's `random_label.py` does: `grad *= mask[name]` for all 686 tensors, then `Adam.step()`.
    It runs on a GPU, where torch chooses the foreach Adam; so that one it is here too, with its temporaries. (On a CPU
    torch would choose a loop, which takes 0.8 to 0.95 of its time.) Left out is what belongs to no optimizer: the
    mask's way from the host to the GPU, 6.9 GB a step, and a sleep of 0.1 s.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], mask: Mapping[str, Tensor], lr: float, *, foreach: bool = True
    ):
        self.parameters, self.mask = parameters, mask
        self.adam = torch.optim.Adam(parameters.values(), lr=lr, foreach=foreach)

    def step(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                parameter.grad *= self.mask[name]
        self.adam.step()

    def num_bytes(self) -> int:
        """Of both moments and the mask."""
        moments = (t for state in self.adam.state.values() for t in state.values() if t.ndim or t.numel() > 1)
        return sum(t.nbytes for t in (*moments, *self.mask.values()))


def salun_step(
    unet: Any,
    vae: Any,
    text_encoder: Any,
    scheduler: Any,
    optimizer: DenseAdam,
    images: Mapping[str, Tensor],
    words: Mapping[str, Tensor],
    alpha: float = 0.5,
) -> float:
    """One step of random labels: images and words are encoded anew, both branches go through before one backward.

    images: "forget" and "retain", [n, 3, h, w], in [-1, 1]. words: "forget", "other" and "retain", token ids, [n, 77].
    """
    optimizer.adam.zero_grad()

    def encoded(which: str) -> Tensor:
        with torch.no_grad():
            return vae.encode(images[which]).latent_dist.sample() * vae.config.scaling_factor

    def said(which: str) -> Tensor:
        with torch.no_grad():
            return text_encoder(words[which]).last_hidden_state

    z_f, z_p, z_r = encoded("forget"), encoded("forget"), encoded("retain")
    eps_f, eps_r = torch.randn_like(z_f), torch.randn_like(z_r)
    t_f, t_r = (torch.randint(0, 1000, (len(z),)) for z in (z_f, z_r))
    output = unet(scheduler.add_noise(z_r, eps_r, t_r), t_r, said("retain")).sample
    retain = (output - eps_r).square().mean()
    output = unet(scheduler.add_noise(z_f, eps_f, t_f), t_f, said("forget")).sample
    other = unet(scheduler.add_noise(z_p, eps_f, t_f), t_f, said("other")).sample.detach()
    loss = (output - other).square().mean() + alpha * retain
    loss.backward()
    optimizer.step()
    return loss.item()


def drawn_latents(pipeline: Any, prompts: list[str], steps: int, guidance: float, size: int) -> Tensor:
    """Latents by way of pictures: one call of the pipeline a prompt, decoded, made 8-bit, and encoded again."""
    latents = []
    for seed, prompt in enumerate(prompts):
        picture = pipeline(
            prompt,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        pixels = (picture * 255).round().to(torch.uint8).float() / 127.5 - 1
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels).latent_dist
        latents.append(posterior.mean * pipeline.vae.config.scaling_factor)
    return torch.cat(latents)
