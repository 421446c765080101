"""Steps of the product side by side with those of a plain script."""

import copy
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from gpu_parts.job import Job, Part, judged, rounded
from gpu_parts.models import model_folder, random_cifar


def steps(job: Job) -> Part:
    """Training step, optimizer, mask pass, drawing and a ResNet-18 step of the product and of a plain script.

    Both sides do the same work in turn, in one process. A ratio is the product's median over the plain script's.
    """
    folder, batch = model_folder(job), 2 if job.toy else 8
    rounds, num = (1, 3) if job.toy else (3, 5)
    ours = Ours(job, folder, batch)
    plain = Plain(job, ours)
    yield {
        "model": job.model_name,
        "precision": ours.settings.precision,
        "plain": "bf16 autocast, dense fused AdamW, gradients times a float mask, bf16 copy of the base as teacher, "
        "both branches in one batch; bf16 pipeline; channels_last and fused SGD for the classifier",
    }
    classifier = Classifiers(job)
    pairs: dict[str, tuple[Callable[[], list[float]], Callable[[], list[float]], float | None]] = {
        "training step": (lambda: ours.train(num), lambda: timed(job, plain.train, num), 1.0),
        "training step, graphs": (lambda: ours.train(num, replays=True), lambda: timed(job, plain.train, num), 0.7),
        "mask pass, an image": (ours.score, lambda: [s / batch for s in timed(job, plain.score, num)], None),
        "optimizer": (lambda: timed(job, ours.update, num), lambda: timed(job, plain.update, num), None),
        f"{batch} images, {ours.draw_steps} steps": (
            lambda: timed(job, ours.draw, 2),
            lambda: timed(job, plain.draw, 2),
            None,
        ),
        f"{classifier.network} on 32 x 32, {classifier.batch} images": (
            lambda: classifier.ours(num),
            lambda: timed(job, classifier.plain, num),
            1.0,
        ),
    }
    seconds = {}
    for name, (mine, theirs, limit) in pairs.items():
        if name in job.known:
            seconds[name] = job.known[name]["ours"]
            continue
        found = compared(job, mine, theirs, rounds)
        seconds[name] = found["ours"]
        yield {name: found | ({} if limit is None else {"target": limit, "is_met": found["ratio"] <= limit})}
        if limit is not None and found["peak_share"] is not None and name == "training step":
            yield {"training step, peak memory": judged(found["peak_share"], 0.7)}
    at_once, drawn = ours.drawn()
    yield {
        "optimizer, seconds": judged(seconds["optimizer"], 0.015),
        "optimizer, bytes per weight": judged(ours.bytes_per_weight(), 4.2),
        "mask, 800 images": judged(800 * seconds["mask pass, an image"], 9),
        f"1,600 images, {at_once} at once": judged(1600 * drawn, 200),
        "classifier step": judged(seconds[f"{classifier.network} on 32 x 32, {classifier.batch} images"], 0.009),
    }
    waits = {
        "training step": counted(job, ours.ticks, lambda: ours.train(num)),
        "mask pass": counted(job, ours.ticks, ours.score),
        "classifier step": counted(job, classifier.ticks, lambda: classifier.ours(num)),
    }
    yield {"host_waits_per_step": waits}
    yield {"launches_per_step": launched(ours, classifier)}


def launched(ours: "Ours", classifier: "Classifiers") -> dict[str, Any]:
    """Kernels, copies and graphs that a steady step launches, and waits of the host; see `bench.launches`."""
    from bench import launches

    def draw(num: int) -> None:
        ours.draw_steps = num
        ours.draw()

    kept = ours.draw_steps
    found = {
        "training step": launches.per_step(lambda num: ours.train(num)),
        "training step, graphs": launches.per_step(lambda num: ours.train(num, replays=True)),
        "optimizer": launches.per_step(lambda num: [ours.update() for _ in range(num)]),
        "image generation": launches.per_step(draw),
        "classifier step": launches.per_step(lambda num: classifier.ours(num)),
    }
    ours.draw_steps = kept
    waits = {name: sum(n for what, n in one.items() if what.startswith(launches.WAITS)) for name, one in found.items()}
    counts = {name: launches.num_launches(one) for name, one in found.items()}
    return {name: {"launches": rounded(counts[name]), "waits": rounded(waits[name])} for name in found}


