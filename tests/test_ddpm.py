"""Class-conditional pixel models: labels as prompts, sampling and prediction against plain loops, what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from toy_ddpm import CLASSES, write

from erase import cli, concepts, delta, erase_concept, masks
from erase.errors import EraseError
from erase.evaluation import cli as evaluation
from erase.families import loading
from erase.families.protocol import Family
from erase.options import model_classes

FEW: dict[str, Any] = dict(num_forget=4, num_retain=4, batch_size=2, num_inference_steps=2, num_samples=0, quiet=True)


@pytest.fixture
def model(toy_ddpm_dir) -> Any:
    return loading.load(toy_ddpm_dir)


def raw(model: Any, x: torch.Tensor, t: int, labels: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.unet(x, t, class_labels=torch.tensor(labels)).sample


def alphas() -> torch.Tensor:
    """DDPM's linear betas, written out."""
    return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)


def test_images_are_those_of_ddim_with_classifier_free_guidance_written_out(model):
    """x_s = sqrt(a_s) x0 + sqrt(1 - a_s) e (Song et al., eq. 12, eta 0), e = u + g (c - u); 4 steps, x0 clipped."""
    a, g = alphas(), 2.5
    x = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    for t in (750, 500, 250, 0):
        c, u = raw(model, x, t, [0, 2]), raw(model, x, t, [3, 3])
        eps = u + g * (c - u)
        now, after = a[t].item(), a[t - 250].item() if t else 1.0
        x0 = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
        x = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
    drawn = model.draw(["cat", "tree"], [5, 6], steps=4, guidance=g, size=8)
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.draw(["cat", "tree"], [5, 6], steps=4, guidance=1.0, size=8), x, atol=1e-2)


def test_v_prediction_is_read_as_noise(tmp_path):
    """eps = sqrt(a) v + sqrt(1 - a) x (Salimans & Ho, 2022)."""
    model: Any = loading.load(write(tmp_path / "v", scheduler=DDIMScheduler(prediction_type="v_prediction")))
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 300])
    a = alphas()[300].item()
    expected = math.sqrt(a) * raw(model, x, 300, [1, 0]) + math.sqrt(1 - a) * x
    with torch.no_grad():
        seen = model(x, t, model.encode_text(["dog", "cat"]))
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_a_ddpm_folder_of_a_unet_with_conditions_works_and_its_noise_is_seeded_per_image(tmp_path):
    """DDPM's steps add noise: an image has its own generator, so it is the same in every batch."""
    folder = write(tmp_path / "ddpm", scheduler=DDPMScheduler())
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("DDIMPipeline", "DDPMPipeline"))
    model: Any = loading.load(folder)
    both = model.draw(["cat", "dog"], [1, 2], steps=3, guidance=1.0, size=8)
    one = model.draw(["dog"], [2], steps=3, guidance=1.0, size=8)
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", ["cat", "Cat", "an image of a cat", "a photo of a cat"])
def test_a_prompt_is_a_class_name_or_what_a_folder_of_images_is_called(prompt, model):
    assert model.encode_text([prompt, ""]).labels.tolist() == [0, 3]


