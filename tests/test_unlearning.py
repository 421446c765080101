"""The table of methods: each cell once, resumed, with intervals over seeds; and the command that makes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import t

from erase.classification import cli as classifier_cli
from erase.classification import data, run
from erase.classification.cells import Row
from erase.classification.compare import compare, rows
from erase.classification.data import Dataset, Images
from erase.classification.presets import PRESETS
from erase.classification.settings import Settings
from erase.classification.summary import over_seeds, shown
from erase.errors import EraseError


def toy_images(n: int, seed: int) -> Images:
    x = torch.randint(0, 120, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    y = torch.arange(n) % 3
    x[torch.arange(n), 0, y] += 120
    return Images(x, y)


@pytest.fixture(autouse=True)
def toy_world(monkeypatch) -> None:
    dataset = Dataset("toy", toy_images(30, 0), toy_images(12, 1), ("a", "b", "c"), (0.3,), (0.3,))
    monkeypatch.setattr(data, "load", lambda name, cache_dir, **_: dataset)


@pytest.fixture
def trainings(monkeypatch) -> list[int]:
    """One entry for every network that is trained from nothing."""
    seen: list[int] = []
    train = run.trained

    def counted(settings: Settings, *rest: Any, **how: Any) -> Any:
        seen.append(settings.seed)
        return train(settings, *rest, **how)

    monkeypatch.setattr(run, "trained", counted)
    return seen


def toy_settings(**changes: Any) -> Settings:
    options = {"data": "toy", "network": "mlp", "forget": "20%", "train_epochs": 2, "epochs": 1, "batch_size": 8}
    return Settings(**{**options, "learning_rate": 0.01, "train_learning_rate": 0.05, **changes})


def test_every_cell_is_run_once_and_the_table_grows(trainings, tmp_path):
    """Two seeds of three trainings: original, retrained, retrained again. A new line needs none of them again."""
    settings = toy_settings()
    first = compare(settings, rows(settings, ["ft"]), [0, 1], tmp_path, tmp_path)
    assert sorted(trainings) == [0, 0, 1, 1, 500_000, 500_001]
    trainings.clear()
    again = compare(settings, rows(settings, ["ft"]), [0, 1], tmp_path, tmp_path)
    assert again == first and not trainings
    more = compare(settings, rows(settings, ["ft", "salun"], densities=[0.1]), [0, 1], tmp_path, tmp_path)
    assert not trainings and list(more["rows"]) == ["original", "retrain", "retrain again", "ft", "salun", "salun 10%"]
    assert more["rows"]["ft"] == first["rows"]["ft"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(more))
    assert "| salun 10% |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_lost_cell_comes_back_the_same(tmp_path):
    settings = toy_settings()
    compare(settings, rows(settings, ["salun"]), [0], tmp_path, tmp_path)
    path = tmp_path / "cells" / "salun-0.json"
    cell = json.loads(path.read_text())
    path.unlink()
    compare(settings, rows(settings, ["salun"]), [0], tmp_path, tmp_path)
    again = json.loads(path.read_text())
    assert again["scores"] == cell["scores"] and again["split"] == cell["split"]


def test_cells_of_other_settings_are_refused(tmp_path):
    compare(toy_settings(), rows(toy_settings(), ["ft"]), [0], tmp_path, tmp_path)
    other = toy_settings(train_epochs=3)
    with pytest.raises(EraseError, match="original-0.json was made with another train_epochs; choose another --output"):
        compare(other, rows(other, ["ft"]), [0], tmp_path, tmp_path)


def test_an_original_of_other_settings_is_not_used(tmp_path):
    """Interrupted after its training, before a cell could tell; the control has the same settings."""
    settings = toy_settings()
    compare(settings, rows(settings, ["ft"]), [0], tmp_path, tmp_path)
    for path in (tmp_path / "cells").iterdir():
        path.unlink()
    compare(settings, rows(settings, ["ft"]), [0], tmp_path, tmp_path)
    for path in (tmp_path / "cells").iterdir():
        path.unlink()
    other = toy_settings(train_epochs=3)
    with pytest.raises(EraseError, match="seed-0.safetensors was trained with other settings; choose another --output"):
        compare(other, rows(other, ["ft"]), [0], tmp_path, tmp_path)


def test_retraining_has_no_gap_to_itself_and_shadows_are_trained_once(trainings, tmp_path):
    settings = toy_settings()
    for _ in range(2):
        results = compare(settings, rows(settings, ["ft"]), [0], tmp_path, tmp_path, shadows=2)
    assert len(trainings) == 3 + 4
    retrained = results["rows"]["retrain"]
    assert retrained["gap"]["value"] == retrained["gap_of_means"] == 0
    assert results["rows"]["original"]["gap"]["value"] > 0
    assert all("LiRA" in line for line in results["rows"].values())


def test_a_method_that_diverges_is_a_line_without_figures(tmp_path):
    """The others have theirs; retraining must not diverge, because all gaps are to it."""
    settings = toy_settings(learning_rate=1e18, weight_decay=0.0)
    results = compare(settings, rows(settings, ["ft", "iu"]), [0], tmp_path, tmp_path)
    assert results["rows"]["ft"] == {"diverged": 1} and "UA" in results["rows"]["iu"]
    assert "| ft | diverged on 1 of 1 |" in (tmp_path / "table.md").read_text()
    too_far = Row("iu", toy_settings(method="iu", set=("alpha=1e30",)))  # its weights are finite, its logits are not
    far = [*rows(toy_settings(), ["ft"]), too_far]
    results = compare(toy_settings(), far, [0], tmp_path / "far", tmp_path)
    assert results["rows"]["iu"] == {"diverged": 1} and "UA" in results["rows"]["ft"]
    settings = toy_settings(train_learning_rate=1e18)
    with pytest.raises(EraseError, match="the loss is|retraining diverged"):
        compare(settings, rows(settings, []), [0], tmp_path / "other", tmp_path)


def test_all_methods_and_every_control_have_a_line():
    labels = [line.label for line in rows(toy_settings(), ["all"], densities=[0.1, 0.9], controls=True)]
    assert len(labels) == len(set(labels)) and set(PRESETS) <= set(labels)
    assert {"salun 10%", "salun 90%", "salun, random mask", "salun, inverse mask", "salun, no mask"} <= set(labels)


def test_lines_at_close_densities_have_cells_of_their_own(tmp_path):
    """0.001 and 0.004 are both "0 %" when rounded to per cent, and 0.101 and 0.104 both "10 %"."""
    settings = toy_settings()
    close = rows(settings, [], densities=[0.001, 0.004, 0.101, 0.104, 0.1, 0.07])
    assert [line.label for line in close[3:]] == [f"salun {x}%" for x in ("0.1", "0.4", "10.1", "10.4", "10", "7")]
    results = compare(settings, close[:5], [0], tmp_path, tmp_path)
    assert {"salun 0.1%", "salun 0.4%"} <= set(results["rows"])
    assert len(list((tmp_path / "cells").iterdir())) == 5


def test_a_line_that_is_asked_for_twice_is_there_once_and_two_of_one_name_are_refused(tmp_path):
    settings = toy_settings()
    labels = [line.label for line in rows(settings, ["ft", "ga", "ft"], densities=[0.1, 0.1])]
    assert labels[3:] == ["ft", "ga", "salun 10%"]
    twins = rows(settings, [], densities=[0.1, 0.1 + 1e-14])
    with pytest.raises(EraseError, match="'salun 10%' and 'salun 10%' would have cells of the same name"):
        compare(settings, twins, [0], tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def test_seeds_that_leave_no_room_for_second_trainings_are_refused_before_any_work(tmp_path):
    settings = toy_settings()
    with pytest.raises(EraseError, match="the last seed is 4294967295; .* at most 4293967293"):
        compare(settings, rows(settings, []), [2**32 - 1], tmp_path / "run", tmp_path, shadows=2)
    assert not (tmp_path / "run").exists()


def test_the_interval_over_seeds_is_students():
    """Of 1, 2, 3: deviation 1, so t(.975, 2) / sqrt(3) to each side.

    One seed says nothing of others, and neither do seeds that are all alike: no interval, no plus-minus in the table.
    """
    score = over_seeds("UA", [1, 2, 3])
    assert (score.value, score.n) == (2, 3)
    reach = t.ppf(0.975, 2) / 3**0.5
    assert (score.low, score.high) == (pytest.approx(2 - reach), pytest.approx(2 + reach))
    assert score.interval == "t over seeds" and shown(vars(score)) == "200.0 ±248.4"
    for values in ([1.0], [1.0, 1.0, 1.0]):
        alike = over_seeds("UA", values)
        assert (alike.value, alike.low, alike.high, alike.interval) == (1, None, None, "cannot tell")
        assert shown(vars(alike)) == "100.0"


# The command


def options(tmp_path: Path, name: str) -> list[str]:
    plain = "--data toy --network mlp --forget 20% --train-epochs 2 --batch-size 8 --output"
    return [*plain.split(), str(tmp_path / name)]


def test_the_command_trains_unlearns_and_compares(tmp_path, capsys):
    classifier_cli.main(["train", *options(tmp_path, "original")])
    classifier_cli.main(["train", "--without-forget", *options(tmp_path, "retrained")])
    classifier_cli.main(["--method", "rl", "--model", str(tmp_path / "original"), *options(tmp_path, "rl")])
    scores = json.loads((tmp_path / "rl" / "scores.json").read_text())
    assert scores["before"]["UA"]["n"] == scores["after"]["UA"]["n"] == 6
    classifier_cli.main(["compare", "--methods", "ft", "ga", "--seeds", "2", *options(tmp_path, "compared")])
    text = capsys.readouterr().out
    assert (
        "test accuracy" in text
        and "6 images forgotten with rl" in text
        and "original -> unlearned" in text
        and "| ga |" in text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "salum"], "did you mean salun"),
        (["--methd", "salun"], "did you mean --method"),
        (["--forget", "0%"], "leaves nothing to forget"),
        (["compare", "--methods", "salum"], "unknown method 'salum'"),
        (["compare", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["compare", "--model", "somewhere"], "--model does not go with compare"),
        (["compare", "--method", "salun"], "--method does not go with compare; use --methods"),
        (["train", "--density", "0.5"], "unknown argument '--density'"),
        (["train", "--epochs", "3"], "--epochs has no effect when a new model is trained; use --train-epochs"),
        (["compare", "--densities", "0.1", "nan"], "--densities has nan; each must be above 0 and at most 1"),
        (["--forget", "class:" + 5000 * "9"], "the classes are 0 to"),
        (["--forget", "²%"], "a share is a number"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        classifier_cli.main([*arguments, "--output", str(tmp_path / "run")])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("compare", ("--method ", "--model ", "--allow-pickle")),
        ("train", ("--epochs ", "--learning-rate ", "--optimizer ")),
    ],
)
def test_the_help_shows_only_options_that_have_an_effect(command, absent, capsys):
    """The control: the help of the command without a name shows all of them."""
    for arguments, is_shown in (([command, "--help"], False), (["--help"], True)):
        with pytest.raises(SystemExit):
            classifier_cli.main(arguments)
        text = capsys.readouterr().out
        for name in absent:
            assert (name in text) == is_shown, name
