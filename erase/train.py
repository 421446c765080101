"""The two loops: gradients into a saliency mask, and the masked fine-tuning; both resume bit for bit."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from erase import files, saliency
from erase.data import Data, Pictures
from erase.device import LOSS_SCALE
from erase.errors import EraseError
from erase.methods.inputs import Batch, Text
from erase.models import Model
from erase.optim import MaskedAdam
from erase.progress import progress

SAVE_EVERY_SECONDS = 300.0


@dataclass(frozen=True)
class Recipe:
    """How the loop runs, whatever the method.

    batch_size: forget and retain pictures a step, each, over all processes.
    num_steps: optimizer steps; 0 leaves the model as it is.
    target: where a forget picture's new words come from: "anchor" its own anchor, "random" another class's prompt drawn
        anew for every picture, "fixed" the first of the other classes.
    in_order: go through the forget pictures in order, epoch by epoch, instead of drawing them at random.
    independent_latents: the target branch sees a second sample of the VAE's posterior, as SalUn's code does.
    accumulation: parts that a batch is cut into, to save memory; the result is the same up to rounding.
    eight_bit: Adam's moments take a byte each instead of four.
    way_steps, way_guidance: of the ways from noise to pictures on which some methods train.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    accumulation: int = 1
    target: str = "anchor"
    in_order: bool = False
    independent_latents: bool = False
    seed: int = 0
    checkpoint_every: int = 50
    eight_bit: bool = False
    way_steps: int = 50
    way_guidance: float = 3.0


