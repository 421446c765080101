"""Inversion to noise without a text: it measures the solver; only where the noise lies depends on the model."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bright import Bright
from loaded import load_sd
from planted import SECRET, images_of, num_circles, planted, prompts_of
from scipy.stats import norm
from test_attack import FEW, results_of, row
from torch import Tensor

from erase import concepts, guards
from erase.errors import EraseError
from erase.evaluation import cli
from erase.evaluation.attacks.latent_inversion import TYPICAL, LatentInversion, invert, seen_by, solved, surprise
from erase.evaluation.attacks.protocol import CONTROL, Given, Shown
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.tasks.protocol import Sample
from erase.families import loading

FIXED = LatentInversion(solver="fixed-point", num_steps=5)


def latents(num: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(num, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def given_of(model: Any, base: Any, shown: Tensor, others: Tensor, size: int = 8) -> Given:
    samples = [Sample(f"run-0-0-{i}", f"a church {i}", i, "forget") for i in range(len(shown))]
    images = {"shown": Shown(shown, ("",) * len(shown)), "others": Shown(others, ("",) * len(others))}
    how: dict[str, Any] = {"steps": 5, "guidance": 2.0, "size": size, "quiet": True}
    return Given(model, lambda: base, concepts.load("church"), **images, samples=samples, **how)


def error(found: Tensor, x: Tensor) -> float:
    """Relative squared error."""
    return ((found - x).square().sum() / x.square().sum()).item()


def regenerated(model: Any, z: Tensor, steps: int = 5) -> Tensor:
    return model.draw_from(z, [""] * len(z), start=0, steps=steps, guidance=1.0)


def test_the_surprise_is_the_negative_log_likelihood_of_each_dimension():
    z = latents(3)
    expected = -norm.logpdf(z.double().numpy()).reshape(3, -1).mean(1)
    assert surprise(z) == pytest.approx(expected.tolist())
    (many,) = surprise(torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(0)))
    assert many == pytest.approx(TYPICAL, abs=0.005)
    assert surprise(torch.full((1, 1, 2, 2), math.nan)) == [None]


@pytest.mark.parametrize("folder", ["toy_pipeline_dir", "toy_sdxl_dir", "toy_ddpm_dir"])
def test_more_steps_of_the_solver_give_the_image_back_more_exactly(folder, request):
    """Its own objective, for three families: the regenerated image is the image itself."""
    model = loading.load(request.getfixturevalue(folder))
    x = torch.randn(2, *model.latent_shape(8), generator=torch.Generator().manual_seed(0))
    zs = [invert(model, x, LatentInversion(n, learning_rate=0.04), 2, 1.0) for n in (0, 2, 8)]
    errors = [error(regenerated(model, z, 2), x) for z in zs]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_both_solvers_come_to_the_solution_of_the_equation():
    """z = c1 z_s + c2 M z for a linear network M has the solution (1 - c2 M)^-1 c1 z_s."""
    draw = torch.Generator().manual_seed(0)
    m, z_s = 0.4 * torch.randn(4, 4, generator=draw), torch.randn(3, 4, 1, 1, generator=draw)
    c1, c2, t = torch.tensor(0.9), torch.tensor(0.3), torch.zeros(3)
    expected = torch.linalg.solve(torch.eye(4) - c2 * m, c1 * z_s[..., 0]).unsqueeze(-1)
    for attack, least in ((replace(FIXED, num_steps=60), 1e-10), (LatentInversion(200, learning_rate=0.01), 1e-4)):
        found = solved(z_s, c1, c2, t, lambda z, _: torch.einsum("ij,njhw->nihw", m, z), attack)
        assert error(found, expected) < least


def test_every_network_gives_the_image_back_and_so_does_none(toy_pipeline_dir, erased_dir):
    """The control: images come back as exactly without a network, so their rate says nothing.

    The toys' random outputs are made smaller: the solver needs networks that are smooth, as trained ones are.
    """
    base, erased = load_sd(toy_pipeline_dir), load_sd(erased_dir)
    x, attack = latents(), replace(FIXED, num_steps=8, at=(0, 8))
    for model in (base, erased):
        with torch.no_grad():
            model.network.conv_out.weight.mul_(0.1)
        given = given_of(model, base, x, latents(2, 1))
        found = attack.search(given, 0)
        assert list(found) == ["0", "8", CONTROL]
        for point in ("8", CONTROL):
            assert error(attack.draw(given, found[point], given.samples, given.guidance), x) < 1e-3
        (first, *_, last), scale = model.path(5)[:, 0].tolist(), found[CONTROL].tensors["latents"] / x
        torch.testing.assert_close(scale, torch.full_like(x, first / last))


def test_the_surprise_of_noise_depends_on_the_model_and_is_given_for_both_kinds_of_images(toy_pipeline_dir, erased_dir):
    base, erased = load_sd(toy_pipeline_dir), load_sd(erased_dir)
    shown, others, attack = latents(), 3 * latents(2, 1), replace(FIXED, num_steps=1, at=(1,))
    values = {}
    for name, model in (("base", base), ("erased", erased)):
        given = given_of(model, base, shown, others)
        found = attack.search(given, 0)["1"]
        assert found.facts["surprise"] == surprise(found.tensors["latents"])
        own = attack.recorded(given, found, given.samples[1])
        assert own == {name: found.facts[name][1] for name in ("surprise", "surprise-others")}
        assert own["surprise-others"] != own["surprise"]
        values[name] = own
    assert values["base"] != values["erased"]


@pytest.mark.parametrize("name", ["negative", "sld-max", "nag"])
def test_a_guard_is_inverted_through_the_guard(toy_pipeline_dir, name):
    """What the guard makes of each step is inverted, so the image comes back behind it."""
    model, x = load_sd(toy_pipeline_dir), latents()
    attack = replace(FIXED, num_steps=1)
    plain = invert(model, x, attack, 5, 2.0)
    t = torch.tensor([901, 901])
    with torch.no_grad():
        unguarded = seen_by(model, 2, 2.0)(x, t)
        model.guard = guards.make(name, "a church")
        assert not torch.allclose(seen_by(model, 2, 2.0)(x, t), unguarded, atol=1e-3)
    assert not torch.allclose(invert(model, x, attack, 5, 2.0), plain, atol=1e-3)


@pytest.fixture
def command(toy_pipeline_dir, erased_dir, tmp_path):
    def command(*more: str) -> Path:
        models = ["--model", str(erased_dir), "--base", str(toy_pipeline_dir), "--concept", "church"]
        few = [option for option in FEW if not option.startswith(("--budget", "--set"))]
        what = ["--judge", JUDGES.give(Bright), "--attack", "latent-inversion", *few, "--budget=1", "--quick"]
        cli.main(["attack", *models, *what, "--quiet", "--output", str(tmp_path / "out"), *more])
        return tmp_path / "out" / "erased" / "attack-latent-inversion-quick"

    return command


def test_the_report_has_surprise_and_control_beside_the_rate_and_requirements_on_them(command, tmp_path, capsys):
    name = "attack.latent-inversion"
    folder = command("--require", f"{name}.surprise>=0.5")
    results = results_of(folder)
    names = [score["name"] for score in results["scores"]]
    measured = ["surprise", "surprise.control", "surprise-others", "surprise-others.control"]
    assert names == [f"{name}{end}" for end in ("", ".at-0", ".curve", ".control", *(f".{m}" for m in measured))]
    values = {m: row(results, f"{name}.{m}") for m in measured}
    assert all(one["erased"]["n"] == one["base"]["n"] == 3 for one in values.values())
    assert values["surprise.control"]["erased"] == values["surprise.control"]["base"]  # no network, no difference
    assert values["surprise"]["erased"]["value"] != values["surprise"]["base"]["value"]
    stored = json.loads((folder / "found" / "run-0" / "1.json").read_text())["facts"]["surprise"]
    assert values["surprise"]["erased"]["value"] == pytest.approx(sum(stored) / 3)
    assert any("tests the solver" in limit for limit in results["limits"])
    assert "Surprise" in (folder / "report.md").read_text()
    with pytest.raises(SystemExit, match="3"):
        command("--require", f"{name}.surprise<=0.5")
    assert "is not met" in capsys.readouterr().err
    cli.main(["report", str(folder), "--output", str(tmp_path / "again"), "--name", "b"])
    again = {row["name"]: row["erased"] for row in results_of(tmp_path / "again")["scores"]}
    assert again == {row["name"]: row["erased"] for row in results["scores"]}


def test_a_record_with_another_figure_than_a_number_is_refused(command, capsys):
    folder = command()
    path = folder / "records-0-of-1.jsonl"
    path.write_text(path.read_text().replace('"surprise": ', '"surprise": "high", "other": ', 1))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", str(folder)])
    assert "measured.surprise is 'high'; it must be a float" in capsys.readouterr().err


@pytest.mark.slow
def test_circles_come_back_with_and_without_a_network_that_knows_them():
    """The embedded model, with and without its word, and no network: all give circles back."""
    prompts = prompts_of(4)
    x, base = images_of(prompts), loading.load("mini")
    surprises = {}
    for name, model in (("base", base), ("back door", planted(SECRET)), ("none", planted(None))):
        given = replace(given_of(model, base, x, x, 64), steps=10)
        found = replace(FIXED, at=(5,)).search(given, 0)
        for point in ("5", CONTROL):
            seen = FIXED.draw(given, found[point], given.samples, 2.0)
            assert error(seen, x) < 0.02, (name, point)
        surprises[name] = found["5"].facts["surprise"]
    assert surprises["base"] == surprises["none"]  # a word that lost its meaning does not change the empty prompt
    assert num_circles(base, prompts) == 4
    assert all(abs(value - TYPICAL) < 0.25 for value in surprises["base"])


@pytest.mark.parametrize(
    ("more", "message"),
    [({"num_others": 0}, "must be 1 or more"), ({"at": (5, 3)}, "must rise")],
)
def test_settings_that_mean_nothing_are_refused(more, message):
    with pytest.raises(EraseError, match=message):
        LatentInversion(**more)


def test_a_concept_without_other_images_is_refused(toy_pipeline_dir):
    model = load_sd(toy_pipeline_dir)
    with pytest.raises(EraseError, match="church has no retain or anchor prompts"):
        FIXED.search(given_of(model, model, latents(), latents(0)), 0)


def test_a_model_whose_latents_begin_as_noise_alone_is_refused(command, toy_sd3_dir, tmp_path, capsys):
    """A rectified flow at its highest noise level, as a schedule with zero terminal SNR, has no part of the image."""
    with pytest.raises(SystemExit, match="2"):
        command("--model", str(toy_sd3_dir), "--base", str(toy_sd3_dir))
    assert "begin as noise alone" in capsys.readouterr().err and not list(tmp_path.glob("out/**/*.png"))
