"""(model, task) -> a folder of PNGs with records: same seed, same image, whatever was interrupted or shared out."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erase import delta, files, guards
from erase.data import images
from erase.data.pixels import to_pixels
from erase.device import DTYPES, choose
from erase.errors import EraseError
from erase.evaluation import arm, jsonl
from erase.evaluation.beside import Early, beside, looked_at
from erase.evaluation.judges.protocol import Judge
from erase.evaluation.tasks.protocol import Sample, SampleSet
from erase.families import loading
from erase.families.modes import compiling
from erase.families.protocol import Family
from erase.guards import Guard
from erase.progress import progress
from erase.runs.machine import versions
from erase.runs.record import Models
from erase.training import memory

DECODED = 8  # images that the VAE decodes at once: it takes far more memory than the network
COMPILE_FROM = 40_000  # images times steps: an H100 saves 1.9 ms for each and compiles for 70 s
Draw = Callable[[Sequence[Sample], tuple[int, int], float], Tensor]  # (batch, size, guidance) -> latents, on the CPU


def load_model(
    source: str,
    *,
    delta_path: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    guard: Guard | None = None,
    only_generates: bool = False,
    **options: Any,
) -> Family:
    """A model to generate with, and a delta and a guard if they are given.

    only_generates: store the network in the precision that generating rounds it to, and let networks that a GPU cannot
        hold at once take turns there (`Family.take_turns`). Images are the same; there are no gradients.
    options: arguments of `erase.families.loading.load`.

    Raises:
        EraseError: the model cannot be loaded, the delta was made for another one, or there is no such device.
    """
    compute = choose(device, precision)
    model = loading.load(source, **options)
    if delta_path:
        change = delta.load(delta_path)
        changed = model.training(change.component)
        changed.put_weights(delta.apply(changed.state_of(changed.network), change))
        model.name = f"{source} + {Path(delta_path).name}"
    if guard and not model.takes_guards:
        raise EraseError(f"--guard: guards do not know the family {model.family} of {source}; leave it out")
    model.guard, model.precision = guard, compute.precision
    if not only_generates:
        model.to(compute.device)
        return model
    if compute.precision != "fp32":
        model.store_hashes()
        model.round_network(DTYPES[compute.precision])
    memory.place_to_generate(model, compute.device, model.resolution)
    return model


def model_hashes(model: Family) -> dict[str, str]:
    """Content hashes of all that decides an image, of the weights as they were loaded, and the guard beside them.

    The network's is the one that deltas and run.json state, whatever the precision.
    """
    guard = {"guard": repr(model.guard)} if model.guard else {}
    return {part: model.hash_of(part) for part in model.parts} | guard


def network_hash(model: Family, hashes: Mapping[str, str], made_from: Models | None) -> str:
    """Of the network that the run changed, by its record; of the family's own if there is none.

    hashes: see `model_hashes`.
    """
    part = made_from.part if made_from and made_from.part else model.part
    return hashes[part] if part == model.part else model.training(part).hash_of(part)


def effective_settings(
    model: Family, task: SampleSet, steps: int | None, guidance: float | None, resolution: int | None = None
) -> dict[str, Any]:
    """How images are generated, read back from the objects that generate them; guidance and size per sample override.

    steps, guidance: None for the task's, else the model's own. resolution: side in pixels of every image; None for the
        samples' own sizes, else the model's.

    Raises:
        EraseError: more steps than the model was trained with, a side that its VAE cannot make, or a guard that would
            change no image.
    """
    _check_sides(model, task, resolution)
    scheduler: Any = model.sampler()
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    num = _first(steps, task.steps, model.defaults.get("num_inference_steps"), 50)
    trained = config["num_train_timesteps"]
    if num > trained:
        raise EraseError(f"--num-inference-steps is {num}, but {model.name} has {trained} timesteps; choose fewer")
    usual = float(_first(guidance, task.guidance, model.defaults.get("guidance_scale"), model.guidance_scale))
    if model.guard:
        least = usual if guidance is not None else min(float(_first(s.guidance, usual)) for s in task.samples)
        if least <= 1 and model.guard.needs_guidance:
            raise EraseError(
                f"a guard needs guidance above 1, and that of an image is {least:g}; give --guidance-scale, or use "
                "--guard nag, which needs none"
            )
        scheduler.set_timesteps(int(num))
        guards.require_acting(model.guard, len(scheduler.timesteps))
    return {
        "scheduler": type(scheduler).__name__,
        "scheduler_config": {name: repr(value) for name, value in sorted(config.items())},
        "steps": int(num),
        "guidance": usual,
        "guidance_of_samples": "used" if guidance is None else "ignored",
        "size": model.resolution if resolution is None else resolution,
        **({} if resolution is None else {"size_of_samples": "ignored"}),
        "precision": str(DTYPES[model.precision]).removeprefix("torch."),
        "device": model.device.type,
        "noise": "one CPU generator a picture",  # part of an identity: old folders have this text
        "safety_checker": None,
        **({"compiled": True} if _is_repaid(model, task, {"steps": num}) else {}),
        "libraries": {
            name: text for name, text in versions().items() if name in ("torch", "diffusers", "transformers")
        },
    }


def size_of(sample: Sample, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a sample's image, in pixels. settings: see `effective_settings`."""
    if "size_of_samples" in settings:
        return settings["size"], settings["size"]
    return _first(sample.height, settings["size"]), _first(sample.width, settings["size"])


