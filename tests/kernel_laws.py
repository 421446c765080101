"""Laws of the Triton kernels; test_kernels.py runs this file in Triton's interpreter, on the CPU.

The optimizer of today's torch operations (`erase.optim.chunked`) is the reference. Both compute in float32 and round in
different places, so weights agree within a bound on rounding; all that is only copied agrees bit for bit.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from erase.errors import EraseError
from erase.optim import MaskedAdam, cuda
from erase.optim.sgd import MaskedSGD

U = 2.0**-24  # float32's unit roundoff
LR = 1e-3
# no multiple of the block of 1,024; less than a byte of bits; a scalar; one block; nothing, and everything masked
SHAPES = {"w": (37, 40), "b": (7,), "s": (), "block": (1024,), "none": (9, 5), "all": (3, 11)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights_of(dtype: torch.dtype) -> dict[str, Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {name: Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in SHAPES.items()}


def mask_of(density: float | None) -> dict[str, Tensor] | None:
    if density is None:
        return None
    draw = torch.Generator().manual_seed(1)
    mask = {name: torch.rand(shape, generator=draw) < density for name, shape in SHAPES.items()}
    mask["none"][:], mask["all"][:] = False, True
    return mask


def fused(weights: Mapping[str, Parameter], mask: Mapping[str, Tensor] | None, **options: Any) -> MaskedAdam:
    optimizer = MaskedAdam(weights, mask, lr=LR, **options)
    assert isinstance(optimizer._engine, cuda.Fused)
    return optimizer


def chunked(weights: Mapping[str, Parameter], mask: Mapping[str, Tensor] | None, **options: Any) -> MaskedAdam:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "fits", lambda parameters: False)
        optimizer = MaskedAdam(weights, mask, lr=LR, **options)
    assert not isinstance(optimizer._engine, cuda.Fused)
    return optimizer


def backward(weights: Mapping[str, Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for weight in weights.values():
        (weight * torch.randn(weight.shape, generator=draw).to(weight.dtype)).sum().backward()


def train(
    optimizer: MaskedAdam, weights: Mapping[str, Parameter], steps: range, *, gathers: bool = True,
    max_norm: float | None = None,
) -> None:  # fmt: skip
    """Two backward passes a step, as the forget and the retain loss are."""
    for step in steps:
        if gathers:
            with optimizer.gathering():
                backward(weights, 2 * step)
                backward(weights, 2 * step + 1)
        else:
            backward(weights, 2 * step)
        if max_norm is not None:
            optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
        optimizer.zero_grad()


def assert_near(one: Tensor, other: Tensor, num: int) -> None:
    """Float32 values after `num` steps, at most five. A step rounds a weight three times on either side, and its
    update, at most sqrt(5) lr long, in at most 13 operations; see test_gpu.py."""
    torch.testing.assert_close(one, other, rtol=6 * num * U, atol=(58 + 68) * num * U * LR)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("density", "decay", "gathers"), [(0.5, 0.1, True), (0.1, 0.0, False), (None, 0.1, True)])
def test_the_kernel_is_adam_inside_the_mask_and_moves_nothing_outside(density, decay, gathers, dtype):
    mask = mask_of(density)
    ours, reference, start = weights_of(dtype), weights_of(dtype), weights_of(dtype)
    one, other = fused(ours, mask, weight_decay=decay), chunked(reference, mask, weight_decay=decay)
    for optimizer, weights in ((one, ours), (other, reference)):
        train(optimizer, weights, range(3), gathers=gathers)
    for name, weight in ours.items():
        inside = torch.ones(SHAPES[name], dtype=torch.bool) if mask is None else mask[name]
        assert torch.equal(bits(weight[~inside]), bits(start[name][~inside])), name
        if not inside.any():
            assert weight not in one.state
            continue
        assert (weight != start[name])[inside].float().mean() > 0.3 or weight.numel() < 50  # bfloat16 is coarse
        here, there = one.state[weight], other.state[reference[name]]
        assert here.keys() == there.keys() and here["step"] == there["step"] == 3
        assert_near(here["exp_avg"] * LR, there["exp_avg"] * LR, 3)
        torch.testing.assert_close(here["exp_avg_sq"], there["exp_avg_sq"], rtol=30 * U, atol=0)
        if dtype == torch.float32:
            assert_near(weight, reference[name], 3)
        else:
            assert_near(here["master"], there["master"], 3)
            assert torch.equal(weight[inside], here["master"].to(dtype)), "rounded to the nearest, to even"


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_gradients_are_the_dense_ones_bit_for_bit(dtype):
    """Sums of two passes too: each is rounded to the parameter's dtype once, as torch does it."""
    mask = mask_of(0.4)
    found = []
    for make in (fused, chunked):
        weights = weights_of(dtype)
        optimizer = make(weights, mask)
        with optimizer.gathering():
            backward(weights, 0)
            backward(weights, 1)
        assert weights["w"].grad is None
        found.append([*optimizer.gradients()])
    assert len(found[0]) == len(SHAPES) - 1  # "all" stays dense, of "none" nothing is left
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_taken_and_exchanged_bit_for_bit(dtype):
    mask = mask_of(0.3)
    assert mask is not None
    weights, start = weights_of(dtype), weights_of(dtype)
    optimizer = fused(weights, mask)
    taken = optimizer.masked_weights()
    assert all(torch.equal(taken[name], start[name][mask[name]]) for name in SHAPES)
    other = {name: torch.full_like(values, 3.0) for name, values in taken.items()}
    optimizer.exchange(other)
    for name, weight in weights.items():
        assert (weight[mask[name]] == 3).all() and torch.equal(weight[~mask[name]], start[name][~mask[name]])
        assert torch.equal(other[name], taken[name])
    optimizer.exchange(other)
    assert all(torch.equal(bits(weights[name]), bits(start[name])) for name in SHAPES)


