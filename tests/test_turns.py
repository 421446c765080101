"""Images of models that a GPU cannot hold at once: networks take turns there, and images are the same bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch

from erase import Concept, erase_concept
from erase.device import DTYPES
from erase.errors import EraseError
from erase.evaluation import generate
from erase.families.protocol import Family
from erase.families.turns import InTurn
from erase.options.settings import Settings
from erase.runs import phases
from erase.runs.decisions import Decisions, announce, decide
from erase.training import memory

FOLDERS = [
    "toy_sdxl_dir",
    *(pytest.param(name, marks=(pytest.mark.slow, pytest.mark.ci)) for name in ("toy_pipeline_dir", "toy_sd3_dir")),
    pytest.param("toy_ddpm_dir", marks=(pytest.mark.slow, pytest.mark.ci)),
]
LARGE = 10**12
LESS = {
    "in turn": lambda all_at_once, one_image, network: all_at_once - 1,
    "layer by layer": lambda all_at_once, one_image, network: one_image + network - 1,
}


@pytest.fixture(params=FOLDERS)
def folder(request) -> str:
    return str(request.getfixturevalue(request.param))


def free(folder: str, precision: str, kind: str) -> int:
    """Bytes of a GPU that holds less than the whole model, as far as `memory` estimates."""
    model = generate.load_model(folder, device="cpu", precision=precision, only_generates=True)
    dtype = DTYPES[precision]
    whole, image = (
        memory.to_generate(model, num, model.resolution, held=dtype, computed=dtype)
        for num in (2 * memory.FEW_IMAGES, 2)
    )
    weights = sum(p.nbytes for network in model.networks for p in network.parameters())
    own = sum(p.nbytes for p in model.network.parameters())
    return -int(-LESS[kind](whole, image - weights, own) // 0.9)


@contextmanager
def watched(model: Family) -> Iterator[list[tuple[torch.nn.Module, dict[torch.nn.Module, int]]]]:
    """Passes of networks, each with the bytes of all networks' weights that are on the GPU during it."""
    found: list[tuple[torch.nn.Module, dict[torch.nn.Module, int]]] = []

    networks, passes = set(model.networks), [0]

    def look(module: torch.nn.Module, *_: Any) -> None:
        passes[0] += 1
        if module in networks or passes[0] % 20 == 0:  # layers too: to count their weights each time takes long
            there = {n: sum(p.nbytes for p in n.parameters() if pretend_device.is_there(p)) for n in networks}
            found.append((module, there))

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def images(model: Family) -> torch.Tensor:
    prompts = list(model.classes[:2]) or ["a cat", "a dog"]
    drawn = [model.draw(prompts, [1, 2], steps=2, guidance=3.0, size=model.resolution) for _ in range(2)]
    assert torch.equal(*drawn)
    return model.decode(drawn[0])


@pytest.mark.parametrize(("precision", "kind"), [("bf16", "in turn"), ("fp32", "layer by layer")])
def test_a_small_gpu_generates_the_bits_of_a_large_one(folder, precision, kind):
    how: dict[str, Any] = {"device": "cuda", "precision": precision, "only_generates": True}
    small = free(folder, precision, kind)
    with pretend_device.gpu(free=LARGE):
        large = generate.load_model(folder, **how)
        expected = images(large)
        hashes = generate.model_hashes(large)
    with pretend_device.gpu(free=small):
        model = generate.load_model(folder, **how)
        assert model.takes_turns and not large.takes_turns
        assert model.device.type == "cuda" and generate.model_hashes(model) == hashes
        assert memory.images_at_once(model, model.resolution) == memory.FEW_IMAGES
        with watched(model) as passes:
            assert torch.equal(images(model), expected)
        for module, there in passes:
            if isinstance(getattr(module, "_hf_hook", None), InTurn):
                assert [network for network, held in there.items() if held] == [module]
        if kind == "layer by layer":
            assert max(there[model.network] for _, there in passes) < 0.5 * large_bytes(large)


def large_bytes(model: Family) -> int:
    return sum(p.nbytes for p in model.network.parameters())


