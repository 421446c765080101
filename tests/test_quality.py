"""CLIP score, FID and KID: equal to their definitions, refused where they would mislead."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from erase.errors import EraseError
from erase.evaluation import kid, quality
from erase.evaluation.judges.clip_score import ClipScore
from erase.evaluation.judges.features import Features, decode
from erase.evaluation.judges.networks import inception
from erase.evaluation.judges.networks.inception import Inception, Network, resize
from erase.evaluation.kid import kid_of_pairs, kid_of_sets
from erase.evaluation.quality import fid, load_features, metric_id, save_features


def make_images(num: int, seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((64, 64),)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 100, (*sizes[i % len(sizes)], 3)) + rng.integers(0, 156, 3)).astype(np.uint8)
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory) -> Path:
    """Weights for the Inception network from a stream that numpy keeps: normal, scaled to keep the signal's size."""
    rng, state = np.random.RandomState(0), {}
    for name, tensor in sorted(Network().state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue  # counts nothing here, and files differ in having it
        if name.endswith(("bn.weight", "running_var")):
            values = rng.uniform(0.5, 1.5, tensor.shape)
        elif tensor.ndim > 1:
            values = rng.standard_normal(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        else:
            values = rng.standard_normal(tensor.shape) * 0.1
        state[name] = torch.tensor(values, dtype=torch.float32)
    path = tmp_path_factory.mktemp("inception") / inception.FILE_NAMES[0]
    torch.save(state, path)
    return path


# --- CLIP score -----------------------------------------------------------------------------------------------------


def test_the_clip_score_is_a_hundred_times_the_cosine_of_clips_own_embeddings(clip_dir):
    images = make_images(20, sizes=((64, 64), (40, 70), (33, 20)))
    texts = [f"number {i % 7} and some more" for i in range(20)]
    model = CLIPModel.from_pretrained(clip_dir).eval()
    processor = CLIPImageProcessorPil.from_pretrained(clip_dir)
    tokens = CLIPTokenizer.from_pretrained(clip_dir)(texts, padding=True, return_tensors="pt")
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, **pixels)
    expected = 100 * (output.image_embeds * output.text_embeds).sum(1)
    judge = ClipScore(clip_dir)
    found = [score["clip_score"] for score in judge.score(images, texts)]
    np.testing.assert_allclose(found, expected, atol=1e-4)  # float32, of numbers up to 100
    alone = [judge.score([image], [text])[0]["clip_score"] for image, text in zip(images, texts, strict=True)]
    np.testing.assert_allclose(found, alone, atol=1e-4)
    assert np.std(found) > 0.01, "control: scores differ"
    assert judge.score([], []) == []


def test_a_prompt_is_cut_where_the_model_ends(clip_dir):
    """A token is a letter here, and two of the 77 mark the ends: what follows the 75th letter is not seen."""
    judge, image = ClipScore(clip_dir), make_images(1)
    (long,) = judge.score(image, ["x" * 75 + "abc"])
    assert long == judge.score(image, ["x" * 90])[0]
    assert long != judge.score(image, ["x" * 70 + "abc"])[0]


# --- features -------------------------------------------------------------------------------------------------------


def test_features_come_back_as_they_were(clip_dir):
    images = make_images(18)
    judge = Features("clip", clip_dir)
    scores = judge.score(images, [""] * 18)
    features = np.stack([decode(score) for score in scores])
    np.testing.assert_allclose(features, judge.eye.see(images).numpy(), atol=1e-6)
    model = CLIPModel.from_pretrained(clip_dir).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(clip_dir)([Image.fromarray(images[0])], return_tensors="pt")
    with torch.no_grad():
        embeds = model.visual_projection(model.vision_model(**pixels).pooler_output)
    np.testing.assert_allclose(features[:1], embeds, atol=1e-6)
    assert metric_id("kid", judge.identity(), 18).endswith("/32-bicubic-pil/n=18")


def test_the_embedded_judges_features_are_those_before_its_answers():
    images = make_images(3)
    judge = Features("mini")
    features = torch.tensor(np.stack([decode(score) for score in judge.score(images, [""] * 3)]))
    assert features.shape == (3, 1536)
    answers = judge.eye.network.heads["object"](features).argmax(1).tolist()  # pyright: ignore
    from erase.mini.judge import HEADS

    expected = [score["object"] for score in judge.eye.score(images, [""] * 3)]  # pyright: ignore
    assert [HEADS["object"][answer] for answer in answers] == expected
    assert metric_id("fid", judge.identity(), 3).startswith("fid/mini-")


def test_inception_features_equal_those_of_torch_fidelity(weights_path):
    """Its module (0.4.0) gave these with the same weights and images: a column of each of the last block's six ends.

    All 2,048 were equal to the last bit; 1e-4 is for other machines.
    """
    judge = Features("inception2015", weights_path)
    images = make_images(2, sizes=((64, 64), (50, 90)))
    features = np.stack([decode(score) for score in judge.score(images, ["", ""])])
    assert features.shape == (2, 2048)
    expected = [
        [23.666096, 19.110264, 29.678085, 14.141997, 17.477976, 24.900463],
        [21.294724, 16.762394, 26.516542, 13.849077, 14.217451, 22.609854],
    ]
    np.testing.assert_allclose(features[:, [32, 353, 719, 1108, 1502, 1877]], expected, rtol=1e-4)
    assert metric_id("fid", judge.identity(), 5000) == "fid/inception2015/299-bilinear-tf1/n=5000"


def test_the_resize_is_tensorflows():
    """Written out pixel by pixel; the usual rule, which puts pixel centres at 1/2, gives other values."""
    rng = np.random.default_rng(0)
    image, size = rng.uniform(0, 255, (5, 8)), 6
    expected = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * 5 / size, j * 8 / size
            top, left = int(y), int(x)
            rows, columns = image[[top, min(top + 1, 4)]], [left, min(left + 1, 7)]
            above, below = (row[columns[0]] * (1 - x + left) + row[columns[1]] * (x - left) for row in rows)
            expected[i, j] = above * (1 - y + top) + below * (y - top)
    given = torch.tensor(image, dtype=torch.float32)
    np.testing.assert_allclose(resize(given, size), expected, rtol=1e-5)
    usual = torch.nn.functional.interpolate(given[None, None], (size, size), mode="bilinear")[0, 0]
    assert (resize(given, size) - usual).abs().max() > 1


def test_missing_or_other_inception_weights_are_refused(tmp_path, weights_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(EraseError, match="has no weights-inception-2015-12-05-6726825d.pth.*https://github.com"):
        Inception()
    cached = tmp_path / "hub" / "checkpoints" / inception.FILE_NAMES[1]
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights_path)
    assert Inception().weights == Inception(weights_path).weights
    with pytest.raises(EraseError, match="nowhere.pth: no such file"):
        Inception(tmp_path / "nowhere.pth")
    state = torch.load(weights_path, weights_only=True)
    state["AuxLogits.conv0.conv.weight"] = torch.zeros(1)  # as torchvision's Inception has
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(EraseError, match="no file of the 2015 Inception: 'AuxLogits.conv0.conv.weight'"):
        Inception(tmp_path / "other.pth")


def test_a_weights_file_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "trap.pth"
    torch.save({"fc.bias": Trap()}, path)
    with pytest.raises(EraseError, match="holds no Inception weights"):
        Inception(path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists(), "control: the trap works"


def test_images_that_a_cast_would_turn_black_are_refused(clip_dir):
    """SalUn's FID casts [-1, 1] to uint8, and compares images whose only values are 0, 1 and 255."""
    scaled = [image.astype(np.float32) / 127.5 - 1 for image in make_images(1)]
    cast = torch.tensor(scaled[0]).to(torch.int8).to(torch.uint8).numpy()
    assert {*np.unique(cast)} <= {0, 1, 255}
    for judge in (ClipScore(clip_dir), Features("clip", clip_dir), Features("mini")):
        for wrong in (scaled, [scaled[0] * 255], [make_images(1)[0][..., 0]], [make_images(1)[0].astype(np.int64)]):
            with pytest.raises(EraseError, match="needed are uint8 RGB"):
                judge.score(wrong, [""])


def test_kept_features_are_refused_where_they_do_not_belong(tmp_path):
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    identity = {"kind": "mini-0123", "resize": "64-none", "weights": "0123"}
    save_features(tmp_path / "real.safetensors", features, identity)
    found = load_features(tmp_path / "real.safetensors", identity)
    assert found.dtype == np.float32 and (found == features).all()
    with pytest.raises(EraseError, match="resize is 64-none there and 299-bilinear-tf1 here"):
        load_features(tmp_path / "real.safetensors", {**identity, "resize": "299-bilinear-tf1"})
    with pytest.raises(EraseError, match="no such file"):
        load_features(tmp_path / "none.safetensors", identity)
    from erase.tensor_files import write_tensors

    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(EraseError, match="is not a features file"):
        load_features(tmp_path / "other.safetensors", identity)


# --- FID and KID ----------------------------------------------------------------------------------------------------


def with_moments(rng: np.random.Generator, n: int, mean: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """Samples whose own mean and covariance (over n - 1) are exactly `mean` and diag(deviations^2)."""
    z = rng.normal(size=(n, len(mean)))
    z -= z.mean(0)
    white = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T
    return mean + white * deviations


def test_fid_of_gaussians_is_the_closed_form():
    """Diagonal covariances: |mu_a - mu_b|^2 + sum (s_a - s_b)^2. Exact moments, so only float64 rounds."""
    rng = np.random.default_rng(0)
    mean_a, mean_b, s_a, s_b = rng.normal(size=6), rng.normal(size=6), rng.uniform(1, 2, 6), rng.uniform(1, 2, 6)
    a, b = with_moments(rng, 2048, mean_a, s_a), with_moments(rng, 3000, mean_b, s_b)
    expected = ((mean_a - mean_b) ** 2).sum() + ((s_a - s_b) ** 2).sum()
    assert fid(a, b) == pytest.approx(expected, abs=1e-8)
    assert fid(b, a) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("n", [2048, 100])
def test_fid_of_a_set_and_itself_is_nothing(n):
    """With fewer images (100) than features (256) too, where the covariance has no full rank."""
    features = np.abs(np.random.default_rng(0).normal(size=(n, 256))).astype(np.float32)
    assert fid(features, features, allow_small=True) == pytest.approx(0, abs=1e-3)
    assert fid(features, features[::-1] + np.float32(0.1), allow_small=True) == pytest.approx(2.56, abs=1e-3)


def test_fid_of_few_images_is_refused_and_kid_is_not():
    """One distribution, twice 60 images: FID is far from 0, for want of images; KID is as often below as above."""
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(60, 64)) for _ in range(9)]
    with pytest.raises(EraseError, match="FID of 60 images is mostly bias; it needs at least 64; use KID"):
        fid(sets[0], sets[1])
    assert fid(sets[0], sets[1], allow_small=True) > 5
    values = np.array([kid_of_sets(sets[0], other).value for other in sets[1:]])
    assert values.min() < 0 < values.max()
    assert abs(values.mean()) < 0.05 * kid_of_sets(sets[0], sets[1] + 0.5).value


def test_the_least_number_of_images_for_fid_is_that_of_the_features():
    rng = np.random.default_rng(0)
    assert fid(rng.normal(size=(64, 64)), rng.normal(size=(70, 64))) > 0
    with pytest.raises(EraseError, match="it needs at least 128"):
        fid(rng.normal(size=(64, 128)), rng.normal(size=(70, 128)))


def test_kid_of_sets_is_torchmetrics_kid():
    """One subset that is the whole set: then its order, which is random, does not matter."""
    from torchmetrics.image.kid import KernelInceptionDistance

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 16)), rng.normal(size=(80, 16))[:60] + 0.2
    with pytest.warns(UserWarning, match="buffer"):
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=60)  # pyright: ignore
    metric.update(torch.tensor(a), real=True)
    metric.update(torch.tensor(b), real=False)
    assert kid_of_sets(a, b).value == pytest.approx(metric.compute()[0].item(), rel=1e-9)


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def test_in_kid_of_pairs_only_images_of_different_prompts_meet():
    """By hand, with prompts of different sizes; a set and itself are at 0, with nothing to tell an interval from."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(12, 8))
    b = a + rng.normal(size=a.shape) * 0.1 + 0.3
    prompts = [*"aabbbcddddee"]

    def by_hand(kept: list[int]) -> float:
        apart = [(i, j) for i in kept for j in kept if prompts[i] != prompts[j]]
        return float(np.mean([kernel(a[i], a[j]) + kernel(b[i], b[j]) - kernel(a[i], b[j]) - kernel(a[j], b[i])
                              for i, j in apart]))  # fmt: skip

    found = kid_of_pairs(a, b, prompts)
    assert found.value == pytest.approx(by_hand(list(range(12))), rel=1e-9)
    without = [by_hand([i for i in range(12) if prompts[i] != label]) for label in "abcde"]
    reach = t.ppf(0.975, 4) * np.sqrt(4 / 5 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert (found.low, found.high) == (pytest.approx(found.value - reach), pytest.approx(found.value + reach))
    alone = kid_of_pairs(a, a, prompts)
    assert alone.value == pytest.approx(0, abs=1e-12) and alone.low is None
    with pytest.raises(EraseError, match="12 and 11 features are no pairs"):
        kid_of_pairs(a, b[1:])


def test_images_of_one_prompt_do_not_count_as_distance():
    """Ten prompts x five images of one distribution: same-prompt pairs lift KID far above 0."""
    rng = np.random.default_rng(2)
    prompts = [str(i // 5) for i in range(50)]
    apart, together = [], []
    for _ in range(30):
        base, other = (np.repeat(rng.normal(size=(10, 8)), 5, 0) + rng.normal(size=(50, 8)) for _ in "ab")
        apart.append(kid_of_sets(base, rng.normal(size=(200, 8)) * 2**0.5, prompts).value)
        together.append(kid_of_sets(base, rng.normal(size=(200, 8)) * 2**0.5).value)
    assert abs(np.mean(apart)) < 0.05 and np.mean(together) > 0.2


def test_kid_of_pairs_says_the_same_however_alike_the_pairs_are():
    """Two distributions' distance does not depend on the seeds that the images share."""
    rng = np.random.default_rng(1)
    a, noise = rng.normal(size=(600, 8)), rng.normal(size=(600, 8))
    near, far = (kid_of_pairs(a, b) for b in (a + 0.5, noise + 0.5))
    assert near.value == pytest.approx(far.value, rel=0.25)


