"""Several processes: which commands share their work, and what is refused before it silently does something else."""

from collections.abc import Callable

import pytest

from erase import cli, device, erase_concept, processes
from erase.classification import cli as classification
from erase.errors import EraseError
from erase.evaluation import cli as evaluation

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_LOCALID")
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
