"""A step whose loss is not finite is named, and the weights of the step before are kept, wherever losses are read."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
from test_steady import RECIPE, train

from erase.errors import EraseError
from erase.methods.relabel import Relabel
from erase.training import losses


class Bad(Relabel):
    """One term of the loss of step `at` is infinite; a step asks for the loss once."""

    at, term, calls = 0, "forget", 0

    def loss(self, model: Any, frozen: Any, batch: Any) -> Any:
        type(self).calls += 1
        for name, value in super().loss(model, frozen, batch):
            yield name, value / 0 if (name, type(self).calls) == (self.term, self.at) else value


@pytest.fixture
def trained(toy_pipeline_dir, tmp_path, monkeypatch):
    """Trains and returns the UNet's weights on the CPU; on a GPU losses are read every four steps."""
    monkeypatch.setattr(losses, "READ_EVERY", 4)

    def run(where: str, name: str, method: Any, num_steps: int) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setattr(Bad, "calls", 0)
        with pretend_device.gpu(free=0) if where == "cuda" else nullcontext():
            recipe = replace(RECIPE, num_steps=num_steps, checkpoint_every=3)
            model = train(toy_pipeline_dir, method, tmp_path / name / "state", device=where, recipe=recipe)
            return {key: tensor.cpu() for key, tensor in model.unet.state_dict().items()}

    return run


@pytest.mark.parametrize(("where", "at", "term"), [("cuda", 6, "retain"), ("cuda", 3, "forget"), ("cpu", 6, "retain")])
def test_the_weights_before_a_bad_step_are_kept(trained, tmp_path, monkeypatch, where, at, term):
    """Step 6 is found at the checkpoint after it, two steps after losses were read; step 3 is the checkpoint's own.

    What is kept is what a run that never met the bad step has after as many steps: a second command that asks for no
    more gives exactly these weights.
    """
    monkeypatch.setattr(Bad, "at", at)
    monkeypatch.setattr(Bad, "term", term)
    with pytest.raises(EraseError, match=rf"not finite at step {at} of 7; the weights of step {at - 1} are kept in"):
        trained(where, "bad", Bad(), 7)
    kept, whole = trained(where, "bad", Relabel(), at - 1), trained(where, "whole", Relabel(), at - 1)
    assert all(torch.equal(kept[name], whole[name]) for name in whole)
    base = trained(where, "none", Relabel(), 0)
    assert any(not torch.equal(base[name], whole[name]) for name in whole), "control"


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_bad_first_step_changes_nothing_and_says_that_nothing_is_kept(trained, tmp_path, monkeypatch, where):
    monkeypatch.setattr(Bad, "at", 1)
    with pytest.raises(EraseError, match=r"not finite at step 1 of 5, so no weight was changed; lower") as error:
        trained(where, "bad", Bad(), 5)
    assert not Path(tmp_path / "bad" / "state").exists() and "kept" not in str(error.value)
