"""What a run trains on: forget and retain pictures as cached latents, each with its prompt's text states."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from erase import files
from erase.concepts import Concept
from erase.errors import EraseError
from erase.models import Model

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
RETAIN_SEED = (
    500_000_000  # forget pictures take the seeds from seed * 1_000_000 on, retain pictures from there plus this
)


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

    model_hash: content hash of the model's weights; pictures of another model are never taken for its own.

    Raises:
        EraseError: no retain prompts, an empty image folder, an image that cannot be read.
    """
    if not concept.retain and plan.retain_images is None:
        raise EraseError(f"concept {concept.name!r} has no retain prompts; give --retain or --retain-images")
    forget_pairs = concept.pairs()
    workers = workers or Workers()
    prompts: dict[str, int] = {"": 0}

    def row(prompt: str) -> int:
        return prompts.setdefault(prompt, len(prompts))

    def pictures(kind: str, source: str | None, texts: Sequence[str], num: int) -> tuple[Pictures, list[str], str]:
        if source is None:
            chosen = [texts[i % len(texts)] for i in range(num)]
            first = plan.seed * 1_000_000 + (RETAIN_SEED if kind == "retain" else 0)
            identity: Any = [chosen, first, plan.steps, plan.guidance, plan.size, plan.round_trip, plan.batch_size]
            identity += [dict(model.scheduler.config), type(model.scheduler).__name__]  # pyright: ignore

            def make(rows: range) -> tuple[Tensor, Tensor]:
                seeds = [first + i for i in rows]
                drawn = [chosen[i] for i in rows]
                latents = model.draw(drawn, seeds, steps=plan.steps, guidance=plan.guidance, size=plan.size)
                if not plan.round_trip:
                    return latents, torch.zeros_like(latents)
                return model.encode_images(to_pixels(model.decode(latents)).float() / 127.5 - 1)
        else:
            entries = list_images(source)
            chosen = [text if text is not None else texts[i % len(texts)] for i, (_, text) in enumerate(entries)]
            identity = [[entry.digest() for entry, _ in entries], plan.size]

            def make(rows: range) -> tuple[Tensor, Tensor]:
                return model.encode_images(torch.stack([entries[i][0].pixels(plan.size) for i in rows]))

        key = files.text_hash([model_hash, kind if source is None else "images", repr(identity)])
        label = f"{kind} pictures"
        mean, std = _cached(cache_dir / "latents" / key[:32], len(chosen), plan.batch_size, make, workers, label, quiet)
        return Pictures(mean, std, torch.tensor([row(text) for text in chosen])), chosen, key

    forget_texts = [forget for forget, _ in forget_pairs]
    forget, forget_used, forget_key = pictures("forget", plan.forget_images, forget_texts, plan.num_forget)
    retain, _, retain_key = pictures("retain", plan.retain_images, concept.retain, plan.num_retain)
    anchors = dict(reversed(forget_pairs))
    fallback = forget_pairs[0][1]
    anchor = torch.tensor([row(anchors.get(text, fallback)) for text in forget_used])
    others = torch.tensor([row(text) for text in concept.others], dtype=torch.int64)
    record = {
        "num_forget": len(forget),
        "num_retain": len(retain),
        "first_seed": None if plan.forget_images else plan.seed * 1_000_000,
        "first_retain_seed": None if plan.retain_images else plan.seed * 1_000_000 + RETAIN_SEED,
        "forget_key": forget_key,
        "retain_key": retain_key,
    }
    fingerprint = files.text_hash([forget_key, retain_key, list(prompts), anchor.tolist(), others.tolist()])
    text = model.encode_text(list(prompts))
    return Data(forget, retain, anchor, others, tuple(prompts), text, fingerprint, record)


def _cached(
    folder: Path,
    num: int,
    batch_size: int,
    make: Callable[[range], tuple[Tensor, Tensor]],
    workers: Workers,
    label: str,
    quiet: bool,
) -> tuple[Tensor, Tensor]:
    """`make` for every chunk of rows, each kept in a file of its own, so that interrupted work goes on where it was."""
    chunks = [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]
    paths = [folder / f"{rows.start:06d}.safetensors" for rows in chunks]
    mine = [i for i in range(workers.rank, len(chunks), workers.count) if not paths[i].exists()]
    with tqdm(total=sum(len(chunks[i]) for i in mine), desc=label, disable=quiet or not mine, unit="img") as bar:
        for i in mine:
            mean, std = make(chunks[i])
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
        import hashlib

        return hashlib.sha256(self._bytes()).hexdigest()

    def pixels(self, size: int) -> Tensor:
        """[3, size, size] in [-1, 1]: shorter side resized (bicubic), centre cut out.

        Raises:
            EraseError: the image cannot be read.
        """
        try:
            image = Image.open(io.BytesIO(self._bytes())).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise EraseError(f"cannot read the image {self.name}: {error}; mend or remove it") from error
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
    texts: dict[Path, str] = {}
    if (folder / "metadata.csv").is_file():
        with open(folder / "metadata.csv", newline="", encoding="utf-8-sig") as file:
            for line in csv.DictReader(file):
                path = folder / (line.get("file_name") or "")
                if "text" not in line or not path.is_file():
                    raise EraseError(f"{folder}/metadata.csv: no image {line.get('file_name')!r}, or no column 'text'")
                texts[path] = line["text"]
    for path in paths:
        if path not in texts and path.parent != folder:
            label = path.parent.name.replace("_", " ")
            texts[path] = f"an image of {'an' if label[:1].lower() in 'aeiou' else 'a'} {label}"
    return [(Picture(str(path), path), texts.get(path)) for path in paths]


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
        raise EraseError(f"{name}: no such folder, and not a data set with a column 'image': {error}") from error
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
