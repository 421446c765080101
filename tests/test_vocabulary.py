"""Laws of a tokenizer's files: whatever would encode other prompts is seen before anything is trained or written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loaded import load_sd

from erase.errors import EraseError
from erase.families import loading, vocabulary


@pytest.fixture(scope="module")
def text_encoder() -> Any:
    return load_sd("mini").text_encoder


@pytest.fixture(params=["both", "older files", "tokenizer.json"])
def folder(request, tmp_path) -> Path:
    """The embedded model's tokenizer, 195 merges, in the files of transformers 4, of 5, or of both."""
    found = Path(shutil.copytree(loading.MINI_DIR / "tokenizer", tmp_path / "tokenizer"))
    if request.param == "older files":
        (found / "tokenizer.json").unlink()
    if request.param == "tokenizer.json":
        (found / "vocab.json").unlink()
        (found / "merges.txt").unlink()
    return found


def edit(folder: Path, change: Callable[[dict[str, int], list[list[str]]], Any]) -> None:
    """Change vocabulary and merges in whatever files there are."""
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            if name == "tokenizer.json":
                model = content["model"]
                model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
                change(model["vocab"], model["merges"])
            else:
                lines = (folder / "merges.txt").read_text().splitlines()
                merges = [line.split(" ") for line in lines[1:]]
                change(content, merges)
                (folder / "merges.txt").write_text("\n".join([lines[0], *(" ".join(pair) for pair in merges)]) + "\n")
            (folder / name).write_text(json.dumps(content))


def swap(words: dict[str, int], one: str, other: str) -> None:
    words[one], words[other] = words[other], words[one]


DAMAGES: dict[str, Callable[[dict[str, int], list[list[str]]], Any]] = {
    "two merged tokens swapped": lambda words, merges: swap(words, "in", "le</w>"),
    "two letters swapped": lambda words, merges: swap(words, "a", "z"),
    "two last letters swapped": lambda words, merges: swap(words, "a</w>", "z</w>"),
    "a letter and a token swapped": lambda words, merges: swap(words, "a", "in"),
    "two merges swapped": lambda words, merges: merges.insert(0, merges.pop(1)),
    "a merge less": lambda words, merges: merges.pop(40),
    "half of the merges": lambda words, merges: merges.__delitem__(slice(90, None)),
    "no merges": lambda words, merges: merges.clear(),
    "a merge of nothing": lambda words, merges: merges.append(["q", "q"]),
    "a number twice": lambda words, merges: words.update({"in": words["le</w>"]}),
    "a gap": lambda words, merges: words.update({"in": 5000}),
    "another word": lambda words, merges: words.update({"zzz": words.pop("in")}),
    "the start swapped": lambda words, merges: swap(words, "<|startoftext|>", "in"),
}


def test_the_whole_tokenizer_loads_from_any_of_its_files(folder, text_encoder):
    tokenizer = vocabulary.load(folder, text_encoder)
    edit(folder, lambda words, merges: None)  # control: written again as it was
    again = vocabulary.load(folder, text_encoder)
    expected: Any = tokenizer("a red circle")["input_ids"]
    assert again("a red circle")["input_ids"] == expected and len(expected) > 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_vocabulary_is_refused(damage, folder, text_encoder):
    """The merges tell which tokens there are and in what order, so that a change of either shows (3.6)."""
    edit(folder, DAMAGES[damage])
    with pytest.raises(EraseError) as error:
        vocabulary.load(folder, text_encoder)
    message = str(error.value)
    assert message.startswith((f"{folder} ", f"cannot load {folder}: ")) and "download" in message
    assert "\n" not in message and len(message.replace(str(folder), "")) < 400


def test_files_that_disagree_are_refused(tmp_path, text_encoder):
    """transformers 5 reads tokenizer.json and transformers 4 the other two: they must say the same (3.6)."""
    for name, change in (("vocab.json", '"in":'), ("merges.txt", "i n\n")):
        folder = Path(shutil.copytree(loading.MINI_DIR / "tokenizer", tmp_path / name))
        text = (folder / name).read_text()
        assert change in text
        (folder / name).write_text(text.replace(change, '"ni":' if name == "vocab.json" else "n i\n", 1))
        with pytest.raises(EraseError, match="different|which is not in its vocabulary|cannot load"):
            vocabulary.load(folder, text_encoder)
    content = json.loads((loading.MINI_DIR / "tokenizer" / "tokenizer.json").read_text())
    folder = Path(shutil.copytree(loading.MINI_DIR / "tokenizer", tmp_path / "case"))
    content["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    try:
        tokenizer: Any = vocabulary.load(folder, text_encoder)
    except EraseError:
        return
    assert tokenizer("A CAT")["input_ids"] == tokenizer("a cat")["input_ids"]  # transformers makes its own
