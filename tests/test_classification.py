"""Laws of unlearning for classifiers, on a tiny network; golden values are those of SalUn's formulas."""

import copy
import hashlib
import json
import pickle
import shutil
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from erase import delta, files, masks, tensor_files
from erase.classification import data, methods, networks, records, run, split
from erase.classification.data import Dataset, Images
from erase.classification.descent import Recipe, computing, descend, saliency_scores
from erase.classification.methods import Plan, boundary, gradients, influence, l1_sparse, random_label
from erase.classification.methods import soft_threshold as soft
from erase.classification.networks import Shape
from erase.classification.presets import PRESETS, TUNED
from erase.classification.settings import NETWORKS, Settings
from erase.errors import EraseError
from erase.optim.sgd import MaskedSGD

METHODS = [name for name, preset in PRESETS.items() if preset.method]
# no padding, because a crop would change the labels
RECIPE = Recipe(epochs=2, learning_rate=0.05, batch_size=8, batch_norm="frozen", flip=True)
NUM_CLASSES = 3


def toy_images(n: int = 30, seed: int = 0) -> Images:
    """Images of 4 x 4 whose class is the brightest of their first three rows."""
    x = torch.randint(0, 120, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    y = torch.arange(n) % NUM_CLASSES
    x[torch.arange(n), 0, y] += 120
    return Images(x, y)


def toy_dataset(**changes: Any) -> Dataset:
    return Dataset("toy", toy_images(30), toy_images(12, seed=1), ("a", "b", "c"), (0.3,), (0.3,), **changes)


def toy_model(seed: int = 0) -> nn.Sequential:
    """With batch normalisation and dropout, because both depend on the mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stem = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*stem, nn.Dropout(0.0), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES)).eval()


@pytest.fixture(scope="module")
def trained_state() -> dict[str, Tensor]:
    model = toy_model()
    run.train(model, toy_images(), replace(RECIPE, epochs=10), seed=0, num_classes=NUM_CLASSES)
    return model.state_dict()


def trained(state: dict[str, Tensor]) -> nn.Sequential:
    model = toy_model()
    model.load_state_dict(state)
    return model


def method_of(name: str) -> Any:
    return methods.make(methods.find(name), name, {})


def random_mask(model: nn.Module, density: float = 0.5) -> masks.Mask:
    return masks.random_mask({name: tuple(p.shape) for name, p in model.named_parameters()}, density, seed=3)


def unlearn(model: nn.Module, name: str, recipe: Recipe = RECIPE, **how: Any) -> None:
    images = toy_images()
    how = {"num_classes": NUM_CLASSES, "seed": 5} | how
    run.unlearn(model, images[slice(0, 9)], images[slice(9, 30)], method_of(name), recipe, **how)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert delta.content_hash(one) == delta.content_hash(other)


# Laws of every method


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", METHODS)
def test_weights_outside_the_mask_and_buffers_do_not_move_by_one_bit(name, optimizer, trained_state):
    model = trained(trained_state)
    mask = random_mask(model)
    unlearn(model, name, replace(RECIPE, optimizer=optimizer), mask=mask)
    moved = {key: delta.difference({key: old}, {key: model.state_dict()[key]}) for key, old in trained_state.items()}
    num = 0
    for key, change in moved.items():
        if key in mask:
            where = trained_state[key] != model.state_dict()[key]
            assert not (where & ~mask[key]).any(), key
            num += int(where.sum())
        else:
            assert not change.changed, key
    assert num > 0
    control = trained(trained_state)
    unlearn(control, name, replace(RECIPE, optimizer=optimizer))
    outside = [(control.state_dict()[key] != trained_state[key])[~bits].any() for key, bits in mask.items()]
    assert any(outside)


@pytest.mark.parametrize("name", ["salun", "salun-soft", "bs"])
def test_bf16_computes_in_bf16_and_outside_the_mask_no_bit_moves(name, trained_state):
    model, mask, seen, ends = trained(trained_state), random_mask(toy_model()), set(), {}
    model[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    for label, precision in (("float32", "fp32"), ("bf16", "bf16"), ("again", "bf16")):
        model.load_state_dict(trained_state)
        seen.clear()
        unlearn(model, name, replace(RECIPE, precision=precision), mask=mask)
        assert (torch.bfloat16 in seen) == (precision == "bf16")
        ends[label] = {key: value.clone() for key, value in model.state_dict().items()}
    assert_same(ends["bf16"], ends["again"])
    for key, bits in mask.items():
        assert ends["bf16"][key].dtype == torch.float32
        assert torch.equal(ends["bf16"][key][~bits], trained_state[key][~bits]), key
    moved = {k: torch.cat([(end[key] - trained_state[key])[mask[key]] for key in mask]) for k, end in ends.items()}
    assert 0.9 < torch.cosine_similarity(moved["float32"], moved["bf16"], dim=0) < 1 - 1e-7


def test_a_model_that_computes_in_bf16_answers_in_float32_and_its_copies_call_themselves(trained_state):
    model, x = trained(trained_state), toy_images().pixels
    plain = model(x)
    with computing(model, "bf16"):
        copied = copy.deepcopy(model)
        nn.init.zeros_(copied[-1].weight)  # pyright: ignore
        answer = model(x)
        assert answer.dtype == torch.float32 and not torch.equal(answer, plain)
        assert torch.allclose(answer, plain, atol=0.1)
        assert len(copied(x).unique(dim=0)) == 1
    assert torch.equal(model(x), plain)
    scores = [saliency_scores(model, toy_images(), precision=precision) for precision in ("fp32", "bf16")]
    assert not torch.equal(scores[0]["0.weight"], scores[1]["0.weight"])
    assert torch.allclose(scores[0]["0.weight"], scores[1]["0.weight"], rtol=0.1, atol=1e-2)


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_weights(name, trained_state):
    models = [trained(trained_state) for _ in range(2)]
    for number, model in enumerate(models):
        torch.manual_seed(number)  # nobody draws from torch's own generator
        unlearn(model, name)
    assert_same(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("iu", "fisher")])
def test_no_epochs_change_nothing(name, trained_state):
    model = trained(trained_state)
    unlearn(model, name, replace(RECIPE, epochs=0))
    assert_same(model.state_dict(), trained_state)


@pytest.mark.parametrize("name", METHODS)
def test_save_load_apply_is_exact_and_remove_restores(name, trained_state, tmp_path):
    model = trained(trained_state)
    unlearn(model, name, mask=random_mask(model))
    delta.save(tmp_path / "delta.safetensors", delta.difference(trained_state, model.state_dict()))
    change = delta.load(tmp_path / "delta.safetensors")
    assert_same(delta.apply(trained_state, change), model.state_dict())
    assert_same(delta.remove(model.state_dict(), change), trained_state)


@pytest.mark.parametrize("name", METHODS)
def test_modes_and_gradients_are_left_as_they_were_found(name, trained_state):
    model = trained(trained_state)
    model.train()
    model[4].eval()
    model[0].weight.requires_grad_(False)
    unlearn(model, name, mask={key: bits for key, bits in random_mask(model).items() if key != "0.weight"})
    assert [module.training for module in model] == [True] * 4 + [False] + [True] * 3
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["salun", "ft"])
def test_moving_statistics_change_outside_any_mask_and_frozen_ones_do_not(name, trained_state):
    for batch_norm, is_moved in (("frozen", False), ("moving", True)):
        model = trained(trained_state)
        unlearn(model, name, replace(RECIPE, batch_norm=batch_norm), mask=random_mask(model))
        buffers = [name for name, _ in model.named_buffers()]
        assert len(buffers) == 3
        assert any((model.state_dict()[key] != trained_state[key]).any() for key in buffers) == is_moved


def test_nothing_to_move_moves_nothing(trained_state):
    model = trained(trained_state)
    nothing = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    unlearn(model, "salun", mask=nothing)
    assert_same(model.state_dict(), trained_state)


def test_salun_forgets_a_class_and_keeps_the_others(trained_state):
    """The control is the model before: it knows them all."""
    images, model, shares = toy_images(), trained(trained_state), []
    forget, retain = images[images.y == 0], images[images.y != 0]
    recipe = Recipe(epochs=10, learning_rate=0.01, batch_size=8, batch_norm="frozen")
    for num_epochs in (0, 10):
        recipe = replace(recipe, epochs=num_epochs)
        run.unlearn(model, forget, retain, method_of("salun"), recipe, num_classes=NUM_CLASSES, seed=5)
        shares.append([(model(part.pixels).argmax(1) == part.y).float().mean().item() for part in (forget, retain)])
    assert shares[0] == [1, 1]
    assert shares[1][0] < 0.2 and shares[1][1] > 0.9


# Formulas


def test_random_labels_are_never_the_truth_and_all_others_are_as_likely():
    """P26: uniform over the other 9 classes; as in SalUn's code over all 10, so that one in ten is the truth.

    The tolerance is five standard deviations of a share in 9,000 draws.
    """
    y, generator = torch.arange(9000) % 10, torch.Generator().manual_seed(0)
    labels = random_label.random_labels(y, 10, generator)
    assert not (labels == y).any()
    shares = torch.bincount((labels - y) % 10, minlength=10)[1:] / 9000
    assert torch.allclose(shares, torch.full((9,), 1 / 9), atol=5 * (1 / 9 * 8 / 9 / 9000) ** 0.5)
    either = random_label.random_labels(y, 10, generator, may_be_true=True)
    assert (either == y).float().mean().item() == pytest.approx(0.1, abs=5 * (0.09 / 9000) ** 0.5)


def test_the_vector_for_influence_is_its_closed_form():
    """P23, on a linear model with squared error, whose gradients are known: v = f_sum / n - r_sum f / (n r)."""
    random = np.random.RandomState(0)
    x, y, w = random.randn(7, 4), random.randn(7), random.randn(4)
    gradients = torch.from_numpy((x @ w - y)[:, None] * x)
    found = influence.influence_vector(gradients[:3].sum(0), gradients[3:].sum(0), 3, 4)
    expected = 3 / 7 * (gradients[:3].mean(0) - gradients[3:].mean(0))
    assert torch.allclose(found, expected, rtol=1e-12)


def test_woodfisher_is_the_published_recursion():
    """P22: |k| = 5.002377, k[:3], and almost no turn of the vector at N = 1000."""
    random = np.random.RandomState(4)
    gradients, v = torch.from_numpy(random.randn(20, 30)), torch.from_numpy(random.randn(30))
    k = influence.woodfisher(iter(gradients), v, 1000)
    assert k.norm().item() == pytest.approx(5.002377125958271, rel=1e-9)
    assert k[:3].tolist() == pytest.approx([1.277627491461031, 0.12671701722308218, -1.5776903492522463], rel=1e-9)
    assert torch.cosine_similarity(k, v, dim=0).item() == pytest.approx(0.9999975957759023, rel=1e-9)


def test_the_sparsity_penalty_falls_to_zero_and_stays_there():
    """P24: alpha (1 - e / (E - E0)), 0 from epoch E - E0 on."""
    found = [l1_sparse.l1_weight(0.2, epoch, 10, 2) for epoch in range(10)]
    assert found == [0.2 * (1 - epoch / 8) for epoch in range(8)] + [0, 0]


def test_adversarial_labels_are_those_of_the_moved_image():
    """P25, on a linear model, where the sign of the slope is known; without the truth, the best other class."""
    random = np.random.RandomState(0)
    weight = torch.from_numpy(random.randn(NUM_CLASSES, 16)).float()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, NUM_CLASSES, bias=False))
    model[1].weight = nn.Parameter(weight)
    images = toy_images(50)
    x = images.x.float().reshape(50, -1) / 255
    wrong = (x @ weight.T).softmax(1) - nn.functional.one_hot(images.y, NUM_CLASSES)
    moved = ((x + 0.1 * (wrong @ weight).sign()).clamp(0, 1) * 255).round() / 255
    logits = moved @ weight.T
    found = boundary.adversarial_labels(model, images.pixels, images.y, 0.1, may_be_true=True)
    assert torch.equal(found, logits.argmax(1))
    assert (logits.argmax(1) == images.y).any()
    logits[torch.arange(50), images.y] = -torch.inf
    assert torch.equal(boundary.adversarial_labels(model, images.pixels, images.y, 0.1), logits.argmax(1))


def test_soft_threshold_is_the_published_one():
    """P15: tau = .8037660945765764 leaves 50 zeros and a sum of 27.93604359275173."""
    change = torch.from_numpy(np.random.RandomState(3).randn(101))
    shrunk = soft.soft_threshold({"a": change[:40], "b": change[40:]}, 50)
    everything = torch.cat([shrunk["a"], shrunk["b"]])
    assert (everything == 0).sum() == 50
    assert everything.abs().sum().item() == pytest.approx(27.93604359275173, rel=1e-12)
    assert torch.equal(soft.soft_threshold({"a": change}, 0)["a"], change)


def test_boundary_expanding_keeps_the_head_as_wide_as_it_was(trained_state):
    model = trained(trained_state)
    unlearn(model, "be")
    assert model(toy_images().pixels).shape == (30, NUM_CLASSES)


@pytest.mark.parametrize("density", [None, 0.5])
def test_masked_sgd_is_torchs_inside_and_nothing_outside(density):
    """Momentum and weight decay, five steps; torch's own moves weights whose gradient is masked."""
    torch.manual_seed(0)
    start, gradients = torch.randn(40), torch.randn(5, 40)
    mask = None if density is None else {"w": torch.rand(40) < density}
    ours, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    optimizers = MaskedSGD({"w": ours}, mask, **settings), torch.optim.SGD([plain], **settings)
    for gradient in gradients:
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        if mask is not None:
            ours.grad[~mask["w"]] = torch.nan
        for optimizer in optimizers:
            optimizer.step()
    inside = torch.ones(40, dtype=torch.bool) if mask is None else mask["w"]
    assert torch.equal(ours.detach()[inside], plain.detach()[inside])
    assert torch.equal(ours.detach()[~inside], start[~inside])


def test_step_sizes_follow_their_schedule():
    cosine, steps = (Recipe(8, 1.0, schedule=schedule) for schedule in ("cosine", "steps"))
    assert [round(cosine.learning_rate_at(epoch), 4) for epoch in (0, 2, 4, 6)] == [1, 0.8536, 0.5, 0.1464]
    assert [steps.learning_rate_at(epoch) for epoch in (0, 3, 4, 6)] == pytest.approx([1, 1, 0.1, 0.01])


# Splits


def digest(values: Tensor) -> str:
    return hashlib.sha256(np.sort(values.numpy()).astype(np.int64).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("seed", "first", "train_digest", "forget_digest"),
    [
        (1, [49875, 12262, 29925, 8339, 36408], "7636134f337c6774", "1b1d1cbc669d5b3e"),
        (2, [28059, 13889, 27419, 27821, 37144], "94476f14f338c1d2", "7f8bf3438e2d05e5"),
    ],
)
def test_the_references_split_is_the_published_one(seed, first, train_digest, forget_digest):
    """P19: labels i mod 10, 50,000 images; digests of what is put aside and of what is forgotten."""
    train, forget = split.reference(torch.arange(50000) % 10, seed, 4500)
    aside = torch.from_numpy(np.setdiff1d(np.arange(50000), train.numpy()))
    assert forget[:5].tolist() == first
    assert (digest(aside), digest(forget)) == (train_digest, forget_digest)


def test_the_reference_trains_and_unlearns_on_different_images():
    """P19: 462 of 4,500 forgotten images and 4,026 of 40,500 kept ones were never trained on; 4,488 of the 5,000 that
    training puts aside are unlearned with."""
    labels = torch.arange(50000) % 10
    trained_on, (train, forget) = split.reference(labels, 1, 4500)[0], split.reference(labels, 2, 4500)
    retain = train[~torch.isin(train, forget)]
    assert (~torch.isin(forget, trained_on)).sum() == 462
    assert (~torch.isin(retain, trained_on)).sum() == 4026
    assert (~torch.isin(train, trained_on)).sum() == 4488


def test_a_split_is_exact_repeatable_and_survives_its_file(tmp_path):
    dataset = toy_dataset()
    first, again, other = (split.make(dataset, "20%", seed) for seed in (0, 0, 1))
    assert len(first.forget) == 6 and len(first.retain) == 24 and len(first.test) == 12
    assert not torch.isin(first.forget, first.retain).any()
    assert first.digest == again.digest != other.digest
    first.save(tmp_path / "split.json")
    assert split.make(dataset, str(tmp_path / "split.json"), seed=7).digest == first.digest
    (tmp_path / "list.txt").write_text("3\n1\n2\n")
    assert split.make(dataset, str(tmp_path / "list.txt"), seed=0).forget.tolist() == [1, 2, 3]


def test_the_references_split_of_a_class_forgets_the_class_in_its_training_images():
    """27 of 30 images are trained on, the same as for a share; 9 of them are of the class."""
    dataset = toy_dataset()
    chosen, share = (split.make_reference(dataset, request, 1) for request in ("class:b", "20%"))
    assert (len(chosen.forget), len(chosen.retain), len(chosen.test)) == (9, 18, 8)
    assert (dataset.train.y[chosen.forget] == 1).all() and not (dataset.train.y[chosen.retain] == 1).any()
    trained_on = [torch.cat([one.forget, one.retain]).sort().values for one in (chosen, share)]
    assert torch.equal(*trained_on)
    with pytest.raises(EraseError, match="the reference's split is for a share, like 10%, or a class"):
        split.make_reference(dataset, "list.txt", 1)


@pytest.mark.parametrize("request_", ["class:1", "class:b"])
def test_a_forgotten_class_leaves_the_test_too(request_):
    dataset = toy_dataset()
    chosen = split.make(dataset, request_, seed=0)
    assert (dataset.train.y[chosen.forget] == 1).all() and len(chosen.forget) == 10
    assert not (dataset.test.y[chosen.test] == 1).any() and len(chosen.test) == 8


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("0%", "leaves nothing to forget"),
        ("1%", "leaves nothing to forget"),
        ("100%", "leaves nothing to retain"),
        ("120%", "between 0% and 100%"),
        ("many%", "like 10%"),
        ("class:7", "the classes are 0 to 2: a, b, c"),
        ("nowhere.txt", "no share like 10%, no class like class:3, no file"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(request_, message):
    with pytest.raises(EraseError, match=message):
        split.make(toy_dataset(), request_, seed=0)


@pytest.mark.parametrize(
    ("text", "message"), [("1\n1\n", "twice"), ("1\n30\n", "image 30"), ("one\n", "no positions"), ("{}", "forget")]
)
def test_a_file_that_names_no_images_is_one_line(text, message, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(EraseError, match=message):
        split.make(toy_dataset(), str(tmp_path / "list.txt"), seed=0)


# Data


def test_crops_and_flips_are_windows_of_the_padded_image():
    """Every result is one of the 9 shifts of a padding of 1, mirrored or not; none of them always; same seed, same."""
    x = toy_images(200).x
    once, again = (data.augment(x, 1, True, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(once, again) and once.shape == x.shape and once.dtype == torch.uint8
    padded = nn.functional.pad(x, [1] * 4)
    shifts = [padded[:, :, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    choices = torch.stack([*shifts, *(shift.flip(3) for shift in shifts)])
    found = (choices == once).all(dim=(2, 3, 4))
    assert found.any(0).all() and found.any(1).all()
    assert torch.equal(data.augment(x, 0, False, torch.Generator()), x)


def pickle_as_python_2(value: Any) -> bytes:
    """Protocol 2, the module names of numpy 1, and bytes as Python 2's str: what CIFAR's files are."""
    return pickle.dumps(value, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_arrays(n: int, num_classes: int) -> tuple[np.ndarray, list[int]]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3072), dtype=np.uint8)
    return pixels, [i % num_classes for i in range(n)]


def write_cifar(folder: Path, num_classes: int, layout: str) -> tuple[np.ndarray, list[int]]:
    """Files as the CIFAR page has them, with one training batch."""
    folder.mkdir()
    pixels, labels = cifar_arrays(num_classes, num_classes)
    names = ("data_batch_1", "test_batch") if num_classes == 10 else ("train", "test")
    for name in names:
        if layout == "python":
            key = b"labels" if num_classes == 10 else b"fine_labels"
            content = pickle_as_python_2({b"data": pixels, key: labels, b"batch_label": b"one"})
            (folder / name).write_bytes(content)
        else:
            before = b"" if num_classes == 10 else b"\x05"
            records = (before + struct.pack("B", y) + x.tobytes() for x, y in zip(pixels, labels, strict=True))
            (folder / f"{name}.bin").write_bytes(b"".join(records))
    return pixels, labels


@pytest.mark.parametrize("layout", ["python", "binary"])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_is_read_from_its_own_files(num_classes, layout, tmp_path):
    pixels, labels = write_cifar(tmp_path / "cifar", num_classes, layout)
    dataset = data.load(str(tmp_path / "cifar"), tmp_path)
    assert dataset.name == f"cifar{num_classes}" and len(dataset.classes) == num_classes
    assert np.array_equal(dataset.train.x.numpy(), pixels.reshape(-1, 3, 32, 32))
    assert dataset.test.y.tolist() == labels and dataset.flip and dataset.padding == 4


def test_class_names_come_from_cifars_own_files(tmp_path):
    write_cifar(tmp_path / "cifar", 10, "python")
    names = [f"name{i}".encode() for i in range(10)]
    (tmp_path / "cifar" / "batches.meta").write_bytes(pickle_as_python_2({b"label_names": names}))
    assert data.load(str(tmp_path / "cifar"), tmp_path).classes[3] == "name3"


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "called",)

    write_cifar(tmp_path / "cifar", 10, "python")
    (tmp_path / "cifar" / "test_batch").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(EraseError, match="test_batch is not one of CIFAR's files: it asks for"):
        data.load(str(tmp_path / "cifar"), tmp_path)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not one of CIFAR's files"),
        (b"\x80\x02garbage", "not one of CIFAR's files"),
        (pickle.dumps([1]), "holds no dict"),
        (pickle.dumps({"data": 1}), "no 'data' or no 'labels'"),
        (pickle.dumps({"data": np.zeros((2, 7), np.uint8), "labels": [0, 1]}), r"data uint8 \[2, 7\]"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), "must be 0 to 9"),
    ],
)
def test_a_broken_cifar_file_is_named(content, message, tmp_path):
    write_cifar(tmp_path / "cifar", 10, "python")
    (tmp_path / "cifar" / "test_batch").write_bytes(content)
    with pytest.raises(EraseError, match=message):
        data.load(str(tmp_path / "cifar"), tmp_path)


def test_a_binary_file_of_no_whole_images_and_a_missing_one_are_named(tmp_path):
    write_cifar(tmp_path / "cifar", 10, "binary")
    path = tmp_path / "cifar" / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EraseError, match="test_batch.bin .* is not a whole number of images"):
        data.load(str(tmp_path / "cifar"), tmp_path)
    path.unlink()
    with pytest.raises(EraseError, match="test_batch.bin cannot be read"):
        data.load(str(tmp_path / "cifar"), tmp_path)


def write_folder(folder: Path, parts: tuple[str, ...] = ("train", "test"), size: int = 8) -> None:
    for part in parts:
        for level, name in ((0, "dark"), (255, "light")):
            (folder / part / name).mkdir(parents=True)
            Image.new("RGB", (size, size), (level,) * 3).save(folder / part / name / "0.png")


def test_a_folder_of_images_is_read_class_by_class(tmp_path):
    write_folder(tmp_path)
    dataset = data.load(str(tmp_path), tmp_path)
    assert dataset.classes == ("dark", "light") and dataset.train.y.tolist() == [0, 1]
    assert dataset.train.x.shape == (2, 3, 8, 8) and dataset.train.x[1].min() == 255
    assert dataset.mean == pytest.approx((0.5,) * 3) and dataset.std == pytest.approx((0.5,) * 3)
    assert data.load(str(tmp_path), tmp_path, size=4).size == 4


def test_a_broken_folder_is_one_line(tmp_path):
    write_folder(tmp_path / "a", parts=("train",))
    with pytest.raises(EraseError, match="neither test nor val"):
        data.load(str(tmp_path / "a"), tmp_path)
    (tmp_path / "a" / "test" / "odd").mkdir(parents=True)
    with pytest.raises(EraseError, match="odd is a class that .* does not have"):
        data.load(str(tmp_path / "a"), tmp_path)
    write_folder(tmp_path / "b")
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "train" / "dark" / "1.png")
    with pytest.raises(EraseError, match="1.png is 9x9 pixels, but 0.png is 8x8; give --size"):
        data.load(str(tmp_path / "b"), tmp_path)
    (tmp_path / "b" / "train" / "dark" / "1.png").write_bytes(b"no image")
    with pytest.raises(EraseError, match=r"1\.png cannot be read as an image \(not an image\)"):
        data.load(str(tmp_path / "b"), tmp_path)
    for path in (tmp_path / "b" / "train" / "dark").iterdir():
        path.unlink()
    with pytest.raises(EraseError, match=r"class 0 \(dark\) of .* has no training image"):
        data.load(str(tmp_path / "b"), tmp_path)
    with pytest.raises(EraseError, match="neither CIFAR's files"):
        data.load(str(tmp_path / "b" / "test"), tmp_path)
    with pytest.raises(EraseError, match="no data set and no folder; choose digits"):
        data.load("cifar11", tmp_path)