@pytest.mark.parametrize("gathers", [True, False])
def test_clipping_counts_masked_weights_and_happens_inside_the_step(gathers):
    """The same norm, and steps as if the gradients had been scaled before; control: without clipping they differ."""
    mask = mask_of(0.5)
    ends, norms = [], []
    for make, max_norm in ((fused, 0.01), (chunked, 0.01), (fused, None)):
        weights = weights_of(torch.float32)
        optimizer = make(weights, mask, eps=1e-3)  # so that Adam sees the gradients' size
        train(optimizer, weights, range(1), gathers=gathers, max_norm=max_norm)
        ends.append(weights)
        backward(weights, 9)
        norms.append(optimizer.clip_grad_norm_(1.0).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for name in SHAPES:
        assert_near(ends[0][name], ends[1][name], 5)
    assert not torch.allclose(ends[0]["w"], ends[2]["w"], atol=LR / 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("makes", [(fused, chunked), (chunked, fused)], ids=["to the CPU", "to the GPU"])
def test_a_state_goes_from_one_device_to_the_other_and_on(makes, dtype, tmp_path):
    """Through a file, in the middle; within the same bound as a run that stayed."""
    mask = mask_of(0.5)
    stayed, weights = weights_of(dtype), weights_of(dtype)
    whole = chunked(stayed, mask, weight_decay=0.1)
    train(whole, stayed, range(4))
    first = makes[0](weights, mask, weight_decay=0.1)
    train(first, weights, range(2))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = makes[1](weights, mask, weight_decay=0.1)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, weights, range(2, 4))
    for name, weight in weights.items():
        if weight in second.state:
            here, there = second.state[weight], whole.state[stayed[name]]
            assert here["step"] == 4 and here["mask"] == there["mask"]
            key = "exp_avg" if dtype == torch.float32 else "master"
            assert_near(here[key] * (LR if key == "exp_avg" else 1), there[key] * (LR if key == "exp_avg" else 1), 4)
        if dtype == torch.float32:
            assert_near(weight, stayed[name], 4)
    other = makes[1](weights_of(dtype), mask_of(0.6))
    with pytest.raises(EraseError, match="another mask"):
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize("make", [fused, chunked])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_halted_step_changes_nothing(make, dtype, eight_bit):
    """Not even with gradients that are NaN. Control: the same step without the flag."""
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    weights = weights_of(dtype)
    optimizer = make(weights, mask_of(0.5), weight_decay=0.1, eight_bit=eight_bit)
    optimizer.halt = torch.zeros((), dtype=torch.int32)
    train(optimizer, weights, range(1))
    before = {name: bits(weight) for name, weight in weights.items()}
    state = optimizer.state[weights["w"]]
    moments = {key: bits(value) for key, value in state.items() if torch.is_tensor(value)}
    optimizer.halt.fill_(1)
    for _ in range(2):
        for weight in weights.values():
            weight.grad = torch.full_like(weight, math.nan)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(bits(weight), before[name]) for name, weight in weights.items())
    assert all(torch.equal(bits(state[key]), before) for key, before in moments.items())
    optimizer.uncount(2)
    assert optimizer.state[weights["w"]]["step"] == 1
    optimizer.halt.fill_(0)
    train(optimizer, weights, range(1, 2))
    assert not torch.equal(bits(weights["w"]), before["w"])


def test_masters_of_the_exact_base_come_and_go():
    exact = weights_of(torch.float32)
    weights = {name: Parameter(weight.detach().bfloat16()) for name, weight in exact.items()}
    mask = mask_of(0.5)
    assert mask is not None
    optimizer = fused(weights, mask)
    optimizer.keep_masters(exact)
    train(optimizer, weights, range(1))
    masters = optimizer.give_masters()
    for name, weight in weights.items():
        weight.data = exact[name].data.clone()
    trained = {name: values.clone() for name, values in masters.items()}
    optimizer.exchange(masters)
    for name, weight in weights.items():
        assert torch.equal(weight[mask[name]], trained[name])
        assert torch.equal(weight[~mask[name]], exact[name][~mask[name]])


