"""What `eval-concept export` writes: tables of outcomes, and figures in a model card."""

import csv
from pathlib import Path
from typing import Any

import pytest
from test_report import make_results

from erase.errors import EraseError
from erase.evaluation import cli
from erase.evaluation.report import results as stored
from erase.evaluation.report.results import Results
from erase.files import read_json, text_hash, write_json

CARD = """---
license: mit
tags:
- concept-erasure
model-index:
- name: mine
  results:
  - task:
      type: text-to-image
    dataset:
      name: another
      type: another
    metrics:
    - type: other
      value: 0.5
---

# A title

Text with --- and ümlauts.
"""
OUTCOMES: dict[str, Any] = {
    "samples": ["a", "b", "c"],
    "clusters": ["p", 'q, "r"', "=1+1"],
    "columns": {
        "mini.ua": {"base": [True, False, None], "erased": [False, True, None]},
        "mini.clip": {"base": [0.25, 0.5, 0.125], "erased": [0.1, None, 0.125]},
    },
}
ROWS = [  # of the scores, without report and prompt
    ("a", "mini.ua", 1.0, 0.0),
    ("b", "mini.ua", 0.0, 1.0),
    ("a", "mini.clip", 0.25, 0.1),
    ("c", "mini.clip", 0.125, 0.125),
]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    folder = tmp_path / "report"
    found = make_results() | {"outcomes_hash": text_hash(OUTCOMES)}
    stored.write(Results.from_json(found).to_json(), folder / "results.json")
    write_json(folder / "outcomes.json", OUTCOMES)
    return folder


def export(*arguments: str) -> None:
    cli.main(["export", *arguments])


def test_csv_and_parquet_hold_the_same_rows(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("out.csv", "out.parquet"):
        export(str(report), "--output", str(tmp_path / name))
        assert f"{tmp_path / name}: 4 rows written" in capsys.readouterr().out
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        from_csv = list(csv.DictReader(file))
    from_parquet = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    for rows in (from_csv, from_parquet):
        found = [(row["sample"], row["score"], float(row["base"]), float(row["erased"])) for row in rows]
        assert found == ROWS
        assert [row["prompt"] for row in rows] == ["p", 'q, "r"', "p", "=1+1"]
        assert {row["report"] for row in rows} == {"circle"}


def test_another_ending_is_refused_and_nothing_is_written(report: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        export(str(report), "--output", str(tmp_path / "out.xlsx"))
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        export(str(report))
    assert stop.value.code == 2
    assert not (tmp_path / "out.xlsx").exists()


def test_the_card_gets_the_figures_and_keeps_everything_else(report: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    path = tmp_path / "README.md"
    path.write_text(CARD, encoding="utf-8")
    for _ in range(2):  # twice is once
        export(str(report), "--card", str(path))
    text = path.read_text(encoding="utf-8")
    card = ModelCard(text)
    data: Any = card.data
    assert text.endswith(CARD.split("---", 2)[2]) and data.license == "mit" and data.tags == ["concept-erasure"]
    results = read_json(report / "results.json")
    found = {(one.dataset_type, one.metric_type): one for one in data.eval_results}
    wanted = {("mini", score["name"]) for score in results["scores"]} | {("another", "other")}
    assert found.keys() == wanted and len(data.eval_results) == len(wanted) and data.model_name == "mine"
    for score in results["scores"]:
        one, erased = found["mini", score["name"]], score["erased"]
        assert one.metric_value == pytest.approx(erased["value"], rel=1e-12)
        assert one.metric_args["n"] == erased["n"] and one.metric_args["base"] == score["base"]["value"]
        assert (one.metric_args["low"], one.metric_args["high"]) == (erased["low"], erased["high"])


@pytest.mark.parametrize("text", ["no header\n", "---\nlicense: [\n---\n", None])
def test_a_card_without_a_header_is_refused(report: Path, tmp_path: Path, text: str | None) -> None:
    from erase.evaluation.report import model_index

    path = tmp_path / "README.md"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(EraseError, match="README.md"):
        model_index.write_to_card(path, make_results())
    assert (path.read_text(encoding="utf-8") if path.exists() else None) == text
