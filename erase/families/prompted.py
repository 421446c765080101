"""The part of a family's contract that is about prompts: tokens, their embeddings, and what the network is given."""
# pyright: strict, reportPrivateImportUsage=false

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from erase.conditioning import Conditioning
from erase.errors import EraseError


@dataclass(frozen=True)
class TokenRun:
    """Tokens of a prompt in one part of the text states, which are those of one text encoder.

    begin, stop: the part's places in the states. first: the place of the first of `tokens`, behind a start token if the
        encoder has one. tokens: those of the prompt, without start and end.
    """

    begin: int
    first: int
    stop: int
    tokens: list[int]

    @property
    def last(self) -> int:
        """The place of the prompt's last token; where the part begins if it has none."""
        return max(self.begin, self.first + len(self.tokens) - 1)


class Prompted(ABC):
    """How prompts reach a model of one architecture; a part of `erase.families.protocol.Family`."""

    family: ClassVar[str] = ""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Tokens that the text encoder reads, start and end included: the length of its states."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, one row each, on the CPU.

        Raises:
            EraseError: a prompt shows minors in a sexual context.
        """

    def unconditional(self, empty: Conditioning | None = None) -> Conditioning:
        """The single row that guidance starts from: by default that of the empty prompt.

        empty: the conditioning of the empty prompt, one row, if it is encoded already.
        """
        return self.encode_text([""]) if empty is None else empty

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """The networks of `encode_text`; loaded again if they were released."""
        return ()

    @property
    def token_embeddings(self) -> Tensor:
        """The text encoder's embedding of each token, [vocabulary, d]; of several encoders side by side.

        Raises:
            EraseError: this architecture has no single table of them.
        """
        raise EraseError(f"{self.family} has no table of token embeddings; choose one that learns no words")

    @property
    def class_vectors(self) -> Parameter:
        """The network's embedding of each class label, [classes + 1, d]; the last row is the null class of guidance.

        Raises:
            EraseError: the model has no class labels.
        """
        raise EraseError(f"{self.family} takes text and has no class labels; choose an attack on prompts or weights")

    def set_token(self, token: int, embedding: Tensor) -> None:
        """Let the text encoder know the token by this embedding, [d], from here on; see `token_embeddings`."""
        with torch.no_grad():
            self.token_embeddings[token] = embedding

    def encode_with(self, prompts: Sequence[str], token: int, embedding: Tensor) -> Conditioning:
        """Conditioning of the prompts where one token has another embedding, [d], with gradients, on the device.

        Raises:
            EraseError: see `token_embeddings`; or a prompt shows minors in a sexual context.
        """
        raise EraseError(f"{self.family} has no table of token embeddings; choose one that learns no words")

    def encode_tokens(
        self, tokens: Sequence[Sequence[int]], embeddings: Tensor | None = None, at: Sequence[int] | None = None
    ) -> Conditioning:
        """Conditioning of texts that are given as tokens, one row each, with gradients, on the device.

        tokens: the numbers between start and end, as many as the text encoder reads; further ones are cut off.
        embeddings: [n, k, d], in place of those of the first k tokens, or of the k tokens `at`, counted from 0.

        Raises:
            EraseError: see `token_embeddings`.
        """
        raise EraseError(f"{self.family} has no table of token embeddings; choose one that learns no words")

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of these tokens; its own tokens may be others.

        Raises:
            EraseError: see `token_embeddings`.
        """
        raise EraseError(f"{self.family} has no table of token embeddings; choose one that learns no words")

    @abstractmethod
    def tokens(self, prompt: str) -> list[int]:
        """Numbers of the prompt's tokens between start and end, as far as the text encoder reads them."""

    @abstractmethod
    def all_tokens(self, prompt: str) -> list[int]:
        """As `tokens`, with those behind the text encoder's limit, which it never sees."""

    def token_runs(self, prompt: str) -> list[TokenRun]:
        """The prompt's tokens in each part of the text states that a text encoder of its own made."""
        return [TokenRun(0, 1, self.max_tokens, self.tokens(prompt))]

    def truncates(self, prompt: str) -> bool:
        """Whether the prompt is longer than the text encoder reads."""
        return len(self.all_tokens(prompt)) > self.max_tokens - 2
