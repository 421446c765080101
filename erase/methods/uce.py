"""Unified Concept Editing (Gandikota et al., WACV 2024): one ridge regression on the keys and values of attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from erase.methods.inputs import Text, Tokens
from erase.methods.protocol import ClosedForm
from erase.methods.ridge import ridge


@dataclass(frozen=True)
class UCE(ClosedForm):
    """W' = (lamb W + sum_e s_e W c_a c_e^T + sum_p s_p W c_p c_p^T) A^-1

    with A = lamb I + sum_e s_e c_e c_e^T + sum_p s_p c_p c_p^T, for every W of attn2.to_k and attn2.to_v;
    c_e, c_a, c_p: embeddings to erase, of their anchors and to preserve.
    arXiv:2308.14761; lamb and the scales are those of the authors' code (its first version had lamb 0.1).

    Costs: one solve, no images. Known weakness: with `tokens=last` the end tokens still encode the concept; a learned
    word brings the concept back; outputs of retained tokens change a little if there are more of them than dimensions.
    """

    formula = 2  # 1: version 0.1.0

    lamb: Annotated[float, "penalty on the change of W; a larger one erases less and changes less"] = 0.5
    erase_scale: Annotated[float, "s_e; a larger one maps the concept closer to its anchor"] = 1.0
    preserve_scale: Annotated[float, "s_p; a larger one changes the outputs of retained tokens less"] = 1.0
    tokens: Annotated[Tokens, "which tokens of the forget prompts are mapped to the anchor's"] = "last"
    retain_tokens: Annotated[Tokens, "which tokens of the retain prompts are retained"] = "last"
    keep_empty: Annotated[bool, "retain the empty prompt too, with `last` its start token (ours)"] = False

    def solve(self, weights: Mapping[str, Tensor], text: Text) -> tuple[dict[str, Tensor], dict[str, Any]]:
        c_e, c_a = text.pairs(self.tokens)
        c_p = text.kept(self.retain_tokens)
        if self.keep_empty:
            empty = text.empty[0] if self.retain_tokens != "last" else text.empty[0, :1]
            c_p = torch.cat([c_p, empty.double().T], dim=1)
        D, condition = ridge(self.lamb, (self.erase_scale, c_e, c_a), (self.preserve_scale, c_p, c_p))
        new = {name: W.double() + W.double() @ D for name, W in weights.items()}
        notes = {"condition_number": condition, "forget_tokens": c_e.shape[1], "retain_tokens_kept": c_p.shape[1]}
        return new, notes
