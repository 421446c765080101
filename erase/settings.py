"""What one run is asked to do: every option with its meaning and default, and the recipes that are named sets of them.

Standard library only, so that the command line can be built from it without loading torch.
"""

import difflib
import functools
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, InitVar, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from erase.concepts import FreeKind
from erase.errors import EraseError
from erase.files import read_json
from erase.methods import METHODS, find

Save = Literal["pipeline", "unet", "delta", "single-file", "lora"]

SD_DEFAULTS: dict[str, Any] = {
    "num_forget": 800,
    "num_retain": 800,
    "guidance_scale": 7.5,
    "generation_batch_size": 8,
    "learning_rate": 1e-5,
    "batch_size": 8,
    "weight_decay": 0.0,
}


SAMPLER_STEPS = {"model": 50, "dpm++": 20}


def option(default: Any, help: str, *, group: str, **metadata: Any) -> Any:
    """A dataclass field with what the command line says of it.

    group: heading of `--help` under which it stands. metadata, as far as it applies: `least` and `most`, the smallest
    and the largest number allowed; `aliases`, other flags for it; `shown`, what stands for a default of None in
    `--help`; `metavar`, its value's name there; `choices`, the texts allowed where a Literal cannot list them;
    `also`, the form of a text with a colon that is allowed beside them.
    """
    return field(default=default, metadata={"help": help, "group": group, **metadata})


