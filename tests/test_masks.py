"""Laws of the mask engine, on tensors of a few weights; golden values are numpy's, by the published formulas."""

import hashlib
import math
import resource
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from erase import files, masks, tensor_files
from erase.errors import EraseError
from erase.masks import Mask, Saliency, selection

MEGABYTE = 2**20


def golden_scores() -> dict[str, torch.Tensor]:
    random = np.random.RandomState(0)
    arrays = {"w": random.randn(64, 33), "b": random.randn(17), "c": 10 * random.randn(8, 4, 3, 3)}
    return {name: torch.from_numpy(array).abs().float() for name, array in arrays.items()}


def by_double_argsort(scores: Mapping[str, torch.Tensor], *densities: float, largest: bool = True) -> list[Mask]:
    """The definition: a weight is chosen when its place in a stable sort of all scores is below int(N * density)."""
    everything = torch.cat([score.reshape(-1).float() for score in scores.values()]).numpy() + 0.0
    order = np.argsort(-everything if largest else everything, kind="stable")
    place = np.argsort(order, kind="stable")

    def mask(density: float) -> Mask:
        chosen = torch.from_numpy(place < int(everything.size * density))
        parts = chosen.split([score.numel() for score in scores.values()])
        return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}

    return [mask(density) for density in densities]


