"""Masked fine-tuning; it resumes bit for bit."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from erase import device
from erase.data.latents import Data
from erase.errors import EraseError
from erase.families.protocol import Family
from erase.methods.protocol import TrainedMethod, Turn
from erase.optim import DualAdam, MaskedAdam
from erase.progress import progress
from erase.training import memory
from erase.training.backward import gradients
from erase.training.batches import Recipe, Walker, batches, generator
from erase.training.checkpoint import Kept, Stored, keep, restore
from erase.training.copied import Copied
from erase.training.exchanged import Exchanged
from erase.training.gradients import start_detached, taking_gradients
from erase.training.losses import Losses
from erase.training.null_space import NullSpace
from erase.training.prefixes import Prefixes
from erase.training.replayed import ReplayedModel
from erase.training.watched import Watched
from erase.training.words import Words

REPAYS = 20  # steps from which on CUDA graphs are made, which takes as long as some ten steps


def train(
    model: Family,
    method: TrainedMethod,
    data: Data,
    parameters: Mapping[str, Parameter],
    mask: Mapping[str, Tensor] | None,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    state_path: Path,
    null: NullSpace | None = None,
    watched: Watched | None = None,
    checkpointing: bool = False,
    is_sharded: bool = False,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Fine-tune the masked weights in place; returns the losses of every step.

    Besides weights, moments and one branch's activations this needs masked weights only: their gradients, and their
    values in the base when a target comes from there. A network that was rounded to bfloat16 trains so, with float32
    masters of the masked weights, and is the exact float32 base with those masters in it afterwards.

    parameters: those in the scope, by name. mask: of the same names; None trains all of them.
    state_path: the last checkpoint; when it exists, training continues from there.
    null: projects the change of each step, with the same mask.
    is_sharded: parameters and mask are rows of them, see `erase.training.sharded.Shards`, and each process has others.
    watched: gives the factor of the retain loss, from images that are generated meanwhile.

    Raises:
        EraseError: a loss that is not finite (the last good checkpoint stays), or a batch that does not divide.
    """
    share = _share(recipe, accelerator)
    is_rounded = model.network.dtype != torch.float32
    _refuse_what_does_not_fit(
        method,
        data,
        recipe,
        num_parts=recipe.batch_size // share,
        is_scaled=accelerator.scaler is not None,
        is_rounded=is_rounded,
        projects=null is not None,
    )
    optimizer = (DualAdam if recipe.dual else MaskedAdam)(
        parameters, mask, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, eight_bit=recipe.eight_bit
    )
    if is_rounded:
        optimizer.keep_masters(model.stored_weights())
    walks = method.follows if method.images == "noise" else None
    silent = quiet or not accelerator.is_main_process
    words = Words(model, method.attack, data, recipe, share, accelerator, quiet=silent) if method.attack else None
    holds = null is not None or method.shrinks or method.pulls
    between = memory.copies_between(shrinks=method.shrinks, projects=null is not None)
    how: dict[str, Any] = {"copies": int(holds) + method.pulls, "between": between}
    how["is_short"] = checkpointing or is_sharded
    room = _room(model, method, data, parameters, recipe, share, accelerator, optimizer, **how)
    # the dual optimizer puts other tensors in the place of the gradients, and a pull is added to masked ones
    can_replay = room.graph and not recipe.dual and not method.pulls and model.trains_denoiser
    replays = can_replay and recipe.num_steps >= REPAYS and device.has_graphs(model.device)
    asks_base = method.needs_base or walks == "base"
    held = Exchanged(model, optimizer) if holds or asks_base and not room.copy else None
    base = held if asks_base else None
    if asks_base and room.copy:
        base = Copied(model, _dtype(model, accelerator), replays=replays)
    prefixes = None
    if method.prefix is not None:
        prefixes = Prefixes(model, method.prefix, data, recipe.seed, base or model, accelerator)
    teacher = Exchanged(model, optimizer) if method.teacher_decay is not None else None
    prepared = accelerator.prepare_optimizer(optimizer)
    # a scaler wants to see the gradients themselves, and a graph keeps them anyway
    gathering = optimizer.gathering() if accelerator.scaler is None and not replays else nullcontext()
    walker = _walker(model, walks, base, teacher)
    remembered = Exchanged(model, optimizer) if method.turns else None
    held_too = {"teacher": teacher, "remembered": remembered, "words": words, "watched": watched}
    kept: dict[str, Kept] = {name: part for name, part in held_too.items() if part is not None}
    seen: list[dict[str, float]] = []
    stored = Stored(state_path, accelerator, is_sharded=is_sharded)
    if (last := stored.last()) is not None:
        seen = restore(last, optimizer, accelerator, kept, recipe.num_steps)
    losses = Losses(model.device, seen)
    optimizer.halt = losses.halt

    def checkpoint() -> None:
        if (path := stored.new(len(losses.seen))) is not None:
            keep(path, optimizer, accelerator, losses.seen, kept)
        stored.settle(len(losses.seen))

    num_shown = len(seen)

    def read(num_taken: int) -> None:
        """Show the losses. Of `num_taken` steps the optimizer has left out the first bad one and all that followed."""
        nonlocal num_shown
        bad = losses.read()
        for number, values in enumerate(seen[num_shown:], num_shown + 1):
            accelerator.log({f"loss/{name}": value for name, value in values.items()}, step=number)
            told = watched.told if watched is not None else {}
            bar.note(**{name: f"{value:.4f}" for name, value in values.items()}, **told)
        num_shown = len(seen)
        if bad is not None:
            optimizer.uncount(num_taken - bad)
            if bad > 0:
                checkpoint()
            raise _not_finite(bad, recipe, state_path)

    summing: dict[str, Any] = {"summed": partial(accelerator.reduce, reduction="sum")} if is_sharded else {}
    reporting = progress(recipe.num_steps, "train", "steps", done=len(seen), quiet=silent)
    detaching = start_detached(model) if method.detaches_start else nullcontext()
    trained = ReplayedModel(model, gradients=True) if replays else model
    with taking_gradients(model, parameters, checkpointing), gathering, detaching, reporting as bar:
        if method.prepares and not seen and recipe.num_steps:
            _prepare(model, method, data, parameters, recipe, share, accelerator, optimizer)
        pull = _pull(model, method, data, recipe, share, accelerator, optimizer, held) if method.pulls else None
        for step in range(len(seen), recipe.num_steps):
            turn = method.turn(step, recipe.num_steps)
            if turn.remember or turn.rewind:
                read(step)
                _before_the_step(turn, remembered)
            if turn.renew:
                optimizer.state.clear()
            said = partial(words.said, step=step) if words is not None else None
            prefixed = prefixes.of_step(step) if prefixes is not None else None
            parts = batches(model, data, recipe, step, share, accelerator, walker, said, prefixed)
            if isinstance(trained, ReplayedModel):
                trained.new_step()
            losses.add(
                gradients(
                    *(trained, method, base or model, parts, turn, recipe, accelerator, optimizer),
                    together=room.together,
                    reduces=not is_sharded,
                    retain=watched.factor(step) if watched is not None else 1.0,
                )
            )
            if losses.are_due:
                read(step)
            if pull is not None:
                pull()
            if recipe.max_grad_norm is not None:
                accelerator.unscale_gradients(prepared)
                optimizer.clip_grad_norm_(recipe.max_grad_norm, **summing)
            optimizer.set_learning_rate(turn.rate * recipe.learning_rate_at(step))
            prepared.step()
            prepared.zero_grad()
            _after_the_step(method, held, teacher, null, step, recipe.num_steps, losses.halt)
            if words is not None:
                words.after(step, losses.halt)
            if watched is not None and watched.is_due(step):
                read(step + 1)
                accelerator.log(watched.look(step), step=step + 1)
            bar.update()
            if (step + 1) % recipe.checkpoint_every == 0 and step + 1 < recipe.num_steps:
                read(step + 1)
                checkpoint()
        read(recipe.num_steps)
    _give_result(model, optimizer, teacher, is_rounded=is_rounded)
    return seen


