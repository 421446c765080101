"""Images by diffusers' pipelines: what a batch begins with, ready before the batch is asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from erase.concepts import refusal
from erase.conditioning import Conditioning
from erase.families.latent import LatentFamily
from erase.families.modes import evaluating, predicting
from erase.families.protocol import Sampler
from erase.families.start import Request, Start, stepping_on_host


class PipelineFamily(LatentFamily):
    """A family whose images a pipeline of diffusers generates, from noise and text states that the family makes."""

    _announced: Request | None = None
    _ready: Start | None = None  # of what was announced

    @abstractmethod
    def assembled(self, network: Any, scheduler: Any) -> Any:
        """diffusers' pipeline of the model's parts with this network and scheduler."""

    @abstractmethod
    def _on_device(self, prompts: Sequence[str]) -> Conditioning:
        """What the network sees for the prompts, encoded in one batch, on the model's device."""

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        size: int | tuple[int, int],
        sampler: Sampler = "model",
        network: Any = None,
    ) -> Tensor:
        """Latents [n, c, height / vae_scale, width / vae_scale]; see `Family.draw`."""
        refusal.refuse(prompts, "prompt")
        request = Request.of(prompts, seeds, guidance, size, self.guard)
        start, self._ready = self._ready, None
        if start is None or start.request != request:
            start = self._start(request)
        how: dict[str, Any] = {"guidance": guidance, "num_inference_steps": steps}
        return self._fetched(self._drawn(start, network or self.denoiser, self.sampler(sampler), **how))

    def announce(
        self, prompts: Sequence[str], seeds: Sequence[int], *, guidance: float, size: int | tuple[int, int]
    ) -> None:
        self._announced = Request.of(prompts, seeds, guidance, size, self.guard)

    def _fetched(self, latents: Tensor) -> Tensor:
        """The latents on the CPU. While a GPU still computes them, the images that are announced get their inputs."""
        if self._announced is not None and latents.device.type == "cuda":
            self._ready, self._announced = self._start(self._announced), None
        return latents.cpu()

    @torch.no_grad()
    def _start(self, request: Request, noise: Tensor | None = None) -> Start:
        """What the images of a request begin with. noise: None for that of their seeds."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        if noise is None:
            channels = self.latent_shape(request.height)[0]
            shape = (1, channels, request.height // self.vae_scale, request.width // self.vae_scale)
            noise = torch.cat([torch.randn(shape, generator=one) for one in generators])
        c, empty = self._on_device(request.prompts), None
        if request.is_guided:
            empty = self.unconditional(self._on_device([""] * len(request.prompts)))
        c_s = None if request.guard is None else self._on_device([request.guard.text])
        return Start(request, self._staged(noise), generators, c, empty, c_s)

    def _drawn(self, start: Start, network: Any, scheduler: Any, *, guidance: float, **steps: Any) -> Tensor:
        """Latents on the model's device. steps: arguments of the pipeline that say which steps are taken."""
        pipeline, guard = self.assembled(network, scheduler), start.request.guard
        pipeline.set_progress_bar_config(disable=True)
        guarded = guard.on(pipeline, start.c_s) if guard else nullcontext()
        with evaluating(network), predicting(network, self.precision), stepping_on_host(scheduler), guarded:
            return pipeline(
                **start.text(),
                latents=start.noise,
                generator=start.generators or None,
                height=start.request.height,
                width=start.request.width,
                guidance_scale=guidance,
                output_type="latent",
                return_dict=False,
                **steps,
            )[0]
