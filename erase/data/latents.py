"""The training data of a run: forget and retain images as cached latents, each with its prompt's text states."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase import files
from erase.concepts import Concept, refusal
from erase.conditioning import Conditioning
from erase.data import images
from erase.data.cache import Source, Workers, cached
from erase.data.pixels import to_pixels
from erase.data.prompt_states import anchors_of, own_places
from erase.data.sources import list_images
from erase.errors import EraseError
from erase.families.protocol import Family, Sampler

SEEDS_PER_RUN = 1_000_000  # a run draws its forget images with the seeds from seed * this on
RETAIN_SEED = 500_000_000  # and its retain images from there plus this


@dataclass(frozen=True)
class ImageLatents:
    """Latents of n images as the VAE's posterior, and what each one was generated from or is called.

    mean: [n, c, h, w], scaled for the network. std: the same shape; zero where the model drew the latent itself.
    prompt: int64, [n], rows of `Data.text`.
    t: int64, [n], where `mean` is not an image but a point on a trajectory from noise to one: the timestep there.
    """

    mean: Tensor
    std: Tensor
    prompt: Tensor
    t: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Data:
    """All that the mask and the training see; the VAE and the text encoder are not needed any more.

    text: conditioning of `prompts`, row by row. unconditional: the single row that guidance starts from.
    anchor: int64, [len(forget)], row of the anchor prompt of each forget image.
    others: int64, [k], rows of other classes' prompts for random labels.
    words: bool, [len(forget), tokens], where the forget prompt's own words stand: those that its anchor lacks.
    end: bool, [len(forget), tokens], where the forget prompt is over.
    anchor_images: images of the anchor prompts under their own prompts; None if there are none.
    fingerprint: hash of all that determines these tensors.
    """

    forget: ImageLatents
    retain: ImageLatents
    anchor: Tensor
    others: Tensor
    words: Tensor
    end: Tensor
    prompts: tuple[str, ...]
    text: Conditioning
    unconditional: Conditioning
    fingerprint: str
    record: dict[str, Any]
    anchor_images: ImageLatents | None = None


@dataclass(frozen=True)
class Plan:
    """How images are generated or read.

    round_trip: send generated latents through decoder, 8-bit pixels and encoder, as a folder of saved images would be;
        gives the posterior's spread, which the reference recipe samples.
    images: what the forget set holds: images of the "concept", images of its "anchor" under the forget prompt's
        name, points of the "trajectory" from noise to the concept, a random one of each image's, names alone,
        where the method begins from "noise", or latents that are "uniform" in [-1, 1].
    retains: False where nothing is kept by images; the retain set is then one empty image.
    retain_names: only the names of retain images are used; the images are empty.
    trajectory_guidance: of the trajectories; 3 in ESD.
    num_anchor: images of the anchor prompts to generate beside the forget and retain sets.
    """

    num_forget: int
    num_retain: int
    steps: int
    guidance: float
    size: int
    batch_size: int
    seed: int
    sampler: Sampler = "model"
    round_trip: bool = False
    images: str = "concept"
    retains: bool = True
    retain_names: bool = False
    trajectory_guidance: float = 3.0
    forget_images: str | None = None
    retain_images: str | None = None
    num_anchor: int = 0


def gather(
    model: Family,
    concept: Concept,
    plan: Plan,
    *,
    model_hash: str,
    cache_dir: Path,
    workers: Workers | None = None,
    quiet: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Data:
    """Generate or read the concept's forget and retain sets; what is already in the cache is read from there.

    model_hash: content hash of the network; images of another model are never taken for its own.
    tell: called with lines about the source of captions, and about damaged files in the cache, which are made again.

    Raises:
        EraseError: no retain prompts, an empty image folder, an image that cannot be read.
    """
    workers, pairs = workers or Workers(), concept.pairs()
    first_seed = plan.seed * SEEDS_PER_RUN
    forget_source, retain_source, cut = _sources(model, concept, plan, first_seed, tell)
    hashes = [model_hash, *(model.hash_of(part) for part in model.data_parts)]

    def read(source: Source, label: str) -> tuple[ImageLatents, str]:
        key = files.text_hash([hashes, plan.batch_size, source.identity])
        folder = cache_dir / "latents" / key[:32]
        return ImageLatents(
            **cached(folder, source, plan.batch_size, workers, label, quiet, tell), prompt=row(source.prompts)
        ), key

    rows: dict[str, int] = {"": 0}

    def row(prompts: Iterable[str]) -> Tensor:
        return torch.tensor([rows.setdefault(prompt, len(rows)) for prompt in prompts], dtype=torch.int64)

    if plan.retain_images and not plan.forget_images:
        row(forget_source.prompts)  # numbers them first, as below
        read(retain_source, "retain images")  # now in the cache: a bad image is an error before any is generated
    forget, forget_key = read(forget_source, "forget images")
    retain, retain_key = read(retain_source, "retain images")
    anchors = anchors_of(forget_source.prompts, pairs)
    anchor, others = row(anchors), row(concept.others)
    anchor_images, of_anchors = None, {}
    if plan.num_anchor:
        shown = _source(model, plan, None, [anchor for _, anchor in pairs], plan.num_anchor, first_seed, tell=tell)
        anchor_images, of_anchors["anchor_key"] = read(shown, "anchor images")
    record = {
        "num_forget": len(forget),
        "num_retain": len(retain),
        **_first_seeds(plan, first_seed),
        "forget_key": forget_key,
        "retain_key": retain_key,
        "truncated_captions": cut,
        **of_anchors,
    }
    keys = [forget_key, retain_key, *of_anchors.values()]
    fingerprint = files.text_hash([*keys, list(rows), anchor.tolist(), others.tolist()])
    text = model.encode_text(list(rows))
    unconditional = model.unconditional(text[:1])  # row 0 is the empty prompt's
    places = (anchor, others, *_places(model, forget_source.prompts, anchors))
    return Data(forget, retain, *places, tuple(rows), text, unconditional, fingerprint, record, anchor_images)


def _first_seeds(plan: Plan, first_seed: int) -> dict[str, int | None]:
    """Of generated images; None for those of a folder."""
    return {
        "first_seed": None if plan.forget_images else first_seed,
        "first_retain_seed": None if plan.retain_images else first_seed + RETAIN_SEED,
    }


def _sources(
    model: Family, concept: Concept, plan: Plan, first_seed: int, tell: Callable[[str], None]
) -> tuple[Source, Source, list[str]]:
    """The forget and the retain set, still to be made, and the captions that the text encoder cuts.

    Both sets are listed before any image is generated, so that a wrong folder is an error at once.
    """
    model.require_sides(f"--resolution is {plan.size}", plan.size)
    if plan.forget_images and plan.images in {"trajectory", "noise", "uniform"}:
        raise EraseError("this method trains on noise instead of images of the concept; leave out --forget-images")
    if plan.retain_images and not plan.retains:
        raise EraseError("this method has no retain loss; leave out --retain-images")
    if plan.retain_images and plan.retain_names:
        raise EraseError("this method uses retain prompts, not images; give --retain instead of --retain-images")
    pairs = concept.pairs()
    names = [forget for forget, _ in pairs]
    shown = [anchor for _, anchor in pairs] if plan.images == "anchor" else names
    forget = _source(model, plan, plan.forget_images, names, plan.num_forget, first_seed, shown=shown, tell=tell)
    retain_seed = first_seed + RETAIN_SEED
    retain = _source(model, plan, plan.retain_images, concept.retain, plan.num_retain, retain_seed, tell=tell)
    _refuse_captions(plan, concept, forget.prompts, retain.prompts)
    given = (*(forget.prompts if plan.forget_images else ()), *(retain.prompts if plan.retain_images else ()))
    cut = [caption for caption in dict.fromkeys(given) if caption and model.truncates(caption)]
    if cut:
        tell(
            f"captions longer than the text encoder reads, and truncated: {len(cut)}, the first {cut[0][:60] + '...'!r}"
        )
    if plan.images == "trajectory":
        forget = _followed(model, plan, forget.prompts, first_seed)
    elif plan.images == "uniform":
        forget = _uniform(model, plan, forget.prompts, first_seed)
    elif plan.images == "noise":
        forget = _blank(model, plan, forget.prompts)
    if not plan.retains:
        retain = _blank(model, plan, [""])
    elif plan.retain_names and None not in retain.prompts:
        retain = _blank(model, plan, retain.prompts)
    if None in retain.prompts:
        unnamed = f"; --retain-images {plan.retain_images} names no prompts either" if plan.retain_images else ""
        raise EraseError(f"concept {concept.name!r} has no retain prompts{unnamed}; give --retain PROMPT")
    return forget, retain, cut


def _places(model: Family, prompts: Sequence[str], anchors: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`Data.words` and `Data.end` of the forget prompts."""
    words, end = (torch.zeros(len(prompts), model.max_tokens, dtype=torch.bool) for _ in range(2))
    for number, (prompt, instead) in enumerate(zip(prompts, anchors, strict=True)):
        for run, own in zip(model.token_runs(prompt), own_places(model, prompt, instead)[0], strict=True):
            words[number, own] = True
            end[number, run.first + len(run.tokens) : run.stop] = True
    return words, end