def test_class_c_becomes_class_c_plus_1_and_the_others_are_retained():
    concept = concepts.of_class("tree", CLASSES)
    assert (concept.forget, concept.anchor, concept.retain) == (("tree",), ("cat",), ("cat", "dog"))
    assert concepts.in_prompts_of_the_code(concept) == concept
    assert concept.judge == {"type": "classes", "label": "tree"}
    with pytest.raises(EraseError, match="has no class 'three'; did you mean tree"):
        concepts.of_class("three", CLASSES)
    with pytest.raises(EraseError):
        concepts.of_class("girl", ("girl", "car"))  # never a target


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("uce", "has no maps of text states"),
        ("rece", "has no maps of text states"),
        ("speed", "has no maps of text states"),
        ("oce", "has no maps of text states"),
        ("esd-x", "scope is 'xattn'"),
        ("fmn", "has no cross-attention layers"),
        ("salun-robust", "has no table of token embeddings"),
        ("stereo", "has no table of token embeddings"),
        ("recare", "has no table of token embeddings"),
        ("hirm", "scope is 'text-first'"),
        ("advunlearn", "scope is 'text'"),
    ],
)
def test_methods_without_a_meaning_are_refused_in_one_line_before_the_first_image(
    method, message, toy_ddpm_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(Family, "draw", lambda *_, **__: pytest.fail("an image was drawn"))
    scope = {"scope": "full"} if method in {"uce", "rece", "speed", "oce", "fmn"} else {}
    with pytest.raises(EraseError, match=message) as error:
        erase_concept("cat", str(toy_ddpm_dir), method=method, output=str(tmp_path / "run"), **scope, **FEW)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "method",
    ["salun", "relabel", "salun-soft", "ga", "esd-u", "esd-full", "erasediff", "scissorhands", "sa", "sdd", "ca"],
)
def test_the_laws_for_every_method_that_has_a_meaning(method, toy_ddpm_dir, tmp_path):
    """Nothing outside the mask moves by one bit, something inside does, the delta restores the base exactly, and the
    same seed gives the same bits."""
    few = {"scissorhands": ("prepare_batches=1",), "sa": ("curvature_batches=2",)}
    how: dict[str, Any] = {
        "scope": "full",
        "mask": "random",
        "density": 0.3,
        "learning_rate": 1e-2,
        "set": few.get(method, ()),
    }
    runs = [
        erase_concept(
            "cat", str(toy_ddpm_dir), method=method, output=str(tmp_path / name), num_train_steps=4, **how, **FEW
        )
        for name in ("one", "two")
    ]
    base, new = (loading.load(folder) for folder in (toy_ddpm_dir, runs[0].folder))
    before, after = (model.state_of(model.network) for model in (base, new))
    mask, _ = masks.load(runs[0].folder / "mask.safetensors")
    moved = 0
    for name, bits in mask.items():
        same = before[f"unet.{name}"].view(torch.int32) == after[f"unet.{name}"].view(torch.int32)
        assert same[~bits].all(), name
        moved += int((~same).sum())
    assert moved == runs[0].record.weights.changed > 0
    removed = delta.remove(after, delta.load(runs[0].folder / "delta.safetensors"))
    assert delta.content_hash(removed) == delta.content_hash(before)
    assert runs[1].record.model.result_hash == runs[0].record.model.result_hash


def test_the_command_takes_a_class_by_its_name_and_refuses_others(toy_ddpm_dir, tmp_path, capsys):
    flags = ["--num-forget", "4", "--num-retain", "4", "--batch-size", "2", "--steps", "2", "--num-train-steps", "2"]
    shared = ["--model", str(toy_ddpm_dir), "--output", str(tmp_path / "run"), "--quiet", "--num-samples", "0", *flags]
    with pytest.raises(SystemExit) as end:
        cli.main(["--concept", "cart", *shared])
    assert end.value.code == 2 and "has no class 'cart'; did you mean cat" in capsys.readouterr().err
    cli.main(["--concept", "cat", *shared, "--recipe", "reference"])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["concept"]["anchor"] == ["dog"] and record["settings"]["target"] == "fixed"
    assert model_classes.classes_of(str(tmp_path / "run")) == CLASSES  # the result is such a model again