def test_eight_bit_moments_work():
    pytest.importorskip("bitsandbytes")
    ends = []
    for make in (fused, chunked):
        weights = weights_of(torch.float32)
        optimizer = make(weights, mask_of(0.5), eight_bit=True)
        train(optimizer, weights, range(2))
        assert optimizer.state[weights["w"]]["exp_avg"].dtype == torch.uint8
        ends.append(weights)
    apart = (ends[0]["w"] - ends[1]["w"]).abs()
    assert apart.max() < LR / 10, "a rounding may choose the next of 256 codes, no more"


@pytest.mark.parametrize(("density", "most"), [(0.5, 4.2), (0.1, 1.0)])
def test_bytes_a_weight(density, most):
    """1 bit, 8 bytes for every 1,024 weights, and 8 bytes of moments for each masked one: 4.13 at one half."""
    weight = Parameter(torch.zeros(150, 151))
    mask = {"w": torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < density}
    optimizer = fused({"w": weight}, mask)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.num_bytes() / weight.numel() < most
    assert not any(tensor.dtype == torch.int64 for tensor in optimizer._engine.stored)  # pyright: ignore


@pytest.mark.parametrize(("density", "momentum", "decay"), [(0.5, 0.9, 0.1), (0.1, 0.0, 0.1), (None, 0.9, 0.0)])
def test_the_kernel_is_torchs_sgd_inside_the_mask_and_moves_nothing_outside(density, momentum, decay):
    """Also with a gradient that is NaN outside the mask. Parameters without a gradient stay as they are.

    A step rounds b and w at most three times each on either side, and |b| < 5 (1 + 0.9 + ...) after three steps:
    the two part by at most 3 (3 u |w| + lr (3 + 3) u 14) < 9 u |w| + 252 u lr.
    """
    mask = mask_of(density)
    ours, reference, start = (weights_of(torch.float32) for _ in range(3))
    one = MaskedSGD(ours, mask, lr=LR, momentum=momentum, weight_decay=decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "fits", lambda parameters: False)
        other = MaskedSGD(reference, mask, lr=LR, momentum=momentum, weight_decay=decay)
    assert one._fused is not None and other._fused is None
    for optimizer, weights in ((one, ours), (other, reference)):
        for step in range(3):
            backward(weights, step)
            weights["b"].grad = None
            if mask is not None:
                for name, weight in weights.items():
                    if weight.grad is not None:
                        weight.grad.masked_fill_(~mask[name], math.nan)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(bits(ours["b"]), bits(start["b"])), "it had no gradient"
    for name, weight in ours.items():
        inside = torch.ones(SHAPES[name], dtype=torch.bool) if mask is None else mask[name]
        assert torch.equal(bits(weight[~inside]), bits(start[name][~inside])), name
        assert name == "b" or not inside.any() or (weight != start[name])[inside].any()
        torch.testing.assert_close(weight, reference[name], rtol=9 * U, atol=252 * U * LR)
    state = one.state[ours["w"]].get("momentum_buffer")
    assert (state is None) == (momentum == 0) and (state is None or len(state) == one._fused.num_masked(ours["w"]))


def test_a_step_of_sgd_is_one_launch(monkeypatch):
    launches = []
    plain = cuda.Fused._launch
    monkeypatch.setattr(cuda.Fused, "_launch", lambda *a, **k: (launches.append(a[1]), plain(*a, **k)))
    weights = weights_of(torch.float32)
    optimizer = MaskedSGD(weights, mask_of(0.5), lr=LR)
    backward(weights, 0)
    launches.clear()
    optimizer.step()
    assert len(launches) == 1
    optimizer.state[weights["w"]]["momentum_buffer"] = torch.zeros(SHAPES["w"])  # as a CPU leaves it
    with pytest.raises(EraseError, match="made on a CPU"):
        optimizer.step()


def test_what_does_not_fit_takes_the_other_path():
    """Mixed dtypes and channels-last weights."""
    mixed = {"a": Parameter(torch.ones(3)), "b": Parameter(torch.ones(3).bfloat16())}
    last = {"w": Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))}
    for weights in (mixed, last):
        assert not isinstance(MaskedAdam(weights, None)._engine, cuda.Fused)
        assert MaskedSGD(weights, None, lr=LR)._fused is None


@pytest.mark.filterwarnings("error")
def test_a_kernel_that_fails_leads_to_the_other_path_and_a_warning_of_triton_does_not(monkeypatch):
    """Every kernel is tried, so that none fails for the first time in the middle of a run."""
    where = torch.device("cpu")

    def warns(*arguments: Any, **options: Any) -> None:
        warnings.warn("of Triton", UserWarning, stacklevel=1)

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("ptxas is missing")

    for name in ("take", "exchange", "gather", "adam", "sgd"):
        plain = getattr(cuda.Fused, name)

        def warned(self: Any, *arguments: Any, plain: Any = plain, **options: Any) -> Any:
            warns()
            return plain(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(cuda.Fused, name, warned)
            assert cuda._compiles.__wrapped__(where)
            patch.setattr(cuda.Fused, name, fails)
            with pytest.warns(UserWarning, match=r"Triton cannot be used \(ptxas is missing\)"):
                assert not cuda._compiles.__wrapped__(where)