def guidance_of(sample: Sample, settings: Mapping[str, Any]) -> float:
    """Guidance of a sample's image. settings: see `effective_settings`."""
    own = sample.guidance if settings["guidance_of_samples"] == "used" else None
    return _first(own, settings["guidance"])


def _check_sides(model: Family, task: SampleSet, resolution: int | None) -> None:
    if resolution is not None:
        model.require_sides(f"--resolution is {resolution}", resolution)
        return
    for sample in task.samples:
        height, width = (_first(side, model.resolution) for side in (sample.height, sample.width))
        model.require_sides(f"the image of {sample.prompt[:60]!r} would be {width} x {height}", width, height)


def _first(*values: Any) -> Any:
    """The first value that is given; 0 is one."""
    return next(value for value in values if value is not None)


def identity(
    hashes: Mapping[str, str], task: SampleSet, settings: Mapping[str, Any], batch_size: int
) -> dict[str, Any]:
    """What makes an arm this arm; the batch size too, since the last bit of an image depends on it.

    hashes: of the model, by `model_hashes`.
    """
    generation = {**settings, "batch_size": batch_size}
    return {"task": task.identity(), "model": dict(hashes), "generation": generation}


def generate(
    model: Family,
    task: SampleSet,
    folder: Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    resolution: int | None = None,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
    quiet: bool = False,
    role: str = "",
    judges: Sequence[Judge] = (),
) -> Early:
    """Draw what is missing of the task's images into the folder.

    Batches are fixed by the samples' order, so the images of an interrupted run, or of `world` processes that each
    generate every world-th batch, are those of one uninterrupted process, bit for bit.

    role: of the model, for the line of progress.
    judges: on a GPU those that need none look at each new image on CPU threads while the next ones are generated.
        Their outputs are returned for `score.score`; a judge that waited for the end finds none here.

    Raises:
        EraseError: the folder holds other images, or cannot be written.
    """
    settings = effective_settings(model, task, steps, guidance, resolution)
    arm.open_arm(folder, identity(model_hashes(model), task, settings, batch_size), task.samples)
    absent = {sample.id for sample in arm.missing(folder)}
    mine = [batch for batch in batches(task.samples, batch_size)[rank::world] if any(s.id in absent for s in batch)]

    def asked(batch: Sequence[Sample]) -> tuple[list[str], list[int]]:
        return [sample.prompt for sample in batch], [sample.seed for sample in batch]

    def draw(batch: Sequence[Sample], size: tuple[int, int], guidance: float) -> Tensor:
        return model.draw(*asked(batch), steps=settings["steps"], guidance=guidance, size=size)

    early: Early = {}
    is_gpu = model.device.type == "cuda"
    numbers = {sample.id: number for number, sample in enumerate(task.samples)}

    def keep(sample: Sample, latents: Tensor, image: Tensor, size: int) -> dict[str, Any]:
        facts = {"batch_size": size, "truncated": model.truncates(sample.prompt)}
        record = _store(folder, _name(numbers, sample), sample, latents, image) | facts
        if is_gpu and not record["invalid"]:
            looked_at(judges, early, record, _pixels(image), sample.prompt)
        return record

    with (
        jsonl.Appender(folder / f"records-{rank}-of-{world}.jsonl") as out,
        progress(sum(map(len, mine)), f"generate {task.id}{role and f', {role} model'}", "images", quiet=quiet) as bar,
        beside(model.device) as threads,
        compiling(model.network, _is_repaid(model, task, settings)),
    ):
        for batch, following in zip_longest(mine, mine[1:]):
            if following:
                first = following[0]
                how: dict[str, Any] = {"guidance": guidance_of(first, settings), "size": size_of(first, settings)}
                model.announce(*asked(following), **how)
            drawn = [one for one in _drawn(model, batch, settings, draw) if one[0].id in absent]
            for lines in threads.give([partial(keep, *one) for one in drawn]):
                out.write(lines)
            bar.update(len(batch))
        for lines in threads.rest():
            out.write(lines)
    return early


