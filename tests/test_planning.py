"""What is settled before the first image: storage, steps and hyperparameters that do not fit are refused there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from erase import erase_concept, methods
from erase.errors import EraseError
from erase.options.settings import Settings
from erase.runs import job, planning
from erase.runs.identity import differences
from erase.runs.record import RunRecord, read

OLD = Path(__file__).parent / "old" / "run-0.1.0.json"
FEW: dict[str, Any] = dict(num_forget=2, num_retain=2, num_inference_steps=1, batch_size=1, num_samples=0, quiet=True)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"method": "erasediff", "weights": "bf16"}, "--weights bf16 does not go with erasediff"),
        ({"method": "scissorhands", "weights": "bf16"}, "--weights bf16 does not go with scissorhands"),
        ({"method": "scissorhands", "set": ("sparsity=1.5",)}, r"sparsity must lie in \[0, 1\]"),
        ({"method": "speed", "set": ("augment=-1",)}, "augment must be 0 or more"),
        ({"method": "speed", "set": ("centres=0",)}, "centres 1 or more"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_an_image(options, told, toy_pipeline_dir, tmp_path, cache_dir):
    with pytest.raises(EraseError, match=told):
        erase_concept("church", str(toy_pipeline_dir), output=str(tmp_path / "run"), **{**FEW, **options})
    assert not (tmp_path / "run").exists() and not list(cache_dir.rglob("*.safetensors"))


@pytest.mark.parametrize("steps, is_told", [(3, True), (4, False)])
def test_too_few_steps_for_every_loop_are_said(steps, is_told, toy_pipeline_dir, tmp_path, cache_dir):
    said: list[str] = []
    options = {key: value for key, value in FEW.items() if key != "quiet"}
    options |= {"method": "erasediff", "num_train_steps": steps, "model": str(toy_pipeline_dir)}
    job.run(Settings("church", output=str(tmp_path / "run"), **options), quiet=True, tell=said.append)
    told = "erasediff as published needs at least 4 steps; with 3 some of its loops are left out"
    assert (told in said) == is_told


@pytest.mark.parametrize("name", ["erasediff", "scissorhands", "sdd", "salun-soft"])
def test_low_memory_rounds_no_weights_that_a_method_changes_itself(name):
    assert planning.moves_weights(methods.load(name)())
    assert not planning.moves_weights(methods.load("salun")())  # control


def test_a_run_of_another_formula_is_another_run():
    """A method under the same name that computes something else since."""
    old = read(OLD)
    assert isinstance(old, RunRecord)
    now = {**old.identity, "formula": methods.load("erasediff").formula}
    assert methods.load("erasediff").formula > 1 == methods.load("salun").formula
    assert differences(old.identity, now, lambda name: None) == [
        "what the method computes, which another version changed"
    ]
    assert differences(old.identity, old.identity, lambda name: None) == []


def test_scissorhands_uses_the_anchor_only_where_it_relabels():
    method = methods.load("scissorhands")()
    assert not method.anchors and replace(method, forgetting="relabel").anchors