def test_images_that_are_too_large_and_a_single_class_are_refused(tmp_path):
    """Two images of 20,000 pixels would be trained on as they are, for hours."""
    write_folder(tmp_path)
    for path in tmp_path.rglob("*.png"):
        Image.new("RGB", (20_000, 2)).save(path)
    with pytest.raises(EraseError, match=r"0.png is 2x20000 pixels; give --size, or images of at most 4096 a side"):
        data.load(str(tmp_path), tmp_path)
    assert data.load(str(tmp_path), tmp_path, size=4).size == 4  # control
    for part in ("train", "test"):
        shutil.rmtree(tmp_path / part / "light")
    with pytest.raises(EraseError, match=r"has 1 class \(dark\); it needs two"):
        data.load(str(tmp_path), tmp_path, size=4)


def test_files_of_operating_systems_and_editors_are_no_images_and_no_classes(tmp_path):
    """(3.5)"""
    write_folder(tmp_path)
    for name in ("dark/.DS_Store", "dark/Thumbs.db", "dark/._0.png", ".ipynb_checkpoints/0.png", "notes.txt"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"no image")
    (tmp_path / "test" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "light").rename(tmp_path / "train" / "golf ball")
    (tmp_path / "test" / "light").rename(tmp_path / "test" / "golf ball")
    dataset = data.load(str(tmp_path), tmp_path)
    assert dataset.classes == ("dark", "golf ball") and len(dataset.train) == len(dataset.test) == 2


