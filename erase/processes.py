"""The processes that torchrun, accelerate launch or SLURM's srun started for one command."""

import os
from collections.abc import Collection

from erase.errors import EraseError

# what accelerate launch says in the environment -> what its config calls it
_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def rank_and_world() -> tuple[int, int]:
    """Number of this process, from 0, and how many there are."""
    of_slurm = os.environ.get("SLURM_PROCID", "0"), os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    rank, world = (os.environ.get(name, other) for name, other in zip(("RANK", "WORLD_SIZE"), of_slurm, strict=True))
    return int(rank), int(world)


def local_rank(num_gpus: int) -> int:
    """Number of this process on its machine, which is the number of its GPU.

    Tasks of `srun` count only if they see more than one GPU: SLURM may give each task a GPU of its own.
    """
    given = os.environ.get("LOCAL_RANK")
    if given is not None:
        return int(given)
    is_task = "WORLD_SIZE" not in os.environ and rank_and_world()[1] > 1
    return int(os.environ.get("SLURM_LOCALID", "0")) if is_task and num_gpus > 1 else 0


def require_shareable(prog: str, command: str, shared: Collection[str]) -> None:
    """Raise an EraseError if there are several processes and only the commands in `shared` share their work.

    command: that was given; "" is `prog` without one.
    """
    world = rank_and_world()[1]
    if world > 1 and command not in shared:
        others = ", ".join(f"{prog} {name}".strip() for name in shared)
        hint = f"; {others} can share its work" if others else ""
        raise EraseError(f"{prog} {command}".strip() + f" takes one process, but {world} were started{hint}")


def require_group() -> None:
    """Raise an EraseError for several processes that do not know one another, as `srun` alone starts them."""
    world = rank_and_world()[1]
    if world > 1 and "WORLD_SIZE" not in os.environ:
        raise EraseError(
            f"srun started {world} processes that cannot exchange gradients; let it start torchrun once per machine: "
            "srun --ntasks-per-node 1 torchrun --nnodes N --nproc_per_node M ... -m erase.cli ..."
        )


def refuse_sharding() -> None:
    """Raise an EraseError where accelerate was asked to shard the model, which would silently be plain copies."""
    found = [way for name, way in _OTHER_WAYS.items() if _is_set(name)]
    if _is_set("ACCELERATE_USE_FSDP"):
        found.append("FSDP")
    if found:
        raise EraseError(
            f"accelerate launch was asked for {found[0]}, but every process holds the whole model; start it with "
            "--multi_gpu instead, and if memory is short add --low-memory"
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in {"1", "true", "yes"}
