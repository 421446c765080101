"""Laws of the classifier's own files: damaged or unwritable ones are one line, and nothing is half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from erase import files, tensor_files
from erase.classification import cli as classifier_cli
from erase.classification import data, networks, split
from erase.classification.compare import compare, rows
from erase.classification.data import Dataset, Images
from erase.classification.networks import Shape
from erase.classification.settings import Settings
from erase.errors import EraseError

SHAPE = Shape("mlp", 3, 1, 4, (0.3,), (0.3,))


def images(n: int) -> Images:
    return Images(torch.zeros(n, 1, 4, 4, dtype=torch.uint8), torch.arange(n) % 3)


@pytest.fixture(autouse=True)
def toy_world(monkeypatch) -> None:
    dataset = Dataset("toy", images(30), images(12), ("a", "b", "c"), (0.3,), (0.3,))
    monkeypatch.setattr(data, "load", lambda name, cache_dir, **_: dataset)


def saved(path: Path, *, state: dict[str, Any] | None = None, **shape: Any) -> Path:
    model = networks.build(SHAPE, 0)
    header = {"kind": "classifier", "shape": {**vars(SHAPE), **shape}}
    tensor_files.write_tensors(path, {**model.state_dict(), **(state or {})}, header)
    return path


@pytest.mark.parametrize(
    "shape",
    [
        {"num_classes": "3"},
        {"num_classes": -1},
        {"num_classes": 10**12},
        {"channels": 2},
        {"size": 4.5},
        {"size": 0},
        {"mean": 0.5},
        {"mean": ["x"]},
        {"std": [0.0]},
        {"std": [float("inf")]},
        {"network": 3},
        {"more": 1},
    ],
)
def test_a_header_that_describes_no_network_is_one_line(shape, tmp_path):
    """(4.10)"""
    with pytest.raises(EraseError, match="model.safetensors is damaged: its header describes no network"):
        networks.load(saved(tmp_path / "model.safetensors", **shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {"mean": torch.full((1, 1, 1), float("nan"))}}, "'mean' holds values that are not finite"),
        ({"state": {"mean": torch.zeros(2)}}, "'mean' has 2 weights here but 1"),
        ({"state": {"extra": torch.zeros(2)}}, "'extra' is here but not in a mlp for 3 classes"),
        ({"num_classes": 4}, "has 384 weights here but 512|has 3 weights here but 4"),
        ({"network": "nothing"}, "unknown network 'nothing'"),
    ],
)
def test_weights_that_do_not_fit_the_header_are_one_line(change, message, tmp_path):
    """(4.10)"""
    with pytest.raises(EraseError, match=message):
        networks.load(saved(tmp_path / "model.safetensors", **change))


@pytest.mark.parametrize(
    "content",
    [
        '{"forget": [0.5]}',
        '{"forget": {}}',
        '{"forget": [[1, 2]]}',
        '{"forget": [true]}',
        '{"forget": "12"}',
        '{"forget": [1180591620717411303424]}',
        '{"retain": [1]}',
        "1\ntwo",
        "{",
        "\x00\x01",
    ],
)
def test_a_file_of_positions_that_holds_none_is_one_line(content, tmp_path):
    """(4.10)"""
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(EraseError, match=f"^{path} holds no positions"):
        split.make(data.load("toy", tmp_path), str(path), 0)


@pytest.mark.parametrize("number", ["²", "-1", "3", "", "x"])
def test_a_class_that_is_not_there_is_one_line(number, tmp_path):
    with pytest.raises(EraseError, match=f"--forget is 'class:{number}'; the classes are 0 to 2"):
        split.make(data.load("toy", tmp_path), f"class:{number}", 0)


def toy_settings(**changes: Any) -> Settings:
    plain: dict[str, Any] = {"data": "toy", "network": "mlp", "forget": "20%", "train_epochs": 1, "epochs": 1}
    return Settings(**{**plain, "batch_size": 8, "device": "cpu", **changes})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        {"settings": 3},
        {"scores": {}},
        {"scores": {"UA": 1}},
        {"scores": None},
        {"seconds": "long"},
        {"seconds": float("nan")},
        {"label": None},
    ],
)
def test_a_damaged_cell_is_named(content, tmp_path):
    """(4.10)"""
    settings = toy_settings()
    lines = rows(settings, ["ft"])
    compare(settings, lines, [0], tmp_path, tmp_path)
    path = tmp_path / "cells" / "ft-0.json"
    text = content if isinstance(content, str) else json.dumps({**files.read_json(path), **content})
    path.write_text(text)
    with pytest.raises(EraseError, match=rf"^{path} ") as error:
        compare(settings, lines, [0], tmp_path, tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_results_file_is_written_again(tmp_path):
    settings = toy_settings()
    results = compare(settings, rows(settings, ["ft"]), [0], tmp_path, tmp_path)
    (tmp_path / "results.json").write_text("{")
    assert compare(settings, rows(settings, ["ft"]), [0], tmp_path, tmp_path) == results
    assert files.read_json(tmp_path / "results.json") == results


@pytest.mark.parametrize("output", ["/dev/full/run", "/dev/null/run", "/proc/run"])
def test_an_output_that_cannot_be_written_is_one_line(output, capsys):
    """(4.10)"""
    arguments = "--data toy --network mlp --forget 20% --train-epochs 1 --epochs 1 --method ft --quiet --device cpu"
    with pytest.raises(SystemExit) as end:
        classifier_cli.main([*arguments.split(), "--output", output])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and output in err


def test_long_trainings_report_their_epochs_and_quiet_ones_do_not(tmp_path, capsys):
    """(4.6)"""
    arguments = "--data toy --network mlp --forget 20% --train-epochs 2 --epochs 1 --method ft --device cpu".split()
    classifier_cli.main([*arguments, "--output", str(tmp_path / "a")])
    assert capsys.readouterr().err.splitlines() == ["train: 0 of 2 epochs", "unlearn: 0 of 1 epochs"]
    classifier_cli.main([*arguments, "--output", str(tmp_path / "b"), "--quiet"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "advice"), [([], "continues a training"), (["compare"], "continues after the last")]
)
def test_an_interrupt_says_whether_the_same_command_continues(command, advice, tmp_path, capsys, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupt)
    with pytest.raises(SystemExit) as end:
        classifier_cli.main([*command, "--data", "toy", "--output", str(tmp_path / "run")])
    assert end.value.code == 130 and advice in capsys.readouterr().err
