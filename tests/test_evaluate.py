"""`eval-concept run` from models, prompt files and folders to reports, with tiny random judges."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import (
    AutoModelForImageClassification,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    ConvNextImageProcessorPil,
)

from erase import concepts, erase_concept, files
from erase.evaluation import arm, cli, generate, score, sources
from erase.evaluation.options import Drawing
from erase.evaluation.report import pool
from erase.export.single_file import save_single_file
from erase.families import loading, sd

FAST = ("--steps", 2, "--device", "cpu", "--quiet")
FEW = {"num_forget": 2, "num_retain": 2, "num_inference_steps": 2, "mask": "none"}


@pytest.fixture
def command(capsys):
    """Runs `eval-concept` and returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code: Any = 0
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def pair(toy_pipeline_dir, erased_dir, tmp_path) -> tuple[object, ...]:
    """Arguments that name the two models."""
    return ("--model", erased_dir, "--base", toy_pipeline_dir, "--output", tmp_path / "out", *FAST)


def seen(folder: Path) -> list[Image.Image]:
    return [Image.open(arm.image_path(folder, record)).convert("RGB") for record in arm.complete_records(folder)]


def arms(root: Path, task: str) -> dict[str, Path]:
    (base,) = (root / "out" / "shared").glob(f"base-{task}-*[0-9a-f]")
    return {"base": base, "erased": root / "out" / "erased" / task}


def result(folder: Path, name: str) -> dict[str, Any]:
    rows = {row["name"]: row for row in pool.read(folder)[0]["scores"]}
    assert name in rows, list(rows)
    return rows[name]


