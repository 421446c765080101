"""Gradients of the cross-entropy as flat vectors, summed over images or image by image."""

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erase.classification.data import Images
from erase.classification.methods.protocol import Values


def cross_entropy(model: nn.Module, images: Images) -> Tensor:
    return F.cross_entropy(model(images.pixels), images.y)


def gradient_sum(model: nn.Module, batches: Iterable[Images]) -> Tensor:
    """sum_i grad CE(f(x_i), y_i), flat, [weights]."""
    weights = list(model.parameters())
    total = torch.zeros_like(_flat(weights))
    for batch in batches:
        total += len(batch) * _flat(torch.autograd.grad(cross_entropy(model, batch), weights))
    return total


def gradients(model: nn.Module, batches: Iterable[Images]) -> Iterator[Tensor]:
    """grad CE of each batch, flat, [weights]."""
    weights = list(model.parameters())
    for batch in batches:
        yield _flat(torch.autograd.grad(cross_entropy(model, batch), weights))


def by_name(flat: Tensor, named: Mapping[str, Tensor]) -> Values:
    """The parts of a flat tensor in the shapes of the parameters."""
    parts = flat.split([tensor.numel() for tensor in named.values()])
    return {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