def grey16(path):
    """Levels 0, 128 and 255 of 255 in 16 bits; cut at 255 they are 0, 255 and 255."""
    Image.fromarray(np.repeat(np.array([[0, 32896, 65535]], np.uint16), 3, axis=0)).save(path)


def test_deep_grey_and_transparency_are_read_as_everywhere(tmp_path):
    """One reader for all: 16 bits are scaled, and what is transparent is white (3.1, 3.5)."""
    for part in ("train", "test"):
        for name in ("deep", "clear"):
            (tmp_path / part / name).mkdir(parents=True)
        grey16(tmp_path / part / "deep" / "0.png")
        Image.new("RGBA", (3, 3), (9, 9, 9, 0)).save(tmp_path / part / "clear" / "0.png")
    clear, deep = data.load(str(tmp_path), tmp_path).train.x
    assert clear.min() == 255 and deep[0, 0].tolist() == [0, 128, 255]


def bomb(path, monkeypatch):
    Image.new("RGB", (8, 8)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)


def broken_chunk(path, monkeypatch):
    """A chunk of transparency that is too short, with a right checksum: Pillow raises ValueError when it opens it."""
    Image.new("RGB", (8, 8)).save(path)
    content, chunk = path.read_bytes(), b"tRNS\0\0\0"
    path.write_bytes(content[:33] + b"\0\0\0\3" + chunk + zlib.crc32(chunk).to_bytes(4, "big") + content[33:])


