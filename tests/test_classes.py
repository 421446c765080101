"""Judges that name what an image shows: each equals a computation by hand, whatever else is in the batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    ConvNextImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
)

from erase.errors import EraseError
from erase.evaluation.judges.classifier import Classifier, shows
from erase.evaluation.judges.clip import ClipZeroShot, texts_of
from erase.evaluation.judges.mini import MiniJudge
from erase.evaluation.tasks.class_forget import IMAGENETTE
from erase.mini import judge as mini
from erase.mini import world

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
SIZES = [(40, 40), (33, 57), (64, 48), (16, 16)]


def make_images(num: int, seed: int = 0) -> list[np.ndarray]:
    """Noise of several sizes, each image with its own brightness and colour."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(num):
        noise = rng.integers(0, 100, (*SIZES[i % len(SIZES)], 3)) + rng.integers(0, 156, 3)
        made.append(noise.astype(np.uint8))
    return made


def prompts(num: int) -> list[str]:
    return ["a church"] * num


def make_classifier(folder: Path, num_classes: int, names: list[str] | None = None) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    config.id2label = dict(enumerate(names or [f"class {n}" for n in range(num_classes)]))
    network = ResNetForImageClassification(config)
    torch.nn.init.normal_(network.classifier[1].weight)  # pyright: ignore
    network.save_pretrained(folder)
    ConvNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_pct=0.875, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"), 7)


def test_a_classifier_says_what_its_network_says_of_the_prepared_image(classifier_dir):
    """By hand: bicubic to 28 / 0.875 = 32 pixels, the middle 28, scaled, softmax of the logits, the five best."""
    image = make_images(1)[0]
    small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32)[2:30, 2:30]
    x = torch.tensor((small / 255 - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        p = ResNetForImageClassification.from_pretrained(classifier_dir).eval()(x).logits.softmax(1)[0]
    top5 = Classifier(classifier_dir).score([image], prompts(1))[0]["top5"]
    assert [index for index, _ in top5] == p.argsort(descending=True)[:5].tolist()
    np.testing.assert_allclose([probability for _, probability in top5], p.sort(descending=True).values[:5], atol=1e-6)


def test_a_classifier_of_three_classes_gives_three(tmp_path):
    top5 = Classifier(make_classifier(tmp_path, 3)).score(make_images(1), prompts(1))[0]["top5"]
    assert sorted(index for index, _ in top5) == [0, 1, 2]
    assert sum(probability for _, probability in top5) == pytest.approx(1)


def test_a_score_does_not_depend_on_the_other_images(classifier_dir, clip_dir):
    """20 images of four sizes, more than one batch, together and one by one. Float32 sums differ by 1e-7."""
    images = make_images(20)
    classifier, clip = Classifier(classifier_dir), ClipZeroShot(["church", "dog"], clip_dir)
    for judge, read in (
        (classifier, lambda score: [p for _, p in score["top5"]]),
        (clip, lambda score: list(score["probabilities"].values())),
    ):
        together = np.array([read(score) for score in judge.score(images, prompts(20))])
        alone = np.array([read(judge.score([image], prompts(1))[0]) for image in images])
        np.testing.assert_allclose(together, alone, atol=1e-6)
        assert together.std(0).max() > 1e-4, "control: images do get different scores"
        assert judge.score([], []) == []


def test_classes_are_known_by_their_index_and_never_by_their_name(classifier_dir, tmp_path):
    renamed = Classifier(make_classifier(tmp_path, 7, names=list("gfedcba")))
    assert renamed.score(make_images(2), prompts(2)) == Classifier(classifier_dir).score(make_images(2), prompts(2))
    assert list(IMAGENETTE.values()) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def test_a_class_counts_only_among_the_first_that_are_asked_for():
    score = {"top5": [[497, 0.6], [0, 0.2], [701, 0.1]]}
    assert shows(score, 497) and not shows(score, 0)
    assert shows(score, 0, top=5) and not shows(score, 217, top=5)


def test_a_classifier_that_lacks_the_class_is_refused(classifier_dir):
    classifier = Classifier(classifier_dir)
    classifier.require([0, 6])
    with pytest.raises(EraseError, match="asks for class 701 but this classifier has 7, from 0 to 6"):
        classifier.require(IMAGENETTE.values())


def test_zero_shot_with_one_template_is_clips_own_softmax(clip_dir):
    labels, images = ["church", "golf ball", "dog"], make_images(3)
    model = CLIPModel.from_pretrained(clip_dir).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_dir)(
        [f"art of {label}" for label in labels], padding=True, return_tensors="pt"
    )
    processor = CLIPImageProcessorPil.from_pretrained(clip_dir)
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, **pixels).logits_per_image.softmax(1)
    scores = ClipZeroShot(labels, clip_dir, "art of {}").score(images, prompts(3))
    found = [list(score["probabilities"].values()) for score in scores]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [score["best"] for score in scores] == [labels[i] for i in expected.argmax(1)]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("a painting in the style of Claude Monet", ["a painting in the style of Claude Monet"]),
        ("a photo of a cat", ["a photo of a cat"]),
        ("Painting of a cat", ["Painting of a cat"]),
        ("the sea", ["the sea"]),
        ("cat", ["a photo of cat", "art of cat"]),
        ("statue of liberty", ["a photo of statue of liberty", "art of statue of liberty"]),
        ("Anna", ["a photo of Anna", "art of Anna"]),
    ],
)
def test_a_label_that_is_a_sentence_is_not_put_into_a_template(label, expected):
    assert texts_of(label, ["a photo of {}", "art of {}"]) == expected


