"""From settings to data plan, training recipe and method."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from erase import methods
from erase.data import latents
from erase.device import DTYPES
from erase.errors import EraseError
from erase.families.protocol import Family
from erase.methods.balance import balanced
from erase.options.declare import flag
from erase.options.effect import OF_IMAGES, OF_TRAINING
from erase.options.recipes import RECIPES
from erase.options.settings import Settings
from erase.processes import is_sharded, rank_and_world
from erase.training import batches, memory


def make_plan(settings: Settings, model: Family) -> latents.Plan:
    """Which images the run trains on, and how they are generated."""
    assert settings.sampler is not None  # `resolve` has filled it in
    return latents.Plan(
        num_forget=whole(settings.num_forget),
        num_retain=whole(settings.num_retain),
        steps=whole(settings.num_inference_steps),
        guidance=real(settings.guidance_scale),
        size=settings.resolution or model.resolution,
        batch_size=whole(settings.generation_batch_size),
        seed=settings.seed,
        sampler=settings.sampler,
        round_trip=not RECIPES[settings.recipe].shared_latent,
        forget_images=settings.forget_images,
        retain_images=settings.retain_images,
        num_anchor=whole(settings.num_forget) if settings.anchor_every else 0,
    )


def make_recipe(settings: Settings, plan: latents.Plan, kind: str = "object") -> batches.Recipe:
    """How the run trains; methods without training never ask.

    kind: of the concept; SalUn's code shuffles retain images except for nudity.
    """
    recipe = RECIPES[settings.recipe]
    return batches.Recipe(
        num_steps=whole(settings.num_train_steps),
        batch_size=whole(settings.batch_size),
        learning_rate=real(settings.learning_rate),
        schedule=str(settings.lr_scheduler),
        weight_decay=real(settings.weight_decay),
        max_grad_norm=settings.max_grad_norm,
        accumulation=settings.gradient_accumulation_steps,
        target=str(settings.target),
        in_order=recipe.in_order,
        retain_order="random" if not recipe.in_order else "in_order" if kind == "nudity" else "shuffled",
        independent_latents=not recipe.shared_latent,
        proportion_empty=real(settings.proportion_empty_prompts),
        anchor_every=whole(settings.anchor_every),
        seed=settings.seed,
        checkpoint_every=settings.checkpointing_steps,
        eight_bit=settings.moments == "8bit",
        dual=settings.optimizer == "dual",
        trajectory_steps=plan.steps,
        trajectory_guidance=plan.trajectory_guidance,
    )


def make_method(settings: Settings) -> methods.TrainedMethod | methods.ClosedForm:
    """The method with its hyperparameters, as recipe and options say."""
    recipe = RECIPES[settings.recipe]
    general: dict[str, Any] = {"frozen_target": recipe.frozen_target, "distill_retain": recipe.distill_retain}
    general = {
        name: value for name, value in general.items() if name not in methods.find(settings.method).hyperparameters
    }
    general["seed"] = settings.seed
    if settings.alpha is not None:
        general["alpha"] = settings.alpha
    method = methods.make(settings.method, general, settings.set)
    if settings.balancing is None or not isinstance(method, methods.TrainedMethod):
        return method
    return balanced(method, settings.balancing)


def can_scale(settings: Settings, method: methods.Method) -> bool:
    """Whether fp16 is possible: it scales gradients, which methods that compare gradients cannot use."""
    trained = isinstance(method, methods.TrainedMethod)
    compares = (
        settings.optimizer == "dual"
        or trained
        and (method.balance is not None or method.prepares or method.pulls or method.learns_words)
    )
    return not compares and settings.weights != "bf16" and not is_sharded()


def require_precision(settings: Settings, method: methods.Method) -> None:
    """Raise an EraseError for fp16, which scales gradients, with a method that compares them."""
    if settings.precision == "fp16" and not can_scale(settings, method):
        learns = isinstance(method, methods.TrainedMethod) and method.learns_words
        does = "learns words by gradients of its own" if learns else "compares gradients"
        raise EraseError(f"{settings.method} {does}, which --precision fp16 scales; use bf16 or fp32")


def require_divisible(settings: Settings, method: methods.Method) -> None:
    """Raise an EraseError, if weights are divided among processes, for what looks at all weights or passes at once."""
    if not is_sharded():
        return
    rank = settings.rank or methods.find(settings.method).rank
    given = {
        "--precision fp16": settings.precision == "fp16",
        "--weights bf16": settings.weights == "bf16",
        "--moments 8bit": settings.moments == "8bit",
        "--optimizer dual": settings.optimizer == "dual",
        "--null-space": settings.null_space is not None,
        "--balancing": settings.balancing is not None,
        "--alpha-every": settings.alpha_every != 0,
        "--mask-attack": settings.mask_attack != 0,
        f"--rank {rank}": rank is not None,
        f"{settings.method}, a closed form": not isinstance(method, methods.TrainedMethod),
        f"{settings.method}, which does more than minimise its loss": isinstance(method, methods.TrainedMethod)
        and bool(method.balance or method.learns_words or method.prepares or method.pulls or method.shrinks),
        f"{settings.method}, which reads attention maps": isinstance(method, methods.TrainedMethod) and method.attends,
        f"{settings.method}, whose trajectories differ in length": isinstance(method, methods.TrainedMethod)
        and method.images == "noise"
        and method.follows is not None,
    }
    for what, is_given in given.items():
        if is_given:
            raise EraseError(f"weights that FSDP divides do not go with {what}; start with --multi_gpu instead")


def require_rank(settings: Settings, method: methods.Method) -> None:
    """Raise an EraseError for --rank, which replaces weights by factors, with options that need the weights."""
    if settings.rank is None:
        return
    if settings.mask != "none":
        raise EraseError(
            f"--rank {settings.rank} does not go with a mask: a masked change has no low rank; leave one out"
        )
    if not isinstance(method, methods.TrainedMethod) or method.prepares or method.shrinks or method.pulls:
        raise EraseError(f"--rank {settings.rank} does not go with {settings.method}, which changes weights directly")
    if settings.weights == "bf16":
        raise EraseError(f"--rank {settings.rank} does not go with --weights bf16; choose fp32")
    if settings.null_space is not None:
        own = f", {settings.method}'s own," if settings.rank == methods.find(settings.method).rank else ""
        raise EraseError(f"--rank {settings.rank}{own} does not go with --null-space; leave one out")


def require_two_gradients(settings: Settings, method: methods.Method) -> None:
    """Raise an EraseError for --balancing and --optimizer dual where a step has not both gradients, for it to weigh."""
    if not isinstance(method, methods.TrainedMethod):
        return
    is_dual, own = settings.optimizer == "dual", make_method(replace(settings, balancing=None))
    options = {"--optimizer dual": is_dual, f"--balancing {settings.balancing}": settings.balancing is not None}
    for option in (name for name, is_given in options.items() if is_given):
        if not method.retains:
            raise EraseError(f"{option} needs a retain gradient, and {settings.method} has no retain loss here")
        if method.turns or isinstance(own, methods.TrainedMethod) and own.balance is not None:
            what = "has steps without one of the two gradients" if method.turns else "weighs the two gradients"
            raise EraseError(f"{option} does not go with {settings.method}, which {what}; leave it out")
    if all(options.values()):
        raise EraseError(f"--optimizer dual does not go with --balancing {settings.balancing}; leave one out")
    if is_dual and settings.weights == "bf16":
        raise EraseError("--optimizer dual does not go with --weights bf16; use fp32")


def require_retain_rows(settings: Settings, method: methods.Method) -> None:
    """Raise an EraseError for options about retain rows where there are none; of resolved settings."""
    if isinstance(method, methods.TrainedMethod) and method.retains:
        if settings.anchor_every and not method.retain_images:
            raise EraseError(
                f"--anchor-every is {settings.anchor_every}, but {settings.method} retains prompts on images of the "
                "concept; use --anchor-every 0"
            )
        return
    for name in ("proportion_empty_prompts", "anchor_every"):
        if value := getattr(settings, name):
            raise EraseError(
                f"{flag(name)} is {value:g}, but {settings.method} has no retain loss here; use {flag(name)} 0"
            )


def require_effect(given: Settings, settings: Settings, method: methods.Method) -> None:
    """Raise an EraseError for options about training and images that change nothing.

    given: the settings as the user gave them. settings: resolved.
    """
    if isinstance(method, methods.ClosedForm):
        is_scored = settings.mask in {"saliency", "inverse"}
        for name in OF_TRAINING if is_scored else (*OF_TRAINING, *OF_IMAGES):
            if (value := getattr(given, name)) != Settings.__dataclass_fields__[name].default:
                why = "is a closed form" if is_scored else "is a closed form and needs no images"
                told = f"{flag(name)} {value}" if isinstance(value, str | int | float) else flag(name)
                raise EraseError(f"{told} has no effect: {settings.method} {why}; leave it out")
    steps, every = whole(settings.num_train_steps), whole(settings.anchor_every)
    if 0 < steps < every:
        raise EraseError(
            f"--anchor-every {every} has no effect in {steps} optimizer steps; use a number up to {steps}, or 0"
        )


def require_watched(settings: Settings, method: methods.Method) -> None:
    """Raise an EraseError for --alpha-every where the retain loss's size decides nothing, or there is no anchor."""
    if not settings.alpha_every or not isinstance(method, methods.TrainedMethod):
        return
    told, name = f"--alpha-every is {settings.alpha_every}", settings.method
    if not method.retains:
        raise EraseError(f"{told}, but {name} has no retain loss here; leave it out")
    if method.turns or method.balance is not None or settings.optimizer == "dual":
        raise EraseError(f"{told}, but here {name} does not add the two losses; leave it out")
    if not method.anchors or settings.target != "anchor":
        raise EraseError(f"{told}, which compares images with those of the anchor, and {name} uses none here")
    if settings.alpha_every >= whole(settings.num_train_steps) > 0:
        raise EraseError(f"{told}, which has no effect in {settings.num_train_steps} optimizer steps; use fewer")