def generator(seed: int, *what: Any) -> torch.Generator:
    """A CPU generator that is a pure function of the seed and of what is drawn, so that no state needs saving."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# --- mask -----------------------------------------------------------------------------------------------------------


def accumulate(
    model: Model,
    data: Data,
    parameters: Mapping[str, Parameter],
    accelerator: Accelerator,
    *,
    score: saliency.Score,
    guidance: float,
    batch_size: int,
    seed: int,
    state_path: Path,
    part: int | None = None,
    checkpointing: bool = False,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """Scores of SalUn's mask: one pass over the forget pictures, the gradient of each batch's mean loss summed.

    L = mean((eps - guided(eps(x_t | c), eps(x_t | ""), g))^2), t uniform, one draw a picture. The paper has g = 0, its
    code 7.5. With several processes each takes every n-th batch and the sums are added.

    state_path: the running sums, kept every five minutes, so that an interrupted pass goes on.
    part: pictures that go through the UNet together, to save memory; None is the whole batch. The sum is the same up
        to rounding. Only for abs_sum: |g| and g^2 are of whole batches, whose gradients would have to be kept.
    """
    sums = saliency.Saliency(parameters, score)
    together = batch_size if part is None or score != "abs_sum" else part
    starts = list(range(0, len(data.forget), batch_size))
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    if accelerator.num_processes > 1:
        state_path = state_path.with_suffix(f".{accelerator.process_index}.safetensors")
    done = 0
    if state_path.exists():
        done = _restore_sums(state_path, sums, len(mine))
    saved = time.monotonic()
    device = model.device
    scale = LOSS_SCALE["fp16" if accelerator.mixed_precision == "fp16" else "fp32"]  # the order of scores is the same
    with (
        _training(model, parameters, checkpointing),
        sums.collecting(),
        progress(len(mine), "mask", "batches", done=done, quiet=quiet or not accelerator.is_main_process) as bar,
    ):
        for number, start in list(enumerate(mine))[done:]:
            rows = torch.arange(start, min(start + batch_size, len(data.forget)))
            draw = generator(seed, "mask", start)
            x = _sample(data.forget, rows, draw)
            t = torch.randint(0, 1000, (len(rows),), generator=draw)
            eps = torch.randn(x.shape, generator=draw)
            c = data.text[data.forget.prompt[rows]]
            parts = [whole.to(device).split(together) for whole in (x, t, eps, c)]
            for x, t, eps, c in zip(*parts, strict=True):
                x_t = model.add_noise(x, eps, t)
                with accelerator.autocast():
                    predicted = model(x_t, t, c)
                    if guidance:
                        empty = data.text[:1].to(device).expand(len(x), -1, -1)
                        predicted = guided(predicted, model(x_t, t, empty), guidance)
                    loss = (eps - predicted).square().mean() * (len(x) / len(rows))
                (loss * scale).backward()
            bar.update()
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                state = sums.state_dict()
                header = {"kind": "saliency sums", "score": state["score"], "done": number + 1}
                files.write_tensors(state_path, state["sums"], header)
                saved = time.monotonic()
    if accelerator.num_processes > 1:
        for total in sums.state_dict()["sums"].values():
            total.copy_(accelerator.reduce(total, reduction="sum"))
    scores = sums.scores()
    state_path.unlink(missing_ok=True)
    return scores


def _restore_sums(path: Path, sums: saliency.Saliency, num_batches: int) -> int:
    """Put stored sums in place; returns the number of batches that are in them."""
    with _damage_named(path, "computes the mask again"):
        stored, header = files.read_own(path, kind="saliency sums")
        done = header.get("done")
        if not isinstance(done, int) or not 0 <= done <= num_batches:
            raise EraseError(f"{path} is damaged: it says that {done} of {num_batches} batches are done")
        sums.load_state_dict({"score": header.get("score"), "sums": stored})
    return done


@contextmanager
def _damage_named(path: Path, what: str) -> Iterator[None]:
    """Add to an error about a file of intermediate state what to do about it."""
    try:
        yield
    except EraseError as error:
        told = str(error).replace("; copy or download it again", "")
        raise EraseError(
            f"{told if str(path) in told else f'{path}: {told}'}; delete it, and the same command {what}"
        ) from error


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """(1 + g) e_c - g e_0, SalUn's way to count guidance: g = 7.5 is diffusers' guidance_scale 8.5."""
    return (1 + guidance) * conditional - guidance * unconditional


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def train(
    model: Model,
    method: Any,
    data: Data,
    parameters: Mapping[str, Parameter],
    mask: Mapping[str, Tensor] | None,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    state_path: Path,
    checkpointing: bool = False,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Fine-tune the masked weights in place; returns the losses of every step.

    Besides weights, moments and one branch's activations this needs masked weights only: their gradients, and their
    values in the base when a target comes from there. A UNet that was rounded to bfloat16 trains so, with float32
    masters of the masked weights, and is the exact float32 base with those masters in it afterwards.

    parameters: those in the scope, by name. mask: of the same names; None moves them all.
    state_path: the last checkpoint; when it exists, training continues from there.

    Raises:
        EraseError: a loss that is not finite (the last good checkpoint stays), or a batch that does not divide.
    """
    share, rest = divmod(recipe.batch_size, accelerator.num_processes * recipe.accumulation)
    if rest:
        raise EraseError(
            f"--batch-size {recipe.batch_size} does not divide into {accelerator.num_processes} processes x "
            f"--gradient-accumulation-steps {recipe.accumulation}; choose a multiple of their product"
        )
    if recipe.target != "anchor" and getattr(method, "pictures", "") == "anchor":
        raise EraseError(f"--target is {recipe.target}, but this method's pictures show the anchor; leave it out")
    if recipe.target != "anchor" and not len(data.others):
        raise EraseError(f"--target {recipe.target} needs prompts of other classes, and this concept names none")
    is_rounded = model.unet.dtype != torch.float32
    balance, shrinks = getattr(method, "balance", None), hasattr(method, "shrink")
    if accelerator.scaler is not None and (balance or hasattr(method, "prepare")):
        raise EraseError("this method compares gradients, which --precision fp16 scales; use bf16 or fp32")
    if is_rounded and any(hasattr(method, step) for step in ("prepare", "shrink", "teacher_decay")):
        raise EraseError("this method changes weights outside the optimizer's steps; leave out --weights bf16")
    optimizer = MaskedAdam(
        parameters, mask, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, eight_bit=recipe.eight_bit
    )
    if is_rounded:
        optimizer.keep_masters(dict(model.stored_unet().named_parameters()))
    frozen = _Exchanged(model, optimizer) if getattr(method, "needs_base", False) else None
    teacher = _Exchanged(model, optimizer) if hasattr(method, "teacher_decay") else None
    prepared = accelerator.prepare_optimizer(optimizer)
    # a scaler wants to see the gradients themselves
    gathering = optimizer.gathering() if accelerator.scaler is None else nullcontext()
    losses: list[dict[str, float]] = []
    if state_path.exists():
        losses = _restore(state_path, optimizer, accelerator, teacher, recipe.num_steps)
    silent = quiet or not accelerator.is_main_process
    reporting = progress(recipe.num_steps, "train", "steps", done=len(losses), quiet=silent)
    with _training(model, parameters, checkpointing), gathering, reporting as bar:
        if hasattr(method, "prepare") and not losses and recipe.num_steps:
            _prepare(model, method, data, parameters, recipe, share, accelerator, optimizer)
        for step in range(len(losses), recipe.num_steps):
            values: dict[str, float] = {}
            gradients: dict[str, list[Tensor]] = {}
            for batch in _batches(model, data, recipe, step, share, accelerator, teacher):
                for name, term in _terms(method.loss(model, frozen or model, batch), accelerator):
                    values[name] = values.get(name, 0.0) + term.item() / recipe.accumulation
                    accelerator.backward(term / recipe.accumulation)
                    if balance:
                        _set_aside(optimizer, gradients, name)
            if balance:
                _weigh(balance, optimizer, gradients, accelerator)
            elif accelerator.num_processes > 1:
                for gradient in optimizer.gradients():
                    mean: Any = accelerator.reduce(gradient, reduction="mean")
                    gradient.copy_(mean)
            if accelerator.num_processes > 1:
                names = list(values)
                mean = accelerator.reduce(torch.tensor([values[n] for n in names], device=model.device), "mean")
                values = dict(zip(names, mean.tolist(), strict=True))
            if not all(math.isfinite(value) for value in values.values()):
                if accelerator.is_main_process and step > 0:
                    _keep(state_path, optimizer, accelerator, losses, teacher)
                raise EraseError(
                    f"the loss is not finite at step {step + 1} of {recipe.num_steps}; the weights of step {step} are "
                    f"kept in {state_path}; lower --learning-rate or use --precision fp32 or bf16"
                )
            if recipe.max_grad_norm is not None:
                accelerator.unscale_gradients(prepared)
                optimizer.clip_grad_norm_(recipe.max_grad_norm)
            prepared.step()
            prepared.zero_grad()
            if shrinks:
                assert frozen is not None
                moved = frozen.moved()
                method.shrink(moved, step, recipe.num_steps)
                frozen.move(moved)
            if teacher is not None:
                teacher.follow(method.teacher_decay)
            losses.append(values)
            accelerator.log({f"loss/{name}": value for name, value in values.items()}, step=step + 1)
            bar.note(**{name: f"{value:.4f}" for name, value in values.items()})
            bar.update()
            if (step + 1) % recipe.checkpoint_every == 0 and step + 1 < recipe.num_steps:
                if accelerator.is_main_process:
                    _keep(state_path, optimizer, accelerator, losses, teacher)
                accelerator.wait_for_everyone()
    if teacher is not None:
        optimizer.exchange(teacher.values)
    if is_rounded:
        masters = optimizer.give_masters()
        model.reload_unet()
        optimizer.exchange(masters)
    return losses


