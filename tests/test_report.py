"""Reports from made-up results: what they refuse, show, hide and never do."""

import base64
import copy
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erase.errors import EraseError
from erase.evaluation import cli
from erase.evaluation.report import results as stored
from erase.evaluation.report.compare import compare, front, write_comparison
from erase.evaluation.report.page import write
from erase.evaluation.report.results import FORMAT, Results, check, read
from erase.files import read_json, text_hash, write_json
from erase.statistics import Score, mean, paired_mean, paired_rate, rate, to_json

ATTACK = "a <script>alert(1)</script> $x$ [link](http://example.org) | 'quoted' \"twice\""


def figures(name: str, k_base: int, k_erased: int, n: int) -> dict[str, Any]:
    """A score whose first k of n samples are true."""
    base, erased = ([i < k for i in range(n)] for k in (k_base, k_erased))
    return {
        "base": to_json(rate(name, base, higher_is_better=True)),
        "erased": to_json(rate(name, erased, higher_is_better=True)),
        "comparison": to_json(paired_rate(name, base, erased)),
    }


def clip_figures() -> dict[str, Any]:
    base = [0.30 + 0.001 * (i % 7) for i in range(50)]
    erased = [value - 0.002 * (i % 3) for i, value in enumerate(base)]
    return {
        "base": to_json(mean("clip", base, higher_is_better=True)),
        "erased": to_json(mean("clip", erased, higher_is_better=True)),
        "comparison": to_json(paired_mean("clip", base, erased)),
    }