def compared(
    job: Job, ours: Callable[[], list[float]], plain: Callable[[], list[float]], rounds: int
) -> dict[str, Any]:
    """Medians of interleaved repeats, in seconds, with the range of each; ratio: ours over plain.

    peak_share: of the memory that each side takes at most, what is there before included; None without a GPU.
    """
    import torch

    seconds: tuple[list[float], list[float]] = ([], [])
    peaks = [0, 0]
    for _ in range(rounds):
        for side, measure in enumerate((ours, plain)):
            if job.on_cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds[side].extend(measure())
            peaks[side] = max(peaks[side], torch.cuda.max_memory_allocated() if job.on_cuda else 0)
    one, other = (statistics.median(found) for found in seconds)
    ranges = [[rounded(min(found)), rounded(max(found))] for found in seconds]
    return {
        "ours": rounded(one),
        "plain": rounded(other),
        "ratio": rounded(one / other),
        "ranges": ranges,
        "repeats": len(seconds[0]),
        "peak_bytes": peaks,
        "peak_share": peaks[0] / peaks[1] if job.on_cuda else None,
    }


class Ticks:
    """When steps begin. Called by the product in the middle of its own loop; `seconds` are of the steps between."""

    def __init__(self, job: Job):
        self.job, self.times, self.marks = job, [], []
        self.count: Callable[[], int] | None = None

    def __call__(self) -> None:
        if self.count is not None:
            self.marks.append(self.count())  # before the wait of our own
        synchronize(self.job)
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of all steps but the first, which allocates; and the last, which no other follows."""
        between = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        self.times = []
        if len(between) < 2:
            raise RuntimeError("the product's loop no longer passes through the place where steps are counted")
        return between[1:]


def synchronize(job: Job) -> None:
    import torch

    if job.on_cuda:
        torch.cuda.synchronize()


def timed(job: Job, work: Callable[[], Any], num: int) -> list[float]:
    """Seconds of each call but the first."""
    found = []
    for _ in range(num):
        synchronize(job)
        start = time.perf_counter()
        work()
        synchronize(job)
        found.append(time.perf_counter() - start)
    return found[1:]


def counted(job: Job, ticks: Ticks, work: Callable[[], Any]) -> dict[str, Any] | None:
    """How often the host waits for the GPU in a steady step, as torch's sync_debug_mode sees it, and where most."""
    import torch

    if not job.on_cuda:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ticks.count, ticks.marks = lambda: len(caught), []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            ticks.count = None
    first, last = ticks.marks[-2:]
    waits = [warning for warning in caught[first:last] if "synchroniz" in str(warning.message)]
    places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits)
    return {"waits": len(waits), "most": dict(places.most_common(5))}