@torch.no_grad()
def solve(
    method: Any, text: Text, parameters: Mapping[str, Parameter], mask: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Put a closed form's weights in place, inside the mask only; returns what the method notes of its solution.

    Raises:
        EraseError: the scope holds a parameter that such forms do not know.
    """
    for name, parameter in parameters.items():
        if parameter.dim() != 2 or not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            raise EraseError(f"closed forms change attn2.to_k and attn2.to_v only, not {name}; use --scope xattn-kv")
    new, notes = method.solve({name: parameter.detach().cpu() for name, parameter in parameters.items()}, text)
    for name, weights in new.items():
        parameter = parameters[name]
        weights = weights.to(parameter)
        parameter.copy_(weights if mask is None else torch.where(mask[name].to(parameter.device), weights, parameter))
    return notes


class _Exchanged:
    """The model with other values in its masked weights, for the time of a call; at first those that it has now."""

    def __init__(self, model: Model, optimizer: MaskedAdam):
        self._model, self._optimizer, self.values = model, optimizer, optimizer.masked_weights()

    @contextmanager
    def inside(self) -> Iterator[Model]:
        self._optimizer.exchange(self.values)
        try:
            yield self._model
        finally:
            self._optimizer.exchange(self.values)

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with self.inside() as model:
            return model(x, t, text)

    def moved(self) -> dict[str, Tensor]:
        """How far the masked weights are from these values, by parameter, [masked weights]."""
        return {name: now.sub_(self.values[name]) for name, now in self._optimizer.masked_weights().items()}

    def move(self, moved: Mapping[str, Tensor]) -> None:
        """Set the masked weights so far from these values."""
        self._optimizer.exchange({name: value + moved[name] for name, value in self.values.items()})

    def follow(self, decay: float) -> None:
        """Let these values go after the model's: decay * value + (1 - decay) * now."""
        for name, now in self._optimizer.masked_weights().items():
            self.values[name].lerp_(now, 1 - decay)


def _set_aside(optimizer: MaskedAdam, gradients: dict[str, list[Tensor]], name: str) -> None:
    """Add what the last backward pass left to the gradients of this term, and leave zeros."""
    found = list(optimizer.gradients())
    if name not in gradients:
        gradients[name] = [torch.zeros_like(gradient) for gradient in found]
    for total, gradient in zip(gradients[name], found, strict=True):
        total.add_(gradient)
        gradient.zero_()


def _weigh(
    balance: Callable[[float, float, float], tuple[float, float]],
    optimizer: MaskedAdam,
    gradients: Mapping[str, list[Tensor]],
    accelerator: Accelerator,
) -> None:
    """Put w_f g_f + w_r g_r in the place of the gradients; `balance` derives w_f and w_r from the inner products."""
    if accelerator.num_processes > 1:
        for gradient in (gradient for each in gradients.values() for gradient in each):
            mean: Any = accelerator.reduce(gradient, reduction="mean")
            gradient.copy_(mean)
    forget, retain = gradients["forget"], gradients["retain"]

    def product(a: list[Tensor], b: list[Tensor]) -> float:
        return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))

    w_f, w_r = balance(product(forget, forget), product(forget, retain), product(retain, retain))
    for gradient, f, r in zip(optimizer.gradients(), forget, retain, strict=True):
        gradient.copy_(w_f * f + w_r * r)


