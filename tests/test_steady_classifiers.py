"""Steady training steps of classifiers wait for no GPU, and replayed passes change no result; on a pretended GPU."""

import copy
from typing import Any

import pretend_device
import pytest
import torch

from erase import graphs
from erase.classification import methods, networks, replayed
from erase.classification.data import Images
from erase.classification.descent import Recipe, computing, descend
from erase.classification.methods import Descends, Task
from erase.classification.presets import PRESETS
from erase.classification.replayed import replaying
from erase.optim.sgd import MaskedSGD

NAMES = [name for name, preset in PRESETS.items() if preset.method and issubclass(methods.find(name), Descends)]
RECIPE = Recipe(epochs=2, learning_rate=1e-2, batch_size=4, padding=1, flip=True)


def network() -> torch.nn.Module:
    return networks.build(networks.Shape("small", 4, 1, 8, (0.5,), (0.5,)), seed=0).to("cuda")


def images(num: int, seed: int) -> Images:
    draw = torch.Generator().manual_seed(seed)
    return Images(torch.randint(0, 256, (num, 1, 8, 8), generator=draw, dtype=torch.uint8), torch.arange(num) % 4)


def unlearned(name: str, *, graphs_too: bool = False, precision: Any = "fp32", num: int = 24) -> torch.nn.Module:
    """The network after the method's steps, half of its weights masked."""
    model = network()
    named = dict(model.named_parameters())
    mask = {key: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for key, p in named.items()}
    parts = images(num, 0).to("cuda"), images(num + 2, 1).to("cuda")  # the last retain batch is short
    task = Task(model, *parts, 4, torch.Generator().manual_seed(2), 4)
    method: Any = methods.make(methods.find(name), name, {})
    recipe = Recipe(**{**vars(RECIPE), "precision": precision})
    descend(model, method.plan(task), recipe, torch.Generator().manual_seed(3), mask)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_steady_steps_wait_for_nothing(monkeypatch, name):
    """From the second to the fifth step of the first epoch; what happens once an epoch may wait."""
    found: list[str] = []
    taken = [0]
    with pretend_device.gpu(), pretend_device.waits() as seen:
        plain = MaskedSGD.step

        def step(self: Any, *arguments: Any) -> Any:
            taken[0] += 1
            if taken[0] == 2:
                seen.clear()
            if taken[0] == 5:
                found.extend(seen)
            return plain(self, *arguments)

        monkeypatch.setattr(MaskedSGD, "step", step)
        unlearned(name)
    assert taken[0] >= 10 and found == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_replayed_passes_change_no_result(monkeypatch, name, precision):
    """Also of methods that look inside the network with hooks, or that copy it; running statistics too."""
    monkeypatch.setattr(replayed, "AFTER", 2)
    made: list[Any] = []
    plain = graphs.Replayed._made
    monkeypatch.setattr(graphs.Replayed, "_made", lambda self, inputs: made.append(plain(self, inputs)) or made[-1])
    ends = []
    for has_graphs in (False, True):
        with pretend_device.gpu(graphs=has_graphs):
            ends.append({key: value.cpu() for key, value in unlearned(name, precision=precision).state_dict().items()})
    assert (name == "be") == (not made), "boundary expanding reads an inner layer with a hook"
    assert None not in made
    for key, value in ends[1].items():
        torch.testing.assert_close(value, ends[0][key], rtol=1e-3, atol=1e-5)


def test_a_copy_of_a_replayed_model_calls_itself_in_the_precision():
    with pretend_device.gpu(graphs=True):
        model = network().train()
        for precision in ("fp32", "bf16"):
            with computing(model, precision), replaying(model):  # pyright: ignore[reportArgumentType]
                twin = copy.deepcopy(model)
                for parameter in twin.parameters():
                    parameter.data.zero_()
                x = torch.rand(2, 1, 8, 8).to("cuda")
                assert not twin(x).any() and model(x).any()
            assert "forward" not in vars(model)
