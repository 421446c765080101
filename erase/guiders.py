"""Guards as guiders of diffusers' modular pipelines for Stable Diffusion XL and 3.

    pipeline = ModularPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    pipeline.load_components()
    guiders.make(guards.make("sld-strong", "nudity"), guidance_scale=5.0).attach(pipeline)
    pipeline(prompt="a photo of a person", output="images")

Formulas and presets are those of `erase.guards`, which guards classic pipelines. FLUX.1's modular pipeline has no
guider. Guiders are experimental in diffusers.
"""

from contextlib import ExitStack
from typing import Any

import torch
from diffusers import ModularPipeline, StableDiffusion3ModularPipeline, StableDiffusionXLModularPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch import Tensor

from erase import guards
from erase.conditioning import Conditioning
from erase.errors import EraseError

_PIPELINES = (StableDiffusionXLModularPipeline, StableDiffusion3ModularPipeline)
_FIELDS = {"prompt_embeds": "states", "encoder_hidden_states": "states", "text_embeds": "pooled"}  # of XL and of 3
_ENCODED = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")


class GuardGuider(BaseGuidance):
    """Guidance with a guard: a guider of diffusers whose text is encoded when it is attached to a pipeline.

    `save_pretrained` stores the settings, the text included, but not the encoded text: attach a guider again after
    loading it or copying it with `new`. Settings are keywords because `new` forgets positional ones. To turn a guard
    off, give the pipeline another guider.

    guard: what it does. guidance_scale: s_g of classifier-free guidance, above 1 for guards that act on it.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    def __init__(self, guard: guards.Guard, guidance_scale: float) -> None:
        super().__init__()
        guards.require_text(guard.text)
        if guidance_scale <= 1 and guard.needs_guidance:
            raise EraseError(f"a guard needs guidance_scale above 1, not {guidance_scale:g}")
        self.guard, self.guidance_scale = guard, guidance_scale
        self._pipeline: Any = None
        self._text: Conditioning | None = None
        self._empty: Conditioning | None = None

    def attach(self, pipeline: Any) -> None:
        """Encode the guard's text with the pipeline's encoders and become its guider, in place of the one that it has.

        pipeline: of Stable Diffusion XL or 3, a `ModularPipeline` whose components are loaded.

        Raises:
            EraseError: another pipeline, or one without its text encoders.
        """
        _require_known(pipeline)
        state: Any = PipelineState()
        block = pipeline.blocks.sub_blocks["text_encoder"]
        for field in block.inputs:
            state.set(field.name, {"prompt": self.guard.text, "negative_prompt": ""}.get(field.name, field.default))
        block(pipeline, state)
        states, pooled, empty, empty_pooled = map(state.get, _ENCODED)
        self._text, self._empty = Conditioning(states, pooled=pooled), Conditioning(empty, pooled=empty_pooled)
        self._pipeline = pipeline
        pipeline.update_components(guider=self)

    def disable(self) -> None:
        """Refused, so that no pipeline generates without the guard.

        Raises:
            EraseError: always; pipelines call it for latent consistency models.
        """
        raise EraseError(
            "a guard cannot be disabled; give the pipeline another guider, also for the UNet of a latent consistency "
            "model, which has no guidance"
        )

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One batch for each prediction. data: the inputs by name, as (conditional, unconditional) or for both."""
        if self._text is None or self._empty is None:
            raise EraseError(f"{type(self).__name__} has no encoded text; use guider.attach(pipeline)")
        names = self._input_predictions[: self.num_conditions]
        batches = [self._prepare_batch(data, int(name == "pred_uncond"), name) for name in names]
        if not any(isinstance(value, tuple) for value in data.values()):  # Stable Diffusion 3 without a negative prompt
            for batch in batches[1:2]:
                _replace(batch, self._empty)
        return batches

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared != 2

    @property
    def num_conditions(self) -> int:
        return len(self._input_predictions)


