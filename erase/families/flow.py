"""Rectified flow: straight paths from image to noise, whose velocity the network predicts."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from erase.concepts import refusal
from erase.conditioning import Conditioning
from erase.device import dtype_of
from erase.families.modes import evaluating, predicting
from erase.families.pipelined import PipelineFamily
from erase.families.protocol import Sampler
from erase.families.start import Request


class RectifiedFlow(PipelineFamily):
    """A family whose noisy latents are x_s = (1 - s) x_0 + s eps and whose network predicts v = eps - x_0.

    So the noise in x_s is x_s + (1 - s) v. Timestep t, 0 to 999, stands for the noise level s at that place of the
    scheduler's training grid, whose shift is applied (Esser et al., ICML 2024, arXiv:2403.03206).

    scheduler: the model's own, which generates its images. sigmas: the noise levels, rising, [num_timesteps].
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    sigmas: Tensor

    def read_schedule(self) -> None:
        """Take the noise levels from `scheduler`."""
        self.sigmas = self.sampler().sigmas[: self.num_timesteps].flip(0)

    @abstractmethod
    def inputs_of(self, c: Conditioning) -> dict[str, Any]:
        """The network's arguments other than latents and timesteps."""

    # --- prediction ---

    def predict(self, network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The noise that `network` sees in `x`: x + (1 - s) v."""
        return x + (1 - self._levels(t, x)) * self._velocity(network, x, t, c)

    def _velocity(self, network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        time = self._levels(t, x).view(-1) * self.num_timesteps
        return network(hidden_states=x.to(dtype_of(network)), timestep=time, **self.inputs_of(c)).sample.float()

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_s = (1 - s) x + s eps; t: int64, [n], 0 to 999."""
        s = self._levels(t, x)
        return (1 - s) * x + s * eps

    def _levels(self, t: Tensor, x: Tensor) -> Tensor:
        """The noise levels at timesteps t, [n, 1, 1, 1], with the dtype and on the device of x; copied there once."""
        if (self.sigmas.device, self.sigmas.dtype) != (x.device, x.dtype):
            self.sigmas = self.sigmas.to(x)
        return self.sigmas[t][:, None, None, None]

    # --- images ---

    def sampler(self, name: Sampler = "model") -> Any:
        """A fresh scheduler: the model's own, or DPM-Solver++ (Lu et al., 2022) on the same noise levels."""
        if name == "dpm++":
            return DPMSolverMultistepScheduler(
                num_train_timesteps=self.num_timesteps,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=self.scheduler.config["shift"],
            )
        return FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)  # pyright: ignore

    def times(self, steps: int) -> Tensor:
        """Evenly spaced on the training grid, from the last timestep on."""
        return torch.linspace(self.num_timesteps - 1, 0, steps + 1)[:-1].round().long()

    @torch.no_grad()
    def trajectory(
        self, x: Tensor, index: Tensor, c: Conditioning, empty: Conditioning, *, steps: int, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """By Euler steps of the flow, whatever the model's own scheduler; see `Family.trajectory`."""
        index, times = index.cpu(), self.times(steps)
        x = self._followed(x, c, empty, index, steps=steps, guidance=guidance)
        return x, self._staged(times[index])

    def draw_from(self, latents: Tensor, prompts: Sequence[str], *, start: int, steps: int, guidance: float) -> Tensor:
        """By Euler steps of the flow; see `Family.draw_from`."""
        refusal.refuse(prompts, "prompt")
        levels = self.sigmas.cpu()[self.times(steps)[start:]].tolist()
        plain: Any = self.scheduler.config
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(plain, shift=1.0)  # the levels have the shift
        height, width = (side * self.vae_scale for side in latents.shape[-2:])
        begun = self._start(Request.of(prompts, (), guidance, (height, width), self.guard), latents)
        return self._drawn(begun, self.network, scheduler, guidance=guidance, sigmas=levels).cpu()

    def _followed(
        self, x: Tensor, c: Conditioning, empty: Conditioning, to: Tensor, *, steps: int, guidance: float
    ) -> Tensor:
        """Latents after `to` of the steps, int64 [n]."""
        x, c, empty = self._staged(x.clone()), c.each(self._staged), empty.each(self._staged)
        times, guidance = self.times(steps), max(guidance, 1)  # 0 is none too, as in diffusers
        levels = [*self.sigmas.cpu()[times].tolist(), 0.0]
        with evaluating(self.network), predicting(self.network, self.precision):
            for number in range(int(to.max())):
                rows = self._staged((to > number).nonzero().view(-1))
                t = torch.full((2 * len(rows),), int(times[number]), device=self.device)
                both = Conditioning.cat([empty.expand(len(rows)), c[rows]])
                v = self._velocity(self.network, x[rows].repeat(2, 1, 1, 1), t, both)
                without, named = v.chunk(2)
                x[rows] += (levels[number + 1] - levels[number]) * (without + guidance * (named - without))
        return x
