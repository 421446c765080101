"""What all tests share: no network, no cache but a temporary one, one thread, and two random pipelines."""

import gc
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import toy_ddpm
import toy_sd3
from accelerate.state import AcceleratorState, PartialState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ConvNextImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
)

from erase import tensor_files

torch.set_num_threads(1)  # two on a busy machine wait for each other, and another count gives other roundings


@pytest.fixture(scope="module", autouse=True)
def few_objects_for_the_garbage_collector() -> Iterator[None]:
    """A run collects garbage before it writes; over all objects of the imported libraries that takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ERASE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def accelerate_state() -> Iterator[None]:
    """What accelerate remembers of a test's device and precision ends with the test."""
    with mock.patch.dict(PartialState._shared_state), mock.patch.dict(AcceleratorState._shared_state):
        yield


@pytest.fixture
def mutants() -> Callable[[bytes, int], Iterator[bytes]]:
    """Copies of some content with one to four changes each, of one bit or of a few bytes in a row; always the same."""

    def mutants(content: bytes, num: int) -> Iterator[bytes]:
        rng = np.random.default_rng(0)
        for _ in range(num):
            changed = bytearray(content)
            for _ in range(rng.integers(1, 5)):
                at, length = int(rng.integers(len(changed))), int(rng.integers(1, 9))
                part = changed[at : at + length]
                if rng.integers(4) == 0:
                    part, length = part[:1], 1
                    part[0] ^= 1 << int(rng.integers(8))
                changed[at : at + length] = (part, rng.bytes(len(part)), b"", part * 2)[rng.integers(4)]
            yield bytes(changed)

    return mutants


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory) -> Path:
    """A random Stable Diffusion 1 with the real one's 686 UNet tensors, each a few numbers wide, as diffusers saves it.

    Read it only. Its text encoder has the flat layout of transformers 5.
    """
    folder = tmp_path_factory.mktemp("tiny") / "base"
    make_pipeline(
        unet=dict(block_out_channels=(4, 8, 16, 16), norm_num_groups=4, sample_size=8, cross_attention_dim=16),
        vae_channels=(4, 4, 8, 8),
        text_layers=2,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_pipeline_dir(tmp_path_factory) -> Path:
    """The smallest random Stable Diffusion: 8 x 8 pixels, 4 x 4 latents; it draws and trains in milliseconds.

    Read it only.
    """
    folder = tmp_path_factory.mktemp("toy") / "base"
    make_pipeline(
        unet=dict(
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=2,
            sample_size=4,
            cross_attention_dim=8,
        ),
        vae_channels=(4, 4),
        text_layers=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_sdxl_dir(tmp_path_factory) -> Path:
    """The smallest random Stable Diffusion XL: 8 x 8 pixels, text states of width 8 + 12. Read it only."""
    folder = tmp_path_factory.mktemp("toy-sdxl") / "base"
    make_sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_sd3_dir(tmp_path_factory) -> Path:
    """The smallest random Stable Diffusion 3: 8 x 8 pixels, text states of width 24. Read it only."""
    folder = tmp_path_factory.mktemp("toy-sd3") / "base"
    toy_sd3.make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_ddpm_dir(tmp_path_factory) -> Path:
    """The smallest random class-conditional pixel model: cat, dog and tree, 8 x 8 pixels. Read it only."""
    return toy_ddpm.write(tmp_path_factory.mktemp("toy-ddpm") / "base")


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory, tiny_pipeline_dir) -> Path:
    """A random CLIP of 8-pixel patches, with the tiny pipeline's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline_dir / "tokenizer")
    ends = dict(bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=len(tokenizer) - 1)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config=dict(vocab_size=len(tokenizer), **size, **ends),
            vision_config=dict(image_size=32, patch_size=8, **size),
            projection_dim=8,
        )
    ).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def erased_dir(tmp_path_factory, toy_pipeline_dir) -> Path:
    """The toy pipeline with other UNet weights."""
    folder = tmp_path_factory.mktemp("erased") / "erased"
    shutil.copytree(toy_pipeline_dir, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = tensor_files.read_tensors(path)
    noise = torch.Generator().manual_seed(1)
    tensor_files.write_tensors(path, {n: t + 0.2 * torch.randn(t.shape, generator=noise) for n, t in tensors.items()})
    return folder


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory) -> Path:
    """A random ResNet with ImageNet's 1,000 labels."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    shape: Any = dict(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=1000)
    network = ResNetForImageClassification(ResNetConfig(**shape))
    torch.nn.init.normal_(network.classifier[1].weight, std=5.0)  # pyright: ignore
    network.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 16}).save_pretrained(folder)
    return folder


def make_sdxl_pipeline(text_layers: int = 2) -> StableDiffusionXLPipeline:
    """A random pipeline with two text encoders; the second pads with "!", as the real one does."""

    def text(width: int, activation: str) -> CLIPTextConfig:
        sizes: Any = dict(hidden_size=width, intermediate_size=16, num_hidden_layers=text_layers, num_attention_heads=2)
        ends: Any = dict(bos_token_id=512, eos_token_id=513, pad_token_id=513)
        return CLIPTextConfig(vocab_size=514, projection_dim=width, hidden_act=activation, **sizes, **ends)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts: Any = dict(text_encoder=CLIPTextModel(text(8, "quick_gelu")))
        parts["text_encoder_2"] = CLIPTextModelWithProjection(text(12, "gelu"))
        shape: Any = dict(
            sample_size=4,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=2,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=20,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        )
        parts["unet"] = UNet2DConditionModel(**shape)
        shape = dict(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            sample_size=8,
            scaling_factor=0.13025,
        )
        parts["vae"] = AutoencoderKL(**shape)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    parts |= dict(
        tokenizer=toy_sd3.clip_tokenizer(), tokenizer_2=toy_sd3.clip_tokenizer(pad_token="!"), scheduler=scheduler
    )
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def make_pipeline(unet: dict[str, Any], vae_channels: tuple[int, ...], text_layers: int) -> StableDiffusionPipeline:
    """A random pipeline with a tokenizer of letters."""
    tokenizer = toy_sd3.clip_tokenizer()
    words = range(len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=unet["cross_attention_dim"],
                intermediate_size=32,
                num_hidden_layers=text_layers,
                num_attention_heads=2,
                bos_token_id=len(words) - 2,
                eos_token_id=len(words) - 1,
                pad_token_id=len(words) - 1,
            )
        )
        network = UNet2DConditionModel(attention_head_dim=2, **unet)
        levels = len(vae_channels)
        blocks: Any = dict(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=vae_channels,
        )
        vae = AutoencoderKL(
            **blocks,
            layers_per_block=unet.get("layers_per_block", 2),
            norm_num_groups=unet["norm_num_groups"],
            sample_size=unet["sample_size"] * 2 ** (levels - 1),
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts: Any = (vae, text_encoder, tokenizer, network, scheduler, None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)
