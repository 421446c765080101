"""Whether a CLIP tokenizer's files are whole: the library loads damaged ones, and they encode other prompts.

The vocabulary of byte pair encoding is made in order: first the letters (bytes), then the letters that end a word, then
one token for each merge. So the merges tell which tokens there are and in what order, and a change in one shows.
"""

import json
from pathlib import Path
from typing import Any

from transformers import CLIPTextModel, CLIPTokenizer

from erase.errors import EraseError
from erase.families.components import one_line
from erase.files import text_hash

_END = "</w>"
_OF_THE_LAST_CALL = {"truncation", "padding"}  # what a tokenizer remembers; no part of its content
_WORDS = "a photo of a red circle, 12 churches"


def load(folder: Path, text_encoder: CLIPTextModel) -> CLIPTokenizer:
    """The tokenizer of a pipeline's folder `tokenizer`, checked against itself and the text encoder.

    Without its files transformers makes a tokenizer of two tokens, and does not say so.

    Raises:
        EraseError: its files are missing or damaged, or disagree with each other or with the text encoder.
    """
    if not folder.is_dir():
        raise EraseError(
            f"{folder} is missing; give the folder of a whole Stable Diffusion pipeline, or download it again"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise EraseError(f"cannot load {folder}: {one_line(error)}; download it again") from error
    vocabulary, positions = text_encoder.config.vocab_size, text_encoder.config.max_position_embeddings
    if len(tokenizer) != vocabulary:
        raise EraseError(
            f"{folder} has {len(tokenizer)} tokens but the text encoder {vocabulary}; "
            "its files are missing or broken, download the model again"
        )
    length = tokenizer.model_max_length
    if not isinstance(length, int) or length != positions:
        raise EraseError(
            f"{folder} cuts prompts at {length!r:.40} tokens but the text encoder reads {positions}; "
            "model_max_length in its tokenizer_config.json is missing or broken, download the model again"
        )
    problem = _problem(folder, tokenizer)
    if problem:
        raise EraseError(f"{folder} is damaged: {problem}; download the model again")
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what the tokenizer does, whichever files it came from."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return text_hash({name: value for name, value in content.items() if name not in _OF_THE_LAST_CALL})


def _problem(folder: Path, tokenizer: CLIPTokenizer) -> str | None:
    backend: Any = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    words: dict[str, int] = model["vocab"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return (
        _bad_tokens(words, tokenizer)
        or _bad_merges(words, merges, {str(tokenizer.bos_token), str(tokenizer.eos_token)})
        or _bad_files(folder, words, merges)
        or _bad_round_trip(tokenizer)
    )


def _bad_tokens(words: dict[str, int], tokenizer: CLIPTokenizer) -> str | None:
    if (tokenizer.bos_token, tokenizer.eos_token) != ("<|startoftext|>", "<|endoftext|>"):
        return f"prompts start with {tokenizer.bos_token!r:.30} and end with {tokenizer.eos_token!r:.30}"
    if tokenizer.pad_token is None:
        return "it has no token to pad with"
    for name in ("padding_side", "truncation_side"):
        if getattr(tokenizer, name) != "right":
            return f"{name} in its tokenizer_config.json is {getattr(tokenizer, name)!r:.30}; CLIP's is 'right'"
    ids = sorted({*words.values(), *tokenizer.get_vocab().values()})
    if ids != list(range(len(tokenizer))) or len(set(words.values())) != len(words):
        return f"its {len(tokenizer)} tokens are not numbered 0 to {len(tokenizer) - 1}"
    for token in ("<|startoftext|>", "<|endoftext|>"):
        if token not in words:
            return f"its vocabulary lacks {token!r}"
    return None


def _bad_merges(words: dict[str, int], merges: list[tuple[str, ...]], special: set[str]) -> str | None:
    made: dict[str, None] = {}
    for number, pair in enumerate(merges):
        joined = "".join(pair)
        for word in (*pair, joined):
            if word not in words:
                return f"merge {number + 1} ({' '.join(pair)!r:.60}) needs {word!r:.60}, which is not in its vocabulary"
        made.setdefault(joined)
    letters = sorted(word for word in words if len(word) == 1)
    ends = sorted(word for word in words if len(word) == 1 + len(_END) and word.endswith(_END) and word not in made)
    for kind, ordered in (("letters", letters), ("last letters", ends), ("merged tokens", list(made))):
        ids = [words[word] for word in ordered]
        if ids != sorted(ids):
            return f"its {kind} are not numbered in their order"
    for word in words:
        if len(word.removesuffix(_END)) > 1 and word not in made and word not in special:
            return f"no merge makes {word!r:.60}, which is in its vocabulary"
    return None


def _bad_files(folder: Path, words: dict[str, int], merges: list[tuple[str, ...]]) -> str | None:
    """What is loaded comes from tokenizer.json, or from the older two files; older libraries read the latter."""
    vocab, lines = folder / "vocab.json", folder / "merges.txt"
    try:
        if vocab.is_file() and json.loads(vocab.read_text(encoding="utf-8")) != words:
            return "vocab.json and tokenizer.json hold different vocabularies"
        if lines.is_file():
            stored = [line.rstrip("\r") for line in lines.read_text(encoding="utf-8").split("\n")]
            if [tuple(line.split(" ")) for line in stored if line and not line.startswith("#version")] != merges:
                return "merges.txt and tokenizer.json hold different merges"
    except (OSError, ValueError) as error:
        return f"a file cannot be read ({one_line(error)})"
    return None


def _bad_round_trip(tokenizer: CLIPTokenizer) -> str | None:
    ids: Any = tokenizer(_WORDS)["input_ids"]
    same: Any = tokenizer(_WORDS.upper())["input_ids"]
    text = str(tokenizer.decode(ids[1:-1])).replace(" ", "")
    if ids[0] != tokenizer.bos_token_id or ids[-1] != tokenizer.eos_token_id or text != _WORDS.replace(" ", ""):
        return f"it reads {_WORDS!r} as {text!r:.60}"
    return "it tells upper from lower case, which CLIP does not" if same != ids else None
