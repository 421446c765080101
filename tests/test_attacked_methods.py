"""eval/attacked_methods.py: what it takes over from an attack's report, and the tables that it makes of cells."""

import importlib
import sys
from pathlib import Path

import pytest

from erase.evaluation.tasks.attack import Attacked

SCRIPTS = Path(__file__).resolve().parent.parent / "eval"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "attacked_methods", raising=False)
    return importlib.import_module("attacked_methods")


def outcomes(shows):
    """outcomes.json of an attack with two seeds. shows(role, run, point, prompt): whether the image does."""
    options = {"concept": "circle", "attack": "x", "points": ["0", "60"], "controls": ["control"], "attack_seeds": 2}
    samples = Attacked("attack").samples_of(options, ["a", "b", "a"], ("mini",)).samples
    columns = {
        "attack.x": lambda point: point == "60",
        "attack.x.at-0": lambda point: point == "0",
        "attack.x.curve": lambda point: point != "control",
        "attack.x.control": lambda point: point == "control",
    }

    def values(role, counts):
        facts = ((s.facts["attack_seed"], s.facts["point"], s.prompt) for s in samples)
        return [shows(role, *of) if counts(of[1]) else None for of in facts]

    return {
        "samples": [sample.id for sample in samples],
        "clusters": [sample.cluster for sample in samples],
        "columns": {n: {role: values(role, counts) for role in ("base", "erased")} for n, counts in columns.items()},
    }


def cell(script, variant, found):
    return {"concept": "circle", "variant": variant, "seed": 0, "part": "learnt-word", **found}


def test_every_image_of_an_attack_is_kept_by_point_and_run(script):
    found = script.runs_of(outcomes(lambda role, run, point, prompt: role == "base" or (prompt == "b" and run == 1)))
    assert found["prompts"] == ["a", "b", "a"]
    assert found["base"] == {point: ["111", "111"] for point in ("0", "60", "control")}
    assert found["erased"] == {point: ["000", "010"] for point in ("0", "60", "control")}


def test_the_table_shows_each_point_of_base_and_method(script):
    found = script.runs_of(outcomes(lambda role, run, point, prompt: role == "base" or point == "60"))
    table = script.table(script.summary([cell(script, "salun", found)]), "learnt-word")
    head, base, salun = (line for line in table.splitlines() if line.startswith("| ") and "---" not in line)
    assert head == "| method | seeds | 0 | 60 | control |"
    assert [share.split(" [")[0] for share in base.split(" | ")[2:]] == ["100%", "100%", "100%"]
    assert [share.split(" [")[0] for share in salun.split(" | ")[2:]] == ["0%", "100%", "0%"]


def test_what_an_erasure_changed_has_mean_median_and_flips(script):
    figures = {"mini.ua": 1.0, "mini.ra": 0.99, "mini.colour": 0.9, "mini.style": 0.95}
    kept = {"figures": figures, "drift": 0.02, "median": 0.005, "flips": 0.025}
    other = kept | {"drift": 0.04, "seed": 1}
    cells = [{"concept": "circle", "variant": "salun", "seed": 0, "part": "kept"} | one for one in (kept, other)]
    (line,) = [line for line in script.changes(script.summary(cells)).splitlines() if "salun" in line]
    assert line == "| `salun` | 2 | 0.0% | 99.0% | 90.0% | 95.0% | 0.0300 | 0.0050 | 2.5% |"


def test_every_variant_has_settings_that_a_run_accepts(script):
    from erase.options.settings import Settings

    names = {script.cell_name("circle", name, 0) for name in script.VARIANTS}
    assert len(names) == len(script.VARIANTS)
    for options in script.VARIANTS.values():
        Settings(concept="circle", model="mini", **options)


def test_cells_that_share_an_erasure_or_the_bases_images_never_run_at_the_same_time(script):
    order = [(s, p, v, c) for s in (0, 1) for p in ("kept", "noise") for v in ("salun", "ca") for c in ("circle", "x")]
    wanted = [(c, v, s, p) for s, p, v, c in order if (c, v, s, p) != ("circle", "salun", 0, "noise")]
    stages = script.stages(wanted)
    assert sorted(one for stage in stages for group in stage for one in group) == sorted(wanted)
    assert [*map(len, stages[0])] == [2, 2]
    assert {(c, p) for group in stages[0] for c, _, _, p in group} == {(c, p) for c, _, _, p in wanted}
    for stage in stages:
        runs = [{one[:3] for one in group} for group in stage]
        assert sum(map(len, runs)) == len(set.union(*runs))