def test_a_network_that_only_generates_is_on_the_gpu_once_in_the_precision_of_its_passes(folder):
    with pretend_device.gpu(free=LARGE):
        plain = generate.load_model(folder, device="cuda", precision="bf16")
        lean = generate.load_model(folder, device="cuda", precision="bf16", only_generates=True)
        assert generate.model_hashes(lean) == generate.model_hashes(plain)
        assert {p.dtype for p in plain.network.parameters()} == {torch.float32}
        assert {p.dtype for p in lean.network.parameters()} == {torch.bfloat16}
        assert torch.equal(images(lean), images(plain))


CONCEPT = Concept(
    "cat", "object", forget=("a cat",), anchor=("a dog",), retain=("a tree", "a boat"), others=("a bird", "a car")
)
FEW: dict[str, Any] = {"num_forget": 2, "num_retain": 2, "num_inference_steps": 2, "num_train_steps": 2}
FEW |= {"batch_size": 2, "num_samples": 1, "generation_batch_size": 2, "quiet": True, "resolution": 8}


def decided(folder: Path, output: Path, tell: Any = print, **options: Any) -> Decisions:
    how = {name: value for name, value in FEW.items() if name not in {"quiet", "generation_batch_size"}}
    settings = Settings(("cat",), model=str(folder), output=str(output), **how, **options)
    return decide(settings, [CONCEPT], quiet=True, tell=tell)


def test_a_run_generates_as_many_images_at_once_as_the_gpus_memory_holds(toy_pipeline_dir, tmp_path):
    """The question is asked before the model is on the GPU, and its weights will be there too."""
    model = generate.load_model(str(toy_pipeline_dir), device="cpu")
    weights = sum(p.nbytes for network in model.networks for p in network.parameters())
    each = 2 * memory.activations(model, 1, 8, torch.bfloat16, checkpointing=False)
    found = []
    for room in (LARGE, weights + int(16.1 * each / 0.9), weights + int(15.9 * each / 0.9)):
        with pretend_device.gpu(free=room):
            found.append(decided(toy_pipeline_dir, tmp_path / "run").settings.generation_batch_size)
    assert found == [32, 16, 8]


def test_a_gpu_that_is_too_small_for_the_training_is_one_line_before_and_one_after(
    toy_pipeline_dir, tmp_path, monkeypatch
):
    for room in (LARGE, 1):
        told: list[str] = []
        with pretend_device.gpu(free=room):
            announce(decided(toy_pipeline_dir, tmp_path / "run", told.append, mask="none"))
        found = [line for line in told if line.startswith("training needs about ")]
        assert len(found) == (room == 1)
    assert found[0].endswith("GB are free; try --low-memory")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(phases, "train", full)
    with pytest.raises(EraseError, match="memory is too small for this run; repeat it with --overwrite and --low-mem"):
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), device="cpu", mask="none", **FEW)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_run_on_a_small_gpu_trains_on_the_same_images(toy_sdxl_dir, tmp_path, monkeypatch, low_memory):
    """Samples too. The training itself needs the whole network on the GPU, and has it there."""
    seen: list[bool] = []
    released = Family.take_turns

    def took(self: Any, *arguments: Any) -> None:
        seen.append(True)
        released(self, *arguments)

    monkeypatch.setattr(Family, "take_turns", took)
    small = free(str(toy_sdxl_dir), "bf16", "in turn")
    written = []
    for bytes_free in (LARGE, small):
        folder = tmp_path / str(bytes_free)
        with pretend_device.gpu(free=bytes_free):
            how: dict[str, Any] = {"low_memory": low_memory, "precision": "bf16", "cache_dir": str(folder / "cache")}
            run = erase_concept(CONCEPT, str(toy_sdxl_dir), output=str(folder / "run"), **FEW, **how)
        written.append([path.read_bytes() for path in sorted((folder / "cache" / "latents").rglob("*.safetensors"))])
        assert run.record.weights.changed and len(seen) == (0 if bytes_free == LARGE else 2)
    assert written[0] and written[0] == written[1]