def cut_short(path, monkeypatch):
    write_noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(write_noise).save(path)
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "reason"), [(bomb, "more than 50 pixels"), (broken_chunk, "damaged"), (cut_short, "damaged")]
)
def test_an_image_that_cannot_be_read_is_one_line_that_names_it(spoil, reason, tmp_path, monkeypatch):
    """(3.5, 4.10)"""
    write_folder(tmp_path, size=4)
    spoil(tmp_path / "train" / "dark" / "bad.png", monkeypatch)
    with pytest.raises(EraseError, match=rf"bad\.png cannot be read as an image \({reason}\); repair or remove it$"):
        data.load(str(tmp_path), tmp_path, size=4)


def write_tiny_imagenet(folder):
    for wnid, level in (("n02", 200), ("n01", 100), ("n03", 0)):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8), (level,) * 3).save(folder / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("a\t0\t0\t9\t9\n")
    (folder / "val" / "images").mkdir(parents=True)
    for number, level in enumerate((200, 100)):
        Image.new("RGB", (8, 8), (level,) * 3).save(folder / "val" / "images" / f"val_{number}.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    (folder / "test" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "test" / "images" / "test_0.JPEG")
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tcrane\nn03\tcrane\nn04\tbull\n")


def test_tiny_imagenet_is_read_as_it_is_distributed(tmp_path):
    """Labels of val/images from val_annotations.txt, names from words.txt where they tell classes apart (3.5)."""
    write_tiny_imagenet(tmp_path)
    dataset = data.load(str(tmp_path), tmp_path)
    assert dataset.classes == ("goldfish", "n02", "n03")
    assert dataset.train.y.tolist() == [0, 1, 2] and dataset.test.y.tolist() == [0, 1]
    assert dataset.train.x[:, 0, 0, 0].tolist() == [100, 200, 0] and dataset.test.x[:, 0, 0, 0].tolist() == [100, 200]
    (tmp_path / "words.txt").unlink()
    assert data.load(str(tmp_path), tmp_path).classes == ("n01", "n02", "n03")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gone.JPEG\tn01\t0", r"val_annotations\.txt, line 3: needed are a file of .*images, a TAB and a class$"),
        ("val_0.JPEG n01", r"val_annotations\.txt, line 3: needed are a file"),
        ("val_0.JPEG\tn09\t0", "n09 is a class that .*train does not have"),
    ],
)
def test_a_line_of_tiny_imagenets_labels_that_cannot_be_used_is_named(line, message, tmp_path):
    """(3.5)"""
    write_tiny_imagenet(tmp_path)
    with open(tmp_path / "val" / "val_annotations.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises(EraseError, match=message):
        data.load(str(tmp_path), tmp_path)


def test_rows_of_parquet_files_go_through_the_same_reader(tmp_path):
    """Transparency and depth as in a folder; a broken row is named by its number (3.1, 3.5)."""
    datasets = pytest.importorskip("datasets")
    Image.new("RGBA", (3, 3), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    grey16(tmp_path / "deep.png")
    good = [(tmp_path / name).read_bytes() for name in ("clear.png", "deep.png")]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["clear", "deep"])})

    def write(folder, images):
        folder.mkdir()
        for part in ("train", "test"):
            rows = {"image": [{"bytes": image, "path": None} for image in images], "label": [0, 1]}
            datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}.parquet")

    write(tmp_path / "good", good)
    dataset = data.load(str(tmp_path / "good"), tmp_path)
    assert dataset.classes == ("clear", "deep")
    assert dataset.train.x[0].min() == 255 and dataset.train.x[1, 0, 0].tolist() == [0, 128, 255]
    write(tmp_path / "bad", [good[0], good[1][:-20]])
    with pytest.raises(EraseError, match=r"^image 1 of train of .*bad cannot be read as an image \(damaged\)"):
        data.load(str(tmp_path / "bad"), tmp_path)


