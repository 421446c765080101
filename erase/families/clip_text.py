"""How prompts reach a network that reads the last hidden states of one CLIP text encoder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from erase.concepts import refusal
from erase.conditioning import Conditioning
from erase.device import place_of, staged
from erase.families.protocol import Family

Put = Callable[[Tensor, Tensor], Tensor]  # tokens and their embeddings, to other embeddings


class ClipText(Family):
    """A family whose prompts one CLIP text encoder reads.

    tokenizer: it pads and cuts every prompt to the length that the text encoder reads.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
        """The text encoder's last hidden states, [len(prompts), tokens, d], on the CPU; see `Family.encode_text`."""
        refusal.refuse(prompts, "prompt")
        states = []
        for start in range(0, len(prompts), batch_size):
            ids = staged(self._padded_tokens(prompts[start : start + batch_size]), place_of(self.text_encoder))
            states.append(self._states_of(ids).cpu())
        return Conditioning(torch.cat(states))

    def _on_device(self, prompts: Sequence[str]) -> Conditioning:
        ids = staged(self._padded_tokens(prompts), place_of(self.text_encoder))
        return Conditioning(self.text_encoder(ids).last_hidden_state)

    def _states_of(self, ids: Tensor, put: Put | None = None) -> Tensor:
        """What predictions are made for, of tokens, int64, [n, tokens]: the last hidden states, [n, tokens, d].

        put: gives other embeddings for the tokens.
        """
        with embedding(self.text_encoder, put):
            return self.text_encoder(ids).last_hidden_state

    def encode_tokens(
        self, tokens: Sequence[Sequence[int]], embeddings: Tensor | None = None, at: Sequence[int] | None = None
    ) -> Conditioning:
        """The text encoder's last hidden states, [n, tokens, d]; see `Family.encode_tokens`."""
        ids = staged(between_ends(tokens, self._padded_tokens([""])[0].tolist()), self.device)
        return Conditioning(self._states_of(ids, None if embeddings is None else replacing(embeddings, at)))

    def text_of(self, tokens: Sequence[int]) -> str:
        text: Any = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def _padded_tokens(self, prompts: Sequence[str], tokenizer: CLIPTokenizer | None = None) -> Tensor:
        """int64, [len(prompts), tokens]."""
        how: dict[str, Any] = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True}
        ids: Any = (tokenizer or self.tokenizer)(list(prompts), return_tensors="pt", **how)["input_ids"]
        return ids

    @property
    def text_encoders(self) -> Sequence[torch.nn.Module]:
        return (self.text_encoder,)

    @property
    def token_embeddings(self) -> Tensor:
        table: Any = self.text_encoder.get_input_embeddings()
        return table.weight

    def encode_with(self, prompts: Sequence[str], token: int, embedding: Tensor) -> Conditioning:
        refusal.refuse(prompts, "prompt")

        def put(ids: Tensor, output: Tensor) -> Tensor:
            return torch.where((ids == token)[..., None], embedding, output)

        return Conditioning(self._states_of(staged(self._padded_tokens(prompts), self.device), put))

    @property
    def max_tokens(self) -> int:
        return self.tokenizer.model_max_length

    def tokens(self, prompt: str) -> list[int]:
        ids: Any = self.tokenizer(prompt, truncation=True, max_length=self.max_tokens)["input_ids"]
        return list(ids[1:-1])

    def all_tokens(self, prompt: str) -> list[int]:
        ids: Any = self.tokenizer(prompt, verbose=False)["input_ids"]
        return list(ids[1:-1])


def between_ends(tokens: Sequence[Sequence[int]], empty: Sequence[int]) -> Tensor:
    """The tokens between start and end, padded and cut as a tokenizer does it, int64, [n, len(empty)].

    empty: what the tokenizer makes of the empty prompt.
    """
    return torch.tensor([[empty[0], *row[: len(empty) - 2], *empty[1:]][: len(empty)] for row in tokens])


def replacing(embeddings: Tensor, at: Sequence[int] | None) -> Put:
    """Other embeddings for the k tokens `at` or, without it, for the first k after the start; see `encode_tokens`."""
    places = 1 + torch.tensor(range(embeddings.shape[1]) if at is None else at)
    return lambda ids, output: output.index_copy(1, staged(places, output.device), embeddings.to(output.dtype))


@contextmanager
def embedding(encoder: Any, put: Put | None) -> Iterator[None]:
    """Inside, the encoder's table of token embeddings answers what `put` makes of its answers."""
    if put is None:
        yield
        return
    hook = encoder.get_input_embeddings().register_forward_hook(lambda _, ids, output: put(ids[0], output))
    try:
        yield
    finally:
        hook.remove()