def require_mask_attack(settings: Settings, model: Family) -> None:
    """Raise an EraseError for --mask-attack without a mask that is computed, or without text states to move."""
    if not settings.mask_attack:
        return
    if settings.mask not in {"saliency", "inverse"}:
        raise EraseError(f"--mask-attack {settings.mask_attack:g} has no effect with --mask {settings.mask}")
    if model.classes:
        raise EraseError(f"--mask-attack moves text states, and {model.name} has classes instead; leave it out")


def moves_weights(method: methods.Method) -> bool:
    """Whether a method changes weights outside the optimizer's steps, which weights stored in bf16 do not follow."""
    return isinstance(method, methods.TrainedMethod) and bool(
        method.prepares or method.shrinks or method.pulls or method.turns or method.teacher_decay is not None
    )


def require_storage(settings: Settings, method: methods.Method) -> None:
    """Raise an EraseError for --weights bf16 with a method or an option that changes weights itself."""
    projects = settings.null_space is not None
    if settings.weights == "bf16" and (projects or moves_weights(method)):
        what = "--null-space" if projects else settings.method
        raise EraseError(
            f"--weights bf16 does not go with {what}, which changes weights outside the optimizer's steps; "
            "use --weights fp32"
        )


def needed_memory(settings: Settings, model: Family, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes by phase, computed from the shapes; an estimate for the device that trains."""
    accumulates, method = settings.mask in {"saliency", "inverse"}, make_method(settings)
    words = 0  # prompts of which a word or a prefix is learned together
    if isinstance(method, methods.TrainedMethod) and method.learns_words:
        words = method.attack.batch_size if method.attack else part_size(settings)
    mask_batch = part_size(settings) if settings.score == "abs_sum" else whole(settings.batch_size)
    mask_batch *= 2 if settings.mask_guidance else 1  # conditional and unconditional, before one backward pass
    resolution = settings.resolution or model.resolution
    rows = whole(settings.generation_batch_size) * (2 if real(settings.guidance_scale) > 1 else 1)
    computed = DTYPES[settings.precision or "fp32"]
    return memory.estimate(
        model,
        parameters,
        density=1.0 if settings.mask == "none" else settings.density,
        eight_bit=settings.moments == "8bit",
        dual=settings.optimizer == "dual",
        resolution=resolution,
        generating=memory.to_generate(model, rows, resolution, held=dtype_to_generate(settings), computed=computed),
        mask_batch=mask_batch if accumulates else None,
        part=None if isinstance(method, methods.ClosedForm) else rows_of_pass(settings),
        dtype=torch.bfloat16 if settings.weights == "bf16" else torch.float32,
        checkpointing=settings.gradient_checkpointing,
        copies=num_copies(method, projects=settings.null_space is not None) + 2 * (settings.optimizer == "dual"),
        between=memory.copies_between(
            shrinks=isinstance(method, methods.TrainedMethod) and method.shrinks,
            projects=settings.null_space is not None,
        ),
        text=memory.text_passes(model, words) if words else 0,
    )


def dtype_to_generate(settings: Settings) -> torch.dtype:
    """How the network is stored while images are generated: rounded if its passes and the training round it anyway."""
    rounds = settings.precision == "bf16" and (settings.weights == "bf16" or is_sharded())
    return torch.bfloat16 if rounds else torch.float32


def num_copies(method: methods.TrainedMethod | methods.ClosedForm, *, projects: bool = False) -> int:
    """Copies of the masked weights that the loop keeps: of the base, an average, remembered ones, two gradients."""
    if isinstance(method, methods.ClosedForm):
        return 0
    base = projects or method.needs_base or method.shrinks or (method.images == "noise" and method.follows == "base")
    base += 2 * method.pulls  # of the base and of the curvature
    return base + (method.teacher_decay is not None) + method.turns + 2 * (method.balance is not None)


def part_size(settings: Settings) -> int:
    """Images of one branch that go through the network together."""
    return max(1, whole(settings.batch_size) // (settings.gradient_accumulation_steps * rank_and_world()[1]))


def rows_of_pass(settings: Settings) -> int:
    """Images of the largest branch that go through the network together: anchor images double the retain rows."""
    return part_size(settings) * (2 if settings.anchor_every else 1)


def whole(value: int | None) -> int:
    assert value is not None  # `resolve` has filled it in
    return value


def real(value: float | None) -> float:
    assert value is not None
    return value