def assert_same(mask: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(mask) == list(expected)
    for name, bits in mask.items():
        assert bits.dtype == torch.bool and bits.shape == expected[name].shape
        assert torch.equal(bits, expected[name]), name


def digest(mask: Mask) -> tuple[str, str]:
    bits = np.concatenate([tensor.numpy().reshape(-1) for tensor in mask.values()]).astype(np.uint8)
    return tuple(hashlib.sha256(data.tobytes()).hexdigest()[:16] for data in (bits, np.packbits(bits)))  # type: ignore


def awkward_scores() -> dict[str, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).abs()

    return {
        "normal": {"a": normal(31, 7), "b": normal(5)},
        "ties": {"a": torch.randint(0, 4, (40, 9), generator=random).float(), "b": torch.tensor([2.0] * 11)},
        "zeros": {"a": normal(300).where(torch.rand(300, generator=random) < 0.3, 0.0), "b": torch.zeros(3, 3)},
        "signed zeros": {"a": torch.tensor([-0.0, 0.0] * 20), "b": torch.tensor([0.0, -0.0, 1.0])},
        "equal": {"a": torch.full((17, 3), 0.25), "b": torch.full((4,), 0.25)},
        "subnormal": {"a": normal(200) * 1e-44, "b": normal(20) * 1e-39},
        "extremes": {"a": torch.tensor([3.4028234e38, 1.4e-45, 0.0, 1.0]), "b": torch.exp(40 * normal(90) - 40)},
        "tiny tensors": {str(i): normal(i % 4) for i in range(60)},
        "no dimension, no weight": {
            "a": torch.tensor(0.5),
            "b": torch.zeros(0, 3),
            "c": normal(1),
            "d": torch.tensor(0.5),
        },
        "strided": {"a": normal(6, 50).T, "b": normal(4, 3, 2, 2).to(memory_format=torch.channels_last)},
        "bfloat16": {"a": normal(300).bfloat16(), "b": normal(300)},
    }


# Accumulation


def backward(parameters: Mapping[str, Parameter], *gradients: np.ndarray) -> None:
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.grad = torch.from_numpy(gradient).to(parameter.dtype)


def test_scores_are_the_published_sums():
    """P5: sum |sum_b g| = 3221.764858, sum sum_b |g| = 12752.643866, and their best halves share 261 of 500 weights.

    float32 accumulation of 16 terms is exact to about 1e-7.
    """
    gradients = np.random.RandomState(1).randn(16, 1000)
    chosen, totals = {}, {}
    for score in ("abs_sum", "sum_abs", "sum_sq"):
        parameters = {"w": Parameter(torch.zeros(1000))}
        accumulated = Saliency(parameters, score)
        for gradient in gradients:
            backward(parameters, gradient)
            accumulated.add()
            assert parameters["w"].grad is None
        scores = accumulated.scores()
        totals[score] = scores["w"].double().sum().item()
        chosen[score] = masks.select(scores, 0.5)
    assert totals["abs_sum"] == pytest.approx(3221.764858, rel=1e-6)
    assert totals["sum_abs"] == pytest.approx(12752.643866, rel=1e-6)
    assert totals["sum_sq"] == pytest.approx((gradients**2).sum(), rel=1e-6)
    assert (chosen["abs_sum"]["w"] & chosen["sum_abs"]["w"]).sum() == 261
    assert masks.iou(chosen["abs_sum"], chosen["sum_abs"]) == 261 / (1000 - 261)
    assert masks.iou(chosen["abs_sum"], chosen["abs_sum"]) == 1


@pytest.mark.parametrize("score", ["abs_sum", "sum_abs", "sum_sq"])
def test_gradients_collected_as_they_come_give_the_scores_of_whole_ones_bit_for_bit(score):
    """Ten layers, three passes; when a gradient comes, the others are gone. Control: without hooks all stay."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=False) for _ in range(10)))
    parameters = dict(layers.named_parameters())
    seen: list[int] = []

    def look(_: torch.Tensor) -> None:
        seen.append(sum(parameter.grad is not None for parameter in parameters.values()))

    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(look)  # comes before the collector's own
    slow, fast = Saliency(parameters, score), Saliency(parameters, score)
    batches = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    for batch in batches:
        layers(batch).square().sum().backward()
        slow.add()
    assert max(seen) == 10
    seen.clear()
    with fast.collecting():
        for batch in batches:
            layers(batch).square().sum().backward()
    assert seen == [1] * 30
    fast_scores, slow_scores = fast.scores(), slow.scores()
    for name in parameters:
        assert torch.equal(fast_scores[name], slow_scores[name]) and fast_scores[name].any()
    with pytest.raises(AssertionError):  # the scores are the sums: adding to them would be wrong
        parameters["0.weight"].grad = torch.ones(6, 6)
        slow.add()


def test_a_packed_mask_is_the_mask_in_an_eighth_of_its_size():
    mask = {"w": torch.rand(5, 33) < 0.3, "s": torch.tensor(True), "b": torch.zeros(8, dtype=torch.bool)}
    packed = masks.pack(mask)
    assert list(packed) == list(mask) and len(packed) == 3 and masks.pack(packed) is packed
    assert all(torch.equal(packed[name], bits) for name, bits in mask.items())
    assert [bits.numel() for bits in packed.bits.values()] == [21, 1, 1]
    assert masks.iou(packed, mask) == 1
    assert masks.count(packed) == masks.count(mask) > 1


def test_a_missing_gradient_counts_as_zero():
    parameters = {"used": Parameter(torch.zeros(2)), "unused": Parameter(torch.zeros(3))}
    accumulated = Saliency(parameters)
    parameters["used"].grad = torch.tensor([-1.0, 2.0])
    accumulated.add()
    assert accumulated.scores()["used"].tolist() == [1, 2]
    assert accumulated.scores()["unused"].tolist() == [0, 0, 0]


def test_small_half_precision_gradients_are_not_lost():
    """In bfloat16 1 + 2^-10 is 1; the control shows it."""
    parameters = {"w": Parameter(torch.zeros(1, dtype=torch.bfloat16))}
    accumulated, control = Saliency(parameters), torch.zeros(1, dtype=torch.bfloat16)
    for gradient in [1.0] + [2.0**-10] * 64:
        parameters["w"].grad = torch.full((1,), gradient, dtype=torch.bfloat16)
        control += parameters["w"].grad
        accumulated.add()
    assert accumulated.scores()["w"].dtype == torch.float32
    assert accumulated.scores()["w"].item() == 1 + 64 * 2.0**-10
    assert control.item() == 1


@pytest.mark.parametrize("score", ["abs_sum", "sum_abs", "sum_sq"])
def test_interrupted_accumulation_continues_bit_for_bit(score, tmp_path):
    gradients = np.random.RandomState(2).randn(6, 50)

    def run(accumulated: Saliency, rows: np.ndarray) -> None:
        for gradient in rows:
            backward(accumulated.parameters, gradient)
            accumulated.add()

    whole = Saliency({"w": Parameter(torch.zeros(50))}, score)
    run(whole, gradients)
    first = Saliency({"w": Parameter(torch.zeros(50))}, score)
    run(first, gradients[:2])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Saliency({"w": Parameter(torch.zeros(50))}, score)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not torch.equal(second.state_dict()["sums"]["w"], whole.state_dict()["sums"]["w"])
    run(second, gradients[2:])
    assert torch.equal(second.scores()["w"], whole.scores()["w"])


def test_a_state_of_other_tensors_or_another_score_is_refused():
    state = Saliency({"w": Parameter(torch.zeros(4))}).state_dict()
    with pytest.raises(EraseError, match="'abs_sum'.*'sum_sq'"):
        Saliency({"w": Parameter(torch.zeros(4))}, "sum_sq").load_state_dict(state)
    with pytest.raises(EraseError, match="other tensors"):
        Saliency({"v": Parameter(torch.zeros(4))}).load_state_dict(state)
    with pytest.raises(EraseError, match="other tensors"):
        Saliency({"w": Parameter(torch.zeros(5))}).load_state_dict(state)
    with pytest.raises(EraseError, match="unknown score 'median'; one of abs_sum, sum_abs, sum_sq"):
        Saliency({}, "median")  # type: ignore


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", ["abs_sum", "sum_sq"])
def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_tensor(score, value):
    parameters = {"fine": Parameter(torch.zeros(2)), "attn2.to_k.weight": Parameter(torch.zeros(2))}
    accumulated = Saliency(parameters, score)
    parameters["attn2.to_k.weight"].grad = torch.tensor([1.0, value])
    accumulated.add()
    with pytest.raises(EraseError, match="'attn2.to_k.weight' has a score of (nan|inf)"):
        accumulated.scores()


# Selection


@pytest.mark.parametrize(
    "density, k, kth, ones, hashes",
    [
        (0.5, 1208, 0.7679024077327037, {"w": 928, "b": 7, "c": 273}, ("93651fc6d2a9f889", "b5990c03f18dcb0d")),
        (0.3, 725, 1.2248705641936597, {"w": 457, "b": 5, "c": 263}, ("13809c96cbe8127f", "eb34ee1051f4945c")),
    ],
)
def test_selection_equals_the_golden_masks(density, k, kth, ones, hashes):
    """P1; the threshold is the k-th largest score of all tensors together."""
    scores = golden_scores()
    mask = masks.select(scores, density)
    assert masks.count(mask) == k
    assert {name: int(bits.sum()) for name, bits in mask.items()} == ones
    assert digest(mask) == hashes
    assert min(scores[name][bits].min().item() for name, bits in mask.items()) == pytest.approx(kth, rel=1e-7)


@pytest.mark.parametrize("total, density, k", [(10, 0.3, 3), (10, 0.7, 7), (7, 0.5, 3), (3, 0.1, 0), (5, 1.0, 5)])
def test_the_mask_has_exactly_the_floor_of_n_times_density_ones(total, density, k):
    """P2, in double arithmetic: 10 * 0.7 is 7.0 and 859520964 * 0.5 is 429760482.0, but int(0.29 * 100) is 28."""
    scores = {"w": torch.arange(total).float()}
    assert masks.count(masks.select(scores, density)) == k
    assert masks.count(masks.select(scores, density, largest=False)) == k
    assert masks.count(masks.random_mask({"w": (total,)}, density, 0)) == k


def test_ties_go_to_the_lower_index():
    """P3: of 10 000 zeros and 10 positive scores at one half, the 10 and the first 4 995 zeros."""
    scores = {"a": torch.zeros(10_010)}
    scores["a"][1000::1001] = torch.arange(1.0, 11)
    mask = masks.select(scores, 0.5)["a"]
    assert mask[scores["a"] > 0].all() and mask.sum() == 5005
    zeros = mask[scores["a"] == 0]
    assert zeros[:4995].all() and not zeros[4995:].any()


@pytest.mark.parametrize("sizes", [None, (8, 4, 16), (1, 100, 64)])
@pytest.mark.parametrize("kind", awkward_scores())
@pytest.mark.parametrize("largest", [True, False])
def test_selection_equals_a_stable_double_argsort(kind, largest, sizes, monkeypatch):
    """With the true sizes, and with a sample, chunks and buckets so small that every refinement is walked."""
    if sizes:
        for constant, size in zip(("SAMPLE", "CHUNK", "BUCKETS"), sizes, strict=True):
            monkeypatch.setattr(selection, constant, size)
    scores, densities = awkward_scores()[kind], (0.01, 0.1, 0.5, 0.77, 1.0)
    expected = by_double_argsort(scores, *densities, largest=largest)
    for density, mask in zip(densities, expected, strict=True):
        assert_same(masks.select(scores, density, largest=largest), mask)
        assert_same(dict(masks.select_packed(scores, density, largest=largest)), mask)


@pytest.mark.parametrize("kind", ["normal", "70 % zeros", "four values", "wide", "the sample is misled"])
def test_selection_of_many_chunks_equals_a_stable_double_argsort(kind):
    """1.4 million scores: more than a chunk, and far more than the sample."""
    random = torch.Generator().manual_seed(3)
    score = torch.randn(1_400_000, generator=random).abs_()
    if kind == "70 % zeros":
        score[torch.rand(score.shape, generator=random) < 0.7] = 0
    elif kind == "four values":
        score = score.clamp(max=3).floor()
    elif kind == "wide":
        score = torch.exp(15 * torch.randn(score.shape, generator=random))
    elif kind == "the sample is misled":
        score[selection._spread(len(score), selection.SAMPLE)] *= 100
    scores = {"a": score[:7].view(7, 1), "b": score[7:1_200_001].view(-1, 2), "c": score[1_200_001:]}
    for density, mask in zip((0.02, 0.5, 0.9), by_double_argsort(scores, 0.02, 0.5, 0.9), strict=True):
        assert_same(masks.select(scores, density), mask)


def test_the_inverse_mask_is_the_complement_where_nothing_ties():
    scores = golden_scores()
    most, least = masks.select(scores, 0.25), masks.select(scores, 0.75, largest=False)
    assert masks.count(most) + masks.count(least) == 2417 - 1  # two floors
    assert masks.iou(most, least) == 0


@pytest.mark.parametrize("kind", ["normal", "ties", "tiny tensors", "no dimension, no weight"])
def test_per_tensor_selection_is_the_selection_of_each_tensor_alone(kind):
    scores = awkward_scores()[kind]
    mask = masks.select(scores, 0.4, per_tensor=True)
    for name, score in scores.items():
        assert mask[name].sum() == int(score.numel() * 0.4)
        assert_same({name: mask[name]}, by_double_argsort({name: score}, 0.4)[0])
    assert_same(dict(masks.select_packed(scores, 0.4, per_tensor=True)), mask)
    assert masks.iou(mask, masks.select(scores, 0.4)) < 1


def test_masks_do_not_depend_on_the_number_of_threads():
    scores = {"a": torch.randn(700_000, generator=torch.Generator().manual_seed(0)).abs(), "b": torch.zeros(300_000)}
    threads = torch.get_num_threads()
    made = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            made += [masks.select(scores, 0.8), masks.random_mask({"a": (900, 900)}, 0.3, 5)]
    finally:
        torch.set_num_threads(threads)
    assert_same(made[0], made[2])
    assert_same(made[1], made[3])


def test_selection_leaves_the_scores_as_they_were():
    scores = awkward_scores()["signed zeros"]
    before = {name: score.clone().view(torch.int32) for name, score in scores.items()}
    masks.select(scores, 0.5)
    assert all(torch.equal(score.view(torch.int32), before[name]) for name, score in scores.items())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, 50, math.nan])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(EraseError, match=rf"density {density} .*\(0, 1\]"):
        masks.select(golden_scores(), density)
    with pytest.raises(EraseError, match=rf"density {density} .*\(0, 1\]"):
        masks.random_mask({"w": (3,)}, density, 0)


@pytest.mark.parametrize("value, shown", [(math.nan, "nan"), (-math.nan, "nan"), (math.inf, "inf"), (-1.0, "-1.0")])
def test_a_score_that_is_no_magnitude_is_an_error_that_names_the_tensor(value, shown):
    """P4."""
    scores = golden_scores()
    scores["c"].view(-1)[100] = value
    with pytest.raises(EraseError, match=f"'c' has a score of {shown}"):
        masks.select(scores, 0.5)


# Random masks


def test_random_masks_are_exact_and_follow_the_seed():
    shapes = {"w": (64, 33), "b": [17], "c": (8, 4, 3, 3), "s": ()}
    mask = masks.random_mask(shapes, 0.5, seed=7)
    assert {name: tuple(bits.shape) for name, bits in mask.items()} == {n: tuple(s) for n, s in shapes.items()}
    assert masks.count(mask) == 2418 // 2
    assert_same(masks.random_mask(shapes, 0.5, seed=7), mask)
    assert masks.iou(masks.random_mask(shapes, 0.5, seed=8), mask) == pytest.approx(1 / 3, abs=0.05)
    per_tensor = masks.random_mask(shapes, 0.5, seed=7, per_tensor=True)
    assert [int(bits.sum()) for bits in per_tensor.values()] == [1056, 8, 144, 0]


def test_random_masks_choose_every_weight_equally_often():
    """400 draws of 3 in 10: each count is binomial, mean 120, deviation 9.2; five deviations are 46."""
    chosen = torch.stack([masks.random_mask({"a": (4,), "b": (6,)}, 0.3, seed)["b"] for seed in range(400)])
    assert ((chosen.sum(0) - 120).abs() < 46).all()


def test_a_random_mask_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    masks.random_mask({"w": (5,)}, 0.5, 0)
    assert torch.equal(torch.get_rng_state(), state)


# Files


def test_a_mask_comes_back_exactly_in_one_bit_a_weight(tmp_path):
    mask = masks.random_mask({"z": (300, 301), "a": (5,), "scalar": (), "empty": (0, 4)}, 0.3, 0)
    masks.save(tmp_path / "mask.safetensors", mask, {"density": 0.3, "seed": 0})
    loaded, header = masks.load(tmp_path / "mask.safetensors")
    assert_same(loaded, mask)
    assert header.total == 90_306 and header.ones == masks.count(mask) == 27_091
    assert header.made == {"density": 0.3, "seed": 0}
    assert header.shapes["z"] == (300, 301)
    assert (tmp_path / "mask.safetensors").stat().st_size < 90_306 / 8 + 1000
    masks.save(tmp_path / "again.safetensors", loaded, {"density": 0.3, "seed": 0})
    assert files.file_hash(tmp_path / "again.safetensors") == files.file_hash(tmp_path / "mask.safetensors")


def test_a_mask_of_version_0_1_0_is_read():
    """The file was written by that version's code; it has no format number."""
    path = Path(__file__).parent / "old" / "mask-0.1.0.safetensors"
    mask, header = masks.load(path)
    expected = {
        "attn2.to_k.weight": torch.arange(12).reshape(3, 4) % 3 == 0,
        "conv.bias": torch.tensor([1, 0, 0, 0, 1]),
    }
    assert all(torch.equal(mask[name], bits.bool()) for name, bits in expected.items())
    assert header.made["density"] == 0.35 and (header.ones, header.total) == (6, 17)
    assert header.as_json() == tensor_files.read_metadata(path) | {"format": 1}


def test_fields_of_a_later_mask_are_kept_and_its_format_is_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    masks.save(path, {"w": torch.ones(20, dtype=torch.bool)}, {"density": 1.0, "licence": ["MIT"]})
    mask, header = masks.load(path)
    assert header.made == {"density": 1.0, "licence": ["MIT"]}
    tensor_files.write_tensors(path, mask.bits, header.as_json() | {"format": 2})
    with pytest.raises(EraseError, match="has mask format 2, which a later version wrote; this one reads up to 1"):
        masks.load(path)


def test_a_damaged_or_foreign_mask_file_is_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    masks.save(path, {"w": torch.ones(20, dtype=torch.bool)}, {})
    header, packed = tensor_files.read_metadata(path), tensor_files.read_tensors(path)
    masks.load(path)
    tensor_files.write_tensors(path, {"w": packed["w"][:2]}, header)
    with pytest.raises(EraseError, match="'w' has 2 bytes where 20 weights take 3"):
        masks.load(path)
    tensor_files.write_tensors(path, {"w": packed["w"] & 127}, header)
    with pytest.raises(EraseError, match="17 ones.*20"):
        masks.load(path)
    tensor_files.write_tensors(path, {"v": packed["w"]}, header)
    with pytest.raises(EraseError, match="names of its tensors"):
        masks.load(path)
    tensor_files.write_tensors(path, packed)
    with pytest.raises(EraseError, match="not a mask"):
        masks.load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EraseError, match="not a whole safetensors file"):
        masks.load(path)


