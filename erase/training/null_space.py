"""Changes of keys and values that leave those of retained prompts as they are: the option --null-space."""

from collections.abc import Mapping

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.families.protocol import Family
from erase.methods.inputs import Text
from erase.methods.null_space import null_projector


class NullSpace:
    """Makes every change D of a text map W to D P, so that (W + D P) r = W r for the retained text states r.

    P is SPEED's projector (Li et al., ICLR 2026): onto the eigenvectors of R = mean r r^T with eigenvalues below
    `threshold`, r all tokens of the retain prompts and of the empty prompt. It is applied to the change and not to the
    gradient, because Adam scales each weight of a gradient by a factor of its own.
    P mixes the weights of a row (one output of W), so a row changes only if the mask holds all of it; a row of which
    the mask holds some weights stays as it is.

    rank, of: dimensions of the null space and of the text states.

    Raises:
        EraseError: no weight could change: the scope has no text map, the mask no whole row of one, or the null space
            no direction; or there is no retain prompt.
    """

    def __init__(
        self,
        model: Family,
        text: Text,
        threshold: float,
        parameters: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None,
    ):
        names = text_maps(model, parameters)
        if not len(text.retain):
            raise EraseError("--null-space needs retain prompts; give --retain PROMPT")
        r = torch.cat([text.kept("all"), text.empty[0].double().T], dim=1)
        P = null_projector(r, threshold)
        self.rank, self.of = int(P.trace().round()), len(P)
        if not self.rank:
            raise EraseError(
                f"--null-space {threshold:g} leaves no direction: the retained prompts fill all {self.of} dimensions "
                "of the text states; raise it (SPEED uses 0.1), or retain fewer prompts"
            )
        self._P = P.to(model.device, torch.float32 if model.device.type == "mps" else torch.float64)
        self._names = names
        if mask is not None and not any(mask[name].all(dim=1).any() for name in names):
            raise EraseError(
                "--null-space changes whole rows of keys and values, and the mask has none; use --mask none"
            )
        self._places = None  # of the weights in whole rows among the masked ones of all text maps; None: all of them
        if mask is not None and not all(mask[name].all() for name in names):
            counted = torch.cat([_in_whole_rows(mask[name]) for name in names])
            self._places = counted.nonzero()[:, 0].to(model.device)

    def project(self, moved: Mapping[str, Tensor]) -> None:
        """Replace every change by its projection, in place. moved: by parameter, [masked weights]."""
        changes = [moved[name] for name in self._names]
        every = torch.cat(changes)
        rows = every if self._places is None else every[self._places]
        kept = (rows.view(-1, self.of).to(self._P) @ self._P).reshape(-1).to(every)
        every = kept if self._places is None else torch.zeros_like(every).index_copy_(0, self._places, kept)
        torch._foreach_copy_(changes, every.split([len(change) for change in changes]))


def text_maps(model: Family, parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the text maps among the parameters.

    Raises:
        EraseError: there is none.
    """
    names = [name for name in parameters if model.is_text_map(name)]
    if not names:
        raise EraseError("--null-space is about keys and values of cross-attention, and the scope has none")
    return names


def _in_whole_rows(mask: Tensor) -> Tensor:
    """bool, [masked weights]: whether each is in a row of which the mask has all."""
    return mask.all(dim=1).repeat_interleave(mask.sum(dim=1))


def by_rows(model: Family, scores: Mapping[str, Tensor]) -> None:
    """Give every weight of a row of a text map the row's mean score, in place, so that a mask takes whole rows.

    At most one row of them all is cut, where the number of ones is reached.
    """
    for name, score in scores.items():
        if model.is_text_map(name):
            score.copy_(score.mean(dim=1, keepdim=True).expand_as(score))
