"""What a run trains on: forget and retain pictures as cached latents, each with its prompt's text states."""

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from erase import files
from erase.concepts import Concept
from erase.delta import content_hash
from erase.errors import EraseError
from erase.models import Model, Sampler

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
SEEDS_PER_RUN = 1_000_000  # a run draws its forget pictures with the seeds from seed * this on
RETAIN_SEED = 500_000_000  # and its retain pictures from there plus this


@dataclass(frozen=True)
class Pictures:
    """Latents of n pictures as the VAE's posterior, and what each one was drawn from or is called.

    mean: [n, 4, h, w], scaled for the UNet. std: the same shape; zero where the model drew the latent itself.
    prompt: int64, [n], rows of `Data.text`.
    """

    mean: Tensor
    std: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Data:
    """All that the mask and the training see; the VAE and the text encoder are not needed any more.

    text: text states of `prompts`, [p, tokens, d]; row 0 is the empty prompt.
    anchor: int64, [len(forget)], what to say instead of each forget picture's prompt.
    others: int64, [k], rows of other classes' prompts for random labels.
    fingerprint: hash of all that determines these tensors.
    """

    forget: Pictures
    retain: Pictures
    anchor: Tensor
    others: Tensor
    prompts: tuple[str, ...]
    text: Tensor
    fingerprint: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How pictures are drawn or read.

    round_trip: send drawn latents through decoder, 8-bit pixels and encoder, as a folder of saved images would be;
        gives the posterior's spread, which the reference recipe samples.
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
) -> Data:
    """Draw or read the concept's forget and retain sets; what is in the cache already is taken from there.

    model_hash: content hash of the UNet; pictures of another model are never taken for its own.

    Raises:
        EraseError: no retain prompts, an empty image folder, an image that cannot be read.
    """
    if plan.size % max(8, model.vae_scale):
        raise EraseError(f"--resolution is {plan.size}; it must be a multiple of {max(8, model.vae_scale)}")
    workers = workers or Workers()
    pairs = concept.pairs()
    first_seed = plan.seed * SEEDS_PER_RUN
    first_retain_seed = first_seed + RETAIN_SEED
    # both sources are listed before anything is drawn, so that a wrong folder is an error at once
    forget_source = _source(
        model, plan, plan.forget_images, [prompt for prompt, _ in pairs], plan.num_forget, first_seed
    )
    retain_source = _source(model, plan, plan.retain_images, concept.retain, plan.num_retain, first_retain_seed)
    if None in retain_source.prompts:
        unnamed = f"; --retain-images {plan.retain_images} names no prompts either" if plan.retain_images else ""
        raise EraseError(f"concept {concept.name!r} has no retain prompts{unnamed}; give --retain PROMPT")
    hashes = [model_hash, *(content_hash(part.state_dict()) for part in (model.vae, model.text_encoder))]

    def read(source: _Source, label: str) -> tuple[Tensor, Tensor, str]:
        key = files.text_hash([hashes, plan.batch_size, source.identity])
        return *_cached(cache_dir / "latents" / key[:32], source, plan.batch_size, workers, label, quiet), key

    rows: dict[str, int] = {"": 0}

    def row(prompts: Iterable[str]) -> Tensor:
        return torch.tensor([rows.setdefault(prompt, len(rows)) for prompt in prompts], dtype=torch.int64)

    mean, std, forget_key = read(forget_source, "forget pictures")
    forget = Pictures(mean, std, row(forget_source.prompts))
    mean, std, retain_key = read(retain_source, "retain pictures")
    retain = Pictures(mean, std, row(retain_source.prompts))
    anchor = row(_anchors(forget_source.prompts, pairs))
    others = row(concept.others)
    record = {
        "num_forget": len(forget),
        "num_retain": len(retain),
        "first_seed": None if plan.forget_images else first_seed,
        "first_retain_seed": None if plan.retain_images else first_retain_seed,
        "forget_key": forget_key,
        "retain_key": retain_key,
    }
    fingerprint = files.text_hash([forget_key, retain_key, list(rows), anchor.tolist(), others.tolist()])
    text = model.encode_text(list(rows))
    return Data(forget, retain, anchor, others, tuple(rows), text, fingerprint, record)


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
    make: Callable[[range], tuple[Tensor, Tensor]]
    identity: Any


def _source(model: Model, plan: Plan, images: str | None, prompts: Sequence[str], num: int, first_seed: int) -> _Source:
    """`num` pictures that the model draws of the prompts in turn, or all pictures of a folder.

    prompts: also for images that have none of their own.
    """
    if images is None:
        return _drawn(model, plan, [prompts[i % len(prompts)] if prompts else None for i in range(num)], first_seed)
    entries = list_images(images)
    own = [text or (prompts[i % len(prompts)] if prompts else None) for i, (_, text) in enumerate(entries)]

    def make(rows: range) -> tuple[Tensor, Tensor]:
        return model.encode_images(torch.stack([entries[i][0].pixels(plan.size) for i in rows]))

    return _Source(own, make, [[entry.digest() for entry, _ in entries], plan.size])