class SLDGuider(GuardGuider):
    """Safe Latent Diffusion with three network passes a step. The parameters are those of `guards.SLD`.

    SLD compares predictions of noise. In a rectified flow, at noise level s, two predictions of noise differ by (1 - s)
    times the difference of the velocities, so nothing is guarded at s = 1.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_unsafe"]

    @register_to_config
    def __init__(
        self,
        *,
        text: str,
        guidance_scale: float = 7.5,
        warmup: int = 10,
        guidance: float = 1000.0,
        threshold: float = 0.01,
        momentum_scale: float = 0.3,
        momentum_beta: float = 0.4,
    ) -> None:
        sld = guards.SLD(text, warmup, guidance, threshold, momentum_scale, momentum_beta)
        super().__init__(sld, guidance_scale)
        self.sld, self.nu = sld, torch.zeros(())

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step; the first one of an image resets the momentum.

        Raises:
            EraseError: at the first step, if all steps are warm-up.
        """
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self.nu = torch.zeros(())
            if self.num_conditions == 3 and self._pipeline is not None:
                order = (
                    self._pipeline.scheduler.order
                )  # a scheduler of order 2 makes two passes a step, the last one aside
                guards.require_acting(self.sld, order * (num_inference_steps - 1) + 1)

    @property
    def num_conditions(self) -> int:
        return 3 if self.sld.guidance >= 1 else 2

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        batches = super().prepare_inputs(data)
        for batch in batches[2:]:
            _replace(batch, self._text)
        return batches

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor, pred_unsafe: Tensor | None = None) -> GuiderOutput:
        """The guided prediction from those for prompt, empty text and guard, each float, [n, c, h, w]."""
        pred = pred_cond
        if pred_unsafe is not None:
            of_0, of_p, of_s = (part.float() for part in (pred_uncond, pred_cond, pred_unsafe))
            unit = guards.noise_unit(self._pipeline.scheduler, self._timestep)
            gamma, self.nu = self.sld.steer(of_0, of_p, of_s, self.nu, unit)
            pred = pred - gamma.to(pred.dtype) if self._step >= self.sld.warmup else pred
        return _guided(pred_uncond, pred, self.guidance_scale)


class NegativePromptGuider(GuardGuider):
    """The guard's text as the negative prompt, in place of any that the pipeline is given (`guards.NegativePrompt`)."""

    @register_to_config
    def __init__(self, *, text: str, guidance_scale: float = 7.5) -> None:
        super().__init__(guards.NegativePrompt(text), guidance_scale)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        batches = super().prepare_inputs(data)
        _replace(batches[1], self._text)
        return batches

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor) -> GuiderOutput:
        """The guided prediction from those for prompt and guard, each float, [n, c, h, w]."""
        return _guided(pred_uncond, pred_cond, self.guidance_scale)


class NAGGuider(GuardGuider):
    """Normalized Attention Guidance inside the network's attention; the parameters are those of `guards.NAG`.

    guidance_scale: of classifier-free guidance beside it; 1 or less is none, as distilled models need it.
    """

    @register_to_config
    def __init__(
        self, *, text: str, guidance_scale: float = 7.5, scale: float = 3.0, tau: float = 2.5, alpha: float = 0.5
    ) -> None:
        self.nag = guards.NAG(text, scale, tau, alpha)
        super().__init__(self.nag, guidance_scale)
        self._guarding = ExitStack()

    @property
    def num_conditions(self) -> int:
        return 2 if self.guidance_scale > 1 else 1

    def prepare_models(self, denoiser: Any) -> None:
        """Guard the network for the prompt's batch."""
        super().prepare_models(denoiser)
        text = self._text
        if self.is_conditional and text is not None:
            self._guarding.enter_context(
                guards.through(denoiser, lambda predict, given: self.nag.forward(denoiser, predict, given, text, 0))
            )

    def cleanup_models(self, denoiser: Any) -> None:
        self._guarding.close()

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction from those for guarded prompt and empty text, each float, [n, c, h, w]."""
        if pred_uncond is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        return _guided(pred_uncond, pred_cond, self.guidance_scale)


def make(guard: guards.Guard, guidance_scale: float = 7.5) -> GuardGuider:
    """The guider that does what the guard does.

    Raises:
        EraseError: guidance_scale is 1 or less and the guard acts on guidance, or its text is none or refused.
    """
    if isinstance(guard, guards.NAG):
        return NAGGuider(guidance_scale=guidance_scale, **vars(guard))
    if isinstance(guard, guards.NegativePrompt):
        return NegativePromptGuider(text=guard.text, guidance_scale=guidance_scale)
    return SLDGuider(guidance_scale=guidance_scale, **vars(guard))


def _require_known(pipeline: Any) -> None:
    name, known = type(pipeline).__name__, "guards know the modular pipelines of Stable Diffusion XL and 3"
    if not isinstance(pipeline, ModularPipeline):
        raise EraseError(f"{name} is not a modular pipeline; use guard.on(pipeline) from erase.guards")
    if "guider" not in pipeline.component_names:
        raise EraseError(f"{name} has no guider; {known}")
    if not isinstance(pipeline, _PIPELINES):
        raise EraseError(f"{known}, not {name}")
    if getattr(pipeline, "text_encoder_2", None) is None:
        raise EraseError(f"{name} has no text encoder; call pipeline.load_components() first")


def _replace(batch: Any, text: Conditioning | None) -> None:
    """Give every row of the batch this text, one row of states and pooled states."""
    for field, part in _FIELDS.items():
        if (rows := getattr(batch, field, None)) is not None:
            value = getattr(text, part)
            setattr(batch, field, value.to(rows).expand(len(rows), *value.shape[1:]))


def _guided(pred_uncond: Tensor, pred_cond: Tensor, scale: float) -> GuiderOutput:
    pred = pred_uncond + scale * (pred_cond - pred_uncond)
    return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