def test_a_mask_of_another_model_is_refused():
    mask = {"attn2.to_k.weight": torch.ones(4, 4, dtype=torch.bool)}
    header = {"base": "sd14", "base_hash": "a" * 64}
    fits = {"attn2.to_k.weight": torch.zeros(4, 4), "more": torch.zeros(2)}
    masks.check(mask, header, fits, base_hash="a" * 64)
    masks.check(mask, header, fits)
    masks.check(mask, {}, fits, base_hash="b" * 64)
    message = "'attn2.to_k.weight' has 64 weights here but 16 in the mask, which was made for sd14"
    with pytest.raises(EraseError, match=message):
        masks.check(mask, header, {"attn2.to_k.weight": torch.zeros(8, 8)})
    with pytest.raises(EraseError, match=r"shape \[2, 8\] here but \[4, 4\] in the mask"):
        masks.check(mask, header, {"attn2.to_k.weight": torch.zeros(2, 8)})
    with pytest.raises(EraseError, match="'attn2.to_k.weight' is in the mask, which was made for sd14, but not here"):
        masks.check(mask, header, {"to_k": torch.zeros(4, 4)})
    with pytest.raises(EraseError, match=f"{'a' * 12}, but this model is {'b' * 12}"):
        masks.check(mask, header, fits, base_hash="b" * 64)