def _not_finite(step: int, recipe: Recipe, state_path: Path) -> EraseError:
    kept = f"; the weights of step {step} are kept in {state_path}" if step else ", so no weight was changed"
    return EraseError(
        f"the loss is not finite at step {step + 1} of {recipe.num_steps}{kept}; "
        "lower --learning-rate or use --precision fp32 or bf16"
    )


def _give_result(model: Family, optimizer: MaskedAdam, teacher: Exchanged | None, *, is_rounded: bool) -> None:
    """Put the trained weights in the model: the average's if there is one, in float32 if they were rounded."""
    if teacher is not None:
        optimizer.exchange(teacher.values)
    if is_rounded:
        masters = optimizer.give_masters()
        model.reload_network()
        optimizer.exchange(masters)


def _walker(
    model: Family, follows: str | None, base: Exchanged | Copied | None, teacher: Exchanged | None
) -> Walker | None:
    """Gives the model that generates trajectories; None if none are generated."""
    if follows is None or follows == "edited":
        return (lambda: nullcontext(model)) if follows else None
    held = base if follows == "base" else teacher
    assert held is not None
    return held.inside


def _room(
    model: Family,
    method: TrainedMethod,
    data: Data,
    parameters: Mapping[str, Parameter],
    recipe: Recipe,
    share: int,
    accelerator: Accelerator,
    optimizer: MaskedAdam,
    *,
    copies: int,
    between: int,
    is_short: bool,
) -> memory.Room:
    """What the GPU has room for; nothing on a CPU, nor with checkpointing or shards, which say that memory is short.

    copies: of the masked weights, besides those that the method keeps.
    """
    free = 0 if is_short else device.free_memory(model.device)
    return memory.room(
        model,
        parameters,
        num_masked=optimizer.num_masked,
        part=share * (2 if recipe.anchor_every else 1),
        together=share * (2 + bool(recipe.anchor_every) + (method.attack is not None)),
        side=data.forget.mean.shape[-1],
        dtype=_dtype(model, accelerator),
        eight_bit=recipe.eight_bit,
        dual=recipe.dual,
        copies=copies
        + (method.teacher_decay is not None)
        + method.turns
        + 2 * (method.balance is not None or recipe.dual),
        between=between,
        joins=method.joins and not recipe.dual,
        free=free,
    )