@dataclass(frozen=True)
class Settings:
    """The options of `erase_concept` and of the command line, in the order of `--help`.

    None means: what the model's `erase_defaults.json` says, else the recipe, else what `--help` shows.
    """

    # what
    concept: str | tuple[str, ...] = option(  # one is a tuple of one, as soon as it is here
        (), "preset (see --list), path of a .toml, or free text together with --kind; may be repeated", group="what"
    )
    model: str = option(
        "CompVis/stable-diffusion-v1-4",
        "'mini' (embedded), a diffusers folder, a hub id, or a .safetensors/.ckpt file",
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
        "run folder to go on from in place of a model: what it erased stays erased, its mask is united with this one's",
        group="what",
        shown="none",
        metavar="DIR",
    )
    output: str | None = option(None, "run folder to write", group="what", shown="runs/<concept>", metavar="DIR")
    kind: FreeKind | None = option(None, "what a free-text concept is", group="what")
    forget: tuple[str, ...] = option(
        (), "forget prompt in place of the concept's; may be repeated", group="what", metavar="PROMPT"
    )
    anchor: tuple[str, ...] = option(
        (),
        "prompt that replaces the forget prompt; one for all or one per forget prompt",
        group="what",
        metavar="PROMPT",
    )
    retain: tuple[str, ...] = option(
        (), "retain prompt in place of the concept's; may be repeated", group="what", metavar="PROMPT"
    )
    save: tuple[Save, ...] = option(("pipeline",), "what to write beside delta and mask; may be repeated", group="what")

    # how
    method: str = option(
        "salun",
        f"erasure method: {', '.join(METHODS)}; 'salun' is relabel x full x saliency",
        group="how",
        choices=tuple(METHODS),
        also="module:Class",
        metavar="METHOD",
    )
    recipe: Literal["default", "paper", "reference"] = option(
        "default", "named set of choices: ours, the SalUn paper's equations, or the SalUn code's formulas", group="how"
    )
    set: tuple[str, ...] = option(
        (),
        "hyperparameter of the method; may be repeated (a wrong name lists them)",
        group="how",
        shown="the paper's",
        metavar="NAME=VALUE",
    )
    scope: Literal["full", "xattn", "xattn-kv", "selfattn", "noxattn", "notime"] | None = option(
        None, "parameters that may move at all", group="how", shown="the method's own, full for salun"
    )
    mask: str | None = option(
        None,
        "weights that may move inside the scope: saliency, random, inverse, none, or a mask file",
        group="how",
        shown="saliency for salun, none for other methods",
    )
    density: float = option(0.5, "share of the scope's weights that may move, above 0 and at most 1", group="how")
    score: Literal["abs_sum", "sum_abs", "sum_sq"] = option(
        "abs_sum", "saliency score: |sum g| (the SalUn code's), sum |g| or sum g^2", group="how"
    )
    per_tensor: bool = option(False, "same density in every tensor instead of one global threshold", group="how")
    mask_guidance: float | None = option(
        None,
        "guidance g inside the mask's loss, (1+g) cond - g uncond",
        group="how",
        least=0,
        most=1000,
        shown="0; recipe reference 7.5",
    )
    target: Literal["anchor", "random", "fixed"] | None = option(
        None,
        "what the forget prompt becomes: its anchor, a random other class per sample, or one fixed other class",
        group="how",
        shown="anchor; other recipes fixed, except for nudity",
    )
    alpha: float | None = option(
        None,
        "weight of the retain loss",
        group="how",
        least=0,
        most=1e6,
        shown="1; other recipes 0.5, for nudity 0.1",
    )

    # data
    forget_images: str | None = option(
        None,
        "folder of images (or datasets name) that show the concept",
        group="data",
        shown="generated",
        metavar="DIR",
    )
    retain_images: str | None = option(
        None, "folder of images (or datasets name) to keep", group="data", shown="generated", metavar="DIR"
    )
    num_forget: int | None = option(None, "forget images to generate", group="data", least=1, most=1_000_000)
    num_retain: int | None = option(None, "retain images to generate", group="data", least=1, most=1_000_000)
    num_inference_steps: int | None = option(
        None,
        "denoising steps of a generated image",
        group="data",
        least=1,
        most=1000,
        aliases=("--steps",),
        shown="20; 50 with the model's own scheduler",
    )
    sampler: Literal["model", "dpm++"] | None = option(
        None,
        "scheduler that generates training images and samples.png: the model's own, or DPM++ 2M Karras, which needs "
        "fewer steps (10 to 20); the scheduler that is written stays the model's",
        group="data",
        shown="dpm++; other recipes, and models that bring their own number of steps: model",
    )
    guidance_scale: float | None = option(
        None,
        "guidance of generated images, diffusers' convention: 1 or less is none",
        group="data",
        least=0,
        most=1000,
        aliases=("--guidance",),
    )
    resolution: int | None = option(
        None,
        "side of the images in pixels",
        group="data",
        least=1,
        most=8192,
        shown="the model's own, 512 for SD v1.4",
    )
    generation_batch_size: int | None = option(None, "images generated at a time", group="data", least=1, most=100_000)
    cache_dir: str | None = option(
        None, "cache of the generated images' latents", group="data", shown="$ERASE_CACHE, or ~/.cache/erase-concept"
    )

    # training
    learning_rate: float | None = option(None, "Adam's step size", group="training", least=0, most=1000)
    num_train_steps: int | None = option(
        None, "optimizer steps", group="training", least=0, most=10_000_000, shown="500; 100 for nudity"
    )
    batch_size: int | None = option(
        None, "forget images a step, and as many retain images", group="training", least=1, most=100_000
    )
    rank: int | None = option(
        None,
        "train no weights, but a change of this rank of each attention and feed-forward matrix in the scope, all of "
        "which --save lora then holds",
        group="training",
        least=1,
        most=10_000,
        shown="4 for leco, else none",
    )
    weight_decay: float | None = option(
        None, "decoupled decay, inside the mask only", group="training", least=0, most=1e6
    )
    max_grad_norm: float | None = option(
        None,
        "clip the masked gradient's norm to this",
        group="training",
        least=0,
        most=1e12,
        shown="the method's own, or none",
    )
    gradient_accumulation_steps: int = option(
        1, "parts that each step's batch is cut into, to save memory", group="training", least=1, most=100_000
    )
    gradient_checkpointing: bool = option(False, "recompute activations to save memory", group="training")
    weights: Literal["fp32", "bf16"] | None = option(
        None,
        "storage of the UNet during mask and training; bf16 halves it, with float32 masters of the weights that may "
        "move, and all others end as they were",
        group="training",
        shown="fp32; with --low-memory on a GPU bf16",
    )
    moments: Literal["fp32", "8bit"] = option(
        "fp32", "storage of Adam's moments; 8bit takes a quarter, approximately (bitsandbytes)", group="training"
    )
    low_memory: bool = option(
        False,
        "checkpointing, parts of one image (a small model: of more), on a GPU bf16 weights; slower, and says first how "
        "much it needs",
        group="training",
    )
    precision: Literal["fp32", "fp16", "bf16"] | None = option(
        None,
        "precision of all passes through UNet and VAE: generation, mask, training and samples.png; weights are trained "
        "and written in float32 all the same",
        group="training",
        shown="on a GPU bf16, or fp16 if the card lacks it; else fp32",
    )
    attention: Literal["sdpa", "xformers"] = option("sdpa", "attention kernels", group="training")
    seed: int = option(0, "seed of data, mask and training", group="training", least=0, most=2**32 - 1)
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps (untested)", group="training", shown="a GPU if there is one", metavar="DEVICE"
    )
    checkpointing_steps: int = option(
        50, "optimizer steps between checkpoints", group="training", least=1, most=10_000_000
    )
    report_to: Literal["tensorboard", "wandb"] | None = option(
        None, "tracker for the losses", group="training", shown="none"
    )
    resume: bool = option(
        False, "insist that there is an unfinished run to continue (continuing itself is automatic)", group="training"
    )

    # files
    allow_pickle: bool = option(
        False, "load .ckpt/.bin checkpoints, which can run code; trust their source", group="files"
    )
    config: str | None = option(
        None,
        "diffusers folder with the configs and tokenizer for a single-file model, when offline",
        group="files",
        metavar="DIR",
    )
    revision: str | None = option(None, "branch, tag or commit on the hub", group="files", shown="main")
    num_samples: int = option(6, "images in each row of samples.png; 0 for none", group="files", least=0, most=100)
    lora_rank: int | None = option(
        None,
        "rank of --save lora, an approximation",
        group="files",
        least=1,
        most=10_000,
        shown="that of --rank, else 64",
    )
    overwrite: bool = option(False, "delete what is in the output folder first", group="files")
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


