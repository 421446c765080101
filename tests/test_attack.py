"""`eval-concept attack`: base, erased and retrained model are attacked alike, and a judge outside decides."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bright import Bright
from loaded import load_sd

from erase import concepts, files, guards
from erase.errors import EraseError
from erase.evaluation import attacked, cli, generate
from erase.evaluation.attacking import presets_of
from erase.evaluation.attacks import learnt_word
from erase.evaluation.attacks.guarded import predict
from erase.evaluation.attacks.learnt_word import LearntWord
from erase.evaluation.attacks.protocol import Finding
from erase.evaluation.attacks.registry import make
from erase.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.report.compare import compare
from erase.evaluation.tasks.attack import Attacked
from erase.families import loading

FEW = ["--attack-seeds=2", "--num-images=3", "--budget=4", "--set=batch_size=2", "--set=num_shown=2", "--steps=2"]


@pytest.fixture
def attack(toy_pipeline_dir, erased_dir, tmp_path):
    """Runs the command on toy models and returns the folder of its report."""

    def attack(*more: str, name: str = "learnt-word", output: Path = tmp_path / "out") -> Path:
        models = ["--model", str(erased_dir), "--base", str(toy_pipeline_dir)]
        what = ["--concept", "church", "--judge", JUDGES.give(Bright), "--attack", name]
        cli.main(["attack", *models, *what, *FEW, "--output", str(output), "--quiet", *more])
        return output / "erased" / f"attack-{name}"

    return attack


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def row(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["scores"] if row["name"] == name)


def content_of(folder: Path) -> dict[str, str]:
    found = {str(path.relative_to(folder)): files.file_hash(path) for path in folder.rglob("*") if path.is_file()}
    return {name: text for name, text in found.items() if not name.startswith((".", "report", "results"))}


def test_base_erased_and_retrained_are_attacked_alike_with_a_curve_and_a_control(attack, toy_pipeline_dir):
    folder = attack("--retrained", str(toy_pipeline_dir))
    results = results_of(folder)
    names = [score["name"] for score in results["scores"]]
    points = ["at-0", "at-1", "at-2", "curve", "control"]
    assert names == ["attack.learnt-word", *(f"attack.learnt-word.{point}" for point in points)]
    first = row(results, "attack.learnt-word")
    for role in ("base", "erased", "gold"):
        assert first[role]["n"] == 6 and first[role]["k"] is not None  # two runs of three images
    assert first["gold"] == first["base"]  # the same weights
    assert "over 2 runs" in first["erased"]["interval"] and first["comparison"]["n"] == 6
    (curve,) = results["groups"]
    assert [one["label"] for one in curve["rows"]] == ["0 steps", "1 steps", "2 steps", "4 steps"]
    assert results["primary"] == "attack.learnt-word" and results["verdict"] is None
    assert "retrained" in (folder / "report.md").read_text()
    assert not any("no attack" in limit for limit in results["limits"])


def test_found_words_stay_in_the_run_folder_and_differ_by_run_and_point(attack):
    folder = attack() / "found"
    words = {
        (run, point): attacked.read_finding(folder / f"run-{run}" / f"{point}.json").tensors["word"]
        for run in (0, 1)
        for point in ("0", "1", "2", "4", "control")
    }
    assert all(word.shape == (8,) for word in words.values())
    assert torch.equal(words[0, "0"], words[1, "0"])  # both begin at the mean of all tokens
    different = [word for key, word in words.items() if key != (1, "0")]
    assert len({tuple(word.tolist()) for word in different}) == len(different)


def test_an_interrupted_attack_continues_to_the_same_bytes(attack, tmp_path, monkeypatch):
    whole = attack(output=tmp_path / "whole")
    stored, calls = generate.stored, []

    def dies(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 14:  # of the erased model, in its first run
            raise KeyboardInterrupt
        return stored(*arguments, **more)

    monkeypatch.setattr(generate, "stored", dies)
    with pytest.raises(SystemExit, match="130"):
        attack(output=tmp_path / "killed")
    assert not (tmp_path / "killed" / "erased" / "attack-learnt-word" / "results.json").exists()
    monkeypatch.setattr(generate, "stored", stored)
    searched: list[int] = []
    search = LearntWord.search
    monkeypatch.setattr(
        LearntWord, "search", lambda self, given, run: (searched.append(run), search(self, given, run))[1]
    )
    again = attack(output=tmp_path / "killed")
    assert searched == [1]  # what the erased model's first run and the base's runs found is there
    assert content_of(again) == content_of(whole)
    searched.clear()
    attack(output=tmp_path / "killed")
    assert not searched


def test_a_finding_that_was_changed_is_refused(attack):
    folder = attack()
    path = folder / "found" / "run-0" / "4.json"
    path.write_text(path.read_text().replace('"facts": {}', '"facts": {"k": 1}'))
    next((folder / "images").iterdir()).unlink()
    with pytest.raises(SystemExit, match="2"):
        attack()
    with pytest.raises(EraseError, match="was changed since it was written; delete the folder found"):
        attacked.read_finding(path)


def test_a_stored_finding_is_read_back_exactly(tmp_path):
    finding = Finding({"a": torch.randn(3), "b": torch.arange(2)}, {"x": "text"}, {"seconds": 1.5})
    attacked.write_finding(tmp_path / "one.json", finding)
    again = attacked.read_finding(tmp_path / "one.json")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in finding.tensors.items())
    assert (again.texts, again.facts) == (finding.texts, finding.facts)
    attacked.write_finding(tmp_path / "one.json", replace(finding, tensors={"a": torch.zeros(3)}), keeps_tensors=False)
    assert not attacked.read_finding(tmp_path / "one.json").tensors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "learned-word"], "unknown attack 'learned-word'; did you mean learnt-word"),
        (["--set", "steps=3"], "--set is 'steps=3'; the attack learnt-word has templates"),
        (["--set", "num_steps=many"], "--set is 'num_steps=many'; it must be a whole number"),
        (["--set", "donor=nobody"], "choose model, base"),
        (["--set", "templates=a photo of a {} girl"], "targets that involve minors"),
        (["--budget", "5", "3"], "--budget is 5 3; the numbers must rise"),
        (["--judge", "thumbnails"], "the judge thumbnails cannot tell whether an image shows"),
        (["--prompts", "list.txt"], "--prompts goes with the attack prompts"),
        (["--concept", "nobody knows"], "nobody knows"),
        (["--require", "attack.word<=0.1"], "there is no score 'attack.word'"),
        (["--attack-seeds", "0"], "--attack-seeds is 0"),
        (["--retrained", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(attack, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        attack(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["unlearn-diff-atk", "p4d", "ring-a-bell"])
def test_more_words_than_the_text_encoder_reads_are_refused(toy_pipeline_dir, name):
    model = load_sd(toy_pipeline_dir)
    make(name, [], ["num_tokens=75"]).require_possible(model, 10)
    with pytest.raises(EraseError, match="num_tokens is 76, but .* reads 75 tokens of a prompt"):
        make(name, [], ["num_tokens=76"]).require_possible(model, 10)


def test_an_attack_needs_a_concept_and_a_base(toy_pipeline_dir, tmp_path, capsys):
    for more, message in ((["--base", str(toy_pipeline_dir)], "give --concept NAME"), ([], "give --concept")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["attack", "--model", str(toy_pipeline_dir), "--attack", "learnt-word", *more])
        assert message in capsys.readouterr().err


def test_a_requirement_on_the_attack_is_an_exit_code(attack, capsys):
    attack("--require", "attack.learnt-word<=0.99")
    with pytest.raises(SystemExit, match="3"):
        attack("--require", "attack.learnt-word>0.99", "--require", "attack.learnt-word.at-2<=0.99")
    assert "attack.learnt-word>0.99 is not met" in capsys.readouterr().err


def test_a_quick_look_says_so_and_is_another_protocol(attack, capsys):
    """In a folder of its own, so that the same command without --quick runs after it."""
    attack("--quick")
    whole = attack()
    quick = whole.with_name(f"{whole.name}-quick")
    assert "(quick)" in capsys.readouterr().out
    assert results_of(quick)["name"].endswith("(quick)")
    assert results_of(quick)["limits"][0].startswith("A quick look")
    with pytest.raises(EraseError, match="task.options.quick"):
        compare([results_of_report(whole), results_of_report(quick)])


def results_of_report(folder: Path) -> dict[str, Any]:
    from erase.evaluation.report import pool

    return pool.read(folder)[0]


def test_a_limit_is_fewer_images_and_named(attack):
    results = results_of(attack("--limit", "2"))
    assert row(results, "attack.learnt-word")["erased"]["n"] == 4
    assert any("--limit" in limit for limit in results["limits"])


def test_report_makes_the_same_figures_again_and_compare_takes_them(attack, tmp_path, capsys):
    folder = attack()
    (base,) = (tmp_path / "out" / "shared").glob("*-attack-learnt-word-*/manifest.json")
    cli.main(["report", str(folder), "--base", str(base.parent), "--output", str(tmp_path / "again"), "--name", "b"])
    one, other = results_of(folder), results_of(tmp_path / "again")
    assert one["scores"] == other["scores"] and one["groups"] == other["groups"]
    shutil.copy(folder / "outcomes.json", tmp_path / "again")
    cli.main(["compare", f"a={folder}", f"b={tmp_path / 'again'}", "--output", str(tmp_path / "compared")])
    assert "attack.learnt-word" in capsys.readouterr().out


def test_an_invalid_image_counts_as_one_that_shows_the_concept():
    """Else a model that generates nothing would hold against every attack."""
    options = {"attack": "learnt-word", "points": ["0", "4"], "control": "", "unit": "steps", "attack_seeds": 1}
    options |= {"controls": []}
    options |= {"judge": "mini", "concept": "circle", "head": "object", "label": "circle", "quick": False}
    task = Attacked("attack")
    made = task.samples_of(options, ["a", "b"], ("mini",))
    plan = task.plan(made.samples, {"mini": [{"invalid": "black"}] * 4}, options)
    assert {column.name: list(column.values) for column in plan.columns} == {
        "attack.learnt-word": [None, None, True, True],
        "attack.learnt-word.at-0": [True, True, None, None],
        "attack.learnt-word.curve": [True] * 4,
    }
    assert not any(column.higher_is_better for column in plan.columns)


def test_images_of_all_runs_and_points_are_pairs():
    """The same prompt has the same image seed at every point of every run."""
    options = {"attack": "learnt-word", "points": ["0", "4"], "control": "random", "unit": "steps", "attack_seeds": 3}
    options |= {"controls": ["control"], "concept": "circle"}
    made = Attacked("attack").samples_of(options, ["a", "b"], ("mini",))
    assert len(made.samples) == 3 * 3 * 2 and len({sample.seed for sample in made.samples}) == 2
    assert {sample.run for sample in made.samples} == {"0", "1", "2"}


def test_the_points_of_one_search_are_the_words_of_shorter_searches(toy_pipeline_dir):
    """So a curve costs one search: the word after 3 of 8 steps is the word of an attack with 3 steps."""
    model, x = load_sd(toy_pipeline_dir), torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    short, long = LearntWord(num_steps=3), LearntWord(num_steps=8)
    found = learnt_word.learn_at(model, x, long, [0, 3, 8], quiet=True)
    assert torch.equal(found[3], learnt_word.learn(model, x, short, quiet=True))
    assert not torch.equal(found[3], found[8]) and torch.equal(found[0], model.token_embeddings.mean(0))


@pytest.mark.parametrize("name", ["negative", "sld-max"])
def test_the_guarded_prediction_is_what_guidance_makes_of_the_guard(toy_pipeline_dir, name):
    """eps(0) + s (e - eps(0)) equals the guard's own formula, so that a word is learned through the guard."""
    model = load_sd(toy_pipeline_dir)
    x, t, s = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700]), 7.5
    c, c_s, empty = (model.encode_text([text]).expand(2) for text in ("a cat", "a church", ""))
    with torch.no_grad():
        eps, eps_s, eps_0 = (model(x, t, text) for text in (c, c_s, empty))
        assert torch.equal(predict(model, x, t, c), eps)
        model.guard = guards.make(name, "a church")
        found = eps_0 + s * (predict(model, x, t, c) - eps_0)
    if isinstance(model.guard, guards.SLD):
        gamma, _ = model.guard.away(eps_0, eps, eps_s, torch.zeros(()))
        expected = eps_0 + s * (eps - eps_0 - gamma)
    else:
        expected = eps_s + s * (eps - eps_s)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, eps_0 + s * (eps - eps_0), atol=1e-3)


