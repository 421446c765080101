"""The estimate before a run, against what autograd really keeps; and what `--low-memory` chooses."""

from typing import Any

import pytest
import torch
from loaded import load_sd
from safetensors.torch import save_file

from erase import delta, erase_concept, masks, tensor_files
from erase.concepts import Concept
from erase.data import latents
from erase.errors import EraseError
from erase.families import loading, sd
from erase.optim import MaskedAdam
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.runs import planning
from erase.training import loop, memory
from erase.training.exchanged import Exchanged

CONCEPT = Concept("cat", "object", forget=("a cat",), anchor=("a dog",), retain=("a tree",))
OPTIONS: dict[str, Any] = {"num_forget": 2, "num_retain": 2, "num_inference_steps": 2, "num_train_steps": 2}
OPTIONS |= {"batch_size": 2, "num_samples": 1, "learning_rate": 1e-2, "device": "cpu", "quiet": True}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_a_real_forward_pass_keeps(tiny_pipeline_dir, checkpointing):
    """Without checkpointing to the byte; with it, of what is kept until backward, all but the block's own part."""
    model = load_sd(tiny_pipeline_dir)
    unet: Any = model.network.requires_grad_(True)
    weights, kept = {p.untyped_storage().data_ptr() for p in unet.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 5]), encoder_hidden_states=torch.randn(2, 77, 16))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.sample.requires_grad
    found = memory.activations(model, 2, 64, torch.float32, checkpointing=checkpointing)
    assert found < 0.7 * real if checkpointing else found == real


