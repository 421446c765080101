"""A training of a classifier that is interrupted continues from its last state and ends with the same bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_classification import RECIPE, toy_images, toy_model

from erase import delta
from erase.classification import descent
from erase.classification.checkpoint import Checkpoint
from erase.classification.descent import descend
from erase.classification.methods import Plan
from erase.errors import EraseError

LONG = replace(RECIPE, epochs=5, batch_norm="moving", schedule="cosine")


def trained(path: Path | None, *, stop: int | None = None, identity: str = "one") -> str:
    """Hash of a model after training; `stop`: the epoch in which the training is interrupted."""
    model, images, epochs = toy_model(), toy_images(), 0

    def passes():
        nonlocal epochs
        if stop == epochs:
            raise KeyboardInterrupt
        epochs += 1
        return [images]

    keep = path and Checkpoint(path, identity, seconds=0)
    descend(model, Plan(passes=passes), LONG, torch.Generator().manual_seed(0), checkpoint=keep)
    return f"{epochs} {delta.content_hash(model.state_dict())}"


def test_interrupted_and_continued_equals_uninterrupted(tmp_path):
    """Weights, statistics, momentum and random numbers; the second run trains for the two epochs that are left."""
    path = tmp_path / "state.safetensors"
    whole = trained(None).split()
    with pytest.raises(KeyboardInterrupt):
        trained(path, stop=3)
    assert path.is_file()
    assert trained(path).split() == ["2", whole[1]] and whole[0] == "5"
    assert not path.exists()


def test_a_state_of_another_training_or_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(path, stop=3)
    with pytest.raises(EraseError, match="belongs to another training; delete it, and this training starts again"):
        trained(path, identity="other")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(EraseError, match="is damaged.*delete it, and this training starts again"):
        trained(path)


def test_short_trainings_write_no_state(tmp_path, monkeypatch):
    """The least time between two writes is a minute by default."""
    written: list[int] = []
    monkeypatch.setattr(descent.Checkpoint, "keep", lambda self, *_, **how: written.append(how["last"]))
    trained(tmp_path / "state.safetensors")
    assert written == [False] * 4 + [True]
    monkeypatch.undo()
    keep = Checkpoint(tmp_path / "state.safetensors", "one")
    keep.keep(toy_model(), torch.optim.SGD(toy_model().parameters(), 0.1), torch.Generator(), 1)
    assert not keep.path.exists()