def _is_repaid(model: Family, task: SampleSet, settings: Mapping[str, Any]) -> bool:
    """Whether the task has so many images that compiling the network saves more time than it takes."""
    can = model.device.type == "cuda" and model.guard is None and not model.takes_turns
    return can and len(task.samples) * settings["steps"] >= COMPILE_FROM


def together(given: int | None, model: Family, folder: Path | None = None, *, world: int = 1) -> int:
    """Images that are generated at once: as given, as in the folder's images so far, or by the GPU's free memory.

    world: processes that share the task; several do not ask for free memory, which may differ between their GPUs.
    """
    if given is not None:
        return given
    if folder is not None and (folder / arm.MANIFEST).is_file():
        there = arm.manifest(folder)["generation"].get("batch_size")
        if isinstance(there, int) and there > 0:
            return there
    return memory.images_at_once(model, model.resolution) if world == 1 else memory.FEW_IMAGES


def stored(
    model: Family,
    folder: Path,
    samples: Sequence[Sample],
    batch: Sequence[Sample],
    absent: Collection[str],
    settings: Mapping[str, Any],
    draw: Draw,
    said: Callable[[Sample], str] = lambda sample: sample.prompt,
) -> list[dict[str, Any]]:
    """Generate a batch and write its absent images; their records.

    samples: all of the arm. absent: ids of images that are to be written. settings: see `effective_settings`.
    said: the text that a sample's image is generated from.
    """
    numbers = {sample.id: number for number, sample in enumerate(samples)}
    lines = []
    for sample, latents, image, size in _drawn(model, batch, settings, draw):
        if sample.id in absent:
            name = _name(numbers, sample)
            facts = {"batch_size": size, "truncated": model.truncates(said(sample))}
            other = {"said": said(sample)} if said(sample) != sample.prompt else {}
            lines.append(_store(folder, name, sample, latents, image) | facts | other)
    return lines


def _name(numbers: Mapping[str, int], sample: Sample) -> str:
    return f"images/{numbers[sample.id]:05d}_{files.text_hash([sample.id, sample.prompt])[:8]}.png"


def batches(samples: Sequence[Sample], batch_size: int) -> list[tuple[Sample, ...]]:
    """Samples of one size and guidance each, in the task's order: only these fit one call of the pipeline."""
    alike: dict[Any, list[Sample]] = defaultdict(list)
    for sample in samples:
        alike[sample.height, sample.width, sample.guidance].append(sample)
    return [tuple(group[i : i + batch_size]) for group in alike.values() for i in range(0, len(group), batch_size)]


def _drawn(
    model: Family, batch: Sequence[Sample], settings: Mapping[str, Any], draw: Draw
) -> list[tuple[Sample, Tensor, Tensor, int]]:
    """Latents and image, [3, h, w] in [-1, 1], of each sample, and with how many others it was generated.

    A GPU that runs out of memory halves the batch: each image has its own noise, so they stay what they are.
    """
    size = size_of(batch[0], settings)
    try:
        latents = draw(batch, size, guidance_of(batch[0], settings))
        images = _decoded(model, latents)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise EraseError(
                f"one image of {size[0]} x {size[1]} does not fit into the GPU's memory; try --precision bf16"
            ) from error
        torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        return [one for part in (batch[:half], batch[half:]) for one in _drawn(model, part, settings, draw)]
    return [(sample, z, x, len(batch)) for sample, z, x in zip(batch, latents, images, strict=True)]


def _decoded(model: Family, latents: Tensor) -> Tensor:
    """Their images, one by one where the GPU's memory is too small for several at once."""
    try:
        return model.decode(latents, min(len(latents), DECODED))
    except torch.OutOfMemoryError:
        if len(latents) == 1:
            raise
        torch.cuda.empty_cache()
        return model.decode(latents, 1)


def _store(folder: Path, name: str, sample: Sample, latents: Tensor, image: Tensor) -> dict[str, Any]:
    """Write the image, whole, and return its record."""
    if not (latents.isfinite().all() and image.isfinite().all()):
        return {"id": sample.id, "file": None, "sha256": None, "pixels": None, "invalid": "not finite"}
    pixels = _pixels(image)
    images.write_png(folder / name, pixels)
    written = {"sha256": files.file_hash(folder / name), "pixels": images.pixel_hash(pixels)}
    return {"id": sample.id, "file": name, **written, "invalid": images.invalid_reason(pixels)}


def _pixels(image: Tensor) -> np.ndarray:
    """uint8, [h, w, 3], as the file has them."""
    return to_pixels(image).permute(1, 2, 0).contiguous().numpy()