def test_clip_reads_sentences_as_they_are(clip_dir):
    """The same embedding whatever the template; a bare label depends on it."""
    texts = [ClipZeroShot(["a red cat", "dog"], clip_dir, template).text for template in ("a {}", "art of {} and sky")]
    torch.testing.assert_close(texts[0][0], texts[1][0])
    assert (texts[0][1] - texts[1][1]).abs().max() > 1e-3, "control"
    judge = ClipZeroShot(["a red cat", "dog"], clip_dir)
    assert judge.identity()["texts"] == [["a red cat"], ["a photo of dog"]]


def test_several_templates_are_averaged_as_unit_vectors(clip_dir):
    both, first, second = (
        ClipZeroShot(["church", "dog"], clip_dir, templates).text
        for templates in (["a {}", "art of {} and sky"], "a {}", "art of {} and sky")
    )
    mean = (first + second) / 2
    torch.testing.assert_close(both, mean / mean.norm(dim=1, keepdim=True))
    assert (first - second).abs().max() > 1e-3, "control: the templates differ"


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (["church"], "a {}", "give two or more"),
        (["church", "church"], "a {}", "each once"),
        (["church", "dog"], "a photo", "needs {} in the place"),
        (["church", "dog"], [], "needs {} in the place"),
    ],
)
def test_a_choice_without_choice_is_refused(labels, templates, message):
    with pytest.raises(EraseError, match=message):
        ClipZeroShot(labels, "unused", templates)


def test_the_embedded_judge_names_what_it_names_elsewhere():
    rng = np.random.default_rng(0)
    images = [world.draw(world.sample_scene(rng), rng) for _ in range(20)]
    judge = MiniJudge()
    scores = judge.score(images, prompts(20))
    names = [{head: score[head] for head in mini.HEADS} for score in scores]
    assert names == mini.name(judge.network, images)
    logits = judge.network(mini.to_tensor(images))["object"]
    expected = logits.softmax(1).amax(1).tolist()
    assert [score["probabilities"]["object"] for score in scores] == pytest.approx(expected, abs=1e-6)
    assert judge.identity()["accuracy"]["object"] > 0.9


def test_the_embedded_judge_refuses_images_of_another_size():
    with pytest.raises(EraseError, match="sees 64 x 64 pixels, not 40 x 40"):
        MiniJudge().score(make_images(1), prompts(1))


def test_an_identity_follows_the_weights_and_not_the_place(classifier_dir, clip_dir, tmp_path):
    def identity(folder: Path) -> dict:
        return Classifier(folder).identity()

    assert identity(classifier_dir)["preprocessing"]["image_processor_type"] == "ConvNextImageProcessorPil"
    same = make_classifier(tmp_path / "same", 7)
    assert identity(same) == identity(classifier_dir)
    weights = load_file(same / "model.safetensors")
    weights["classifier.1.bias"][0] += 1e-3
    save_file(weights, same / "model.safetensors", {"format": "pt"})
    assert identity(same)["weights"] != identity(classifier_dir)["weights"]
    for judge in (Classifier(classifier_dir), ClipZeroShot(["a", "b"], clip_dir), MiniJudge()):
        text = json.dumps(judge.identity(), allow_nan=False)
        assert str(classifier_dir) not in text and str(clip_dir) not in text


def test_a_model_that_cannot_be_had_is_one_line(tmp_path):
    with pytest.raises(
        EraseError, match="'microsoft/resnet-50' is not a local folder and cannot be downloaded.*local copy"
    ) as error:
        Classifier()
    assert "\n" not in str(error.value)
    with pytest.raises(EraseError, match="cannot load"):
        Classifier(tmp_path)


def test_weights_that_the_library_would_make_up_are_refused(tmp_path, clip_dir):
    """transformers fills a missing tensor with random numbers, and a missing vocabulary with two tokens."""
    folder = make_classifier(tmp_path / "classifier", 7)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.1.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EraseError, match="no weights that fit 'classifier.1.weight'"):
        Classifier(folder)
    with pytest.raises(EraseError, match="no weights that fit 'classifier"):
        Classifier(clip_dir)
    blind = tmp_path / "clip"
    blind.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (blind / name).write_bytes((clip_dir / name).read_bytes())
    with pytest.raises(EraseError, match="tokens but its model|cannot load"):
        ClipZeroShot(["a", "b"], blind)
