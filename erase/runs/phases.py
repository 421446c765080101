"""Data and training of a run; each continues where an interrupted command stopped."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from erase import masks, processes
from erase.data import cache, latents, prompt_states
from erase.methods import ClosedForm, TrainedMethod
from erase.methods.inputs import Text
from erase.runs.decisions import Decisions
from erase.runs.planning import make_plan, make_recipe
from erase.training import batches, closed_form, loop, lowrank
from erase.training.null_space import NullSpace
from erase.training.sharded import Shards
from erase.training.watched import Watched


@dataclass(frozen=True, eq=False)
class Gathered:
    """What the mask and the training see.

    shown: images of the concept, which a saliency mask is computed from; None if none is.
    images: those that the method trains on; None for a closed form. text: text states, which a closed form and
        --null-space read; None without them.
    shards: the model's weights, if they are divided among the processes.
    """

    shown: latents.Data | None
    images: latents.Data | None
    text: Text | None
    shards: Shards | None = None


@dataclass(frozen=True)
class Trained:
    """What the training reports: the losses of every step, or a closed form's notes on its solution."""

    losses: list[dict[str, float]]
    notes: dict[str, Any]


def gather(decided: Decisions) -> Gathered:
    """Generate or read the images; afterwards the model is its network alone, in the precision of its weights.

    Its weights are divided among the processes then if accelerate was asked for FSDP.
    """
    settings, method, model = decided.settings, decided.method, decided.model
    is_scored = decided.given_mask is None and settings.mask in {"saliency", "inverse"}
    shown = images_of(decided, "concept") if is_scored else None
    images = None
    if isinstance(method, TrainedMethod):
        images = shown if shown is not None and method.images == "concept" else images_of(decided, method.images)
    reads = isinstance(method, ClosedForm) or settings.null_space is not None
    text = prompt_states.read_text(model, decided.concept) if reads else None
    model.release()
    if settings.weights == "bf16":
        model.round_network(torch.bfloat16)
    shards = Shards(model, decided.parameters, decided.compute.device) if processes.is_sharded() else None
    return Gathered(shown, images, text, shards)


def images_of(decided: Decisions, kind: str) -> latents.Data:
    """Forget and retain images; `kind` says what the forget images show, see `erase.data.latents.Plan`."""
    accelerator, method, plan = decided.accelerator, decided.method, make_plan(decided.settings, decided.model)
    return latents.gather(
        decided.model,
        decided.concept,
        replace(
            plan,
            images=kind,
            retains=isinstance(method, TrainedMethod) and method.retains,
            retain_names=isinstance(method, TrainedMethod) and not method.retain_images,
        ),
        model_hash=decided.base_hash,
        cache_dir=decided.cache_dir,
        workers=cache.Workers(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
        quiet=decided.quiet or not accelerator.is_main_process,
        tell=decided.tell,
    )


def train(decided: Decisions, data: Gathered, mask: masks.Packed | None) -> Trained:
    """Change the weights inside the mask, by training or by a closed form; --rank trains a change of low rank."""
    settings, model, method = decided.settings, decided.model, decided.method
    if isinstance(method, ClosedForm):
        if settings.weights == "bf16":  # rounded for the mask's sake only
            model.reload_network()
        assert data.text is not None
        return Trained([], closed_form.solve(decided.model, method, data.text, decided.parameters, mask))
    assert data.images is not None
    recipe = make_recipe(settings, make_plan(settings, model), decided.concept.kind)
    how: dict[str, Any] = {
        "state_path": decided.work / "training.safetensors",
        "checkpointing": settings.gradient_checkpointing,
        "quiet": decided.quiet,
    }
    if data.shards is not None:
        return _train_shards(decided, data.images, data.shards, mask, recipe, how)
    notes: dict[str, Any] = {}
    watched = None
    if settings.alpha_every:
        watched = Watched(model, data.images, recipe, decided.accelerator, settings.alpha_every)
        how["watched"] = watched
    if settings.rank is None:
        if settings.null_space is not None:
            assert data.text is not None
            how["null"] = null = NullSpace(model, data.text, settings.null_space, decided.parameters, mask)
            notes = {"null_space_dimensions": null.rank, "of": null.of}
        losses = loop.train(model, method, data.images, decided.parameters, mask, recipe, decided.accelerator, **how)
    else:
        draw = batches.generator(recipe.seed, "rank")
        with lowrank.factors(model, decided.parameters, settings.rank, draw) as factors:
            losses = loop.train(model, method, data.images, factors, None, recipe, decided.accelerator, **how)
    return Trained(losses, notes | (watched.notes if watched is not None else {}))


def _train_shards(
    decided: Decisions,
    images: latents.Data,
    shards: Shards,
    mask: masks.Packed | None,
    recipe: batches.Recipe,
    how: dict[str, Any],
) -> Trained:
    """Train the rows that this process has; the first process then has the whole network again."""
    assert isinstance(decided.method, TrainedMethod)
    rows = {name: own for name, own in shards.parameters.items() if own.numel()}
    bits = None if mask is None else shards.rows(mask)
    own = None if bits is None else {name: bits[name] for name in rows}
    losses = loop.train(
        decided.model, decided.method, images, rows, own, recipe, decided.accelerator, is_sharded=True, **how
    )
    shards.merge()
    return Trained(losses, {})
