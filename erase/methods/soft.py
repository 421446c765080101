"""SalUn-soft (Fan et al., ICLR 2024): no mask chosen before, a proximal step pulls most weights back to the base."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from erase.masks import threshold
from erase.methods.relabel import Relabel


@dataclass(frozen=True)
class Soft(Relabel):
    """Relabel's loss; after each step D = theta - theta_o becomes sign(D) max(|D| - tau, 0), elementwise.

    tau is the z-th smallest |D| of the n weights that may change, z = share * n. The share falls linearly from `kept`
    to `kept_at_end`. So the l1 penalty that the proximal step minimises has the weight that leaves this share of the
    weights exactly as in the base.

    kept: share of weights put back to the base in the beginning, beta in the authors' code.
    kept_at_end: the same after the last step. Their schedule falls epoch by epoch and ends near 0.18 beta, which is
        this default; at 0 the last steps would change every weight, and the result would not be sparse.

    Differs from their code, which counts the 207 million zeros of the VAE and the text encoder among the smallest, so
    that with beta 0.5 most of its steps shrink nothing from the end of the fourth epoch on.
    Costs: Relabel's passes and a selection over all weights per step. Known weakness: as Relabel; Adam's moments are
    not shrunk, so a weight that was put back changes again with its old momentum.
    """

    kept: float = 0.5
    kept_at_end: float = 0.09

    @property
    def needs_base(self) -> bool:
        return True

    def shrink(self, moved: Mapping[str, Tensor], step: int, num_steps: int) -> None:
        """The proximal step on how far each weight is from the base, in place."""
        total = sum(tensor.numel() for tensor in moved.values())
        z = int(share_to_restore(self, step, num_steps) * total)
        if z == 0:
            return
        tau = threshold({name: tensor.abs() for name, tensor in moved.items()}, total - z + 1)
        for tensor in moved.values():
            tensor.copy_(tensor.sign() * (tensor.abs() - tau).clamp(min=0))


def share_to_restore(method: Soft, step: int, num_steps: int) -> float:
    """The share of the weights that the proximal step puts back to the base after this step, counted from 0."""
    left = (num_steps - step - 1) / num_steps
    return method.kept * left + method.kept_at_end * (1 - left)
