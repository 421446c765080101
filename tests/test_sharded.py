"""Weights that FSDP divides among processes: the same mask and weights as in one process, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from erase import cli, delta, erase_concept, masks, processes
from erase.concepts import Concept
from erase.errors import EraseError
from erase.families import loading, stored_unet
from erase.training import checkpoint
from erase.training.sharded import Shards

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CONCEPT = Concept("cat", "object", ("a cat",), ("a dog",), retain=("a tree", "a house"), others=("a horse",))
FLAGS = "--device cpu --num-forget 5 --num-retain 4 --batch-size 4 --num-train-steps 2 --steps 2 --resolution 8".split()
FLAGS += "--learning-rate 1e-4 --max-grad-norm 1 --num-samples 0 --checkpointing-steps 1 --quiet".split()


# --- the mask of divided scores


class OneOf:
    """One of several threads that stand for processes."""

    def __init__(self, rank: int, world: int, shared: list[Any], barrier: threading.Barrier):
        self.rank, self._shared, self._barrier = rank, shared, barrier

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        self._shared[self.rank] = tensor
        self._barrier.wait(30)
        found = torch.stack(list(self._shared))
        self._barrier.wait(30)
        return found


def selected_by(world: int, scores: dict[str, torch.Tensor], density: float, **how: Any) -> dict[str, torch.Tensor]:
    """The mask that `world` threads select, of which each has some rows of every score."""
    shared: list[Any] = [None] * world
    barrier, found = threading.Barrier(world), list[Any]([None] * world)

    def select(rank: int) -> None:
        most = {name: -(-len(score) // world) for name, score in scores.items()}
        own = {name: score[rank * most[name] : (rank + 1) * most[name]] for name, score in scores.items()}
        found[rank] = masks.select_packed(own, density, others=OneOf(rank, world, shared, barrier), **how)

    threads = [threading.Thread(target=select, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: torch.cat([part[name] for part in found]) for name in scores}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("how", [{}, {"per_tensor": True}, {"largest": False}], ids=str)
@pytest.mark.parametrize("kind", ["distinct", "tied", "zero"])
def test_the_mask_of_divided_scores_is_that_of_whole_ones(world, density, how, kind):
    """Ties go to the lower index, whichever process has it; one weight has fewer rows than there are processes."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 5), "b": (2, 40), "c": (64,)}
    scores = {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}
    if kind != "distinct":
        scores = {name: (score * 3).floor() * (kind == "tied") for name, score in scores.items()}
    expected = masks.select(scores, density, **how)
    found = selected_by(world, scores, density, **how)
    assert all(torch.equal(found[name], expected[name]) for name in scores)


# --- what each process holds


