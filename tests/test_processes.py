"""Several processes: which commands share their work, and what is refused before it silently does something else."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from erase import cli, device, erase_concept, processes
from erase.classification import cli as classification
from erase.errors import EraseError
from erase.evaluation import arm
from erase.evaluation import cli as evaluation

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_LOCALID")
NAMES += ("TORCHELASTIC_USE_AGENT_STORE",)
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.fixture
def launched(monkeypatch) -> Callable[[dict[str, str]], None]:
    """Sets the variables of a launcher, and no others."""

    def launched(variables: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


def said(main: Callable[..., None], arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}, (2, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, (0, 1)),  # a batch script, in which nobody else works
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "4"}, (0, 4)),  # torchrun in srun
    ],
)
def test_rank_and_world_are_those_of_the_launcher_or_of_srun(launched, variables, expected):
    launched(variables)
    assert processes.rank_and_world() == expected


@pytest.mark.parametrize(
    ("variables", "num_gpus", "expected"),
    [({}, 4, 0), (TORCHRUN, 4, 1), (SRUN, 4, 1), (SRUN, 1, 0), ({"SLURM_LOCALID": "1"}, 4, 0)],
    ids=["alone", "torchrun", "srun", "srun with a GPU for each task", "batch script"],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(launched, monkeypatch, variables, num_gpus, expected):
    launched(variables)
    monkeypatch.setattr(device, "num_gpus", lambda: num_gpus)
    monkeypatch.setattr(device, "use_gpu", lambda index: None)
    assert processes.local_rank(num_gpus) == expected
    assert device.choose(None, "fp32").device.index == expected


@pytest.mark.parametrize(
    ("main", "command", "hint"),
    [
        (cli.main, "erase-concept export", "; erase-concept can share its work"),
        (evaluation.main, "eval-concept run", "; eval-concept generate can share its work"),
        (evaluation.main, "eval-concept attack", "; eval-concept generate can share its work"),
        (classification.main, "unlearn-classifier compare", ""),
        (classification.main, "unlearn-classifier", ""),
    ],
)
@pytest.mark.parametrize("variables", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_commands_that_share_no_work_refuse_several_processes(launched, capsys, main, command, hint, variables):
    """Each would do all of the work in the same folder."""
    launched(variables)
    line = said(main, " ".join([*command.split()[1:], "--output", "x"]), capsys)
    assert line.endswith(f"{command} takes one process, but 2 were started{hint}\n")


def test_an_erasure_by_srun_alone_is_refused(launched, toy_pipeline_dir, tmp_path, capsys):
    launched(SRUN)
    arguments = f"--concept church --model {toy_pipeline_dir} --output {tmp_path / 'run'} --device cpu --quiet"
    assert "srun started 2 processes that cannot exchange gradients" in said(cli.main, arguments, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
    ],
)
def test_other_ways_to_shard_are_refused_and_not_silently_plain_copies(
    launched, monkeypatch, toy_pipeline_dir, tmp_path, capsys, name, way
):
    """Of an erasure `tests/test_sharded.py` has the law for FSDP."""
    monkeypatch.setenv(name, "true")
    if way != "FSDP":
        expected = f"asked for {way}, but here every process would hold the whole model; use --use_fsdp"
        with pytest.raises(EraseError, match=expected):
            erase_concept("church", str(toy_pipeline_dir), output=str(tmp_path / "run"), device="cpu")
    expected = f"asked for {way}, but here every process holds the whole model; start it with --multi_gpu instead"
    assert expected in said(
        evaluation.main, f"generate --model mini --task mini --output {tmp_path / 'images'} --quiet", capsys
    )
    monkeypatch.setenv(name, "false")
    processes.refuse_sharding()
    assert not list(tmp_path.glob("[ri]*"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("records-")
    }


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_generate_the_bytes_of_one_in_batches_and_only_the_first_shows_progress(
    toy_pipeline_dir, tmp_path
):
    """Twenty images are batches of 8, 8 and 4: the first process has two of them. What is lost is generated again."""
    (tmp_path / "own.txt").write_text("\n".join(f"a cat in house {number}" for number in range(20)))
    arguments = ["generate", "--model", str(toy_pipeline_dir), "--task", "prompts", "--prompts", "own.txt"]
    arguments += "--num-inference-steps 2 --generation-batch-size 8 --device cpu --output".split()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def generated(folder: str, *start: str) -> str:
        words = [sys.executable, *start, "-m", "erase.evaluation.cli", *arguments, folder]
        done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stderr.decode()

    generated("one")
    shown = generated("two", *launcher)
    assert shown.count("generate prompts: 0 of 12 images") == 1 and "of 8 images" not in shown
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    one, two = (arm.complete_records(tmp_path / name) for name in ("one", "two"))
    assert one == two and [record["batch_size"] for record in two] == [8] * 16 + [4] * 4
    names = sorted(path.name for path in (tmp_path / "two").glob("records-*"))
    assert names == ["records-0-of-2.jsonl", "records-1-of-2.jsonl"]
    images = sorted((tmp_path / "two" / "images").iterdir())
    images[0].unlink()
    images[9].write_bytes(b"half")
    generated("two", *launcher)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


BAD = {
    "option": "--concept church --stepz 3",
    "setting": "--concept church --model nowhere --density 2",
    "model": "--concept church --model nowhere --output run",
}


@pytest.fixture
def launch() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Starts the same command in two processes with a store, as torchrun does, which would end one with the other."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    how = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    how |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}

    def launch(words: str, **options: Any) -> list[subprocess.Popen[str]]:
        return [
            subprocess.Popen(
                [sys.executable, "-m", "erase.cli", *words.split()],
                env={**how, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
                **options,
            )
            for rank in range(2)
        ]

    yield launch


@pytest.mark.slow
@pytest.mark.ci
def test_an_error_of_all_processes_is_one_line_and_exit_code_2_in_each(launch, tmp_path):
    for arguments in BAD.values():
        started = launch(arguments + " --device cpu --quiet", cwd=tmp_path)
        told = [process.communicate()[1] for process in started]
        assert [process.returncode for process in started] == [2, 2], told
        assert "".join(told).count("\n") == 1 and "erase-concept: " in "".join(told), told


def test_a_process_group_of_another_size_than_the_launchers_is_refused(launched, toy_pipeline_dir, tmp_path):
    """Each process would believe itself alone and write to the same folder."""
    launched({})
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(EraseError, match="process group has 2 processes, but its environment is that of 1"):
            erase_concept("church", str(toy_pipeline_dir), output=str(tmp_path / "run"), device="cpu")
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables", [{}, TORCHRUN, {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}])
def test_an_error_is_told_where_nobody_can_say_whether_another_process_told_it(launched, monkeypatch, variables):
    launched(variables)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")  # nobody listens there
    monkeypatch.setattr(processes, "ASKED", timedelta(seconds=0.1))
    assert processes.is_first_to_say("erase-concept: a line")


SCRIPT = """\
import sys
from pathlib import Path

