"""Words that occur with a concept: those that are near its images, but neither mean it nor mean nothing."""

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from erase import concepts
from erase.concepts import Concept
from erase.errors import EraseError
from erase.evaluation import cli, retain_words
from erase.evaluation.judges.networks import pretrained

CAT = Concept("cat", "object", forget=("a photo of a cat",), anchor=("a photo of a dog",), synonyms=("kitten",))
NUDITY = concepts.load("nudity")


def tokens(*words: str) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def test_candidates_are_whole_words_that_are_not_the_concept():
    vocabulary = tokens(
        "cat</w>", "cats</w>", "kitten</w>", "sofa</w>", "so", "of</w>", "12</w>", "dog</w>", "photo</w>"
    )
    assert retain_words.candidates(vocabulary, CAT) == {"sofa": 3, "dog": 7, "photo": 8}


@pytest.mark.parametrize("word", ["child", "teen", "schoolgirl", "toddler", "kid"])
def test_no_word_for_minors_stands_beside_nudity(word):
    found = retain_words.candidates(
        tokens(f"{word}</w>", "person</w>", "kidney</w>", "nude</w>", "topless</w>"), NUDITY
    )
    assert list(found) == ["person", "kidney"]


def planted(num: int = 40) -> tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor]:
    """Images, the concept's text, words and their vectors.

    Each image shows the concept and some of ten other things, and has what all images have. Some words mean the
    concept, some one of the things, some what all images have, and many anything.
    """
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=draw)).Q
    concept, common, beside, rest = basis[0], basis[1], basis[2:12], basis[12:]
    shown = (torch.rand(num, 10, generator=draw) < torch.linspace(0.9, 0.5, 10)).float()
    images = normalize(concept + common + shown @ beside + 0.05 * torch.randn(num, 64, generator=draw))
    words = [*(f"same{i}" for i in range(8)), *(f"beside{i}" for i in range(10)), *(f"image{i}" for i in range(8))]
    words += [f"other{i}" for i in range(400)]

    def around(centre: torch.Tensor, count: int, spread: float) -> torch.Tensor:
        return centre + spread * torch.randn(count, len(rest), generator=draw) @ rest / len(rest) ** 0.5

    parts = [around(concept, 8, 0.3), beside + 0.4 * concept, around(common, 8, 0.3), around(0 * concept, 400, 1.0)]
    return images, concept[None], words, normalize(torch.cat(parts))


@pytest.fixture
def few(monkeypatch) -> None:
    """As few near and frequent words as the planted world has words that mean something; CLIP knows 40,000."""
    monkeypatch.setattr(retain_words, "NEAREST", 22)
    monkeypatch.setattr(retain_words, "FREQUENT", 26)
    monkeypatch.setattr(retain_words, "CLUSTERS", 3)


def test_words_that_occur_with_the_concept_are_found_and_synonyms_and_noise_are_not(few):
    images, concept, words, vectors = planted()
    found = retain_words.choose(images, concept, words, vectors, 8)
    assert all(word.startswith("beside") for word in found)
    order = [words.index(word) for word in found]
    near = [int((images @ vectors.T).topk(22).indices.eq(place).any(1).sum()) for place in order]
    assert near == sorted(near, reverse=True)


def test_control_without_the_clusters_others_come_first(few, monkeypatch):
    images, concept, words, vectors = planted()
    monkeypatch.setattr(retain_words, "_between", lambda rows, concept: list(range(len(rows))))
    found = retain_words.choose(images, concept, words, vectors, 16)
    assert {word.rstrip("0123456789") for word in found} >= {"same", "image"}


def test_too_few_words_are_one_line():
    images, concept, words, vectors = planted()
    with pytest.raises(EraseError, match="and 200 are asked for; give more images, or a smaller --num-words"):
        retain_words.choose(images, concept, words, vectors, 200)