@dataclass(frozen=True)
class Recipe:
    """Where SalUn's paper, its code and this project differ (README has the table, measured).

    shared_latent: both branches see one noisy latent; the code draws two from the VAE's posterior.
    frozen_target: the target comes from the untouched base; paper and code take the moving model itself.
    distill_retain: keep the base's prediction on retain prompts; paper and code use the diffusion loss.
    in_order: forget images in order, epoch by epoch, as the code's unshuffled loader does.
    sampler: of training images and samples.png.
    """

    shared_latent: bool
    frozen_target: bool
    distill_retain: bool
    in_order: bool
    mask_guidance: float
    target: str | None  # None: the anchor for nudity, one fixed other class for the rest
    alpha: float | None  # None: 0.1 for nudity, 0.5 for the rest
    sampler: str = "model"


RECIPES: dict[str, Recipe] = {
    "default": Recipe(True, True, True, False, mask_guidance=0.0, target="anchor", alpha=1.0, sampler="dpm++"),
    "paper": Recipe(True, False, False, False, mask_guidance=0.0, target=None, alpha=None),
    "reference": Recipe(False, False, False, True, mask_guidance=7.5, target=None, alpha=None),
}


def resolve(
    settings: Settings,
    kind: str,
    model_defaults: dict[str, Any],
    *,
    num_processes: int = 1,
    part: int = 1,
    on_gpu: bool = False,
) -> Settings:
    """Every None filled in: from the model's own defaults, then the method's and the recipe's, then SD v1.4's values.

    model_defaults: see `read_defaults`. What the user gave always wins over them, and so does what a
        recipe other than the default one says.
    kind: of the concept; SalUn's settings differ between nudity and classes.
    num_processes: that share a batch. part: images of a share that --low-memory keeps together at most.
    on_gpu: --low-memory rounds the weights there only, because CPUs without AMX are slower in bf16.
    """
    recipe, nudity = RECIPES[settings.recipe], kind == "nudity"
    of_recipe = _of_recipe(settings)
    own = {k: v for k, v in model_defaults.items() if k in _OF_MODEL and k not in of_recipe}
    of_method = model_defaults.get("methods", {}).get(settings.method, {})
    of_method = {k: v for k, v in of_method.items() if k not in of_recipe}
    taken = _given_hyperparameters(settings)
    own_set = [text for text in of_method.pop("set", ()) if _hyperparameter(text) not in taken]
    settings = replace(settings, set=(*own_set, *settings.set))
    if "num_inference_steps" in own:
        own.setdefault("sampler", "model")  # the steps were chosen for it
    settings = settings.filled(of_method).filled(own)
    settings = settings.filled(
        {
            "mask_guidance": recipe.mask_guidance,
            "target": recipe.target or ("anchor" if nudity else "fixed"),
            "alpha": recipe.alpha if recipe.alpha is not None else (0.1 if nudity else 0.5),
            **find(settings.method).defaults(),
        }
    )
    settings = settings.filled({"sampler": recipe.sampler})
    settings = settings.filled({"num_inference_steps": SAMPLER_STEPS[str(settings.sampler)]})
    settings = settings.filled({**SD_DEFAULTS, "num_train_steps": 100 if nudity else 500})
    _require_use(settings)
    settings = settings.filled({"lora_rank": settings.rank or 64})
    if settings.low_memory:
        share = (settings.batch_size or 1) // num_processes
        together = max((size for size in range(1, min(share, part) + 1) if share % size == 0), default=1)
        parts = max(settings.gradient_accumulation_steps, share // together)
        settings = replace(settings, gradient_checkpointing=True, gradient_accumulation_steps=parts)
    rounds = settings.low_memory and on_gpu and settings.precision != "fp16"
    return settings.filled({"weights": "bf16" if rounds else "fp32"})


def _given_hyperparameters(settings: Settings) -> set[str]:
    """Hyperparameters of methods that the user's options decide: by name in `set`, or by an option of their own."""
    taken = {_hyperparameter(text) for text in settings.set} | {"seed"}
    taken |= {"alpha"} if settings.alpha is not None else set()
    taken |= {"frozen_target", "distill_retain"} if settings.recipe != "default" else set()
    return taken | _of_recipe(settings)


def _of_recipe(settings: Settings) -> set[str]:
    """Settings that the user chose by the name of a recipe; a method that has its own value keeps that."""
    return set() if settings.recipe == "default" else {*_OF_RECIPE} - find(settings.method).defaults().keys()


def _hyperparameter(text: str) -> str:
    """The name in "name=value"."""
    return text.partition("=")[0].strip().replace("-", "_")


def require_consistent(settings: Settings) -> None:
    """Check what the user gave, before anything is filled in.

    Raises:
        EraseError: two options contradict each other, or one would do nothing.
    """
    if settings.resume and settings.overwrite:
        raise EraseError("--resume continues what --overwrite deletes; leave one out")
    if settings.lora_rank is not None and "lora" not in settings.save:
        raise EraseError(f"--lora-rank {settings.lora_rank} is for --save lora, which is not asked for; add it")
    for kind in ("forget", "retain"):
        num, folder = getattr(settings, f"num_{kind}"), getattr(settings, f"{kind}_images")
        if num is not None and folder is not None:
            raise EraseError(f"--num-{kind} {num} has no effect with --{kind}-images; leave one out")
    if settings.alpha is not None and "alpha" in map(_hyperparameter, settings.set):
        raise EraseError(f"--alpha {settings.alpha:g} and --set alpha are both given; leave one out")


def _require_use(settings: Settings) -> None:
    """Raise an EraseError for an option about a mask that is not made; of resolved settings."""
    kind = settings.mask if settings.mask in {"saliency", "inverse", "random", "none"} else "file"
    unused = {"none": ("density", "per_tensor", "score"), "file": ("density", "per_tensor", "score")}
    for name in unused.get(kind, ("score",) if kind == "random" else ()):
        if getattr(settings, name) != Settings.__dataclass_fields__[name].default:
            why = "without a mask; add --mask saliency" if kind == "none" else f"with --mask {settings.mask}"
            raise EraseError(f"{flag(name)} has no effect {why}")


# --- the model's own defaults ---------------------------------------------------------------------------------------

_OF_MODEL = (*SD_DEFAULTS, "num_train_steps", "num_inference_steps", "sampler")
_OF_RECIPE = ("target", "alpha", "mask_guidance", "sampler")
_OF_METHOD = (*_OF_MODEL, "scope", "target", "alpha", "mask_guidance", "rank", "max_grad_norm", "set")


def read_defaults(path: Path) -> dict[str, Any]:
    """What a model's erase_defaults.json says of settings; empty where there is no such file.

    It holds "family", settings of `_OF_MODEL`, and under "methods" settings of `_OF_METHOD` by method.

    Raises:
        EraseError: an unknown name, or a value that the setting does not take.
    """
    if not path.is_file():
        return {}
    found = read_json(path)
    own = {key: value for key, value in found.items() if key not in {"family", "methods"}}
    _check_defaults(own, _OF_MODEL, f"{path}")
    of_methods = found.get("methods", {})
    if not isinstance(of_methods, dict) or not all(isinstance(values, dict) for values in of_methods.values()):
        raise EraseError(f"{path}: methods must hold an object of settings for each method")
    if not isinstance(found.get("family", ""), str):
        raise EraseError(f"{path}: family is {found['family']!r}; it must be a text")
    for method, values in of_methods.items():
        if method not in METHODS:
            raise EraseError(f"{path}: unknown method {method!r}; choose from {', '.join(METHODS)}")
        _check_defaults(values, _OF_METHOD, f"{path}, {method}")
    return found


def _check_defaults(values: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for name, value in values.items():
        if name not in known:
            raise EraseError(f"{where}: unknown setting {name!r}; choose from {', '.join(known)}")
        item = Settings.__dataclass_fields__[name]
        if isinstance(value, bool) or value is None or (name == "set") != isinstance(value, list):
            raise EraseError(
                f"{where}: {name} is {value!r}; it must be {'a list of texts' if name == 'set' else 'a value'}"
            )
        try:
            _checked(value, item, forms()[name])
        except EraseError as error:
            raise EraseError(f"{where}: {str(error).removeprefix('--').replace('-', '_', name.count('_'))}") from error
        for text in value if name == "set" else ():
            if "=" not in text:
                raise EraseError(f"{where}: set has {text!r}; it must be NAME=VALUE")


# --- what an annotation says ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """The values that a field takes: their type, the texts allowed (empty: any), and whether it holds several."""

    type: type
    choices: tuple[str, ...] = ()
    is_repeated: bool = False


@functools.cache
def forms(options: type = Settings) -> dict[str, Form]:
    """The form of every field of a dataclass of options, by its name."""
    annotations = get_type_hints(options)
    found = {item.name: _form(annotations[item.name]) for item in fields(options)}
    listed = {item.name: item.metadata["choices"] for item in fields(options) if "choices" in item.metadata}
    return found | {name: replace(found[name], choices=choices) for name, choices in listed.items()}


def make_plain(options: Any) -> None:
    """Make every value of a frozen dataclass of options plain, and raise an EraseError for one that is not allowed."""
    for item in fields(options):
        value = getattr(options, item.name)
        if value is not None or item.default is not None:
            object.__setattr__(options, item.name, _checked(value, item, forms(type(options))[item.name]))


MIXED_PRECISION = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}  # diffusers' names, and ours


def agreed_precision(precision: str | None, mixed_precision: str | None) -> str | None:
    """The precision, which may be given under either name.

    Raises:
        EraseError: the two names have different values, or `mixed_precision` has none that exists.
    """
    if mixed_precision is None:
        return precision
    if mixed_precision not in MIXED_PRECISION:
        raise EraseError(f"--mixed-precision is {mixed_precision!r}; choose {', '.join(MIXED_PRECISION)}")
    if precision not in {None, MIXED_PRECISION[mixed_precision]}:
        raise EraseError(
            f"--precision is {precision} but --mixed-precision {mixed_precision}; they mean the same, leave one out"
        )
    return MIXED_PRECISION[mixed_precision]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _form(annotation: Any) -> Form:
    """Of X, X | None, Literal[texts], tuple[X, ...] and X | tuple[X, ...], which are all that Settings is made of."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        *_, last = (part for part in parts if part is not NoneType)  # of X | tuple[X, ...] the tuple
        return _form(last)
    if origin is tuple:
        return replace(_form(parts[0]), is_repeated=True)
    if origin is Literal:
        return Form(str, choices=parts)
    assert annotation in _PLAIN, annotation
    return Form(annotation)


# A value as argparse and JSON know it: a number of numpy becomes Python's, a Path a text.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: bool(operator.index(value)),
    int: operator.index,
    float: float,
    str: os.fspath,
}
_NOUNS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _checked(value: Any, item: Field[Any], form: Form) -> Any:
    if form.is_repeated:
        if isinstance(value, Mapping):
            value = [f"{name}={one}" for name, one in value.items()]
        if not isinstance(value, Iterable):
            raise EraseError(f"{flag(item.name)} is {value!r}; it must be a text or several")
        several = [value] if isinstance(value, (str, os.PathLike)) else value
        return tuple(_checked_one(one, item, form) for one in several)
    return _checked_one(value, item, form)


def _checked_one(value: Any, item: Field[Any], form: Form) -> Any:
    try:
        plain = _PLAIN[form.type](value)
    except (TypeError, ValueError, OverflowError) as error:
        raise EraseError(f"{flag(item.name)} is {value!r}; it must be {_NOUNS[form.type]}") from error
    if form.choices and plain not in form.choices and not ("also" in item.metadata and ":" in plain):
        guess = difflib.get_close_matches(plain, form.choices, n=1)
        hint = f"did you mean {guess[0]}? ({', '.join(form.choices)})" if guess else f"choose {', '.join(form.choices)}"
        raise EraseError(f"{flag(item.name)} is {plain!r}; {hint}")
    least, most = item.metadata.get("least"), item.metadata.get("most", math.inf)
    if least is not None and (not least <= plain <= most or plain == math.inf):
        allowed = (f"at least {least}" if least else "0 or more") + (f" and at most {most}" if most < math.inf else "")
        raise EraseError(f"{flag(item.name)} is {plain}; it must be {allowed}")
    return plain
