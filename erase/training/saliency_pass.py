"""Gradients of the forget loss, summed into saliency scores; the pass resumes bit for bit."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from erase import device, masks, tensor_files
from erase.conditioning import Conditioning
from erase.data.latents import Data
from erase.device import LOSS_SCALE, staged
from erase.errors import EraseError
from erase.families.protocol import Family
from erase.progress import progress
from erase.training import memory
from erase.training.batches import generator, sample
from erase.training.checkpoint import Stored, damage_named
from erase.training.gradients import taking_gradients

SAVE_EVERY_SECONDS = 300.0
SAVE_EVERY_BATCHES = 100  # of sharded weights: all processes save together, and their clocks differ
MOST_IMAGES = 32  # that go through the network together; more are no faster on an H100


def accumulate(
    model: Family,
    data: Data,
    parameters: Mapping[str, Parameter],
    accelerator: Accelerator,
    *,
    score: masks.Score,
    guidance: float,
    batch_size: int,
    seed: int,
    state_path: Path,
    radius: float = 0.0,
    part: int | None = None,
    checkpointing: bool = False,
    is_sharded: bool = False,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """Scores of SalUn's mask: one pass over the forget images, the gradient of each batch's mean loss summed.

    L = mean((eps - guided(eps(x_t | c), eps(x_t | ""), g))^2), t uniform, one draw an image. The paper has g = 0, its
    code 7.5. With several processes each takes every n-th batch and the sums are added.

    With a radius r > 0 the gradient is taken under attack, at text states c + d with |d| <= r s, s the standard
    deviation of all prompts' states: d = clip(d_0 - r s sign grad_d L, -r s, r s) from a random d_0 in the box, one
    signed step (Wong et al., ICLR 2020) towards predictions that still know the concept. So weights count that answer
    other wordings than the prompts.

    state_path: the running sums, stored every five minutes, so that an interrupted pass can continue.
    part: images that go through the network together, to save memory; None is the whole batch, on a GPU with room for
        them several batches. The sum is the same up to rounding. Only for abs_sum: |g| and g^2 are of whole batches,
        whose gradients would have to be kept.
    is_sharded: `parameters` are this process's rows of them, see `erase.training.sharded.Shards`. All processes then
        share each batch, because their passes go together, and each has the scores of its rows.
    """
    sums = masks.Saliency(parameters, score)
    together = batch_size if part is None or score != "abs_sum" else part
    num_batches = 1
    if score == "abs_sum" and part is None and not checkpointing and not is_sharded:
        num_batches = _batches_at_once(model, data, batch_size, guided=bool(guidance))
    starts = list(range(0, len(data.forget), batch_size))
    mine = starts if is_sharded else starts[accelerator.process_index :: accelerator.num_processes]
    if accelerator.num_processes > 1 and not is_sharded:
        state_path = state_path.with_suffix(f".{accelerator.process_index}.safetensors")
    stored = Stored(state_path, accelerator, is_sharded=is_sharded)
    done = 0
    if (last := stored.last()) is not None:
        done = _restore_sums(last, sums, len(mine))
    saved = time.monotonic()
    box = radius * float(data.text.text_states.double().std()) if radius else 0.0
    scale = LOSS_SCALE["fp16" if accelerator.mixed_precision == "fp16" else "fp32"]  # the order of scores is the same
    with (
        taking_gradients(model, parameters, checkpointing),
        sums.collecting(),
        progress(len(mine), "mask", "batches", done=done, quiet=quiet or not accelerator.is_main_process) as bar,
    ):
        while done < len(mine):
            group = _group(mine[done : done + num_batches], len(data.forget), batch_size)
            rows = [torch.arange(start, min(start + batch_size, len(data.forget))) for start in group]
            drawn = [
                _drawn(model, data, own, generator(seed, "mask", start), box)
                for own, start in zip(rows, group, strict=True)
            ]
            if is_sharded:
                drawn = [_share(one, accelerator) for one in drawn]
            num = together if len(group) == 1 else batch_size * len(group)
            for loss in _losses(model, data, drawn, num, guidance, accelerator, box, scale):
                (loss * scale).backward()
            done += len(group)
            bar.update(len(group))
            if is_sharded and done % SAVE_EVERY_BATCHES == 0:
                _keep_sums(stored.of(done), sums, done)
                stored.settle(done)
            elif not is_sharded and time.monotonic() - saved > SAVE_EVERY_SECONDS:
                _keep_sums(state_path, sums, done)
                saved = time.monotonic()
    if accelerator.num_processes > 1 and not is_sharded:
        for total in sums.state_dict()["sums"].values():
            total.copy_(accelerator.reduce(total, reduction="sum"))
    scores = sums.scores()
    stored.clear()
    return scores


def _batches_at_once(model: Family, data: Data, batch_size: int, *, guided: bool) -> int:
    """Batches that go through the network together: up to 32 images that a GPU has room for; one on a CPU."""
    free = device.free_memory(model.device)
    if free <= 0 or 2 * batch_size > MOST_IMAGES:
        return 1
    resolution = data.forget.mean.shape[-1] * model.resolution // model.latent_shape(model.resolution)[-1]
    each = (1 + guided) * memory.activations(model, 1, resolution, torch.float32, checkpointing=False)
    return max(1, min(MOST_IMAGES, int(0.9 * free / each)) // batch_size)


def _group(starts: Sequence[int], num: int, batch_size: int) -> Sequence[int]:
    """The first of these batches that go through the network together: a short last one goes alone."""
    whole = [start for start in starts if start + batch_size <= num]
    return whole or starts[:1]


Drawn = tuple[Tensor, Tensor, Tensor, Conditioning, Tensor]


def _drawn(model: Family, data: Data, rows: Tensor, draw: torch.Generator, box: float) -> Drawn:
    """Latents, timesteps, noise and text of a batch of forget rows, and where an attack on the text states starts."""
    x = sample(data.forget, rows, draw)
    t = torch.randint(0, model.num_timesteps, (len(rows),), generator=draw)
    eps = torch.randn(x.shape, generator=draw)
    c = data.text[data.forget.prompt[rows]]
    return x, t, eps, c, box * (2 * torch.rand(c.text_states.shape, generator=draw) - 1) if box else torch.empty(len(x))


def _share(drawn: Drawn, accelerator: Accelerator) -> Drawn:
    """This process's rows of a batch; all of them if they do not divide, whose mean is that of equal shares too."""
    num = accelerator.num_processes
    own = slice(accelerator.process_index, None, num) if len(drawn[0]) % num == 0 else slice(None)
    x, t, eps, c, d = drawn
    return x[own], t[own], eps[own], c[own], d[own]