@pytest.fixture
def half() -> Iterator[None]:
    """This process is the first of two; the other one is pretended, and nothing comes from it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_a_process_holds_its_rows_only(half, toy_sdxl_dir):
    model = loading.load(toy_sdxl_dir)
    before = {name: parameter.clone() for name, parameter in model.network.named_parameters()}
    scope = model.trainable("xattn")
    shards = Shards(model, scope, torch.device("cpu"))
    after: dict[str, Any] = dict(model.network.named_parameters())
    assert list(after) == list(before) and list(shards.parameters) == list(scope)
    held = {parameter.to_local().untyped_storage().data_ptr(): parameter.to_local() for parameter in after.values()}
    bytes_held = sum(rows.untyped_storage().nbytes() for rows in held.values())
    assert bytes_held < 0.6 * sum(weights.nbytes for weights in before.values())
    assert sum(parameter.untyped_storage().nbytes() for parameter in scope.values()) == 4 * len(scope)
    for name, rows in shards.parameters.items():
        most = -(-len(before[name]) // 2)
        assert torch.equal(rows, before[name][:most]) and scope[name].shape == before[name].shape
        assert rows.data_ptr() == after[name].to_local().data_ptr()
    mask = masks.random_mask({name: before[name].shape for name in scope}, 0.5, seed=0)
    assert all(torch.equal(bits, mask[name][: len(bits)]) for name, bits in shards.rows(mask).items())


def test_only_a_state_that_all_processes_have_written_counts(tmp_path, monkeypatch):
    """A process was killed after it had written step 20 and before the other one had."""
    there: list[set[int]] = []
    monkeypatch.setattr(checkpoint, "gather_object", lambda own: [*own, *there])
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=2, wait_for_everyone=lambda: None)
    stored = checkpoint.Stored(tmp_path / "training.safetensors", accelerator, is_sharded=True)
    there[:] = [set()]
    assert stored.last() is None
    for step in (10, 20):
        path = stored.new(step)
        assert path is not None
        path.touch()
    there[:] = [{10}]
    assert stored.last() == stored.of(10)
    stored.settle(20)
    assert [path.name for path in tmp_path.iterdir()] == ["training-20.0-of-2.safetensors"]
    assert stored.last() is None
    stored.clear()
    assert not list(tmp_path.iterdir())


# --- what is refused


@pytest.fixture
def fsdp(monkeypatch) -> Callable[..., None]:
    def fsdp(**more: str) -> None:
        for name, value in {**FSDP, "RANK": "0", "WORLD_SIZE": "2", **more}.items():
            monkeypatch.setenv(name, value)

    return fsdp


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP 1, in which weights lose their names; add --fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "leave out --fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient-checkpointing instead"),
        ({"WORLD_SIZE": "1"}, "there is one; add --num_processes 2"),
    ],
)
def test_other_kinds_of_fsdp_are_refused(fsdp, variables, expected):
    fsdp(**variables)
    with pytest.raises(EraseError, match=expected):
        processes.require_fsdp2()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"precision": "fp16"}, "do not go with --precision fp16"),
        ({"weights": "bf16"}, "do not go with --weights bf16"),
        ({"optimizer": "dual"}, "do not go with --optimizer dual"),
        ({"method": "uce"}, "do not go with uce, a closed form"),
        ({"method": "leco"}, "do not go with --rank 4"),
        ({"method": "scissorhands"}, "do not go with scissorhands, which does more than minimise its loss"),
        ({"method": "stereo"}, "do not go with stereo, which does more"),
        ({"method": "fmn"}, "do not go with fmn, which reads attention maps"),
        ({"method": "esd-u"}, "do not go with esd-u, whose trajectories differ in length"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_looks_at_all_weights_is_refused_before_anything_is_written(
    fsdp, toy_sdxl_dir, tmp_path, options, expected
):
    fsdp()
    with pytest.raises(EraseError, match=expected):
        erase_concept(CONCEPT, str(toy_sdxl_dir), output=str(tmp_path / "run"), device="cpu", **options)
    assert not (tmp_path / "run").exists()


# --- two processes


@pytest.fixture(scope="module")
def command(toy_sdxl_dir, tmp_path_factory) -> Callable[..., subprocess.Popen[str]]:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "cat.toml").write_text(
        'kind = "object"\n'
        + "\n".join(f"{key} = {json.dumps(getattr(CONCEPT, key))}" for key in ("forget", "anchor", "retain", "others"))
    )
    how = {**os.environ, "ERASE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **FSDP}

    def command(output: Path) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words += ["-m", "erase.cli", "--concept", str(folder / "cat.toml"), "--model", str(toy_sdxl_dir)]
        words += ["--output", str(output), *FLAGS]
        return subprocess.Popen(words, env=how, stderr=subprocess.PIPE, text=True, start_new_session=True)

    return command


@pytest.fixture(scope="module")
def two(command, tmp_path_factory) -> Path:
    """A finished run of two processes."""
    output = tmp_path_factory.mktemp("two") / "run"
    with command(output) as process:
        assert process.wait() == 0, process.communicate()[1]
    return output


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_that_divide_the_weights_end_as_one_does(two, toy_sdxl_dir, tmp_path):
    """The mask is the same but for scores that are tied up to rounding, the weights are the same up to rounding.

    Adam's step is 1e-4. Outside the mask not one bit changes.
    """
    record = json.loads((two / "run.json").read_text())
    arguments = record["command"][1:]
    arguments[arguments.index("--output") + 1] = str(tmp_path / "one")
    cli.main(arguments)
    base, one, after = (
        stored_unet.load_unet(folder).state_dict() for folder in (toy_sdxl_dir, tmp_path / "one", two)
    )  # fmt: skip
    a, b = (masks.load(folder / "mask.safetensors")[0] for folder in (tmp_path / "one", two))
    assert masks.iou(a, b) > 0.999 and masks.count(a) == masks.count(b)
    assert all(torch.equal(after[name][~b[name]], base[name][~b[name]]) for name in after)
    apart = torch.cat([(after[name] - one[name]).abs()[a[name] == b[name]] for name in one])
    moved = torch.cat([(after[name] - base[name]).abs()[b[name]] for name in after])
    assert apart.max() < 1e-5 and moved.median() > 1e-4
    change = delta.load(two / "delta.safetensors")
    again = delta.remove({f"unet.{name}": weights for name, weights in after.items()}, change)
    assert all(torch.equal(again[f"unet.{name}"], weights) for name, weights in base.items())


@pytest.mark.slow
def test_a_killed_run_of_divided_weights_continues_bit_for_bit(two, command, tmp_path):
    mark = tmp_path / "run" / "work" / "training-1.1-of-2.safetensors"
    with command(tmp_path / "run") as process:
        while process.poll() is None and not mark.exists():
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "run" / "delta.safetensors").exists()
    with command(tmp_path / "run") as process:
        assert process.wait() == 0, process.communicate()[1]
    hashes = [delta.load(folder / "delta.safetensors").result_hash for folder in (two, tmp_path / "run")]
    assert hashes[0] == hashes[1]
