"""`--require`: a rule that can decide nothing is refused before the first image, and any score can be required."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arms import BASE, make_arm
from PIL import Image

from erase.errors import EraseError
from erase.evaluation import cli, expected, gate
from erase.evaluation.options import Options
from erase.evaluation.plan import Expected
from erase.evaluation.tasks import registry
from erase.evaluation.tasks.protocol import Sample

NAMES = {
    "mini.ua": Expected((0, 1), is_rate=True),
    "clip": Expected((-100, 100), is_rate=False),
    "count": Expected((0, math.inf), is_rate=False),
    "free": Expected(None, is_rate=False),
    "kid": Expected(None, is_rate=False, is_compared=False),
}
DOCUMENTED = Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("mini.ua>=1.5", "mini.ua is from 0 to 1, so this is never met"),
        ("mini.ua<=1", "mini.ua is from 0 to 1, so this is always met"),
        ("mini.ua>=0", "mini.ua is from 0 to 1, so this is always met"),
        ("mini.ua>1", "mini.ua is from 0 to 1, so this is never met"),
        ("mini.ua<0", "mini.ua is from 0 to 1, so this is never met"),
        ("mini.ua_drop>=-1", "mini.ua_drop is from -1 to 1, so this is always met"),
        ("count>=0", "count is 0 or more, so this is always met"),
        ("mini.ua>=95", "mini.ua is from 0 to 1, so this is never met; write 0.95 for 95 %"),
        ("mini.ua<=95", "mini.ua is from 0 to 1, so this is always met; write 0.95 for 95 %"),
        ("mini.ua>=-0.1", "mini.ua is from 0 to 1, so this is always met"),
        ("mini.ua<-1", "mini.ua is from 0 to 1, so this is never met"),
        ("mini.ua_low>=1.01", "mini.ua_low is from 0 to 1, so this is never met"),
        ("mini.ua_high<=3", "mini.ua_high is from 0 to 1, so this is always met; write 0.03 for 3 %"),
        ("mini.ua_drop<=3", "mini.ua_drop is from -1 to 1, so this is always met; write 0.03 for 3 %"),
        ("mini.ua_drop>-3", "mini.ua_drop is from -1 to 1, so this is always met"),
        ("clip>=101", "clip is from -100 to 100, so this is never met"),
        ("count>=-1", "count is 0 or more, so this is always met"),
        ("kid_drop<=0", "kid is not compared with the base's, so it has no _drop"),
    ],
)
def test_a_rule_that_can_decide_nothing_is_refused(rule, message):
    with pytest.raises(EraseError) as error:
        gate.check_rules([rule], [NAMES])
    assert str(error.value) == f"--require {rule!r}: {message}"


@pytest.mark.parametrize(
    "rule",
    ["mini.ua>=1", "mini.ua<=0", "mini.ua<1", "mini.ua>0", "mini.ua_drop>-1", "count<=0",
     "mini.ua_low>=.5", "clip>=31", "clip_low>=-101", "free>=7e9",
     "kid<=0.1"],
)  # fmt: skip
def test_a_rule_that_can_be_met_and_not_met_is_accepted(rule):
    """An interval of a mean may reach beyond the range of its values."""
    gate.check_rules([rule], [NAMES])


def test_a_rule_that_the_images_cannot_decide_is_not_met():
    """A mean over valid images, of which there is none, is no score of the report and still required."""
    results = {"name": "it", "scores": [], "unjudged": ["free"]}
    assert gate.unmet_of_all([results], ["free>=0"]) == ["it: free>=0 is not met: no image could be judged for free"]


def test_scores_without_samples_are_not_expected():
    """One sample of the concept alone: what is retained cannot be required."""
    facts = {"object": "circle", "colour": "red", "style": None}
    samples = [Sample("forget-0", "a circle", 0, "forget", "circle", facts=facts)]
    task = {"id": "mini", "options": {"head": "object", "target": "circle"}}
    roles = {"base": True, "gold": False, "real": False}
    found = expected.scores(task, samples, ["mini", "thumbnails"], **roles)
    assert set(found) == {"mini.ua", "mini.other", "mini.nothing"}
    assert set(found.values()) == {Expected((0, 1), is_rate=True)}


def test_the_range_of_every_mean_of_our_own_is_known(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a red circle\n" * 8)
    samples = registry.build("quality", None, Options(prompts=str(path)))
    roles = {"base": True, "gold": False, "real": False}
    found = expected.scores(samples.identity(), samples.samples, samples.judges, **roles, dimension=9)
    ranges = {name: one.range for name, one in found.items()}
    assert ranges == {"quality.whole": (0, 1), "quality.clip_score": (-100, 100), "quality.kid_base": None}


# --- from the command line


@pytest.fixture
def command(capsys) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        code: Any = 0
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def brightness(tmp_path, monkeypatch) -> str:
    """The judge of docs/extending.md, as a user saves it."""
    text = DOCUMENTED.read_text(encoding="utf-8").split("<!-- file brightness.py -->\n```python\n")[1].split("```")[0]
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "brightness.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "parts")
    monkeypatch.delitem(sys.modules, "brightness", raising=False)
    return "brightness:Brightness"


@pytest.fixture
def noise(tmp_path) -> Path:
    (tmp_path / "noise").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{i}.png")
    return tmp_path / "noise"


@pytest.mark.parametrize(("rule", "code"), [("brightness.mean>=0.4", 0), ("brightness.mean>=0.9", 3)])
def test_the_mean_of_another_packages_judge_can_be_required(command, brightness, noise, tmp_path, rule, code):
    what = ("--task", "images", "--images", noise, "--judge", brightness, "--output", tmp_path / "out", "--quiet")
    found, _, err = command("run", *what, "--require", rule)
    assert found == code, err
    assert ("is not met: brightness.mean is 0.49" in err) == (code == 3)


def test_the_mean_of_no_valid_image_meets_no_requirement(command, brightness, noise, tmp_path):
    for path in noise.iterdir():
        Image.new("RGB", (16, 16)).save(path)
    what = ("--task", "images", "--images", noise, "--judge", brightness, "--output", tmp_path / "out", "--quiet")
    code, _, err = command("run", *what, "--require", "brightness.mean>=0.01")
    assert code == 3 and "brightness.mean>=0.01 is not met: no image could be judged for brightness.mean" in err


def test_a_bound_in_percent_is_one_line_before_the_first_image(command, toy_pipeline_dir, brightness, tmp_path):
    (tmp_path / "prompts.txt").write_text("a church\n")
    what = ("--task", "prompts", "--prompts", tmp_path / "prompts.txt", "--judge", brightness)
    models = ("--model", toy_pipeline_dir, "--base", toy_pipeline_dir, "--output", tmp_path / "out", "--quiet")
    for rule in ("quality.whole>=95", "brightness.maen>=1"):
        code, _, err = command("run", *models, *what, "--steps", 2, "--require", rule)
        assert code == 2 and err.count("\n") == 1 and rule in err
        assert not (tmp_path / "out").exists()


def test_report_refuses_a_bound_in_percent(command, tmp_path):
    arm = make_arm(tmp_path / "arm", **BASE)
    code, _, err = command("report", arm, "--require", "mini.ua>=95")
    assert code == 2 and "write 0.95 for 95 %" in err
    assert not (arm / "results.json").exists()