def make_results(name: str = "circle", ua: int = 97, ra: int = 230) -> dict[str, Any]:
    about = {"about": "A sentence.", "higher_is_better": True}
    return {
        "format": FORMAT,
        "name": name,
        "task": {"id": "mini", "version": 1, "options": {}, "num_samples": 340, "prompts_hash": "ab12"},
        "protocol": {"judge": "mini-judge@1", "steps": 20, "guidance": 4.0},
        "protocol_hash": "cd34",
        "arms": {
            "base": {"name": "mini", "hashes": {"unet": "base-hash"}},
            "erased": {"name": f"runs/{name}", "hashes": {"unet": "erased-hash"}},
        },
        "primary": "mini.ua",
        "retention": "mini.ra",
        "scores": [
            {"name": "mini.ua", "title": "Unlearning accuracy", **about, **figures("mini.ua", 3, ua, 100)},
            {"name": "mini.ra", "title": "Retained accuracy", **about, **figures("mini.ra", 231, ra, 240)},
            {"name": "mini.clip", "title": "CLIP score", **about, **clip_figures()},
        ],
        "groups": [
            {
                "name": "classes",
                "title": "Accuracy by class",
                "rows": [
                    {"label": "circle", "role": "forget", **figures("circle", 20, 1, 20)},
                    {"label": ATTACK, "role": "retain", **figures("square", 19, 18, 20)},
                ],
            }
        ],
        "invalid": {"base": {"k": 0, "n": 340}, "erased": {"k": 12, "n": 340}},
        "sheet": [
            {"prompt": ATTACK, "role": "forget", "base": "a.png", "erased": "b.png", "flagged": True},
            {"prompt": "word " * 300, "role": "retain", "base": None, "erased": "truncated.png", "flagged": False},
        ],
        "command": "eval-concept run --model runs/circle --task mini",
        "versions": {"torch": "2.13.0"},
        "limits": ["Adversarial prompts."],
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Do not change it: copy.deepcopy."""
    return make_results()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images of noise, full of high frequencies, and half a file."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (2, 192, 192, 3), dtype=np.uint8)
    for name, image in zip("ab", noise, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    (folder / "truncated.png").write_bytes((folder / "a.png").read_bytes()[:5000])
    return folder


@pytest.fixture(scope="module")
def page(results, images, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    write(results, folder, images=images)
    return (folder / "report.html").read_text(encoding="utf-8")


def embedded(page: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), dtype=float) for data in found]


def roughness(image: np.ndarray) -> float:
    """How far neighbouring pixels differ, in grey levels."""
    return max(np.abs(np.diff(image, axis=axis)).mean() for axis in (0, 1))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.pop("command"), r"results lacks 'command'; its keys are format, name, .*retention\?"),
        (lambda r: r.update(score=1), "results has an unknown key 'score'"),
        (lambda r: r["scores"][1]["erased"].pop("n"), r"results\.scores\[1\]\.erased lacks 'n'"),
        (lambda r: r["scores"][0]["comparison"].update(b=3), r"scores\[0\]\.comparison has an unknown key 'b'"),
        (lambda r: r["groups"][0]["rows"][0].update(role="keep"), r"role is 'keep'; it must be one of \['', 'forget'"),
        (lambda r: r["scores"][0]["erased"].update(value=math.nan), r"erased\.value is 'nan'; it must be a float"),
        (lambda r: r["scores"][0]["erased"].update(n=True), r"erased\.n is 'True'; it must be a int"),
        (lambda r: r["protocol"].update(eta=math.inf), r"results\.protocol\.eta is no JSON value"),
        (lambda r: r["scores"][0]["erased"].update(k="3"), r"erased\.k is '3'; it must be a int"),
        (lambda r: r.update(format=3), r"results\.format is 3; it must be one of \[2\]"),
        (lambda r: r.update(primary="ua"), r"results\.primary is 'ua', which is no score \(mini\.ua, mini\.ra"),
        (lambda r: r["scores"].append(r["scores"][0]), r"holds 'mini\.ua' twice"),
    ],
)
def test_results_of_another_shape_are_refused_with_the_place(results, change, message):
    changed = copy.deepcopy(results)
    check(changed)
    change(changed)
    with pytest.raises(EraseError, match=message):
        check(changed)


def test_nothing_is_written_for_results_that_are_refused(results, images, tmp_path):
    with pytest.raises(EraseError, match="lacks 'limits'"):
        write({key: value for key, value in results.items() if key != "limits"}, tmp_path, images=images)
    assert not list(tmp_path.iterdir())


def test_results_json_is_the_results(results, images, tmp_path):
    write(results, tmp_path, images=images)
    assert read(tmp_path / "results.json") == json.loads(json.dumps(results)) == results


def test_same_results_same_bytes(results, images, tmp_path):
    for name in ("first", "again"):
        write(results, tmp_path / name, images=images)
        write_comparison(compare([results, make_results("square", 60, 235)]), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == "comparison.html comparison.json comparison.md report.html report.md results.json".split()
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_text_from_outside_never_becomes_markup(page, results, images, tmp_path):
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3  # prompt, alt, label
    write(results, tmp_path, images=images)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert r"a \<script\>alert(1)\</script\> $x$ [link\](http://example.org) \| 'quoted'" in markdown


def test_the_page_needs_nothing_from_outside_and_runs_nothing(page):
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", page)
    assert references and all(reference.startswith(("data:", "#")) for reference in references)
    assert "default-src 'none'" in page and "@import" not in page and not re.search(r"\son\w+=", page)


def test_flagged_images_are_blurred_in_their_pixels_unless_shown(page, results, images, tmp_path):
    """Noise is rough, and none of that is left in the page; with show it is."""
    write(results, tmp_path, images=images, show=True)
    shown = embedded((tmp_path / "report.html").read_text(encoding="utf-8"))
    blurred = embedded(page)
    assert len(shown) == len(blurred) == 2
    assert all(roughness(image) > 20 for image in shown)
    assert all(roughness(image) < 1 for image in blurred)


def test_an_image_that_cannot_be_read_leaves_a_gap_and_not_a_grey_half(page):
    assert page.count('<div class="missing">no image</div>') == 2  # one is null, one is truncated


def test_every_score_has_its_n_in_markdown(results, images, tmp_path):
    write(results, tmp_path, images=images)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    for title, n in (("Unlearning accuracy", 100), ("Retained accuracy", 240), ("CLIP score", 50), ("circle", 20)):
        row = next(row for row in rows if row.startswith(f"| {title}"))
        assert row.split(" | ")[4].split()[0] == str(n)
    assert "| Unlearning accuracy ↑ | 3.0 % [1.0, 8.5] | 97.0 % [91.5, 99.0] | +94.0 pp" in markdown
    assert "erased-hash" in markdown and "    eval-concept run --model runs/circle" in markdown
    assert "- Adversarial prompts." in markdown


def test_the_verdict_says_what_can_be_said(results, images, tmp_path):
    def verdict(changed: dict[str, Any]) -> str:
        write(changed, tmp_path, images=images)
        return (tmp_path / "report.md").read_text(encoding="utf-8").split("## Scores")[0]

    text = verdict(results)
    assert (
        "where the base model has 3.0 % [1.0, 8.5]. The difference, +94.0 pp" in text and "better than the base" in text
    )
    assert "Retained accuracy: 95.8 %" in text and "is not statistically significant" in text
    assert "12 of 340 images of the erased model (3.5 %) are invalid" in text
    noise = make_results(ra=10)
    noise["invalid"]["erased"]["k"] = 0
    text = verdict(noise)
    assert "is statistically significant: worse than the base" in text and "All 680 images are valid" in text


def test_lower_can_be_better(images, tmp_path):
    results = make_results(ua=1)
    results["scores"][0]["higher_is_better"] = False
    results["scores"][0] |= figures("mini.ua", 90, 1, 100)
    write(results, tmp_path, images=images)
    assert re.search(
        r"The difference, −89\.0 pp \[.*\], is .* better than", (tmp_path / "report.md").read_text(encoding="utf-8")
    )


def test_a_report_of_one_arm_claims_no_change(images, tmp_path):
    results = make_results()
    for row in [*results["scores"], *results["groups"][0]["rows"]]:
        row |= {"base": None, "comparison": None}
    del results["arms"]["base"], results["invalid"]["base"], results["retention"]
    write(results, tmp_path, images=images)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "does not show what the erasure changed" in markdown
    assert "| Unlearning accuracy ↑ | – | 97.0 % [91.5, 99.0] | – | 100 | – |" in markdown


def test_results_that_were_measured_differently_are_refused_by_field_and_values(results):
    other = make_results("square")
    other["protocol"] |= {"steps": 50, "sampler": "DDIM"}
    message = (
        "'circle' and 'square' were measured differently: steps is 20 or 50; sampler is null or \"DDIM\"; evaluate"
    )
    with pytest.raises(EraseError, match=message) as raised:
        compare([results, other])
    assert "\n" not in str(raised.value)
    other = make_results("square")
    other["task"]["prompts_hash"] = "ef56"
    with pytest.raises(EraseError, match='task.prompts_hash is "ab12" or "ef56"'):
        compare([results, other])
    with pytest.raises(EraseError, match="at least two results, not 1"):
        compare([results])


def test_a_comparison_corrects_p_over_the_whole_table(results):
    """Two methods and three scores: the smallest p is multiplied by 6, and no score is corrected alone."""
    compared = compare([results, make_results("square", 50, 200)])
    cells = [row["comparison"] for score in compared["scores"] for row in score["rows"]]
    smallest = min(cells, key=lambda cell: cell["p"])
    assert len(cells) == 6 and smallest["p_holm"] == pytest.approx(6 * smallest["p"])
    assert all(cell["p_holm"] >= cell["p"] for cell in cells)
    assert results["scores"][0]["comparison"]["p_holm"] is None  # what came in stays as it was


def test_a_comparison_shows_every_method_and_survives_a_missing_score(results, tmp_path):
    other = make_results("circle", 50, 200)
    other["scores"].pop()
    write_comparison(compare([results, other]), tmp_path)
    compared = read_json(tmp_path / "comparison.json")
    assert compared["methods"] == ["circle", "circle (2)"] and compared["front"] == ["circle"]
    markdown = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert r"| circle \* | 97.0 % [91.5, 99.0] |" in markdown and "| circle (2) | – | – | – | – | – |" in markdown
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1 and "http:" not in page and "circle (2)" in page


def test_base_is_shown_only_where_all_have_the_same(results):
    other = make_results("square")
    assert compare([results, other])["scores"][0]["base"] == results["scores"][0]["base"]
    other["arms"]["base"]["hashes"]["unet"] = "another"
    assert compare([results, other])["scores"][0]["base"] is None


def test_the_pareto_front_by_hand():
    """(1, 1) loses to (2, 2), (2, 1) to (2, 2); (3, 0) and (0, 3) lead on an axis; equals do not beat one another."""
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, 0.0), (0.0, 3.0), (2.0, 1.0), (2.0, 2.0)]
    assert front(points) == [False, True, True, True, False, True] and front([]) == []


def test_the_front_follows_the_direction_of_each_score():
    """'square' erases less but keeps less too: off the front, unless a lower retention score is the better one."""
    better, worse = make_results("circle", 97, 230), make_results("square", 50, 200)
    assert compare([better, worse])["front"] == ["circle"]
    for result in (better, worse):
        result["scores"][1]["higher_is_better"] = False
    assert compare([better, worse])["front"] == ["circle", "square"]
    for result in (better, worse):
        del result["retention"]
    assert compare([better, worse])["front"] == []


OLD = Path(__file__).with_name("old") / "results-0.1.0.json"


def test_results_that_0_1_0_wrote_are_read_with_a_note_and_written_as_the_present_ones(tmp_path):
    """Same figures; intervals of length 0 are none, and no figure keeps two intervals."""
    notes: list[str] = []
    found, old = read(OLD, notes.append), read_json(OLD)
    assert len(notes) == 1 and "was written by version 0.1.0" in notes[0] and "no hash" not in notes[0]
    stored.write(Results.from_json(found).to_json(), tmp_path / "results.json")
    again = read(tmp_path / "results.json", lambda text: pytest.fail(text))
    assert again["format"] == FORMAT and "cluster_low" not in json.dumps(again)
    for now, then in zip(again["scores"], old["scores"], strict=True):
        assert (now["erased"]["value"], now["erased"]["k"]) == (then["erased"]["value"], then["erased"]["k"])
        is_point = then["comparison"]["low"] == then["comparison"]["high"]
        assert (now["comparison"]["low"] is None) == is_point
    write(found, tmp_path, images=tmp_path)  # a report can still be made of them


def test_a_report_of_0_1_0_is_compared_with_a_note(tmp_path, capsys):
    """Its outcomes are read as they are; here three images of the concept."""
    places = range(30)
    columns = {"class.ua": {role: [i < 2 if i < 3 else None for i in places] for role in ("base", "erased")}}
    outcomes = {"samples": [str(i) for i in places], "clusters": [f"p{i}" for i in places], "columns": columns}
    old = {key: value for key, value in read_json(OLD).items() if key != "hash"}
    write_json(tmp_path / "outcomes.json", outcomes)
    write_json(tmp_path / "results.json", old | {"outcomes_hash": text_hash(outcomes)})
    cli.main(["compare", f"a={tmp_path}", f"b={tmp_path}", "--output", str(tmp_path / "compared")])
    captured = capsys.readouterr()
    assert captured.err.count("was written by version 0.1.0") == 2 and "66.7 %" in captured.out
    (row,) = read_json(tmp_path / "compared" / "comparison.json")["pairs"]
    assert row["score"] == "class.ua" and row["comparison"]["n"] == 3


def test_an_old_file_without_a_hash_is_read_with_a_note_and_an_edited_file_is_an_error(results, images, tmp_path):
    old, notes = read_json(OLD), list[str]()
    write_json(tmp_path / "old.json", {key: value for key, value in old.items() if key != "hash"})
    read(tmp_path / "old.json", notes.append)
    assert len(notes) == 1 and "has no hash, so it cannot be checked" in notes[0]
    old["scores"][0]["erased"]["k"] = 0
    write_json(tmp_path / "old.json", old)
    write(results, tmp_path, images=images)
    new = read_json(tmp_path / "results.json")
    for name, changed, message in (
        ("old.json", old, "was changed since it was written"),
        ("new.json", {**new, "verdict": {"success": True, "text": "Erased"}}, "was changed since it was written"),
        ("bare.json", {key: value for key, value in new.items() if key != "hash"}, "has no hash"),
    ):
        write_json(tmp_path / name, changed)
        with pytest.raises(EraseError, match=message):
            read(tmp_path / name)


def test_results_are_objects_of_their_types(results):
    """What is not given is its default, and stays what it was as JSON."""
    made = Results.from_json(results)
    plain = json.loads(json.dumps(results))
    scores = [score | {"copy_of": None, "target": None, "gold": None} for score in plain["scores"]]
    groups = [
        group | {"axis": None, "rows": [row | {"gold": None} for row in group["rows"]]} for group in plain["groups"]
    ]
    assert made.to_json() == {"verdict": None} | plain | {"scores": scores, "groups": groups}
    assert isinstance(made.scores[0].erased, Score) and made.arms["erased"].hashes
    assert Results.from_json({key: value for key, value in results.items() if key != "retention"}).retention is None


def test_results_of_a_later_format_are_refused(results):
    with pytest.raises(EraseError, match="results.format is 3; it must be one of"):
        check({**results, "format": FORMAT + 1})


def test_a_group_with_an_axis_is_a_curve_and_one_without_is_bars(images, tmp_path):
    results = make_results()
    points = [{"label": f"0.{i}", "role": "", **figures("t", 90 - 10 * i, 50 - 5 * i, 100)} for i in range(1, 10)]
    curve = {"name": "thresholds", "title": "By threshold", "axis": "threshold", "rows": points}
    write(results | {"groups": [*results["groups"], curve]}, tmp_path, images=images)
    bars, drawn = re.findall(r'<div class="plot">(.*?)</div>', (tmp_path / "report.html").read_text("utf-8"), re.DOTALL)
    assert ">threshold<" in drawn and "fill-opacity: 0.2" in drawn and "fill-opacity: 0.2" not in bars
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "## By threshold" in text and text.index("| 0.1 ") < text.index("| 0.9 ")
