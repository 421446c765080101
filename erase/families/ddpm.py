"""Class-conditional diffusion on pixels: a UNet whose conditioning is a class label, without VAE and text encoder."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DDIMPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.nn import Parameter

from erase.concepts import label_of, refusal
from erase.conditioning import Conditioning
from erase.delta import State
from erase.device import dtype_of
from erase.errors import EraseError
from erase.families import architecture, components, ddim_checkpoint, pipeline_folder, sd_parts, unet_file
from erase.families.discrete import DiscreteDiffusion
from erase.families.modes import evaluating, predicting
from erase.families.side_by_side_unet import SideBySideUNet2DModel
from erase.families.start import Start
from erase.families.stored_unet import reading
from erase.families.supported import Model
from erase.files import text_hash
from erase.guards import Guard
from erase.options.model_classes import PIPELINES, no_classes, read_classes
from erase.options.model_defaults import read_defaults
from erase.words import did_you_mean

UNETS: Mapping[str, Any] = {cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel, SideBySideUNet2DModel)}
_LABELS = "class_embedding."
_TIME = ("time_embedding.", "conv_out.", "conv_norm_out.")
_CAPTION = re.compile(r"(?i)an? (?:image|photo|picture|drawing) of (?:an?|the) ")  # of image folders


def _is_attention(name: str) -> bool:
    return ".attentions." in name


@dataclass
class PixelDiffusion(DiscreteDiffusion):
    """A class-conditional DDPM (Ho et al., NeurIPS 2020) with classifier-free guidance, in a DDIMPipeline's folder.

    A prompt is a class name, the empty prompt is the null class, and "latents" are the images themselves, in [-1, 1].
    DDIMPipeline and DDPMPipeline of diffusers pass no labels, so images are generated here, by the folder's scheduler.

    classes: names in the order of their labels, from "id2label" in model_index.json. The UNet has one label more than
        classes; the last one is the null class.
    weights_file: weights that replaced the folder's in the UNet.
    """

    family = "ddpm"
    pipelines = PIPELINES
    parts = ("unet", "classes")
    data_parts = ("classes",)
    scopes: ClassVar[Mapping[str, Callable[[str], bool]]] = {
        "full": lambda name: True,
        "attn": _is_attention,
        "selfattn": _is_attention,
        "noxattn": lambda name: not name.startswith((_LABELS, *_TIME)),
        "notime": lambda name: not name.startswith(_TIME),
        "label": lambda name: name.startswith(_LABELS),
    }
    guidance_scale = 3.0
    takes_guards = False
    checkpoint_dtype = "fp32"
    pipeline_tag = "unconditional-image-generation"
    tags = ("ddpm", "class-conditional")
    models = (
        Model("Class-conditional pixel models, epsilon prediction", read=False, written=False),
        Model("Class-conditional pixel models, v prediction", read=False, written=False),
        Model("Selective Amnesia's and SFRon's checkpoints (DDIM's UNet)", options="--config ddpm-cifar10"),
        Model("the embedded pixel model, `mini-pixel`", read=False, written=False),
    )

    name: str
    folder: Path
    unet: Any
    scheduler: SchedulerMixin
    classes: tuple[str, ...] = field()  # the base class has a default
    defaults: dict[str, Any]
    allow_pickle: bool = False
    guard: Guard | None = None
    weights_file: str | None = None
    notes: tuple[str, ...] = ()
    precision: str = "fp32"

    def __post_init__(self) -> None:
        self.vae_scale = 1
        self.read_schedule()

    # --- folders ---

    @classmethod
    def loading_code(cls, folder: Path, shown: str, alias: str = "") -> list[str]:
        """See `Stored.loading_code`. The pipeline itself passes no labels, which the last line says."""
        *lines, opened = super().loading_code(folder, shown, alias)
        return [*lines, f"{opened}  # it passes no labels: call pipeline.unet(x, t, class_labels=...)"]

    @classmethod
    def other_kind(cls, folder: Path) -> str | None:
        found = architecture.components(folder)
        name = architecture.pipeline_class(folder)
        if found.get("unet") not in UNETS or "scheduler" not in found:
            return f"a {name} whose UNet is {found.get('unet', 'missing')} instead of {' or '.join(UNETS)}"
        if surplus := sorted(found.keys() - {"unet", "scheduler"}):
            return f"a {name} with the component {surplus[0]!r}"
        config = components.require_types(folder / "unet" / "config.json", UNETS[found["unet"]])
        if config.get("num_class_embeds") is None:
            return ddim_checkpoint.UNCONDITIONAL
        return None

    @classmethod
    def from_folder(
        cls, source: str | Path, folder: Path, *, allow_pickle: bool = False, weights_file: str | Path | None = None
    ) -> Self:
        classes, notes = read_classes(folder), list[str]()
        unet = cls.read_network(folder, allow_pickle=allow_pickle, weights_file=weights_file, tell=notes.append)
        require_fit(folder, unet, classes)
        scheduler = sd_parts.load_scheduler(folder)
        model = cls(
            f"{source} with {Path(weights_file).name}" if weights_file else str(source),
            folder,
            unet,
            scheduler,
            classes,
            read_defaults(folder / pipeline_folder.DEFAULTS_FILE),
            allow_pickle,
            weights_file=None if weights_file is None else str(weights_file),
            notes=tuple(notes),
        )
        side = model.multiple * 2
        pixels = torch.linspace(-1, 1, 2 * 3 * side * side).view(2, 3, side, side)
        c = Conditioning(labels=torch.tensor([0, 1]))
        passes = {"unet": lambda: unet(pixels, sd_parts.TIMES, **model.inputs_of(pixels, c)).sample}
        sd_parts.require_working(folder, passes)
        return model

    @classmethod
    def read_network(
        cls,
        folder: Path,
        *,
        allow_pickle: bool = False,
        weights_file: str | Path | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> Any:
        with reading(folder):
            kind = UNETS[architecture.components(folder)["unet"]]
            network = components.load(kind, folder / "unet", allow_pickle=allow_pickle)
            if weights_file is not None:
                for note in unet_file.put_into(network, weights_file, allow_pickle=allow_pickle):
                    tell(note)
        return network

    @classmethod
    def knows_file(cls, shapes: Mapping[str, Sequence[int]]) -> bool:
        return ddim_checkpoint.knows(shapes)

    @classmethod
    def convert(
        cls, path: Path, *, allow_pickle: bool = False, config: str | None = None, cache_dir: Path | None = None
    ) -> tuple[Path, list[str]]:
        how: dict[str, Any] = {"allow_pickle": allow_pickle, "config": config, "cache_dir": cache_dir}
        return ddim_checkpoint.convert(path, **how)

    @classmethod
    def no_checkpoint(cls, folder: Path) -> str | None:
        is_published = architecture.components(folder)["unet"] == SideBySideUNet2DModel.__name__
        return None if is_published else super().no_checkpoint(folder)

    @classmethod
    def checkpoint(cls, folder: Path, network: State | None = None) -> dict[str, Tensor]:
        return ddim_checkpoint.tensors_of(network or pipeline_folder.read_weights(folder / cls.part))

    def stored_network(self) -> Any:
        return self.read_network(self.folder, allow_pickle=self.allow_pickle, weights_file=self.weights_file)

    def hash_of(self, part: str) -> str:
        return text_hash(self.classes) if part == "classes" else super().hash_of(part)

    # --- labels ---

    @property
    def null_label(self) -> int:
        return len(self.classes)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Labels, int64, [len(prompts)]: of class names, of "an image of a NAME", and the null class for "".

        Raises:
            EraseError: a prompt names no class.
        """
        refusal.refuse(prompts, "prompt")
        labels = [self._label(prompt) for prompt in prompts]
        for prompt, label in zip(prompts, labels, strict=True):
            if label is None:
                guess = did_you_mean(prompt, self.classes)
                raise EraseError(
                    f"{prompt!r} names no class of {self.name}; {guess}a prompt is one of {', '.join(self.classes)}"
                )
        return Conditioning(labels=torch.tensor(labels, dtype=torch.int64))

    def _label(self, prompt: str) -> int | None:
        text = _CAPTION.sub("", prompt.strip(), count=1)
        return self.null_label if not text else label_of(text, self.classes)

    @property
    def class_vectors(self) -> Parameter:
        return self.unet.class_embedding.weight

    @property
    def max_tokens(self) -> int:
        """A label counts as one token between a start and an end."""
        return 3

    def tokens(self, prompt: str) -> list[int]:
        label = self._label(prompt) if prompt.strip() else None
        return [] if label is None else [label]

    def all_tokens(self, prompt: str) -> list[int]:
        return self.tokens(prompt)

    # --- the network ---

    def inputs_of(self, x: Tensor, c: Conditioning) -> dict[str, Any]:
        text = {} if isinstance(self.unet, UNet2DModel) else {"encoder_hidden_states": None}
        return {"class_labels": c.labels, **text}

    def blank_inputs(self, num: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
        x = torch.empty(num, *self.latent_shape(size), dtype=dtype)
        labels = Conditioning(labels=torch.zeros(num, dtype=torch.int64))
        return {"sample": x, "timestep": torch.zeros(num, dtype=torch.int64), **self.inputs_of(x, labels)}

    def assembled(self, unet: Any, scheduler: SchedulerMixin) -> Any:
        """diffusers' pipeline, which holds the parts but passes no labels."""
        return DDIMPipeline(unet=unet, scheduler=scheduler)  # pyright: ignore[reportArgumentType]

    # --- images ---

    @property
    def multiple(self) -> int:
        return 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images themselves, and no spread."""
        return images.float().cpu(), torch.zeros(images.shape)

    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        return latents.float().clamp(-1, 1).cpu()

    @torch.no_grad()
    def _drawn(
        self, start: Start, network: Any, scheduler: Any, *, guidance: float, num_inference_steps: int
    ) -> Tensor:
        """Images by the scheduler's own steps; guidance is u + guidance (c - u), of raw outputs."""
        c = start.c if start.empty is None else Conditioning.cat([start.c, start.empty])
        scheduler.set_timesteps(num_inference_steps)
        x = start.noise if not start.generators else start.noise * scheduler.init_noise_sigma
        how = {"generator": start.generators or None} if "generator" in signature(scheduler.step).parameters else {}
        with evaluating(network), predicting(network, self.precision):
            for time in scheduler.timesteps:
                seen = scheduler.scale_model_input(x, time)
                seen = seen if start.empty is None else seen.repeat(2, 1, 1, 1)
                output = network(seen.to(dtype_of(network)), time, **self.inputs_of(seen, c)).sample.float()
                if start.empty is not None:
                    conditional, null = output.chunk(2)
                    output = null + guidance * (conditional - null)
                x = scheduler.step(output, time, x, return_dict=False, **how)[0]
        return x

    def _on_device(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode_text(prompts).each(self._staged)


def require_fit(folder: Path, unet: Any, classes: Sequence[str]) -> None:
    """Raise an EraseError where the UNet is not one of these classes and a null class."""
    config, where = unet.config, f"{folder}/unet/config.json"
    if not classes:
        raise no_classes(folder)
    if not isinstance(unet.class_embedding, torch.nn.Embedding):
        raise EraseError(f"{where}: class_embed_type is {config['class_embed_type']!r}; it must be null, a table")
    if unet.class_embedding.num_embeddings != len(classes) + 1:
        raise EraseError(
            f"{where}: num_class_embeds is {unet.class_embedding.num_embeddings}, but model_index.json names "
            f"{len(classes)} classes; it must be {len(classes) + 1}, with the null class of guidance as the last"
        )
    if config["in_channels"] != 3 or config["out_channels"] != 3:
        raise EraseError(
            f"{where}: the UNet takes {config['in_channels']} channels and gives {config['out_channels']}; a pixel "
            "model without a learned variance has 3 and 3"
        )
    if config.get("cross_attention_dim") and any(".attn2." in name for name, _ in unet.named_parameters()):
        raise EraseError(f"{where}: the UNet has cross-attention; a class-conditional pixel model has none")
    size = config["sample_size"]
    if not isinstance(size, int) or not 0 < size <= 1024:
        raise EraseError(f"{where}: sample_size is {size!r:.40}; it must be a side in pixels, 1 to 1024")