def test_the_estimate_counts_every_byte_once(tiny_pipeline_dir):
    """Activations aside it is arithmetic: N weights of 2 bytes; k = N / 10 have moments, master, gradient, base."""
    model = load_sd(tiny_pipeline_dir)
    parameters = dict(model.network.named_parameters())
    n = sum(p.numel() for p in parameters.values())
    k, largest = n // 10, max(p.numel() for p in parameters.values())
    options = {"resolution": 64, "mask_batch": 4, "part": 1, "checkpointing": True, "copies": 1}
    needs = memory.estimate(model, parameters, density=0.1, dtype=torch.bfloat16, **options)
    kept = memory.activations(model, 1, 64, torch.bfloat16, checkpointing=True)
    expected = 2 * (n // 8) + max(2 * n + k * (8 + 4 + 2 + 2) + kept + 2 * largest, 4 * n + 4 * k)
    assert needs["training"] - memory.LIBRARIES == pytest.approx(expected, rel=1e-3)
    assert needs["mask"] > memory.LIBRARIES + 6 * n
    whole = memory.estimate(model, parameters, density=1.0, dtype=torch.float32, **{**options, "mask_batch": None})
    assert "mask" not in whole and whole["training"] > needs["training"]


def test_a_closed_form_needs_its_weights_twice_in_float64_and_neither_activations_nor_moments(tiny_pipeline_dir):
    model = load_sd(tiny_pipeline_dir)
    settings = resolve(Settings("church", method="uce", low_memory=True), "object", {})
    parameters = {n: p for n, p in model.unet.named_parameters() if n.endswith(("attn2.to_k.weight", "to_v.weight"))}
    needs = planning.needed_memory(settings, model, parameters)
    weights = 4 * sum(p.numel() for p in model.unet.parameters())
    assert needs["solving"] == memory.LIBRARIES + weights + 16 * sum(p.numel() for p in parameters.values())
    assert needs.keys() == {"generating", "solving", "writing"}


def test_low_memory_cuts_no_batch_whose_activations_are_small(toy_pipeline_dir):
    """A step of the embedded model took ten times as long in parts of one image, for nothing. (1.4)

    A megabyte an image makes a hundred of them; SD v1.4's 310 leave one.
    """
    model = load_sd(toy_pipeline_dir)
    each = memory.activations(model, 1, 4 * model.multiple, torch.float32, checkpointing=True)
    assert memory.part_of_batch(model, 4 * model.multiple) == memory.SMALL // each > 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "activations", lambda *_, **__: 310_000_000)
        assert memory.part_of_batch(model, 64 * model.multiple) == 1


def test_low_memory_chooses_checkpointing_parts_of_one_image_and_on_a_gpu_bf16_weights():
    defaults = {"batch_size": 6}
    plain = resolve(Settings("church"), "object", defaults)
    assert (plain.gradient_checkpointing, plain.gradient_accumulation_steps, plain.weights) == (False, 1, "fp32")
    low = resolve(Settings("church", low_memory=True), "object", defaults)
    assert (low.gradient_checkpointing, low.gradient_accumulation_steps, low.weights) == (True, 6, "fp32")
    low = resolve(Settings("church", low_memory=True), "object", defaults, num_processes=2, can_round=True)
    assert (low.gradient_accumulation_steps, low.weights) == (3, "bf16")
    low = resolve(Settings("church", low_memory=True), "object", defaults, part=4)
    assert low.gradient_accumulation_steps == 2  # of 3 images each, as 4 do not divide 6
    low = resolve(Settings("church", low_memory=True), "object", defaults, num_processes=2, part=1000)
    assert low.gradient_accumulation_steps == 1
    low = resolve(Settings("church", low_memory=True, weights="fp32"), "object", defaults, can_round=True)
    assert low.weights == "fp32"
    with pytest.raises(EraseError, match="--weights bf16 does not go with --precision fp16"):
        Settings("church", weights="bf16", mixed_precision="fp16")


@pytest.mark.parametrize(
    "name, options, number",
    [
        ("ga", (), 0),
        ("salun", (), 1),  # the base's values
        ("sdd", (), 1),  # the average
        ("erasediff", (), 1),  # what an epoch goes back to
        ("fmn", (), 0),
        ("uce", (), 0),
        ("salun", ("balancing=nash",), 3),  # two gradients beside the base's values
    ],
)
def test_the_estimate_knows_the_copies_that_a_method_keeps(name, options, number):
    assert planning.num_copies(planning.make_method(Settings("church", method=name, set=options))) == number


def test_a_copy_takes_the_masked_weights_once(tiny_pipeline_dir):
    model = load_sd(tiny_pipeline_dir)
    parameters = dict(model.network.named_parameters())
    options = {"resolution": 64, "mask_batch": None, "part": 1, "checkpointing": True, "dtype": torch.float32}
    none, three = (
        memory.estimate(model, parameters, density=0.1, copies=copies, **options)["training"] for copies in (0, 3)
    )
    assert three - none == 3 * 4 * int(0.1 * sum(p.numel() for p in parameters.values()))


def test_the_copies_between_two_steps_are_no_more_than_the_estimate_counts(monkeypatch):
    """The proximal step and the projected one hold copies of the masked weights, and little else."""
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(20)))
    parameters = dict(model.named_parameters())
    optimizer = MaskedAdam(parameters, masks.random_mask({n: p.shape for n, p in parameters.items()}, 0.5, seed=0))
    held = Exchanged(model, optimizer)
    for parameter in parameters.values():
        parameter.data += 0.01 * torch.randn_like(parameter)

    monkeypatch.setattr(MaskedAdam, "exchange", lambda *_: None)  # works in place, on the model's own weights

    class Nothing:
        def project(self, moved: Any) -> None:
            pass

    soft, relabel = (planning.make_method(Settings("church", method=name)) for name in ("salun-soft", "relabel"))
    cases: tuple[Any, ...] = ((soft, None, None), (relabel, Nothing(), torch.zeros((), dtype=torch.int32)))
    for method, null, halt in cases:
        with torch.no_grad(), memory._Living() as living:
            loop._after_the_step(method, held, None, null, 0, 10, halt)
        copies = memory.copies_between(shrinks=method is soft, projects=null is not None)
        counted = 4 * optimizer.num_masked * copies
        assert 0.6 * counted < living.peak < 1.2 * counted, living.peak / counted


def test_what_a_step_makes_after_its_passes_is_in_the_estimate(tiny_pipeline_dir):
    model = load_sd(tiny_pipeline_dir)
    parameters = dict(model.network.named_parameters())
    options = {"resolution": 64, "mask_batch": None, "part": 1, "checkpointing": True, "dtype": torch.float32}
    none, many, more = (
        memory.estimate(model, parameters, density=0.5, copies=0, between=between, **options)["training"]
        for between in (0, 300, 301)
    )
    assert none < many
    assert more - many == 4 * int(0.5 * sum(p.numel() for p in parameters.values()))


