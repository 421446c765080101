"""A GPU that is only pretended: tensors moved to it stay in the CPU's memory, but must not meet tensors of the CPU.

    with pretend_device.gpu():
        x = torch.ones(2).to("cuda")      # x.device is cuda:0
        x + torch.ones(2)                 # RuntimeError, as on a real one

    with pretend_device.gpu(), pretend_device.waits() as found:
        x.item()                          # found: ["_local_scalar_dense"]

A storage carries the mark, so that views, parameters and `.data` share it. As in torch, a CPU tensor without dimensions
may meet any other, indices may lie on the CPU, and only `copy_`, `to` and assignment to a part cross devices.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from erase import device

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

_T: Any = torch.Tensor
_ANSWERS = {_T.is_cuda.__get__: True, _T.is_cpu.__get__: False}
_DEVICE = _T.device.__get__
_GRAD = _T.grad.__get__
_DATA = {_T.data.__set__, _T.grad.__set__}
_MOVES = {_T.to, _T.cpu, _T.cuda}
_HOST = {_T.numpy, _T.__array__}
_CROSSING = {_T.copy_, _T.type_as, _T.__setitem__, _T.__getitem__, torch._has_compatible_shallow_copy_type}


def is_there(tensor: Tensor) -> bool:
    """Whether the tensor is on the pretended GPU."""
    return hasattr(tensor.untyped_storage(), "is_pretended")


_waits: list[list[str]] = []  # of `waits`, one inside the other
_moving = [False]  # while a tensor goes from one device to the other, of which the parts of `to` know nothing
# what torch.cuda.set_sync_debug_mode finds: a number that the host reads, and a result whose size the host must know
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "repeat_interleave"}


class _Waits(TorchDispatchMode):
    """Sees the operations that others are made of, and those of the backward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
        there = any(is_there(tensor) for tensor in tensors)
        name = func.name().partition(".")[0].removeprefix("aten::")
        if there and (name in _WAITING or name in {"index", "index_put_"} and _needs_host(args[1])):
            _saw(name)
        result = func(*args, **(kwargs or {}))
        return _marked(result, tensors) if there and not _moving[0] else result


def _needs_host(indices: Any) -> bool:
    """Whether an index is of bools, which a GPU first turns into numbers, or lies on the CPU."""
    found = [index for index in indices if isinstance(index, Tensor)]
    return any(index.dtype in {torch.bool, torch.uint8} or index.dim() and not is_there(index) for index in found)


def _saw(what: str) -> None:
    for found in _waits:
        found.append(what)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Inside `gpu`: what makes the host wait for the GPU, as it happens."""
    found: list[str] = []
    _waits.append(found)
    try:
        with _Waits():
            yield found
    finally:
        _waits.remove(found)


class PretendedGPU(TorchFunctionMode):
    """Marks what is on the GPU and refuses what a real one refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
        there = [tensor for tensor in tensors if is_there(tensor)]
        if func is _T.register_post_accumulate_grad_hook:
            return func(args[0], self._inside(args[1]))
        if func is _T.__deepcopy__:
            return _marked(func(*args, **kwargs), []) if there else func(*args, **kwargs)
        if there and func in _HOST and args[0] is there[0]:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if there and func is _T.tolist:
            _saw("tolist")
        if func in _ANSWERS and there:
            return _ANSWERS[func]
        if func == _DEVICE:
            return GPU if there else func(*args, **kwargs)
        if func in _MOVES:
            _moving[0] = True
            try:
                return _moved(func, args, kwargs)
            finally:
                _moving[0] = False
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "cuda":
            _require_generator(kwargs)
            if func in {torch.tensor, torch.as_tensor} and not there:
                _saw(f"{func.__name__} from the host")
            return _marked(func(*args, **{**kwargs, "device": CPU}), [])
        if there and kwargs.get("generator") is not None and target is None:
            _require_generator(kwargs)
        if there and func not in _DATA:
            _require_one_device(func, args, tensors)
        if func in {_T.copy_, _T.__setitem__} and len({is_there(t) for t in tensors if t.dim()}) > 1:
            if func is not _T.copy_ or not (kwargs.get("non_blocking") or args[2:] and args[2]):
                _saw(f"{func.__name__} across devices")
        result = func(*args, **kwargs)
        if func == _GRAD or target is None and func not in _CROSSING and func not in _DATA:
            return _marked(result, tensors if func != _GRAD else []) if there else result
        if func is _T.__getitem__:
            return _marked(result, tensors) if is_there(args[0]) else result
        return result

    def _inside(self, hook: Any) -> Any:
        """The hook, under this mode: backward passes run their hooks without any."""

        def with_mode(parameter: Tensor) -> Any:
            with self:
                return hook(parameter)

        return with_mode


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, target, rest = args[0], None, []
    for value in (*args[1:], kwargs.pop("device", None), kwargs.pop("other", None)):
        if isinstance(value, Tensor):
            target = GPU if is_there(value) else CPU
            rest.append(value.dtype)
        elif isinstance(value, (str, torch.device)):
            target = torch.device(value)
        elif isinstance(value, torch.dtype):
            rest.append(value)
    if func is not _T.to:
        target, rest = (GPU if func is _T.cuda else CPU), []
    if target is None:
        result = func(tensor, *rest, **kwargs)
        return _marked(result, []) if is_there(tensor) else result
    if target.type not in {"cuda", "cpu"}:
        return func(tensor, *args[1:], **kwargs)
    result = _T.to(tensor, *rest, **kwargs)
    if (target.type == "cuda") != is_there(tensor) and not kwargs.get("non_blocking"):
        _saw(f"copy to {target.type}")
    if (target.type == "cuda") == is_there(tensor):
        return _marked(result, []) if is_there(tensor) else result
    result = result.clone() if result.untyped_storage() is tensor.untyped_storage() else result
    return _marked(result, []) if target.type == "cuda" else result


