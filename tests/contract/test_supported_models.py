"""Every row of the table of supported models holds, on a tiny random model of its kind; other kinds are refused."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from toy_sd3 import clip_tokenizer

from erase import delta, erase_concept, guards
from erase.concepts import Concept
from erase.errors import EraseError
from erase.export.single_file import save_single_file
from erase.families import architecture, ddim_checkpoint, loading, registry
from erase.families.loading import MINI_DIR
from erase.families.side_by_side_unet import SideBySideUNet2DModel
from erase.options.model_classes import MINI_PIXEL_DIR

Folders = Callable[[str], Path]  # from the name of a fixture to a copy of its folder
ROWS = {
    model.name: (family, model)
    for family in map(registry.FAMILIES.load, registry.FAMILIES.names())
    for model in family.models
}
CONCEPT = Concept("cat", "object", forget=("a cat",), anchor=("a dog",), retain=("a tree",))
PROMPTS = ["a photo of a cat", "a house"]


def with_scheduler(folder: Path, scheduler: Any = None, **values: Any) -> Path:
    if scheduler is not None:
        own = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        beta = {name: own[name] for name in ("beta_start", "beta_end", "beta_schedule")}
        scheduler(**beta, steps_offset=1).save_pretrained(folder / "scheduler")
        edit(folder / "model_index.json", scheduler=["diffusers", scheduler.__name__])
    if values:
        edit(folder / "scheduler" / "scheduler_config.json", **values)
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_second(folder: Path) -> Path:
    """Stable Diffusion 2: linear projections in the UNet, an OpenCLIP text encoder, and padding with "!"."""
    options = json.loads((folder / "unet" / "config.json").read_text()) | {"use_linear_projection": True}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(options).save_pretrained(folder / "unet")  # pyright: ignore
    edit(folder / "text_encoder" / "config.json", hidden_act="gelu")
    clip_tokenizer(pad_token="!").save_pretrained(folder / "tokenizer")
    return folder


def as_published(folder: Path) -> Path:
    """A class-conditional model whose network is DDIM's, as small as its groups of 32 channels allow."""
    shape: Any = dict(side=16, channels=(32,), attends=(True,), layers=1, num_classes=3)
    torch.manual_seed(0)
    unet: Any = SideBySideUNet2DModel(**ddim_checkpoint.network_options(**shape))
    index = json.loads((folder / "model_index.json").read_text())
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False)).save_pretrained(folder)  # pyright: ignore
    edit(folder / "model_index.json", id2label=index["id2label"])
    return folder


