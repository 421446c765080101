"""What a run trains on: forget and retain pictures as cached latents, each with its prompt's text states."""

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase import captions, files, images, prompt_files, refusal
from erase.concepts import Concept
from erase.delta import content_hash
from erase.errors import EraseError, missing
from erase.methods.inputs import Text
from erase.models import Model, Sampler
from erase.progress import progress

SEEDS_PER_RUN = 1_000_000  # a run draws its forget pictures with the seeds from seed * this on
RETAIN_SEED = 500_000_000  # and its retain pictures from there plus this


@dataclass(frozen=True)
class Pictures:
    """Latents of n pictures as the VAE's posterior, and what each one was drawn from or is called.

    mean: [n, 4, h, w], scaled for the UNet. std: the same shape; zero where the model drew the latent itself.
    prompt: int64, [n], rows of `Data.text`.
    t: int64, [n], where `mean` is not a picture but a point on the way from noise to one: the timestep there.
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

    text: text states of `prompts`, [p, tokens, d]; row 0 is the empty prompt.
    anchor: int64, [len(forget)], what to say instead of each forget picture's prompt.
    others: int64, [k], rows of other classes' prompts for random labels.
    words: bool, [len(forget), tokens], where the forget prompt's own words stand: those that its anchor lacks.
    end: bool, [len(forget), tokens], where the forget prompt is over.
    fingerprint: hash of all that determines these tensors.
    """

    forget: Pictures
    retain: Pictures
    anchor: Tensor
    others: Tensor
    words: Tensor
    end: Tensor
    prompts: tuple[str, ...]
    text: Tensor
    fingerprint: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How pictures are drawn or read.

    round_trip: send drawn latents through decoder, 8-bit pixels and encoder, as a folder of saved images would be;
        gives the posterior's spread, which the reference recipe samples.
    pictures: what the forget set holds: pictures of the "concept", pictures of its "anchor" under the forget prompt's
        name, points of the "trajectory" from noise to the concept, a random one of each picture's, or names alone,
        where the method begins from "noise".
    retains: False where nothing is kept by pictures; the retain set is then one empty picture.
    way_guidance: of the trajectories; 3 in ESD.
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
    pictures: str = "concept"
    retains: bool = True
    way_guidance: float = 3.0
    forget_images: str | None = None
    retain_images: str | None = None


