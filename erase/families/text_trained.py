"""Models of which the text encoder is trained and not the UNet: the scopes `text` and `text-first`."""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import ModelMixin
from torch import Tensor
from transformers import CLIPTextModel

from erase.conditioning import Conditioning
from erase.errors import EraseError
from erase.families import components
from erase.families.clip_text import ClipText, Put, embedding
from erase.families.discrete import DiscreteDiffusion

_LAYERS = re.compile(r"encoder\.layers\.")
_FIRST = re.compile(r"encoder\.layers\.0\.(self_attn|mlp)\.")  # without its norms


class TextTrained(ClipText, DiscreteDiffusion):
    """A model whose network, the one that is trained, is its text encoder.

    The conditioning of a prompt is then not the text encoder's states but the embeddings of its tokens, of the same
    shape: a prediction runs the text encoder on them, and the UNet after it. So gradients reach the text encoder, the
    base predicts with its own text encoder, and learned words are embeddings that change nothing else. The table of
    token embeddings and the last norm are in no scope (as in AdvUnlearn's code).
    """

    part = "text_encoder"
    other_parts = ()
    scopes: ClassVar[Mapping[str, Callable[[str], bool]]] = {
        "text": lambda name: bool(_LAYERS.search(name)),
        "text-first": lambda name: bool(_FIRST.search(name)),
    }

    @property
    def denoiser(self) -> ModelMixin:
        return cast(ModelMixin, self.unet)

    def stored_network(self) -> Any:
        return self.read_network(self.folder, allow_pickle=self.allow_pickle)

    @classmethod
    def read_network(
        cls,
        folder: Path,
        *,
        allow_pickle: bool = False,
        weights_file: str | Path | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> Any:
        """The text encoder; `weights_file` is of the UNet, which no caller trains here."""
        return components.load(CLIPTextModel, folder / cls.part, allow_pickle=allow_pickle)

    def predict(self, network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        return super().predict(self.unet, x, t, Conditioning(states_from(network, c.text_states)))

    def _states_of(self, ids: Tensor, put: Put | None = None) -> Tensor:
        """The embeddings of the tokens, [n, tokens, d]."""
        with embedding(self.text_encoder, put):
            return self.text_encoder.get_input_embeddings()(ids)

    def text_attention(self, c: Conditioning) -> Tensor:
        found: list[Tensor] = []
        last: Any = self.network.get_submodule(f"encoder.layers.{self.network.config.num_hidden_layers - 1}.self_attn")
        hook = last.register_forward_hook(lambda _, __, output: found.append(output[0]))
        try:
            states_from(self.network, c.text_states)
        finally:
            hook.remove()
        return found[0]

    def require_text_maps(self) -> None:
        raise EraseError("closed forms change maps of the text states in the UNet; use --scope xattn-kv")

    @classmethod
    def lora_names(cls, folder: Path, weights: Any) -> dict[str, str]:
        return {}

    def reference_names(self) -> dict[str, str]:
        return {}


@functools.cache
def text_trained(cls: Any) -> type[TextTrained]:
    """The class of the models of `cls` when their text encoder is trained."""
    kept = {part: loads for part, loads in cls.loaded_again.items() if part != TextTrained.part}
    data_parts = tuple(part for part in cls.data_parts if part != TextTrained.part)
    own = {"loaded_again": kept, "data_parts": (*data_parts, cls.part), "__module__": cls.__module__}
    return type(f"{cls.__name__}Text", (TextTrained, cls), own)


def states_from(encoder: Any, embeddings: Tensor) -> Tensor:
    """The last hidden states, [n, tokens, d], of token embeddings of the same shape."""
    ids = torch.zeros(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
    with embedding(encoder, lambda _, __: embeddings.to(encoder.dtype)):  # a copy of the base may be rounded
        return encoder(ids).last_hidden_state