import torch.distributed as dist

from erase import Concept, EraseError, erase_concept
from erase.evaluation import arm, generate, sources
from erase.evaluation.options import Options
from erase.processes import rank_and_world

own, base, work = sys.argv[1:]
how = dict(resolution=8, batch_size=4, num_train_steps=1, num_forget=4, num_retain=4, num_samples=0)
how |= dict(device="cpu", num_inference_steps=2, quiet=True)


def erased(name, model):
    concept = Concept(name, "object", (f"a {name}",), ("a dog",), retain=("a tree", "a house"), others=("a horse",))
    run = erase_concept(concept, model, output=f"{work}/{name}", **how)
    assert run.record.weights.changed  # whole, in every process
    return str(run.folder)


if own == "own":
    dist.init_process_group("gloo")
    group = dist.group.WORLD
model = erased("cow", erased("cat", base))
assert dist.is_initialized() and (own != "own" or dist.group.WORLD is group)
rank, world = rank_and_world()
(Path(work) / "own.txt").write_text("a cat\\na dog\\na house")
task = sources.make_task("prompts", Options(prompts=f"{work}/own.txt"), None, base)
how_drawn = dict(steps=2, batch_size=1, rank=rank, world=world, quiet=True)
generate.generate(generate.load_model(model, device="cpu"), task, Path(work) / "images", **how_drawn)
dist.barrier()
assert len(arm.complete_records(Path(work) / "images")) == len(task.samples)
dist.destroy_process_group()
try:
    erased("hen", base)
except EraseError as error:
    assert "has ended its process group" in str(error)
else:
    raise AssertionError("a second group was begun")
"""


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("group", ["own", "none"])
def test_one_script_erases_twice_and_evaluates_in_two_processes(toy_pipeline_dir, tmp_path, group):
    """The second erasure begins with the folder of the first. The process group stays until the script ends it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += [str(tmp_path / "script.py"), group, str(toy_pipeline_dir), str(tmp_path)]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.ci
def test_tasks_of_a_slurm_array_report_what_one_command_does(toy_pipeline_dir, erased_dir, tmp_path):
    """eval/slurm_array.sh as it is, with an `srun` that starts one task; both tasks at once, then once more."""
    (tmp_path / "bin").mkdir()
    shims = {"srun": 'exec "$@"', "eval-concept": f'exec "{sys.executable}" -m erase.evaluation.cli "$@"'}
    for name, line in shims.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    (tmp_path / "own.txt").write_text("a cat\na dog\na house\n")
    root = Path(__file__).resolve().parent
    how = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    how["PYTHONPATH"] = f"{root.parent}:{root}"
    models = [str(erased_dir), str(toy_pipeline_dir)]
    options = ["--prompts", "own.txt", "--judge", "bright:Bright", "--base", str(toy_pipeline_dir)]
    options += "--num-inference-steps 2 --device cpu --quiet".split()
    script = ["bash", str(root.parent / "eval" / "slurm_array.sh"), *options]

    def started(task: int) -> Any:
        own = {
            **how,
            "MODELS": " ".join(models),
            "TASK": "prompts",
            "OUTPUT": "array",
            "SLURM_ARRAY_TASK_ID": str(task),
        }
        return subprocess.Popen(script, cwd=tmp_path, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    for _ in range(2):
        for process in [started(0), started(1)]:
            errors = process.communicate()[1]
            assert process.returncode == 0, errors
    words = ["eval-concept", "run", "--models", *models, "--task", "prompts", "--output", "single", *options]
    done = subprocess.run(words, cwd=tmp_path, env=how, capture_output=True)
    assert done.returncode == 0, done.stderr
    found, expected = files_of(tmp_path / "array"), files_of(tmp_path / "single")
    same = {name for name in expected if name.endswith((".png", ".jsonl", "manifest.json", "outcomes.json"))}
    assert len([name for name in same if name.endswith(".png")]) >= 9
    assert found.keys() == expected.keys() and all(found[name] == expected[name] for name in same)
    beyond = started(2)
    assert b"MODELS has 2 folders" in beyond.communicate()[1] and beyond.returncode == 2


@pytest.mark.parametrize(("rank", "expected"), [("0", "erase-concept: a line\n"), ("1", "")])
def test_lines_about_the_work_are_those_of_the_first_process(launched, capsys, rank, expected):
    launched({**TORCHRUN, "RANK": rank})
    cli._tell("a line")
    assert capsys.readouterr().out == expected
