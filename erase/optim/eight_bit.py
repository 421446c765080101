"""Adam's moments in 8 bits, with bitsandbytes' kernels."""

from collections.abc import Mapping
from typing import Any

import torch

from erase.errors import missing

MOMENTS = ("exp_avg", "exp_avg_sq")


class EightBit:
    """Moments as one byte each in the state, with a float32 scale for every 256 of them under `name + "_scale"`."""

    BLOCK = 256

    def __init__(self) -> None:
        try:
            from bitsandbytes import functional
        except ImportError as error:
            raise missing("bitsandbytes") from error
        self._functional: Any = functional
        # the second moment is never negative, and needs no sign
        self._codes = {name: functional.create_dynamic_map(signed=name == "exp_avg") for name in MOMENTS}

    def read(self, state: Mapping[str, Any], name: str) -> torch.Tensor:
        """float32, [masked weights]."""
        code = self._codes[name].to(state[name].device)
        return self._functional.dequantize_blockwise(
            state[name], absmax=state[f"{name}_scale"], code=code, blocksize=self.BLOCK
        )

    def write(self, state: dict[str, Any], name: str, moment: torch.Tensor, halt: torch.Tensor | None = None) -> None:
        """halt: while it is not 0, the state stays bit for bit; reading and writing alone can move a scale."""
        code = self._codes[name].to(moment.device)
        packed, how = self._functional.quantize_blockwise(moment, code=code, blocksize=self.BLOCK)
        for key, new in ((name, packed), (f"{name}_scale", how.absmax)):
            state[key] = new if halt is None else torch.where(halt == 0, new, state[key])
