"""Guards that steer away from a concept while images are generated and leave the weights alone.

    guard = guards.make("sld-strong", "nudity, nude, naked")
    with guard.on(pipeline):
        pipeline("a photo of a person")

All act between a pipeline for Stable Diffusion 1, 2, XL or 3 and its network. SLD and the negative prompt act on
classifier-free guidance, so that the pipeline's own formula, eps(0) + s_g (eps(c_p) - eps(0)), gives the guarded
result; the pooled states of c_S belong to c_S too, and sizes are those of the prompt. NAG acts inside attention.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erase.concepts import refusal
from erase.conditioning import Conditioning
from erase.device import staged
from erase.errors import EraseError
from erase.words import did_you_mean

Inputs = dict[str, Any]  # of a network's forward, by name
Forward = Callable[[Callable[..., Any], Inputs], Any]  # of the network's own forward and its inputs


@dataclass(frozen=True)
class Guard(ABC):
    """Steers away from something while a pipeline generates.

    text: c_S, what to steer away from.
    needs_guidance: whether the pipeline must generate with classifier-free guidance.
    """

    needs_guidance: ClassVar[bool] = True

    text: str

    @contextmanager
    def on(self, pipeline: Any, c_s: Conditioning | None = None) -> Iterator[None]:
        """Guard what the pipeline generates inside; outside, pipeline and network are as they were found.

        c_s: states of `text`, one row, if they are there already.

        Raises:
            EraseError: the guard needs guidance, and the pipeline generates without; or see `network_of`.
        """
        forward, begin = self._acting(pipeline, _encode(pipeline, self.text) if c_s is None else c_s)
        with _between(pipeline, forward, begin):
            yield

    @abstractmethod
    def _acting(self, pipeline: Any, c_s: Conditioning) -> tuple[Forward, Callable[[], None]]:
        """What the network's calls go through, and what is called when the pipeline is."""


@dataclass(frozen=True)
class SLD(Guard):
    """Safe Latent Diffusion (Schramowski et al., CVPR 2023, arXiv:2211.05105), its presets by `PRESETS`.

    phi   = min(1, guidance |eps(c_p) - eps(c_S)|)       (the paper writes max; its code does this)
    mu    = phi where eps(c_p) - eps(c_S) < threshold, else 0
    gamma = mu (eps(c_S) - eps(0)) + momentum_scale nu
    nu    = momentum_beta nu + (1 - momentum_beta) gamma, from 0 at an image's first step on, warm-up included
    eps   = eps(0) + s_g (eps(c_p) - eps(0) - gamma), gamma = 0 in the first `warmup` steps

    One more network pass in each step, batched with the two of guidance: 1.5 times the time.

    guidance: s_S; below 1 nothing is guarded at all.
    """

    warmup: int = 10
    guidance: float = 1000.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4

    def _acting(self, pipeline: Any, c_s: Conditioning) -> tuple[Forward, Callable[[], None]]:
        step, nu = 0, torch.zeros(())

        def begin() -> None:
            nonlocal step, nu
            step, nu = 0, torch.zeros(())

        def forward(predict: Callable[..., Any], given: Inputs) -> Any:
            nonlocal step, nu
            num = _half(pipeline, given)
            if self.guidance < 1:
                return predict(**given)
            output = predict(**_with_text(_once_more(given, num, 2 * num), slice(2 * num, None), c_s))
            predicted = output[0]
            eps_0, eps_p, eps_s = predicted.float().chunk(3)
            gamma, nu = self.steer(eps_0, eps_p, eps_s, nu, noise_unit(pipeline.scheduler, given["timestep"]))
            eps_p = eps_p - gamma if step >= self.warmup else eps_p
            step += 1
            return _with_prediction(output, torch.cat([eps_0, eps_p]).to(predicted.dtype))

        return forward, begin

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
        nu, unit = staged(nu, of_p.device), staged(unit, of_p.device)
        gamma, nu = self.away(unit * of_0, unit * of_p, unit * of_s, nu)
        return torch.where(unit > 0, gamma / unit, 0), nu


@dataclass(frozen=True)
class NegativePrompt(Guard):
    """eps = eps(c_S) + s_g (eps(c_p) - eps(c_S)): the pipeline's negative prompt, in the place of any that it is given.

    It costs nothing.
    """

    def _acting(self, pipeline: Any, c_s: Conditioning) -> tuple[Forward, Callable[[], None]]:
        def forward(predict: Callable[..., Any], given: Inputs) -> Any:
            return predict(**_with_text(given, slice(_half(pipeline, given)), c_s))

        return forward, lambda: None