def guesses(folder: Path, classifier: Path) -> list[int]:
    """ImageNet classes by transformers alone."""
    network = AutoModelForImageClassification.from_pretrained(classifier).eval()
    pixels = ConvNextImageProcessorPil.from_pretrained(classifier)(seen(folder), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        return network(pixels).logits.argmax(1).tolist()


def clip_embeddings(clip: Path, folder: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of unit length, images and texts, by transformers alone."""
    network: Any = CLIPModel.from_pretrained(clip).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(seen(folder), return_tensors="pt")["pixel_values"]
    length = network.config.text_config.max_position_embeddings
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.inference_mode():
        image, text = network.get_image_features(pixels), network.get_text_features(**tokens)
    return normalize(image.pooler_output), normalize(text.pooler_output)


# --- each task to its report


def test_class_forget_ends_in_the_classifiers_own_figures(command, pair, classifier_dir, tmp_path):
    """UA and RA recomputed from the images with transformers (6.10)."""
    code, out, err = command("run", *pair, "--task", "class-forget", "--concept", "church", "--num-images", 2,
                             "--judge-model", classifier_dir)  # fmt: skip
    assert code == 0 and "class.ua" in out, err
    for role, folder in arms(tmp_path, "class-forget").items():
        samples, said = arm.samples(folder), guesses(folder, classifier_dir)
        forgot = [guess != 497 for guess, sample in zip(said, samples, strict=True) if sample.role == "forget"]
        kept = [guess == s.facts["index"] for guess, s in zip(said, samples, strict=True) if s.role == "retain"]
        report = arms(tmp_path, "class-forget")["erased"]
        assert result(report, "class.ua")[role]["value"] == np.mean(forgot)
        assert result(report, "class.ra")[role]["value"] == np.mean(kept)
        assert (len(forgot), len(kept)) == (2, 18)


@pytest.mark.parametrize(("task", "concept"), [("object", ("cat", "--kind", "object")), ("style", ("van_gogh",))])
def test_object_and_style_end_in_clips_own_figures(command, pair, clip_dir, tmp_path, task, concept):
    """The label whose text is nearest to the image, recomputed with transformers (6.10)."""
    code, out, err = command("run", *pair, "--task", task, "--concept", *concept, "--num-images", 2,
                             "--judge-model", clip_dir)  # fmt: skip
    assert code == 0 and "clip.ua" in out, err
    folders = arms(tmp_path, task)
    options = arm.manifest(folders["erased"])["task"]["options"]
    labels = [options["target"], *options["alternatives"]]
    texts = [text for (text,) in score.identity(folders["base"], "clip")["texts"]]
    assert all("photo of a photo" not in text and "photo of a painting" not in text for text in texts)
    for role, folder in folders.items():
        image, text = clip_embeddings(clip_dir, folder, texts)
        nearest = [labels[i] for i in (image @ text.T).argmax(1).tolist()]
        samples = arm.samples(folder)
        gone = [n != labels[0] for n, s in zip(nearest, samples, strict=True) if s.role == "forget"]
        kept = [n == s.label for n, s in zip(nearest, samples, strict=True) if s.role == "retain"]
        assert result(folders["erased"], "clip.ua")[role]["value"] == pytest.approx(np.mean(gone))
        assert result(folders["erased"], "clip.ra")[role]["value"] == pytest.approx(np.mean(kept))


def test_quality_ends_in_clip_scores_and_kid(command, pair, clip_dir, tmp_path):
    """The CLIP score recomputed with transformers, and KID of its embeddings to a folder of real images (6.10)."""
    from erase.evaluation import kid
    from erase.evaluation.judges import features

    rng = np.random.default_rng(0)
    (tmp_path / "real").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(tmp_path / "real" / f"{i}.png")
    code, _, err = command("run", *pair, "--task", "quality", "--concept", "church", "--num-images", 6,
                           "--judge-model", clip_dir, "--real", tmp_path / "real")  # fmt: skip
    assert code == 0, err
    folders = arms(tmp_path, "quality")
    (real,) = (tmp_path / "out" / "shared").glob("real-*clip")
    prompts = [sample.prompt for sample in arm.samples(folders["base"])]
    for role, folder in folders.items():
        image, text = clip_embeddings(clip_dir, folder, prompts)
        fit = 100 * (image * text).sum(1)
        row = result(folders["erased"], "quality.clip_score")
        assert row[role]["value"] == pytest.approx(fit.mean().item(), abs=1e-3)
        there = [[features.decode(line) for line in score.load(f, "features")] for f in (folder, real)]
        found = kid.kid_of_sets(np.stack(there[0]), np.stack(there[1]), prompts)
        row = result(folders["erased"], "quality.kid_real")[role]
        assert (row["value"], row["low"]) == (pytest.approx(found.value), pytest.approx(found.low))
        assert np.allclose(normalize(torch.tensor(np.stack(there[0]))), image, atol=1e-4)
    assert result(folders["erased"], "quality.kid_base")["base"] is None


def own_prompt(folder: Path) -> tuple[object, ...]:
    """Arguments for one prompt and one judge."""
    (folder / "own.txt").write_text("a cat\n")
    task = ("--task", "prompts", "--prompts", folder / "own.txt", "--judge", "thumbnails")
    return (*task, "--output", folder / "out")


def test_unet_only_weights_are_evaluated_on_a_base(command, erased_dir, toy_pipeline_dir, tmp_path):
    """`--unet FILE` puts published UNet weights into the model, and nothing else (4.3)."""
    weights = erased_dir / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "own.txt").write_text("a cat\n")
    own = (
        "--task",
        "prompts",
        "--prompts",
        tmp_path / "own.txt",
        "--judge",
        "thumbnails",
        "--output",
        tmp_path / "out",
    )
    code, _, err = command(
        "run", "--model", toy_pipeline_dir, "--base", toy_pipeline_dir, "--unet", weights, *own, *FAST
    )
    assert code == 0, err
    hashes = [json.loads(path.read_text())["model"] for path in sorted((tmp_path / "out").rglob("manifest.json"))]
    expected = {generate.model_hashes(loading.load(folder))["unet"] for folder in (toy_pipeline_dir, erased_dir)}
    assert {one["unet"] for one in hashes} == expected and len({one["vae"] for one in hashes}) == 1


@pytest.mark.slow
@pytest.mark.ci
def test_a_model_erased_from_a_single_file_offline_is_evaluated(command, tiny_pipeline_dir, tmp_path):
    """The base is read with the config that run.json names (4.3)."""
    base = tmp_path / "model.safetensors"
    save_single_file(base, tiny_pipeline_dir, dtype="fp32")
    small: dict[str, Any] = dict(method="uce", num_samples=0, device="cpu", quiet=True, forget=("a cat",))
    small |= dict(anchor=("a dog",), retain=("a tree",), kind="object", output=str(tmp_path / "run"))
    erase_concept("cat", str(base), config=str(tiny_pipeline_dir), **small)
    (tmp_path / "own.txt").write_text("a cat\n")
    own = (
        "--task",
        "prompts",
        "--prompts",
        tmp_path / "own.txt",
        "--judge",
        "thumbnails",
        "--output",
        tmp_path / "out",
    )
    code, _, err = command("run", "--model", tmp_path / "run", *own, *FAST)
    assert code == 0, err
    record = json.loads((tmp_path / "run" / "run.json").read_text())["model"]
    drawn = {json.loads(path.read_text())["model"]["unet"] for path in (tmp_path / "out").rglob("manifest.json")}
    assert drawn == {record["base_hash"], record["result_hash"]}


PROMPTS = 'prompt,seed,guidance\na red cat,7,0\n"a dog, asleep",,2.5\na house,9,\na tree,10,\n'


def test_progress_says_which_model_generates(command, pair, tmp_path):
    loud = tuple(part for part in pair if part != "--quiet")
    code, _, err = command("run", *loud, *own_prompt(tmp_path))
    assert code == 0
    for role in ("base", "erased"):
        assert err.count(f"generate prompts, {role} model: 0 of 1 images") == 1
        assert err.count(f"score thumbnails, {role} model: 0 of 1 images") == 1


def test_own_prompts_are_judged_by_every_judge(command, pair, clip_dir, classifier_dir, tmp_path):
    """Base and erased model on a CSV of one's own: classifier, CLIP score and KID in one report (4.5)."""
    (tmp_path / "own.csv").write_text(PROMPTS)
    judges = ("--judge", "classifier", "--judge", "clip-score", "--judge", "features", "--judge", "thumbnails")
    sources = (f"classifier={classifier_dir}", f"clip-score={clip_dir}", f"features={clip_dir}")
    models_of_judges = [part for source in sources for part in ("--judge-model", source)]
    own = ("--task", "prompts", "--prompts", tmp_path / "own.csv", "--concept", "church")
    code, out, err = command("run", *pair, *own, *judges, *models_of_judges)
    assert code == 0, err
    folders = arms(tmp_path, "prompts")
    samples = arm.samples(folders["erased"])
    assert [s.seed for s in samples][::2] == [7, 9] and [s.guidance for s in samples] == [0.0, 2.5, None, None]
    for role, folder in folders.items():
        gone = np.mean([guess != 497 for guess in guesses(folder, classifier_dir)])
        assert result(folders["erased"], "class.ua")[role] | {"k": None} == {
            **result(folders["erased"], "class.ua")[role], "k": None, "value": gone, "n": 4,
        }  # fmt: skip
        image, text = clip_embeddings(clip_dir, folder, [sample.prompt for sample in samples])
        fit = 100 * (image * text).sum(1).mean().item()
        assert result(folders["erased"], "quality.clip_score")[role]["value"] == pytest.approx(fit, abs=1e-3)
    assert result(folders["erased"], "quality.kid_base")["erased"]["n"] == 4
    assert result(folders["erased"], "pixels.drift")["erased"]["value"] > 0 and "verdict" not in out


def test_own_prompts_are_judged_by_clip_for_a_concept_with_alternatives(command, pair, clip_dir, tmp_path):
    """A text file of prompts (4.5)."""
    (tmp_path / "own.txt").write_text("a starry night\na church\n\na portrait\n")
    code, out, err = command("run", *pair, "--task", "prompts", "--prompts", tmp_path / "own.txt", "--judge", "clip",
                             "--concept", "van_gogh", "--judge-model", clip_dir, "--num-images", 2)  # fmt: skip
    assert code == 0 and "clip.ua" in out, err
    assert result(arms(tmp_path, "prompts")["erased"], "clip.ua")["erased"]["n"] == 6


@pytest.fixture
def people(tmp_path) -> Path:
    """A folder with a portrait, noise, and a black image."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path / "people"
    folder.mkdir()
    Image.fromarray(data.astronaut()).save(folder / "portrait.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    Image.fromarray(noise * 0).save(folder / "black.png")
    return folder


def test_anybodys_images_are_judged_by_nudenet(command, people, tmp_path):
    """One of three images shows a person, two are whole; `score` then `report` gives the same as `run` (4.5)."""
    pytest.importorskip("nudenet")
    code, out, err = command("run", "--task", "images", "--images", people, "--judge", "nudenet", "--output",
                             tmp_path / "out", "--quiet", "--require", "nudity.people>=0.3")  # fmt: skip
    assert code == 0, err
    folder = tmp_path / "out" / "people" / "images"
    names = ("people", "clean", "core5-0.6-image")  # the black image is neither clean nor without nudity
    assert [result(folder, f"nudity.{name}")["erased"]["k"] for name in names] == [1, 2, 1]
    assert result(folder, "quality.whole")["erased"]["k"] == 2 and (folder / "report.html").exists()
    assert command("score", "--images", people, "--judge", "nudenet", "--output", tmp_path / "s", "--quiet")[0] == 0
    code, _, err = command("report", tmp_path / "s", "--name", "people")
    assert code == 0, err
    both = [pool.read(one)[0]["scores"] for one in (folder, tmp_path / "s")]
    assert both[0] == both[1]


def test_anybodys_images_are_judged_by_a_classifier_clip_and_features(
    command, people, clip_dir, classifier_dir, tmp_path
):
    """UA of a class, and KID between two folders whose files have the same names (4.5)."""
    shared = ("--task", "images", "--output", tmp_path / "out", "--quiet")
    code, _, err = command("run", "--images", people, *shared, "--judge", "classifier", "--concept", "church",
                           "--judge-model", classifier_dir)  # fmt: skip
    assert code == 0, err
    ua = result(tmp_path / "out" / "people" / "images", "class.ua")["erased"]
    assert ua["n"] == 3 and ua["k"] <= 2  # the black image is no success
    many = tmp_path / "many"
    many.mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(many / f"{i}.png")
    code, _, err = command("run", "--images", many, "--base-images", many, *shared, "--judge", "features",
                           "--judge-model", clip_dir)  # fmt: skip
    assert code == 0, err
    assert result(tmp_path / "out" / "many" / "images", "quality.kid_base")["erased"]["value"] == pytest.approx(0)


def test_the_embedded_judge_says_how_often_each_object_is_seen(command, tmp_path):
    """Drawings of the embedded world; the shares of all labels add up to one (4.5)."""
    from erase.mini import world

    (tmp_path / "mine").mkdir()
    for i, name in enumerate(("circle", "circle", "square", "star")):
        image = world.draw(world.Scene(name, "red", "solid", "light"), np.random.default_rng(i))
        Image.fromarray(np.asarray(image)).save(tmp_path / "mine" / f"{i}.png")
    code, _, err = command("run", "--task", "images", "--images", tmp_path / "mine", "--judge", "mini", "--concept",
                           "circle", "--output", tmp_path / "out", "--quiet")  # fmt: skip
    assert code == 0, err
    folder = tmp_path / "out" / "mine" / "images"
    assert result(folder, "mini.sees_circle")["erased"]["k"] == 2 and result(folder, "mini.ua")["erased"]["k"] == 2
    shares = [row["erased"]["k"] for row in pool.read(folder)[0]["scores"] if "sees_" in row["name"]]
    assert sum(shares) == 4


# --- what is wrong is said before the first image


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--require", "class.xa>=1"), "no score 'class.xa'; there are class.ua"),
        (("--require", "class.ua"), "cannot be read"),
        (("--require", "class.ua>=1.2.3"), "cannot be read"),
        (("--judge-model", "absent/dir/here"), "absent/dir/here"),
        (("--task", "class-forget", "quality", "--num-images", 4), "openai/clip-vit-base-patch32"),
        (("--task", "class-forget", "nonsense"), "unknown task 'nonsense'"),
        (("--models", "{erased}", "absent"), "absent"),
        (("--gold", "absent"), "absent"),
        (("--base", "absent"), "absent"),
        (("--delta", "absent.safetensors"), "absent.safetensors"),
        (("--real", "absent"), "--real goes with"),
        (("--guard", "sld-weak", "--guidance", "1"), "guidance above 1"),
        (("--guard-text", "x"), "--guard-text goes with --guard"),
        (("--guard", "sld-mild"), "--guard is 'sld-mild'"),
        (("--judge", "nudenet"), "class-forget has classifier"),
        (("--task", "prompts", "--prompts", "{prompts}"), "needs judges: --judge"),
        (("--task", "prompts", "--judge", "clip-score"), "needs a prompt file"),
        (("--task", "prompts", "--prompts", "{prompts}", "--judge", "clip"), "clip needs a concept with alternatives"),
        (("--task", "prompts", "--prompts", "{prompts}", "--judge", "mini"), "sees 64 x 64 pixels"),
        (
            ("--task", "prompts", "--prompts", "{few}", "--judge", "features", "--features", "mini"),
            "KID needs at least 4 images",
        ),
        (("--task", "i2p", "--prompts", "{prompts}"), "use --task prompts"),
        (("--task", "images"), "goes with --task images|give --model"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_image(
    command, pair, classifier_dir, erased_dir, tmp_path, monkeypatch, arguments, message
):
    """Judges, rules, models and files of every model and task of the command (4.1)."""
    import re

    monkeypatch.setattr(sd.StableDiffusion, "draw", lambda *_, **__: pytest.fail("an image was generated"))
    (tmp_path / "own.csv").write_text(PROMPTS)
    (tmp_path / "few.csv").write_text("prompt\na\nb\n")
    names = {"erased": erased_dir, "prompts": tmp_path / "own.csv", "few": tmp_path / "few.csv"}
    given = [str(a).format(**names) for a in arguments]
    task = () if "--task" in given else ("--task", "class-forget")
    source = () if "--judge-model" in given else ("--judge-model", f"classifier={classifier_dir}")
    code, _, err = command("run", *pair, *task, "--concept", "church", "--num-images", 1, *source, *given)
    assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert not list((tmp_path / "out").rglob("manifest.json"))


BAD = [("num-inference-steps", v) for v in ("0", "-1", "1001", "nan", "1e3", "99999999999999999999", "x")]
BAD += [("steps", "0"), ("guidance", "nan"), ("guidance-scale", "-1"), ("guidance", "inf"), ("guidance", "1e300")]
BAD += [("generation-batch-size", "0"), ("batch-size", "-3"), ("batch-size", "99999999999"), ("num-images", "0")]
BAD += [("num-images", "-1"), ("num-images", "99999999999999999999"), ("limit", "0"), ("limit", "-2"), ("device", "x")]
BAD += [("device", "cuda:x"), ("precision", "fp8"), ("features", "resnet"), ("kind", "thing"), ("judge", "x")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_number_that_means_nothing_is_one_line(command, pair, classifier_dir, tmp_path, monkeypatch, name, value):
    """Zero, negative, not a number, infinite, too many (2.9, 4.10)."""
    monkeypatch.setattr(sd.StableDiffusion, "draw", lambda *_, **__: pytest.fail("an image was generated"))
    code, _, err = command("run", *pair, "--task", "class-forget", "--concept", "church", "--num-images", 1,
                           "--judge-model", classifier_dir, f"--{name}", value)  # fmt: skip
    assert (
        code == 2
        and err.count("\n") == 1
        and f"--{name}" in err.replace("--num-inference-steps", "--steps")
        or value[:3] in err
    ), err
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_zero_images_to_verify_is_one_line(command):
    for value in ("0", "-1"):
        code, _, err = command("verify", "absent", "--num", value)
        assert code == 2 and f"--num is {value}; it must be at least 1" in err


# --- zero is a value


def test_guidance_zero_is_used_and_recorded(command, pair, toy_pipeline_dir, clip_dir, tmp_path, monkeypatch):
    """On the command line, and in a row of a prompt file; diffusers computes both without guidance (2.9)."""
    asked, draw = [], sd.StableDiffusion.draw
    monkeypatch.setattr(sd.StableDiffusion, "draw", lambda *a, **k: asked.append(k["guidance"]) or draw(*a, **k))
    (tmp_path / "own.csv").write_text(PROMPTS)
    own = ("--task", "prompts", "--prompts", tmp_path / "own.csv")
    for name, extra in {"rows": (), "all": ("--guidance", 0), "one": ("--guidance-scale", 1)}.items():
        arguments = ("--model", toy_pipeline_dir, "--output", tmp_path / name, *own, *FAST, "--batch-size", 1, *extra)
        assert command("generate", *arguments)[0] == 0
    assert asked == [0.0, 2.5, 7.5, 7.5, *[0.0] * 4, *[1.0] * 4]
    assert arm.manifest(tmp_path / "all")["generation"]["guidance"] == 0.0
    assert arm.manifest(tmp_path / "rows")["generation"]["guidance"] == 7.5
    images = [[record["sha256"] for record in arm.complete_records(tmp_path / name)] for name in ("rows", "all", "one")]
    assert images[1] == images[2] and images[0][0] == images[1][0] and images[0][2] != images[1][2]


# --- weights, locks, systems


def test_weights_that_are_not_those_of_run_json_are_refused(command, pair, toy_pipeline_dir, erased_dir, tmp_path,
                                                            classifier_dir, monkeypatch):  # fmt: skip
    """A run folder whose UNet, or whose base, is another one than its record says (6.10)."""
    hashes = {role: generate.model_hashes(loading.load(folder))["unet"] for role, folder in
              {"base": toy_pipeline_dir, "result": erased_dir}.items()}  # fmt: skip
    shutil.copytree(erased_dir, tmp_path / "run")
    old = json.loads((Path(__file__).parent / "old" / "run-0.1.0.json").read_text())
    church = asdict(concepts.load("church"))
    record = {**old, "concept": church, "concepts": [church]}
    made_from = {"name": str(toy_pipeline_dir), "origin": str(toy_pipeline_dir)}
    right = made_from | {"base_hash": hashes["base"], "origin_hash": hashes["base"], "result_hash": hashes["result"]}
    arguments = ("run", "--model", tmp_path / "run", "--task", "class-forget", "--num-images", 1, "--judge-model",
                 classifier_dir, "--output", tmp_path / "out", *FAST)  # fmt: skip
    for wrong, role in (({"origin_hash": "0" * 64}, "base"), ({"result_hash": "0" * 64}, "erased")):
        files.write_json(tmp_path / "run" / "run.json", record | {"model": right | wrong})
        with monkeypatch.context() as patch:
            patch.setattr(sd.StableDiffusion, "draw", lambda *_, **__: pytest.fail("an image was generated"))
            code, _, err = command(*arguments)
        assert code == 2 and f"says that the {role} model's network is 000000000000" in err
    files.write_json(tmp_path / "run" / "run.json", record | {"model": right})
    assert command(*arguments)[0] == 0


@pytest.mark.parametrize("how", [{"method": "uce"}, {"scope": "text-first", "num_train_steps": 1, **FEW}])
def test_a_run_that_kept_its_delta_only_is_its_base_with_the_delta(toy_pipeline_dir, tmp_path, how):
    out = str(tmp_path / "run")
    kept: dict[str, Any] = {
        "save": ("delta",),
        "num_samples": 0,
        "quiet": True,
        "device": "cpu",
        "cache_dir": str(tmp_path),
    }
    run = erase_concept("church", str(toy_pipeline_dir), output=out, **kept, **how)
    assert not (run.folder / "model_index.json").exists()
    models = sources.compared(out, Drawing(), None, concept=None, base=None, gold=None)
    hashes = {}
    for role, source in models.sources.items():
        model = source.load(Drawing())
        hashes[role] = generate.network_hash(model, generate.model_hashes(model), models.made_from)
    sources.check_origin(models, hashes)
    assert models.is_checked and hashes["erased"] == run.record.model.result_hash != hashes["base"]


@pytest.mark.slow
@pytest.mark.ci
def test_two_evaluations_that_share_a_base_wait_for_each_other(toy_pipeline_dir, erased_dir, classifier_dir, tmp_path):
    """Both end well, and the base's images are generated once (6.10)."""
    shutil.copytree(erased_dir, tmp_path / "other")
    shared = ("--base", toy_pipeline_dir, "--output", tmp_path / "out", *FAST, "--task", "class-forget", "--concept")
    shared += ("church", "--num-images", 1, "--batch-size", 2, "--judge-model", classifier_dir)
    slow = (
        "import sys, time; from erase.evaluation import cli, generate\n"
        "drawn = generate._drawn\n"
        "def slow(*arguments):\n"
        "    time.sleep(0.1)\n"
        "    with open(LOG, 'a') as log: log.write('x')\n"
        "    return drawn(*arguments)\n"
        "generate._drawn = slow\n"
        "cli.main(sys.argv[1:])\n"
    )
    children = []
    for model in (erased_dir, tmp_path / "other"):
        command = [sys.executable, "-c", f"LOG = {str(tmp_path / 'batches')!r}\n{slow}"]
        children.append(subprocess.Popen([*command, *map(str, ("run", "--model", model, *shared))]))
    assert [child.wait(300) for child in children] == [0, 0]
    assert (tmp_path / "batches").read_text() == "x" * 15  # 5 batches of the base and of each erased model


def test_modules_load_on_a_system_without_fcntl():
    """As on Windows (4.7)."""
    code = "import sys; sys.modules['fcntl'] = None; from erase.evaluation import arm, cli, score; print('loaded')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "loaded\n", done.stderr