def test_kids_interval_holds_the_truth_in_simulated_worlds():
    """24 prompts x 4 images, 60 worlds; 95 % of them are 57, and fewer than 50 an event of 1 in 500."""

    def world(seed: int, num: int, images: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        rng = np.random.default_rng(seed)
        shared = np.repeat(rng.normal(size=(num, 16)), images, 0) + rng.normal(size=(num * images, 16))
        change = np.repeat(rng.normal(size=(num, 16)) * 0.2 + 0.2, images, 0)
        a, b = (shared + 0.5 * rng.normal(size=shared.shape) for _ in "ab")
        return a, b + change, [str(i // images) for i in range(len(a))]

    truth = kid_of_pairs(*world(10**6, 2000, 1)).value
    found = [kid_of_pairs(*world(seed, 24, 4)) for seed in range(60)]
    assert 50 <= sum(one.low is not None and one.high is not None and one.low <= truth <= one.high for one in found)
    assert np.mean([one.value for one in found]) == pytest.approx(truth, rel=0.1)


def test_kid_says_where_it_knows_nothing_of_other_prompts():
    a = np.random.default_rng(0).normal(size=(10, 4))
    assert kid_of_pairs(a, a + 0.5, ["x"] * 10).interval == "jackknife over images, this prompt only"
    assert kid_of_pairs(a, a + 0.5, ["x"] * 5 + ["y"] * 5).interval == "cannot tell"


def test_of_many_images_kid_takes_evenly_chosen_prompts(monkeypatch):
    monkeypatch.setattr(kid, "MOST_KID", 40)
    rng = np.random.default_rng(0)
    a, prompts = rng.normal(size=(200, 4)), [str(i // 2) for i in range(200)]
    assert kid_of_pairs(a, a + 0.5, prompts).n == 40
    monkeypatch.setattr(kid, "_BLOCK", 7)
    assert kid_of_pairs(a[:40], a[:40] + 0.5, prompts[:40]).n == 40


@pytest.mark.parametrize("distance", [lambda a, b: fid(a, b, allow_small=True), kid_of_pairs, kid_of_sets])
def test_features_that_cannot_be_compared_are_refused(distance):
    a = np.random.default_rng(0).normal(size=(10, 4))
    with pytest.raises(EraseError, match=r"\[10, 4\] and \[10, 3\]"):
        distance(a, a[:, :3])
    with pytest.raises(EraseError, match="not finite"):
        distance(a, np.where(a > 0, np.nan, a))
    with pytest.raises(EraseError, match="it needs at least"):
        distance(a, a[:1])


def test_torchmetrics_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    features = np.random.default_rng(0).normal(size=(10, 4))
    with pytest.raises(EraseError, match="^torchmetrics is not installed; pip install torchmetrics$"):
        fid(features, features, allow_small=True)
    assert kid_of_pairs(features, features + 1).value > 0