@dataclass(frozen=True)
class NAG(Guard):
    """Normalized Attention Guidance (Chen et al., 2025, arXiv:2505.21179), with or without classifier-free guidance.

    z+, z- are what a text attention layer gives an image token for the prompt and for c_S, before its last map.

    g = scale z+ - (scale - 1) z-
    g = g min(|g| / |z+|, tau) / (|g| / |z+|)     (L1 norms)
    z = alpha g + (1 - alpha) z+

    One more row in each network pass, for z-: twice the time without guidance, 1.5 times with it. Pooled states are
    those of the prompt.

    scale: 1 changes nothing. tau: largest growth of a norm. alpha: share of g.
    """

    needs_guidance: ClassVar[bool] = False

    scale: float = 3.0
    tau: float = 2.5
    alpha: float = 0.5

    def _acting(self, pipeline: Any, c_s: Conditioning) -> tuple[Forward, Callable[[], None]]:
        def forward(predict: Callable[..., Any], given: Inputs) -> Any:
            start = _half(pipeline, given) if pipeline.do_classifier_free_guidance else 0
            return self.forward(network_of(pipeline), predict, given, c_s, start)

        return forward, lambda: None

    def forward(
        self, network: nn.Module, predict: Callable[..., Any], given: Inputs, c_s: Conditioning, start: int
    ) -> Any:
        """The network's output, guided in the rows from `start` on. predict: its own forward."""
        num = _rows(given)
        states = Conditioning(c_s.text_states)
        with self._guiding(network, start, num):
            output = predict(**_with_text(_once_more(given, start, num), slice(num, None), states))
        return _with_prediction(output, output[0][:num])

    @contextmanager
    def _guiding(self, network: nn.Module, start: int, num: int) -> Iterator[None]:
        """Inside, image tokens of the rows from `start` to `num` and of those behind, which see c_S, share one z."""

        def guide(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = self.guided(arguments[0][start:num], arguments[0][num:])
            return (torch.cat([arguments[0][:start], z, z]), *arguments[1:])

        hooks = [layer.to_out[0].register_forward_pre_hook(guide) for layer in _text_attention(network)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def guided(self, z_p: Tensor, z_s: Tensor) -> Tensor:
        """z from z+ and z-, each [n, tokens, d]."""
        dtype, z_p, z_s = z_p.dtype, z_p.float(), z_s.float()
        z_g = self.scale * z_p - (self.scale - 1) * z_s
        grown = z_g.norm(p=1, dim=-1, keepdim=True) / z_p.norm(p=1, dim=-1, keepdim=True).clamp(min=1e-12)
        z_g = z_g * (self.tau / grown.clamp(min=self.tau))
        return (self.alpha * z_g + (1 - self.alpha) * z_p).to(dtype)


# of the authors' release, by their names
PRESETS: dict[str, Callable[[str], Guard]] = {
    "sld-weak": lambda text: SLD(text, 15, 20.0, 0.0, 0.0, 0.0),
    "sld-medium": lambda text: SLD(text, 10, 1000.0, 0.01, 0.3, 0.4),
    "sld-strong": lambda text: SLD(text, 7, 2000.0, 0.025, 0.5, 0.7),
    "sld-max": lambda text: SLD(text, 0, 5000.0, 1.0, 0.5, 0.7),
    "nag": NAG,
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
    """What a difference of two predictions at timestep t is in noise.

    It is 1 for predictions of noise, sqrt(alpha_t) for those of v, and 1 - s for the velocity of a rectified flow at
    noise level s.
    """
    time = torch.as_tensor(t).flatten()[0].float().cpu()
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "flow_prediction" or not hasattr(scheduler, "alphas_cumprod"):
        return 1 - time / scheduler.config["num_train_timesteps"]
    return scheduler.alphas_cumprod[time.round().long()].sqrt().float() if kind == "v_prediction" else torch.ones(())


# --- between a pipeline and its network -----------------------------------------------------------------------------


def network_of(pipeline: Any) -> Any:
    """The UNet or transformer of a pipeline that guards know.

    Raises:
        EraseError: it is of another architecture, whose inputs a guard would leave those of the prompt.
    """
    unet, transformer = getattr(pipeline, "unet", None), getattr(pipeline, "transformer", None)
    if unet is not None and unet.config.get("addition_embed_type") in (None, "text_time"):
        return unet
    if type(transformer).__name__ == "SD3Transformer2DModel":
        return transformer
    network = f"{'transformer' if unet is None else 'UNet'} of this {type(pipeline).__name__}"
    more = "" if unet is None else f" (addition_embed_type is {unet.config.get('addition_embed_type')!r})"
    raise EraseError(f"guards know Stable Diffusion 1, 2, XL and 3, not the {network}{more}")


@contextmanager
def _between(pipeline: Any, forward: Callable[..., Any], begin: Callable[[], None]) -> Iterator[None]:
    """Inside, the network's calls go through `forward`, and `begin` is called when the pipeline is.

    Both are attributes of the instances, in front of what the classes or hooks have there.
    """
    check = pipeline.check_inputs

    def checked(*arguments: Any, **more: Any) -> Any:  # the first thing that every pipeline does when it is called
        begin()
        return check(*arguments, **more)

    with through(network_of(pipeline), forward), _replaced(pipeline, "check_inputs", checked):
        yield


@contextmanager
def through(network: Any, forward: Forward) -> Iterator[None]:
    """Inside, the network's calls go through `forward(predict, given)`; `predict` is what was there before.

    Raises:
        EraseError: inside, at a call whose further rows a guard does not know.
    """
    predict = network.forward
    names = list(inspect.signature(type(network).forward).parameters)[1:]

    def guarded(*values: Any, **named: Any) -> Any:
        given = dict(zip(names, values, strict=False)) | named
        if given.get("skip_layers"):
            raise EraseError("a guard does not go with skip layer guidance; leave out skip_guidance_layers")
        return forward(predict, given)

    with _replaced(network, "forward", guarded):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    try:
        setattr(owner, name, value)
        yield
    finally:
        vars(owner).pop(name, None)
        if own is not None:
            vars(owner)[name] = own


def _text_attention(network: nn.Module) -> list[Any]:
    """The layers in which image tokens attend to text: cross-attention, or attention that both share."""
    joint = type(network).__name__ == "SD3Transformer2DModel"
    return [layer for name, layer in network.named_modules() if name.endswith(".attn" if joint else ".attn2")]


@torch.no_grad()
def _encode(pipeline: Any, text: str) -> Conditioning:
    """One row of text encoder states and, for a network that takes them, of pooled states.

    Raises:
        EraseError: see `network_of`.
    """
    network = network_of(pipeline)
    how: Inputs = {"device": pipeline._execution_device, "num_images_per_prompt": 1}
    how |= {"do_classifier_free_guidance": False}
    names = inspect.signature(pipeline.encode_prompt).parameters
    encoded = pipeline.encode_prompt(text, **how, **{name: None for name in ("prompt_2", "prompt_3") if name in names})
    has_pooled = network.config.get("addition_embed_type") or network.config.get("pooled_projection_dim")
    return Conditioning(encoded[0], pooled=encoded[2] if has_pooled else None)


def _with_text(given: Inputs, rows: slice, c: Conditioning) -> Inputs:
    """The network's inputs with the text and pooled states of the single row `c`, as far as it has them, in `rows`."""

    def put(tensor: Tensor, own: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[rows] = own.to(tensor)
        return tensor

    given = {**given, "encoder_hidden_states": put(given["encoder_hidden_states"], c.text_states)}
    if c.pooled is None:
        return given
    if "pooled_projections" in given:
        return {**given, "pooled_projections": put(given["pooled_projections"], c.pooled)}
    added = given["added_cond_kwargs"]
    return {**given, "added_cond_kwargs": {**added, "text_embeds": put(added["text_embeds"], c.pooled)}}


def _rows(given: Inputs) -> int:
    return len(given["encoder_hidden_states"])


def _half(pipeline: Any, given: Inputs) -> int:
    """How many images the batch is drawing: half of it, since guidance puts the unconditional ones in front."""
    if not pipeline.do_classifier_free_guidance:
        raise EraseError("a guard needs guidance_scale above 1")
    return _rows(given) // 2


def _once_more(value: Any, start: int, stop: int) -> Any:
    """What has a row for each of `stop` predictions, with those from `start` once more behind; all else as it is."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[start:]]) if value.dim() and len(value) == stop else value
    if isinstance(value, dict):
        return {key: _once_more(item, start, stop) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_once_more(item, start, stop) for item in value)
    return value


def _with_prediction(output: Any, predicted: Tensor) -> Any:
    """The network's output, a tuple or diffusers' record, with another prediction."""
    return (predicted, *output[1:]) if isinstance(output, tuple) else type(output)(predicted)