def _refuse_captions(plan: Plan, concept: Concept, forget: Sequence[Any], retain: Sequence[Any]) -> None:
    """Raise an EraseError for captions and names of class folders that involve minors.

    Forget images are a target. Retain images may show a child, but not beside a concept that has to do with nudity.
    """
    sexual = concept.is_sexual or any(map(refusal.has_sexual_words, filter(None, forget)))
    if plan.forget_images:
        where = f"a caption or folder name of --forget-images {plan.forget_images}"
        refusal.refuse(filter(None, forget), where, sexual=sexual, target=True)
    if plan.retain_images:
        where = f"a caption or folder name of --retain-images {plan.retain_images}"
        refusal.refuse(filter(None, retain), where, sexual=sexual)


def of_prompts(data: Data, prompts: Sequence[str]) -> Data:
    """The data with only those forget images that have one of these prompts."""
    wanted = {row for row, prompt in enumerate(data.prompts) if prompt in set(prompts)}
    rows = torch.tensor([i for i, row in enumerate(data.forget.prompt.tolist()) if row in wanted], dtype=torch.int64)
    if not len(rows):
        raise EraseError(
            f"--num-forget {len(data.forget)} leaves no image for the prompt {prompts[0]!r}; generate more"
        )
    f = data.forget
    part = ImageLatents(f.mean[rows], f.std[rows], f.prompt[rows], None if f.t is None else f.t[rows])
    fingerprint = files.text_hash([data.fingerprint, rows.tolist()])
    places = {name: getattr(data, name)[rows] for name in ("anchor", "words", "end")}
    return replace(data, forget=part, fingerprint=fingerprint, **places)


