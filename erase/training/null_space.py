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
        self._whole = {name: _whole_rows(mask[name]) for name in names} if mask is not None else {}
        self._names = names
        if mask is not None and not any(rows.any() for rows in self._whole.values()):
            raise EraseError(
                "--null-space changes whole rows of keys and values, and the mask has none; use --mask none"
            )
        self._places = {
            name: _places(mask[name], rows).to(model.device)
            for name, rows in self._whole.items()
            if mask is not None and not mask[name].all()
        }

    def project(self, moved: Mapping[str, Tensor]) -> None:
        """Replace every change by its projection, in place. moved: by parameter, [masked weights]."""
        for name in self._names:
            change = moved[name]
            inside = self._places.get(name)
            rows = change if inside is None else change[inside]
            kept = (rows.view(-1, self.of).to(self._P) @ self._P).reshape(-1).to(change)
            if inside is None:
                change.copy_(kept)
            else:
                change.zero_()
                change[inside] = kept


def text_maps(model: Family, parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the text maps among the parameters.

    Raises:
        EraseError: there is none.
    """
    names = [name for name in parameters if model.is_text_map(name)]
    if not names:
        raise EraseError("--null-space is about keys and values of cross-attention, and the scope has none")
    return names


def _whole_rows(mask: Tensor) -> Tensor:
    """bool, [rows]."""
    return mask.all(dim=1)


def _places(mask: Tensor, whole: Tensor) -> Tensor:
    """int64: which of the masked weights, counted in the mask's order, are in whole rows."""
    return whole.repeat_interleave(mask.sum(dim=1)).nonzero()[:, 0]


def by_rows(model: Family, scores: Mapping[str, Tensor]) -> None:
    """Give every weight of a row of a text map the row's mean score, in place, so that a mask takes whole rows.

    At most one row of them all is cut, where the number of ones is reached.
    """
    for name, score in scores.items():
        if model.is_text_map(name):
            score.copy_(score.mean(dim=1, keepdim=True).expand_as(score))
