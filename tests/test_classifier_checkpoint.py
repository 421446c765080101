"""A training of a classifier that is interrupted continues from its last state and ends with the same bits."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_classification import RECIPE, toy_dataset, toy_images, toy_model

from erase import delta
from erase.classification import data, descent, run
from erase.classification.checkpoint import Checkpoint
from erase.classification.descent import descend
from erase.classification.methods import Plan
from erase.classification.settings import Settings
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


def test_an_interrupted_command_trains_the_epochs_that_are_left(monkeypatch, tmp_path):
    """`unlearn-classifier train`, killed in its third epoch: the same command ends with the same model."""
    monkeypatch.setattr(data, "load", lambda name, cache_dir, **_: toy_dataset())
    monkeypatch.setattr(run, "Checkpoint", partial(Checkpoint, seconds=0))
    epochs: list[int] = []
    train = descent._Descent.run

    def counted(self: descent._Descent, epoch: int) -> torch.Tensor:
        epochs.append(epoch)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return train(self, epoch)

    def command(name: str) -> str:
        how: dict[str, Any] = {
            "network": "mlp",
            "train_epochs": 5,
            "train_learning_rate": 0.05,
            "batch_size": 8,
            "forget": "20%",
        }
        settings = Settings(data="toy", method="retrain", output=str(tmp_path / name), **how)
        return run.run_training(settings, tmp_path, without_forget=False).record["model_hash"]

    whole = command("whole")
    monkeypatch.setattr(descent._Descent, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        command("stopped")
    assert (tmp_path / "stopped" / "training.safetensors").is_file()
    assert command("stopped") == whole and epochs == [0, 1, 2, 2, 3, 4]
    assert not (tmp_path / "stopped" / "training.safetensors").exists()


def test_an_unlearning_that_is_interrupted_takes_the_finished_original(monkeypatch, tmp_path):
    """`unlearn-classifier run` trains the original once; one of another seed is trained anew."""
    monkeypatch.setattr(data, "load", lambda name, cache_dir, **_: toy_dataset())
    how: dict[str, Any] = {"network": "mlp", "train_epochs": 2, "train_learning_rate": 0.05, "batch_size": 8}
    trainings: list[int] = []
    train = run.train
    monkeypatch.setattr(run, "train", lambda *given, **named: (trainings.append(given[3]), train(*given, **named)))

    def command(name: str, seed: int = 0) -> dict[str, Any]:
        chosen = Settings(
            data="toy", method="ft", epochs=1, forget="20%", output=str(tmp_path / name), seed=seed, **how
        )
        return run.run(chosen, tmp_path).record

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    whole = command("whole")
    for seed in (1, 0):  # the folder then holds the original of seed 1, which seed 0 cannot use
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(run, "unlearn", stop)
            command("stopped", seed)
    assert trainings == [0, 1, 0]
    found = command("stopped")
    assert trainings == [0, 1, 0] and found["seconds"]["train"] > 0
    names = ("model_hash", "original_hash", "weights")
    assert {name: found[name] for name in names} == {name: whole[name] for name in names}
