"""The embedded model's tokenizer: CLIP's byte-level BPE with one token per word of the world."""

from collections import Counter
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers import CLIPTokenizer

from erase.mini import world

MAX_TOKENS = 16


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the world is one token; other text is split into bytes."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: Any = _learn_merges(world.WORDS)
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token: the most frequent pair first, ties in alphabetical order.

    Not by the trainer of the library `tokenizers`, which breaks ties differently in every process: token ids, and with
    them the text encoder, would not be reproducible.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for tokens in split for pair in pairwise(tokens)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for tokens in split:
            for i in reversed(range(len(tokens) - 1)):
                if tuple(tokens[i : i + 2]) == best:
                    tokens[i : i + 2] = ["".join(best)]
    return merges


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")[
        "input_ids"
    ]  # pyright: ignore[reportReturnType]
