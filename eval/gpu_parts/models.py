"""Models of published architectures with random weights, and random images."""

import json
import shutil
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import Any

from gpu_parts.job import Job

VOCABULARY = 49_408  # tokens of CLIP ViT-L/14
COUNTS = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}  # weights of SD v1.4
PNDM = {  # SD v1.4's scheduler
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def make_tokenizer() -> Any:
    """A CLIP tokenizer of the real one's size: its byte alphabet, and pairs of letters in place of its merges."""
    from transformers import CLIPTokenizer

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the byte alphabet of GPT-2 and CLIP
    letters = [chr(n) for n in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    words, ends = [*letters, *(f"{letter}</w>" for letter in letters)], ["<|startoftext|>", "<|endoftext|>"]
    pairs = list(islice(product(letters, letters), VOCABULARY - len(words) - len(ends)))
    words += [*(a + b for a, b in pairs), *ends]
    vocabulary: Any = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)  # pyright: ignore[reportArgumentType]


def build_model(folder: Path, device: str, toy: bool = False) -> dict[str, int]:
    """Write SD v1.4's architecture with random weights as a diffusers folder; weights of each part. 4.3 GB.

    device: where the weights are made; a GPU takes a second, a CPU a minute. toy: the same parts, much narrower.
    """
    import torch
    from bench.jobs import SD14_UNET
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel, __version__
    from transformers import CLIPTextConfig, CLIPTextModel

    vae_channels: Any
    width, layers = (16, 1) if toy else (768, 12)
    vae_channels, groups = ((8, 8, 8, 8), 8) if toy else ((128, 256, 512, 512), 32)
    unet = dict(SD14_UNET)
    if toy:
        unet |= {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 8, "sample_size": 8}
        unet |= {"cross_attention_dim": width, "layers_per_block": 1}
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    words = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2 if toy else 12,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    torch.manual_seed(0)
    makers: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**unet),
        "vae": lambda: AutoencoderKL(
            **blocks,
            block_out_channels=vae_channels,
            layers_per_block=2,
            norm_num_groups=groups,
            sample_size=8 * unet["sample_size"],
        ),
        "text_encoder": lambda: CLIPTextModel(words),
    }
    counts = {}
    for name, make in makers.items():
        with torch.device(device):
            part = make()
        counts[name] = sum(weights.numel() for weights in part.parameters())
        part.save_pretrained(folder / name)
        del part
    if not toy and counts != COUNTS:
        raise RuntimeError(f"this is not SD v1.4: {counts}, where {COUNTS} is right")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    PNDMScheduler(**PNDM).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": __version__}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return counts


def model_folder(job: Job) -> Path:
    """The folder in `work`; made the first time."""
    folder = job.work / ("toy-sd" if job.toy else "sd-v1-4-random")
    if not (folder / "model_index.json").is_file():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        build_model(folder, job.device, job.toy)
    return folder


def xl_folder(job: Job) -> Path:
    """The same of Stable Diffusion XL, 7 GB."""
    import sdxl_step

    folder = job.work / ("toy-sdxl" if job.toy else "sdxl-random")
    if not (folder / "model_index.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        sdxl_step.build(folder, job.toy, job.device)
    return folder


def random_cifar(folder: Path, num_train: int, num_test: int) -> Path:
    """CIFAR-10's binary version with random images: a label byte and 3,072 pixels each."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for name, num in (("data_batch_1.bin", num_train), ("test_batch.bin", num_test)):
        rows = draw.integers(0, 256, (num, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(num) % 10
        (folder / name).write_bytes(rows.tobytes())
    return folder