def _source(
    model: Family,
    plan: Plan,
    folder: str | None,
    prompts: Sequence[str],
    num: int,
    first_seed: int,
    *,
    shown: Sequence[str] | None = None,
    tell: Callable[[str], None],
) -> Source:
    """`num` images that the model generates from the prompts in turn, or all images of a folder.

    prompts: also for images that have none of their own. shown: generation
        prompts, if they differ from the training prompts.
    """
    if folder is None:
        called, drawn = (
            [texts[i % len(texts)] if texts else None for i in range(num)] for texts in (prompts, shown or prompts)
        )
        return _drawn(model, plan, called, drawn, first_seed)
    entries = [entry for entry in list_images(folder, tell) for _ in range(entry[0].repeats)]
    own = [text or (prompts[i % len(prompts)] if prompts else None) for i, (_, text) in enumerate(entries)]

    def make(rows: range) -> dict[str, Tensor]:
        unique = list(dict.fromkeys(entries[i][0] for i in rows))  # repeats of an image lie side by side
        parts = model.encode_images(torch.stack([image.pixels(plan.size) for image in unique]))
        places = torch.tensor([unique.index(entries[i][0]) for i in rows])
        return _posterior((parts[0][places], parts[1][places]))

    identity = [[entry.digest() for entry, _ in entries], plan.size, f"reader {images.READER}", *_precision(model)]
    return Source(own, make, identity)