def _losses(
    model: Family,
    data: Data,
    batches: Sequence[Drawn],
    together: int,
    guidance: float,
    accelerator: Accelerator,
    box: float,
    scale: float,
) -> Iterator[Tensor]:
    """The sum of the batches' mean losses, in parts of `together` rows that add up to it; batches of one size.

    box: how far an attack may move each number of the text states; 0: none. scale: of the attack's loss.
    """
    *of_images, every_c, every_d = zip(*batches, strict=True)
    x, t, eps, d = (torch.cat(each) for each in (*of_images, every_d))
    c = Conditioning.cat(every_c)
    for start in range(0, len(x), together):
        part = slice(start, start + together)
        x_0, t_0, eps_0 = (staged(whole[part], model.device) for whole in (x, t, eps))
        c_0 = c[part].each(lambda each: staged(each, model.device))
        x_t = model.add_noise(x_0, eps_0, t_0)
        if box:
            c_0 = _attacked(model, x_t, t_0, c_0, eps_0, staged(d[part], model.device), box, accelerator, scale)
        with accelerator.autocast():
            predicted = model(x_t, t_0, c_0)
            if guidance:
                empty = data.unconditional.each(lambda each: staged(each, model.device)).expand(len(x_0))
                predicted = guided(predicted, model(x_t, t_0, empty), guidance)
            loss = (eps_0 - predicted).square().mean() * (len(batches) * len(x_0) / len(x))
        yield loss


def _attacked(
    model: Family, x_t: Tensor, t: Tensor, c: Conditioning, eps: Tensor, d: Tensor, box: float,
    accelerator: Accelerator, scale: float,
) -> Conditioning:  # fmt: skip
    """c with its text states moved by d after one signed step of size `box`, which leaves no number moved further."""
    d.requires_grad_(True)
    with accelerator.autocast():
        loss = (eps - model(x_t, t, replace(c, states=c.text_states + d))).square().mean()
    (gradient,) = torch.autograd.grad(loss * scale, [d])
    return replace(c, states=c.text_states + (d.detach() - box * gradient.sign()).clamp(-box, box))


def _keep_sums(path: Path, sums: masks.Saliency, num_batches: int) -> None:
    """Write the sums of the first batches, from which an interrupted pass continues."""
    state = sums.state_dict()
    header = {"kind": "saliency sums", "score": state["score"], "done": num_batches}
    tensor_files.write_tensors(path, state["sums"], header)


def _restore_sums(path: Path, sums: masks.Saliency, num_batches: int) -> int:
    """Put stored sums in place; returns the number of batches that are in them."""
    with damage_named(path, "computes the mask again"):
        stored, header = tensor_files.read_own(path, kind="saliency sums")
        done = header.get("done")
        if not isinstance(done, int) or not 0 <= done <= num_batches:
            raise EraseError(f"{path} is damaged: it says that {done} of {num_batches} batches are done")
        sums.load_state_dict({"score": header.get("score"), "sums": stored})
    return done


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """(1 + g) e_c - g e_0, SalUn's way to count guidance: g = 7.5 is diffusers' guidance_scale 8.5."""
    return (1 + guidance) * conditional - guidance * unconditional