@dataclass(frozen=True)
class Workers:
    """This process among several: it draws every `count`-th chunk, and all wait for one another."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


def gather(
    model: Model,
    concept: Concept,
    plan: Plan,
    *,
    model_hash: str,
    cache_dir: Path,
    workers: Workers | None = None,
    quiet: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Data:
    """Draw or read the concept's forget and retain sets; what is in the cache already is taken from there.

    model_hash: content hash of the UNet; pictures of another model are never taken for its own.
    tell: hears where captions come from, and of damaged files in the cache, which are made again.

    Raises:
        EraseError: no retain prompts, an empty image folder, an image that cannot be read.
    """
    if plan.size % max(8, model.vae_scale):
        raise EraseError(f"--resolution is {plan.size}; it must be a multiple of {max(8, model.vae_scale)}")
    workers = workers or Workers()
    if plan.forget_images and plan.pictures in {"trajectory", "noise"}:
        raise EraseError("this method follows the model's own drawing and sees no pictures; leave out --forget-images")
    if plan.retain_images and not plan.retains:
        raise EraseError("this method has no retain term; leave out --retain-images")
    pairs = concept.pairs()
    first_seed = plan.seed * SEEDS_PER_RUN
    first_retain_seed = first_seed + RETAIN_SEED
    # both sources are listed before anything is drawn, so that a wrong folder is an error at once
    names = [forget for forget, _ in pairs]
    shown = [anchor for _, anchor in pairs] if plan.pictures == "anchor" else names
    forget_source = _source(model, plan, plan.forget_images, names, plan.num_forget, first_seed, shown=shown, tell=tell)
    retain_source = _source(
        model, plan, plan.retain_images, concept.retain, plan.num_retain, first_retain_seed, tell=tell
    )
    _refuse_captions(plan, concept, forget_source.prompts, retain_source.prompts)
    given = (
        *(forget_source.prompts if plan.forget_images else ()),
        *(retain_source.prompts if plan.retain_images else ()),
    )
    cut = [caption for caption in dict.fromkeys(given) if caption and model.truncates(caption)]
    if cut:
        tell(f"captions longer than the text encoder reads, and cut: {len(cut)}, the first {cut[0][:60] + '...'!r}")
    if plan.pictures == "trajectory":
        forget_source = _followed(model, plan, forget_source.prompts, first_seed)
    elif plan.pictures == "noise":
        forget_source = _blank(model, plan, forget_source.prompts)
    if not plan.retains:
        retain_source = _blank(model, plan, [""])
    if None in retain_source.prompts:
        unnamed = f"; --retain-images {plan.retain_images} names no prompts either" if plan.retain_images else ""
        raise EraseError(f"concept {concept.name!r} has no retain prompts{unnamed}; give --retain PROMPT")
    hashes = [model_hash, *(content_hash(part.state_dict()) for part in (model.vae, model.text_encoder))]

    def read(source: _Source, label: str) -> tuple[Pictures, str]:
        key = files.text_hash([hashes, plan.batch_size, source.identity])
        folder = cache_dir / "latents" / key[:32]
        return Pictures(
            **_cached(folder, source, plan.batch_size, workers, label, quiet, tell), prompt=row(source.prompts)
        ), key

    rows: dict[str, int] = {"": 0}

    def row(prompts: Iterable[str]) -> Tensor:
        return torch.tensor([rows.setdefault(prompt, len(rows)) for prompt in prompts], dtype=torch.int64)

    if plan.retain_images and not plan.forget_images:
        row(forget_source.prompts)  # numbers them first, as below
        read(retain_source, "retain images")  # now in the cache: a bad image is an error before any is generated
    forget, forget_key = read(forget_source, "forget images")
    retain, retain_key = read(retain_source, "retain images")
    anchors = _anchors(forget_source.prompts, pairs)
    anchor = row(anchors)
    others = row(concept.others)
    record = {
        "num_forget": len(forget),
        "num_retain": len(retain),
        "first_seed": None if plan.forget_images else first_seed,
        "first_retain_seed": None if plan.retain_images else first_retain_seed,
        "forget_key": forget_key,
        "retain_key": retain_key,
        "truncated_captions": cut,
    }
    fingerprint = files.text_hash([forget_key, retain_key, list(rows), anchor.tolist(), others.tolist()])
    text = model.encode_text(list(rows))
    words, end = (torch.zeros(len(forget), text.shape[1], dtype=torch.bool) for _ in range(2))
    for number, (prompt, instead) in enumerate(zip(forget_source.prompts, anchors, strict=True)):
        own, _ = distinguishing(model.tokens(prompt), model.tokens(instead))
        words[number, own] = True
        end[number, len(model.tokens(prompt)) + 1 :] = True
    return Data(forget, retain, anchor, others, words, end, tuple(rows), text, fingerprint, record)


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


def truncated(model: Model, concept: Concept) -> list[str]:
    """The concept's prompts that are longer than the text encoder reads, in order and once each.

    Raises:
        EraseError: what tells a forget prompt from its anchor, or the concept's name in it, is cut off.
    """
    names = [model.all_tokens(word) for word in (concept.name, *concept.synonyms)]
    limit = model.tokenizer.model_max_length - 2
    for forget, anchor in concept.pairs():
        whole, read = model.all_tokens(forget), model.tokens(forget)
        same = read == model.tokens(anchor) and forget != anchor
        if len(whole) > limit and (same or any(_holds(whole, name) and not _holds(read, name) for name in names)):
            raise EraseError(
                f"the forget prompt {forget[:60] + '...'!r} has {len(whole)} tokens; the text encoder reads {limit}, "
                "and the concept is behind them; write it shorter, the concept first"
            )
    prompts = dict.fromkeys((*concept.forget, *concept.anchor, *concept.retain, *concept.others))
    return [prompt for prompt in prompts if model.truncates(prompt)]


def _holds(tokens: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(tokens[i : i + len(part)]) == list(part) for i in range(len(tokens) - len(part) + 1))


def of_prompts(data: Data, prompts: Sequence[str]) -> Data:
    """The data with only those forget pictures that have one of these prompts."""
    wanted = {row for row, prompt in enumerate(data.prompts) if prompt in set(prompts)}
    rows = torch.tensor([i for i, row in enumerate(data.forget.prompt.tolist()) if row in wanted], dtype=torch.int64)
    if not len(rows):
        raise EraseError(f"--num-forget {len(data.forget)} leaves no picture for {prompts[0]!r}; draw more")
    f = data.forget
    part = Pictures(f.mean[rows], f.std[rows], f.prompt[rows], None if f.t is None else f.t[rows])
    fingerprint = files.text_hash([data.fingerprint, rows.tolist()])
    places = {name: getattr(data, name)[rows] for name in ("anchor", "words", "end")}
    return replace(data, forget=part, fingerprint=fingerprint, **places)


def distinguishing(a: Sequence[int], b: Sequence[int]) -> tuple[list[int], list[int]]:
    """Places of the tokens that a has and b lacks, and the other way round; all of one that has nothing of its own.

    The start token has place 0, so that the first of `a` has 1.
    """
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    shared_a = {block.a + i for block in blocks for i in range(block.size)}
    shared_b = {block.b + i for block in blocks for i in range(block.size)}
    own_a = [i + 1 for i in range(len(a)) if i not in shared_a] or list(range(1, len(a) + 1))
    own_b = [i + 1 for i in range(len(b)) if i not in shared_b] or list(range(1, len(b) + 1))
    return own_a, own_b


def read_text(model: Model, concept: Concept) -> Text:
    """The concept as closed forms see it; needs no picture.

    An empty anchor stands at its start token, the only place that is the same in every prompt.
    """
    pairs = concept.pairs()
    ends = [distinguishing(model.tokens(forget), model.tokens(anchor)) for forget, anchor in pairs]
    return Text(
        forget=model.encode_text([forget for forget, _ in pairs]),
        anchor=model.encode_text([anchor for _, anchor in pairs]),
        retain=model.encode_text(concept.retain) if concept.retain else model.encode_text([""])[:0],
        empty=model.encode_text([""]),
        forget_at=torch.tensor([max(own, default=0) for own, _ in ends]),
        anchor_at=torch.tensor([max(own, default=0) for _, own in ends]),
        retain_at=torch.tensor([len(model.tokens(prompt)) for prompt in concept.retain], dtype=torch.int64),
    )


def _anchors(prompts: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What to say instead of each prompt; instead of one that the concept does not know, its first anchor."""
    known = dict(reversed(pairs))
    anchors = []
    for number, prompt in enumerate(prompts):
        own, anchor = pairs[number % len(pairs)]  # one prompt may have several anchors, in turn
        anchors.append(anchor if prompt == own else known.get(prompt, pairs[0][1]))
    return anchors