def test_the_reference_layout_comes_and_goes(tmp_path):
    """P16: integer zeros and ones under the other code's names; a float or boolean mask is read as well."""
    mask = masks.random_mask({"conv.weight": (4, 3, 3, 3), "conv.bias": (4,)}, 0.5, 0)
    path = tmp_path / "with_0.5.pt"
    masks.save_reference(path, mask, lambda name: name.replace("conv", "input_blocks.0.0"))
    stored = torch.load(path, weights_only=True)
    assert list(stored) == ["input_blocks.0.0.weight", "input_blocks.0.0.bias"]
    assert all(bits.dtype == torch.int64 for bits in stored.values())
    assert sum(int(bits.sum()) for bits in stored.values()) == masks.count(mask)

    def back(name: str) -> str:
        return name.replace("input_blocks.0.0", "conv")

    assert_same(masks.load_reference(path, back), mask)
    torch.save({name: bits.float() for name, bits in stored.items()}, path)
    assert_same(masks.load_reference(path, back), mask)


def test_a_file_that_is_no_reference_mask_is_refused(tmp_path):
    path = tmp_path / "mask.pt"
    with pytest.raises(EraseError, match="no such file"):
        masks.load_reference(path, str)
    torch.save({"w": torch.tensor([0, 1, 2])}, path)
    with pytest.raises(EraseError, match="'w' .*other than 0 and 1"):
        masks.load_reference(path, str)
    torch.save({"w": [0, 1]}, path)
    with pytest.raises(EraseError, match="not a mask"):
        masks.load_reference(path, str)
    torch.save(torch.tensor([0, 1]), path)
    with pytest.raises(EraseError, match="not a mask"):
        masks.load_reference(path, str)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(EraseError, match="cannot be read"):
        masks.load_reference(path, str)


