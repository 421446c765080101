"""Reads the components of a Stable Diffusion XL folder and checks each one and their fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erase.errors import EraseError
from erase.families import components, sd_parts, unet_file, vocabulary
from erase.families.sd_parts import LATENTS, PROMPTS, TIMES
from erase.files import read_json


@dataclass(frozen=True)
class Parts(sd_parts.Parts):
    """zeros: model_index.json's `force_zeros_for_empty_prompt`."""

    text_encoder_2: CLIPTextModelWithProjection
    tokenizer_2: CLIPTokenizer
    zeros: bool


def read(source: str | Path, folder: Path, *, allow_pickle: bool, unet: str | Path | None) -> Parts:
    """The parts of a folder. unet: a file of UNet weights, all or some, that replace the folder's.

    Raises:
        EraseError: a part is missing, damaged or of another model.
    """
    network = components.load(UNet2DConditionModel, folder / "unet", allow_pickle=allow_pickle)
    vae = components.load(AutoencoderKL, folder / "vae", allow_pickle=allow_pickle)
    first = components.load(CLIPTextModel, folder / "text_encoder", allow_pickle=allow_pickle)
    second = components.load(CLIPTextModelWithProjection, folder / "text_encoder_2", allow_pickle=allow_pickle)
    _require_fit(source, folder, network.config, vae.config, first.config, second.config)
    tokenizers = vocabulary.load(folder / "tokenizer", first), vocabulary.load(folder / "tokenizer_2", second)
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise EraseError(f"{folder}: its two tokenizers have different vocabularies; download the model again")
    scheduler = sd_parts.load_scheduler(folder)
    notes = [] if unet is None else unet_file.put_into(network, unet, allow_pickle=allow_pickle)
    _require_working(folder, network, vae, (first, second), tokenizers)
    zeros = read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise EraseError(f"{folder}/model_index.json: force_zeros_for_empty_prompt is {zeros!r:.40}, not true or false")
    return Parts(network, vae, first, tokenizers[0], scheduler, tuple(notes), second, tokenizers[1], zeros)


def _require_fit(source: str | Path, folder: Path, unet: Any, vae: Any, first: Any, second: Any) -> None:
    """Raise an EraseError where the parts do not belong to one base model of Stable Diffusion XL."""
    width = first.hidden_size + second.hidden_size
    if unet["in_channels"] != 4 or unet["out_channels"] != 4 or vae["latent_channels"] != 4:
        raise EraseError(
            f"{source} is not a text-to-image Stable Diffusion XL: its latents have {vae['latent_channels']} channels, "
            f"and its UNet takes {unet['in_channels']} and gives {unet['out_channels']}; all must be 4"
        )
    if unet["cross_attention_dim"] != width:
        raise EraseError(
            f"{source} is not a Stable Diffusion XL: its UNet takes text states of width "
            f"{unet['cross_attention_dim']}, but its text encoders make {width}"
        )
    added = 6 * (unet["addition_time_embed_dim"] or 0) + second.projection_dim
    if unet["projection_class_embeddings_input_dim"] != added:
        raise EraseError(
            f"{source} is not a Stable Diffusion XL: its UNet takes pooled text and sizes of width "
            f"{unet['projection_class_embeddings_input_dim']}, but its second text encoder and the sizes make {added}"
        )
    sd_parts.require_values(folder, unet, vae)
    for name, text in (("text_encoder", first), ("text_encoder_2", second)):
        sd_parts.require_text_values(folder / name, text)
        if text.num_hidden_layers < 2:
            raise EraseError(f"{folder}/{name} has {text.num_hidden_layers} layer; its second last is needed")


def _require_working(folder: Path, network: Any, vae: Any, encoders: Any, tokenizers: Any) -> None:
    """Raise an EraseError unless each part works; see `sd_parts.require_working`."""
    ids = [tokenizer(PROMPTS, padding="max_length", return_tensors="pt")["input_ids"] for tokenizer in tokenizers]

    def encoded(number: int) -> Tensor:
        return encoders[number](ids[number], output_hidden_states=True).hidden_states[-2]

    def pooled() -> Tensor:
        return encoders[1](ids[1]).text_embeds

    def predicted() -> Tensor:
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        added = {"text_embeds": pooled(), "time_ids": sizes}
        states = torch.cat([encoded(0), encoded(1)], -1)
        return network(LATENTS, TIMES, encoder_hidden_states=states, added_cond_kwargs=added).sample

    sd_parts.require_working(
        folder,
        {
            "text_encoder": lambda: encoded(0),
            "text_encoder_2": lambda: torch.cat([encoded(1).flatten(1), pooled()], 1),
            "unet": predicted,
            "vae": lambda: vae.decode(LATENTS).sample,
        },
    )