@dataclass(frozen=True)
class _Source:
    """Where pictures come from: one prompt each, what makes the rows of a range, and all that this depends on."""

    prompts: Sequence[Any]  # texts; None where neither the images nor the concept name one
    make: Callable[[range], dict[str, Tensor]]
    identity: Any


def _source(
    model: Model,
    plan: Plan,
    folder: str | None,
    prompts: Sequence[str],
    num: int,
    first_seed: int,
    *,
    shown: Sequence[str] | None = None,
    tell: Callable[[str], None],
) -> _Source:
    """`num` pictures that the model draws of the prompts in turn, or all pictures of a folder.

    prompts: also for images that have none of their own. shown: what is drawn, where that is not what it is called.
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
    return _Source(own, make, identity)


def _drawn(model: Model, plan: Plan, called: Sequence[Any], drawn: Sequence[Any], first_seed: int) -> _Source:
    def make(rows: range) -> dict[str, Tensor]:
        seeds, texts = [first_seed + i for i in rows], [drawn[i] for i in rows]
        how: dict[str, Any] = {"steps": plan.steps, "guidance": plan.guidance, "sampler": plan.sampler}
        latents = model.draw(texts, seeds, size=plan.size, **how)
        if not plan.round_trip:
            return _posterior((latents, torch.zeros_like(latents)))
        return _posterior(model.encode_images(to_pixels(model.decode(latents)).float() / 127.5 - 1))

    # names with an underscore are diffusers' notes, and one of them is a list in random order
    scheduler: Any = model.sampler(plan.sampler)
    sampler = {name: repr(value) for name, value in scheduler.config.items() if not name.startswith("_")}
    identity = [drawn, first_seed, plan.steps, plan.guidance, plan.size, plan.round_trip, type(scheduler).__name__]
    return _Source(called, make, [*identity, sampler, *_precision(model)])


def _precision(model: Model) -> list[str]:
    """For the identity of images that the model makes or encodes; float32 goes without saying."""
    return [] if model.precision == "fp32" else [model.precision]


def _followed(model: Model, plan: Plan, prompts: Sequence[str], first_seed: int) -> _Source:
    """Points on the ways from noise to pictures of the prompts, each after a random number of the plan's steps."""
    side = plan.size // model.vae_scale

    def make(rows: range) -> dict[str, Tensor]:
        draws = [torch.Generator().manual_seed(first_seed + i) for i in rows]
        noise = torch.stack([torch.randn(4, side, side, generator=draw) for draw in draws])
        index = torch.stack([torch.randint(plan.steps, (), generator=draw) for draw in draws])
        text, empty = model.encode_text([prompts[i] for i in rows]), model.encode_text([""])
        x, t = model.trajectory(noise, index, text, empty, steps=plan.steps, guidance=plan.way_guidance)
        return {**_posterior((x.cpu(), torch.zeros_like(noise))), "t": t.cpu()}

    identity = ["trajectory", prompts, first_seed, plan.steps, plan.way_guidance, plan.size, *_precision(model)]
    return _Source(prompts, make, identity)