def test_shares_of_blocks_add_up():
    mask = {
        "up.0.weight": torch.tensor([True, False]),
        "up.1.weight": torch.tensor([True]),
        "mid.weight": torch.tensor([False, False, False]),
    }
    assert masks.fraction_by_block(mask, lambda name: name.split(".")[0]) == {"up": (2, 3), "mid": (0, 3)}


def test_a_packed_selection_never_holds_two_tensors_in_bools(monkeypatch):
    scores = {name: torch.rand(1000, generator=torch.Generator().manual_seed(0)) for name in "abc"}
    living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts = []
    make = torch.empty_like

    def counted(tensor: torch.Tensor, **how: Any) -> torch.Tensor:
        made = make(tensor, **how)
        living.add(made)
        counts.append(len(living))
        return made

    monkeypatch.setattr(torch, "empty_like", counted)
    packed = masks.select_packed(scores, 0.5)
    assert max(counts) <= 2 and masks.count(packed) == 1500  # the second is made before the first one's name is free
    counts.clear()
    mask = masks.select(scores, 0.5)
    assert counts == [1, 2, 3] and masks.count(mask) == 1500  # control


@pytest.mark.slow
def test_a_hundred_million_scores_are_selected_exactly_in_little_memory():
    """The threshold is numpy's partition; beside the mask the process grows by a tenth of a byte a score."""
    total, k = 10**8, 5 * 10**7
    score = torch.randn(total, generator=torch.Generator().manual_seed(0)).abs_()
    masks.select({"warm": score[:1000]}, 0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mask = masks.select({"a": score[: total // 3], "b": score[total // 3 :]}, 0.5)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 1.1 * total + 64 * MEGABYTE
    kth = np.partition(score.numpy(), total - k)[total - k]
    chosen = torch.cat([mask["a"], mask["b"]])
    assert chosen.sum() == k
    assert score[chosen].min() >= kth and score[~chosen].max() <= kth
