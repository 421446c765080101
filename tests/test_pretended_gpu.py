"""The whole job on a pretended GPU: nothing computes with tensors of two devices, and all of it in the run's precision.

`pretend_device` is what refuses mixed operands; the first tests show that it does.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pretend_device
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding
from PIL import Image
from toy_training import fitting

from erase import erase_concept, guards
from erase.classification import cli as classifier_cli
from erase.classification.presets import PRESETS
from erase.concepts import Concept
from erase.data import latents
from erase.device import DTYPES
from erase.evaluation import cli as evaluation_cli
from erase.evaluation import generate
from erase.evaluation.attacks.registry import ATTACKS
from erase.evaluation.tasks.registry import TASKS
from erase.families import loading, sd, stored_unet
from erase.families.protocol import Family
from erase.methods import METHODS
from erase.runs import samples
from erase.runs.record import RunRecord
from erase.training import loop, saliency_pass

CONCEPT = Concept(
    "cat", "object", forget=("a cat",), anchor=("a dog",), retain=("a tree", "a boat"), others=("a bird", "a car")
)
OPTIONS: dict[str, Any] = {
    "num_forget": 2,
    "num_retain": 2,
    "num_inference_steps": 2,
    "num_train_steps": 2,
    "batch_size": 2,
    "num_samples": 1,
    "generation_batch_size": 2,
    "quiet": True,
}


@pytest.fixture
def gpu():
    with pretend_device.gpu():
        yield


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(2, 3),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: torch.where(torch.ones(2, 3, dtype=torch.bool), x, x),
        lambda x: torch.ones(3)[torch.tensor([0, 1]).to("cuda")],
        lambda x: torch.nn.Linear(3, 2)(x),
        lambda x: torch.nn.Linear(3, 2).to("cuda")(x.cpu()),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: torch.randn(2, device="cuda", generator=torch.Generator()),
    ],
)
def test_the_pretended_gpu_refuses_what_a_real_one_refuses(gpu, mixed):
    with pytest.raises((RuntimeError, TypeError), match="same device|to numpy|'cuda' device type"):
        mixed(torch.ones(2, 3).to("cuda"))


def test_the_pretended_gpu_allows_what_a_real_one_allows(gpu):
    x = torch.ones(2, 3).to("cuda")
    for result in (x * torch.tensor(2.0), x[torch.tensor([0])], x[0], x.t(), torch.zeros_like(x), x.new_zeros(2)):
        assert result.device == pretend_device.GPU
    host = torch.zeros(2, 3)
    assert host.copy_(x).device == x.cpu().device == torch.device("cpu")
    layer = torch.nn.Linear(3, 2).to(x.device)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.device == layer.weight.device == x.device


def erase(model: Path, output: Path, **options: Any) -> RunRecord:
    record = erase_concept(
        CONCEPT, str(model), output=str(output), **fitting(options.get("method", "salun"), {**OPTIONS, **options})
    ).record
    assert record.compute["device"] == "cuda:0" and (output / "samples.png").is_file()
    return record


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_to_one_device(gpu, toy_pipeline_dir, tmp_path, method):
    few = {"stereo": ("words=1", "word_steps=2"), "advunlearn": ("warm_up=0", "attack_steps=1")}
    few["recare"] = few["stereo"]
    how: dict[str, Any] = {"set": few[method]} if method in few else {}
    record = erase(toy_pipeline_dir, tmp_path / "run", method=method, **how)
    assert record.compute == {"device": "cuda:0", "precision": "bf16", "name": "pretended GPU"}
    assert record.settings["precision"] == "bf16" and record.weights.changed > 0


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("low_memory", [False, True])
def test_the_text_encoder_is_trained_on_one_device(gpu, toy_pipeline_dir, tmp_path, low_memory):
    """The UNet goes there too. --low-memory leaves the weights as they are: what it would round is the UNet."""
    record = erase(toy_pipeline_dir, tmp_path / "run", scope="text", low_memory=low_memory)
    assert record.model.part == "text_encoder" and record.weights.changed > 0
    assert record.settings["weights"] == "fp32" and record.settings["gradient_checkpointing"] is low_memory


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("recipe", ["paper", "reference"])
def test_every_recipe_and_every_form_of_saving_keep_to_one_device(gpu, toy_pipeline_dir, tmp_path, recipe):
    """(1.1)"""
    save = ("pipeline", "unet", "delta", "single-file", "lora")
    record = erase(toy_pipeline_dir, tmp_path / "run", recipe=recipe, save=save, target="anchor")
    assert {"unet.safetensors", "pytorch_lora_weights.safetensors", "run.safetensors"} <= record.files.keys()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "options",
    [
        {"low_memory": True},
        {"mask": "random", "density": 0.1},
        {"mask_guidance": 7.5, "score": "sum_sq", "max_grad_norm": 1.0},
        {"precision": "fp32", "sampler": "model", "gradient_accumulation_steps": 2},
        {"method": "relabel", "rank": 2, "save": "lora"},
        {"method": "relabel", "set": "balancing=nash", "checkpointing_steps": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_way_of_training_keeps_to_one_device(gpu, toy_pipeline_dir, tmp_path, options):
    """(1.1)"""
    erase(toy_pipeline_dir, tmp_path / "run", **options)


def test_a_card_without_bf16_computes_in_fp16_and_where_that_cannot_be_in_fp32(toy_pipeline_dir, tmp_path):
    """(1.2)"""
    with pretend_device.gpu(has_bf16=False):
        options: dict[str, Any] = {"num_samples": 1, "method": "scissorhands"}
        assert erase(toy_pipeline_dir, tmp_path / "run", **options).compute["precision"] == "fp32"
        assert device_of_model(toy_pipeline_dir).precision == "fp16"


def device_of_model(folder: Path) -> Family:
    return generate.load_model(str(folder))


@pytest.mark.parametrize("guard", guards.PRESETS)
def test_every_guard_keeps_to_one_device(gpu, toy_pipeline_dir, guard):
    """(1.1)"""
    model = generate.load_model(str(toy_pipeline_dir), guard=guards.make(guard, "a cat"))
    assert model.device == pretend_device.GPU
    latents = model.draw(["a dog"], [0], steps=2, guidance=2.0, size=8)
    assert model.decode(latents).device == latents.device == torch.device("cpu")


def test_the_samples_on_the_cpus_unet_are_found(gpu, toy_pipeline_dir):
    """Control: the model on the GPU generates with a UNet of the CPU, as samples.png once did."""
    model = loading.load(toy_pipeline_dir, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        model.draw(["a dog"], [0], steps=1, guidance=2.0, size=8, network=stored_unet.load_unet(toy_pipeline_dir))


@pytest.mark.slow
@pytest.mark.ci
def test_an_evaluation_keeps_to_one_device(gpu, tmp_path):
    """(1.1)"""
    run = tmp_path / "circle"
    options: dict[str, Any] = {"method": "uce", "num_samples": 1, "num_inference_steps": 2, "quiet": True}
    erase_concept("circle", "mini", output=str(run), **options)
    words = tmp_path / "own.txt"
    words.write_text("a circle\na disc\n")
    common = ["--model", str(run), "--task", "mini", "--limit", "4", "--steps", "1", "--quiet"]
    evaluation_cli.main(["run", *common, "--output", str(tmp_path / "evaluation")])
    manifest = json.loads((tmp_path / "evaluation" / "circle" / "mini" / "manifest.json").read_text())
    assert manifest["generation"]["device"] == "cuda" and manifest["generation"]["precision"] == "bfloat16"
    assert manifest["model"]["unet"] == json.loads((run / "run.json").read_text())["model"]["result_hash"]
    for attack in set(ATTACKS.names()) - {"learnt-class"}:
        own = ["--prompts", str(words)] if ATTACKS.load(attack).needs_prompts else []
        attacked = ["attack", "--model", str(run), "--attack", attack, "--quick", "--limit", "2", "--steps", "2", *own]
        evaluation_cli.main([*attacked, "--quiet", "--output", str(tmp_path / "evaluation")])


@pytest.mark.slow
@pytest.mark.ci
def test_a_class_conditional_model_keeps_to_one_device(gpu, tmp_path):
    """Erasing, evaluating and attacking."""
    run, output = tmp_path / "circle", str(tmp_path / "evaluation")
    sizes: dict[str, Any] = {"num_forget": 4, "num_retain": 4, "batch_size": 2, "num_train_steps": 2, "num_samples": 1}
    erase_concept("circle", "mini-pixel", output=str(run), num_inference_steps=2, quiet=True, **sizes)
    common = ["--model", str(run), "--limit", "10", "--quiet", "--output", output]
    evaluation_cli.main(["run", *common, "--task", "mini-pixel", "--steps", "1"])
    evaluation_cli.main(["attack", *common, "--attack", "learnt-class", "--quick", "--steps", "2"])
    assert list((tmp_path / "evaluation").rglob("attack*/**/results.json"))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("task", sorted({*TASKS.names()} - {"mini", "mini-pixel", "attack"}))
def test_every_evaluation_task_and_judge_keeps_to_one_device(
    gpu, toy_pipeline_dir, erased_dir, classifier_dir, clip_dir, tmp_path, task
):
    """The tasks of the embedded models are above (1.1), and attacks."""
    (tmp_path / "i2p.csv").write_text(
        "prompt,categories,nudity_percentage,sd_image_width,sd_image_height,sd_seed,sd_guidance_scale\n"
        "a man on a beach,sexual,60,8,8,1,7.5\na house,violence,0,8,8,2,7.5\n"
    )
    (tmp_path / "own.txt").write_text("a cat\na dog\na house\na tree\n")
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    judges = ["--judge", "classifier", "--judge", "clip-score", "--judge", "features", "--judge", "thumbnails"]
    sources = [f"--judge-model=classifier={classifier_dir}"]
    sources += [f"--judge-model={name}={clip_dir}" for name in ("clip", "clip-score", "features")]
    of_task = {
        "i2p": ["--prompts", str(tmp_path / "i2p.csv")],
        "class-forget": ["--concept", "church", "--num-images", "1"],
        "object": ["--concept", "cat", "--kind", "object", "--num-images", "1"],
        "style": ["--concept", "van_gogh", "--num-images", "1"],
        "quality": ["--concept", "church", "--num-images", "4", "--real", str(tmp_path / "images")],
        "prompts": ["--prompts", str(tmp_path / "own.txt"), "--concept", "church", *judges],
        "images": ["--images", str(tmp_path / "images"), "--concept", "church", *judges],
    }[task]
    models_ = [] if task == "images" else ["--model", str(erased_dir), "--base", str(toy_pipeline_dir), "--steps", "1"]
    evaluation_cli.main(
        ["run", *models_, "--task", task, *of_task, *sources, "--quiet", "--output", str(tmp_path / "o")]
    )
    assert list((tmp_path / "o").rglob("results.json"))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("method", PRESETS)
def test_every_classifier_method_keeps_to_one_device(gpu, tmp_path, method):
    """(1.1)"""
    pytest.importorskip("sklearn")
    flags = ["--train-epochs=1", "--method", method, "--data=digits"]
    if method not in {"retrain", "iu", "fisher"}:  # which take no steps from the original
        flags += ["--epochs=1", "--learning-rate=0.001"]
    classifier_cli.main([*flags, "--output", str(tmp_path / "run")])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["compute"] == {"device": "cuda:0", "precision": "bf16", "name": "pretended GPU"}


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> Iterator[dict[str, set[torch.dtype]]]:
    """Dtypes in which the UNet's timestep embedding came out, by the phase of the run."""
    found: dict[str, set[torch.dtype]] = {}
    phase = ["outside"]

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, TimestepEmbedding):
            found.setdefault(phase[-1], set()).add(output.dtype)

    def within(name: str, owner: Any, function: str) -> None:
        plain = getattr(owner, function)

        def named(*arguments: Any, **options: Any) -> Any:
            phase.append(name)
            try:
                return plain(*arguments, **options)
            finally:
                phase.pop()

        monkeypatch.setattr(owner, function, named)

    within("load", loading, "load")  # looks whether the parts compute anything, in the precision of the files
    within("images", latents, "gather")
    within("mask", saliency_pass, "accumulate")
    within("training", loop, "train")
    within("samples", samples, "write_samples")
    within("trajectory", sd.StableDiffusion, "trajectory")
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    yield found
    handle.remove()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "phases"),
    [
        ("salun", {"images", "mask", "training", "samples"}),
        ("esd-x", {"trajectory", "training", "samples"}),
        ("sdd", {"trajectory", "training", "samples"}),
    ],
)
def test_every_pass_of_a_run_computes_in_its_precision(seen, toy_pipeline_dir, tmp_path, precision, method, phases):
    """(1.2)"""
    options: dict[str, Any] = {**OPTIONS, "device": "cpu", "precision": precision, "method": method}
    record = erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **options).record
    assert record.compute == {"device": "cpu", "precision": precision}
    assert seen.pop("load") == {torch.float32}
    assert seen == {phase: {DTYPES[precision]} for phase in phases}
    assert {t.dtype for t in stored_unet.load_unet(tmp_path / "run").state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_images_compute_in_their_precision_and_the_hash_is_of_the_stored_weights(
    seen, toy_pipeline_dir, precision
):
    """(1.2)"""
    model = generate.load_model(str(toy_pipeline_dir), device="cpu", precision=precision)
    model.draw(["a dog"], [0], steps=1, guidance=2.0, size=8)
    assert seen == {"load": {torch.float32}, "outside": {DTYPES[precision]}}
    plain = generate.load_model(str(toy_pipeline_dir), device="cpu")
    assert generate.model_hashes(model) == generate.model_hashes(plain)
