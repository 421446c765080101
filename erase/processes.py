"""The processes that torchrun, accelerate launch or SLURM's srun started for one command."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta

from erase.errors import EraseError

ASKED = timedelta(seconds=10)  # for an answer of the launcher's store
_FSDP = "ACCELERATE_USE_FSDP"
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


def is_first_to_say(line: str) -> bool:
    """Whether no other process of the launcher has said this line; True where they cannot ask one another."""
    if rank_and_world()[1] == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, timeout=ASKED).add(f"erase/said/{line}", 1) == 1
    except RuntimeError:  # the launcher has ended
        return True


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


def is_sharded() -> bool:
    """Whether accelerate was asked for FSDP, to divide the weights among the processes."""
    return _is_set(_FSDP)


def refuse_sharding() -> None:
    """Raise an EraseError where accelerate was asked to shard a model of which each process holds a whole copy."""
    for name, way in {**_OTHER_WAYS, _FSDP: "FSDP"}.items():
        if _is_set(name):
            raise EraseError(
                f"accelerate launch was asked for {way}, but here every process holds the whole model; start it with "
                "--multi_gpu instead"
            )


def require_fsdp2() -> None:
    """Raise an EraseError where accelerate was asked to shard the model in another way than FSDP2's default."""
    for name, way in _OTHER_WAYS.items():
        if _is_set(name):
            raise EraseError(
                f"accelerate launch was asked for {way}, but here every process would hold the whole model; use "
                "--use_fsdp --fsdp_version 2 to divide the weights, or --multi_gpu"
            )
    if not is_sharded():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise EraseError(
            "accelerate launch was asked for FSDP 1, in which weights lose their names; add --fsdp_version 2"
        )
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise EraseError("FSDP's offload of parameters to the CPU is not supported; leave out --fsdp_offload_params")
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise EraseError("FSDP's activation checkpointing is not supported; use --gradient-checkpointing instead")
    if rank_and_world()[1] == 1:
        raise EraseError("FSDP divides the weights among processes, and there is one; add --num_processes 2")


@contextmanager
def fsdp_hidden() -> Iterator[None]:
    """Inside, accelerate does not see that it was asked for FSDP: it would wrap nothing, or other things."""
    before = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_FSDP] = before


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in {"1", "true", "yes"}
