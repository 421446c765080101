"""run.json: one reader and one writer, and the formats of earlier versions."""

import json
from pathlib import Path

import pytest

from erase import files
from erase.errors import EraseError
from erase.runs import record
from erase.runs.record import RunRecord, Started

OLD = Path(__file__).parent / "old" / "run-0.1.0.json"


def test_a_record_is_read_as_it_was_written(tmp_path):
    old = record.read(OLD)
    record.write(tmp_path / "run.json", old)
    assert record.read(tmp_path / "run.json") == old
    started = Started({"settings": {}, "base_hash": "00"}, ("a", "b"))
    record.write(tmp_path / "run.json", started)
    assert record.read(tmp_path / "run.json") == started


def test_a_record_of_0_1_0_has_todays_names_and_defaults():
    stored, old = json.loads(OLD.read_text()), record.read(OLD)
    assert isinstance(old, RunRecord)
    assert old.identity["settings"]["precision"] == "fp32" and "mixed_precision" not in old.identity["settings"]
    assert old.identity["concept"] != stored["identity"]["concept"]
    assert (old.finished, old.compute, old.plugin, old.model.base_dtype) == (None, {}, None, None)
    assert old.weights.changed == stored["weights"]["changed"] and old.mask and old.mask.ones == stored["mask"]["ones"]
    assert [part.name for part in old.concepts] == ["cat"] and old.losses == stored["losses"]
    assert old.as_json()["format"] == record.FORMAT


def test_a_format_inside_the_identity_is_read(tmp_path):
    """Where the number stood for some time after 0.1.0."""
    stored = record.read(OLD).as_json()
    stored["identity"]["format"] = stored.pop("format")
    files.write_json(tmp_path / "run.json", stored)
    assert record.read(tmp_path / "run.json").identity["settings"] == record.read(OLD).identity["settings"]


@pytest.mark.parametrize("found", [record.FORMAT + 1, "2", None, True])
def test_another_format_is_refused(found, tmp_path):
    files.write_json(tmp_path / "run.json", {**record.read(OLD).as_json(), "format": found})
    with pytest.raises(EraseError, match="run.json has format .*, which a later version wrote"):
        record.read(tmp_path / "run.json")


def test_a_concept_that_is_refused_today_is_named(tmp_path):
    stored = record.read(OLD).as_json()
    stored["concept"]["anchor"] = ["a", "b", "c"]
    files.write_json(tmp_path / "run.json", stored)
    with pytest.raises(
        EraseError,
        match=r"run.json is damaged: its concepts cannot be read: .*3 anchors for 2 forget prompts.*; delete ",
    ):
        record.read(tmp_path / "run.json")
