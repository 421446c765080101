"""The parts of the embedded model with random weights, and its noise schedule."""

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erase.mini import world
from erase.mini.tokenizer import MAX_TOKENS


def make_vae() -> AutoencoderKL:
    """A VAE with f = 8 and 4 latent channels. Residual branches start at zero, so that it learns colours quickly."""
    shape: dict[str, Any] = dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=world.SIZE,
    )
    vae = AutoencoderKL(**shape)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if name.endswith(("conv2", "to_out.0")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return vae


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    special: Any = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    start, end = special
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    """A small UNet with SD v1.4's block types: two cross-attention levels and a plain one, 8x8 latents."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads, as in SD v1.4's own config
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """SD v1.4's betas. `clip_sample` is off, because clipping latents to [-1, 1] changes colours."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