class Ours:
    """The product's loops on SD v1.4, with the settings that `erase-concept --concept nudity` would run with."""

    def __init__(self, job: Job, folder: Path, batch: int):
        from bench import jobs

        from erase import device, masks
        from erase.families import loading, scope
        from erase.options.recipes import resolve
        from erase.options.settings import Settings
        from erase.runs import machine, planning

        self.job, self.batch, self.ticks = job, batch, Ticks(job)
        given = Settings(concept=("nudity",), model=str(folder), device=job.device, batch_size=batch)
        compute = device.choose(given.device, given.precision)
        given = replace(given, precision=compute.precision)
        self.accelerator = machine.make_accelerator(given, job.work / "steps", compute)
        self.model: Any = loading.load(folder, device=compute.device)  # a Stable Diffusion, whose parts are used below
        self.model.precision = compute.precision
        self.settings = resolve(given, "nudity", self.model.defaults, can_round=job.on_cuda)
        self.plan, self.method = planning.make_plan(self.settings, self.model), planning.make_method(self.settings)
        self.recipe = planning.make_recipe(self.settings, self.plan, "object")
        self.parameters = scope.inside(dict(self.model.unet.named_parameters()), str(self.settings.scope))
        self.mask = masks.pack(jobs.random_mask_of(self.model.unet, self.settings.density))
        self.data = jobs.random_data(self.model, 6 * batch)
        self.mask_data = jobs.random_data(self.model, 16 * batch)  # in groups of 32 images on a GPU
        self.draw_steps = 2 if job.toy else self.plan.steps
        self.optimizer = self.gradients = None

    def train(self, num: int, *, replays: bool = False) -> list[float]:
        """Steps of `loop.train`, whose optimizer steps once each.

        replays: with CUDA graphs, which the loop makes in its first step; else without.
        """
        from erase.optim import MaskedAdam
        from erase.training import loop

        recipe, plain = replace(self.recipe, num_steps=num + 2), MaskedAdam.step
        how: dict[str, Any] = {"state_path": self.job.work / "none", "quiet": True}

        def step(optimizer: Any, *arguments: Any) -> Any:
            self.ticks()
            return plain(optimizer, *arguments)

        with mock.patch.object(MaskedAdam, "step", step), mock.patch.object(loop, "REPAYS", 0 if replays else 10**9):
            method: Any = self.method  # one that trains
            loop.train(self.model, method, self.data, self.parameters, self.mask, recipe, self.accelerator, **how)
        return self.ticks.seconds()

    def score(self) -> list[float]:
        """Seconds an image of `saliency_pass.accumulate`, which asks the model once a group of batches."""
        from erase.training import saliency_pass

        how: dict[str, Any] = {"score": self.settings.score, "guidance": float(self.settings.mask_guidance or 0)}
        how |= {"batch_size": self.batch, "seed": 0, "state_path": self.job.work / "none", "quiet": True}
        rows: list[int] = []

        def ticking(x: Any, *arguments: Any) -> Any:
            rows.append(len(x))
            self.ticks()
            return self.model(x, *arguments)

        ticked: Any = with_ticks(self.model, "__call__", lambda: None)
        type(ticked).__call__ = lambda _, *arguments: ticking(*arguments)
        saliency_pass.accumulate(ticked, self.mask_data, self.parameters, self.accelerator, **how)
        return [found / num for found, num in zip(self.ticks.seconds(), rows[1:], strict=False)]

    def update(self) -> None:
        """What the masked optimizer does with gradients that are there: gather them and step."""
        import torch

        from erase.optim import MaskedAdam

        parameters = [parameter.requires_grad_(True) for parameter in self.parameters.values()]
        if self.optimizer is None:
            self.optimizer = MaskedAdam(self.parameters, self.mask, lr=1e-5)
            self.gradients = [torch.full_like(parameter, 1e-3) for parameter in parameters]
        with self.optimizer.gathering():
            torch.autograd.backward(parameters, self.gradients)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def bytes_per_weight(self) -> float:
        """Of the optimizer's state, and of where the masked weights are."""
        if self.optimizer is None:  # a slice that continues behind the row of the optimizer
            self.update()
        assert self.optimizer is not None
        return self.optimizer.num_bytes() / sum(parameter.numel() for parameter in self.parameters.values())

    def drawn(self) -> tuple[int, float]:
        """Images that are generated at once by default, and the seconds of one."""
        from erase.training import memory

        num = 2 if self.job.toy else memory.images_at_once(self.model, self.plan.size)
        how: dict[str, Any] = {"guidance": self.plan.guidance, "size": self.plan.size, "sampler": self.plan.sampler}
        prompts = ["a photo of a person"] * num
        return num, statistics.median(
            timed(self.job, lambda: self.model.draw(prompts, range(num), steps=self.draw_steps, **how), 3)
        ) / num

    def draw(self) -> None:
        """Training images as `erase.data.latents` generates them."""
        prompts, seeds = ["a photo of a person"] * self.batch, list(range(self.batch))
        how: dict[str, Any] = {"guidance": self.plan.guidance, "size": self.plan.size, "sampler": self.plan.sampler}
        self.model.draw(prompts, seeds, steps=self.draw_steps, **how)