def _drawn(model: Family, plan: Plan, called: Sequence[Any], drawn: Sequence[Any], first_seed: int) -> Source:
    how: dict[str, Any] = {"guidance": plan.guidance, "size": plan.size}

    def asked(rows: range) -> tuple[list[Any], list[int]]:
        return [drawn[i] for i in rows], [first_seed + i for i in rows]

    def announce(rows: range) -> None:
        model.announce(*asked(rows), **how)

    def make(rows: range) -> dict[str, Tensor]:
        latents = model.draw(*asked(rows), steps=plan.steps, sampler=plan.sampler, **how)
        if not plan.round_trip:
            return _posterior((latents, torch.zeros_like(latents)))
        return _posterior(model.encode_images(to_pixels(model.decode(latents)).float() / 127.5 - 1))

    # names with an underscore are diffusers' notes, and one of them is a list in random order
    scheduler: Any = model.sampler(plan.sampler)
    sampler = {name: repr(value) for name, value in scheduler.config.items() if not name.startswith("_")}
    identity = [drawn, first_seed, plan.steps, plan.guidance, plan.size, plan.round_trip, type(scheduler).__name__]
    return Source(called, make, [*identity, sampler, *_precision(model)], announce)


def _precision(model: Family) -> list[str]:
    """For the identity of images that the model makes or encodes; float32 goes without saying."""
    return [] if model.precision == "fp32" else [model.precision]


def _followed(model: Family, plan: Plan, prompts: Sequence[str], first_seed: int) -> Source:
    """Points on trajectories from noise to images of the prompts, each after a random number of the plan's steps."""
    shape = model.latent_shape(plan.size)

    def make(rows: range) -> dict[str, Tensor]:
        draws = [torch.Generator().manual_seed(first_seed + i) for i in rows]
        noise = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
        index = torch.stack([torch.randint(plan.steps, (), generator=draw) for draw in draws])
        c = model.encode_text([prompts[i] for i in rows])
        x, t = model.trajectory(
            noise, index, c, model.unconditional(), steps=plan.steps, guidance=plan.trajectory_guidance
        )
        return {**_posterior((x.cpu(), torch.zeros_like(noise))), "t": t.cpu()}

    identity = ["trajectory", prompts, first_seed, plan.steps, plan.trajectory_guidance, plan.size, *_precision(model)]
    return Source(prompts, make, identity)


def _blank(model: Family, plan: Plan, prompts: Sequence[str]) -> Source:
    """Zero latents, for methods that use no images."""
    shape = model.latent_shape(plan.size)

    def make(rows: range) -> dict[str, Tensor]:
        return _posterior((torch.zeros(len(rows), *shape), torch.zeros(len(rows), *shape)))

    return Source(prompts, make, ["blank", prompts, shape[-1]])


def _uniform(model: Family, plan: Plan, prompts: Sequence[str], first_seed: int) -> Source:
    """Latents uniform in [-1, 1] under the names of the prompts."""
    shape = model.latent_shape(plan.size)

    def make(rows: range) -> dict[str, Tensor]:
        draws = [torch.Generator().manual_seed(first_seed + i) for i in rows]
        noise = torch.stack([2 * torch.rand(shape, generator=draw) - 1 for draw in draws])
        return _posterior((noise, torch.zeros_like(noise)))

    return Source(prompts, make, ["uniform", prompts, first_seed, shape])


def _posterior(parts: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("mean", "std"), parts, strict=True))
