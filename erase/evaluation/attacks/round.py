"""Rounded weights, as users store and load models: a small change of the weights can be lost in rounding."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.evaluation.attacks.changed import changed, networks, weights_of
from erase.evaluation.attacks.protocol import Attack, Finding, Given

LEVELS = {"int8": 127, "int4": 7}
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Round(Attack):
    """How weights are rounded.

    kinds: from fine to coarse: fp16, bf16, fp8 (e4m3, without a scale) by a cast; int8, int4 in steps of the largest
        value of an output row. Matrices and kernels are rounded, biases and norms are not.
    """

    about = "the weights of network and text encoders: rounded to int8, fp8 or coarser"
    needs = "nothing: loading the model in a small format is enough"
    unit = "weights"
    limits = ("GGUF and other formats with blocks of weights round in other ways.",)
    is_random = False

    kinds: tuple[str, ...] = ("int8", "fp8")

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in LEVELS and kind not in TYPES]
        if unknown or len(set(self.kinds)) != len(self.kinds) or not self.kinds:
            raise EraseError(f"kinds is {'|'.join(self.kinds)}; choose from {', '.join([*TYPES, *LEVELS])}, each once")

    @property
    def points(self) -> tuple[str, ...]:
        return self.kinds

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        return {kind: Finding(facts={"kind": kind}) for kind in self.kinds}

    @contextmanager
    def attacked(self, given: Given, finding: Finding) -> Generator[None]:
        kind = finding.facts["kind"]
        with ExitStack() as stack:
            for network in networks(given.model):
                new = {name: rounded(weight, kind) for name, weight in weights_of(network).items() if weight.dim() > 1}
                stack.enter_context(changed(network, new))
            yield


def rounded(weight: Tensor, kind: str) -> Tensor:
    """The weight, [rows, ...], with values that the format has."""
    if kind in TYPES:
        return weight.to(TYPES[kind]).to(weight.dtype)
    step = weight.flatten(1).abs().amax(1).clamp(min=1e-30) / LEVELS[kind]
    step = step.view(-1, *[1] * (weight.dim() - 1))
    return (weight / step).round() * step