# --- what is never in memory twice ------------------------------------------------------------------------------------


def test_tensors_that_are_read_one_by_one_are_the_files_own_in_float32(tmp_path):
    whole = {"a": torch.randn(3, 5), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), "n": torch.arange(3)}
    half = {"b": torch.randn(7).half(), "c": torch.randn(2, 2).bfloat16()}
    save_file(whole, tmp_path / "one.safetensors")
    save_file(half, tmp_path / "two.safetensors")
    found = tensor_files.OneByOne([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
    expected = whole | {name: tensor.float() for name, tensor in half.items()}
    assert delta.content_hash(found) == delta.content_hash(expected) and found["n"].dtype == torch.int64
    content = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(content[:-20])
    with pytest.raises(EraseError, match="one.safetensors is not a whole safetensors file"):
        dict(found)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_run_reads_no_second_network(toy_pipeline_dir, tmp_path, monkeypatch, weights):
    """The base's weights are read one by one, for masters, delta and samples; the result is that of whole networks."""
    how: dict[str, Any] = OPTIONS | {"weights": weights, "save": ("pipeline", "lora", "single-file")}
    with monkeypatch.context() as patch:
        patch.setattr(sd.StableDiffusion, "stored_network", None)
        lean = erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "lean" / "run"), **how)
    with monkeypatch.context() as patch:
        patch.setattr(sd.StableDiffusion, "stored_weights", lambda self: self.stored_network().state_dict())
        whole = erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "whole" / "run"), **how)
    for name in ("delta.safetensors", "pytorch_lora_weights.safetensors", "run.safetensors", "samples.png"):
        assert (lean.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_weights_that_training_rounds_are_rounded_before_the_first_image(toy_pipeline_dir, tmp_path, monkeypatch):
    """So a GPU never holds them in float32; images are the same bits, for passes in bf16 round them anyway."""
    gather, seen = latents.gather, []

    def watched(model: Any, *arguments: Any, **options: Any) -> latents.Data:
        data = gather(model, *arguments, **options)
        seen.append((model.network.dtype, data))
        return data

    monkeypatch.setattr(latents, "gather", watched)
    for number, (weights, precision) in enumerate((("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32"))):
        how: dict[str, Any] = OPTIONS | {"weights": weights, "precision": precision}
        folders: dict[str, Any] = {
            "output": str(tmp_path / f"run{number}"),
            "cache_dir": str(tmp_path / f"cache{number}"),
        }
        erase_concept(CONCEPT, str(toy_pipeline_dir), **how, **folders)
    assert [dtype for dtype, _ in seen] == [torch.bfloat16, torch.float32, torch.float32]
    rounded, same, exact = (data.forget.mean for _, data in seen)
    assert torch.equal(rounded, same) and not torch.equal(rounded, exact)


def test_generating_needs_all_networks_and_a_pass_that_keeps_nothing(tiny_pipeline_dir):
    """Four bytes for each weight of the other parts; of the network, those of its dtype and of a copy in another."""
    model = load_sd(tiny_pipeline_dir)
    n = sum(p.numel() for p in model.network.parameters())
    others = sum(p.numel() for part in (model.vae, model.text_encoder) for p in part.parameters())

    def need(num: int, held: torch.dtype, computed: torch.dtype) -> int:
        return memory.to_generate(model, num, 64, held=held, computed=computed) - 4 * others

    one, two = (need(num, torch.float32, torch.float32) - 4 * n for num in (1, 2))
    kept = memory.activations(model, 1, 64, torch.float32, checkpointing=False)
    side = 8 * 8 * 4 * 4  # bytes of one image's widest tensor of latents, 4 channels
    assert 2 * side < one < 0.5 * kept and 1.8 * one < two <= 2 * one
    half = need(1, torch.bfloat16, torch.bfloat16)
    assert half - 2 * n == pytest.approx(one / 2, rel=0.1)
    assert need(1, torch.float32, torch.bfloat16) - half == 4 * n


def test_a_model_without_other_networks_generates_with_its_own_alone():
    model = loading.load("mini-pixel")
    weights = 4 * sum(p.numel() for p in model.network.parameters())
    how: Any = {"held": torch.float32, "computed": torch.float32}
    assert weights < memory.to_generate(model, 1, model.resolution, **how) < 100 * weights
