"""eval/cifar10.py: cells in any order, continued after an interrupt, in tables beside published figures."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erase.classification import cells, run
from erase.commandline import reporting

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "eval"))
import cifar10  # noqa: E402

PROTOCOLS = dict(cifar10.PROTOCOLS)
TOY = {"network": "mlp", "train_epochs": 1, "epochs": 1, "learning_rate": 0.01, "batch_size": 8}
TABLES = (
    cifar10.Table("10%", {"forget": "25%", "batch_norm": "moving"}),
    cifar10.Table("frozen", {"forget": "25%", "batch_norm": "frozen"}, like="10%"),
)


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path) -> None:
    """Two classes of eight training and four test images, and a protocol of seconds."""
    draw = np.random.default_rng(0)
    for part, num in (("train", 8), ("test", 4)):
        for level, name in ((40, "dark"), (215, "light")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(num):
                pixels = draw.integers(level - 40, level + 40, (4, 4, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{number}.png")
    monkeypatch.setitem(cifar10.PROTOCOLS, "full", cifar10.Protocol(TOY, TABLES, (1, 2)))
    monkeypatch.setenv("ERASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trainings(monkeypatch) -> list[int]:
    """The seed of every network that is trained from nothing."""
    seen: list[int] = []
    trained = run.trained

    def counted(settings: Any, *rest: Any, **how: Any) -> Any:
        seen.append(settings.seed)
        return trained(settings, *rest, **how)

    monkeypatch.setattr(run, "trained", counted)
    return seen


def start(*options: str) -> None:
    with reporting("cifar10.py", "interrupted; the same command continues"):
        cifar10.main(["--data", "data", "--output", "out", "--methods", "ft", "salun", "--quiet", *options])


def test_every_cell_is_run_once_and_tables_share_their_trained_models(trainings, capsys):
    """Three trainings a seed: the original, the retrained model and a second retraining; none for the second table."""
    start()
    assert sorted(trainings) == [1, 1, 2, 2, 500_001, 500_002]
    found = json.loads(Path("out/results.json").read_text())["tables"]
    assert [len(found[name]["cells"]) for name in ("10%", "frozen")] == [10, 4]
    first = capsys.readouterr().out
    start()
    assert len(trainings) == 6 and capsys.readouterr().out == first


def test_an_interrupted_command_continues_and_seeds_may_come_in_any_order(trainings, monkeypatch):
    """Killed in the middle of a cell: nothing of it is left, and the others are not run again."""
    whole, done = cells._model, []

    def interrupted(label: str, *rest: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(label)
        return whole(label, *rest)

    monkeypatch.setattr(cells, "_model", interrupted)
    with pytest.raises(SystemExit) as stop:
        start("--seeds", "2")
    assert stop.value.code == 130
    assert len(list(Path("out").rglob("cells/*.json"))) == 3
    monkeypatch.setattr(cells, "_model", whole)
    start("--seeds", "2")
    start("--seeds", "1")
    together = json.loads(Path("out/results.json").read_text())
    start("--output", "again")
    other = json.loads(Path("again/results.json").read_text())
    for name in ("10%", "frozen"):
        pairs = zip(together["tables"][name]["cells"], other["tables"][name]["cells"], strict=True)
        assert all(one["scores"] == two["scores"] for one, two in pairs)


def test_published_cells_are_taken_over_if_their_settings_are_the_same(trainings):
    start()
    trainings.clear()
    start("--output", "taken", "--known", "out/results.json")
    assert not trainings
    known = json.loads(Path("out/results.json").read_text())
    for one in known["tables"]["10%"]["cells"]:
        one["settings"] = "another"
    Path("other.json").write_text(json.dumps(known))
    start("--output", "new", "--known", "other.json")
    assert len(trainings) == 6


def test_published_cells_fit_the_same_images_in_any_folder_and_no_others(trainings, capsys):
    start("--seeds", "1")
    shutil.copytree("data", "elsewhere/images")
    trainings.clear()
    start("--seeds", "1", "--data", "elsewhere/images", "--output", "moved", "--known", "out/results.json")
    assert not trainings
    path = Path("elsewhere/images/test/dark/0.png")
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(path)
    capsys.readouterr()
    start("--seeds", "1", "--data", "elsewhere/images", "--output", "changed", "--known", "out/results.json")
    assert len(trainings) == 3
    assert "the published cells are of other images and are not used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shadows", "tables", "seeds"), [("tiny", 0, "moving frozen", range(1, 6)), ("tiny-lira", 2, "moving", [1])]
)
def test_published_cells_have_the_settings_of_their_protocol(name, shadows, tables, seeds):
    """Else the command of the page would run all of them again."""
    known = json.loads((cifar10.RESULTS / f"classification-cifar10-{name}.json").read_text())
    work = cifar10.Work(PROTOCOLS["tiny"], "anywhere", Path("out"), ["all"], shadows)
    assert known["images"] and [*known["tables"]] == tables.split()
    for table in [one for one in work.protocol.tables if one.name in known["tables"]]:
        cells = {(one["label"], one["seed"]): one["settings"] for one in known["tables"][table.name]["cells"]}
        for seed in seeds:
            for row in work.lines(table, seed):
                assert cells[row.label, seed] == cifar10.settings_hash(cifar10._identity(work, row, seed)), row.label


def test_cells_of_a_seed_that_is_not_complete_need_the_same_original_model(trainings, capsys):
    """It is trained anew; the published cells are used only if its figures are the published ones."""
    start("--seeds", "1")
    known = json.loads(Path("out/results.json").read_text())
    known["tables"]["10%"]["cells"] = [one for one in known["tables"]["10%"]["cells"] if one["label"] != "ft"]
    Path("part.json").write_text(json.dumps(known))
    trainings.clear()
    start("--seeds", "1", "--output", "same", "--known", "part.json")
    assert trainings == [1]  # the original; the two retrained models are taken over
    trainings.clear()
    known["tables"]["10%"]["cells"][0]["scores"]["UA"]["value"] += 0.01
    Path("part.json").write_text(json.dumps(known))
    start("--seeds", "1", "--output", "other", "--known", "part.json")
    assert sorted(trainings) == [1, 1, 500_001]
    assert "seed 1: another original model was trained here" in capsys.readouterr().out
    scores = [json.loads(Path(name, "results.json").read_text())["tables"] for name in ("out", "same", "other")]
    for name in ("10%", "frozen"):
        ours = [[one["scores"] for one in tables[name]["cells"]] for tables in scores]
        assert ours[0] == ours[1] == ours[2]


def cell(label: str, seed: int, **figures: float) -> dict[str, Any]:
    scores = {name: {"value": value / 100, "n": 100} for name, value in figures.items()}
    return {"label": label, "seed": seed, "scores": scores, "seconds": 60.0}


CELLS = [
    cell("retrain", 1, UA=6, RA=100, TA=94, MIA=13),
    cell("retrain", 2, UA=4, RA=100, TA=95, MIA=14),
    cell("salun", 1, UA=1, RA=99, TA=95, MIA=15),
    cell("salun", 2, UA=1, RA=99, TA=94, MIA=15),
    cell("ft", 3, UA=0, RA=99, TA=94, MIA=1),  # the retrained model of this seed is not there yet
    {"label": "ga", "seed": 1, "diverged": "the loss is nan"},
]


def test_every_gap_is_stated_with_its_sign_against_the_same_seed():
    """UA 1 - 6 and 1 - 4, mean -4, although the average of absolute gaps has no sign: (5 + 1 + 1 + 2) / 4 and
    (3 + 1 + 1 + 1) / 4, mean 1.875."""
    text = cifar10.gaps({"tables": {"10%": {"cells": CELLS}}}, "10%")
    head, _, *lines = (line[2:-2].split(" | ") for line in text.splitlines())
    salun = dict(zip(head, next(line for line in lines if line[0] == "salun"), strict=True))
    assert salun["seeds"] == "2" and salun["UA"] == "1.0" and salun["gap UA"].startswith("-4.0 ±")
    assert salun["gap RA"] == "-1.0" and salun["gap TA"].startswith("0.0 ±") and salun["gap MIA"].startswith("+1.5 ±")
    assert cifar10._shown([-0.0006, 0.0004], signed=True).startswith("0.0 ±")  # a mean of -0.01 %
    assert salun["average gap"].startswith("1.9 ±")
    assert [line[0] for line in lines] == ["retrain", "salun", "ga"] and lines[2][1] == "diverged"


def test_lira_has_its_gap_too_where_it_was_measured():
    """With shadow models there are two columns more; the average stays the published one, without it."""
    cells = [
        cell("retrain", 1, UA=6, RA=100, TA=94, MIA=13, LiRA=50),
        cell("ft", 1, UA=6, RA=100, TA=94, MIA=13, LiRA=9),
    ]
    head, _, _, ft = (
        line[2:-2].split(" | ") for line in cifar10.gaps({"tables": {"a": {"cells": cells}}}, "a").splitlines()
    )
    found = dict(zip(head, ft, strict=True))
    assert (found["LiRA"], found["gap LiRA"], found["average gap"]) == ("9.0", "-41.0", "0.0")
    assert "LiRA" not in cifar10.gaps({"tables": {"10%": {"cells": CELLS}}}, "10%")


def test_ours_and_published_figures_stand_side_by_side_with_the_gap_of_each():
    published = {
        "sources": {"paper": "a paper."},
        "tables": {"10%": {"paper": {"retrain": {"UA": 5.2, "RA": 100}, "salun": {"UA": 2.85, "average gap": 1.15}}}},
    }
    text = cifar10.beside({"tables": {"10%": {"cells": CELLS}}}, "10%", published)
    head, _, retrain, salun = (line[2:-2].split(" | ") for line in text.splitlines()[:4])
    assert head[:4] == ["", "UA", "published", "RA"]
    assert "1.00 (-4.00)" in salun and "2.85 (-2.35)" in salun and "1.88" in salun and "1.15" in salun
    assert "5.00 (+0.00)" in retrain and "5.20 (+0.00)" in retrain and text.endswith("paper: a paper.")


def test_published_figures_are_complete_and_possible():
    """Every row has a retrained model to compare with, and names a method that we have."""
    published = json.loads((cifar10.RESULTS / "published-cifar10.json").read_text())
    assert set(published["tables"]) == {"10%", "50%", "class"}
    for sources in published["tables"].values():
        for source, rows in sources.items():
            assert source in published["sources"] and "retrain" in rows
            for method, figures in rows.items():
                assert method in cifar10.PRESETS
                assert all(0 <= value <= 100 for value in figures.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "7"], "--seeds has 7; choose 1, 2"),
        (["--tables", "20%"], "--tables has '20%'; choose 10%, frozen"),
        (["--data", "nowhere"], "'nowhere' is no data set and no folder"),
    ],
)
def test_a_wrong_option_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        start(*options)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out").exists()


def test_step_sizes_are_tried_on_a_seed_that_no_table_uses(capsys):
    start("--tune", "--tables", "10%")
    out = capsys.readouterr().out
    assert all(f"ft lr {0.01 * factor:g}" in out for factor in cifar10.FACTORS)
    assert cifar10.TUNING_SEED not in cifar10.PROTOCOLS["small"].seeds


def test_protocols_are_the_published_one_and_the_reduced_ones():
    paper = cifar10.Protocol({"tuned_for": "cifar10", "split": "reference"}, cifar10.PAPER, (1,))
    full = cifar10.Work(paper, "data", Path("out"), ["all"])
    settings = full.settings(full.protocol.tables[0], 1).resolved()
    assert (settings.network, settings.train_epochs, settings.train_learning_rate) == ("resnet18", 182, 0.1)
    assert (settings.batch_norm, settings.batch_size, settings.split) == ("moving", 256, "reference")