class Plain:
    """A plain training script for the same job: short, dense, and with all that torch has to make it fast.

    AdamW is dense and fused, gradients are multiplied by a float mask, the teacher is a bf16 copy of the base, and
    forget and retain images go through the UNet in one batch under bf16 autocast.
    """

    def __init__(self, job: Job, ours: Ours):
        import torch

        self.job, self.ours, self.n = job, ours, ours.batch
        self.device = ours.model.device
        self.unet: Any = copy.deepcopy(ours.model.unet).requires_grad_(True)
        self.teacher: Any = copy.deepcopy(ours.model.unet).requires_grad_(False)
        self.teacher.to(torch.bfloat16)
        self.parameters: list[Any] = list(self.unet.parameters())
        named = dict(self.unet.named_parameters())
        self.mask = [ours.mask[name].to(self.device, torch.float32) for name in named]
        self.adam = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=True)
        self.gradients: Any = None
        self.pipeline: Any = None

    def batch(self, rows: int) -> tuple[Any, Any, Any, Any]:
        """Noisy latents, timesteps, noise and text states, as the product makes them."""
        import torch

        data, draw = self.ours.data, torch.Generator().manual_seed(0)
        which = torch.randint(len(data.forget), (rows,), generator=draw)
        x, t = data.forget.mean[which], torch.randint(0, 1000, (rows,), generator=draw)
        eps, text = torch.randn(x.shape, generator=draw), data.text[data.forget.prompt[which]].text_states
        x, t, eps, text = (tensor.to(self.device) for tensor in (x, t, eps, text))
        return self.ours.model.add_noise(x, eps, t), t, eps, text

    def train(self) -> None:
        import torch
        import torch.nn.functional as F

        x, t, _, text = self.batch(2 * self.n)
        with torch.no_grad():
            wanted = self.teacher(x.bfloat16(), t, encoder_hidden_states=text.bfloat16()).sample.float()
        with torch.autocast(self.device.type, torch.bfloat16):
            found = self.unet(x, t, encoder_hidden_states=text).sample.float()
        forget, retain = (F.mse_loss(a, b) for a, b in zip(found.chunk(2), wanted.chunk(2), strict=True))
        (forget + retain).backward()
        self.step()

    def step(self) -> None:
        import torch

        torch._foreach_mul_([parameter.grad for parameter in self.parameters], self.mask)
        self.adam.step()
        self.adam.zero_grad()

    def update(self) -> None:
        import torch

        if self.gradients is None:
            self.gradients = [torch.full_like(parameter, 1e-3) for parameter in self.parameters]
        torch.autograd.backward(self.parameters, self.gradients)
        self.step()

    def score(self) -> None:
        """A batch of the mask pass: the gradient is added to what is there."""
        import torch
        import torch.nn.functional as F

        x, t, eps, text = self.batch(self.n)
        with torch.autocast(self.device.type, torch.bfloat16):
            found = self.unet(x, t, encoder_hidden_states=text).sample.float()
        F.mse_loss(found, eps).backward()

    def draw(self) -> None:
        """A stock bf16 pipeline with the product's sampler, steps and batch."""
        import torch
        from diffusers import StableDiffusionPipeline

        model, plan = self.ours.model, self.ours.plan
        if self.pipeline is None:
            text_encoder: Any = copy.deepcopy(model.text_encoder)
            parts: Any = {
                "vae": model.vae,
                "text_encoder": text_encoder.to(torch.bfloat16),
                "tokenizer": model.tokenizer,
                "unet": self.teacher,
                "scheduler": model.sampler(plan.sampler),
                "safety_checker": None,
                "feature_extractor": None,
            }
            self.pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
            self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline(
            ["a photo of a person"] * self.n,
            height=plan.size,
            width=plan.size,
            num_inference_steps=self.ours.draw_steps,
            guidance_scale=plan.guidance,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )


