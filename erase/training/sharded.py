"""A network divided among processes by torch's FSDP2 (`fully_shard`): each holds some rows of every weight."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from erase import masks
from erase.families.protocol import Family

SMALLEST = 1 / 128  # share of the network's weights that a group gathered together has at least


class Rows(Parameter):
    """This process's rows of a divided weight, as a parameter of its own that shares their memory.

    Its gradient is the mean over all processes. A hook runs when a backward pass has added to it, as for any parameter.
    """

    whole: Parameter

    @classmethod
    def of(cls, whole: Any) -> "Rows":
        """The rows of a parameter that `fully_shard` has divided."""
        rows = cls(whole.to_local().detach(), requires_grad=False)
        rows.whole = whole
        whole.register_post_accumulate_grad_hook(rows._receive)  # before any other hook
        return rows

    def _receive(self, whole: Any) -> None:
        found: Tensor = whole.grad.to_local()
        whole.grad = None
        self.grad = found if self.grad is None else self.grad + found

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> Any:
        return self.whole.register_post_accumulate_grad_hook(lambda _: hook(self))


class Shards:
    """The divided weights of a model's network, until `merge`.

    While they are divided all processes must pass the network equally often, forwards and backwards, because each pass
    gathers the weights group by group and reduces their gradients. Optimizers, scores and exchanges see rows only, and
    may change them between passes.

    parameters: rows of the parameters in the scope, by name; [rows, ...] of the [n, ...] of the whole.
    """

    def __init__(self, model: Family, scope: Mapping[str, Parameter], where: torch.device):
        """Divide the weights, in float32; they come to the device group by group.

        scope: the parameters that take gradients, by name. Each keeps its shape, but no content.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.rank, self._world, self._where = dist.get_rank(), dist.get_world_size(), where
        network: Any = model.network
        self._model = model
        network.to(torch.device("cpu"))
        if network.dtype != torch.float32:
            model.reload_network()
        before = dict(network.named_parameters())
        for name, parameter in before.items():
            parameter.requires_grad_(name in scope)
        mesh = init_device_mesh(where.type, (self._world,))
        for module in list(_groups(network)):  # all chosen before the first one's parameters are replaced
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for parameter in before.values():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
        self._shapes = {name: tuple(before[name].shape) for name in scope}
        after = dict(network.named_parameters())
        self.parameters = {name: Rows.of(after[name]) for name in scope}

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, which have one shape, [processes, ...]."""
        own = tensor.to(self._where)
        found = [torch.empty_like(own) for _ in range(self._world)]
        dist.all_gather(found, own.contiguous())
        return torch.stack(found).to(tensor.device)

    def rows(self, mask: Mapping[str, Tensor]) -> masks.Packed:
        """This process's part of a mask."""
        bits: dict[str, Tensor] = {}
        for name, own in self.parameters.items():
            start = self.rank * self._most(name)
            bits |= masks.pack({name: mask[name][start : start + len(own)]}).bits
        return masks.Packed(bits, {name: tuple(own.shape) for name, own in self.parameters.items()})

    def whole(self, rows: Mapping[str, Tensor]) -> masks.Packed:
        """The mask that consists of all processes' parts, which are `rows` here."""
        bits: dict[str, Tensor] = {}
        for name, shape in self._shapes.items():
            padded = torch.zeros((self._most(name), *shape[1:]), dtype=torch.uint8)
            padded[: len(rows[name])] = rows[name].to(torch.uint8)
            bits |= masks.pack({name: self.gathered(padded).flatten(0, 1)[: shape[0]].bool()}).bits
        return masks.Packed(bits, self._shapes)

    def merge(self) -> None:
        """Give the model of the first process its whole network again, on the CPU; the others' stays divided."""
        network: Any = self._model.stored_network().eval().requires_grad_(False) if self.rank == 0 else None
        weights = dict(network.named_parameters()) if network is not None else {}
        divided: Any
        for name, divided in self._model.network.named_parameters():
            whole = divided.detach().full_tensor()
            if network is not None:
                weights[name].data.copy_(whole)
        if network is not None:
            setattr(self._model, self._model.part, network)

    def _most(self, name: str) -> int:
        """Rows of a weight that a process holds, unless it holds the last ones or none."""
        return -(-self._shapes[name][0] // self._world)


def _groups(network: nn.Module) -> Iterator[nn.Module]:
    """Modules whose weights are gathered together, inner ones first, the network itself last.

    They are items of lists, such as blocks, which are called as modules; small ones join their parent's. A single layer
    is no group: it may return a view, whose gradient FSDP would miss after a change in place.
    """
    least = sum(parameter.numel() for parameter in network.parameters()) * SMALLEST
    taken: set[Parameter] = set()
    items = [item for module in network.modules() if isinstance(module, nn.ModuleList) for item in module]
    for item in reversed(items):  # `modules` has parents before their children
        if not list(item.children()):
            continue
        rest = [parameter for parameter in item.parameters() if parameter not in taken]
        if sum(parameter.numel() for parameter in rest) >= least:
            taken.update(rest)
            yield item
    yield network
