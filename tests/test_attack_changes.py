"""Attacks that search for nothing: own prompts, fresh noise, completion, merged and rounded weights."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded import load_sd
from test_attack import FEW, Bright, results_of, row

from erase import concepts
from erase.errors import EraseError
from erase.evaluation import cli
from erase.evaluation.attacks.changed import changed, weights_of
from erase.evaluation.attacks.completion import Completion
from erase.evaluation.attacks.merge import Merge
from erase.evaluation.attacks.noise import Noise
from erase.evaluation.attacks.prompts import Prompts
from erase.evaluation.attacks.protocol import CONTROL, Given, Shown
from erase.evaluation.attacks.round import Round, rounded
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.tasks.protocol import Sample
from erase.families import loading


@pytest.fixture
def given(toy_pipeline_dir, erased_dir) -> Given:
    """The toy's erased copy with eight images of the concept, other ones, and two samples."""
    concept, noise = concepts.load("church"), torch.Generator().manual_seed(0)

    def images(prompts: Any, mean: float) -> Shown:
        return Shown(mean + torch.randn(8, 4, 4, 4, generator=noise), tuple(islice(cycle(prompts), 8)))

    samples = [Sample(f"run-0-30-{i}", prompt, 10 + i, "forget") for i, prompt in enumerate(concept.forget[:2])]
    return Given(
        model=load_sd(erased_dir),
        open_base=lambda: load_sd(toy_pipeline_dir),
        concept=concept,
        shown=images(concept.forget, 5.0),
        others=images(concept.retain, -5.0),
        samples=samples,
        steps=10,
        guidance=2.0,
        size=8,
        quiet=True,
    )


def drawn(attack: Any, given: Given, point: str, seed: int = 0) -> torch.Tensor:
    finding = attack.search(given, seed)[point]
    with attack.attacked(given, finding):
        return attack.draw(given, finding, given.samples, given.guidance)


def test_changed_weights_are_put_back_bit_by_bit(given):
    network = given.model.network
    before = {name: weight.clone() for name, weight in weights_of(network).items()}
    with pytest.raises(KeyboardInterrupt), changed(network, {name: w + 1 for name, w in before.items()}):
        assert all((weight != before[name]).all() for name, weight in weights_of(network).items())
        raise KeyboardInterrupt
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(network).items())


def test_a_merge_is_the_average_and_its_control_moves_as_far(given):
    attack, model, base = Merge((25, 100)), given.model, weights_of(given.open_base().network)
    erased = {name: weight.clone() for name, weight in weights_of(model.network).items()}
    found = attack.search(given, 0)
    with attack.attacked(given, found["25"]):
        for name, weight in weights_of(model.network).items():
            torch.testing.assert_close(weight, 0.75 * erased[name] + 0.25 * base[name])
    with attack.attacked(given, found[CONTROL]):
        for name, weight in weights_of(model.network).items():
            torch.testing.assert_close((weight - erased[name]).abs(), (base[name] - erased[name]).abs())
    texts, seeds = [s.prompt for s in given.samples], [s.seed for s in given.samples]
    ours = given.open_base().draw(texts, seeds, steps=10, guidance=2.0, size=8)
    torch.testing.assert_close(drawn(attack, given, "100"), ours, atol=1e-4, rtol=1e-3)  # another sum of the weights
    assert not torch.allclose(drawn(attack, given, CONTROL), ours, atol=1e-2)


def test_rounded_weights_are_values_of_the_format(given):
    weight = given.model.network.conv_in.weight.detach()
    for kind, levels in (("int8", 255), ("int4", 15)):
        assert max(len(line.unique()) for line in rounded(weight.flatten(1), kind)) <= levels
    for kind in ("fp16", "bf16", "fp8", "int8", "int4"):
        once = rounded(weight, kind)
        torch.testing.assert_close(rounded(once, kind), once, atol=1e-6, rtol=0)  # a grid that is found again
        assert not torch.equal(once, weight) and (once - weight).abs().max() <= weight.abs().max() / 7
    assert torch.equal(rounded(torch.zeros(2, 3), "int8"), torch.zeros(2, 3))


def test_rounding_undoes_an_erasure_that_is_smaller_than_its_steps_and_no_other(given):
    """A planted erasure: every weight of the base moved by a hundredth of a step of int8, or the erased copy's."""
    base, attack = given.open_base(), Round(("fp16", "int8"))
    grid = {n: rounded(w, "int8") for n, w in weights_of(base.network).items() if w.dim() > 1}
    small, large = given.open_base(), given.model
    with changed(base.network, grid), changed(small.network, {n: w * 1.00001 for n, w in grid.items()}):
        for model, undone in ((small, True), (large, False)):
            with attack.attacked(replace(given, model=model), attack.search(given, 0)["int8"]):
                pairs = ((weights_of(base.network)[n], w) for n, w in weights_of(model.network).items() if n in grid)
                assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in pairs) is undone


