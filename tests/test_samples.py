"""What settings become, value by value, and what samples.png shows: each row by its own model, nudity blurred."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from loaded import load_sd
from PIL import Image

from erase import erase_concept
from erase.concepts import Concept
from erase.data import latents, pixels, sheet
from erase.errors import EraseError
from erase.families import sd
from erase.options.recipes import RECIPES, resolve
from erase.options.settings import Settings
from erase.runs import phases, planning, samples
from erase.training import batches, loop, saliency_pass

CAT = Concept("cat", "object", forget=("a cat",), anchor=("a dog",), retain=("a tree", "a boat"))
QUICK: dict[str, Any] = dict(
    num_forget=2,
    num_retain=2,
    num_inference_steps=2,
    num_train_steps=2,
    batch_size=2,
    num_samples=0,
    generation_batch_size=2,
    device="cpu",
    quiet=True,
)


@pytest.fixture(scope="module")
def toy(toy_pipeline_dir) -> sd.StableDiffusion:
    return load_sd(toy_pipeline_dir)


# --- settings -> plan, recipe, method ---------------------------------------------------------------------------------


def test_every_setting_reaches_the_plan_and_the_recipe(toy):
    """Values that differ from each other and from every default. (6.10)"""
    settings = resolve(
        Settings(
            "church",
            num_forget=11,
            num_retain=12,
            num_inference_steps=13,
            guidance_scale=3.5,
            resolution=16,
            generation_batch_size=14,
            seed=15,
            sampler="dpm++",
            forget_images="f",
            retain_images="r",
            num_train_steps=16,
            batch_size=17,
            learning_rate=0.25,
            lr_scheduler="cosine",
            proportion_empty_prompts=0.5,
            anchor_every=20,
            weight_decay=0.125,
            max_grad_norm=0.75,
            gradient_accumulation_steps=18,
            target="random",
            checkpointing_steps=19,
            moments="8bit",
            optimizer="dual",
            recipe="reference",
        ),
        "object",
        {},
    )
    plan = planning.make_plan(settings, toy)
    assert plan == latents.Plan(
        num_forget=11,
        num_retain=12,
        steps=13,
        guidance=3.5,
        size=16,
        batch_size=14,
        seed=15,
        sampler="dpm++",
        round_trip=True,
        forget_images="f",
        retain_images="r",
        num_anchor=11,
    )
    recipe = planning.make_recipe(settings, replace(plan, trajectory_guidance=4.5), "nudity")
    assert recipe == batches.Recipe(
        num_steps=16,
        batch_size=17,
        learning_rate=0.25,
        schedule="cosine",
        proportion_empty=0.5,
        anchor_every=20,
        weight_decay=0.125,
        max_grad_norm=0.75,
        accumulation=18,
        target="random",
        in_order=True,
        retain_order="in_order",
        independent_latents=True,
        seed=15,
        checkpoint_every=19,
        eight_bit=True,
        dual=True,
        trajectory_steps=13,
        trajectory_guidance=4.5,
    )
    defaults = {item.name: item.default for item in fields(batches.Recipe)}
    assert all(getattr(recipe, name) != default for name, default in defaults.items())
    assert RECIPES["reference"].in_order  # the flags above are the recipe's


def test_the_seed_and_alpha_reach_the_method():
    """(6.10)"""

    def made(**options: Any) -> Any:
        return planning.make_method(Settings("church", **options))

    assert made(method="speed", seed=7).seed == 7
    assert made(method="speed", seed=7, set=("seed=3",)).seed == 3
    assert made(alpha=0.25).alpha == 0.25


def test_the_attention_kernels_reach_the_model(toy_pipeline_dir, tmp_path):
    """(6.10)"""
    with pytest.raises(EraseError, match="xformers needs a CUDA device"):
        erase_concept(CAT, str(toy_pipeline_dir), output=str(tmp_path / "run"), attention="xformers", **QUICK)


@pytest.mark.parametrize(("weights", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_storage_of_the_weights_reaches_mask_and_training(toy_pipeline_dir, tmp_path, monkeypatch, weights, dtype):
    """(6.10)"""
    stored = []
    for owner, name in ((saliency_pass, "accumulate"), (loop, "train")):
        plain = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda model, *a, _plain=plain, **k: stored.append(model.unet.dtype) or _plain(model, *a, **k)
        )
    erase_concept(CAT, str(toy_pipeline_dir), output=str(tmp_path / "run"), weights=weights, **QUICK)
    assert stored == [dtype, dtype]


@pytest.mark.parametrize("method", ["esd-x", "sdd"])
def test_the_guidance_and_the_steps_reach_the_trajectories(toy_pipeline_dir, tmp_path, monkeypatch, method):
    """(6.10)"""
    asked, plain = [], sd.StableDiffusion.trajectory
    monkeypatch.setattr(
        sd.StableDiffusion, "trajectory", lambda self, *a, **how: asked.append(how) or plain(self, *a, **how)
    )
    make = planning.make_plan
    monkeypatch.setattr(phases, "make_plan", lambda *a: replace(make(*a), trajectory_guidance=4.5))
    erase_concept(CAT, str(toy_pipeline_dir), output=str(tmp_path / "run"), method=method, **QUICK)
    assert asked and all(how == {"steps": 2, "guidance": 4.5} for how in asked)


# --- samples.png ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(monkeypatch) -> list[tuple[str, list[Image.Image], bool]]:
    """The rows of the sheet that is written: title, images, whether they are blurred."""
    found: list[Any] = []
    plain = sheet.grid
    monkeypatch.setattr(samples, "grid", lambda rows, captions: found.extend(rows) or plain(rows, captions))
    return found


def test_each_row_is_generated_by_its_own_model(toy_pipeline_dir, tmp_path, rows):
    """First and third row by the base, second and fourth by the erased model, on the same seeds. (1.1, 2.14)"""
    model = load_sd(toy_pipeline_dir)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.add_(0.05)
    settings = Settings("cat", num_samples=2, num_inference_steps=2, guidance_scale=2.0, sampler="dpm++", seed=3)
    settings = settings.filled({"generation_batch_size": 8})
    seeds = [samples.FIRST_SEED + 3000 + i for i in range(4)]
    prompts = ["a cat", "a cat", "a tree", "a boat"]

    def generated(of: sd.StableDiffusion) -> list[np.ndarray]:
        latents = of.draw(prompts, seeds, steps=2, guidance=2.0, size=8, sampler="dpm++")
        return [image.permute(1, 2, 0).numpy() for image in pixels.to_pixels(of.decode(latents))]

    expected = {"base": generated(load_sd(toy_pipeline_dir)), "erased": generated(model)}
    assert all((a != b).any() for a, b in zip(*expected.values(), strict=True))
    samples.write_samples(tmp_path / "samples.png", model, CAT, settings)
    assert [title for title, _, _ in rows] == ["base", "'cat' erased", "base", "erased"]
    for (title, images, _), part in zip(rows, (slice(2), slice(2), slice(2, 4), slice(2, 4)), strict=True):
        for image, own in zip(images, expected["base" if title == "base" else "erased"][part], strict=True):
            assert (np.asarray(image) == own).all(), title
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kind", "is_mini", "blurred"), [("nudity", False, 2), ("object", False, 0), ("nudity", True, 0)]
)
def test_both_forget_rows_of_nudity_are_blurred(toy_pipeline_dir, tmp_path, rows, kind, is_mini, blurred):
    """(2.14)"""
    model = load_sd(toy_pipeline_dir)
    model.defaults = {"family": "mini"} if is_mini else {}
    settings = Settings("cat", num_samples=1, num_inference_steps=1, guidance_scale=2.0, sampler="model")
    settings = settings.filled({"generation_batch_size": 8})
    concept = replace(CAT, kind=kind)
    samples.write_samples(tmp_path / "samples.png", model, concept, settings)
    assert [blur for _, _, blur in rows] == [True] * blurred + [False] * (4 - blurred)


@pytest.mark.parametrize(
    ("words", "blurred"),
    [
        ({}, [False] * 4),
        ({"forget": ("a naked woman",)}, [True, True, False, False]),
        ({"name": "porn"}, [True, True, False, False]),
        ({"anchor": ("a nude man",)}, [True, True, False, False]),
        ({"retain": ("a nude statue", "a tree")}, [False, False, True, True]),
        ({"retain": ("a tree", "a boat")}, [False] * 4),
        ({"kind": "nudity", "retain": ("a nude statue", "a tree")}, [True] * 4),
    ],
)
def test_rows_of_sexual_prompts_are_blurred_whatever_the_kind(toy_pipeline_dir, tmp_path, rows, words, blurred):
    """Free text and files of others name nudity under any kind. (2.14)"""
    model = load_sd(toy_pipeline_dir)
    settings = Settings("cat", num_samples=1, num_inference_steps=1, guidance_scale=2.0, sampler="model")
    settings = settings.filled({"generation_batch_size": 8})
    concept = replace(CAT, **words)
    samples.write_samples(tmp_path / "samples.png", model, concept, settings)
    assert [blur for _, _, blur in rows] == blurred


def test_a_blurred_row_shows_no_edge():
    """A checkerboard of 8 pixels keeps its full contrast without, and loses most of it with the blur. (2.14)"""
    board = np.kron(np.indices((16, 16)).sum(0) % 2, np.ones((8, 8))) * 255
    image = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    sharp, blurred = (np.asarray(sheet.grid([("", [image], blur)], {}))[20:110, 110:200] for blur in (False, True))
    assert np.ptp(sharp) == 255 and np.ptp(blurred) < 40
