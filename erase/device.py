"""The device and the precision of a command; all commands choose them here."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from erase.errors import EraseError
from erase.processes import local_rank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp16 gradients below 6e-8 become zero, so losses are multiplied by this before a backward pass without a GradScaler
LOSS_SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 4096.0}


@dataclass(frozen=True)
class Compute:
    """Where a command computes, and how precisely.

    precision: "fp32", "bf16" or "fp16", of every pass through a network, a VAE or a classifier. The weights that are
        trained and written are float32, whatever the precision.
    """

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, products and convolutions compute in the precision; the weights keep theirs."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision], cache_enabled=False)

    @property
    def mixed_precision(self) -> str:
        """The precision under accelerate's name."""
        return "no" if self.precision == "fp32" else self.precision

    def record(self) -> dict[str, str]:
        """For run.json."""
        name = {"name": gpu_name(self.device)} if self.device.type == "cuda" else {}
        return {"device": str(self.device), "precision": self.precision, **name}


def choose(device: str | None, precision: str | None) -> Compute:
    """The device and the precision that are asked for, or the best ones that are here.

    device: cpu, cuda, cuda:N or mps; None is this process's GPU, else the CPU. mps is untested.
    precision: None is bf16 on a GPU that computes in it, fp16 on an older one, fp32 on anything else.

    On a GPU this also lets float32 products use TF32, unless deterministic algorithms are asked for.

    Raises:
        EraseError: no such device or precision.
    """
    found = _find(device)
    if precision is not None and precision not in DTYPES:
        raise EraseError(f"--precision is {precision!r}; choose {', '.join(DTYPES)}")
    if found.type == "cuda":
        is_free = not torch.are_deterministic_algorithms_enabled()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_free
    if precision is None:
        precision = "fp32" if found.type != "cuda" else "bf16" if has_bf16(found) else "fp16"
    return Compute(found, precision)


def _find(device: str | None) -> torch.device:
    num = num_gpus()
    own = local_rank(num)  # a launcher starts a process for each GPU
    if device is None:
        device = "cuda" if num else "cpu"
    kind, colon, number = device.partition(":")
    if device in {"cpu", "mps"}:
        if device == "mps" and not torch.backends.mps.is_available():
            raise EraseError("--device is 'mps', but torch sees no Apple GPU; use --device cpu")
        return torch.device(device)
    if kind != "cuda" or colon and not (number.isascii() and number.isdigit()):
        raise EraseError(f"--device is {device!r}; choose cpu, cuda, cuda:N or mps")
    if not num:
        raise EraseError(f"--device is {device!r}, but torch sees no CUDA device; use --device cpu")
    index = int(number) if colon else own
    if index >= num:
        raise EraseError(f"--device is {device!r}, but torch sees {num} CUDA devices, numbered from 0")
    use_gpu(index)
    return torch.device("cuda", index)


def place_of(network: nn.Module) -> torch.device:
    """Where the network computes, also where accelerate keeps its weights elsewhere until then."""
    for module in network.modules() if hasattr(network, "_hf_hook") else ():
        if (where := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
            return torch.device(where)
    return next(network.parameters()).device


def dtype_of(network: nn.Module) -> torch.dtype:
    """The dtype of the network's weights, which all have the same one.

    diffusers' own `dtype` walks through all modules, which takes milliseconds in every pass.
    """
    return next(network.parameters()).dtype


def staged(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """The tensor on the device. Neither the host nor the GPU waits: a copy to a GPU starts from pinned memory."""
    if where.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(where)
    return pinned(tensor.contiguous()).to(where, non_blocking=True)


# --- what the machine has; a test that pretends a GPU replaces these --------------------------------------------------


def num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_memory(where: torch.device) -> int:
    """Bytes that this process can still take on a GPU; 0 on any other device."""
    if where.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(where)
    share: Any = getattr(torch.cuda, "get_per_process_memory_fraction", lambda where: 1.0)  # not in older versions
    limit = int(total * share(where)) - torch.cuda.memory_reserved(where)
    unused = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return min(free, limit) + unused


def has_bf16(device: torch.device) -> bool:
    """Whether the GPU computes in bfloat16; torch emulates it, slowly, on older ones."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def has_kernels(where: torch.device) -> bool:
    """Whether Triton is installed and compiles for the device, or its interpreter, which takes any, is switched on."""
    if find_spec("triton") is None:
        return False
    return where.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def has_graphs(where: torch.device) -> bool:
    """Whether passes on the device can be recorded and replayed as CUDA graphs."""
    return where.type == "cuda" and torch.version.hip is None


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that a GPU reads by itself."""
    return tensor.pin_memory()


def use_gpu(index: int) -> None:
    """Make this GPU the one that "cuda" means."""
    torch.cuda.set_device(index)


# --- precision of a network -------------------------------------------------------------------------------------------


@contextmanager
def rounded(precision: str, *networks: nn.Module) -> Iterator[None]:
    """Inside, the networks' weights are stored in the precision; afterwards they are what they were, bit for bit.

    For passes without gradients: unlike autocast this rounds each weight once, not in every pass.
    """
    exact = []
    try:
        if precision != "fp32":
            for tensor in (t for network in networks for t in (*network.parameters(), *network.buffers())):
                if tensor.is_floating_point():
                    exact.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(DTYPES[precision])
        yield
    finally:
        for tensor, data in exact:
            tensor.data = data