class Classifiers:
    """A network for 32 x 32 images on random ones: the product's descent, and a plain loop in channels_last."""

    def __init__(self, job: Job):
        from erase import masks
        from erase.classification import methods, networks, run
        from erase.classification.settings import Settings

        self.job, self.ticks, self.batch = job, Ticks(job), 8 if job.toy else 256
        self.network = "small" if job.toy else "resnet18"
        data = random_cifar(job.work / "cifar-steps", 8 * self.batch, 32)
        how: dict[str, Any] = {"network": self.network, "batch_size": self.batch, "epochs": 1, "learning_rate": 1e-4}
        settings = Settings(data=str(data), device=job.device, output=str(job.work / "none"), **how).resolved()
        self.dataset, _ = run.prepare(settings, job.work / "cache")
        self.recipe = run.recipes(settings, self.dataset)[1]
        sizes = (len(self.dataset.classes), self.dataset.channels, self.dataset.size)
        shape = networks.Shape(self.network, *sizes, self.dataset.mean, self.dataset.std)
        self.model = networks.build(shape, seed=0).to(job.device)
        self.copy = copy.deepcopy(self.model)
        self.named = dict(self.model.named_parameters())
        self.mask = masks.random_mask({name: p.shape for name, p in self.named.items()}, 0.5, seed=0)
        self.plan = methods.Plan
        self.plain_state: Any = None

    def ours(self, num: int) -> list[float]:
        """Steps of `descent.descend` on labelled images, masked."""
        import torch
        import torch.nn.functional as F

        from erase.classification import replayed
        from erase.classification.descent import descend

        def loss(x: Any, y: Any, at: Any) -> Any:
            self.ticks()
            return F.cross_entropy(self.model(x), y)

        images = self.dataset.train[torch.arange((num + 1) * self.batch).to(self.dataset.train.y.device)]
        plan = self.plan(passes=lambda: [images], loss=loss)
        with mock.patch.object(replayed, "AFTER", 0):  # the graph is made in the first step
            descend(self.model, plan, self.recipe, torch.Generator().manual_seed(0), self.mask)
        return self.ticks.seconds()

    def plain(self) -> None:
        import torch
        import torch.nn.functional as F

        if self.plain_state is None:
            model = self.copy.train().requires_grad_(True).to(memory_format=torch.channels_last)  # pyright: ignore
            parameters = list(model.parameters())
            sgd = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
            mask = [self.mask[name].to(p.device, torch.float32) for name, p in model.named_parameters()]
            images = self.dataset.train
            x = (images.x[: self.batch].float() / 255).contiguous(memory_format=torch.channels_last)
            self.plain_state = model, parameters, sgd, mask, x, images.y[: self.batch]
        model, parameters, sgd, mask, x, y = self.plain_state
        F.cross_entropy(model(x), y).backward()
        torch._foreach_mul_([parameter.grad for parameter in parameters], mask)
        sgd.step()
        sgd.zero_grad()


def with_ticks(thing: Any, name: str, ticks: Callable[[], None]) -> Any:
    """The same object, whose method `name` calls `ticks` first."""
    method = getattr(type(thing), name)

    def ticking(self: Any, *arguments: Any) -> Any:
        ticks()
        return method(self, *arguments)

    counted = object.__new__(type(type(thing).__name__, (type(thing),), {name: ticking}))
    vars(counted).update(vars(thing))
    return counted