def _prepare(
    model: Model,
    method: Any,
    data: Data,
    parameters: Mapping[str, Parameter],
    recipe: Recipe,
    share: int,
    accelerator: Accelerator,
    optimizer: MaskedAdam,
) -> None:
    """Let the method change masked weights before the first step, from sum_b |grad L_forget| over `prepare_batches`."""
    sums = {name: torch.zeros_like(weights) for name, weights in optimizer.masked_weights().items() if len(weights)}
    for number in range(method.prepare_batches):
        for batch in _batches(model, data, recipe, ("prepare", number), share, accelerator):
            terms = _terms(method.loss(model, model, batch), accelerator)
            accelerator.backward(dict([next(terms)])["forget"] / recipe.accumulation)
        for total, gradient in zip(sums.values(), optimizer.gradients(), strict=True):
            mean: Any = accelerator.reduce(gradient, reduction="mean")
            total.add_(mean.abs().reshape(-1))
        optimizer.zero_grad()
    weights = optimizer.masked_weights()
    method.prepare(
        weights, sums, {name: tuple(p.shape) for name, p in parameters.items()}, generator(recipe.seed, "prepare")
    )
    optimizer.exchange(weights)


def _terms(loss: Iterator[tuple[str, Tensor]], accelerator: Accelerator) -> Iterator[tuple[str, Tensor]]:
    """The terms one after the other, each computed under autocast when it is asked for; nothing in between is."""
    while True:
        with accelerator.autocast():
            term = next(loss, None)
        if term is None:
            return
        yield term


class _training:
    """Inside, exactly `parameters` take gradients; outside, none of the model does. The UNet stays in eval mode."""

    def __init__(self, model: Model, parameters: Mapping[str, Parameter], checkpointing: bool):
        self._unet, self._parameters, self._checkpointing = model.unet, parameters, checkpointing

    def __enter__(self) -> None:
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        if self._checkpointing:
            self._unet.enable_gradient_checkpointing()

    def __exit__(self, *_: object) -> None:
        if self._checkpointing:
            self._unet.disable_gradient_checkpointing()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def _batches(
    model: Model,
    data: Data,
    recipe: Recipe,
    step: Any,
    share: int,
    accelerator: Accelerator,
    teacher: "_Exchanged | None" = None,
) -> Iterator[Batch]:
    """This process's parts of a step's batch. All is drawn for the whole batch, so n processes see what one would.

    teacher: draws its own way from noise to the concept, and the forget latents are points on it.
    """
    draw, num = generator(recipe.seed, "train", step), recipe.batch_size
    if recipe.in_order:
        per_epoch = math.ceil(len(data.forget) / num)
        first = step % per_epoch * num
        f = torch.arange(first, first + num) % len(data.forget)
    else:
        f = torch.randint(len(data.forget), (num,), generator=draw)
    r = torch.randint(len(data.retain), (num,), generator=draw)
    t_f, t_r = (torch.randint(0, 1000, (num,), generator=draw) for _ in range(2))
    if data.forget.t is not None:
        t_f = data.forget.t[f]
    x_f, x_r = _sample(data.forget, f, draw), _sample(data.retain, r, draw)
    x_p = _sample(data.forget, f, draw) if recipe.independent_latents else x_f
    eps_f, eps_r = (torch.randn(x_f.shape, generator=draw) for _ in range(2))
    if recipe.target == "anchor":
        words = data.anchor[f]
    elif recipe.target == "random":
        words = data.others[torch.randint(len(data.others), (num,), generator=draw)]
    else:
        words = data.others[:1].expand(num)
    index = torch.randint(recipe.way_steps, (num,), generator=draw) if teacher is not None else t_f
    for part in range(recipe.accumulation):
        start = (accelerator.process_index * recipe.accumulation + part) * share
        rows = slice(start, start + share)

        def here(tensor: Tensor, rows: slice = rows) -> Tensor:
            return tensor[rows].to(model.device)

        c_f, c_0 = here(data.text[data.forget.prompt[f]]), here(data.text[:1].expand(num, -1, -1))
        t, noisy, noisy_p = here(t_f), here(x_f), here(x_p)
        if teacher is not None:
            with teacher.inside():
                noisy, t = model.trajectory(
                    here(eps_f), index[rows], c_f, c_0, steps=recipe.way_steps, guidance=recipe.way_guidance
                )
            noisy_p = noisy
        elif data.forget.t is None:
            noisy, noisy_p = (model.add_noise(x, here(eps_f), t) for x in (noisy, noisy_p))
        yield Batch(
            x_forget=noisy,
            x_target=noisy_p,
            x_retain=model.add_noise(here(x_r), here(eps_r), here(t_r)),
            t_forget=t,
            t_retain=here(t_r),
            eps_forget=here(eps_f),
            eps_retain=here(eps_r),
            c_forget=c_f,
            c_target=here(data.text[words]),
            c_retain=here(data.text[data.retain.prompt[r]]),
            c_empty=c_0,
            words=here(data.words[f]),
            end=here(data.end[f]),
        )