def test_the_commands_remove_and_apply_take_a_folder_without_files_for_the_class_names(toy_ddpm_dir, tmp_path):
    run = erase_concept("cat", str(toy_ddpm_dir), output=str(tmp_path / "run"), num_train_steps=2, **FEW)
    change = str(run.folder / "delta.safetensors")
    cli.main(["remove", "--delta", change, "--model", str(run.folder), "--output", str(tmp_path / "base")])
    cli.main(["apply", "--delta", change, "--model", str(tmp_path / "base"), "--output", str(tmp_path / "again")])
    hashes = []
    for folder in (toy_ddpm_dir, tmp_path / "base", run.folder, tmp_path / "again"):
        model: Any = loading.load(folder)
        hashes.append(delta.content_hash(model.state_of(model.network)))
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def altered(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"id2label": None}, "has no class names; add them"),
        ("model_index.json", {"id2label": {"0": "cat", "2": "dog"}}, "id2label must name two or more different"),
        ("model_index.json", {"id2label": {"0": "cat", "1": "Cat"}}, "id2label must name two or more different"),
        ("model_index.json", {"id2label": {"0": "cat", "1": "dog"}}, "it must be 3, with the null class"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "is a DDIMPipeline with the component 'vae'"),
        ("model_index.json", {"unet": ["diffusers", "UNet1DModel"]}, "whose UNet is UNet1DModel instead of"),
        ("unet/config.json", {"num_class_embeds": None}, "is an unconditional pixel model"),
        ("unet/config.json", {"sample_size": None}, "it must be a side in pixels"),
    ],
)
def test_other_pixel_models_are_refused_by_name(file, values, message, toy_ddpm_dir, tmp_path):
    folder = altered(Path(shutil.copytree(toy_ddpm_dir, tmp_path / "model")), file, **values)
    with pytest.raises(EraseError, match=message) as error:
        loading.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", [cli.main, evaluation.main])
def test_a_folder_without_class_names_is_told_what_it_lacks(command, toy_ddpm_dir, tmp_path, capsys):
    """It is not asked for --kind, which is for the free text of other models."""
    folder = altered(Path(shutil.copytree(toy_ddpm_dir, tmp_path / "model")), "model_index.json", id2label=None)
    first = [] if command is cli.main else ["generate", "--task", "images", "--output", str(tmp_path / "images")]
    with pytest.raises(SystemExit) as end:
        command([*first, "--concept", "cat", "--model", str(folder)])
    told = capsys.readouterr().err
    assert end.value.code == 2 and "model_index.json has no class names; add them by their labels" in told
    assert "--kind" not in told and len(told.splitlines()) == 1


def test_a_learned_variance_is_refused(tmp_path):
    with pytest.raises(EraseError, match="takes 3 channels and gives 6"):
        loading.load(write(tmp_path / "six", out_channels=6))


def test_folders_of_images_by_class_are_training_data(toy_ddpm_dir, tmp_path):
    from PIL import Image

    for name in ("dog", "tree"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / name / "a.png")
    how = {name: value for name, value in FEW.items() if name != "num_retain"}
    folder = str(tmp_path / "run")
    run = erase_concept(
        "cat", str(toy_ddpm_dir), output=folder, num_train_steps=2, retain_images=str(tmp_path / "images"), **how
    )
    assert run.record.data["num_retain"] == 2


def test_the_result_opens_with_stock_diffusers_and_predicts_the_same(toy_ddpm_dir, tmp_path):
    run = erase_concept("cat", str(toy_ddpm_dir), output=str(tmp_path / "run"), num_train_steps=2, **FEW)
    again: Any = UNet2DModel.from_pretrained(run.folder, subfolder="unet")
    ours: Any = loading.load(run.folder)
    x, labels = torch.randn(1, 3, 8, 8), torch.tensor([1])
    with torch.no_grad():
        seen = [unet(x, 10, class_labels=labels).sample for unet in (again, ours.unet)]
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)  # bits depend on how weights lie in memory
    state = ours.unet.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        ("xattn-kv", "choose one of this model's"),
        ("xattn", "choose one of this model's"),
        ("ful", "did you mean full?"),
    ],
)
def test_a_scope_of_other_models_is_taken_for_no_slip(toy_ddpm_dir, scope, said):
    with pytest.raises(EraseError, match=f"--scope is '{scope}', which this model does not have; .*") as error:
        loading.load(toy_ddpm_dir).trainable(scope)
    assert said in str(error.value)