def _marked(result: Any, inputs: list[Tensor]) -> Any:
    """The result, marked as being on the GPU, except where it is one of the inputs of the CPU."""
    old = {tensor.untyped_storage()._cdata for tensor in inputs}
    for tensor in tree_iter(result):
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                storage.is_pretended = True  # pyright: ignore[reportAttributeAccessIssue]
    return result


def _require_one_device(func: Any, args: Any, tensors: list[Tensor]) -> None:
    strangers = [tensor for tensor in tensors if not is_there(tensor) and tensor.dim()]
    if not strangers or func in {_T.copy_, _T.type_as, torch._has_compatible_shallow_copy_type}:
        return
    if func is _T.__getitem__ and not any(is_there(i) and i.dim() for i in tree_iter(args[1]) if isinstance(i, Tensor)):
        return  # an index without dimensions is read as a number
    if func in {_T.__getitem__, _T.__setitem__} and is_there(args[0]):
        part = not any(isinstance(i, Tensor) and i.dim() for i in tree_iter(args[1]))
        if part or func is _T.__getitem__ or not any(args[2] is tensor for tensor in strangers):
            return
    if func is _T.__setitem__ and not any(is_there(i) and i.dim() for i in tree_iter(args[1]) if isinstance(i, Tensor)):
        return  # copies to a part of a CPU tensor
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
        f"(in {getattr(func, '__name__', func)})"
    )


def _require_generator(kwargs: dict[str, Any]) -> None:
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def graphed(module: torch.nn.Module, samples: tuple[Tensor, ...], *, allow_unused_input: bool = False) -> Any:
    """What torch.cuda.make_graphed_callables returns, with the hazards of graphs: inputs, outputs and gradients of all
    replays are in the same memory, and buffers change while the graphs are made."""
    compute, parameters = module.forward, [p for p in module.parameters() if p.requires_grad]
    for _ in range(3):
        kept = [compute(*samples).detach().clone()]
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    graphs: list[Tensor] = []

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            for sample, given in zip(samples, inputs, strict=False):
                sample.copy_(given)
            with torch.enable_grad():
                graphs[:] = [compute(*samples)]
            kept[0].copy_(graphs[0].detach())
            return kept[0].detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            found = torch.autograd.grad(graphs[0], parameters, gradient, allow_unused=True, retain_graph=True)
            for own, new in zip(gradients, found, strict=True):
                own.copy_(torch.zeros_like(own) if new is None else new)
            return (*(None for _ in samples), *(own.detach() for own in gradients))

    module.forward = lambda *inputs: Graphed.apply(*inputs, *parameters)
    return module


@contextmanager
def gpu(*, has_bf16: bool = True, free: int = 10**12, graphs: bool = False) -> Iterator[None]:
    """Inside, the machine has one GPU, as far as `erase.device`, accelerate and tensors say.

    free: bytes of memory that it says it has left. graphs: whether it has CUDA graphs, see `graphed`.
    """
    autocast = torch.autocast

    def on_cpu(device_type: str, *arguments: Any, **options: Any) -> Any:
        return autocast("cpu", *arguments, **options)

    with (
        mock.patch.object(device, "num_gpus", lambda: 1),
        mock.patch.object(device, "has_bf16", lambda found: has_bf16),
        mock.patch.object(device, "free_memory", lambda where: free if where.type == "cuda" else 0),
        mock.patch.object(device, "use_gpu", lambda index: None),
        mock.patch.object(device, "gpu_name", lambda found: "pretended GPU"),
        mock.patch.object(device, "has_kernels", lambda found: os.environ.get("TRITON_INTERPRET") == "1"),
        mock.patch.object(device, "has_graphs", lambda found: graphs),
        mock.patch.object(torch.cuda, "make_graphed_callables", graphed),
        mock.patch.object(device, "pinned", torch.clone),
        mock.patch.object(PartialState, "default_device", GPU),
        mock.patch.dict(PartialState._shared_state),
        mock.patch.dict(AcceleratorState._shared_state),
        mock.patch.object(torch, "autocast", on_cpu),
        PretendedGPU(),
    ):
        yield
