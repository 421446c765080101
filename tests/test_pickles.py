"""Laws of files of torch.save: weights come out, whatever else is pickled beside them, and none of its code runs."""

import collections
import os
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erase import pickles
from erase.errors import EraseError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, -0.0]).half()}


class Callback:
    """A stand-in for Lightning's ModelCheckpoint, which pickles itself with its state."""

    def __init__(self, path: str):
        self.best = {"path": path, "score": torch.tensor(1.0)}


class Evil:
    """Runs a command when an ordinary unpickler loads it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def lightning(path: Path, *more: Any) -> Path:
    """A checkpoint in the layout of sd-v1-4.ckpt."""
    state = collections.OrderedDict(WEIGHTS)
    callbacks = {Callback: {"best_model_score": Callback("best")}}
    torch.save({"epoch": 3, "callbacks": callbacks, "state_dict": state, "more": more}, path)
    return path


@pytest.mark.parametrize("is_zip", [True, False])
def test_plain_weights_come_out_as_they_were_saved(tmp_path, is_zip):
    torch.save(WEIGHTS, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    content, stubs = pickles.load(tmp_path / "a.pt")
    assert stubs == []
    assert all(
        torch.equal(content[name], tensor) and content[name].dtype == tensor.dtype for name, tensor in WEIGHTS.items()
    )


def test_a_lightning_checkpoint_opens_and_its_callback_is_a_stub(tmp_path):
    """The callback's class is named and never built (4.4)."""
    path = lightning(tmp_path / "sd.ckpt")
    with pytest.raises(pickle.UnpicklingError):  # control: torch's own safe loader
        torch.load(path, weights_only=True)
    content, stubs = pickles.load(path)
    assert stubs == [f"{__name__}.Callback"]
    assert content["epoch"] == 3
    found, _ = pickles.tensors(path)
    assert found.keys() == WEIGHTS.keys() and torch.equal(found["a.weight"], WEIGHTS["a.weight"])
    line = pickles.stubbed(path, stubs)
    assert "Callback" in line and "none of their code ran" in line and "\n" not in line


def test_the_checkpoint_of_a_classifier_opens_with_its_arguments_and_optimizer(tmp_path):
    """SalUn's 0model_SA_best.pth.tar: numpy numbers, a Namespace, an optimizer's state beside the weights (4.4)."""
    parameter = torch.nn.Parameter(torch.ones(2))
    content = {
        "state_dict": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()},
        "best_sa": np.float64(94.7),
        "result": {"train_ta": [np.float32(1)]},
        "args": Namespace(arch="resnet18"),
        "optimizer": torch.optim.SGD([parameter], 0.1, momentum=0.9).state_dict(),
        "own": parameter,
    }
    torch.save(content, tmp_path / "0model_SA_best.pth.tar")
    found, stubs = pickles.tensors(tmp_path / "0model_SA_best.pth.tar")
    assert found.keys() == {"module.a.weight", "module.a.bias"}
    assert "argparse.Namespace" in stubs
    assert torch.equal(pickles.load(tmp_path / "0model_SA_best.pth.tar")[0]["own"], parameter)


@pytest.mark.parametrize("is_zip", [True, False])
def test_no_code_of_a_pickle_runs(tmp_path, is_zip):
    """A reducer, a builtin and an attribute of a known class are stubs; the control shows that the trap works (2.5)."""
    trap = tmp_path / "trap"
    content = {"state_dict": WEIGHTS, "evil": Evil(trap), "eval": eval, "deep": [getattr, Evil(trap)]}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    found, stubs = pickles.tensors(tmp_path / "a.pt")
    assert found.keys() == WEIGHTS.keys() and not trap.exists()
    assert f"{os.system.__module__}.system" in stubs and "builtins.eval" in "".join(stubs).replace(
        "__builtin__", "builtins"
    )
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert trap.exists()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_file_that_is_no_pickle_is_one_line(tmp_path):
    whole = lightning(tmp_path / "whole.ckpt").read_bytes()
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pt").read_bytes()
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))  # pyright: ignore
    script = (tmp_path / "script.pt").read_bytes()
    cases = [b"", b"no pickle", whole[:100], whole[:-50], old[:-3], old[:200], script, b"\x80\x02]q\x00(K"]
    for data in cases:
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(EraseError) as error:
            pickles.tensors(tmp_path / "a.pt")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        assert str(tmp_path / "a.pt") in str(error.value)
    with pytest.raises(EraseError, match="no such file"):
        pickles.load(tmp_path / "gone.pt")
    for value in ([1], {"state_dict": 1}, {"a": 1}, {1: torch.ones(1)}):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(EraseError, match="holds no weights by name"):
            pickles.tensors(tmp_path / "a.pt")
