"""Checkpoints of class-conditional DDPMs as Selective Amnesia, SalUn and SFRon publish them, in DDIM's layout.

A checkpoint is the list [weights, optimizer, step, moving average (EMA) of the weights]; DDIM's own code has an epoch
before the step, and a training without an average has none. Names of weights begin with `module.` if they come from
DataParallel. The average is read if there is one: the published samples are its.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

from erase import pickles
from erase.delta import State
from erase.errors import EraseError
from erase.families import compvis, single_file
from erase.families.components import one_line, require_finite
from erase.families.pipeline_folder import write_pipeline
from erase.families.side_by_side_unet import SideBySideUNet2DModel
from erase.files import file_hash, read_json, text_hash, write_json
from erase.options.model_classes import PUBLISHED, read_classes, unnamed
from erase.tensor_files import read_tensors

_TABLE = "class_embedding.weight"  # theirs are two tensors: the classes' rows and the null class's
_ENDS = {
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
    "class_embedding.linear_1": "cemb.dense.0",
    "class_embedding.linear_2": "cemb.dense.1",
    "conv_norm_out": "norm_out",
}
UNCONDITIONAL = "an unconditional pixel model; only class-conditional ones have a concept to forget"
_ATTENTION_SIDE = 16  # the side at which all published networks begin to attend, in pixels


def knows(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a file with tensors of these names is a checkpoint of DDIM's UNet, class-conditional or not."""
    return {"temb.dense.0.weight", "down.0.block.0.conv1.weight"} <= {bare(name) for name in shapes}


def bare(name: str) -> str:
    """A weight's name without the prefix of DataParallel."""
    return name.removeprefix("module.")


def convert(path: Path, *, allow_pickle: bool, config: str | None, cache_dir: Path | None) -> tuple[Path, list[str]]:
    """The diffusers folder of a checkpoint, made in the cache once, and lines for the user about it.

    config: whose classes they are: a key of `PUBLISHED`, or a folder whose model_index.json has "id2label".

    Raises:
        EraseError: the file is damaged, of another network, or a pickle and `allow_pickle` is False; its classes are
            not named; or the cache cannot be written.
    """
    if path.suffix != ".safetensors":
        pickles.require_allowed(path, allow_pickle)
    classes = _classes(path, config)

    def make(folder: Path) -> list[str]:
        states, stubs = ([read_tensors(path)], []) if path.suffix == ".safetensors" else pickles.states(path)
        notes = [pickles.stubbed(path, stubs)] if stubs else []
        if len(states) > 1:
            notes.append(f"{path}: the moving average (EMA) of the weights is read, not the weights of the last step")
        unet = _network(path, {bare(name): tensor for name, tensor in states[-1].items()}, len(classes))
        scheduler = DDIMScheduler(clip_sample=False)  # betas are linear, 0.0001 to 0.02, as in DDPM
        write_pipeline(DDIMPipeline(unet=unet, scheduler=scheduler), folder)  # pyright: ignore[reportArgumentType]
        index = folder / "model_index.json"
        write_json(index, read_json(index) | {"id2label": {str(label): name for label, name in enumerate(classes)}})
        return notes

    return single_file.in_cache("converted", text_hash(["ddim", file_hash(path), classes])[:32], cache_dir, make)


def tensors_of(network: State) -> dict[str, Tensor]:
    """The weights of a `SideBySideUNet2DModel` under the names of a checkpoint, without `module.`."""
    found: dict[str, Tensor] = {}
    levels = _levels(network)
    for name, tensor in network.items():
        if name == _TABLE:
            found["classes_emb.weight"], found["null_classes_emb"] = tensor[:-1].clone(), tensor[-1].clone()
        else:
            theirs = _their_name(name, levels)
            is_attention = ".attn" in theirs and tensor.ndim == 2  # theirs are 1x1 convolutions
            found[theirs] = tensor[:, :, None, None] if is_attention else tensor
    return found


