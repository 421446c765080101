"""What one run is asked to do: every option with its meaning and default, and the recipes that are named sets of them.

Standard library only, so that the command line can be built from it without loading torch.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from erase.errors import EraseError

Save = Literal["pipeline", "unet", "delta", "single-file", "lora"]


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; the command line reads both."""
    if isinstance(default, (list, tuple)):
        return field(default=tuple(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Settings:
    """The options of `erase_concept` and of the command line, in the order of `--help`.

    None means: what the model's `erase_defaults.json` says, else the recipe, else what the help text names.
    """

    # what
    concept: str = option("", "preset (see --list), path of a .toml, or free text together with --kind", group="what")
    model: str = option(
        "CompVis/stable-diffusion-v1-4",
        "'mini' (embedded), a diffusers folder, a hub id, or a .safetensors/.ckpt file",
        group="what",
    )
    output: str | None = option(None, "run folder to write (default: runs/<concept>)", group="what")
    kind: Literal["object", "style"] | None = option(None, "what a free-text concept is", group="what")
    forget: tuple[str, ...] = option((), "forget prompt in place of the preset's; may be repeated", group="what")
    anchor: tuple[str, ...] = option((), "prompt to say instead; one for all or one per --forget", group="what")
    retain: tuple[str, ...] = option((), "retain prompt in place of the preset's; may be repeated", group="what")
    save: tuple[Save, ...] = option(("pipeline",), "what to write beside delta and mask; may be repeated", group="what")

    # how
    method: str = option("salun", "erasure method; 'salun' is relabel x full x saliency", group="how")
    recipe: Literal["default", "paper", "reference"] = option(
        "default", "named set of choices: ours, the SalUn paper's equations, or the SalUn code's formulas", group="how"
    )
    scope: Literal["full", "xattn", "xattn-kv", "selfattn", "noxattn", "notime"] = option(
        "full", "parameters that may move at all", group="how"
    )
    mask: str | None = option(
        None, "saliency, random, inverse, none, or a mask file (salun: saliency; other methods: none)", group="how"
    )
    density: float = option(0.5, "share of the scope's weights that may move, in (0, 1]", group="how")
    score: Literal["abs_sum", "sum_abs", "sum_sq"] = option(
        "abs_sum", "saliency score: |sum g| (the reference), sum |g| or sum g^2", group="how"
    )
    per_tensor: bool = option(False, "same density in every tensor instead of one global threshold", group="how")
    mask_guidance: float | None = option(
        None, "guidance g inside the mask's loss; (1+g) cond - g uncond (recipe: 0, reference 7.5)", group="how"
    )
    target: Literal["anchor", "random", "fixed"] | None = option(
        None,
        "what the forget prompt becomes: its anchor, a random other class per sample, or one fixed other class",
        group="how",
    )
    alpha: float | None = option(
        None, "weight of the retain loss (recipe: 1; reference 0.1 for nudity, else 0.5)", group="how"
    )

    # data
    forget_images: str | None = option(None, "folder of images (or datasets name) that show the concept", group="data")
    retain_images: str | None = option(None, "folder of images (or datasets name) to keep", group="data")
    num_forget: int | None = option(None, "forget images to draw (800)", group="data")
    num_retain: int | None = option(None, "retain images to draw (800)", group="data")
    num_inference_steps: int | None = option(None, "denoising steps a drawn image (50)", group="data")
    guidance_scale: float | None = option(None, "guidance of drawn images, diffusers' convention (7.5)", group="data")
    resolution: int | None = option(
        None, "side of the images in pixels (the model's own: 512 for SD v1.4)", group="data"
    )
    generation_batch_size: int | None = option(None, "images drawn at a time (8)", group="data")
    cache_dir: str | None = option(None, "where drawn latents are kept (~/.cache/erase-concept)", group="data")

    # training
    learning_rate: float | None = option(None, "Adam's step size (1e-5)", group="training")
    num_train_steps: int | None = option(None, "optimizer steps (100 for nudity, else 500)", group="training")
    batch_size: int | None = option(None, "forget and retain images a step, each (8)", group="training")
    weight_decay: float = option(0.0, "decoupled decay, inside the mask only", group="training")
    max_grad_norm: float | None = option(
        None, "clip the masked gradient's norm to this (no clipping)", group="training"
    )
    gradient_accumulation_steps: int = option(1, "parts that each step's batch is cut into", group="training")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory", group="training")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "precision of the UNet's passes", group="training")
    attention: Literal["sdpa", "xformers"] = option("sdpa", "attention kernels", group="training")
    seed: int = option(0, "seed of data, mask and training", group="training")
    device: str | None = option(None, "cpu, cuda or cuda:N (a GPU if there is one)", group="training")
    checkpointing_steps: int = option(50, "optimizer steps between checkpoints", group="training")
    report_to: Literal["tensorboard", "wandb"] | None = option(None, "tracker for the losses", group="training")
    resume: bool = option(
        False, "insist that there is an unfinished run to continue (continuing itself is automatic)", group="training"
    )

    # model files
    allow_pickle: bool = option(
        False, "load .ckpt/.bin checkpoints, which can run code; trust their source", group="files"
    )
    config: str | None = option(
        None, "diffusers folder with the configs and tokenizer for a single-file model, when offline", group="files"
    )
    revision: str | None = option(None, "branch, tag or commit on the hub", group="files")
    num_samples: int = option(6, "pictures a row in samples.png; 0 for none", group="files")
    lora_rank: int = option(64, "rank of --save lora, an approximation", group="files")
    overwrite: bool = option(False, "delete what is in the output folder first", group="files")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))
        self._check_choices()
        if not 0 < self.density <= 1:
            raise EraseError(f"--density is {self.density}; it must be above 0 and at most 1")
        for name in (
            *("num_forget", "num_retain", "num_inference_steps", "batch_size", "gradient_accumulation_steps"),
            *("checkpointing_steps", "resolution", "generation_batch_size", "lora_rank"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EraseError(f"{flag(name)} is {value}; it must be at least 1")
        for name in ("num_train_steps", "num_samples", "learning_rate", "alpha", "weight_decay", "mask_guidance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise EraseError(f"{flag(name)} is {value}; it must be 0 or more")
        if not self.concept.strip():
            raise EraseError("no concept given; for example --concept nudity (see --list)")

    def _check_choices(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), choices_of(item.type)
            for one in value if isinstance(value, tuple) else [value]:
                if choices and one is not None and one not in choices:
                    raise EraseError(f"{flag(item.name)} is {one!r}; choose {', '.join(choices)}")

    def filled(self, defaults: dict[str, Any]) -> "Settings":
        """These settings with None replaced by `defaults`."""
        given = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **given)


@dataclass(frozen=True)
class Recipe:
    """Where SalUn's paper, its code and this project differ (README has the table, measured).

    shared_latent: both branches see one noisy latent; the code draws two from the VAE's posterior.
    frozen_target: the target comes from the untouched base; paper and code take the moving model itself.
    distill_retain: keep the base's prediction on retain prompts; paper and code use the diffusion loss.
    in_order: forget images in order, epoch by epoch, as the code's unshuffled loader does.
    """

    shared_latent: bool
    frozen_target: bool
    distill_retain: bool
    in_order: bool
    mask_guidance: float
    target: str | None  # None: the anchor for nudity, one fixed other class for the rest
    alpha: float | None  # None: 0.1 for nudity, 0.5 for the rest


RECIPES: dict[str, Recipe] = {
    "default": Recipe(True, True, True, False, mask_guidance=0.0, target="anchor", alpha=1.0),
    "paper": Recipe(True, False, False, False, mask_guidance=0.0, target=None, alpha=None),
    "reference": Recipe(False, False, False, True, mask_guidance=7.5, target=None, alpha=None),
}

SD_DEFAULTS: dict[str, Any] = {
    "num_forget": 800,
    "num_retain": 800,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "generation_batch_size": 8,
    "learning_rate": 1e-5,
    "batch_size": 8,
}


def resolve(settings: Settings, kind: str, model_defaults: dict[str, Any]) -> Settings:
    """Every None filled in: from the model's own defaults, then from the recipe, then from SD v1.4's values.

    kind: of the concept; SalUn's settings differ between nudity and classes.
    """
    recipe, nudity = RECIPES[settings.recipe], kind == "nudity"
    settings = settings.filled({k: v for k, v in model_defaults.items() if k in SD_DEFAULTS or k == "num_train_steps"})
    settings = settings.filled(
        {
            "mask": "saliency" if settings.method == "salun" else "none",
            "mask_guidance": recipe.mask_guidance,
            "target": recipe.target or ("anchor" if nudity else "fixed"),
            "alpha": recipe.alpha if recipe.alpha is not None else (0.1 if nudity else 0.5),
        }
    )
    return settings.filled({**SD_DEFAULTS, "num_train_steps": 100 if nudity else 500})


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The texts that a Literal (or Literal | None, or tuple of Literals) allows; empty for any other type."""
    found: list[str] = [value for value in get_args(annotation) if isinstance(value, str)]
    for part in get_args(annotation):
        found += choices_of(part)
    return tuple(found)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
