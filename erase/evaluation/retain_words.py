"""Words that occur with a concept, found by CLIP in images of it: CARE (Kim et al., ICLR 2026).

Retained, they keep what stands beside the concept: beside "nudity" for instance person and skin.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from erase.concepts import Concept, refusal
from erase.concepts.concept import share_word
from erase.errors import EraseError

NEAREST = 50  # words of each image
FREQUENT = 100  # words that are near most images
CLUSTERS = 7
LEAST_LETTERS = 3


def prompt_of(word: str) -> str:
    return f"a photo of {word}"


def candidates(vocabulary: dict[str, int], concept: Concept) -> dict[str, int]:
    """The whole words of a CLIP tokenizer's vocabulary, with their tokens, in the order of the tokens.

    Without the concept's own words, names of it, sexual words of a concept that has to do with nudity, and words that
    may not stand beside it because they involve minors.
    """
    named = (concept.name, *concept.synonyms)
    own = {word for forget, anchor in concept.pairs() for word in _words(forget) - _words(anchor)}

    def may_stand(word: str) -> bool:
        if not (word.isascii() and word.isalpha() and len(word) >= LEAST_LETTERS):
            return False
        if word in own or any(share_word(word, name) for name in named):
            return False
        if concept.is_sexual and refusal.has_sexual_words(word):
            return False
        return not refusal.shows_minors(prompt_of(word), concept.is_sexual)

    ends = {token.removesuffix("</w>"): number for token, number in vocabulary.items() if token.endswith("</w>")}
    return {word: number for word, number in sorted(ends.items(), key=lambda item: item[1]) if may_stand(word)}


def _words(text: str) -> set[str]:
    return set(refusal.plain(text).split())


@torch.inference_mode()
def embed(clip: Any, tokens: Sequence[int], batch_size: int = 512) -> Tensor:
    """Unit vectors of single tokens between start and end, float32, [n, d], by a `Clip`.

    Padding behind the end, which CLIP's causal text encoder does not see, is left out.
    """
    first, last = clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id
    ids = torch.tensor([[first, token, last] for token in tokens])
    parts = (clip.network.get_text_features(input_ids=part.to(clip.device)) for part in ids.split(batch_size))
    return normalize(torch.cat([part.pooler_output.float().cpu() for part in parts]))


def choose(images: Tensor, concept: Tensor, words: Sequence[str], vectors: Tensor, num: int) -> list[str]:
    """The `num` words that are near most images, without those that mean the concept and those that mean nothing.

    Near an image are the 50 words with the largest cosine; the 100 words that are near most images are put into 7
    clusters by k-means, and the clusters whose words lie on average nearest to the concept's span and farthest from it
    are left out. The published code clusters points of t-SNE, and refines the rest by leaving out one word at a time.

    images: [n, d]. concept: [prompts, d], texts of the concept. vectors: [words, d]. All rows are unit vectors.

    Raises:
        EraseError: fewer than `num` words are left.
    """
    near = (images @ vectors.T).topk(min(NEAREST, len(words)), dim=1).indices
    counts = torch.bincount(near.flatten(), minlength=len(words))
    closeness = (images @ vectors.T).mean(0)  # among words that are near equally many images
    order = sorted(range(len(words)), key=lambda word: (-int(counts[word]), -float(closeness[word])))
    frequent = [word for word in order[:FREQUENT] if counts[word]]
    left = [frequent[place] for place in _between(vectors[frequent], concept)]
    if len(left) < num:
        raise EraseError(
            f"only {len(left)} words occur with the concept and are not the concept itself, and {num} are asked for; "
            "give more images, or a smaller --num-words"
        )
    return [words[word] for word in left[:num]]


def _between(vectors: Tensor, concept: Tensor) -> list[int]:
    """Places of the rows that are neither in the cluster nearest to the span of `concept` nor in the farthest one."""
    num = min(CLUSTERS, len(vectors) // 2)
    if num < 3:
        return list(range(len(vectors)))
    basis = torch.linalg.qr(concept.double().T).Q
    residual = (vectors.double() - vectors.double() @ basis @ basis.T).norm(dim=1).numpy()
    labels = _clusters(vectors.double().numpy(), num)
    means = {int(label): float(residual[labels == label].mean()) for label in np.unique(labels)}
    dropped = {min(means, key=means.__getitem__), max(means, key=means.__getitem__)}
    return [place for place, label in enumerate(labels.tolist()) if label not in dropped]


def _clusters(rows: np.ndarray, num: int) -> np.ndarray:
    """The cluster of each row by k-means, the best of twenty starts."""
    from scipy.cluster.vq import kmeans2

    def spread(centres: np.ndarray, labels: np.ndarray) -> float:
        return float(np.square(rows - centres[labels]).sum())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")  # it has no word then
        starts = [kmeans2(rows, num, iter=50, minit="++", rng=np.random.default_rng(seed)) for seed in range(20)]
    return min(starts, key=lambda found: spread(*found))[1]
