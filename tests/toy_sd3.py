"""A random Stable Diffusion 3, a few numbers wide."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
)


def make_pipeline() -> StableDiffusion3Pipeline:
    """8 x 8 pixels, text states of width 24, two CLIP encoders and a T5; a token is a letter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        third = t5_tokenizer()
        sizes: Any = dict(d_model=24, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=len(third))
        parts: Any = dict(
            transformer=make_transformer(),
            vae=make_vae(),
            text_encoder=make_clip(8),
            text_encoder_2=make_clip(12),
            text_encoder_3=T5EncoderModel(T5Config(**sizes)),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(pad_token="!"),
            tokenizer_3=third,
        )
    return StableDiffusion3Pipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def make_transformer(**more: Any) -> SD3Transformer2DModel:
    network = SD3Transformer2DModel(
        **more,
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=8,
        pooled_projection_dim=8 + 12,
        pos_embed_max_size=8,
    )
    for parameter in network.parameters():  # those that start from zeros would leave the text without effect
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def make_vae() -> AutoencoderKL:
    blocks: Any = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
    )
    return AutoencoderKL(
        **blocks,
        norm_num_groups=2,
        sample_size=8,
        scaling_factor=1.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_clip(width: int) -> CLIPTextModelWithProjection:
    sizes: Any = dict(hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    ends: Any = dict(bos_token_id=512, eos_token_id=513, pad_token_id=513)
    return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=514, projection_dim=width, **sizes, **ends))


def clip_tokenizer(**options: Any) -> CLIPTokenizer:
    """It knows the 256 bytes, each also at a word's end."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the byte alphabet of GPT-2 and CLIP
    letters = [chr(n) for n in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=77, **options)


def t5_tokenizer() -> T5TokenizerFast:
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.'-", "\u2581"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in letters)]
    backend: Any = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=backend, extra_ids=0, model_max_length=512)