def test_a_single_tokens_vector_is_that_of_its_text(clip_dir):
    """Padding behind the end does not change it."""
    clip = pretrained.Clip(clip_dir)
    token = clip.tokenizer.get_vocab()["q</w>"]
    torch.testing.assert_close(retain_words.embed(clip, [token]), normalize(clip.read(["q"])), atol=1e-5, rtol=0)


@pytest.fixture
def clip(monkeypatch) -> None:
    """In the place of CLIP one that sees colours: an image is near to the words for what is in it."""
    vocabulary = tokens("cat</w>", "red</w>", "green</w>", "blue</w>", "child</w>", "grey</w>")
    axes = torch.eye(8)
    vectors = torch.stack([axes[7], axes[0], axes[1], axes[2], axes[3], axes[4]])

    class Colours:
        tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, bos_token_id=0, eos_token_id=0)
        device = "cpu"

        def __init__(self, *_: Any) -> None:
            self.network = SimpleNamespace(get_text_features=self.of_tokens)

        def of_tokens(self, input_ids: torch.Tensor) -> Any:
            return SimpleNamespace(pooler_output=vectors[input_ids[:, 1]])

        def see(self, images: Any) -> torch.Tensor:
            means = torch.stack([torch.from_numpy(image).float().mean((0, 1)) / 255 for image in images])
            return torch.cat([means, torch.zeros(len(images), 4), torch.ones(len(images), 1)], 1)

        def read(self, texts: Any) -> torch.Tensor:
            return axes[7].expand(len(texts), -1)

    monkeypatch.setattr(pretrained, "Clip", Colours)


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for number, colour in enumerate(([250, 200, 0], [250, 100, 0], [250, 0, 10])):
        pixels = np.full((8, 8, 3), colour, np.uint8)
        pixels[:2] = 0
        Image.fromarray(pixels).save(folder / f"{number}.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "flat.png")
    return folder


def test_the_command_writes_the_concept_with_the_words_as_retain_prompts(clip, tmp_path, capsys):
    output = tmp_path / "cat.toml"
    own = tmp_path / "own.toml"
    concepts.write(CAT, own)
    cli.main(
        [
            "words",
            str(pictures(tmp_path / "images")),
            "--concept",
            str(own),
            "--num-words",
            "2",
            "--output",
            str(output),
        ]
    )
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "red, green" and "2 more retain prompts, found in 3 images" in shown[1]
    found = concepts.load(str(output))
    assert found.retain == ("a photo of red", "a photo of green")
    assert (found.name, found.kind, found.forget, found.anchor) == (CAT.name, CAT.kind, CAT.forget, CAT.anchor)


@pytest.mark.parametrize("name", [*concepts.names()])
def test_a_concept_that_is_written_is_read_as_it_was(tmp_path, name):
    concept = concepts.load(name)
    concepts.write(concept, tmp_path / "written.toml")
    assert concepts.load(str(tmp_path / "written.toml")) == concept


def test_strings_of_every_kind_survive(tmp_path):
    strange = 'a "cat" with \\ and \t and \u00e9 and \U0001f431 and \x7f'
    concept = Concept(strange, "object", forget=(strange,), anchor=("",), judge={"type": "imagenet", "index": 3})
    concepts.write(concept, tmp_path / "strange.toml")
    assert concepts.load(str(tmp_path / "strange.toml")) == concept
    tomllib.loads((tmp_path / "strange.toml").read_text("utf-8"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-words", "0", "--output", "x.toml"], "--num-words is 0; give 1 or more"),
        (["--output", "x.json"], "give a name that ends with .toml"),
        (["--output", "x.toml"], "has no image; give the folder of images of 'cat'"),
        (["--output", "x.toml", "--device", "tpu"], "tpu"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(clip, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    concepts.write(CAT, "cat.toml")
    if "tpu" in arguments:
        pictures(tmp_path / "empty" / "images")
    with pytest.raises(SystemExit) as stop:
        cli.main(["words", "empty", "--concept", "cat.toml", *arguments])
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("x.*"))