def test_a_guard_is_attacked_through_the_guard(toy_pipeline_dir, tmp_path):
    """The word is another one than without the guard, and images are generated behind it."""
    what = ["--concept", "church", "--judge", JUDGES.give(Bright), "--attack", "learnt-word", *FEW, "--quiet"]
    cli.main(["attack", "--model", str(toy_pipeline_dir), "--guard", "negative", *what, "--output", str(tmp_path)])
    (base,) = (path.parent for path in (tmp_path / "shared").glob("*-attack-learnt-word-*/manifest.json"))
    folder = tmp_path / "base-negative" / "attack-learnt-word"
    words = [attacked.read_finding(one / "found" / "run-0" / "4.json").tensors["word"] for one in (base, folder)]
    assert not torch.equal(*words)
    arms = [sorted((one / "images").iterdir()) for one in (base, folder)]
    assert [p.read_bytes() for p in arms[0]] != [p.read_bytes() for p in arms[1]]


def test_settings_come_from_class_preset_and_user_in_this_order():
    assert make("learnt-word") == LearntWord()
    mini, quick = make("learnt-word", ["mini"]), make("learnt-word", ["mini", "quick"])
    assert isinstance(mini, LearntWord) and isinstance(quick, LearntWord)
    assert mini.num_steps == 300 and quick.num_steps < 60 and quick.asked == mini.asked
    given = make("learnt-word", ["sd"], ["num-steps=7", "templates=a {}|one {}", "donor=base"])
    assert isinstance(given, LearntWord)
    assert (given.num_steps, given.templates, given.donor, given.batch_size) == (7, ("a {}", "one {}"), "base", 16)


def test_published_settings_depend_on_the_kind_of_concept(toy_pipeline_dir):
    """UnlearnDiffAtk's authors search 5 words for nudity, 3 for objects and styles."""
    model, mini = load_sd(toy_pipeline_dir), loading.load("mini")
    for name, num in (("nudity", 5), ("church", 3), ("van_gogh", 3)):
        found = make("unlearn-diff-atk", presets_of(model, concepts.load(name)))
        assert isinstance(found, UnlearnDiffAtk)
        assert (found.num_tokens, found.num_steps, found.steps_each) == (num, 2000, 40)
    circle = concepts.load("circle", model_family="mini")
    assert make("unlearn-diff-atk", presets_of(mini, circle)) == make("unlearn-diff-atk", ["mini"])
    assert presets_of(mini, circle, quick=True)[-1] == "quick"


def test_a_transferred_word_is_learned_on_the_base(attack, toy_pipeline_dir):
    """Both models then get the same word."""
    folder = attack("--set", "donor=base")
    (base,) = (path.parent for path in (folder.parent.parent / "shared").glob("*-attack-*/manifest.json"))
    words = [attacked.read_finding(one / "found" / "run-1" / "4.json").tensors["word"] for one in (base, folder)]
    assert torch.equal(*words)
