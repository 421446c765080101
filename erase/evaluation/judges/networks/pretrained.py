"""Networks that others trained, as judges need them: whole, from one snapshot, and fed images that are images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

from erase.data.images import check
from erase.delta import content_hash
from erase.errors import EraseError
from erase.files import text_hash
from erase.progress import loading

_BATCH = 16


def batches(images: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The images in order, a few at a time, after a look at each.

    Raises:
        EraseError: one is not uint8, [h, w, 3]. Floats are never cast here: a cast makes [-1, 1] black.
    """
    for image in images:
        check(image)
    for start in range(0, len(images), _BATCH):
        yield list(images[start : start + _BATCH])


def locate(source: str | Path, revision: str | None = None) -> tuple[Path, dict[str, str]]:
    """The folder of a transformers model, and where it came from: {"model": hub id, "revision": commit} or "local".

    Raises:
        EraseError: there is no such folder, and the hub does not have it or cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, {"model": "local"}
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.txt"]
    skip = ["*/*", "*.fp16.*"]  # other formats live in folders
    try:
        folder = Path(
            snapshot_download(
                str(source), revision=revision, allow_patterns=[*kinds, "*.safetensors"], ignore_patterns=skip
            )
        )
        if not any(folder.glob("*.safetensors")):  # as openai/clip-vit-base-patch32; read with weights_only=True
            patterns = [*kinds, "pytorch_model*.bin"]
            folder = Path(snapshot_download(str(source), revision=folder.name, allow_patterns=patterns))
    except Exception as error:  # the hub client's errors share no class; each means that the model cannot be downloaded
        raise EraseError(
            f"{str(source)!r} is not a local folder and cannot be downloaded from the hub ({_one_line(error)}); "
            "check name and network, or give the folder of a local copy"
        ) from error
    return folder, {"model": str(source), "revision": folder.name}


def load(cls: Any, folder: Path) -> Any:
    """A transformers model in float32, frozen; `cls` has `from_pretrained`.

    Raises:
        EraseError: broken, incomplete (the library would fill in random weights), or another kind of model.
    """
    network, info = _from_pretrained(
        cls, folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    lacking = {name for name in info["missing_keys"] if not name.endswith("num_batches_tracked")}  # unused here
    lacking |= {item if isinstance(item, str) else item[0] for item in info["mismatched_keys"]}
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise EraseError(f"{folder} has no weights that fit {min(lacking)!r}{more}: no {type(network).__name__}?")
    return network.requires_grad_(False).eval()


def load_processor(cls: Any, folder: Path, **options: Any) -> Any:
    """The rule by which a model sees images, or reads text, from its folder.

    Raises:
        EraseError: missing or broken.
    """
    return _from_pretrained(cls, folder, **options)


def _from_pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    try:
        with loading():
            return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers, safetensors and torch raise a dozen kinds; all are the files' fault
        raise EraseError(f"cannot load {folder} with {cls.__name__}: {_one_line(error)}") from error


def rule(processor: Any) -> dict[str, Any]:
    """How an image processor prepares images, with its class: PIL and torchvision resize differently."""
    return {**processor.to_dict(), "image_processor_type": type(processor).__name__}


def pixels(processor: Any, images: Sequence[np.ndarray]) -> Tensor:
    """What a transformers image processor makes of uint8 images [h, w, 3] of any sizes: [n, 3, H, W].

    It gets PIL images, because it guesses where the channels of an array are.
    """
    return processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]


class Clip:
    """A CLIP model's two embeddings, as its projections make them: not yet of unit length.

    origin: where it came from, for the reader; identity: what changes its numbers.
    """

    def __init__(self, source: str | Path, device: str = "cpu", revision: str | None = None) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        folder, self.origin = locate(source, revision)
        self.device = device
        self.network = load(CLIPModel, folder).to(device)
        self.processor = load_processor(CLIPImageProcessorPil, folder)
        self.tokenizer = load_processor(CLIPTokenizer, folder)
        text = self.network.config.text_config
        if len(self.tokenizer) != text.vocab_size:  # without its files transformers makes a stub, and does not say so
            raise EraseError(
                f"the tokenizer in {folder} has {len(self.tokenizer)} tokens but its model {text.vocab_size}; "
                "its files are missing or broken, download the model again"
            )
        self.max_length = text.max_position_embeddings
        self.weights = content_hash(self.network.state_dict())
        self.preprocessing = rule(self.processor)

    @property
    def resize(self) -> str:
        """Size and filter as a word: 224-bicubic-pil."""
        return f"{self.network.config.vision_config.image_size}-{Resampling(self.processor.resample).name.lower()}-pil"

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "preprocessing": self.preprocessing,
            "vocabulary": text_hash(self.tokenizer.get_vocab()),
        }

    @torch.inference_mode()
    def see(self, images: Sequence[np.ndarray]) -> Tensor:
        """Embeddings of uint8 images [h, w, 3]: [n, d], on the CPU."""
        return self.network.get_image_features(pixels(self.processor, images).to(self.device)).pooler_output.cpu()

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, cut at the model's length: [n, d], on the CPU."""
        rows = []
        for start in range(0, len(texts), _BATCH):
            part = list(texts[start : start + _BATCH])
            tokens = self.tokenizer(
                part, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            rows.append(self.network.get_text_features(**tokens.to(self.device)).pooler_output.cpu())
        return torch.cat(rows)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