def _blank(model: Model, plan: Plan, prompts: Sequence[str]) -> _Source:
    """Names of pictures that nobody looks at."""
    side = plan.size // model.vae_scale

    def make(rows: range) -> dict[str, Tensor]:
        return _posterior((torch.zeros(len(rows), 4, side, side), torch.zeros(len(rows), 4, side, side)))

    return _Source(prompts, make, ["blank", prompts, side])


def _posterior(parts: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("mean", "std"), parts, strict=True))


def _cached(
    folder: Path,
    source: _Source,
    batch_size: int,
    workers: Workers,
    label: str,
    quiet: bool,
    tell: Callable[[str], None],
) -> dict[str, Tensor]:
    """All rows of the source, each chunk kept in a file of its own, so that interrupted work goes on where it was.

    tell: hears of a damaged file, which is made again.
    """
    num = len(source.prompts)
    chunks = [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]
    paths = [folder / f"{rows.start:06d}.safetensors" for rows in chunks]

    def header(rows: range) -> dict[str, Any]:
        return {"kind": "latents", "key": folder.name, "rows": [rows.start, rows.stop]}

    found: dict[int, dict[str, Tensor]] = {}

    def read(i: int) -> None:
        """Into memory: other programs may write to the cache while this one works."""
        try:
            found[i], _ = files.read_own(paths[i], copied=True, **header(chunks[i]))
        except EraseError as error:
            if not paths[i].exists():
                raise
            tell(f"{str(error).partition('; copy')[0]}; these {label} are generated again")

    def make(i: int) -> None:
        found[i] = {name: tensor.cpu() for name, tensor in source.make(chunks[i]).items()}
        files.write_tensors(paths[i], found[i], header(chunks[i]))

    mine = range(workers.rank, len(chunks), workers.count)
    for i in (i for i in mine if paths[i].exists()):
        read(i)
    missing = [i for i in mine if i not in found]
    with progress(sum(len(chunks[i]) for i in missing), label, "images", quiet=quiet) as bar:
        for i in missing:
            make(i)
            bar.update(len(chunks[i]))
    workers.wait()
    for i in (i for i in range(len(chunks)) if i not in found):  # those of other processes
        read(i)
        if i not in found:
            make(i)
    tensors = [found[i] for i in range(len(chunks))]
    return {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One image, by file or by the bytes of a data set's row, with a name for messages.

    repeats: how many times it counts.
    """

    name: str
    path: Path | None = None
    content: bytes = b""
    repeats: int = 1

    def digest(self) -> str:
        with self._readable():
            return hashlib.sha256(images.content(self.path) if self.path else self.content).hexdigest()

    def pixels(self, size: int) -> Tensor:
        """[3, size, size] in [-1, 1]: shorter side resized (bicubic), centre cut out.

        Raises:
            EraseError: the image cannot be read.
        """
        with self._readable():
            pixels = images.read(self.path or self.content)
        return torch.from_numpy(images.square(pixels, size)).float().permute(2, 0, 1) / 127.5 - 1

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except images.BadImage as error:
            raise EraseError(f"cannot read the image {self.name} ({error.reason}); mend or remove it") from error


def list_images(source: str, tell: Callable[[str], None] = lambda line: None) -> list[tuple[Picture, str | None]]:
    """The images of a folder, or of a data set on the hub, with their captions (captions.py) where they have one.

    tell: hears where the captions come from.

    Raises:
        EraseError: no such folder, no image in it, captions that fit no image.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return _from_datasets(source)
    found, summary = captions.read(folder)
    tell(summary)
    return [(Picture(str(one.path), one.path, repeats=one.repeats), one.text) for one in found]


def _from_datasets(name: str) -> list[tuple[Picture, str | None]]:
    try:
        from datasets import Image as Column
        from datasets import load_dataset
    except ImportError as error:
        raise missing("datasets", f"{name}: no such folder, and a data set of the hub is read with datasets") from error
    try:
        rows: Any = load_dataset(name, split="train").cast_column("image", Column(decode=False))
    except Exception as error:  # the hub client's and datasets' errors share no class
        raise EraseError(
            f"{name}: no such folder, and not a data set with a column 'image' ({' '.join(str(error).split())[:300]})"
        ) from error
    pictures = []
    for number, line in enumerate(rows):
        given = (line.get(name) for name in prompt_files.COLUMNS["prompt"])
        text = next((value for value in given if isinstance(value, str) and value.strip()), None)
        image = line["image"] or {}  # an empty row
        path = Path(image["path"]) if image.get("path") and not image.get("bytes") else None
        pictures.append((Picture(f"{name}[{number}]", path, image.get("bytes") or b""), text))
    if not pictures:
        raise EraseError(f"the data set {name} is empty")
    return pictures


def to_pixels(pictures: Tensor) -> Tensor:
    """[-1, 1] to uint8, 0 to 255, rounded as diffusers rounds."""
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
