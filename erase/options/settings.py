"""The options of `erase-concept`, each with its meaning and default.

Standard library only, so that the command line can be built from it without loading torch.
"""

from dataclasses import InitVar, dataclass, replace
from functools import partial
from typing import Any, Literal

from erase.concepts import FreeKind
from erase.errors import EraseError
from erase.methods import METHODS, find, others
from erase.options.declare import agreed_precision, make_plain, option
from erase.options.training import SD_DEFAULTS, Training, of_salun
from erase.registry import has_others

Save = Literal["pipeline", "unet", "delta", "single-file", "lora"]
# of all our families
SCOPES = ("full", "xattn", "xattn-kv", "attn", "selfattn", "noxattn", "notime", "pooled", "text", "text-first", "label")


@dataclass(frozen=True)
class Erasure:
    """What is erased, how, and from which images; see `Settings`."""

    # what
    concept: str | tuple[str, ...] = option(  # one is a tuple of one, as soon as it is here
        (), "preset (see --list), path of a .toml, or free text together with --kind; may be repeated", group="what"
    )
    model: str = option(
        "CompVis/stable-diffusion-v1-4",
        "'mini' or 'mini-pixel' (embedded), a diffusers folder, a hub id, or a .safetensors/.ckpt file",
        group="what",
    )
    unet: str | None = option(
        None,
        "file of UNet weights, all or some, that replace the model's: .safetensors, or a pickle with --allow-pickle; "
        "diffusers' or CompVis' names",
        group="what",
        shown="none",
        metavar="FILE",
    )
    base: str | None = option(
        None,
        "run folder to start from instead of --model: its concepts stay erased, and the two masks are united",
        group="what",
        shown="none",
        metavar="DIR",
    )
    output: str | None = option(None, "run folder to write", group="what", shown="runs/<concept>", metavar="DIR")
    kind: FreeKind | None = option(None, "kind of a free-text concept", group="what")
    forget: tuple[str, ...] = option(
        (), "forget prompt instead of the concept's own; may be repeated", group="what", metavar="PROMPT"
    )
    anchor: tuple[str, ...] = option(
        (),
        "prompt that replaces a forget prompt: one for all, or one for each; may be repeated",
        group="what",
        metavar="PROMPT",
    )
    retain: tuple[str, ...] = option(
        (), "retain prompt instead of the concept's own; may be repeated", group="what", metavar="PROMPT"
    )
    erase_from: str | None = option(
        None, "erase it from this concept only, and keep it elsewhere", group="what", shown="none", metavar="CONCEPT"
    )
    save: tuple[Save, ...] = option(
        ("pipeline",), "what to write besides delta and mask; may be repeated", group="what"
    )

    # how
    method: str = option(
        "salun",
        f"erasure method: {', '.join(METHODS)}, or module:Class; 'salun' is relabel with a saliency mask",
        group="how",
        choices=tuple(METHODS),
        more=others,
        also="module:Class",
        metavar="METHOD",
    )
    recipe: Literal["default", "paper", "reference"] = option(
        "default", "set of defaults: this project's, those of SalUn's paper, or those of SalUn's code", group="how"
    )
    prompts: Literal["ours", "code"] | None = option(
        None,
        "prompts of a preset or of free text: this project's lists (ours), or one forget and one retain prompt as in "
        "SalUn's code, where class c becomes class c + 1 (code); --forget, --anchor and --retain replace both",
        group="how",
        shown="ours; code for the recipes paper and reference",
    )
    set: tuple[str, ...] = option(
        (),
        "hyperparameter of the method; may be repeated; the error for an unknown name lists all",
        group="how",
        shown="the method's own",
        metavar="NAME=VALUE",
    )
    scope: str | None = option(
        None,
        f"parameters that may change at all: {', '.join(SCOPES)}; which of them there are depends on the model's "
        "architecture",
        group="how",
        choices=SCOPES,
        metavar="SCOPE",
        is_open=partial(has_others, "erase.families"),
        shown="the method's own, full for salun",
    )
    mask: str | None = option(
        None,
        "weights that may change inside the scope: saliency, random, inverse, none, or a mask file",
        group="how",
        shown="saliency for salun, none for other methods",
    )
    density: float = option(0.5, "share of the scope's weights that may change, above 0 and at most 1", group="how")
    score: Literal["abs_sum", "sum_abs", "sum_sq"] = option(
        "abs_sum", "saliency score: |sum g| (as in SalUn's code), sum |g| or sum g^2", group="how"
    )
    per_tensor: bool = option(False, "same density in every tensor instead of one global threshold", group="how")
    mask_guidance: float | None = option(
        None,
        "guidance g inside the mask's loss, (1+g) cond - g uncond",
        group="how",
        least=0,
        most=1000,
        shown="0; 7.5 for the recipe reference",
    )
    mask_attack: float = option(
        0.0,
        "compute the saliency mask under attack: text states move by up to this many of their standard deviations, "
        "towards a lower forget loss; 0 for the prompts as they are",
        group="how",
        least=0,
        most=100,
        metavar="R",
    )
    target: Literal["anchor", "random", "fixed"] | None = option(
        None,
        "what replaces the forget prompt: its anchor, a random other class for each image, or one fixed other class",
        group="how",
        shown="anchor; fixed for salun with the recipes paper and reference, except for nudity",
    )
    alpha: float | None = option(
        None,
        "weight of the retain loss",
        group="how",
        least=0,
        most=1e6,
        shown="1 for salun; with the recipes paper and reference 0.5, for nudity 0.1",
    )

    # data
    forget_images: str | None = option(
        None,
        "folder of images that show the concept, or a data set on the hub",
        group="data",
        shown="generated",
        metavar="DIR",
    )
    retain_images: str | None = option(
        None, "folder of retain images, or a data set on the hub", group="data", shown="generated", metavar="DIR"
    )
    num_forget: int | None = option(
        None, "forget images to generate", group="data", least=1, most=1_000_000, shown=of_salun("num_forget")
    )
    num_retain: int | None = option(
        None, "retain images to generate", group="data", least=1, most=1_000_000, shown=str(SD_DEFAULTS["num_retain"])
    )
    num_inference_steps: int | None = option(
        None,
        "sampling steps for each generated image",
        group="data",
        least=1,
        most=1000,
        aliases=("--steps",),
        shown="20 for salun; 50 with the model's own scheduler",
    )
    sampler: Literal["model", "dpm++"] | None = option(
        None,
        "scheduler for training images and samples.png: the model's own, or DPM++ 2M Karras, which needs fewer steps "
        "(10 to 20); the saved pipeline keeps the model's scheduler",
        group="data",
        shown="dpm++; model for the recipes paper and reference and for models that bring their own number of steps",
    )
    guidance_scale: float | None = option(
        None,
        "guidance scale of generated images, as in diffusers: 1 or less means no guidance",
        group="data",
        least=0,
        most=1000,
        aliases=("--guidance",),
        shown=str(SD_DEFAULTS["guidance_scale"]),
    )
    resolution: int | None = option(
        None,
        "side of the images in pixels",
        group="data",
        least=1,
        most=8192,
        shown="the model's own, 512 for SD v1.4",
        aliases=("--size",),
    )
    generation_batch_size: int | None = option(
        None,
        "images generated at once",
        group="data",
        least=1,
        most=100_000,
        shown=f"{SD_DEFAULTS['generation_batch_size']}; on a GPU up to 32, by its free memory",
    )
    cache_dir: str | None = option(
        None, "cache for latents of generated images", group="data", shown="$ERASE_CACHE, or ~/.cache/erase-concept"
    )


