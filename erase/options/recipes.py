"""Recipes (named sets of defaults), and how settings that were not given are filled in."""

from dataclasses import dataclass, replace
from typing import Any

from erase.errors import EraseError
from erase.methods import find
from erase.options.declare import flag
from erase.options.model_defaults import OF_MODEL, of_family
from erase.options.settings import SD_DEFAULTS, Settings, hyperparameter_name, settings_of_recipe

SAMPLER_STEPS = {"model": 50, "dpm++": 20}


@dataclass(frozen=True)
class Recipe:
    """Where SalUn's paper, its code and this project differ (docs/methods.md has the table).

    shared_latent: both branches use one noisy latent; the code samples two from the VAE's posterior.
    frozen_target: the target comes from the base model; paper and code use the model in training.
    distill_retain: retain the base's prediction for retain prompts; paper and code use the diffusion loss.
    in_order: images epoch by epoch as the code's loaders give them: forget images in order, retain images shuffled, or
        in order for nudity; the last batch of an epoch is short. Otherwise each batch is drawn at random.
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
    "paper": Recipe(True, False, False, True, mask_guidance=0.0, target=None, alpha=None),
    "reference": Recipe(False, False, False, True, mask_guidance=7.5, target=None, alpha=None),
}


def prompts_of(settings: Settings) -> str:
    """Whose prompts a preset or free text has: "ours" or "code"."""
    return settings.prompts or ("ours" if settings.recipe == "default" else "code")


def resolve(
    settings: Settings,
    kind: str,
    model_defaults: dict[str, Any],
    *,
    num_processes: int = 1,
    part: int = 1,
    can_round: bool = False,
    at_once: int = SD_DEFAULTS["generation_batch_size"],
    guidance_scale: float = SD_DEFAULTS["guidance_scale"],
) -> Settings:
    """Every None filled in: from the model's own defaults, then the method's and the recipe's, then SD v1.4's values.

    model_defaults: see `read_defaults`. What the user gave always wins over them, and so does what a
        recipe other than the default one says.
    kind: of the concept; SalUn's settings differ between nudity and classes.
    num_processes: that share a batch. part: images of a share that --low-memory keeps together at most.
    guidance_scale: of generated images, where nothing else says: that of the model's family.
    at_once: images generated together, where nothing else says.
    can_round: --low-memory rounds the weights there only, because CPUs without AMX are slower in bf16.
    """
    recipe, nudity = RECIPES[settings.recipe], kind == "nudity"
    of_recipe = settings_of_recipe(settings)
    own = {k: v for k, v in model_defaults.items() if k in OF_MODEL and k not in of_recipe}
    preset, taken = find(settings.method), _given_hyperparameters(settings)
    of_method = of_family(preset.families, model_defaults.get("family"))
    of_method |= model_defaults.get("methods", {}).get(settings.method, {})
    of_method = {k: v for k, v in of_method.items() if k not in of_recipe}
    own_set = [  # of two texts with one name the later wins
        text
        for text in (*preset.settings_of_method(kind), *of_method.pop("set", ()))
        if hyperparameter_name(text) not in taken
    ]
    settings = replace(settings, set=(*own_set, *settings.set))
    if "num_inference_steps" in own:
        own.setdefault("sampler", "model")  # the steps were chosen for it
    settings = settings.filled(of_method).filled(own)
    settings = settings.filled(
        {
            "mask_guidance": recipe.mask_guidance,
            "target": recipe.target or ("anchor" if nudity or settings.anchor else "fixed"),
            "alpha": recipe.alpha if recipe.alpha is not None else (0.1 if nudity else 0.5),
            **preset.defaults(kind),
        }
    )
    settings = settings.filled({"sampler": recipe.sampler, "prompts": prompts_of(settings)})
    settings = settings.filled({"num_inference_steps": SAMPLER_STEPS[str(settings.sampler)]})
    settings = settings.filled(
        {
            **SD_DEFAULTS,
            "generation_batch_size": at_once,
            "guidance_scale": guidance_scale,
            "num_train_steps": 100 if nudity else 500,
        }
    )
    settings = settings.filled({"lr_scheduler": "constant", "proportion_empty_prompts": 0.0, "anchor_every": 0})
    _require_use(settings)
    settings = settings.filled({"lora_rank": settings.rank or 64})
    if settings.low_memory:
        share = (settings.batch_size or 1) // num_processes
        together = max((size for size in range(1, min(share, part) + 1) if share % size == 0), default=1)
        parts = max(settings.gradient_accumulation_steps, share // together)
        settings = replace(settings, gradient_checkpointing=True, gradient_accumulation_steps=parts)
    rounds = settings.low_memory and can_round and settings.rank is None and settings.precision != "fp16"
    return settings.filled({"weights": "bf16" if rounds else "fp32"})


def _given_hyperparameters(settings: Settings) -> set[str]:
    """Hyperparameters of methods that the user's options decide: by name in `set`, or by an option of their own."""
    taken = {hyperparameter_name(text) for text in settings.set} | {"seed"}
    taken |= {"alpha"} if settings.alpha is not None else set()
    taken |= {"frozen_target", "distill_retain"} if settings.recipe != "default" else set()
    return taken | settings_of_recipe(settings)


def _require_use(settings: Settings) -> None:
    """Raise an EraseError for an option about a mask that is not made; of resolved settings."""
    kind = settings.mask if settings.mask in {"saliency", "inverse", "random", "none"} else "file"
    unused = {"none": ("density", "per_tensor", "score"), "file": ("density", "per_tensor", "score")}
    for name in unused.get(kind, ("score",) if kind == "random" else ()):
        if getattr(settings, name) != Settings.__dataclass_fields__[name].default:
            why = "without a mask; add --mask saliency" if kind == "none" else f"with --mask {settings.mask}"
            raise EraseError(f"{flag(name)} has no effect {why}")
