"""The base as a teacher, exchanged or copied, and both terms from one pass: the same numbers, with fewer passes."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
import toy_training as toy
from accelerate import Accelerator
from loaded import load_sd
from torch._subclasses.fake_tensor import FakeTensor

from erase import masks
from erase.conditioning import Conditioning
from erase.methods.esd import ESD
from erase.methods.relabel import Relabel
from erase.methods.soft import Soft
from erase.optim import MaskedAdam
from erase.training import loop, memory
from erase.training.batches import batches
from erase.training.copied import Copied, copied
from erase.training.exchanged import Exchanged


@pytest.fixture
def model(toy_pipeline_dir):
    return load_sd(toy_pipeline_dir)


def inputs(n: int) -> tuple[Any, Any, Any]:
    draw = torch.Generator().manual_seed(n)
    text = torch.randn(n, 77, 8, generator=draw)
    return torch.randn(n, 4, 4, 4, generator=draw), torch.arange(n) * 100, Conditioning(text)


def test_a_copied_base_predicts_what_an_exchanged_one_predicts(model):
    """Bit for bit in float32: predictions, attention and trajectories. Control: the model has moved meanwhile."""
    parameters = dict(model.unet.named_parameters())
    mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.5, seed=0)
    optimizer = MaskedAdam(parameters, mask, lr=0.1)
    exchanged, copy = Exchanged(model, optimizer), Copied(model, torch.float32)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    x, t, c = inputs(2)
    with torch.no_grad():
        assert torch.equal(copy(x, t, c), exchanged(x, t, c)) and not torch.equal(copy(x, t, c), model(x, t, c))
        ours, theirs = copy.attention(x, t, c), exchanged.attention(x, t, c)
    assert len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))
    ends = []
    for held in (copy, exchanged):
        with held.inside() as base:
            ends.append(base.trajectory(x, torch.tensor([1, 3]), c, c[:1], steps=4, guidance=2.0))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])
    assert all(torch.equal(parameter, moved[name]) for name, parameter in parameters.items())


def test_a_copy_has_its_own_weights_in_its_dtype_and_no_gradients(model):
    copy = copied(model.unet, torch.bfloat16)
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in copy.parameters()
    )
    own = {p.untyped_storage().data_ptr() for p in model.unet.parameters()}
    assert not own & {p.untyped_storage().data_ptr() for p in copy.parameters()}
    for name, parameter in copy.named_parameters():
        assert torch.equal(parameter, model.unet.get_parameter(name).bfloat16())
    assert model.using(copy).unet is copy and model.unet is not copy and model.using(copy).vae is model.vae


@pytest.mark.parametrize("frozen_target", [True, False])
@pytest.mark.parametrize("distill_retain", [True, False])
def test_both_terms_of_one_pass_are_those_of_two(model, tmp_path, frozen_target, distill_retain):
    """Values and gradients up to rounding; also with fewer forget than retain images."""
    method = Relabel(alpha=0.7, frozen_target=frozen_target, distill_retain=distill_retain)
    assert method.joins
    data = toy.gathered(model, method, tmp_path)
    batch = next(batches(model, data, toy.RECIPE, 0, 2, Accelerator(cpu=True)))
    batch = replace(
        batch,
        **{
            name: getattr(batch, name)[:1]
            for name in ("x_forget", "x_target", "t_forget", "c_forget", "c_target", "eps_forget")
        },
    )
    frozen = model.using(copied(model.unet, torch.float32))
    weights = [p.requires_grad_(True) for p in model.unet.parameters()]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.1)
    found = []
    for terms in (dict(method.loss(model, frozen, batch)), method.together(model, frozen, batch)):
        total: Any = sum(terms.values())
        gradient = torch.autograd.grad(total, weights, allow_unused=True)
        found.append((terms, torch.cat([g.reshape(-1) for g in gradient if g is not None])))
    (terms, gradient), (joined, of_both) = found
    assert terms.keys() == joined.keys() == {"forget", "retain"}
    for name, term in terms.items():
        assert joined[name].item() == pytest.approx(term.item(), rel=1e-4)
    assert (gradient - of_both).norm() < 1e-4 * gradient.norm()


def test_a_loss_that_overrides_another_is_not_replaced_by_the_inherited_pass():
    class Own(Relabel):
        def loss(self, model: Any, frozen: Any, batch: Any) -> Any:
            yield from ()

    assert Relabel().joins and Soft().joins
    assert not Own().joins and not ESD().joins
    assert not Relabel(alpha=0).joins and not Relabel(balancing="nash").joins


def test_room_is_decided_from_free_memory(model, monkeypatch):
    """Nothing without a GPU, then a copy, then both branches at once, then a graph that keeps all gradients.

    A method whose branches cannot be joined has the activations of a second pass beside those of the graph.
    """
    kept = {num: memory.activations(model, num, 8, torch.float32, checkpointing=False) for num in (2, 4)}
    monkeypatch.setattr(memory, "activations", lambda model, num, *_, **__: kept[num])  # a second each
    parameters = dict(model.unet.named_parameters())
    num = sum(p.numel() for p in parameters.values())
    how: dict[str, Any] = {"num_masked": num // 2, "part": 2, "together": 4, "side": 4, "dtype": torch.bfloat16}
    how |= {"eight_bit": False, "copies": 0, "joins": True}
    sizes = [0, *(int(1000 * 1.4**n) for n in range(36))]
    found = [memory.room(model, parameters, free=free, **how) for free in sizes]
    steps = [key for n, key in enumerate(found) if n == 0 or key != found[n - 1]]
    rooms = [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
    assert steps == [memory.Room(*room) for room in rooms]
    apart = [memory.room(model, parameters, free=free, **{**how, "joins": False}) for free in sizes]
    assert not any(room.together for room in apart)
    assert sum(room.graph for room in apart) <= sum(room.graph for room in found) > 0
    first = next(n for n, key in enumerate(found) if key.copy)
    assert sizes[first] > 2 * num + 8 * num // 2, "the copy and the moments at least"


def trained(
    folder: Path, path: Path, method: Any, *, free: int | None, graphs: bool = False, num_steps: int = 2
) -> tuple[list[dict[str, float]], list[str]]:
    """Losses, and what was called: a pass of the UNet by its number of images, or an exchange."""
    calls: list[str] = []
    with pretend_device.gpu(free=free, graphs=graphs) if free is not None else nullcontext():
        model = load_sd(folder, device="cpu" if free is None else "cuda")
        data = toy.gathered(model, method, path.parent / "cache")
        parameters = dict(model.unet.named_parameters())
        mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.5, seed=0)
        plain, forward = MaskedAdam.exchange, type(model.unet).forward
        with pytest.MonkeyPatch.context() as patch:

            def exchange(self: Any, values: Any) -> None:
                calls.append("exchange")
                plain(self, values)

            @wraps(forward)
            def seen(self: Any, sample: Any, *arguments: Any, **options: Any) -> Any:
                if not isinstance(sample, FakeTensor):  # of the dry run that measures activations
                    calls.append(f"pass of {len(sample)}")
                return forward(self, sample, *arguments, **options)

            patch.setattr(MaskedAdam, "exchange", exchange)
            patch.setattr(type(model.unet), "forward", seen)
            recipe = replace(toy.RECIPE, num_steps=num_steps, learning_rate=1e-4, checkpoint_every=100)
            accelerator = Accelerator(cpu=free is None)
            losses = loop.train(model, method, data, parameters, mask, recipe, accelerator, state_path=path, quiet=True)
    return losses, calls


def test_with_room_a_step_is_two_passes_and_no_exchange(toy_pipeline_dir, tmp_path):
    """Control: without room, as on a CPU, four passes and four exchanges; the losses are the same up to rounding."""
    passes = {}
    for name, free in (("cpu", None), ("none", 0), ("room", 10**12)):
        passes[name] = trained(toy_pipeline_dir, tmp_path / f"{name}.pt", Relabel(), free=free)
    plain = ["exchange", "pass of 2", "exchange", "pass of 2"] * 4
    assert passes["cpu"][1] == passes["none"][1] == plain
    assert passes["room"][1] == ["pass of 4", "pass of 4"] * 2
    assert passes["cpu"][0] == passes["none"][0]
    for ours, theirs in zip(passes["room"][0], passes["cpu"][0], strict=True):
        assert all(math.isclose(ours[name], theirs[name], rel_tol=1e-3, abs_tol=1e-9) for name in theirs)


def test_trajectories_of_the_base_need_no_exchange_either(toy_pipeline_dir, tmp_path):
    for free, exchanges in ((10**12, False), (0, True)):
        _, calls = trained(toy_pipeline_dir, tmp_path / f"{free}.pt", ESD(), free=free)
        assert ("exchange" in calls) == exchanges


def test_soft_thresholds_still_start_from_the_base(toy_pipeline_dir, tmp_path):
    """A copy predicts; the exact values that the weights are put back to are held beside it."""
    losses, calls = trained(toy_pipeline_dir, tmp_path / "soft.pt", Soft(), free=10**12)
    assert calls.count("pass of 4") == 4 and calls.count("exchange") == 2  # one for each proximal step
    assert all(math.isfinite(value) for step in losses for value in step.values())


@pytest.mark.parametrize(
    "method", [Relabel(), Relabel(frozen_target=False), ESD()], ids=["joined", "two passes", "esd"]
)
def test_steps_replayed_from_a_graph_have_the_losses_of_computed_ones(toy_pipeline_dir, tmp_path, monkeypatch, method):
    """On a pretended GPU whose graphs have one set of activations and gradients (`pretend_device.graphed`)."""
    made: list[Any] = []
    monkeypatch.setattr(loop, "REPAYS", 3)
    plain = pretend_device.graphed
    monkeypatch.setattr(pretend_device, "graphed", lambda *a, **k: made.append(a[0]) or plain(*a, **k))
    found = []
    for graphs in (False, True):
        found.append(
            trained(toy_pipeline_dir, tmp_path / f"{graphs}.pt", method, free=10**12, graphs=graphs, num_steps=4)[0]
        )
        assert len(made) == (2 if graphs else 0), "the model in training and the base"
    for ours, theirs in zip(*found, strict=True):
        assert all(math.isclose(ours[name], theirs[name], rel_tol=1e-3, abs_tol=1e-9) for name in theirs)