def test_drawings_are_cached_and_the_same_again(tmp_path):
    first, again, elsewhere = (data.drawings(tmp_path / name, (2, 1)) for name in ("a", "a", "b"))
    assert first.train.x.shape == (20, 3, 32, 32) and first.test.y.tolist() == list(range(10))
    assert torch.equal(first.train.x, again.train.x) and torch.equal(first.test.x, elsewhere.test.x)
    assert not torch.equal(first.train.x[:10], first.test.x)


def test_digits_are_real_and_always_the_same():
    pytest.importorskip("sklearn")
    first, again = data.digits(), data.digits()
    assert (len(first.train), len(first.test)) == (1000, 797)
    assert torch.equal(first.train.x, again.train.x)
    pixels = first.train.x.double() / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((first.mean[0], first.std[0]), abs=0.01)


def test_digits_without_scikit_learn_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(EraseError, match="^scikit-learn is not installed; pip install scikit-learn$"):
        data.digits()


# Networks


LARGE = ("resnet50", "vgg16_bn", "swin_t", "vit")


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in LARGE])
def test_every_network_gives_logits_of_small_images_and_survives_its_file(name, tmp_path):
    check_network(name, tmp_path)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", LARGE)
def test_every_large_network_gives_logits_of_small_images_and_survives_its_file(name, tmp_path):
    check_network(name, tmp_path)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("size", [16, 64, 128, 224])
