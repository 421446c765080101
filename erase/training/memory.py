"""How much memory a run will need, computed from the shapes of its tensors before it starts."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    between: int = 0,
    generating: int = 0,
    eight_bit: bool = False,
    dual: bool = False,
    text: int = 0,
) -> dict[str, int]:
    """Peak bytes of each phase, libraries included.

    They are "generating" of images, "mask", "training" or "solving", and "writing" of the results, in main memory.

    parameters: those in the scope. density: share of them that may change; 1 without a mask.
    resolution: side of the images, in pixels.
    mask_batch: images that go through the network together in the mask's pass, a whole batch for scores other than
        abs_sum; None when no mask is made from gradients.
    part: images of one branch that go through the network together; None for a closed form, which needs none.
    dtype: of the stored weights.
    copies: of the masked weights that are kept beside them, such as their values in the base.
    between: copies of them that a step makes after its passes, see `copies_between`.
    generating: see `to_generate`.
    eight_bit: of the moments. dual: there are two sets of them.
    text: bytes of text encoders that stay during the training, see `text_passes`.
    """
    size = dtype.itemsize
    weights = sum(parameter.numel() for net in {model.network, model.denoiser} for parameter in net.parameters()) * size
    scope = sum(parameter.numel() for parameter in parameters.values())
    masked = int(scope * density)
    largest = max(parameter.numel() for parameter in parameters.values())
    one_gradient = largest * size

    def pass_of(num: int) -> int:
        return activations(model, num, resolution, dtype, checkpointing=checkpointing) + one_gradient

    needs: dict[str, int] = {"generating": generating}
    if mask_batch is not None:
        sums, selection = 4 * scope, scope // 8 + 2 * largest  # selection: the packed mask, and a tensor in bools
        needs["mask"] = weights + sums + max(pass_of(mask_batch), selection)
    masters = 4 * masked if size < 4 else 0
    places = 0 if density == 1 else min(scope // 8, 4 * masked) + scope // 8  # the optimizer's and the packed mask
    float32 = 4 * weights // size
    if part is None:
        needs["solving"] = weights + 16 * scope  # old and new in float64
    else:
        stored = 2 * masked + 8 * (masked // 256) + 8 * largest if eight_bit else 8 * masked
        moments, gradients, kept = stored * (1 + dual), size * masked, copies * size * masked
        result = masters + (float32 if masters else 0)  # rounded weights are the exact ones again at the end
        held = weights + moments + masters + gradients + kept + text
        needs["training"] = places + max(held + pass_of(part), held + between * size * masked, result)
    needs["writing"] = float32 + 4 * masked + scope // 8 + places + 4 * largest  # result, change, and one base tensor
    return {phase: LIBRARIES + need for phase, need in needs.items()}


def copies_between(*, shrinks: bool, projects: bool) -> int:
    """Copies of the masked weights that exist between two steps, when the activations are gone.

    shrinks: whether the method has a proximal step: how far the weights moved, its size, and the bits that are counted.
    projects: whether the step is projected: how far the weights moved, and where they move to.
    """
    return 3 if shrinks else 2 if projects else 0


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
    between: int = 0,
    joins: bool,
    free: int,
) -> Room:
    """What fits into nine tenths of `free` bytes, beside the weights that are there and all that the training needs.

    num_masked: weights that may change. part: images of one branch that go through the network together.
    together: images of all branches. side: of the latents. dtype: of the copy. copies: of the masked weights, such as
    an average. between: see `copies_between`. joins: whether the method can have its branches in one pass.
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
    has_copy = left - max(of_branch, between * num_masked * size) >= needed
    together = has_copy and left - of_all >= needed
    gradients = size * sum(parameter.numel() for parameter in parameters.values())
    passes = of_all + (0 if joins else of_branch)
    return Room(has_copy, together and joins, has_copy and left - passes - gradients >= needed)


def to_generate(model: Family, num: int, resolution: int, *, held: torch.dtype, computed: torch.dtype) -> int:
    """Bytes for generating images: all networks, and what a pass of the trained one holds at its peak.

    The VAE's passes, which samples and images from folders need, are not included.

    num: rows of a pass; guidance makes two of each image. resolution: side of the images, in pixels.
    held: dtype of the network's weights. computed: that of its passes; if it is another, the weights are copied to it.
    """
    weights = sum(parameter.numel() for parameter in model.network.parameters())
    others = [getattr(model, part, None) for part in model.data_parts]
    networks = [part for part in others if isinstance(part, nn.Module)]  # not a pixel model's class names
    numbers = sum(parameter.numel() for part in networks for parameter in part.parameters())
    copy = weights * computed.itemsize if computed != held else 0
    return 4 * numbers + weights * held.itemsize + copy + _pass_of(model, num, resolution, computed)


def _pass_of(model: Family, num: int, resolution: int, dtype: torch.dtype) -> int:
    """Bytes that a pass without gradients holds at its peak, beside the weights."""
    with FakeTensorMode(), torch.no_grad():
        ghost, inputs = _ghost(model, dtype), model.blank_inputs(num, resolution, dtype)
        with _Living() as living:
            ghost(**inputs)
    return living.peak


class _Living(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still in use, and the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._users: Counter[int] = Counter()  # tensors of a storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            storage, size = _storage(tensor), tensor.untyped_storage().nbytes()
            self.now += 0 if self._users[storage] else size
            self.peak = max(self.peak, self.now)
            self._users[storage] += 1
            weakref.finalize(tensor, self._forget, storage, size)
        return output

    def _forget(self, storage: int, size: int) -> None:
        self._users[storage] -= 1
        self.now -= 0 if self._users[storage] else size


def part_of_batch(model: Family, resolution: int) -> int:
    """Images that --low-memory puts through the network together: as many as keep activations small, at least one.

    Every part costs a pass and two exchanges of the base's values. A small model saves nothing by parts of one image.
    """
    return max(1, SMALL // activations(model, 1, resolution, torch.float32, checkpointing=True))


def place_to_generate(model: Family, where: torch.device, resolution: int) -> None:
    """Put the model on the device; what a GPU cannot hold at once while 8 images are generated takes turns there.

    resolution: side of the images, in pixels.
    """
    free = int(0.9 * device.free_memory(where))
    held, computed = model.denoiser.dtype, device.DTYPES[model.precision]
    needed = to_generate(model, 2 * FEW_IMAGES, resolution, held=held, computed=computed) if free > 0 else 0
    if needed <= free or not model.trains_denoiser:
        model.to(where)
    else:
        model.take_turns(where, free - _pass_of(model, 2, resolution, computed))


def images_at_once(model: Family, resolution: int, where: torch.device | None = None) -> int:
    """Images that are generated together: 8, on a GPU with room for them 16 or 32.

    An image takes no more than what its two passes, with and without words, would keep for a backward pass.

    where: the device on which the model will be, in float32, if it is not there yet.
    """
    free = device.free_memory(where or model.device)
    if free <= 0 or model.takes_turns:
        return FEW_IMAGES
    if where is not None:
        free -= sum(weights.nbytes for network in model.networks for weights in network.parameters())
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


def _ghost(model: Family, dtype: torch.dtype) -> Any:
    """The network's architecture; inside `FakeTensorMode` its weights take no memory."""
    ghost: Any = type(model.denoiser).from_config(model.denoiser.config)  # pyright: ignore
    for parameter in ghost.parameters():
        parameter.data = parameter.data.to(dtype)
    return ghost.eval()


def _activations(model: Family, num: int, resolution: int, dtype: torch.dtype, checkpointing: bool) -> int:
    ghost = _ghost(model, dtype)
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
