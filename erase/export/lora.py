"""A run's result as a LoRA, exact or approximated by its largest singular values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from erase.delta import State
from erase.errors import EraseError
from erase.families.layers import fits_lora
from erase.tensor_files import write_tensors


@dataclass(frozen=True)
class LoraFit:
    """What a LoRA carries of a change.

    residuals: of each layer in it, the share (0 to 1, Frobenius norm) of its change that the rank cannot hold.
    left_out: share (0 to 1) of the changed weights that are in no such layer: convolutions, norms, biases, embeddings.
    """

    residuals: dict[str, float]
    left_out: float

    def summary(self) -> str:
        """One line about both."""
        shares = sorted(self.residuals.values())
        least, middle, most = shares[0], median(shares), shares[-1]
        layers = f"{len(shares)} layer{'s' if len(shares) > 1 else ''}"
        return (
            f"{layers}, of whose change the rank cannot hold {least:.1%} to {most:.1%} "
            f"(median {middle:.1%}); {self.left_out:.1%} of the changed weights are in no such layer"
        )


def save_lora(
    path: str | Path,
    base_state: State,
    new_state: State,
    *,
    rank: int,
    names: Mapping[str, str],
    labels: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> LoraFit:
    """Write the change of the UNet's attention and feed-forward layers as a LoRA of this rank, as kohya's trainer does.

    Each layer has `lora_down` [rank, n], `lora_up` [m, rank] and `alpha`, which is the rank: the change is up @ down.

    Each layer gets the best approximation of its change (Eckart and Young 1936). A masked fine-tune is not of low rank:
    read the residuals. Users can leave out a LoRA, so it is no protection.

    path: diffusers looks for `pytorch_lora_weights.safetensors` in a folder.
    base_state, new_state: weights of the UNet, named as diffusers names them, without a prefix.
    names: of the layers in the file, see `Family.lora_names`. labels: of the header, for the software that loads it.
    provenance: JSON-serialisable; goes into the header.

    Raises:
        EraseError: no such layer changed, or rank is below 1.
    """
    if rank < 1:
        raise EraseError(f"rank must be at least 1, not {rank}")
    factors: dict[str, Tensor] = {}
    residuals: dict[str, float] = {}
    changed = {name: int((new_state[name] != base_state[name]).sum()) for name in base_state}
    for name in (name for name, count in changed.items() if count and fits_lora(name, base_state[name])):
        layer, shape = name.removesuffix(".weight"), base_state[name].shape
        change = (new_state[name].double() - base_state[name].double()).flatten(1)
        up, down = _low_rank(change, rank)
        residuals[layer] = ((change - up @ down).norm() / change.norm()).item()
        factors[f"{names[layer]}.lora_down.weight"] = down.float().reshape(rank, *shape[1:])
        factors[f"{names[layer]}.lora_up.weight"] = up.float().reshape(-1, rank, *shape[2:])
        factors[f"{names[layer]}.alpha"] = torch.tensor(float(rank))
    if not factors:
        raise EraseError("no attention or feed-forward layer changed, so a LoRA has nothing to carry; save the delta")
    made = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    write_tensors(path, factors, provenance, labels={**made, **(labels or {})})
    carried = sum(changed[f"{layer}.weight"] for layer in residuals)
    return LoraFit(residuals, 1 - carried / sum(changed.values()))


def _low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [m, rank] and [rank, n] whose product is the best approximation of `change` [m, n] of that rank.

    The leading singular vectors of the short side are the eigenvectors of its Gram matrix. Factors of fewer dimensions
    are filled up with zeros: loaders that see two ranks in a file without alphas have scaled one of them.
    """
    if change.shape[0] > change.shape[1]:
        up, down = _low_rank(change.T, rank)
        return down.T, up.T
    up = torch.linalg.eigh(change @ change.T).eigenvectors[:, -rank:]
    up = torch.nn.functional.pad(up, (0, rank - up.shape[1]))
    return up, up.T @ change
