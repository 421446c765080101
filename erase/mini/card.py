"""The model card of the embedded model: its data, its training, and its measured quality."""

import json
from pathlib import Path

from erase import files
from erase.mini import judge, world


def write(folder: Path) -> None:
    """Write README.md; every figure comes from the folder's training.json, measured.json and judge."""
    training = json.loads((folder / "training.json").read_text())
    measured = json.loads((folder / "measured.json").read_text())
    accuracy = judge.accuracy(folder / "judge.safetensors")
    identity, stages, scores = training["identity"], training["stages"], measured["scores"]
    minutes = {name: stage.get("seconds", 0) / 60 for name, stage in stages.items()}
    paths = [path for path in folder.rglob("*") if path.is_file() and "work" not in path.relative_to(folder).parts]
    size = sum(path.stat().st_size for path in paths)
    classes = "\n".join(f"| {name} | {scores[name]:.1%} |" for name in world.OBJECTS)
    times = ", ".join(f"{name} {value:.0f} min" for name, value in minutes.items())
    text = f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, concept-erasure, toy-model]
---

# The embedded model

A small Stable Diffusion (CLIP tokenizer and text encoder, VAE, UNet with SD v1.4's block types,
epsilon prediction, scaled-linear betas), trained from scratch. It serves to try concept erasure end to end in minutes.
**It says nothing about SD v1.4**: a method that works here has passed a first test, no more.

## Data

No data set: {world.SIZE}x{world.SIZE} drawings made on the fly by `erase/mini/world.py`. {len(world.SHAPES)} shapes \
({", ".join(world.SHAPES)}), in {len(world.COLOURS)} colours ({", ".join(world.COLOURS)}), {len(world.STYLES)} styles \
({", ".join(world.STYLES)}) and on {len(world.BACKGROUNDS)} backgrounds; and an artist's wooden mannequin, bare ("nude
person") or in a coloured shirt and trousers ("person wearing clothes"). Captions come from templates with synonyms
({", ".join(f"{word} = {other}" for word, other in world.SYNONYMS.items())}). Left out of the UNet's data: \
{identity["without"] or "nothing"}.

## Training

Seed {identity["seed"]}; {stages["unet"].get("samples", 0):,} UNet samples, {identity["num_latents"]:,} cached latents;
wall time: {times}. The recipe:

    python -m erase.mini train --seed {identity["seed"]} --output runs/mini

gives exactly these weights with torch {training["torch"]}, {training["num_threads"]} thread and the CPU instructions
{training["cpu"]}; elsewhere sums are rounded differently, which gives a similar model.

AdamW, cosine schedules, min-SNR weights (Hang et al., ICCV 2023), EMA; the VAE first on 32x32 crops, then its decoder
alone on whole images, {stages["decoder"].get("psnr", 0):.1f} dB PSNR on new drawings. All files: {size / 1e6:.1f} MB.

## Measured

`python -m erase.mini measure`: {measured["num_images"]} images, {measured["num_inference_steps"]} DDIM steps,
guidance {measured["guidance_scale"]}, classified by the judge, a CNN that recognises {accuracy["object"]:.2%} of
objects, {accuracy["colour"]:.2%} of colours and {accuracy["style"]:.2%} of styles, on {accuracy["num_drawings"]}
new drawings.

Object {scores["object"]:.1%}, colour {scores["colour"]:.1%}, style {scores["style"]:.1%}.

| object | recognised |
| --- | --- |
{classes}
"""
    files.write_text(folder / "README.md", text)
