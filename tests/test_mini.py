"""The embedded model: its world, its training recipe in miniature, and the weights that ship."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from loaded import load_sd
from PIL import Image

from erase.errors import EraseError
from erase.families import loading
from erase.mini import architecture, fitting, job, judge, quality, tokenizer, world
from erase.mini.train import train

shipped = pytest.mark.skipif(not (loading.MINI_DIR / "model_index.json").exists(), reason="weights are not there")


def test_a_drawing_and_its_caption_are_a_pure_function_of_the_generator():
    def make(seed: int):
        rng = np.random.default_rng(seed)
        scene = world.sample_scene(rng)
        return scene, world.draw(scene, rng), world.caption(scene, rng)

    (scene, image, text), (scene2, image2, text2) = make(5), make(5)
    assert scene == scene2 and text == text2 and np.array_equal(image, image2)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert not np.array_equal(image, make(6)[1])


@pytest.mark.parametrize("without", ["circle", "striped", "red", "nude"])
def test_a_world_without_something_never_shows_it(without):
    def shown(name: str | None) -> set[str | None]:
        rng = np.random.default_rng(0)
        scenes = [world.sample_scene(rng, name) for _ in range(400)]
        return {part for s in scenes for part in (*s.object.split(), s.colour, s.style)}

    assert without in shown(None) and without not in shown(without)


def test_every_colour_is_seen_in_the_drawing():
    rng = np.random.default_rng(0)
    for name, rgb in world.COLOURS.items():
        image = world.draw(world.Scene("square", name, "solid", "light"), rng)
        assert np.abs(image[28:36, 28:36].mean((0, 1)) - rgb).max() < 12, name


def test_every_word_of_the_world_is_one_token_and_other_text_falls_back_to_bytes():
    ours = tokenizer.make_tokenizer()
    for word in world.WORDS:
        assert len(ours(word)["input_ids"]) == 3, word
    assert len(ours("zebra")["input_ids"]) > 3
    assert ours.unk_token_id not in ours("zebra")["input_ids"][1:-1]
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = world.caption(world.sample_scene(rng), rng)
        assert len(ours(text)["input_ids"]) <= tokenizer.MAX_TOKENS, text


def test_the_unet_has_the_block_types_of_sd14():
    unet = architecture.make_unet()
    kinds = {*unet.config["down_block_types"], *unet.config["up_block_types"]}  # pyright: ignore
    assert kinds == {"CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
    assert type(unet.mid_block).__name__ == "UNetMidBlock2DCrossAttn"
    scheduler = architecture.make_scheduler()
    assert scheduler.config["beta_schedule"] == "scaled_linear" and scheduler.config["prediction_type"] == "epsilon"


SMALL = job.Budget(
    judge_steps=3,
    judge_batch=4,
    vae_steps=3,
    vae_batch=2,
    decoder_steps=3,
    decoder_batch=1,
    num_latents=100,
    unet_batch=2,
    unet_cycles=((3, 1e-3, 5.0), (1, 1e-4, 1.0)),
)


@pytest.mark.slow
@pytest.mark.ci
def test_training_continues_bit_for_bit_and_gives_a_pipeline(tmp_path, monkeypatch):
    """Every stage interrupted after its second step, then continued, against one that was not."""
    monkeypatch.setattr(fitting, "SAVE_EVERY", 1)
    whole = train(tmp_path / "whole", budget=SMALL, quiet=True)
    original, calls = torch.optim.AdamW.step, []

    def cut(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    for stage in job.STAGES:
        calls.clear()
        monkeypatch.setattr(torch.optim.AdamW, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", budget=SMALL, stages=(stage,), quiet=True)
        monkeypatch.setattr(torch.optim.AdamW, "step", original)
        assert list((tmp_path / "cut" / "work").glob(f"{stage}*.pt"))
        train(tmp_path / "cut", budget=SMALL, stages=(stage,), quiet=True)
    for name in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()
    model = load_sd(whole)
    assert model.is_mini and model.resolution == 64
    with pytest.raises(EraseError, match="holds another training"):
        train(tmp_path / "whole", seed=1, budget=SMALL, quiet=True)
    gold = train(
        tmp_path / "gold",
        without="circle",
        budget=replace(SMALL, unet_cycles=((1, 1e-3, 5.0),)),
        parts_from=whole,
        quiet=True,
    )
    assert (gold / "judge.safetensors").read_bytes() == (whole / "judge.safetensors").read_bytes()
    assert json.loads((gold / "training.json").read_text())["identity"]["without"] == "circle"


def test_an_unknown_thing_to_leave_out_is_refused(tmp_path):
    with pytest.raises(EraseError, match="has no 'dragon'"):
        train(tmp_path / "mini", without="dragon")
    assert not (tmp_path / "mini").exists()


# --- what ships -----------------------------------------------------------------------------------------------------


@shipped
def test_the_judge_names_new_drawings_and_refuses_to_name_noise():
    network = judge.load(loading.MINI_DIR / "judge.safetensors")
    rng = np.random.default_rng(123)
    scenes = [world.sample_scene(rng) for _ in range(300)]
    answers = judge.name(network, [world.draw(scene, rng) for scene in scenes])
    assert sum(a["object"] == s.object for a, s in zip(answers, scenes, strict=True)) >= 297
    assert sum(a["style"] == (s.style or "none") for a, s in zip(answers, scenes, strict=True)) >= 297
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(20)]
    assert {a["object"] for a in judge.name(network, noise)} == {"none"}
    assert judge.accuracy(loading.MINI_DIR / "judge.safetensors")["object"] >= 0.99


@shipped
def test_the_shipped_model_is_small_opens_in_diffusers_and_says_how_it_was_made():
    files = [path for path in loading.MINI_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {"vocab.json", "merges.txt"} <= {path.name for path in files}
    model = load_sd("mini")
    assert model.is_mini and len(model.tokenizer) == model.text_encoder.config.vocab_size
    card = (loading.MINI_DIR / "README.md").read_text()
    training = json.loads((loading.MINI_DIR / "training.json").read_text())
    measured = json.loads((loading.MINI_DIR / "measured.json").read_text())
    assert f"Seed {training['identity']['seed']}" in card and "says nothing about SD v1.4" in card
    assert f"Object {measured['scores']['object']:.1%}" in card


@shipped
def test_the_shipped_model_draws_what_it_is_asked():
    """26 images, two of every object: at the measured quality fewer than 22 right would be one in a million."""
    model = load_sd("mini")
    wishes = quality.balanced(2)
    images = quality.draw(model, [w.prompt for w in wishes], [1000 + i for i in range(len(wishes))])
    scores = quality.score(judge.name(judge.load(model.folder / "judge.safetensors"), images), wishes)
    assert scores["object"] * len(wishes) >= 22
    assert len({Image.fromarray(p).tobytes() for p in images}) == len(images)


def test_balanced_wishes_ask_for_everything_evenly():
    wishes = quality.balanced(24)
    assert len(wishes) == 24 * 13
    asked = {(w.colour, w.style) for w in wishes if w.object == "circle"}
    assert len(asked) == 24  # all combinations of 6 colours and 4 styles
    answers = [{"object": w.object, "colour": w.colour or "none", "style": w.style or "none"} for w in wishes]
    assert set(quality.score(answers, wishes).values()) == {1.0}
    wrong = [{"object": "none", "colour": "none", "style": "none"} for _ in wishes]
    assert set(quality.score(wrong, wishes).values()) == {0.0}


@shipped
def test_stock_diffusers_draws_with_the_shipped_folder_as_it_is():
    """Without a dtype, diffusers loads its parts in float32 and transformers its own as stored: both must agree."""
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(loading.MINI_DIR, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a photo of a solid red circle", num_inference_steps=1).images
    assert image.size == (64, 64)
