"""The processes and the machine of a run: accelerator, versions, peak memory."""

import platform
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import accelerate
import diffusers
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    AutocastKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
    is_wandb_available,
)

from erase import device
from erase.errors import EraseError, missing
from erase.options.settings import Settings
from erase.processes import fsdp_hidden, rank_and_world, require_fsdp2, require_group
from erase.version import __version__

# Processes generate fixed shares of the images and wait for one another afterwards. A slower GPU may need hours longer
# than a faster one, and a process group gives up after 10 minutes by default.
WAIT = timedelta(hours=24)


def make_accelerator(settings: Settings, folder: Path, compute: device.Compute) -> Accelerator:
    """accelerate's view of the machine; refuses what it would leave out without a word.

    Raises:
        EraseError: processes that do not know one another, a way to shard the model that is none here, a tracker that
            is not installed, a process group that was ended, or another number of processes than the launcher was
            asked for.
    """
    require_group()
    require_fsdp2()
    _, wanted = rank_and_world()
    if dist.is_initialized() and dist.get_world_size() != wanted:
        raise EraseError(
            f"this script's process group has {dist.get_world_size()} processes, but its environment is that of "
            f"{wanted}; start the script with torchrun or accelerate launch"
        )
    if wanted > 1 and PartialState._shared_state.get("num_processes", 1) > 1 and not dist.is_initialized():
        raise EraseError(
            "this script has ended its process group, and a second one would wait without end; call "
            "destroy_process_group (or accelerate's end_training) after the last run"
        )
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if settings.report_to and not available[settings.report_to]():
        raise missing(settings.report_to)
    # a process may make several runs, each with its own device and precision, but one process group
    AcceleratorState._reset_state(reset_partial_state=wanted == 1)
    with fsdp_hidden():
        accelerator = Accelerator(
            cpu=compute.device.type == "cpu",
            mixed_precision=compute.mixed_precision,
            log_with=settings.report_to,
            # with the cache, torch 2.6 finds no gradient of weights that a pass without gradients has rounded
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT), AutocastKwargs(cache_enabled=False)],
            project_config=ProjectConfiguration(logging_dir=str(folder / "logs")),
            step_scheduler_with_optimizer=False,
        )
    if wanted != accelerator.num_processes:
        raise EraseError(
            f"the launcher asked for {wanted} processes but accelerate runs {accelerator.num_processes}; "
            "on CPUs start with: torchrun --nproc_per_node N -m erase.cli ... --device cpu"
        )
    return accelerator


def leave_group() -> None:
    """End the process group, if there is one; NCCL warns about a process that exits without this."""
    if dist.is_initialized():
        dist.destroy_process_group()


def versions() -> dict[str, str]:
    return {
        "erase-concept": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "threads": str(torch.get_num_threads()),
    }


def peak_memory() -> dict[str, int]:
    """Bytes: of the process, except on Windows, and of the GPU if there is one."""
    peak = {}
    if find_spec("resource"):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak
