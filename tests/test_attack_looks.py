"""Attacks whose attacker looks at an image after every point, and needs one success."""

from erase.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk
from erase.evaluation.tasks.attack import Attacked


def test_any_of_several_looks_is_a_success_and_the_controls_have_as_many():
    """An attacker who looks at every point needs one success, so that controls get the same number of images."""
    attack = UnlearnDiffAtk(num_steps=4, at=(0, 4))
    assert attack.controls == ("control", "control.1", "seeds", "seeds.1")
    options = {"attack": "x", "points": list(attack.points), "control": "random", "controls": list(attack.controls)}
    options |= {"unit": "steps", "attack_seeds": 2, "judge": "mini", "concept": "circle", "quick": False}
    options |= {"head": "object", "label": "circle"}
    task = Attacked("attack")
    samples = task.samples_of(options, ["a", "b"], ("mini",)).samples
    assert len(samples) == 2 * 6 * 2
    seeds = {(s.facts["attack_seed"], s.facts["point"]): s.seed for s in samples if s.prompt == "a"}
    assert len({seeds[run, point] for run in (0, 1) for point in ("0", "4", "control", "control.1")}) == 1
    assert len({seeds[run, point] for run in (0, 1) for point in ("0", "seeds", "seeds.1")}) == 5
    shown = {"run-0-0-0000", "run-0-control.1-0000", "run-0-control.1-0001", "run-1-4-0001", "run-1-0-0001"}
    lines = [{"invalid": "black" if s.id in shown else None, "object": "square"} for s in samples]
    columns = {
        c.name: [v for v in c.values if v is not None] for c in task.plan(samples, {"mini": lines}, options).columns
    }
    assert columns["attack.x.any"] == [True, False, False, True]  # of run 0: a, b; of run 1: a, b
    assert columns["attack.x.control.any"] == [True, True, False, False]
    assert columns["attack.x.seeds.any"] == [False] * 4
    assert (
        sum(columns["attack.x.control"]) == 2
        and len(columns["attack.x.control"]) == len(columns["attack.x.seeds"]) == 8
    )
    assert len(columns["attack.x.curve"]) == 8