BUILT: dict[str, Callable[[Folders], Path]] = {
    "Stable Diffusion 1.1 to 1.5 and fine-tunes of it": lambda folders: folders("toy_pipeline_dir"),
    "Stable Diffusion 1 with an LCM-LoRA merged": lambda folders: with_scheduler(
        folders("toy_pipeline_dir"), LCMScheduler
    ),
    "Stable Diffusion 2.0 and 2.1, epsilon prediction": lambda folders: as_second(folders("toy_pipeline_dir")),
    "Stable Diffusion 2.0 and 2.1, v prediction": lambda folders: with_scheduler(
        as_second(folders("toy_pipeline_dir")), prediction_type="v_prediction"
    ),
    "SD-Turbo": lambda folders: with_scheduler(
        as_second(folders("toy_pipeline_dir")), EulerAncestralDiscreteScheduler, timestep_spacing="trailing"
    ),
    "the embedded model, `mini`": lambda folders: MINI_DIR,
    "Stable Diffusion XL base and fine-tunes of it": lambda folders: folders("toy_sdxl_dir"),
    "Stable Diffusion XL, v prediction": lambda folders: with_scheduler(
        folders("toy_sdxl_dir"), prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "SDXL-Turbo": lambda folders: with_scheduler(
        folders("toy_sdxl_dir"), EulerAncestralDiscreteScheduler, timestep_spacing="trailing"
    ),
    "Stable Diffusion 3 and 3.5 with T5, experimental": lambda folders: folders("toy_sd3_dir"),
    "Class-conditional pixel models, epsilon prediction": lambda folders: folders("toy_ddpm_dir"),
    "Class-conditional pixel models, v prediction": lambda folders: with_scheduler(
        folders("toy_ddpm_dir"), prediction_type="v_prediction"
    ),
    "Selective Amnesia's and SFRon's checkpoints (DDIM's UNet)": lambda folders: as_published(folders("toy_ddpm_dir")),
    "the embedded pixel model, `mini-pixel`": lambda folders: MINI_PIXEL_DIR,
    "SDXL-Lightning": lambda folders: with_scheduler(folders("toy_sdxl_dir"), timestep_spacing="trailing"),
}


@pytest.fixture
def folders(request, tmp_path) -> Folders:
    count = itertools.count()
    return lambda name: Path(shutil.copytree(request.getfixturevalue(name), tmp_path / f"model-{next(count)}"))


def test_every_row_has_a_model_of_its_kind():
    assert ROWS.keys() == BUILT.keys() and len(ROWS) == 15


@pytest.mark.parametrize("name", BUILT)
def test_it_generates_what_stock_diffusers_generates_and_takes_a_guard_if_it_is_guided(name, folders):
    family, row = ROWS[name]
    folder = BUILT[name](folders)
    model: Any = loading.load(folder)
    assert ("v prediction" in name) == (
        getattr(model, "prediction_type", "") == "v_prediction"
    ) or folder == MINI_PIXEL_DIR
    assert isinstance(model, family)
    if model.classes:
        return  # no pipeline of diffusers passes labels; tests/test_ddpm.py compares with a loop of its own
    guidance, size = model.guidance_scale if row.guided else 0.0, model.resolution
    how: Any = {"steps": 2, "guidance": guidance, "size": size}
    plain = model.draw(PROMPTS, [0, 1], **how)
    extra: dict[str, Any] = {"sd": {"safety_checker": None}, "sdxl": {"add_watermarker": False}}
    pipeline: Any = getattr(diffusers, family.pipelines[0]).from_pretrained(folder, **extra.get(family.family, {}))
    pipeline.set_progress_bar_config(disable=True)
    given: Any = {"num_inference_steps": 2, "guidance_scale": guidance, "height": size, "width": size}
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    theirs = pipeline(PROMPTS, generator=draws, output_type="latent", **given).images
    torch.testing.assert_close(plain, theirs, rtol=1e-3, atol=1e-3 * plain.abs().max().item())
    if not family.takes_guards:
        return
    model.guard = guards.make("nag", "a dog")
    assert not torch.allclose(model.draw(PROMPTS, [0, 1], **how), plain)
    model.guard = guards.make("negative", "a dog")
    if row.guided:
        assert not torch.allclose(model.draw(PROMPTS, [0, 1], **how), plain)
    else:
        with pytest.raises(EraseError, match="a guard needs guidance_scale above 1"):
            model.draw(PROMPTS, [0, 1], **how)


@pytest.mark.parametrize("name", [name for name, (_, row) in ROWS.items() if not row.guided])
def test_trajectories_of_distilled_models_begin_at_the_last_timestep(name, folders):
    """They were trained for it: an LCM's schedule is 999, 759, 499, 259 in four steps."""
    assert loading.load(BUILT[name](folders)).times(4).tolist() == [999, 749, 499, 249]
    assert loading.load(BUILT["Stable Diffusion XL base and fine-tunes of it"](folders)).times(4)[0] == 751  # control


@pytest.mark.parametrize("name", BUILT)
def test_it_is_erased_from_and_the_delta_takes_it_back(name, folders, tmp_path):
    family, row = ROWS[name]
    source, output = BUILT[name](folders), tmp_path / "run"
    options: Any = {"num_inference_steps": 2, "num_train_steps": 2, "num_samples": 0, "learning_rate": 1e-3}
    options |= {} if row.guided else {"guidance_scale": 0.0, "sampler": "model"}
    sizes: Any = {"num_forget": 2, "num_retain": 2, "batch_size": 2}
    embedded = {MINI_DIR: "mini", MINI_PIXEL_DIR: "mini-pixel"}
    concept = "circle" if source in embedded else "cat" if family.family == "ddpm" else CONCEPT
    where = embedded.get(source, source)
    erase_concept(concept, where, output=str(output), device="cpu", quiet=True, **options, **sizes)
    base, new = (family.state_of(family.read_network(folder)) for folder in (source, output))
    assert delta.content_hash(base) != delta.content_hash(new)
    removed = delta.remove(new, delta.load(output / "delta.safetensors"))
    assert delta.content_hash(removed) == delta.content_hash(base)


@pytest.mark.parametrize("name", BUILT)
def test_single_files_of_it_are_read_and_written_as_its_row_says(name, folders, tmp_path):
    _, row = ROWS[name]
    folder, path = BUILT[name](folders), tmp_path / "model.safetensors"
    if row.written:
        save_single_file(path, folder, dtype="fp32")
    else:
        with pytest.raises(EraseError, match="written as folders only"):
            save_single_file(path, folder)
    if not row.read:
        return
    model, base = loading.load(path, config=str(folder)), loading.load(folder)
    assert {part: model.hash_of(part) for part in model.parts} == {part: base.hash_of(part) for part in base.parts}
    assert dict(model.sampler().config) == dict(base.sampler().config)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"unet/config.json": {"in_channels": 9}, "": "StableDiffusionInpaintPipeline"}, "an inpainting model"),
        ({"unet/config.json": {"time_cond_proj_dim": 8}}, "a latent consistency model (LCM)"),
        ({"": "LatentConsistencyModelPipeline"}, "a latent consistency model (LCM)"),
    ],
)
def test_variants_with_other_inputs_are_refused_by_a_name_of_the_list(values, kind, folders):
    folder = folders("toy_pipeline_dir")
    for file, change in values.items():
        edit(folder / (file or "model_index.json"), **(change if file else {"_class_name": change}))
    with pytest.raises(EraseError) as error:
        loading.load(folder)
    assert kind in str(error.value)
    assert any(listed.startswith(kind) for listed in architecture.refused_kinds())
