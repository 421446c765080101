"""On a GPU: mask, optimizer and runs agree with the CPU's, and the commands work as a user types them.

Tolerances are bounds on rounding, derived where they stand; u = 2^-24 is float32's unit roundoff. They hold for any
order of the same operations, so for any version of torch's kernels.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from loaded import load_sd
from PIL import Image
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from erase import cli, device, erase_concept, masks
from erase.conditioning import Conditioning
from erase.data.latents import Data, ImageLatents
from erase.evaluation import cli as evaluation
from erase.methods.relabel import Relabel
from erase.optim import MaskedAdam
from erase.training import batches, loop, saliency_pass

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when torch first uses cuBLAS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
U = 2.0**-24


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products without TF32, which rounds to 11 bits; the flags are global, so they are put back."""
    backends: Any = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, was_allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = was_allowed


@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_the_mask_is_the_cpus_ties_and_all(density):
    """Selection compares integers, so there is nothing to round: the masks are equal."""
    draw = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(3_000_000, generator=draw), "ties": torch.rand(2_000_000, generator=draw).mul(50).round()}
    here = masks.select(scores, density)
    there = masks.select({name: score.cuda() for name, score in scores.items()}, density)
    assert all(torch.equal(here[name], there[name].cpu()) for name in scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_the_optimizer_ends_where_the_cpus_does_and_off_the_mask_not_one_bit_moves(density, dtype):
    """Both devices compute AdamW in float32 but round in different places (fused multiply-add, doubles in between).

    In a step each device rounds the weight at most three times: 1 - lr wd, its product with w, and the subtraction of
    the update. So the two part by at most 6 u |w| a step. The update itself is lr m / (sqrt(v) + eps), at most
    sqrt(5) lr in five steps, from at most 12 rounded operations: 2 * 12 * sqrt(5) u lr < 54 u lr a step. After five
    steps |difference| <= 30 u |w| + 270 u lr, and |w| differs from its end by at most 5 sqrt(5) lr, which adds
    336 u lr. (u |w| alone is more than 1e-7 for |w| > 1.7.)

    bfloat16 weights are rounded from such masters. Two neighbours are 2^-8 |w| apart or more, so the middle between
    them lies between the two masters with a probability of at most 30 u / 2^-8 = 5e-4.
    """
    lr, num = 1e-3, 5
    draw = torch.Generator().manual_seed(0)
    start, mask = torch.randn(1000, 300, generator=draw), torch.rand(1000, 300, generator=draw) < density
    ends = []
    for where in ("cpu", "cuda"):
        steps = torch.Generator().manual_seed(1)
        weight = Parameter(start.to(where, dtype))
        optimizer = MaskedAdam({"w": weight}, {"w": mask}, lr=lr, weight_decay=0.1)
        with optimizer.gathering():
            for _ in range(num):
                gradient = torch.randn(start.shape, generator=steps).to(where, dtype)
                (weight * gradient).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(weight.detach().cpu())
    assert torch.equal(ends[1][~mask], start.to(dtype)[~mask])
    if dtype == torch.float32:
        torch.testing.assert_close(ends[1], ends[0], rtol=30 * U, atol=(270 + 336) * U * lr)
    else:
        assert (ends[0] != ends[1]).float().mean() < 1e-3


def run(folder: Path, where: str, state: Path, *, weights: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Scores, mask and four steps on the toy pipeline in fp32; the UNet's weights and the scores, on the CPU."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=where == "cpu")
    model = load_sd(folder, device=where)
    draw = torch.Generator().manual_seed(1)

    def images(row: int) -> ImageLatents:
        mean = torch.randn(4, 4, 4, 4, generator=draw)
        return ImageLatents(mean, torch.zeros_like(mean), torch.full((4,), row))

    text = torch.randn(4, 77, 8, generator=draw)
    words = ("", "a", "b", "c")
    places = torch.zeros(4, text.shape[1], dtype=torch.bool)
    data = Data(
        images(1),
        images(3),
        torch.full((4,), 2),
        torch.tensor([2]),
        places,
        places,
        words,
        Conditioning(text),
        Conditioning(text[:1]),
        "x",
        {},
    )
    parameters = dict(model.unet.named_parameters())
    if weights != torch.float32:
        model.round_network(weights)
    scores = saliency_pass.accumulate(
        model,
        data,
        parameters,
        accelerator,
        score="abs_sum",
        guidance=0.0,
        batch_size=2,
        seed=0,
        state_path=state,
        quiet=True,
    )
    mask = masks.select(scores, 0.3)
    recipe = batches.Recipe(num_steps=4, batch_size=2, learning_rate=1e-5)
    loop.train(model, Relabel(), data, parameters, mask, recipe, accelerator, state_path=state, quiet=True)
    ends = {name: tensor.detach().cpu() for name, tensor in model.unet.state_dict().items()}
    AcceleratorState._reset_state()
    return ends | {f"scores of {name}": score.cpu() for name, score in scores.items()}


@contextmanager
def deterministic() -> Iterator[None]:
    """What a user sets who wants the same bits twice; without warn_only, which lets attention stay as it is."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_same_run_twice_is_the_same_bits_with_deterministic_algorithms(toy_pipeline_dir, tmp_path, weights):
    """With torch's deterministic algorithms and attention from plain products, which add in a fixed order.

    By default this does not hold on a GPU: the backward passes of fused attention and of cuDNN's convolutions add in
    whatever order their blocks finish. docs/performance.md says so.
    """
    with deterministic(), sdpa_kernel(SDPBackend.MATH):
        once, again = (run(toy_pipeline_dir, "cuda", tmp_path / "t.pt", weights=weights) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_the_same_run_twice_differs_by_rounding_only_by_default(toy_pipeline_dir, tmp_path):
    """An Adam step moves a weight by at most 1e-5 (1.1e-5 with the moments of four steps), in either direction.

    So where a gradient is nothing but rounding, four steps may part by 2 * 4 * 1.01e-5 at most; elsewhere the steps
    agree to a relative 1e-3, and 99 % of the weights to 1e-6.
    """
    once, again = (run(toy_pipeline_dir, "cuda", tmp_path / "t.pt") for _ in range(2))
    assert_near(once, again)


def test_a_run_is_the_cpus_up_to_rounding(toy_pipeline_dir, tmp_path):
    """The same bounds as for two runs on one GPU: the CPU differs from it by rounding too."""
    cpu, gpu = (run(toy_pipeline_dir, where, tmp_path / "t.pt") for where in ("cpu", "cuda"))
    assert_near(cpu, gpu)


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    apart = torch.cat([(one[name] - other[name]).abs().flatten() for name in one if not name.startswith("scores")])
    assert apart.max() <= 8.1e-5 and (apart > 1e-6).float().mean() < 0.01


def test_the_bench_measures_a_gpu():
    """The parts of the bench that need a GPU, at the small size."""
    from bench import gpu

    measured = gpu.measure(gpu.VARIANTS[3], "small", torch.device("cuda"), 1, gpu.forward_flops("small"))
    assert all(values["peak_bytes"] > 0 and values["share"] > 0 for values in measured.values())


# --- commands, as a user types them -----------------------------------------------------------------------------------

FEW = ["--num-forget", "2", "--num-retain", "2", "--num-inference-steps", "2", "--num-train-steps", "2"]
FEW += ["--batch-size", "2"]


def erased(folder: Path, cache: Path, *more: str, model: str = "mini", concept: str = "circle") -> dict[str, Any]:
    """run.json of a command on the GPU."""
    places = ["--output", str(folder), "--cache-dir", str(cache), "--quiet"]
    cli.main(["--concept", concept, "--model", model, *places, *FEW, *more])
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_default_run_ends_with_samples_of_base_and_erased_model(tmp_path, cache_dir):
    """samples.png needs both models on one device (1.1); without --device and --precision the card decides (1.2)."""
    record = erased(tmp_path / "run", cache_dir)
    assert record["status"] == "done" and record["weights"]["changed"] > 0
    assert record["compute"]["device"].startswith("cuda") and record["compute"]["precision"] in {"bf16", "fp16"}
    sheet = np.asarray(Image.open(tmp_path / "run" / "samples.png").convert("RGB"))
    assert sheet.std() > 1 and record["peak_memory_bytes"]["gpu"] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_command_computes_in_the_precision_that_is_asked_for(tmp_path, cache_dir, toy_pipeline_dir, precision):
    """The weights that are written are float32 in each of them (1.2)."""
    options = ["--precision", precision, "--save", "unet"]
    record = erased(tmp_path / "run", cache_dir, *options, model=str(toy_pipeline_dir), concept="nudity")
    assert record["compute"]["precision"] == precision
    from erase.tensor_files import read_tensors

    written = read_tensors(tmp_path / "run" / "unet.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in written.values())


def test_low_memory_runs_to_its_end(tmp_path, cache_dir):
    """bf16 weights with float32 masters, parts of one image, checkpointing (1.4)."""
    record = erased(tmp_path / "run", cache_dir, "--low-memory")
    assert record["status"] == "done" and record["settings"]["weights"] == "bf16"


@pytest.mark.parametrize("method", ["uce", "esd-x", "salun-soft"])
def test_a_closed_form_a_trajectory_and_soft_thresholds_run(tmp_path, method):
    few: dict[str, Any] = {"num_forget": 2, "num_retain": 2, "num_train_steps": 2, "batch_size": 2}
    run = erase_concept(
        "circle", "mini", method=method, output=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), quiet=True,
        num_inference_steps=2, num_samples=1, **({} if method == "uce" else few),
    )  # fmt: skip
    assert run.record.weights.changed > 0 and run.record.compute["device"].startswith("cuda")


def test_eval_concept_generates_on_the_gpu_in_its_precision(tmp_path):
    arguments = ["--model", "mini", "--concept", "circle", "--task", "mini", "--limit", "4", "--steps", "2", "--quiet"]
    evaluation.main(["generate", *arguments, "--output", str(tmp_path / "arm")])
    images = sorted((tmp_path / "arm" / "images").glob("*.png"))
    assert len(images) == 4
    generation = json.loads((tmp_path / "arm" / "manifest.json").read_text(encoding="utf-8"))["generation"]
    assert generation["device"] == "cuda" and generation["precision"] in {"bf16", "bfloat16", "fp16", "float16"}


def test_images_of_bf16_are_those_of_fp32_up_to_rounding():
    """bf16 keeps 8 bits, a relative error of 2^-9 an operation; through three steps the latents agree to a tenth."""
    model = load_sd("mini", device="cuda")
    how: dict[str, Any] = {"steps": 3, "guidance": 2.0, "size": model.resolution}
    exact = model.draw(["a red circle"] * 4, range(4), **how)
    rounded = replace(model, precision="bf16").draw(["a red circle"] * 4, range(4), **how)
    apart = float((rounded - exact).norm() / exact.norm())
    assert 0 < apart < 0.1, "0 would mean that nothing was computed in bf16"


def test_the_precision_is_the_cards_best_and_tf32_goes_with_it():
    """bf16 where the card has it; TF32 unless deterministic algorithms are asked for (1.2)."""
    chosen = device.choose(None, None)
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    assert chosen.device.type == "cuda" and chosen.precision == ("bf16" if has_bf16 else "fp16")
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    with deterministic():
        device.choose("cuda", "fp32")
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    with chosen.autocast():
        product = torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
    assert product.dtype == (torch.bfloat16 if has_bf16 else torch.float16)