def _dtype(model: Family, accelerator: Accelerator) -> torch.dtype:
    """Of a copy of the base: that of the passes."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, model.network.dtype)


def _share(recipe: Recipe, accelerator: Accelerator) -> int:
    """Rows of a batch that one process sees in one part."""
    share, rest = divmod(recipe.batch_size, accelerator.num_processes * recipe.accumulation)
    if rest:
        raise EraseError(
            f"--batch-size {recipe.batch_size} does not divide into {accelerator.num_processes} processes x "
            f"--gradient-accumulation-steps {recipe.accumulation}; choose a multiple of their product"
        )
    return share


def _refuse_what_does_not_fit(
    method: TrainedMethod, data: Data, recipe: Recipe, *, num_parts: int, is_scaled: bool, is_rounded: bool,
    projects: bool,
) -> None:  # fmt: skip
    """Raise an EraseError where the method does not go with the target, the precision or the storage of weights."""
    last = len(data.forget) % recipe.batch_size if recipe.in_order else 0
    if last % num_parts:
        raise EraseError(
            f"the last batch of an epoch has {last} of {len(data.forget)} forget images, which do not divide into "
            f"{num_parts} parts; choose another --num-forget or --batch-size"
        )
    if recipe.target != "anchor" and method.images == "anchor":
        raise EraseError(f"--target is {recipe.target}, but this method's images show the anchor; leave it out")
    if recipe.target != "anchor" and not len(data.others):
        raise EraseError(f"--target {recipe.target} needs prompts of other classes, and this concept names none")
    if is_scaled and (method.balance or method.prepares or method.pulls):
        raise EraseError("this method compares gradients, which --precision fp16 scales; use bf16 or fp32")
    if method.attack and method.images != "concept":
        raise EraseError("a method with an attack trains on images of the concept")
    if recipe.dual and (
        is_scaled or is_rounded or method.balance or method.turns or method.pulls or not method.retains
    ):
        raise EraseError("the dual optimizer needs float32 weights, and a forget and a retain gradient in every step")
    if is_scaled and method.learns_words:
        raise EraseError("this method learns words by their own gradients, which --precision fp16 scales; use bf16")
    if is_rounded and (
        projects
        or method.prepares
        or method.shrinks
        or method.pulls
        or method.turns
        or method.teacher_decay is not None
    ):
        raise EraseError("this method changes weights outside the optimizer's steps; leave out --weights bf16")


def _before_the_step(turn: Turn, remembered: Exchanged | None) -> None:
    """Remember the weights, or put them back."""
    assert remembered is not None
    if turn.remember:
        remembered.take()
    if turn.rewind:
        remembered.put()


def _after_the_step(
    method: TrainedMethod, frozen: Exchanged | None, teacher: Exchanged | None, null: NullSpace | None, step: int,
    num_steps: int, halt: Tensor | None,
) -> None:  # fmt: skip
    """What a method and `null` do with the weights beside the optimizer; nothing if `halt` is not 0."""
    if method.shrinks or null:
        assert frozen is not None
        moved = frozen.moved()
        if method.shrinks:
            method.shrink(moved, step, num_steps)
        if null:
            null.project(moved)
        frozen.move(moved, halt)
    if teacher is not None and method.teacher_decay is not None:
        teacher.follow(method.teacher_decay, halt)


def _pull(
    model: Family,
    method: TrainedMethod,
    data: Data,
    recipe: Recipe,
    share: int,
    accelerator: Accelerator,
    optimizer: MaskedAdam,
    base: Exchanged | None,
) -> Callable[[], None]:
    """Adds what the method's `pull` says to the gradients. A resumed run computes the same curvature again."""
    assert base is not None
    means = {name: torch.zeros_like(weights) for name, weights in base.values.items() if len(weights)}
    with base.inside():
        for number in range(method.curvature_batches):
            for batch in batches(model, data, recipe, ("curvature", number), share, accelerator):
                with accelerator.autocast():
                    loss = method.curvature_loss(model, batch)
                accelerator.backward(loss / recipe.accumulation)
            for mean, gradient in zip(means.values(), optimizer.gradients(), strict=True):
                whole: Any = accelerator.reduce(gradient, reduction="mean")
                mean.addcmul_(whole.reshape(-1), whole.reshape(-1), value=1 / method.curvature_batches)
            optimizer.zero_grad()

    def pull() -> None:
        added = method.pull({name: way for name, way in base.moved().items() if len(way)}, means)
        for name, gradient in zip(means, optimizer.gradients(), strict=True):
            gradient.add_(added[name].reshape(gradient.shape))

    return pull


def _prepare(
    model: Family,
    method: TrainedMethod,
    data: Data,
    parameters: Mapping[str, Parameter],
    recipe: Recipe,
    share: int,
    accelerator: Accelerator,
    optimizer: MaskedAdam,
) -> None:
    """Let the method change masked weights before the first step, from sum_b |gradient| over `prepare_batches`."""
    sums = {name: torch.zeros_like(weights) for name, weights in optimizer.masked_weights().items() if len(weights)}
    for number in range(method.prepare_batches):
        for batch in batches(model, data, recipe, ("prepare", number), share, accelerator):
            with accelerator.autocast():
                loss = method.prepare_loss(model, batch)
            accelerator.backward(loss / recipe.accumulation)
        for total, gradient in zip(sums.values(), optimizer.gradients(), strict=True):
            mean: Any = accelerator.reduce(gradient, reduction="mean")
            total.add_(mean.abs().reshape(-1))
        optimizer.zero_grad()
    weights = optimizer.masked_weights()
    method.prepare(
        weights, sums, {name: tuple(p.shape) for name, p in parameters.items()}, generator(recipe.seed, "prepare")
    )
    optimizer.exchange(weights)