def _classes(path: Path, config: str | None) -> tuple[str, ...]:
    if config in PUBLISHED:
        return PUBLISHED[str(config)]
    if config is not None and (classes := read_classes(Path(config).expanduser())):
        return classes
    raise unnamed(path, config)


def _network(path: Path, stored: Mapping[str, Tensor], num_classes: int) -> SideBySideUNet2DModel:
    """The network with these weights.

    Raises:
        EraseError: they are not those of such a network.
    """
    if "null_classes_emb" not in stored:
        raise EraseError(f"{path} is {UNCONDITIONAL}")
    try:
        with torch.device("meta"):
            network = SideBySideUNet2DModel(**_options({name: tuple(w.shape) for name, w in stored.items()}))
    except Exception as error:  # shapes that no network has
        raise EraseError(f"{path} does not hold the weights of a UNet of DDIM's code: {one_line(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in tensors_of(network.state_dict()).items()}
    for name in sorted(expected.keys() ^ stored.keys()):
        raise EraseError(f"{path} {'lacks' if name in expected else 'has a weight too many,'} {name!r:.100}")
    for name, tensor in stored.items():
        if tuple(tensor.shape) != expected[name] or not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise EraseError(
                f"{path}: {name!r} is {kind} of the shape {list(tensor.shape)}; it must be float of the shape "
                f"{list(expected[name])}"
            )
    if len(stored["classes_emb.weight"]) != num_classes:
        raise EraseError(f"{path} has {len(stored['classes_emb.weight'])} classes, but {num_classes} are named")
    require_finite(path, stored.items())
    return _filled(network, stored)


def _filled(network: SideBySideUNet2DModel, stored: Mapping[str, Tensor]) -> SideBySideUNet2DModel:
    levels, state = _levels(network.state_dict()), {}
    for name, like in network.state_dict().items():
        if name == _TABLE:
            tensor = torch.cat([stored["classes_emb.weight"], stored["null_classes_emb"][None]])
        else:
            tensor = stored[_their_name(name, levels)]
        state[name] = tensor.reshape(like.shape).float().contiguous()
    network.load_state_dict(state, assign=True)
    return network


def network_options(
    *, side: int, channels: Sequence[int], attends: Sequence[bool], layers: int, num_classes: int
) -> dict[str, Any]:
    """Options of `SideBySideUNet2DModel` for the UNet of DDIM's code.

    side: of its images. channels, attends: of each level, that of whole images first. layers: residual blocks a level.
    """
    return {
        "sample_size": side,
        "block_out_channels": tuple(channels),
        "down_block_types": tuple("AttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        "up_block_types": tuple("AttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
        "layers_per_block": layers,
        "num_class_embeds": num_classes + 1,
        "time_embedding_dim": 8 * channels[0],
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,  # one row and one column of zeros, at the end
        "dropout": 0.1,
        "attention_head_dim": None,  # one head
        "norm_eps": 1e-6,
    }


def _options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The options of a network with these names and shapes."""
    levels = len({match[1] for name in shapes if (match := re.match(r"down\.(\d+)\.block\.", name))})
    attends = [f"down.{level}.attn.0.q.weight" in shapes for level in range(levels)]
    if True not in attends:
        raise ValueError("no level has attention, by which the size of its images is known")
    return network_options(
        side=_ATTENTION_SIDE * 2 ** attends.index(True),
        channels=[shapes[f"down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        attends=attends,
        layers=len({match[1] for name in shapes if (match := re.match(r"down\.0\.block\.(\d+)\.", name))}),
        num_classes=shapes["classes_emb.weight"][0],
    )


def _levels(state: Mapping[str, Any]) -> int:
    return len({match[1] for name in state if (match := re.match(r"down_blocks\.(\d+)\.", name))})


def _their_name(name: str, levels: int) -> str:
    for ours, theirs in _ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    # DDIM's layers have the names that the VAE of Stable Diffusion took over
    name = compvis.vae_name(name, levels)
    return name.replace(".attentions.", ".attn.").replace(".time_emb_proj.", ".temb_cemb_proj.")