def _sample(pictures: Pictures, rows: Tensor, draw: torch.Generator) -> Tensor:
    """Latents of these rows from the VAE's posterior."""
    mean = pictures.mean[rows]
    return mean + pictures.std[rows] * torch.randn(mean.shape, generator=draw)


def _keep(
    path: Path,
    optimizer: MaskedAdam,
    accelerator: Accelerator,
    losses: list[dict[str, float]],
    teacher: _Exchanged | None,
) -> None:
    """Write all that the next step depends on: of the weights those inside the mask, since no other one moves."""
    tensors = {f"weights/{name}": weights for name, weights in optimizer.masked_weights().items()}
    moments: dict[str, dict[str, Any]] = {}
    for number, state in optimizer.state_dict()["state"].items():
        moments[str(number)] = {key: value for key, value in state.items() if not torch.is_tensor(value)}
        tensors |= {f"optimizer/{number}/{key}": value for key, value in state.items() if torch.is_tensor(value)}
    if teacher is not None:
        tensors |= {f"teacher/{name}": weights for name, weights in teacher.values.items()}
    header: dict[str, Any] = {"kind": "training state", "losses": losses, "optimizer": moments}
    if accelerator.scaler is not None:
        header["scaler"] = accelerator.scaler.state_dict()
    files.write_tensors(path, tensors, header | {"state": files.text_hash(header)})


def _restore(
    path: Path,
    optimizer: MaskedAdam,
    accelerator: Accelerator,
    teacher: _Exchanged | None,
    num_steps: int,
) -> list[dict[str, float]]:
    """Put a stored state in place; returns the losses of the steps that led to it.

    Raises:
        EraseError: the file is damaged, or belongs to another training.
    """
    with _damage_named(path, "trains from the first step"):
        tensors, header = files.read_own(path, kind="training state")
        told = header.pop("state", None)
        header.pop(files.CONTENT)
        if told != files.text_hash(header):
            raise EraseError(f"{path} is damaged: its header does not have the hash that it states")
        if len(header["losses"]) > num_steps:
            raise EraseError(f"{path} holds {len(header['losses'])} steps of {num_steps}")
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "teacher": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        weights = optimizer.masked_weights()
        _require_like(path, parts["weights"], weights)
        if teacher is not None:
            _require_like(path, parts["teacher"], weights)
        state: dict[int, dict[str, Any]] = {int(number): dict(of) for number, of in header["optimizer"].items()}
        for name, tensor in parts["optimizer"].items():
            number, _, key = name.partition("/")
            state[int(number)][key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    optimizer.exchange({name: parts["weights"][name].to(now.device) for name, now in weights.items()})
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(header["scaler"])
    if teacher is not None:
        teacher.values = {name: parts["teacher"][name].to(now.device) for name, now in weights.items()}
    return header["losses"]


def _require_like(path: Path, stored: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """Raise an EraseError unless two sets of weights have the same names, shapes and dtypes."""

    def layout(state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

    if layout(stored) != layout(here):
        raise EraseError(f"{path} holds the weights of another training")
