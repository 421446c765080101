"""Guards that steer away from a concept while images are generated and leave the weights alone: SLD, negative prompt.

    guard = guards.make("sld-strong", "nudity, nude, naked")
    with guard.on(pipeline):
        pipeline("a photo of a person")

They act between any Stable Diffusion 1, 2 or XL pipeline and its network during classifier-free guidance, so that the
pipeline's own formula, eps(0) + s_g (eps(c_p) - eps(0)), gives the guarded result. In Stable Diffusion XL the pooled
states of c_S belong to c_S too; sizes are those of the prompt.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erase.concepts import refusal
from erase.conditioning import Conditioning
from erase.errors import EraseError
from erase.words import did_you_mean

Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SLD:
    """Safe Latent Diffusion (Schramowski et al., CVPR 2023, arXiv:2211.05105), its presets by `PRESETS`.

    phi   = min(1, guidance |eps(c_p) - eps(c_S)|)       (the paper writes max; its code does this)
    mu    = phi where eps(c_p) - eps(c_S) < threshold, else 0
    gamma = mu (eps(c_S) - eps(0)) + momentum_scale nu
    nu    = momentum_beta nu + (1 - momentum_beta) gamma, from 0 at an image's first step on, warm-up included
    eps   = eps(0) + s_g (eps(c_p) - eps(0) - gamma), gamma = 0 in the first `warmup` steps

    One more network pass in each step, batched with the two of guidance: 1.5 times the time.

    text: c_S, what to steer away from. guidance: s_S; below 1 nothing is guarded at all.
    """

    text: str
    warmup: int = 10
    guidance: float = 1000.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4

    @contextmanager
    def on(self, pipeline: Any) -> Iterator[None]:
        """Guard what the pipeline generates inside; outside, pipeline and network are as they were found.

        Raises:
            EraseError: the pipeline generates without classifier-free guidance.
        """
        c_s = _encode(pipeline, self.text)
        step, nu = 0, torch.zeros(())

        def begin() -> None:
            nonlocal step, nu
            step, nu = 0, torch.zeros(())

        def forward(predict: Callable[..., Any], x: Tensor, t: Any, text: Tensor, more: Mapping[str, Any]) -> Any:
            nonlocal step, nu
            num = _half(pipeline, x)
            if self.guidance < 1:
                return predict(x, t, text, **more)
            more = _with_pooled(_thrice(dict(more), num), slice(2 * num, None), c_s)
            output = predict(_thrice(x, num), _thrice(t, num), torch.cat([text, _states(c_s, num, text)]), **more)
            predicted = output[0]
            eps_0, eps_p, eps_s = predicted.float().chunk(3)
            gamma, nu = self.steer(eps_0, eps_p, eps_s, nu, noise_unit(pipeline.scheduler, t))
            eps_p = eps_p - gamma if step >= self.warmup else eps_p
            step += 1
            return _with_prediction(output, torch.cat([eps_0, eps_p]).to(predicted.dtype))

        with _between(pipeline, forward, begin):
            yield

    def away(self, eps_0: Tensor, eps_p: Tensor, eps_s: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and the next nu."""
        difference = eps_p - eps_s
        phi = (self.guidance * difference.abs()).clamp(max=1)
        mu = torch.where(difference < self.threshold, phi, 0)
        gamma = mu * (eps_s - eps_0) + self.momentum_scale * nu
        return gamma, self.momentum_beta * nu + (1 - self.momentum_beta) * gamma

    def steer(self, of_0: Tensor, of_p: Tensor, of_s: Tensor, nu: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """gamma for predictions that are not of noise, in their own unit, and the next nu.

        of_0, of_p, of_s: predictions, float, [n, c, h, w].
        unit: scalar in [0, 1], what a difference of two predictions is in noise. At 0 gamma is 0.
        """
        nu, unit = nu.to(of_p.device), unit.to(of_p.device)
        gamma, nu = self.away(unit * of_0, unit * of_p, unit * of_s, nu)
        return torch.where(unit > 0, gamma / unit, 0), nu


@dataclass(frozen=True)
class NegativePrompt:
    """eps = eps(c_S) + s_g (eps(c_p) - eps(c_S)): the pipeline's negative prompt, in the place of any that it is given.

    text: c_S, what to steer away from. It costs nothing.
    """

    text: str

    @contextmanager
    def on(self, pipeline: Any) -> Iterator[None]:
        """Guard what the pipeline generates inside; outside, pipeline and network are as they were found.

        Raises:
            EraseError: the pipeline generates without classifier-free guidance.
        """
        c_s = _encode(pipeline, self.text)

        def forward(predict: Callable[..., Any], x: Tensor, t: Any, text: Tensor, more: Mapping[str, Any]) -> Any:
            num = _half(pipeline, x)
            more = _with_pooled(more, slice(num), c_s)
            return predict(x, t, torch.cat([_states(c_s, num, text), text[num:]]), **more)

        with _between(pipeline, forward, lambda: None):
            yield


Guard = SLD | NegativePrompt

# of the authors' release, by their names
PRESETS: dict[str, Callable[[str], Guard]] = {
    "sld-weak": lambda text: SLD(text, 15, 20.0, 0.0, 0.0, 0.0),
    "sld-medium": lambda text: SLD(text, 10, 1000.0, 0.01, 0.3, 0.4),
    "sld-strong": lambda text: SLD(text, 7, 2000.0, 0.025, 0.5, 0.7),
    "sld-max": lambda text: SLD(text, 0, 5000.0, 1.0, 0.5, 0.7),
    "negative": NegativePrompt,
}


def make(name: str, text: str) -> Guard:
    """The guard of this name against what the text says.

    Raises:
        EraseError: no such guard, no text, or a text that involves minors in a sexual context.
    """
    if name not in PRESETS:
        raise EraseError(f"unknown guard {name!r}; {did_you_mean(name, PRESETS)}({', '.join(PRESETS)})")
    require_text(text)
    return PRESETS[name](text)


def require_text(text: str) -> None:
    """Refuse what no guard is made for.

    Raises:
        EraseError: no text, or one that involves minors in a sexual context.
    """
    if not text.strip():
        raise EraseError("a guard needs a text to steer away from")
    refusal.refuse([text], "the guard's text")


def require_acting(guard: Guard, passes: int) -> None:
    """Refuse a guard that would change no image.

    passes: of the network for one image; a sampler may make more of them than it takes steps.

    Raises:
        EraseError: it would change none.
    """
    if not isinstance(guard, SLD):
        return
    if guard.guidance < 1:
        raise EraseError(f"SLD's guidance is {guard.guidance:g}, and below 1 it guards nothing; choose a larger one")
    if passes <= guard.warmup:
        name = next((name for name, make in PRESETS.items() if make(guard.text) == guard), "SLD")
        raise EraseError(
            f"{name} acts after its first {guard.warmup} network passes, and {passes} are made for an image; take more "
            "steps, or choose sld-max, which acts from the first one"
        )


def noise_unit(scheduler: Any, t: Any) -> Tensor:
    """What a difference of two predictions at timestep t is in noise: itself, or sqrt(alpha_t) of a difference of v."""
    if scheduler.config.get("prediction_type", "epsilon") != "v_prediction":
        return torch.ones(())
    time = torch.as_tensor(t).flatten()[0].round().long().cpu()
    return scheduler.alphas_cumprod[time].sqrt().float()


# --- between a pipeline and its network -----------------------------------------------------------------------------


@contextmanager
def _between(pipeline: Any, forward: Callable[..., Any], begin: Callable[[], None]) -> Iterator[None]:
    """Inside, the network's calls go through `forward`, and `begin` is called when the pipeline is.

    Both are attributes of the instances, in front of what the classes or hooks have there.
    """
    unet = pipeline.unet
    predict, check = unet.forward, pipeline.check_inputs

    def guarded(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
        if rest:
            raise EraseError("a guard needs the network's arguments after the text states as keywords")
        return forward(predict, sample, timestep, encoder_hidden_states, more)

    def checked(*arguments: Any, **more: Any) -> Any:  # the first thing that every pipeline does when it is called
        begin()
        return check(*arguments, **more)

    before = [(owner, name, vars(owner).get(name)) for owner, name in ((unet, "forward"), (pipeline, "check_inputs"))]
    try:
        unet.forward, pipeline.check_inputs = guarded, checked
        yield
    finally:
        for owner, name, own in before:
            vars(owner).pop(name, None)
            if own is not None:
                vars(owner)[name] = own


@torch.no_grad()
def _encode(pipeline: Any, text: str) -> Conditioning:
    """One row of text encoder states and, for a network that takes them, of pooled states.

    Raises:
        EraseError: the network has other inputs than these, which a guard would leave those of the prompt.
    """
    added = pipeline.unet.config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise EraseError(
            f"guards know Stable Diffusion 1, 2 and XL, not the UNet of this {type(pipeline).__name__} "
            f"(addition_embed_type is {added!r})"
        )
    how = {"device": pipeline._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    encoded = pipeline.encode_prompt(text, **how)
    return Conditioning(encoded[0], pooled=encoded[2] if added else None)


def _states(c: Conditioning, num: int, like: Tensor) -> Tensor:
    """The text states of a single row `num` times, with the dtype and on the device of `like`."""
    return c.text_states.to(like).expand(num, -1, -1)


def _with_pooled(arguments: Mapping[str, Any], rows: slice, c: Conditioning) -> Mapping[str, Any]:
    """The network's arguments with the pooled states of `c` in these rows, if it has any."""
    if c.pooled is None:
        return arguments
    added = arguments["added_cond_kwargs"]
    pooled = added["text_embeds"].clone()
    pooled[rows] = c.pooled.to(pooled)
    return {**arguments, "added_cond_kwargs": {**added, "text_embeds": pooled}}


def _half(pipeline: Any, x: Tensor) -> int:
    """How many images the batch is drawing: half of it, since guidance puts the unconditional ones in front."""
    if not pipeline.do_classifier_free_guidance:
        raise EraseError("a guard needs guidance_scale above 1")
    return len(x) // 2


def _thrice(value: Any, num: int) -> Any:
    """What has a row for each of 2 num predictions, with the conditional rows once more; all else as it is."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[num:]]) if value.dim() and len(value) == 2 * num else value
    if isinstance(value, dict):
        return {key: _thrice(item, num) for key, item in value.items()}
    return type(value)(_thrice(item, num) for item in value) if isinstance(value, (tuple, list)) else value


def _with_prediction(output: Any, predicted: Tensor) -> Any:
    """The network's output, a tuple or diffusers' record, with another prediction."""
    return (predicted, *output[1:]) if isinstance(output, tuple) else type(output)(predicted)
