"""Laws of the masked optimizer; the dense torch optimizers with a masked gradient are the independent reference."""

import copy
import math
import sys
from typing import Any

import numpy as np
import pretend_device
import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from erase.errors import EraseError
from erase.optim import MaskedAdam, places

SHAPES = {"w": (24, 40), "b": (7,), "s": ()}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    random = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(shape, generator=random).to(dtype)) for name, shape in SHAPES.items()}


def random_mask(density: float, seed: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=random) < density for name, shape in SHAPES.items()}


def draw_gradients(weights: dict[str, Parameter], step: int) -> None:
    random = torch.Generator().manual_seed(100 + step)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=random).to(weight.dtype)


def train(optimizer: torch.optim.Optimizer, weights: dict[str, Parameter], steps: range) -> None:
    for step in steps:
        draw_gradients(weights, step)
        optimizer.step()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def test_golden_trajectory():
    """P11: RandomState(6).randn(8), mask 10101010, loss (p - 3)^2 / 2, lr 1e-2, 10 steps."""
    start = torch.from_numpy(np.random.RandomState(6).randn(8)).float()
    weight, mask = Parameter(start.clone()), torch.tensor([True, False] * 4)
    optimizer = MaskedAdam({"p": weight}, {"p": mask}, lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        (0.5 * (weight - 3) ** 2).sum().backward()
        optimizer.step()
    expected = [-0.21188334, 0.72900391, 0.31770161, -0.89909178, -2.38684011, 0.91325152, 1.22688413, -1.51409328]
    assert weight.detach().numpy() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(bits(weight)[~mask], bits(start)[~mask])
    assert (weight[mask] != start[mask]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weights_outside_the_mask_do_not_move_by_one_bit(weight_decay, density, dtype):
    """Gradients outside the mask are huge or NaN. Controls: AdamW with a masked gradient moves them, by its decay."""
    weights, mask = parameters(dtype=dtype), random_mask(density)
    before = {name: bits(weight) for name, weight in weights.items()}
    optimizer = MaskedAdam(weights, mask, lr=1e-2, weight_decay=weight_decay)
    for step in range(5):
        draw_gradients(weights, step)
        for name, weight in weights.items():
            assert weight.grad is not None
            weight.grad[~mask[name]] = math.nan if step % 2 else 6e4
        optimizer.step()
    for name, weight in weights.items():
        assert torch.equal(bits(weight)[~mask[name]], before[name][~mask[name]]), name
    assert (bits(weights["w"]) != before["w"])[mask["w"]].float().mean() > 0.7

    control = parameters(dtype=dtype)
    adamw = torch.optim.AdamW(control.values(), lr=1e-2, weight_decay=1.0)  # visible in bfloat16
    draw_gradients(control, 0)
    for name, weight in control.items():
        assert weight.grad is not None
        weight.grad[~mask[name]] = 0
    adamw.step()
    assert not torch.equal(bits(control["w"])[~mask["w"]], before["w"][~mask["w"]])


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0, None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_inside_the_mask_it_is_adam(weight_decay, density):
    """Bit for bit torch's fused Adam, AdamW with decay; density 1 and no mask are Adam itself.

    torch's loop of single operations rounds otherwise: after 20 steps by at most a bit of the last place.
    """
    mask = None if density is None else random_mask(density)
    mine, fused, loop = parameters(), parameters(), parameters()
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizers = [
        MaskedAdam(mine.items(), mask, **options),
        torch.optim.AdamW(fused.values(), fused=True, **options),
        torch.optim.AdamW(loop.values(), foreach=False, **options),
    ]
    for weights, optimizer in zip((mine, fused, loop), optimizers, strict=True):
        train(optimizer, weights, range(20))
    for name in SHAPES:
        chosen = torch.ones(SHAPES[name], dtype=torch.bool) if mask is None else mask[name]
        assert torch.equal(bits(mine[name])[chosen], bits(fused[name])[chosen]), name
        assert torch.allclose(mine[name][chosen], loop[name][chosen], rtol=2**-23, atol=1e-7), name


@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
def test_many_chunks_and_other_memory_layouts_give_the_same_weights(density):
    """700 000 weights, plain or channels-last, in mixed layouts of weight and gradient."""
    random = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(70, 10, 100, 10, generator=random) for _ in range(2))
    mask = torch.rand(start.shape, generator=random) < density
    reference = Parameter(start.clone())
    reference.grad = gradient * mask
    torch.optim.Adam([reference], lr=1e-2, fused=True).step()
    for layouts in [
        (torch.contiguous_format,) * 2,
        (torch.channels_last,) * 2,
        (torch.channels_last, torch.contiguous_format),
    ]:
        weight = Parameter(start.clone(memory_format=layouts[0]))
        weight.grad = gradient.clone(memory_format=layouts[1])
        MaskedAdam({"w": weight}, {"w": mask}, lr=1e-2).step()
        assert torch.equal(bits(weight), bits(reference))
        assert torch.equal(bits(weight)[~mask], bits(start)[~mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_half_precision_weights_follow_float32_masters(density, dtype):
    """90 steps of 1e-4 go past the next bfloat16 below 1.5, each is far less than one. Control: torch's Adam."""
    mask = {"w": torch.rand(1000, generator=torch.Generator().manual_seed(0)) < density}
    weight, master, control = (Parameter(torch.full((1000,), 1.5)) for _ in range(3))
    weight.data, control.data = weight.data.to(dtype), control.data.to(dtype)
    optimizers = [
        MaskedAdam({"w": weight}, mask, lr=1e-4),
        torch.optim.Adam([master], lr=1e-4),
        torch.optim.Adam([control], lr=1e-4),
    ]
    for _ in range(90):
        for tensor, optimizer in zip((weight, master, control), optimizers, strict=True):
            tensor.grad = torch.ones_like(tensor)
            optimizer.step()
    assert torch.equal(weight[mask["w"]], master[mask["w"]].to(dtype))
    assert (weight[mask["w"]] < 1.5).all()
    assert (weight[~mask["w"]] == 1.5).all()
    assert (control == 1.5).all()


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_without_kernels_a_gpu_gives_the_same_bits_and_nonzero_is_not_called(density, monkeypatch):
    """`nonzero` waits for the device. On a pretended GPU, whose chunks are made small; control: the CPU calls it."""
    monkeypatch.setattr(places, "GPU_CHUNK", 256)
    calls: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    ends = []
    for where in ("cpu", "cuda"):
        with pretend_device.gpu():
            weights = {name: Parameter(weight.detach().to(where)) for name, weight in parameters().items()}
            optimizer = MaskedAdam(weights, random_mask(density), lr=1e-2, weight_decay=0.1)
            values = optimizer.masked_weights()  # brings the places to the device
            for step in range(2):
                random = torch.Generator().manual_seed(step)
                losses = [(w * torch.randn(w.shape, generator=random).to(where)).sum() for w in weights.values()]
                with Count(), optimizer.gathering():
                    torch.stack(losses).sum().backward()
                    optimizer.clip_grad_norm_(1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    optimizer.exchange(values)
            assert weights["w"].device.type == where
        ends.append({name: bits(weight) for name, weight in weights.items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in SHAPES)
    assert calls and not {name for name in calls if "nonzero" in name or "item" in name or "local_scalar" in name}


def test_state_exists_only_for_the_masked_weights():
    weights, mask = parameters(), random_mask(0.2)
    mask["b"][:] = False
    optimizer = MaskedAdam(weights, mask)
    train(optimizer, weights, range(1))
    assert {tuple(value.shape) for value in optimizer.state[weights["w"]].values() if torch.is_tensor(value)} == {
        (int(mask["w"].sum()),)
    }
    assert weights["b"] not in optimizer.state


def test_momentum_carries_on_when_the_gradient_is_zero_but_not_outside_the_mask():
    weights, mask = parameters(), random_mask(0.5)
    before = bits(weights["w"])
    optimizer = MaskedAdam(weights, mask, lr=1e-2)
    train(optimizer, weights, range(1))
    after = bits(weights["w"])
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert (bits(weights["w"]) != after)[mask["w"]].all()
    assert torch.equal(bits(weights["w"])[~mask["w"]], before[~mask["w"]])


def test_parameters_without_gradient_are_skipped():
    weights = parameters()
    optimizer = MaskedAdam(weights, None, lr=1e-2)
    draw_gradients(weights, 0)
    optimizer.zero_grad()
    before = bits(weights["w"])
    assert weights["w"].grad is None
    weights["b"].grad = torch.ones(7)
    optimizer.step()
    assert torch.equal(bits(weights["w"]), before)
    assert weights["w"] not in optimizer.state and weights["b"] in optimizer.state


def test_step_returns_the_loss_of_its_closure():
    weight = Parameter(torch.ones(3))
    optimizer = MaskedAdam({"w": weight}, None, lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3
    assert closure() < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_resumed_equals_uninterrupted_bit_for_bit(density, dtype, tmp_path):
    """The state passes through a file, into new parameters and a new optimizer, in the middle of a schedule."""

    def fresh() -> tuple[dict[str, Parameter], MaskedAdam, torch.optim.lr_scheduler.LRScheduler]:
        weights = parameters(dtype=dtype)
        optimizer = MaskedAdam(weights, random_mask(density), lr=1e-2, weight_decay=0.01)
        return weights, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def run(weights, optimizer, schedule, steps: range) -> None:
        for step in steps:
            train(optimizer, weights, range(step, step + 1))
            schedule.step()

    whole = fresh()
    run(*whole, range(7))
    first = fresh()
    run(*first, range(3))
    state = {"weights": first[0], "optimizer": first[1].state_dict(), "schedule": first[2].state_dict()}
    torch.save(state, tmp_path / "state.pt")
    weights, optimizer, schedule = fresh()
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    kept = copy.deepcopy(stored["optimizer"])
    for name, weight in weights.items():
        weight.data.copy_(stored["weights"][name])
    optimizer.load_state_dict(stored["optimizer"])
    schedule.load_state_dict(stored["schedule"])
    state = optimizer.state[weights["w"]]
    assert state["exp_avg"].dtype == torch.float32 and state["step"] == 3 and isinstance(state["step"], int)
    run(weights, optimizer, schedule, range(3, 7))
    assert optimizer.param_groups[0]["lr"] == whole[1].param_groups[0]["lr"] == 1e-2 / 8
    for name, weight in weights.items():
        assert torch.equal(bits(weight), bits(whole[0][name])), name
    assert torch.equal(stored["optimizer"]["state"][0]["exp_avg"], kept["state"][0]["exp_avg"])  # not trained in place

    amnesiac = fresh()
    for name, weight in amnesiac[0].items():
        weight.data.copy_(stored["weights"][name])
    run(*amnesiac, range(3, 7))
    assert not torch.equal(bits(amnesiac[0]["w"]), bits(whole[0]["w"]))


def test_a_state_made_with_another_mask_is_refused():
    first, second = parameters(), parameters()
    optimizer = MaskedAdam(first, {name: torch.arange(math.prod(s)).view(s) % 2 == 0 for name, s in SHAPES.items()})
    train(optimizer, first, range(1))
    other = MaskedAdam(second, {name: torch.arange(math.prod(s)).view(s) % 2 == 1 for name, s in SHAPES.items()})
    with pytest.raises(EraseError, match="'w'.*another mask"):
        other.load_state_dict(optimizer.state_dict())


def test_threads_do_not_change_the_result():
    def run(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        random = torch.Generator().manual_seed(0)
        weight = Parameter(torch.randn(400_000, generator=random))
        optimizer = MaskedAdam({"w": weight}, {"w": torch.rand(400_000, generator=random) < 0.4}, lr=1e-2)
        for _ in range(3):
            weight.grad = torch.randn(400_000, generator=random)
            optimizer.step()
        return bits(weight)

    before = torch.get_num_threads()
    try:
        assert torch.equal(run(1), run(2))
    finally:
        torch.set_num_threads(before)


def test_it_works_after_accelerate():
    from accelerate import Accelerator

    weights, mask = parameters(), random_mask(0.5)
    control = parameters()
    plain = MaskedAdam(control, mask, lr=1e-2)
    optimizer = Accelerator(cpu=True).prepare(MaskedAdam(weights, mask, lr=1e-2))
    train(optimizer, weights, range(3))
    train(plain, control, range(3))
    for name in SHAPES:
        assert torch.equal(weights[name], control[name])


def test_masks_that_do_not_fit_are_refused():
    weights, mask = parameters(), random_mask(0.5)
    with pytest.raises(EraseError, match="'b' is to be trained but has no mask"):
        MaskedAdam(weights, {"w": mask["w"], "s": mask["s"]})
    with pytest.raises(EraseError, match="'more' has a mask but is not among the parameters"):
        MaskedAdam(weights, {**mask, "more": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(EraseError, match=r"'w' has shape \[24, 40\] but its mask \[40, 24\]"):
        MaskedAdam(weights, {**mask, "w": mask["w"].T})
    with pytest.raises(EraseError, match="no parameter"):
        MaskedAdam({}, None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": -1e-8}, "eps -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(EraseError, match=message):
        MaskedAdam(parameters(), None, **options)


def test_mask_first_then_clip():
    """P14: 1000 normals scaled to norm 1, half of them masked, norm 1 allowed after scaling by 10.

    Clip-then-mask leaves a norm of about 0.7; mask-then-clip exactly what is allowed.
    """
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(1000, generator=random)
    gradient *= 10 / gradient.norm()
    mask = {"w": torch.rand(1000, generator=random) < 0.5}
    weight = Parameter(torch.zeros(1000))
    weight.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    assert weight.grad[mask["w"]].norm().item() == pytest.approx(0.7, abs=0.03)

    optimizer = MaskedAdam({"w": weight}, mask)
    weight.grad = gradient.clone()
    norm = optimizer.clip_grad_norm_(1.0)
    assert norm.item() == pytest.approx(gradient[mask["w"]].norm().item(), rel=1e-6)
    assert weight.grad[mask["w"]].norm().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("gathers", [False, True])
def test_what_is_outside_the_mask_has_no_say_in_the_norm(gathers):
    """Not even NaN; a small gradient is left as it is, and without a mask this is torch's clipping."""
    weights, mask = parameters(), random_mask(0.5)
    optimizer = MaskedAdam(weights, mask)
    draw_gradients(weights, 0)
    kept = torch.cat([weight.grad[mask[name]] for name, weight in weights.items() if weight.grad is not None])
    for name, weight in weights.items():
        assert weight.grad is not None
        weight.grad[~mask[name]] = math.nan
        if gathers:
            optimizer._gather(weight)
    norm = optimizer.clip_grad_norm_(1e6)
    assert norm.item() == pytest.approx(kept.norm().item(), rel=1e-6)
    if gathers:
        assert torch.equal(torch.cat(list(optimizer.gradients())), kept)
    optimizer = MaskedAdam(weights, None)
    draw_gradients(weights, 0)
    expected = torch.nn.utils.get_total_norm([w.grad for w in weights.values() if w.grad is not None])
    assert optimizer.clip_grad_norm_(1e6).item() == pytest.approx(expected.item(), rel=1e-6)


# --- gradients that shrink as they come -----------------------------------------------------------------------------


def losses_of(weights: dict[str, Parameter], step: int, *, num: int) -> list[torch.Tensor]:
    """`num` losses, each of its own graph, whose gradients differ in every weight."""
    random = torch.Generator().manual_seed(100 + step)
    losses = []
    for _ in range(num):
        targets = [torch.randn(weight.shape, generator=random) for weight in weights.values()]
        losses.append(sum((w.float() - y).pow(3).sum() for w, y in zip(weights.values(), targets, strict=True)))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0, None])
def test_gathered_gradients_give_the_weights_of_dense_ones_bit_for_bit(density, dtype):
    """Two backward passes a step against one over the sum; nothing dense is left where the mask has holes."""
    mask = None if density is None else random_mask(density)
    joint, apart = parameters(dtype=dtype), parameters(dtype=dtype)
    slow, fast = (MaskedAdam(weights, mask, lr=1e-2, weight_decay=0.1) for weights in (joint, apart))
    for step in range(5):
        torch.stack(losses_of(joint, step, num=2)).sum().backward()
        slow.step()
        slow.zero_grad()
        with fast.gathering():
            for loss in losses_of(apart, step, num=2):
                loss.backward()
        if density in (0.1, 0.5):
            assert apart["w"].grad is None
        fast.step()
        fast.zero_grad()
        assert not list(fast.gradients())
    for name in SHAPES:
        assert torch.equal(bits(joint[name]), bits(apart[name])), name
        for key, value in slow.state[joint[name]].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(fast.state[apart[name]][key])), (name, key)
    assert not torch.equal(apart["w"], parameters(dtype=dtype)["w"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gathering_counts_recomputed_gradients_once(reentrant):
    """A weight that is used inside and outside of a checkpoint: a reentrant one makes its gradient in two parts."""
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask, results = {"w": torch.eye(4) > 0}, []
    for gathers in (False, True):
        weight = Parameter(torch.arange(16.0).view(4, 4) / 10)
        optimizer = MaskedAdam({"w": weight}, mask, lr=1e-2)
        with optimizer.gathering() if gathers else torch.enable_grad():
            inner = checkpoint(lambda y, w=weight: torch.tanh(y @ w), x, use_reentrant=reentrant)
            (inner @ weight).square().sum().backward()
        held = next(iter(optimizer.gradients()))
        results.append(held if gathers else held[mask["w"]])
    assert torch.equal(*results)


def test_no_two_dense_gradients_are_in_memory_together():
    """Ten layers; when a gradient appears, all others are gathered. Control: without gathering all ten are there."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(10)))
    weights = dict(layers.named_parameters())
    optimizer = MaskedAdam(weights, {name: torch.rand(8, 8) < 0.5 for name in weights})
    seen: list[int] = []

    def count(_: torch.Tensor) -> None:
        seen.append(sum(weight.grad is not None for weight in weights.values()))

    for weight in weights.values():
        weight.register_post_accumulate_grad_hook(count)  # comes before the optimizer's own
    with optimizer.gathering():
        layers(torch.ones(2, 8)).sum().backward()
    assert seen == [1] * 10
    seen.clear()
    layers(torch.ones(2, 8)).sum().backward()
    assert seen == list(range(1, 11))


# --- the base, and full precision, kept for masked weights only -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0, None])
def test_exchanging_shows_the_weights_of_then_and_exchanging_again_those_of_now(density, dtype):
    weights, mask = parameters(dtype=dtype), None if density is None else random_mask(density)
    base = {name: bits(weight) for name, weight in weights.items()}
    optimizer = MaskedAdam(weights, mask, lr=1e-2)
    then = optimizer.masked_weights()
    assert [len(t) for t in then.values()] == [p.numel() if mask is None else mask[n].sum() for n, p in weights.items()]
    train(optimizer, weights, range(3))
    now = {name: bits(weight) for name, weight in weights.items()}
    for expected, other in ((base, now), (now, base)):
        optimizer.exchange(then)
        assert all(torch.equal(bits(weights[name]), expected[name]) for name in SHAPES)
        assert not torch.equal(bits(weights["w"]), other["w"])


def test_rounded_weights_train_as_masters_that_give_exact_weights():
    """Off the mask the exact weights stay what they were, though the parameters were rounded; no step, no change."""
    exact, mask = parameters(), random_mask(0.4)
    before = {name: bits(weight) for name, weight in exact.items()}
    for steps in (0, 4):
        rounded = {name: Parameter(weight.detach().bfloat16()) for name, weight in exact.items()}
        optimizer = MaskedAdam(rounded, mask, lr=1e-2)
        optimizer.keep_masters(exact)
        train(optimizer, rounded, range(steps))
        seen = {name: weight.detach().clone() for name, weight in rounded.items()}
        for name, weight in rounded.items():
            weight.data = exact[name].detach().clone()
        optimizer.exchange(optimizer.give_masters())
        for name, weight in rounded.items():
            moved = bits(weight) != before[name]
            assert torch.equal(moved, mask[name] & (steps > 0)), name
            assert torch.equal(weight.bfloat16(), seen[name]), name


# --- moments of one byte ---------------------------------------------------------------------------------------------


def eight_bit_run(num_steps: int, *, eight_bit: bool, halfway: bool = False) -> tuple[Parameter, MaskedAdam]:
    """Steps on one weight tensor whose left half may change; `halfway`, through a saved state in the middle."""
    draw = torch.Generator().manual_seed(0)
    weight = Parameter(torch.randn(64, 64, generator=draw))
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, :32] = True
    optimizer = MaskedAdam({"w": weight}, {"w": mask}, lr=1e-3, weight_decay=0.1, eight_bit=eight_bit)
    for step in range(num_steps):
        weight.grad = torch.randn(64, 64, generator=draw) + 0.5
        optimizer.step()
        if halfway and step == num_steps // 2:
            state = optimizer.state_dict()
            optimizer = MaskedAdam({"w": weight}, {"w": mask}, lr=1e-3, weight_decay=0.1, eight_bit=eight_bit)
            optimizer.load_state_dict(state)
    return weight, optimizer


def test_eight_bit_moments_take_a_quarter_and_go_nearly_where_float32_goes():
    """2 bytes and 2/256 float32 scales a masked weight; a step is coarser by less than a tenth of the way gone."""
    pytest.importorskip("bitsandbytes")
    start, _ = eight_bit_run(0, eight_bit=False)
    exact, large = eight_bit_run(20, eight_bit=False)
    near, small = eight_bit_run(20, eight_bit=True)
    state = small.state[near]
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.uint8}
    assert large.num_bytes() - small.num_bytes() == 2048 * (8 - 2) - 2 * 4 * 2048 // 256
    way, error = (exact - start)[:, :32].norm(), (near - exact)[:, :32].norm()
    assert 0 < error < 0.1 * way
    assert torch.equal(near[:, 32:], start[:, 32:])


def test_eight_bit_moments_resume_bit_for_bit():
    pytest.importorskip("bitsandbytes")
    whole, _ = eight_bit_run(9, eight_bit=True)
    resumed, _ = eight_bit_run(9, eight_bit=True, halfway=True)
    assert torch.equal(whole, resumed)


def test_eight_bit_moments_without_their_package_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EraseError, match="^bitsandbytes is not installed; pip install bitsandbytes$"):
        MaskedAdam({"w": Parameter(torch.zeros(3))}, None, eight_bit=True)
