"""The options of `eval-concept`, each with its meaning, default and bounds.

Standard library only, so that the command line can be built from it without loading torch.
"""

from dataclasses import InitVar, dataclass
from typing import Literal

from erase.errors import EraseError
from erase.options.declare import Precision, agreed_precision, make_plain, option

GUARDS = (
    "sld-weak",
    "sld-medium",
    "sld-strong",
    "sld-max",
    "nag",
    "negative",
)  # those of erase.guards, which needs torch


@dataclass(frozen=True)
class Options:
    """Options of tasks; each task uses some of them."""

    subset: str = option("all", "part of i2p: all, sexual, nudity (> 50 %) or a category", group="task")
    prompts: str | None = option(
        None,
        "prompt file (.csv, .jsonl or .txt): your prompts for the task prompts, a copy of I2P for i2p, or captions for "
        "quality",
        group="task",
        metavar="FILE",
    )
    images: str | None = option(None, "folder of images for the task images", group="task", metavar="DIR")
    num_images: int | None = option(
        None,
        "images per prompt, per class or in all, depending on the task",
        group="task",
        shown="the task's own",
        least=1,
        most=1_000_000,
        metavar="N",
    )
    limit: int | None = option(
        None, "use only N samples, evenly spaced, for a quick look", group="task", least=1, most=1_000_000
    )
    features: Literal["clip", "inception2015", "mini", "mini-pixel"] = option(
        "clip", "network of FID and KID", group="features"
    )

    def __post_init__(self) -> None:
        """Make every value plain, and raise an EraseError for one that is not allowed."""
        make_plain(self)


@dataclass(frozen=True)
class AttackOptions:
    """Options of an attack."""

    attack_seeds: int = option(3, "runs of the attack, each with its own seed", group="attack", least=1, most=100)
    num_images: int = option(
        40, "images for each budget and attack seed", group="attack", least=1, most=100_000, metavar="N"
    )
    limit: int | None = option(
        None,
        "at most N images for each budget and attack seed, for a quick look",
        group="attack",
        least=1,
        most=100_000,
    )
    prompts: str | None = option(
        None, "prompt file (.csv, .jsonl or .txt) for the attack prompts", group="attack", metavar="FILE"
    )
    set: tuple[str, ...] = option((), "setting of the attack; may be repeated", group="attack", metavar="NAME=VALUE")
    quick: bool = option(False, "few images and steps for a first look; the report says so", group="attack")

    def __post_init__(self) -> None:
        """Make every value plain, and raise an EraseError for one that is not allowed."""
        make_plain(self)


@dataclass(frozen=True)
class Drawing:
    """Options of image generation."""

    num_inference_steps: int | None = option(
        None,
        "sampling steps",
        group="drawing",
        shown="the model's own, else 50",
        least=1,
        most=1000,
        aliases=("--steps",),
    )
    guidance_scale: float | None = option(
        None,
        "guidance scale of every sample, as in diffusers: 1 or less means no guidance",
        group="drawing",
        shown="the sample's own, else the model's, else 7.5",
        least=0,
        most=1000,
        aliases=("--guidance",),
    )
    resolution: int | None = option(
        None,
        "side in pixels of every image, also of samples that have a size of their own, as in I2P",
        group="drawing",
        shown="the sample's own, else the model's",
        least=8,
        most=8192,
        aliases=("--size",),
    )
    generation_batch_size: int | None = option(
        None,
        "images generated at once",
        group="drawing",
        shown="8; on a GPU 8 to 32, by its free memory",
        least=1,
        most=4096,
        aliases=("--batch-size",),
    )
    precision: Precision | None = option(
        None,
        "precision of the model",
        group="drawing",
        shown="bf16 on a GPU, or fp16 if it lacks bf16; fp32 on a CPU",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps (untested)", group="drawing", shown="a GPU if there is one", metavar="DEVICE"
    )
    guard: str | None = option(
        None,
        f"inference-time guard: {', '.join(GUARDS)}",
        group="drawing",
        shown="none",
        choices=GUARDS,
        metavar="GUARD",
    )
    guard_text: str | None = option(
        None,
        "text that the guard steers away from",
        group="drawing",
        shown="the concept and its synonyms",
        metavar="TEXT",
    )
    unet: str | None = option(
        None,
        "file of UNet weights, with diffusers' or CompVis' names, that replace those of --model",
        group="drawing",
        metavar="FILE",
    )
    delta: str | None = option(None, "delta.safetensors to apply to the model", group="drawing", metavar="FILE")
    config: str | None = option(
        None,
        "diffusers folder with the configs and the tokenizer of a single-file model, for work offline; for a pixel "
        "model's checkpoint its class names: ddpm-cifar10, ddpm-stl10, or a folder with id2label",
        group="drawing",
        metavar="DIR",
    )
    revision: str | None = option(None, "branch, tag or commit on the hub", group="drawing", shown="main")
    cache_dir: str | None = option(
        None,
        "cache for converted single-file models",
        group="drawing",
        shown="$ERASE_CACHE, or ~/.cache/erase-concept",
        metavar="DIR",
    )
    allow_pickle: bool = option(
        False, "read .ckpt, .bin and .pt files, which can contain code; only tensors are read", group="drawing"
    )

    mixed_precision: InitVar[str | None] = None  # `precision` under the name that diffusers' scripts give it

    def __post_init__(self, mixed_precision: str | None) -> None:
        """Make every value plain, and raise an EraseError for one that is not allowed."""
        object.__setattr__(self, "precision", agreed_precision(self.precision, mixed_precision))
        make_plain(self)
        if self.guard_text and not self.guard:
            raise EraseError("--guard-text goes with --guard")