@dataclass(frozen=True)
class Settings(Training, Erasure):
    """The options of `erase_concept` and of the command line, in the order of `--help`.

    None means: what the model's `erase_defaults.json` says, else the recipe, else what `--help` shows.
    """

    allow_pickle: bool = option(
        False, "read .ckpt, .bin and .pt files, which can contain code; only tensors are read", group="files"
    )
    config: str | None = option(
        None,
        "diffusers folder with the configs and the tokenizer of a single-file model, for work offline; for a pixel "
        "model's checkpoint its class names: ddpm-cifar10, ddpm-stl10, or a folder with id2label",
        group="files",
        metavar="DIR",
    )
    revision: str | None = option(None, "branch, tag or commit on the hub", group="files", shown="main")
    num_samples: int = option(6, "images in each row of samples.png; 0: no file", group="files", least=0, most=100)
    lora_rank: int | None = option(
        None,
        "rank of --save lora; a higher rank is closer to the erased model",
        group="files",
        least=1,
        most=10_000,
        shown="that of --rank, else 64",
    )
    overwrite: bool = option(False, "delete an earlier run in the output folder first", group="files")
    mixed_precision: InitVar[str | None] = None  # `precision` under the name that diffusers' scripts give it

    def __post_init__(self, mixed_precision: str | None) -> None:
        """Make every value plain, and raise an EraseError for one that is not allowed."""
        object.__setattr__(self, "precision", agreed_precision(self.precision, mixed_precision))
        make_plain(self)
        if not 0 < self.density <= 1:
            raise EraseError(f"--density is {self.density}; it must be above 0 and at most 1")
        if self.max_grad_norm == 0:
            raise EraseError("--max-grad-norm is 0, which stops all training; leave it out for no clipping")
        if self.weights == "bf16" and self.precision == "fp16":
            raise EraseError("--weights bf16 does not go with --precision fp16; choose bf16 or fp32")
        if not self.concept or not all(name.strip() for name in self.concept):
            raise EraseError("no concept given; for example --concept nudity (see --list)")
        if len(self.concept) > 1 and (self.forget or self.anchor):
            raise EraseError("--forget and --anchor go with one --concept; describe several in .toml files")

    def filled(self, defaults: dict[str, Any]) -> "Settings":
        """These settings with None replaced by `defaults`."""
        given = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **given)


def settings_of_recipe(settings: Settings) -> set[str]:
    """Settings that the user chose by the name of a recipe; a method that has its own value keeps that."""
    return set() if settings.recipe == "default" else {*_OF_RECIPE} - find(settings.method).defaults().keys()


def hyperparameter_name(text: str) -> str:
    """The name in "name=value"."""
    return text.partition("=")[0].strip().replace("-", "_")


_OF_RECIPE = ("target", "alpha", "mask_guidance", "sampler")
