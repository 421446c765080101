"""Laws of the model card: every setting is listed, text from elsewhere is escaped, and no local path is told."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erase import delta
from erase.concepts import Concept
from erase.families.sd import StableDiffusion
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.runs import card, samples

CONCEPT = Concept("cat", "object", ("a cat",), ("a dog",), ("a house",))


def written(concept: Concept = CONCEPT, after: Any = None, **options: Any) -> str:
    state = {"unet.a": torch.zeros(3)}
    change = delta.difference(state, {"unet.a": torch.ones(3)}, {})
    settings = resolve(Settings("cat", **options), "object", {})
    return card.model_card(settings, concept, change, family=StableDiffusion, loading="load()", after=after)


def test_zero_is_a_setting():
    """The control: None, absent flags and empty lists are left out. (2.9)"""
    text = written(alpha=0.0, guidance_scale=0.0, num_samples=0)
    for line in ("alpha | 0.0", "guidance_scale | 0.0", "seed | 0", "num_samples | 0", "mask_guidance | 0.0"):
        assert f"| {line} |" in text
    assert not {"resume", "forget_images", "rank", "retain"} & set(card_names(text))


def card_names(text: str) -> list[str]:
    return [line.split("|")[1].strip() for line in text.partition("| --- |")[2].splitlines() if line.startswith("| ")]


def test_samples_are_generated_at_the_guidance_that_is_asked_for(tmp_path):
    """Zero is a guidance, not the absence of one. (2.9)"""
    seen = []

    def draw(prompts, seeds, **how):
        seen.append((how["guidance"], how["steps"]))
        return torch.zeros(len(prompts), 4, 2, 2)

    images = lambda latents, together: torch.zeros(len(latents), 3, 8, 8)  # noqa: E731
    parts: Any = {"draw": draw, "decode": images, "reload_network": lambda dtype: None}
    model: Any = SimpleNamespace(**parts, is_mini=True, resolution=8)
    settings = resolve(Settings("cat", guidance_scale=0.0, num_inference_steps=1, num_samples=1), "object", {})
    samples.write_samples(tmp_path / "samples.png", model, CONCEPT, settings)
    assert set(seen) == {(0.0, 1)}


HOSTILE = "<img src=x onerror=alert(1)> | `code` *b* [x](y)\n---\nlicense: mit\n\x1b[31m"


def test_names_and_prompts_cannot_change_the_card():
    """HTML, tables, links, headers and terminal sequences stay text. (4.11)"""
    concept = replace(CONCEPT, name=HOSTILE, forget=(HOSTILE,), anchor=(HOSTILE,))
    text = written(concept, forget=(HOSTILE,), after={"run": "runs/x", "model": "mini", "concepts": [HOSTILE]})
    plain = written()
    assert "\x1b" not in text
    assert text.splitlines().count("---") == plain.splitlines().count("---") == 2
    assert not [line for line in text.splitlines() if line.startswith("license: mit")]
    for mark in ("<img", "`code", "*b", "[x", "| \\`"):
        assert text.count(mark) == text.count("\\" + mark), mark
    rows = [line for line in text.splitlines() if line.startswith("| forget |")]
    assert len(rows) == 1 and rows[0].count("|") - rows[0].count("\\|") == 3


@pytest.mark.parametrize(
    "model", ["/home/somebody/models/my-base", "~/models/my-base", "./my-base", "models/x/my-base"]
)
def test_no_local_path_is_told(model, tmp_path, monkeypatch):
    """Of a local folder the card names the last part, a hub id stays whole. (4.11)"""
    monkeypatch.setenv("HOME", "/home/somebody")
    private = "/home/somebody/secret"
    options: dict[str, Any] = {
        name: f"{private}/{name}" for name in ("output", "cache_dir", "config", "forget_images", "mask")
    }
    text = written(model=model, after={"run": private, "model": model, "concepts": ["a"]}, **options)
    assert "somebody" not in text and f"{private}/" not in text and "models" not in text
    assert "my-base" in text and "base_model" not in text
    text = written(model="CompVis/stable-diffusion-v1-4")
    assert "erased from CompVis/stable-diffusion-v1-4" in text and "base_model: CompVis/stable-diffusion-v1-4" in text


def test_a_folder_named_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("someone/model").mkdir(parents=True)
    assert "base_model" not in written(model="someone/model")