@pytest.mark.parametrize("name", ["vit", "swin_t"])
def test_transformers_take_images_of_any_size(name, size):
    """Swin halves its grid three times, and no window may be larger than what is left."""
    model = networks.build(Shape(name, 7, 3, size, (0.5,) * 3, (0.5,) * 3), seed=0)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 7)


def check_network(name: str, folder: Path) -> None:
    shape = Shape(name, 7, 3, 32, (0.5,) * 3, (0.5,) * 3)
    model = networks.build(shape, seed=0)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    images = Images(x, torch.tensor([0, 6]))
    recipe = Recipe(epochs=1, learning_rate=0.0)
    run.train(networks.build(shape, seed=0), images, recipe, seed=0, num_classes=7)  # channels last, in train mode
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, 7) and torch.equal(logits, model(x.float() / 255))
        torch.testing.assert_close(model(images.pixels), logits, rtol=0, atol=1e-4)
        networks.save(folder / "model.safetensors", model, shape, {"seed": 0})
        loaded, found, header = networks.load(folder)
        assert torch.equal(loaded(x), logits) and found == shape and header["seed"] == 0
    assert delta.content_hash(networks.build(shape, seed=0).state_dict()) == delta.content_hash(model.state_dict())


def test_the_resnet_for_small_images_keeps_their_resolution_at_first():
    """The stem of CIFAR: 32 x 32 after it, where ImageNet's leaves 8 x 8."""
    cases = [("resnet18", 32), ("resnet18", 96), ("resnet18_imagenet", 32)]
    models: list[Any] = [networks.build(Shape(name, 10, 3, size, (0.5,) * 3, (0.5,) * 3), 0) for name, size in cases]
    x = torch.zeros(1, 3, 32, 32)
    assert [model.network.resnet.embedder(x).shape[-1] for model in models] == [32, 8, 8]
    assert sum(p.numel() for p in models[0].parameters()) == 11_173_962  # as in every ResNet-18 for CIFAR-10


