"""The training loop that all stages share; it saves its state and resumes from it."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from erase import files
from erase.progress import progress

SAVE_EVERY = 250  # steps between checkpoints


def fit(
    path: Path,
    modules: dict[str, nn.Module],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    ema_decay: float,
    weight_decay: float = 0.0,
    warmup: int = 50,
    quiet: bool,
) -> float:
    """Minimise `loss(step)` with AdamW, a cosine schedule, gradient clipping and an average of the weights (EMA).

    path: checkpoint, written every SAVE_EVERY steps; if it exists, the training continues from it.

    The modules end with the averaged weights. Returns the seconds spent, earlier runs included.
    """
    model = nn.ModuleDict(modules)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    averages = [p.detach().clone() for p in parameters]
    start, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averages, start, seconds = state["averages"], state["step"], state["seconds"]
    clock = time.perf_counter()
    with progress(steps, path.stem, "steps", done=start, quiet=quiet) as bar:
        for step in range(start, steps):
            rate = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            optimizer.param_groups[0]["lr"] = lr * rate
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            decay = min(ema_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
            if step % 50 == 0:
                bar.note(loss=f"{value.item():.4f}")
            if (step + 1) % SAVE_EVERY == 0:
                spent = seconds + time.perf_counter() - clock
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averages": averages}
                files.write_pickle(path, {**state, "step": step + 1, "seconds": spent})
            bar.update()
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    return seconds + time.perf_counter() - clock