def test_less_noise_leaves_more_of_the_image_and_the_control_starts_from_other_images(given):
    attack = Noise((1, 50, 90))
    means = [drawn(attack, given, point).mean() for point in attack.points]
    far = [(drawn(attack, given, point) - given.shown.latents[:2]).abs().mean() for point in attack.points]
    assert far == sorted(far) and means[0] > 1
    little = Noise((10,))
    assert drawn(little, given, CONTROL).mean() < -1 < drawn(little, given, "10").mean()


def test_noise_is_fresh_for_every_attack_seed_and_sample_and_the_same_for_the_same(given):
    attack = Noise((70,))
    one, again, other = (drawn(attack, given, "70", seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    same = replace(given, shown=Shown(given.shown.latents[:1].expand(8, -1, -1, -1), given.shown.prompts))
    first, second = drawn(attack, same, "70")
    assert not torch.equal(first, second)


def test_completion_is_the_bases_image_when_the_base_completes_and_begins_with_its_steps(given):
    """Whatever the base did first, the base's completion is its whole trajectory; the erased model's is not."""
    attack, base = Completion((0, 50)), replace(given, model=given.open_base())
    torch.testing.assert_close(drawn(attack, base, "0"), drawn(attack, base, "50"))
    assert not torch.allclose(drawn(attack, given, "0"), drawn(attack, given, "50"))
    assert not torch.allclose(drawn(attack, base, "50"), drawn(attack, base, CONTROL))
    near = (drawn(attack, given, point) - drawn(attack, base, "0") for point in attack.points)
    alone, after = (distance.abs().mean() for distance in near)
    assert after < alone


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Noise((50, 30)), r"percents is 50\|30; the numbers must rise from 1"),
        (lambda: Noise((0,)), "must rise from 1"),
        (lambda: Noise(num_others=0), "must be 1 or more"),
        (lambda: Completion((10, 95)), r"percents is 10\|95; the numbers must rise up to 90"),
        (lambda: Merge((50, 101)), r"percents is 50\|101; the numbers must rise up to 100"),
        (lambda: Round(("int3",)), "kinds is int3; choose from fp16, bf16, fp8, int8, int4, each once"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], Any], message: str):
    with pytest.raises(EraseError, match=message):
        make()


def test_a_long_list_of_prompts_is_looked_at_evenly_and_a_short_one_in_turn():
    many, church = [str(i) for i in range(10)], concepts.load("church")
    assert Prompts().asks(church, many, 5) == ["0", "2", "4", "6", "8"]
    assert Prompts().asks(church, many[:2], 5) == ["0", "1", "0", "1", "0"]


@pytest.fixture
def command(toy_pipeline_dir, erased_dir, tmp_path) -> Callable[..., Path]:
    def command(name: str, *more: str, model: Path = erased_dir) -> Path:
        models = ["--model", str(model), "--base", str(toy_pipeline_dir), "--concept", "church"]
        few = [option for option in FEW if not option.startswith(("--budget", "--set"))]
        what = ["--judge", JUDGES.give(Bright), "--attack", name, *few, "--quiet", "--output", str(tmp_path / "out")]
        cli.main(["attack", *models, *what, *more])
        return tmp_path / "out" / model.name / f"attack-{name}"

    return command


@pytest.mark.parametrize("name", ["merge", "round", "noise", "completion"])
def test_the_command_runs_each_on_base_and_erased_model(command, name):
    scores = results_of(command(name, "--steps", "10"))["scores"]
    assert scores[0]["name"] == f"attack.{name}" and scores[0]["erased"]["n"] == scores[0]["base"]["n"]


def test_the_users_prompts_are_transferred_and_what_shows_minors_is_refused(command, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("a stone spire\nan old chapel\n")
    folder = command("prompts", "--prompts", str(path))
    score = row(results_of(folder), "attack.prompts")
    assert "transferred" in score["about"] and score["erased"]["n"] == 3
    path.write_text("a girl on a spire\n")
    with pytest.raises(SystemExit, match="2"):
        command("prompts", "--prompts", str(path))
    assert "targets that involve minors" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command("prompts")
    assert "needs your own list: --prompts FILE" in capsys.readouterr().err


def test_a_model_that_was_never_erased_loses_nothing_by_a_merge(command, toy_pipeline_dir, tmp_path):
    same = shutil.copytree(toy_pipeline_dir, tmp_path / "same")
    score = row(results_of(command("merge", model=same)), "attack.merge")
    assert score["erased"]["k"] == score["base"]["k"] and loading.load(str(same)).family == "sd"