def test_convolutions_see_channels_last_and_nothing_that_is_kept_does(monkeypatch, tmp_path):
    """Same seed, same bits; near to what the usual order gives, as float32 sums in another order; stored as ever."""
    x = torch.randint(0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images, shape = (
        Images(x, torch.arange(24) % NUM_CLASSES),
        Shape("small", NUM_CLASSES, 3, 32, (0.5,) * 3, (0.5,) * 3),
    )

    def unlearned() -> tuple[nn.Module, list[bool]]:
        model, seen = networks.build(shape, seed=0), []
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(
            lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
        )
        how: dict[str, Any] = {"num_classes": NUM_CLASSES, "seed": 0, "mask": random_mask(model)}
        run.unlearn(model, images[slice(0, 8)], images[slice(8, 24)], method_of("salun"), RECIPE, **how)
        return model, seen

    (once, seen), (again, _) = unlearned(), unlearned()
    assert all(seen) and seen
    assert_same(once.state_dict(), again.state_dict())
    assert all(tensor.is_contiguous() for tensor in once.state_dict().values())
    monkeypatch.setattr(Images, "pixels", property(lambda self: self.x.float() / 255))
    plain, seen = unlearned()
    assert not any(seen)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(once.state_dict()[name], weight, rtol=0, atol=1e-5)


# Errors


def test_what_cannot_be_unlearned_is_one_line(trained_state):
    images, nothing = toy_images(), Images(torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0).long())
    how: dict[str, Any] = {"num_classes": NUM_CLASSES, "seed": 0}
    model, method = trained(trained_state), method_of("salun")
    with pytest.raises(EraseError, match="the images to forget are missing"):
        run.unlearn(model, nothing, images, method, RECIPE, **how)
    with pytest.raises(EraseError, match="the images to retain are missing"):
        run.unlearn(model, images, nothing, method, RECIPE, **how)
    with pytest.raises(EraseError, match="have a label 7; with 3 classes it must be 0 to 2"):
        run.unlearn(model, images.with_labels(images.y + 5), images, method, RECIPE, **how)
    with pytest.raises(EraseError, match="the network has 3 classes, but the data set has 4"):
        run.unlearn(model, images, images, method, RECIPE, num_classes=4, seed=0)
    with pytest.raises(EraseError, match="'odd' is in the mask, .* but not here"):
        run.unlearn(model, images, images, method, RECIPE, mask={"odd": torch.ones(1, dtype=torch.bool)}, **how)
    with pytest.raises(EraseError, match="the loss is .* lower --learning-rate"):
        run.unlearn(model, images, images, method, replace(RECIPE, learning_rate=1e18), **how)
    with pytest.raises(EraseError, match="last linear layer, but this model has none"):
        only_convolutions = nn.Sequential(nn.Conv2d(1, NUM_CLASSES, 4), nn.Flatten())
        run.unlearn(only_convolutions, images, images, method_of("be"), RECIPE, **how)


def test_a_class_without_samples_is_one_line():
    with pytest.raises(EraseError, match=r"class 2 \(c\) of toy has no training image"):
        images = toy_images()
        replace(toy_dataset(), train=images[images.y != 2])
    with pytest.raises(EraseError, match="must be 0 to 2"):
        replace(toy_dataset(), test=images.with_labels(images.y - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "salum"}, "did you mean salun"),
        ({"density": 0.0}, "above 0 and at most 1"),
        ({"epochs": -1}, "0 or more"),
        ({"network": "resnet118"}, "did you mean resnet18"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(options, message):
    with pytest.raises(EraseError, match=message):
        Settings(**options)


@pytest.mark.parametrize(
    ("request_", "kind"),
    [("10%", "share"), ("29.9%", "share"), ("30%", "half"), ("50%", "half"), ("class:3", "class"), ("many%", "share")],
)
def test_the_preset_is_chosen_by_how_much_is_forgotten(request_, kind):
    for method, preset in TUNED["digits", kind].items():
        assert Settings(forget=request_, method=method).preset == preset
    assert TUNED["digits", kind].keys() == set(METHODS)


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("l1-sparse", "alhpa=1", "did you mean alpha"),
        ("l1-sparse", "alpha=much", "must be a number"),
        ("salun", "may_be_true=1", "must be true or false"),
        ("ft", "alpha=1", "it has none"),
        ("salun-soft", "ratio=2", r"must lie in \[0, 1\]"),
        ("ft", "alpha", "NAME=VALUE"),
        ("iu", "num_samples=0", r"num_samples is 0; it must lie in \[1, 1e\+09\]"),
        ("iu", "num_samples=1" + 400 * "0", "must be a whole number"),
        ("iu", "alpha=-1", "alpha is -1.0"),
        ("fisher", "num_samples=-1", "num_samples is -1"),
        ("fisher", "cap=-1", "cap is -1"),
        ("l1-sparse", "alpha=-1", "alpha is -1"),
        ("l1-sparse", "free_epochs=100000000000000000000", "free_epochs is 1000"),
        ("bs", "bound=-1", r"bound is -1.0; it must lie in \[0, 1\]"),
        ("scissorhands", "share=1e23", "share is 1e"),
        ("scissorhands", "lam=-1", "lam is -1"),
        ("retrain", "alpha=1", "retrain has no options"),
    ],
)
def test_an_option_that_a_method_does_not_have_is_one_line(method, option, message):
    with pytest.raises(EraseError, match=message):
        run.check_method(Settings(method=method, set=(option,)).resolved())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "retrain", "epochs": 3}, "--epochs has no effect when a new model is trained; use --train-epochs"),
        ({"method": "retrain", "optimizer": "adam"}, "--optimizer has no effect when a new model is trained$"),
        ({"method": "iu", "learning_rate": 0.1}, "--learning-rate has no effect with --method iu, which computes"),
        ({"method": "ft", "density": 0.1}, "--density has no effect without a mask; add --mask saliency"),
        ({"mask": "none", "score": "sum_sq"}, "--score has no effect without a mask"),
    ],
)
def test_an_option_that_the_method_does_not_use_is_refused_before_the_data_is_read(given, message, tmp_path):
    with pytest.raises(EraseError, match=message):
        run.run(Settings(data="no such data", output=str(tmp_path / "run"), **given), tmp_path)
    allowed: tuple[dict[str, Any], ...] = (
        {},
        {"method": "ft", "epochs": 3},
        {"density": 0.1},
        {"method": "ft", "mask": "random", "density": 0.1},
    )
    for ours in allowed:
        with pytest.raises(EraseError, match="is no data set"):  # the control: used, so the data is what is wrong
            run.run(Settings(data="no such data", output=str(tmp_path / "run"), **ours), tmp_path)


@pytest.mark.parametrize("request_", ["nan%", "1e23%", "-5%", "abc%", "²%", "", "5", "/"])
def test_a_request_that_fits_no_data_set_is_refused_before_the_data_is_read(request_, tmp_path):
    with pytest.raises(EraseError, match="--forget is"):
        run.run(Settings(data="no such data", forget=request_, output=str(tmp_path / "run")), tmp_path)


# The whole job


@pytest.fixture
def toy_world(monkeypatch) -> None:
    monkeypatch.setattr(data, "load", lambda name, cache_dir, **_: toy_dataset())


def settings_of(tmp_path: Path, **changes: Any) -> Settings:
    options = {"data": "toy", "network": "mlp", "forget": "20%", "output": str(tmp_path / "run"), "train_epochs": 3}
    return Settings(**{**options, "epochs": 2, "batch_size": 8, "train_learning_rate": 0.05, **changes})


