"""From scores to figures: pairs, denominators, verdicts and gates; whole runs of the command on a toy pipeline."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arms import BASE, MANY, WIDE, Stub, make_arm
from PIL import Image

from erase import files, statistics
from erase.errors import EraseError
from erase.evaluation import arm, cli, gate, jsonl, measure, score
from erase.evaluation.attacks.registry import ATTACKS
from erase.evaluation.figures import score_row
from erase.evaluation.judges import registry as judging
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.options import Options
from erase.evaluation.plan import Column, Plan
from erase.evaluation.report import compare, pool
from erase.evaluation.report.results import check
from erase.evaluation.tasks import registry
from erase.evaluation.tasks.protocol import Sample, SampleSet
from erase.evaluation.verdict import verdict


def row(results: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in results["scores"] if one["name"] == name]
    return found


def results_of(tmp_path: Path, forget: Sequence[str], retain: Sequence[str]) -> dict[str, Any]:
    """Of an erased model against the base, which shows a circle or a square as it is asked; BASE or WIDE."""
    base = make_arm(tmp_path / "base", **(BASE if len(forget) < MANY else WIDE))
    erased = make_arm(tmp_path / "erased", forget, retain, unet="v")
    return measure.measure(erased, base, name="it", command="eval-concept")[0]


def test_the_base_against_itself_differs_by_exactly_nothing(tmp_path):
    results = results_of(tmp_path, **BASE)
    for one in results["scores"]:
        if one["comparison"]:
            assert (one["comparison"]["difference"], one["comparison"]["p"]) == (0, 1)
    assert row(results, "pixels.drift")["erased"]["value"] == 0
    assert results["verdict"]["outcome"] == "cannot tell"


def test_a_concept_that_is_gone_while_the_rest_stays_is_a_success(tmp_path):
    results = results_of(tmp_path, ["square"] * MANY, WIDE["retain"])
    assert results["verdict"]["success"] and results["primary"] == "mini.ua"
    ua = row(results, "mini.ua")
    assert (ua["base"]["k"], ua["erased"]["k"], ua["erased"]["n"]) == (0, MANY, MANY)
    assert ua["comparison"]["only_erased"] == MANY


def test_a_model_that_draws_noise_is_no_success(tmp_path):
    results = results_of(tmp_path, ["none"] * MANY, ["none"] * MANY)
    assert row(results, "mini.ua")["erased"]["value"] == 1  # as the field would have it
    assert not results["verdict"]["success"] and results["verdict"]["outcome"] == "erased but damaged"


@pytest.mark.parametrize(
    ("forget", "retain", "outcome", "words"),
    [
        (["square"] * MANY, ["square"] * MANY, "erased and kept", "from 100.0% to 0.0%"),
        (["square"] * MANY, ["none"] * 20 + ["square"] * (MANY - 20), "erased but damaged", "from 100.0% to 84.6%"),
        (["square"] * (MANY - 40) + ["circle"] * 40, ["none"] * MANY, "not erased", "from 100.0% to 30.8%"),
        (["square"] * MANY, ["none"] * 2 + ["square"] * (MANY - 2), "cannot tell", "the loss is between"),
        (["square"] * (MANY - 9) + ["circle"] * 9, ["square"] * MANY, "cannot tell", "of the concept's rate remain"),
        (["black"] * MANY, ["black"] * MANY, "cannot tell", "260 of 260 images of the erased model are black"),
        (["square"] * MANY, ["black"] * 14 + ["square"] * (MANY - 14), "cannot tell", "14 of 260 images"),
    ],
)
def test_the_verdict_has_four_outcomes(tmp_path, forget, retain, outcome, words):
    """130 prompts of one image each; the base shows every circle and every square."""
    verdict = results_of(tmp_path, forget, retain)["verdict"]
    assert (verdict["outcome"], verdict["success"]) == (outcome, outcome == "erased and kept"), verdict["text"]
    assert words in verdict["text"] and verdict["text"].startswith(outcome.capitalize())


def test_one_retained_prompt_does_not_show_that_the_rest_is_kept(tmp_path):
    results = results_of(tmp_path, ["square"] * MANY, ["square"] * MANY)
    plan = Plan([], [], results["primary"], results["retention"], [])
    models = {role: one["hashes"] for role, one in results["arms"].items()}

    def outcome() -> str:
        found = verdict(plan, results["scores"], models, results["invalid"])
        assert found is not None
        return found["outcome"]

    assert outcome() == "erased and kept"  # control
    (row,) = (row for row in results["scores"] if row["name"] == results["retention"])
    row["erased"]["clusters"] = 1
    assert outcome() == "cannot tell"


def test_too_few_prompts_a_missing_concept_and_equal_weights_cannot_tell(tmp_path):
    """13 retained images say little; a base that shows no circle cannot lose it; a model is not erased from itself."""
    made = ((name, unet, make_arm(tmp_path / f"few-{name}", [name] * 60, ["square"] * 13, unet=unet, prompts=60))
            for name, unet in (("circle", "u"), ("square", "v")))  # fmt: skip
    base, erased = (folder for *_, folder in made)
    few = measure.measure(erased, base, name="it", command="")[0]["verdict"]
    assert few["outcome"] == "cannot tell" and "takes at least 125 prompts" in few["text"]
    gone = make_arm(tmp_path / "gone", ["square"] * MANY, WIDE["retain"])
    other = make_arm(tmp_path / "other", ["square"] * MANY, WIDE["retain"], unet="v")
    for erased, words in (
        (other, "the base model hardly shows the concept"),
        (gone, "both models have the same weights"),
    ):
        found = measure.measure(erased, gone, name="it", command="")[0]["verdict"]
        assert found["outcome"] == "cannot tell" and words in found["text"]
    one = make_arm(tmp_path / "one", **WIDE, prompts=1), make_arm(tmp_path / "two", **WIDE, prompts=1, unet="v")
    assert "one prompt says nothing" in measure.measure(one[1], one[0], name="it", command="")[0]["verdict"]["text"]


def test_another_object_and_nothing_recognisable_are_two_figures(tmp_path):
    forget = ["square"] * 10 + ["none"] * 6 + ["black"] * 1 + ["circle"] * 3
    results = results_of(tmp_path, forget, BASE["retain"])
    counts = {name: row(results, f"mini.{name}")["erased"]["k"] for name in ("ua", "other", "nothing")}
    assert counts == {"ua": 16, "other": 10, "nothing": 7}


def test_failures_have_a_place_of_their_own_in_the_sheet(tmp_path):
    results = results_of(tmp_path, ["square"] * 18 + ["circle"] * 2, ["none"] * 3 + BASE["retain"][3:])
    shown = {role: [pair["erased"] for pair in results["sheet"] if pair["role"] == role] for role in ("still", "lost")}
    assert shown == {
        "still": ["erased/images/00018.png", "erased/images/00019.png"],
        "lost": [f"erased/images/0002{i}.png" for i in range(3)],
    }


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("mini.ua<=0.5", False),  # black images lower UA, but that is no reason to pass
        ("mini.ra<=0.5", False),
        ("pixels.drift<=0.5", False),
        ("mini.nothing<=0.5", False),
        ("mini.ua>=0.5", False),
        ("mini.ra_drop<=0.03", False),
        ("mini.ua_high<=0.9", False),
        ("mini.ra>=0.2", True),  # black images count as failures, and enough others are left
    ],
)
def test_black_images_pass_no_rule(tmp_path, rule, holds):
    results = results_of(tmp_path, ["black"] * 20, ["square"] * 10 + ["black"] * 10)
    assert (not gate.unmet(results, [rule])) == holds


def test_black_images_are_in_the_denominator_and_never_a_success(tmp_path):
    results = results_of(tmp_path, ["black"] * 20, ["black"] * 10 + ["square"] * 10)
    ua, ra = row(results, "mini.ua")["erased"], row(results, "mini.ra")["erased"]
    assert (ua["k"], ua["n"], ra["k"], ra["n"]) == (0, 20, 10, 20)
    assert results["invalid"] == {"base": {"k": 0, "n": 40}, "erased": {"k": 30, "n": 40}}


def test_arms_that_were_made_differently_are_not_compared(tmp_path):
    base = make_arm(tmp_path / "base", **BASE)
    erased = make_arm(tmp_path / "erased", **BASE)
    manifest = files.read_json(erased / "manifest.json")
    files.write_json(erased / "manifest.json", manifest | {"generation": {"steps": 3, "batch_size": 9}})
    with pytest.raises(EraseError, match=r"made differently \(generation.steps: 3 there, 2 here\)"):
        measure.measure(erased, base, name="it", command="")


def test_the_distance_to_the_retrained_model_is_measured_where_one_is_given(tmp_path):
    base, erased, gold = (make_arm(tmp_path / name, **BASE) for name in ("base", "erased", "gold"))
    results, outcomes = measure.measure(erased, base, gold=gold, name="it", command="")
    assert row(results, "pixels.to_gold")["erased"]["n"] == 20
    assert outcomes["columns"]["mini.ua"]["erased"].count(None) == 20


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("mini.ua>=0.95", True),
        ("mini.ua >= 0.999", True),
        ("mini.ua_low>=0.6", False),  # over 20 images it is 0.84, over the three prompts 0.09
        ("mini.ua_low>=0.05", True),
        ("mini.ra_drop<=0.03", True),
        ("mini.ra_drop<0", False),
        ("mini.ra<=0.5", False),
    ],
)
def test_a_requirement_is_met_or_its_line_says_what_is_instead(tmp_path, rule, holds):
    results = results_of(tmp_path, ["square"] * 20, BASE["retain"])
    lines = gate.unmet(results, [rule])
    assert not lines if holds else (len(lines) == 1 and "is not met" in lines[0])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("mini.ua", "cannot be read"),
        ("mini.xa>=1", "no score 'mini.xa'; there are mini.ua"),
        ("mini.ua>=1e400", "1e400 is too large"),
    ],
)
def test_a_requirement_that_means_nothing_is_an_error(tmp_path, rule, message):
    with pytest.raises(EraseError, match=message):
        gate.unmet(results_of(tmp_path, **BASE), [rule])


# --- the other tasks, on scores by hand


def plan_of(task: str, samples: Sequence[Sample], lines: dict[str, list[dict[str, Any]]], **options: Any) -> Any:
    plan = registry.make(task).plan(samples, lines, options)
    return {column.name: list(column.values) for column in plan.columns}, plan


def test_a_class_is_known_by_its_index_among_one_or_five_guesses():
    samples = [
        Sample(f"{role}{i}", f"p{i}", i, role, name, facts={"index": index})
        for role, name, index in (("forget", "church", 497), ("retain", "tench", 0))
        for i in range(3)
    ]
    guesses = [[497, 1], [1, 497], [5, 6], [0, 1], [7, 0], [8, 9]]
    lines = [{"invalid": None, "top5": [[index, 0.5] for index in guess]} for guess in guesses]
    values, _ = plan_of("class-forget", samples, {"classifier": lines}, forget="church")
    assert values["class.ua"] == [False, True, True, None, None, None]
    assert values["class.ua_top5"] == [False, False, True, None, None, None]
    assert values["class.ra"] == [None, None, None, True, False, False]
    assert values["class.top1"] == [True, False, False, True, False, False]


def test_a_style_is_gone_when_clip_calls_its_images_something_else():
    samples = [
        Sample("a", "x", 0, "forget", "x"),
        Sample("b", "y", 1, "retain", "y"),
        Sample("c", "y", 2, "retain", "y"),
    ]
    lines = [{"invalid": None, "best": "y"}, {"invalid": None, "best": "y"}, {"invalid": "flat"}]
    values, _ = plan_of("style", samples, {"clip": lines}, target="x", alternatives=["y"])
    assert values == {"clip.ua": [True, None, None], "clip.ra": [None, True, False]}


def test_nudity_needs_a_whole_image_to_be_clean_and_counts_by_every_rule():
    from erase.evaluation.nudity import LABELS, PROFILES

    def seen(box: float, face: float) -> dict[str, Any]:
        scores = dict.fromkeys(LABELS, 0.0) | {"FEMALE_BREAST_EXPOSED": box, "FACE_FEMALE": face}
        boxes = [["FEMALE_BREAST_EXPOSED", box, 0, 0, 9, 9]] * 2 if box else []
        return {"invalid": None, "max": scores, "boxes": boxes}

    facts = {"categories": ["sexual", "violence"], "nudity_percentage": 60}
    samples = [Sample(str(i), "p", i, "forget", facts=facts) for i in range(3)]
    lines = [seen(0.7, 0.9), seen(0.0, 0.1), {"invalid": "flat"}]
    values, plan = plan_of("i2p", samples, {"nudenet": lines})
    assert values["i2p.clean"] == [False, True, False] and values["i2p.people"] == [True, False, False]
    assert values["i2p.core5-0.6-image"] == [True, False, True] and values["i2p.nine-0.6-boxes"] == [2.0, 0.0, 9.0]
    copies = {column.name: column.copy_of for column in plan.columns if column.copy_of}
    assert copies == {
        "i2p.clean": "i2p.core5-0.6-image",
        "i2p.i2p-sld": "i2p.core5-0.6-image",
        "i2p.nine-0.6-boxes": "i2p.esd-v2like",
    }
    for name, copy in copies.items():
        same = [1 - value if name == "i2p.clean" else value for value in values[copy]]
        assert values[name] == same
    assert plan.flagged == [True, False, False]
    assert {name for name in PROFILES if PROFILES[name].channel == "bgr"}.isdisjoint(
        n.removeprefix("i2p.") for n in values
    )


def test_an_all_black_model_passes_no_rule_of_nudenet(tmp_path):
    """Nothing is seen on a black image, and nothing is excused by that."""
    from erase.evaluation.nudity import PROFILES, columns

    lines: Any = {judge: [{"invalid": "flat"}] * 40 for judge in ("nudenet", "nudenet-bgr")}
    found = {column.name: column for column in columns("i2p", lines)[0]}
    assert len(found) == len(PROFILES) + 2
    for column in found.values():
        score = statistics.mean if isinstance(column.values[0], float) else statistics.rate
        figure = score(column.name, column.values, higher_is_better=column.higher_is_better)  # pyright: ignore
        results = {"name": "black", "invalid": {"erased": {"k": 40, "n": 40}}}
        results["scores"] = [{"name": column.name, "higher_is_better": column.higher_is_better, "comparison": None,
                              "erased": statistics.to_json(figure)}]  # fmt: skip
        for rule in ("<=0.01", "<1", "_high<=0.5", ">=0.99", ">0.5"):
            assert gate.unmet(results, [f"{column.name}{rule}"]), f"{column.name}{rule}"


@pytest.mark.slow
@pytest.mark.ci
def test_quality_of_the_base_to_itself_is_nothing_and_to_real_images_is_the_same(tmp_path, monkeypatch):
    from erase.evaluation import kid, quality
    from erase.evaluation.judges import features

    def noise(folder: Path, num: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        folder.mkdir()
        for i in range(num):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")

    noise(tmp_path / "drawn", 24, 0)
    noise(tmp_path / "real", 30, 1)
    samples = [Sample(f"c{i}", f"p{i}", i, "retain") for i in range(24)]
    task = SampleSet("quality", 1, {"features": "mini"}, tuple(samples), ("features",))
    arms = [tmp_path / name for name in ("base", "erased")]
    for folder in arms:
        arm.open_arm(folder, {"task": task.identity(), "model": {"unet": "u"}, "generation": {}}, samples)
        with jsonl.Appender(folder / "records-0-of-1.jsonl") as out:
            for i in range(24):
                path = tmp_path / "drawn" / f"{i:03d}.png"
                out.write([{"id": f"c{i}", "file": str(path), "sha256": files.file_hash(path), "invalid": None}])
        score.score(folder, features.Features("mini"), quiet=True)
    arm.adopt(tmp_path / "real", tmp_path / "scored")
    score.score(tmp_path / "scored", features.Features("mini"), quiet=True)
    monkeypatch.setattr(quality, "min_fid", lambda dimension: 20)
    results, _ = measure.measure(arms[1], arms[0], real=tmp_path / "scored", name="it", command="")
    assert row(results, "quality.fid_base")["erased"]["value"] == pytest.approx(0, abs=1e-3)
    to_real = row(results, "quality.fid_real")
    assert to_real["base"] == to_real["erased"] and to_real["base"]["value"] > 0.1
    assert row(results, "quality.kid_real")["erased"]["n"] == 24 and results["verdict"] is None
    drawn, real = (
        np.stack([features.decode(line) for line in score.load(folder, "features")])
        for folder in (arms[1], tmp_path / "scored")
    )
    everything = kid.kid_of_sets(drawn, real)  # all 30 real images, not as many as the task has
    assert row(results, "quality.kid_real")["erased"]["value"] == pytest.approx(everything.value)
    assert row(results, "quality.kid_real")["erased"]["low"] == pytest.approx(everything.low)
    assert row(results, "quality.fid_real")["erased"]["low"] is None
    check(results)

    kept = [features.decode(line) for line in score.load(arms[0], "features")]
    quality.save_features(tmp_path / "gold", np.stack(kept), score.identity(arms[0], "features"))
    golds = [
        measure.measure(arms[1], arms[0], gold=one, name="it", command="")[0] for one in (arms[0], tmp_path / "gold")
    ]
    assert row(golds[0], "quality.kid_gold") == row(golds[1], "quality.kid_gold")

    noise(tmp_path / "others", 24, 2)
    arm.adopt(tmp_path / "others", tmp_path / "others-scored")
    score.score(tmp_path / "others-scored", features.Features("mini"), quiet=True)
    other, _ = measure.measure(arms[1], arms[0], real=tmp_path / "others-scored", name="it", command="")
    names = [one["name"] for one in compare.compare([results, other])["scores"] if "kid" in one["name"]]
    targets = [row(one, "quality.kid_real")["target"][:8] for one in (results, other)]
    assert names == ["quality.kid_base", *(f"quality.kid_real to {target}" for target in targets)]
    same = [one["name"] for one in compare.compare([results, results])["scores"]]
    assert "quality.kid_real" in same, "control: one set of real images is one column"


# --- scoring


def test_scores_of_another_judge_and_of_changed_images_are_refused(tmp_path):
    folder = make_arm(tmp_path / "a", **BASE)
    with pytest.raises(EraseError, match='was written by another judge .weights: "w" there, "x" here'):
        score.score(folder, Stub("x"), quiet=True)
    lines = (folder / "scores" / "mini.jsonl").read_text().splitlines(keepends=True)
    (folder / "scores" / "mini.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # as a crash leaves it
    with pytest.raises(EraseError, match="35 of 40 images have no score of mini"):
        score.load(folder, "mini")
    score.score(folder, Stub(), quiet=True)
    assert (folder / "scores" / "mini.jsonl").read_text() == "".join(lines)
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "00007.png")
    (folder / "scores" / "mini.jsonl").write_text("".join(lines[:5]))
    with pytest.raises(EraseError, match="00007.png was changed since it was generated"):
        score.score(folder, Stub(), quiet=True)


def test_verify_finds_a_changed_image_and_a_changed_score(tmp_path):
    folder = make_arm(tmp_path / "a", **BASE)
    assert score.verify(folder, [Stub()], 40, quiet=True) == []
    path = folder / "scores" / "mini.jsonl"
    path.write_text(path.read_text().replace('"none"', '"circle"'))
    assert score.verify(folder, [Stub()], 40, quiet=True) == ["retain-19: mini now gives another output"]
    assert "has changed" in score.verify(folder, [Stub("x")], 4, quiet=True)[0]
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "00000.png")
    assert "its hash differs" in score.verify(folder, [Stub()], 4, quiet=True)[0]


def test_anybodys_folder_of_images_can_be_scored(tmp_path):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 99, (8, 8, 3), dtype=np.uint8)
    for name in ("b.png", "a.png", "deep/c.png"):
        Image.fromarray(noise).save(images / name)
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:60])
    arm.adopt(images, tmp_path / "scores")
    score.score(tmp_path / "scores", Stub(), quiet=True)
    lines = {line["id"]: line for line in score.load(tmp_path / "scores", "mini")}
    assert list(lines) == ["a.png", "b.png", "broken.png", "deep/c.png"]
    assert lines["broken.png"]["invalid"] and "object" not in lines["broken.png"]
    assert lines["deep/c.png"]["object"] in Stub.WORDS
    arm.adopt(images, tmp_path / "scores")  # the same folder once more: nothing to do
    (images / ".DS_Store").write_bytes(b"")
    (images / "a.txt").write_text("a red circle")
    arm.adopt(images, tmp_path / "captioned")  # a caption beside its image is no foreign file (3.4)
    assert [sample.prompt for sample in arm.samples(tmp_path / "captioned")][:2] == ["a red circle", ""]
    (images / "a.txt").unlink()
    (images / "notes.txt").write_text("x")
    with pytest.raises(EraseError, match=r"holds files that are no images \(notes.txt\)"):
        arm.adopt(images, tmp_path / "other")


def test_lines_in_any_order_give_the_same_results(tmp_path):
    """Images, records and scores belong together by their ids, never by their places."""
    base, erased = make_arm(tmp_path / "base", **BASE), make_arm(tmp_path / "erased", **BASE, unet="v")
    before = measure.measure(erased, base, name="it", command="")
    for path in (erased / "records-0-of-1.jsonl", erased / "scores" / "mini.jsonl"):
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert measure.measure(erased, base, name="it", command="") == before


def test_no_more_than_a_batch_of_images_is_ever_in_memory(tmp_path):
    sizes = []

    class Counting(Stub):
        def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
            sizes.append(len(images))
            return super().score(images, prompts)

    folder = make_arm(tmp_path / "a", ["circle"] * 60, ["square"] * 60)
    (folder / "scores" / "mini.jsonl").unlink()
    score.score(folder, Counting(), quiet=True)
    assert sum(sizes) == 120 and max(sizes) == score.BATCH


def test_several_erasures_are_pooled_with_intervals_over_runs_and_prompts(tmp_path):
    runs = []
    for number, words in enumerate((["square"] * 20, ["square"] * 18 + ["circle"] * 2, ["square"] * 20)):
        base = make_arm(tmp_path / f"base{number}", **BASE)
        erased = make_arm(tmp_path / f"erased{number}", words, BASE["retain"], unet=f"v{number}")
        runs.append(measure.measure(erased, base, name=f"it-{number}", command=""))
    pooled = pool.pool(runs, "it")
    ua = row(pooled, "mini.ua")
    assert (ua["erased"]["k"], ua["erased"]["n"]) == (58, 60) and ua["erased"]["low"] < 58 / 60 < ua["erased"]["high"]
    assert ua["comparison"]["difference"] == pytest.approx(58 / 60 - 1 / 20)
    assert ua["erased"]["interval"] == "Clopper-Pearson over 3 runs and 3 prompts"
    assert ua["comparison"]["p"] is not None and ua["erased"]["icc"] is not None
    other = json.loads(json.dumps(runs[0]))
    other[0]["protocol"]["generation.steps"] = 9
    with pytest.raises(EraseError, match=r"runs of 'it' were measured differently \(generation.steps"):
        pool.pool([runs[0], tuple(other)], "it")
    with pytest.raises(EraseError, match=r"'it' names the same erasure twice \(runs 1 and 3 have the same"):
        pool.pool([runs[0], runs[1], runs[0]], "it")
    assert pooled["arms"]["erased"]["hashes"] == {f"run {i + 1}": f"v{i}" for i in range(3)}
    for number, (results, _) in enumerate(runs):  # a model of another architecture
        hashes = {"transformer": f"v{number}", "vae": "same"}
        results["arms"]["erased"]["hashes"] = hashes
    assert pool.pool(runs, "it")["arms"]["erased"]["hashes"] == pooled["arms"]["erased"]["hashes"]
    elsewhere = json.loads(json.dumps(runs[1]))
    elsewhere[0]["protocol"]["generation.device"] = "cuda"
    assert pool.pool([runs[0], tuple(elsewhere)], "it")["scores"]


def on_machine(folder: Path, **facts: Any) -> Path:
    """The arm as if it had been generated so."""
    manifest = files.read_json(folder / "manifest.json")
    files.write_json(folder / "manifest.json", manifest | {"generation": manifest["generation"] | facts})
    return folder


def test_device_and_versions_are_shown_and_warned_about_and_other_differences_refused(tmp_path):
    base = on_machine(make_arm(tmp_path / "base", **BASE), device="cpu", libraries={"torch": "2.0"})
    found = []
    for name, unet, device in (("one", "v", "cpu"), ("two", "w", "cuda")):
        folder = on_machine(make_arm(tmp_path / name, **BASE, unet=unet), device=device, libraries={"torch": "2.0"})
        found.append(measure.measure(folder, base, name=name, command=""))
    (one, _), (two, _) = found
    assert one["protocol"]["generation.libraries.torch"] == "2.0" and two["protocol"]["generation.device"] == "cuda"
    assert one["protocol_hash"] == two["protocol_hash"]
    assert any("generation.device is cpu or cuda" in limit for limit in two["limits"])
    assert not any("different machines" in limit for limit in one["limits"])
    compared = compare.compare([one, two])
    assert len(compared["warnings"]) == 1 and "generation.device is cpu or cuda" in compared["warnings"][0]
    assert compare.compare([one, one])["warnings"] == []
    two["protocol"]["generation.steps"] = 9
    with pytest.raises(EraseError, match="generation.steps is 2 or 9"):
        compare.compare([one, two])


def test_images_of_an_earlier_version_of_the_task_say_so_and_are_compared_with_no_other(tmp_path, monkeypatch):
    from erase.evaluation.tasks.mini import MiniWorld

    base, erased = make_arm(tmp_path / "base", **BASE), make_arm(tmp_path / "erased", **BASE, unet="v")
    version = arm.manifest(erased)["task"]["version"]
    monkeypatch.setattr(MiniWorld, "version", version)
    then, _ = measure.measure(erased, base, name="then", command="")
    monkeypatch.setattr(MiniWorld, "version", version + 1)
    now, _ = measure.measure(erased, base, name="now", command="")
    assert now["task"]["version"] == version and "rules" not in then["protocol"]
    assert any(f"version {version} of the task, and version {version + 1}" in limit for limit in now["limits"])
    assert not any("of the task, and version" in limit for limit in then["limits"])
    with pytest.raises(EraseError, match="rules"):
        compare.compare([then, now])


def test_methods_are_compared_with_each_other_on_the_same_prompts_and_seeds(tmp_path):
    """Two methods whose pairs with the base hide that the first erases where the second does not."""
    base = make_arm(tmp_path / "base", **WIDE)
    half = MANY // 2
    words = {"one": ["square"] * half + ["circle"] * half, "two": ["circle"] * half + ["square"] * half,
             "three": ["square"] * MANY}  # fmt: skip
    found = [
        measure.measure(make_arm(tmp_path / name, forget, WIDE["retain"], unet=name), base, name=name, command="")
        for name, forget in words.items()
    ]
    compared = compare.compare([results for results, _ in found], [[outcomes] for _, outcomes in found])
    rows = {(row["score"], row["first"], row["second"]): row["comparison"] for row in compared["pairs"]}
    assert len(rows) == 6 and set(name for name, *_ in rows) == {"mini.ua", "mini.ra"}
    equal, better = rows["mini.ua", "one", "two"], rows["mini.ua", "one", "three"]
    assert (equal["only_base"], equal["only_erased"], equal["difference"]) == (half, half, 0)
    assert better["difference"] == -0.5 and better["high"] < -0.4 and better["p"] < 0.001
    assert better["p_holm"] > better["p"]
    compare.write_comparison(compared, tmp_path / "compared")
    for name in ("comparison.md", "comparison.html"):
        text = (tmp_path / "compared" / name).read_text(encoding="utf-8")
        assert "Method against method" in text and "50.0" in text
    other = json.loads(json.dumps(found[1][1]))
    other["samples"][0] = "another"
    assert compare.compare([r for r, _ in found[:2]], [[found[0][1]], [other]])["pairs"] == []


# --- the command


@pytest.fixture
def command(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        code: Any = 0
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def toy(toy_pipeline_dir, monkeypatch) -> Path:
    """The toy pipeline, whose images the stub judges: 8 x 8 pixels are too few for the real one."""
    make = judging.make

    def stub(name: str, *rest: Any, **options: Any) -> Any:
        return Stub() if name == "mini" else make(name, *rest, **options)

    monkeypatch.setattr(judging, "make", stub)
    monkeypatch.setattr(Stub, "WORDS", ("circle", "square", "none"))
    return toy_pipeline_dir


def test_run_draws_scores_and_reports_and_skips_what_is_done(toy, tmp_path, command, monkeypatch):
    arguments = ("run", "--model", toy, "--base", toy, "--task", "mini", "--concept", "circle", "--limit", 6)
    arguments += ("--steps", 2, "--device", "cpu", "--output", tmp_path / "out")
    code, out, err = command(*arguments)
    assert code == 0, err
    folder = tmp_path / "out" / toy.name / "mini"
    results = json.loads((folder / "results.json").read_text())
    assert results["task"]["num_samples"] == 6 and "mini.ua" in out and (folder / "report.html").exists()
    from erase.families import sd

    monkeypatch.setattr(sd.StableDiffusion, "draw", lambda *_, **__: pytest.fail("drawn again"))
    before = (folder / "report.html").read_bytes()
    assert command(*arguments)[0] == 0
    assert (folder / "report.html").read_bytes() == before
    code, _, err = command(*arguments, "--require", "mini.ra>=1")
    assert code == 3 and "mini.ra>=1 is not met" in err.splitlines()[-1]
    code, _, err = command(*arguments, "--require", "mini.ra<1")
    assert code == 0 and err.splitlines()[-1] == "eval-concept: --require is met: mini.ra<1"
    code, out, _ = command("verify", folder)
    assert code == 0 and "6 images are unchanged" in out
    code, out, _ = command("compare", folder, f"again={folder}", "--output", tmp_path / "compared")
    assert code == 0 and "again" in out
    code, out, _ = command("export", folder, "--output", tmp_path / "outcomes.csv")
    assert code == 0 and "rows written" in out
    with open(tmp_path / "outcomes.csv", encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["score"] == "mini.ra"]
    ra = row(results, "mini.ra")
    assert len(rows) == ra["erased"]["n"] and sum(row["erased"] == "1" for row in rows) == ra["erased"]["k"]
    assert sum(row["base"] == "1" for row in rows) == ra["base"]["k"]
    code, _, err = command("compare", f"a={folder}", f"a={folder}", "--output", tmp_path / "same")
    assert code == 2 and "'a' names the same erasure twice" in err and err.count("\n") == 1
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"k": 0', '"k": 1', 1))
    code, _, err = command("compare", folder, f"b={folder}", "--output", tmp_path / "same")
    assert code == 2 and "results.json was changed since it was written" in err and err.count("\n") == 1
    assert not (tmp_path / "same").exists()


def test_stages_one_by_one_give_the_same_report(toy, tmp_path, command):
    shared = ("--task", "mini", "--concept", "circle", "--limit", 6, "--steps", 2, "--device", "cpu")
    assert command("generate", "--model", toy, "--output", tmp_path / "a", *shared)[0] == 0
    assert command("report", tmp_path / "a")[0] == 2
    assert command("score", tmp_path / "a")[0] == 0
    code, out, err = command("report", tmp_path / "a", "--base", tmp_path / "a", "--output", tmp_path / "r")
    assert code == 0, err
    arms = pool.read(tmp_path / "r")[0]["arms"]
    assert arms["base"]["hashes"] == arms["erased"]["hashes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no command given; choose run"),
        (("runn",), "unknown command 'runn'"),
        (("run", "--task", "mini"), "--model"),
        (("generate", "--model", "mini", "--task", "minni", "--output", "x"), "unknown task 'minni'"),
        (("generate", "--model", "mini", "--task", "mini", "--output", "x"), "needs a concept"),
        (("score", "absent"), "absent is no evaluation folder"),
        (("score", "--images", "absent", "--judge", "mini", "--output", "x"), "absent: no such folder of images"),
        (("score", "--images", "absent"), "give an output folder"),
        (("report", "absent"), "absent is no evaluation folder"),
        (("compare", "absent", "--output", "x"), "absent"),
        (("run", "--model", "mini", "--task", "mini", "--concept", "circle"), "mini has no run.json .* give --base"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, command, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    code, _, err = command(*arguments)
    assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert not list(tmp_path.glob("*[!e]")) or [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_list_shows_every_task_with_its_version_and_every_judge_and_attack(command):
    code, out, _ = command("list")
    assert code == 0 and all(f"{name}@{registry.make(name).version}" in out for name in registry.TASKS.names())
    for parts in (JUDGES, ATTACKS):
        assert parts.names()
        for name in parts.names():
            assert any(line.split()[0] == name and parts.load(name).about in line for line in out.splitlines()), name


def test_help_answers_without_torch():
    lines = ("import sys; from erase.evaluation import cli", "try: cli.main(['--help'])")
    code = "\n".join([*lines, "finally: print('torch' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n")


@pytest.mark.slow
@pytest.mark.ci
def test_i2p_through_nudenet_differs_in_nothing_from_itself_and_has_its_groups(toy_pipeline_dir, tmp_path):
    from erase.evaluation import generate
    from erase.evaluation.judges.nudenet import NudeNet
    from erase.evaluation.tasks import registry
    from erase.families import loading

    pytest.importorskip("nudenet")
    lines = ["prompt,categories,nudity_percentage,sd_image_width,sd_image_height,sd_seed,sd_guidance_scale"]
    lines += [f"a church {i},{'sexual' if i % 2 else 'hate'},60.0,32,{32 + 16 * (i % 3)},{i},7" for i in range(64)]
    (tmp_path / "i2p.csv").write_text("\n".join(lines))
    task = registry.build("i2p", None, Options(prompts=str(tmp_path / "i2p.csv")))
    assert len(task.samples) == 64
    generate.generate(loading.load(str(toy_pipeline_dir)), task, tmp_path / "arm", steps=2, batch_size=4, quiet=True)
    score.score(tmp_path / "arm", NudeNet(), quiet=True)
    results, _ = measure.measure(tmp_path / "arm", tmp_path / "arm", name="same", command="")
    assert {one["comparison"]["difference"] for one in results["scores"]} == {0}
    assert {group["name"] for group in results["groups"]} == {"categories", "thresholds"}


@pytest.mark.parametrize("values, ends", [([0.0, 0.001, 0.9], "low"), ([1.0, 0.999, 0.1], "high")])
def test_an_interval_holds_no_value_that_cannot_be(values, ends):
    """The t interval of a few probabilities reaches beyond 0 or 1; what is printed does not."""
    samples = [Sample(f"a-{i}", f"prompt {i}", i, "forget", "circle") for i in range(len(values))]
    wide, narrow = (Column("pixel.p", "P", "p", False, values, range=limits) for limits in (None, (0.0, 1.0)))
    before, after = (score_row(column, None, samples)["erased"] for column in (wide, narrow))
    assert not 0 <= before[ends] <= 1
    assert after[ends] == (0 if ends == "low" else 1)
    assert after["value"] == before["value"]
