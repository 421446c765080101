"""How much memory a run will need, computed from the shapes of its tensors before it starts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from erase import device
from erase.families.protocol import Family

LIBRARIES = 500_000_000  # bytes of a process that has imported torch and diffusers
FEW_IMAGES = 8  # that are generated together
SMALL = LIBRARIES // 5  # bytes of activations that are not worth cutting a batch for


def estimate(
    model: Family,
    parameters: Mapping[str, Tensor],
    *,
    density: float,
    resolution: int,
    mask_batch: int | None,
    part: int | None,
    dtype: torch.dtype,
    checkpointing: bool,
    copies: int,
    eight_bit: bool = False,
    dual: bool = False,
    text: int = 0,
) -> dict[str, int]:
    """Peak bytes of each phase, "mask", "training" or "solving", and "writing", libraries included.

    parameters: those in the scope. density: share of them that may change; 1 without a mask.
    resolution: side of the images, in pixels.
    mask_batch: images that go through the network together in the mask's pass, a whole batch for scores other than
        abs_sum; None when no mask is made from gradients.
    part: images of one branch that go through the network together; None for a closed form, which needs none.
    dtype: of the stored weights.
    copies: of the masked weights that are kept beside them, such as their values in the base.
    eight_bit: of the moments. dual: there are two sets of them.
    text: bytes of text encoders that stay during the training, see `text_passes`.
    """
    size = dtype.itemsize
    weights = sum(parameter.numel() for parameter in model.network.parameters()) * size
    scope = sum(parameter.numel() for parameter in parameters.values())
    masked = int(scope * density)
    one_gradient = max(parameter.numel() for parameter in parameters.values()) * size

    def pass_of(num: int) -> int:
        return activations(model, num, resolution, dtype, checkpointing=checkpointing) + one_gradient

    needs: dict[str, int] = {}
    if mask_batch is not None:
        sums = 4 * scope
        needs["mask"] = weights + sums + max(pass_of(mask_batch), scope)  # selection: a bool for every weight
    masters = 4 * masked if size < 4 else 0
    places = 0 if density == 1 else min(scope // 8, 4 * masked) + scope // 8  # the optimizer's and the packed mask
    if part is None:
        needs["solving"] = weights + 16 * scope  # old and new in float64
    else:
        largest = max(parameter.numel() for parameter in parameters.values())
        stored = 2 * masked + 8 * (masked // 256) + 8 * largest if eight_bit else 8 * masked
        moments, gradients, kept = stored * (1 + dual), size * masked, copies * size * masked
        needs["training"] = weights + moments + masters + gradients + kept + places + pass_of(part) + text
    float32 = 4 * weights // size
    needs["writing"] = 2 * float32 + 4 * masked + scope // 8 + places  # before, after, and the change
    return {phase: LIBRARIES + need for phase, need in needs.items()}


@dataclass(frozen=True)
class Room:
    """What a training has room for on a GPU.

    copy: the base as a second network. together: the forget and the retain branch in one pass.
    graph: the first pass of a step as a CUDA graph, which keeps its activations and all gradients.
    """

    copy: bool
    together: bool
    graph: bool


def room(
    model: Family,
    parameters: Mapping[str, Tensor],
    *,
    num_masked: int,
    part: int,
    together: int,
    side: int,
    dtype: torch.dtype,
    eight_bit: bool,
    dual: bool = False,
    copies: int,
    joins: bool,
    free: int,
) -> Room:
    """What fits into nine tenths of `free` bytes, beside the weights that are there and all that the training needs.

    num_masked: weights that may change. part: images of one branch that go through the network together.
    together: images of all branches. side: of the latents. dtype: of the copy. copies: of the masked weights, such as
    an average. joins: whether the method can have its branches in one pass.
    """
    if free <= 0:
        return Room(copy=False, together=False, graph=False)
    size = model.network.dtype.itemsize
    moments = (2 if eight_bit else 8) * (1 + dual) + (4 if size < 4 else 0)
    left = int(0.9 * free) - num_masked * (moments + (1 + copies) * size)
    left -= 4 * max(parameter.numel() for parameter in parameters.values())
    resolution = side * model.resolution // model.latent_shape(model.resolution)[-1]
    of_branch, of_all = (
        activations(model, num, resolution, torch.float32, checkpointing=False) for num in (part, together)
    )
    needed = sum(parameter.numel() for parameter in model.network.parameters()) * dtype.itemsize
    has_copy = left - of_branch >= needed
    together = has_copy and left - of_all >= needed
    gradients = size * sum(parameter.numel() for parameter in parameters.values())
    passes = of_all + (0 if joins else of_branch)
    return Room(has_copy, together and joins, has_copy and left - passes - gradients >= needed)


def part_of_batch(model: Family, resolution: int) -> int:
    """Images that --low-memory puts through the network together: as many as keep activations small, at least one.

    Every part costs a pass and two exchanges of the base's values. A small model saves nothing by parts of one image.
    """
    return max(1, SMALL // activations(model, 1, resolution, torch.float32, checkpointing=True))


def images_at_once(model: Family, resolution: int) -> int:
    """Images that are generated together: 8, on a GPU with room for them 16 or 32.

    An image takes no more than what its two passes, with and without words, would keep for a backward pass.
    """
    free = device.free_memory(model.device)
    if free <= 0:
        return FEW_IMAGES
    each = 2 * activations(model, 1, resolution, device.DTYPES[model.precision], checkpointing=False)
    return next((num for num in (32, 16) if num * each <= 0.9 * free), FEW_IMAGES)


def text_passes(model: Family, num: int) -> int:
    """Bytes of the text encoders, and of what `num` prompts keep for the gradient of a token's embedding.

    Raises:
        EraseError: see `Family.token_embeddings`.
    """
    parameters = [parameter for encoder in model.text_encoders for parameter in encoder.parameters()]
    embedding = model.token_embeddings[0].detach().clone().requires_grad_(True)
    with torch.enable_grad(), _keeping({_storage(parameter) for parameter in parameters}) as kept:
        model.encode_with([""], 0, embedding)
    return sum(parameter.nbytes for parameter in parameters) + num * _bytes(kept)


def activations(model: Family, num: int, resolution: int, dtype: torch.dtype, *, checkpointing: bool) -> int:
    """Bytes that a forward pass keeps for its backward pass; a dry run on tensors without content.

    num: images of the batch. resolution: their side, in pixels.
    """
    with FakeTensorMode():  # chooses attention kernels as the CPU does; on "meta" every score would be kept
        return _activations(model, num, resolution, dtype, checkpointing)


def _activations(model: Family, num: int, resolution: int, dtype: torch.dtype, checkpointing: bool) -> int:
    ghost: Any = type(model.network).from_config(model.network.config)  # pyright: ignore
    for parameter in ghost.parameters():
        parameter.data = parameter.data.to(dtype)
    inputs = model.blank_inputs(num, resolution, dtype)
    weights = {_storage(parameter) for parameter in ghost.parameters()}
    again = [0]  # bytes that a block keeps while it is computed again

    def checkpoint(block: Callable[..., Any], *inputs: Any) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                kept[_storage(tensor)] = tensor
        with _keeping(weights) as inside:
            output = block(*inputs)
        again.append(_bytes(inside))
        return output

    if checkpointing:
        ghost.enable_gradient_checkpointing(checkpoint)
    with _keeping(weights) as kept:
        ghost(**inputs)
    return _bytes(kept) + max(again)


@contextmanager
def _keeping(weights: set[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, what autograd saves is collected by storage; a weight is there anyway."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