def test_a_run_leaves_model_delta_mask_split_and_record(toy_world, tmp_path):
    result = run.run(settings_of(tmp_path), tmp_path)
    folder = tmp_path / "run"
    record = files.read_json(folder / "run.json")
    original, _, _ = networks.load(folder / "original")
    model, _, _ = networks.load(folder)
    change = delta.load(folder / "delta.safetensors")
    assert_same(delta.apply(original.state_dict(), change), model.state_dict())
    mask, _ = masks.load(folder / "mask.safetensors")
    assert masks.count(mask) == int(record["weights"]["total"] * 0.5) == record["weights"]["may_move"]
    assert 0 < record["weights"]["changed"] <= record["weights"]["may_move"]
    assert record["split"]["sha256"] == json.loads((folder / "split.json").read_text())["sha256"] == result.split.digest
    assert record["model_hash"] == delta.content_hash(model.state_dict())
    assert record["original_hash"] == delta.content_hash(original.state_dict())
    again = run.run(settings_of(tmp_path), tmp_path)
    assert again.record["model_hash"] == record["model_hash"]
    with pytest.raises(EraseError, match="holds a run with other settings"):
        run.run(settings_of(tmp_path, seed=1), tmp_path)


def test_a_record_from_before_an_option_existed_is_the_same_run(toy_world, tmp_path):
    """num_train; the control is a record that says another number."""
    run.run(settings_of(tmp_path), tmp_path)
    path = tmp_path / "run" / "run.json"
    record = files.read_json(path)
    for change, is_same in (({}, True), ({"num_train": 12}, False)):
        older = {name: value for name, value in record["settings"].items() if name != "num_train"} | change
        files.write_json(path, record | {"settings": older})
        if is_same:
            run.run(settings_of(tmp_path), tmp_path)
        else:
            with pytest.raises(EraseError, match="holds a run with other settings"):
                run.run(settings_of(tmp_path), tmp_path)


def test_the_settings_of_another_data_set_are_used_and_do_not_count_as_another_run(tmp_path):
    plain, tuned = (Settings(data=str(tmp_path), tuned_for=name, method="ft").resolved() for name in (None, "cifar10"))
    assert (plain.network, tuned.network) == ("resnet18", "resnet18") and tuned.learning_rate == 0.01
    small = Settings(data=str(tmp_path), tuned_for="cifar10-small", method="ft").resolved()
    assert (small.network, small.epochs, small.batch_norm) == ("resnet9s", 3, "moving")
    frozen = Settings(data=str(tmp_path), tuned_for="cifar10-small-frozen", method="ft").resolved()
    assert frozen.batch_norm == "frozen" and frozen.learning_rate == 0.003
    half = Settings(data=str(tmp_path), tuned_for="cifar10", forget="50%").resolved()
    assert (half.density, half.learning_rate) == (0.9, 0.005)
    assert Settings(data="cifar10").resolved().learning_rate == 0.005
    assert Settings(method="scrub", data=str(tmp_path)).resolved().optimizer == "adam"
    with pytest.raises(EraseError, match="--tuned-for is 'cifar'; did you mean cifar10?"):
        Settings(tuned_for="cifar")
    assert records.identity(replace(small, tuned_for=None)) == records.identity(small)


def test_the_retrained_model_never_sees_what_is_forgotten(toy_world, tmp_path, monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(run, "descend", lambda model, plan, *_, **__: seen.append(len(plan.passes()[0])))
    for without_forget in (False, True):
        settings = settings_of(tmp_path, output=str(tmp_path / str(without_forget)), method="retrain", epochs=None)
        run.run_training(settings, tmp_path, without_forget=without_forget)
    run.run(settings_of(tmp_path, method="retrain", epochs=None), tmp_path)
    assert seen == [30, 24, 30, 24]


def test_masks_from_files_fit_or_are_refused(toy_world, tmp_path):
    run.run(settings_of(tmp_path), tmp_path)
    mask, model = str(tmp_path / "run" / "mask.safetensors"), str(tmp_path / "run" / "original")
    again = run.run(settings_of(tmp_path, output=str(tmp_path / "b"), mask=mask, model=model), tmp_path)
    assert again.record["model_hash"] == files.read_json(tmp_path / "run" / "run.json")["model_hash"]
    with pytest.raises(EraseError, match="the mask was made for weights"):
        run.run(settings_of(tmp_path, output=str(tmp_path / "c"), mask=mask, seed=1), tmp_path)
    with pytest.raises(EraseError, match="in the mask, which was made for mlp on toy"):
        run.run(settings_of(tmp_path, output=str(tmp_path / "d"), mask=mask, network="small"), tmp_path)
    with pytest.raises(EraseError, match="--mask is 'salience'; choose saliency, random"):
        run.run(settings_of(tmp_path, output=str(tmp_path / "e"), mask="salience"), tmp_path)


def test_a_model_for_other_classes_or_images_is_refused(toy_world, tmp_path):
    shapes = {"for 4 classes": (4, 1, 4), "for 3 channels": (3, 3, 4), "for 5 pixels a side": (3, 1, 5)}
    for message, numbers in shapes.items():
        shape = Shape("mlp", *numbers, (0.5,) * numbers[1], (0.5,) * numbers[1])
        networks.save(tmp_path / "model.safetensors", networks.build(shape, 0), shape, {})
        with pytest.raises(EraseError, match=message):
            run.run(settings_of(tmp_path, model=str(tmp_path)), tmp_path)
    with pytest.raises(EraseError, match="no such file"):
        run.run(settings_of(tmp_path, model=str(tmp_path / "nowhere")), tmp_path)
    tensor_files.write_tensors(tmp_path / "other.safetensors", {"w": torch.zeros(1)})
    with pytest.raises(EraseError, match="is not a classifier"):
        run.run(settings_of(tmp_path, model=str(tmp_path / "other.safetensors")), tmp_path)


def test_the_loop_trains_with_any_plan():
    """A plan without a loss is the plain cross-entropy."""
    model, images = toy_model(), toy_images()
    before = gradients.cross_entropy(model, images).item()
    descend(model, Plan(passes=lambda: [images]), replace(RECIPE, epochs=20), torch.Generator().manual_seed(0))
    assert gradients.cross_entropy(model, images).item() < before / 2