def _drawn(model: Model, plan: Plan, prompts: Sequence[Any], first_seed: int) -> _Source:
    def make(rows: range) -> tuple[Tensor, Tensor]:
        seeds, texts = [first_seed + i for i in rows], [prompts[i] for i in rows]
        how: dict[str, Any] = {"steps": plan.steps, "guidance": plan.guidance, "sampler": plan.sampler}
        latents = model.draw(texts, seeds, size=plan.size, **how)
        if not plan.round_trip:
            return latents, torch.zeros_like(latents)
        return model.encode_images(to_pixels(model.decode(latents)).float() / 127.5 - 1)

    # names with an underscore are diffusers' notes, and one of them is a list in random order
    scheduler: Any = model.sampler(plan.sampler)
    sampler = {name: repr(value) for name, value in scheduler.config.items() if not name.startswith("_")}
    identity = [prompts, first_seed, plan.steps, plan.guidance, plan.size, plan.round_trip, type(scheduler).__name__]
    return _Source(prompts, make, [*identity, sampler])


def _cached(
    folder: Path, source: _Source, batch_size: int, workers: Workers, label: str, quiet: bool
) -> tuple[Tensor, Tensor]:
    """All rows of the source, each chunk kept in a file of its own, so that interrupted work goes on where it was."""
    num = len(source.prompts)
    chunks = [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]
    paths = [folder / f"{rows.start:06d}.safetensors" for rows in chunks]
    mine = [i for i in range(workers.rank, len(chunks), workers.count) if not paths[i].exists()]
    with tqdm(total=sum(len(chunks[i]) for i in mine), desc=label, disable=quiet or not mine, unit="img") as bar:
        for i in mine:
            mean, std = source.make(chunks[i])
            files.write_tensors(paths[i], {"mean": mean, "std": std})
            bar.update(len(chunks[i]))
    workers.wait()
    tensors = [files.read_tensors(path) for path in paths]
    return torch.cat([t["mean"] for t in tensors]), torch.cat([t["std"] for t in tensors])


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One image, by file or by the bytes of a data set's row, with a name for messages."""

    name: str
    path: Path | None = None
    content: bytes = b""

    def _bytes(self) -> bytes:
        return self.path.read_bytes() if self.path else self.content

    def digest(self) -> str:
        return hashlib.sha256(self._bytes()).hexdigest()

    def pixels(self, size: int) -> Tensor:
        """[3, size, size] in [-1, 1]: shorter side resized (bicubic), centre cut out.

        Raises:
            EraseError: the image cannot be read.
        """
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(self._bytes()))).convert("RGB")
        except Exception as error:  # Pillow's decoders raise a dozen kinds; all are the file's fault
            raise EraseError(f"cannot read the image {self.name} ({error}); mend or remove it") from error
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def list_images(source: str) -> list[tuple[Picture, str | None]]:
    """The images of a folder, or of a data set on the hub, with their prompts where they are told.

    A prompt comes from `metadata.csv` (columns file_name, text), else from the class folder that holds the image
    ("an image of a church"), else it is None and the caller says which prompt to use.

    Raises:
        EraseError: no such folder, no image in it, metadata that names a missing file.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return _from_datasets(source)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise EraseError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    texts = _captions(folder / "metadata.csv") if (folder / "metadata.csv").is_file() else {}
    for path in paths:
        if path not in texts and path.parent != folder:
            label = path.parent.name.replace("_", " ")
            texts[path] = f"an image of {'an' if label[:1].lower() in 'aeiou' else 'a'} {label}"
    return [(Picture(str(path), path), texts.get(path)) for path in paths]


def _captions(path: Path) -> dict[Path, str]:
    """Prompt of each image in a metadata.csv."""
    texts: dict[Path, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EraseError(f"{path} cannot be read as CSV ({error}); save it again, in UTF-8") from error
    for number, line in enumerate(lines, start=2):
        name, text = line.get("file_name"), line.get("text")
        if name is None or text is None:
            raise EraseError(
                f"{path}, line {number}: the columns file_name and text are needed, as in 'a.png,a church'"
            )
        if not (path.parent / name).is_file():
            raise EraseError(f"{path}, line {number}: there is no image {name!r}; mend the line or remove it")
        texts[path.parent / name] = text
    return texts


def _from_datasets(name: str) -> list[tuple[Picture, str | None]]:
    try:
        from datasets import Image as Column  # pyright: ignore[reportMissingImports]
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EraseError(
            f"{name}: no such folder; to read a data set from the hub, pip install 'erase-concept[datasets]'"
        ) from error
    try:
        rows: Iterable[Any] = load_dataset(name, split="train").cast_column("image", Column(decode=False))
    except Exception as error:  # the hub client's and datasets' errors share no class
        raise EraseError(
            f"{name}: no such folder, and not a data set with a column 'image' ({' '.join(str(error).split())[:300]})"
        ) from error
    pictures = []
    for number, line in enumerate(rows):
        text = line.get("text") if isinstance(line.get("text"), str) else None
        image = line["image"]
        path = None if image.get("bytes") else Path(image["path"])
        pictures.append((Picture(f"{name}[{number}]", path, image.get("bytes") or b""), text))
    if not pictures:
        raise EraseError(f"the data set {name} is empty")
    return pictures


def to_pixels(pictures: Tensor) -> Tensor:
    """[-1, 1] to uint8, 0 to 255, rounded as diffusers rounds."""
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
