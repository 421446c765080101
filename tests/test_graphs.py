"""CUDA graphs change no result: on a pretended GPU whose graphs have one set of activations and gradients."""

from typing import Any

import pretend_device
import pytest
import torch
from torch import Tensor, nn

from erase import graphs


class Net(nn.Module):
    """A layer and batch normalisation; counts the calls that are not replayed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.calls = nn.Linear(3, 4), nn.BatchNorm1d(4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.layer(x))


@pytest.fixture
def gpu():
    with pretend_device.gpu(graphs=True):
        yield


def on_gpu(*sizes: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, generator=draw).to("cuda") for size in sizes]


def trained(replays: bool, batches: list[Tensor], *, passes: int = 1) -> tuple[nn.Module, list[Tensor], Any]:
    """The network and its outputs after a step of SGD for each batch; `passes` of the network each, all backward."""
    net = Net().to("cuda")
    call = graphs.Replayed(net) if replays else None
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    seen = []
    for x in batches:
        if call is not None:
            call.new_step()
        for number in range(passes):
            output = (call or net)(x + number)
            seen.append(output.detach().clone())
            output.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, seen, call


def assert_same(batches: list[Tensor], **options: Any) -> Any:
    (net, outputs, call), (plain, expected, _) = (trained(replays, batches, **options) for replays in (True, False))
    assert all(map(torch.allclose, outputs, expected))
    for (name, ours), theirs in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs), name
    return call


def test_replayed_steps_are_computed_ones_running_statistics_too(gpu):
    call = assert_same(on_gpu(5, 5, 5))
    assert call._graph is not None


def test_a_second_pass_of_a_step_is_computed_as_the_graph_has_one_set_of_gradients(gpu, monkeypatch):
    """Control: if the graph were taken for both, the gradients of the first would be lost."""
    assert_same(on_gpu(5, 5), passes=2)
    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(graphs.Replayed, "_is_free", always, raising=False)
    with pytest.raises(AssertionError):
        assert_same(on_gpu(5, 5), passes=2)


def test_a_batch_of_another_size_is_computed(gpu):
    call = assert_same(on_gpu(5, 5, 2, 5))
    assert call._shapes[0][0] == (5, 3)


def test_outputs_without_gradients_may_be_kept(gpu):
    net = Net().to("cuda").eval()
    call, (one, other) = graphs.Replayed(net, gradients=False), on_gpu(4, 4)
    with torch.no_grad():
        kept = [call(one), call(other)]
        assert all(map(torch.allclose, kept, [net.norm(net.layer(one)), net.norm(net.layer(other))]))
    assert call._graph is not None


def test_inputs_that_want_gradients_are_computed(gpu):
    net = Net().to("cuda")
    call, (x,) = graphs.Replayed(net), on_gpu(4)
    call(x)
    x = x.clone().requires_grad_(True)
    call.new_step()
    (slope,) = torch.autograd.grad(call(x).sum() + x.sum(), x)
    assert slope.shape == x.shape


def test_nothing_is_replayed_on_a_cpu_or_before_enough_calls(gpu, monkeypatch):
    made: list[int] = []
    monkeypatch.setattr(graphs.Replayed, "_made", lambda self, inputs: made.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(graphs.device, "has_graphs", lambda where: where.type == "cuda")
        graphs.Replayed(Net())(torch.ones(4, 3))
        assert not made
    call, (x,) = graphs.Replayed(Net().to("cuda"), after=2), on_gpu(4)
    for expected in (0, 0, 1, 1):
        call.new_step()
        call(x)
        call(x)  # the second pass of a step does not count
        assert len(made) == expected


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_graph_that_fails_or_differs_is_left_alone_and_said(gpu, monkeypatch, fault):
    def wrong(module: Any, samples: Any, **options: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        module.forward = lambda x: module.norm(1.3 * module.layer(x) + 1)
        module.eval()
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", wrong)
    said = "not permitted" if fault == "raises" else "differs from the network"
    with pytest.warns(UserWarning, match=f"CUDA graph cannot be used .*{said}"):
        call = graphs.Replayed(net := Net().to("cuda").eval(), after=0)
        (x,) = on_gpu(4)
        output = call(x)
    assert torch.allclose(output, net.norm(net.layer(x))) and "forward" not in vars(net)
