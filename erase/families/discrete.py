"""Diffusion on a schedule of discrete timesteps: noise, predictions, and images by diffusers' pipelines or DDIM."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from erase.concepts import refusal
from erase.conditioning import Conditioning
from erase.device import dtype_of
from erase.errors import EraseError
from erase.families import (
    sd_parts,
)
from erase.families.modes import evaluating, predicting
from erase.families.pipelined import PipelineFamily
from erase.families.protocol import Sampler
from erase.families.start import Request


class DiscreteDiffusion(PipelineFamily):
    """A family whose UNet predicts noise or velocity at discrete timesteps.

    scheduler: the model's own, which generates its images. alphas_cumprod: of its schedule, [num_timesteps].
    prediction_type: "epsilon" or "v_prediction".
    """

    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    alphas_cumprod: Tensor
    prediction_type: str

    def read_schedule(self) -> None:
        """Take the schedule from `scheduler`.

        Raises:
            EraseError: it is no schedule, or the UNet predicts something else.
        """
        noise: Any = DDPMScheduler.from_config(self.scheduler.config)  # pyright: ignore
        self.alphas_cumprod: Tensor = noise.alphas_cumprod
        self._alphas: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        sd_parts.require_schedule(self.name, self.alphas_cumprod)
        self.prediction_type: str = noise.config["prediction_type"]
        if self.prediction_type not in {"epsilon", "v_prediction"}:
            raise EraseError(f"{self.name} predicts {self.prediction_type!r}; only epsilon and v_prediction are known")

    def predict(self, network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The noise that `network` sees in `x`; v predictions are converted: eps = sqrt(a) v + sqrt(1 - a) x."""
        output = network(x.to(dtype_of(self.unet)), t, **self.inputs_of(x, c)).sample.float()
        if self.prediction_type == "epsilon":
            return output
        a = self._alphas_at(t, x)
        return a.sqrt() * output + (1 - a).sqrt() * x

    def inputs_of(self, x: Tensor, c: Conditioning) -> dict[str, Any]:
        """The UNet's arguments other than latents and timesteps."""
        return {"encoder_hidden_states": c.text_states.to(dtype_of(self.unet))}

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x + sqrt(1 - a_t) eps, with diffusers' alphas_cumprod; t: int64, [n], 0 to 999."""
        a = self._alphas_at(t, x)
        return a.sqrt() * x + (1 - a).sqrt() * eps

    def _alphas_at(self, t: Tensor, x: Tensor) -> Tensor:
        """alphas_cumprod at timesteps t, [n, 1, 1, 1], with the dtype and on the device of x; copied there once."""
        where = x.device, x.dtype
        if where not in self._alphas:
            self._alphas[where] = self.alphas_cumprod.to(device=x.device, dtype=x.dtype)
        return self._alphas[where][t][:, None, None, None]

    def sampler(self, name: Sampler = "model") -> SchedulerMixin:
        """A fresh scheduler to draw with: the model's own, or DPM-Solver++ (Lu et al., 2022) for the same noise.

        The latter is what is known as DPM++ 2M Karras. Without Karras' spacing ten steps of it end no nearer to the
        exact solution than ten of DDIM (0.28 and 0.25 of its norm, embedded model); with it as near as 25 (0.03).
        """
        if name == "dpm++":
            return DPMSolverMultistepScheduler.from_config(self.scheduler.config, use_karras_sigmas=True)  # pyright: ignore
        return type(self.scheduler).from_config(self.scheduler.config)  # pyright: ignore

    def draw_from(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        *,
        start: int,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """By DDIM steps, whatever the model's own scheduler; see `Family.draw_from`."""
        refusal.refuse(prompts, "prompt")
        scheduler: Any = self._ddim(self.prediction_type)
        every = scheduler.set_timesteps

        def set_timesteps(*arguments: Any, **more: Any) -> None:
            every(*arguments, **more)
            scheduler.timesteps = scheduler.timesteps[start:]

        scheduler.set_timesteps = set_timesteps
        height, width = (side * self.vae_scale for side in latents.shape[-2:])
        begun = self._start(Request.of(prompts, (), guidance, (height, width), self.guard), latents)
        return self._drawn(begun, self.unet, scheduler, guidance=guidance, num_inference_steps=steps).cpu()

    def _ddim(self, prediction_type: str) -> DDIMScheduler:
        """DDIM steps on the model's schedule, for predictions of this type.

        Timesteps begin at the last one, 999, if the model's own do: distilled models such as Turbo, Lightning and LCM.
        """
        own: Any = self.scheduler
        is_trailing = own.config.get("timestep_spacing") == "trailing" or isinstance(own, LCMScheduler | TCDScheduler)
        spacing = "trailing" if is_trailing else "leading"
        how: dict[str, Any] = {"clip_sample": False, "timestep_spacing": spacing}
        return DDIMScheduler.from_config(own.config, prediction_type=prediction_type, **how)  # pyright: ignore

    def times(self, steps: int) -> Tensor:
        scheduler: Any = self._ddim(self.prediction_type)
        scheduler.set_timesteps(steps)
        return scheduler.timesteps

    def path(self, steps: int) -> Tensor:
        """See `Family.path`. The last row is DDIM's: Stable Diffusion ends at timestep 0, with some noise."""
        path, scheduler = super().path(steps), self._ddim(self.prediction_type)
        path[-1] = torch.stack([scheduler.final_alpha_cumprod, 1 - scheduler.final_alpha_cumprod]).sqrt()
        return path

    @torch.no_grad()
    def trajectory(
        self, x: Tensor, index: Tensor, c: Conditioning, empty: Conditioning, *, steps: int, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """By DDIM steps, whatever the model's own scheduler; see `Family.trajectory`."""
        guidance = max(guidance, 1)  # 0 is none too, as in diffusers
        scheduler = self._ddim("epsilon")
        scheduler.set_timesteps(steps)
        times: Tensor = scheduler.timesteps
        index = index.cpu()
        x, c, empty = self._staged(x.clone()), c.each(self._staged), empty.each(self._staged)
        with evaluating(self.unet), predicting(self.unet, self.precision):
            for number, time in enumerate(times[: int(index.max())].tolist()):
                rows = self._staged((index > number).nonzero().view(-1))
                t = torch.full((2 * len(rows),), time, device=self.device)
                both = Conditioning.cat([empty.expand(len(rows)), c[rows]])
                unconditional, conditional = self(x[rows].repeat(2, 1, 1, 1), t, both).chunk(2)
                eps = unconditional + guidance * (conditional - unconditional)
                x[rows] = scheduler.step(eps, time, x[rows]).prev_sample  # pyright: ignore
        return x, self._staged(times[index])
