"""Load a Stable Diffusion from a folder, the hub or a single file, and check that its parts fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import CLIPTextModel

from erase.errors import EraseError
from erase.families import architecture, components, pipeline_folder, single_file, unet_file, vocabulary
from erase.families.components import one_line
from erase.families.hub import download
from erase.families.sd import StableDiffusion, require_sampling, require_working
from erase.families.stored_unet import reading
from erase.files import default_cache_dir as default_cache_dir
from erase.options.model_defaults import read_defaults

MINI_DIR = Path(__file__).parents[1] / "mini" / "weights"


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    unet: str | Path | None = None,
    config: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> StableDiffusion:
    """A Stable Diffusion in float32 from 'mini', a diffusers folder, a hub id or a single checkpoint file.

    allow_pickle: accept weights that are not safetensors (.ckpt, .bin).
    unet: a file of UNet weights, all or some, that replace the model's; see `erase.families.unet_file.put_into`.
    config: a diffusers folder whose configs and tokenizer a single file is read with; without one they come from
        the hub.
    cache_dir: where a single file is converted to a diffusers folder, once.

    Raises:
        EraseError: not found, unreachable, broken, incomplete, or not a Stable Diffusion.
    """
    with reading(source):
        folder, notes = _locate(source, allow_pickle, config, revision, cache_dir)
        architecture.require_known(source, folder)
        network = components.load(UNet2DConditionModel, folder / "unet", allow_pickle=allow_pickle)
        vae = components.load(AutoencoderKL, folder / "vae", allow_pickle=allow_pickle)
        text_encoder = components.load(CLIPTextModel, folder / "text_encoder", allow_pickle=allow_pickle)
        _require_fit(source, folder, network.config, vae.config, text_encoder.config)
        tokenizer = vocabulary.load(folder / "tokenizer", text_encoder)
        scheduler = _load_scheduler(folder)
        if unet is not None:
            notes = [*notes, *unet_file.put_into(network, unet, allow_pickle=allow_pickle)]
        require_working(folder, network, vae, text_encoder, tokenizer)
        defaults = read_defaults(folder / pipeline_folder.DEFAULTS_FILE)
    for part in (network, vae, text_encoder):
        part.to(device)
    name = f"{source} with {Path(unet).name}" if unet else str(source)
    return StableDiffusion(
        name,
        folder,
        network,
        vae,
        text_encoder,
        tokenizer,
        scheduler,
        defaults,
        allow_pickle,
        unet_file=None if unet is None else str(unet),
        notes=tuple(notes),
    )


def locate(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    config: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """The local diffusers folder of a model: its own, the hub's snapshot, or a converted single file.

    tell: hears what the user should know about how it was made.
    """
    with reading(source):
        folder, notes = _locate(source, allow_pickle, config, revision, cache_dir)
        architecture.require_known(source, folder)
    for note in notes:
        tell(note)
    return folder


def _locate(
    source: str | Path, allow_pickle: bool, config: str | None, revision: str | None, cache_dir: Path | None
) -> tuple[Path, list[str]]:
    """The folder, and lines for the user about how it was made."""
    if str(source) == "mini":
        return MINI_DIR, []
    path = Path(source).expanduser()
    if path.is_dir():
        return path, []
    if path.suffix in single_file.SUFFIXES:
        if not path.is_file():
            raise EraseError(f"{path}: no such file")
        return single_file.convert(path, allow_pickle=allow_pickle, config=config, cache_dir=cache_dir)
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise EraseError(f"no model {str(source)!r}: not 'mini', not a folder, not a checkpoint file, not a hub id")
    return download(str(source), revision, allow_pickle), []


def _load_scheduler(folder: Path) -> SchedulerMixin:
    import diffusers

    class_name = architecture.components(folder).get("scheduler", "")
    cls: Any = getattr(diffusers, class_name, None) if class_name else None
    if not isinstance(cls, type) or not issubclass(cls, SchedulerMixin):
        raise EraseError(f"{folder}/model_index.json names the scheduler {class_name!r}, which diffusers does not have")
    config = folder / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        raise EraseError(f"cannot load {folder / 'scheduler'}: it has no scheduler_config.json; download it again")
    components.require_types(config, cls)
    try:
        scheduler: Any = cls.from_pretrained(folder, subfolder="scheduler", local_files_only=True)  # pyright: ignore
    except Exception as error:
        raise EraseError(f"cannot load {folder / 'scheduler'}: {one_line(error)}; download it again") from error
    require_sampling(folder, cls.from_config(scheduler.config))  # pyright: ignore
    return scheduler


def _require_fit(source: str | Path, folder: Path, unet: Any, vae: Any, text: Any) -> None:
    """Raise an EraseError where the parts do not belong to one text-to-image Stable Diffusion 1 or 2."""
    if unet["in_channels"] != 4 or unet["cross_attention_dim"] != text.hidden_size:
        raise EraseError(
            f"{source} is not a text-to-image Stable Diffusion 1 or 2: its UNet takes {unet['in_channels']} channels "
            f"and text states of width {unet['cross_attention_dim']}, but its text encoder makes {text.hidden_size}"
        )
    if vae["latent_channels"] != 4 or unet["out_channels"] != 4:
        raise EraseError(
            f"{source} is not a text-to-image Stable Diffusion 1 or 2: its latents have {vae['latent_channels']} "
            f"channels and its UNet gives {unet['out_channels']} instead of 4"
        )
    for name in ("norm_eps", "mid_block_scale_factor", "resnet_out_scale_factor"):
        if not unet[name] > 0:
            raise EraseError(f"{folder}/unet/config.json: {name} is {unet[name]}; it must be above 0")
    eps = text.layer_norm_eps
    if not isinstance(eps, int | float) or not 0 < eps <= 1:
        raise EraseError(
            f"{folder}/text_encoder/config.json: layer_norm_eps is {eps!r:.40}; it must be above 0 and at most 1"
        )
    if type(text.eos_token_id) is not int or not 0 <= text.eos_token_id < text.vocab_size:
        raise EraseError(
            f"{folder}/text_encoder/config.json: eos_token_id is {text.eos_token_id!r:.40}; it must be a token, 0 to "
            f"{text.vocab_size - 1}"
        )
    if not 1e-3 <= vae["scaling_factor"] <= 1e3:
        raise EraseError(
            f"{folder}/vae/config.json: scaling_factor is {vae['scaling_factor']}; it must be 0.001 to 1000 "
            "(0.18215 in Stable Diffusion 1 and 2)"
        )
    size = unet["sample_size"]
    if not isinstance(size, int) or not 0 < size <= 1024:
        raise EraseError(
            f"{folder}/unet/config.json: sample_size is {size!r:.40}; it must be a side in latents, 1 to 1024"
        )
