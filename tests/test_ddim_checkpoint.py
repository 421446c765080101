"""Checkpoints in the layout of DDIM's code: their network against its formulas, what is read, written and refused."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from erase import cli, delta
from erase.errors import EraseError
from erase.evaluation import cli as evaluation
from erase.families import ddim_checkpoint, loading
from erase.families.ddim_checkpoint import network_options
from erase.families.side_by_side_unet import SideBySideUNet2DModel

CLASSES = ("cat", "dog", "tree")
State = dict[str, torch.Tensor]


def small(num_classes: int = 3) -> SideBySideUNet2DModel:
    """16 pixels, two levels, the first with attention; every weight is random, so that none can be left out."""
    shape: dict[str, Any] = dict(side=16, channels=(32, 64), attends=(True, False), layers=2, num_classes=num_classes)
    network = SideBySideUNet2DModel(**network_options(**shape))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) / math.sqrt(max(1, weight[0].numel())))
    return network.eval()


def published(state: State, x: torch.Tensor, t: int, label: int | None) -> torch.Tensor:
    """The forward pass of Selective Amnesia's network, written out from its names; label None: the null class."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(name: str, h: torch.Tensor) -> torch.Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv(name: str, h: torch.Tensor, **how: Any) -> torch.Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    def norm(name: str, h: torch.Tensor) -> torch.Tensor:
        groups = h.reshape(len(h), 32, -1)
        h = ((groups - groups.mean(2, True)) / (groups.var(2, correction=0, keepdim=True) + 1e-6).sqrt()).reshape(
            h.shape
        )
        return h * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def swish(h: torch.Tensor) -> torch.Tensor:
        return h / (1 + (-h).exp())

    def mlp(name: str, h: torch.Tensor) -> torch.Tensor:
        return linear(f"{name}.dense.1", swish(linear(f"{name}.dense.0", h)))

    half = len(w["temb.dense.0.weight"][0]) // 2
    angles = t * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1))).double()
    time = mlp("temb", torch.cat([angles.sin(), angles.cos()]))
    row = w["null_classes_emb"] if label is None else w["classes_emb.weight"][label]
    both = torch.cat([time, mlp("cemb", row)])

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        h = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", x)), padding=1)
        h = h + linear(f"{name}.temb_cemb_proj", swish(both))[:, None, None]
        h = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)

    def attended(name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}.q.weight" not in w:
            return x
        q, k, v = (conv(f"{name}.{one}", norm(f"{name}.norm", x)).flatten(2) for one in "qkv")
        h = v @ torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), 2).transpose(1, 2)
        return x + conv(f"{name}.proj_out", h.reshape(x.shape))

    levels = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("down."))
    layers = 1 + max(int(name.split(".")[3]) for name in w if name.startswith("down.0.block"))
    seen = [conv("conv_in", x.double(), padding=1)]
    for i in range(levels):
        for j in range(layers):
            seen.append(attended(f"down.{i}.attn.{j}", block(f"down.{i}.block.{j}", seen[-1])))
        if i < levels - 1:
            seen.append(conv(f"down.{i}.downsample.conv", F.pad(seen[-1], (0, 1, 0, 1)), stride=2))
    h = block("mid.block_2", attended("mid.attn_1", block("mid.block_1", seen[-1])))
    for i in reversed(range(levels)):
        for j in range(layers + 1):
            h = attended(f"up.{i}.attn.{j}", block(f"up.{i}.block.{j}", torch.cat([h, seen.pop()], 1)))
        if i:
            h = conv(f"up.{i}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    return conv("conv_out", swish(norm("norm_out", h)), padding=1)


@pytest.fixture(scope="module")
def weights() -> State:
    """Under the names of a checkpoint, without a prefix."""
    return {n: w.contiguous() for n, w in ddim_checkpoint.tensors_of(small().state_dict()).items()}


def write(path: Path, average: State, *, states: str = "four") -> Path:
    """A checkpoint of `torch.save`; the weights of the last step are other ones than the average."""
    last = {f"module.{name}": tensor + 1 for name, tensor in average.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    made: dict[str, Any] = {
        "four": [last, optimizer, 799_999, average],
        "five": [last, optimizer, 3, 799_999, average],
        "no average": [{f"module.{name}": tensor for name, tensor in average.items()}, optimizer, 799_999],
        "bare": average,
    }
    torch.save(made[states], path)
    return path


@pytest.fixture
def names(tmp_path) -> str:
    """A folder for --config that has the class names."""
    (tmp_path / "names").mkdir()
    labels = {str(label): name for label, name in enumerate(CLASSES)}
    (tmp_path / "names" / "model_index.json").write_text(json.dumps({"id2label": labels}))
    return str(tmp_path / "names")


def load(path: Path, names: str | None) -> Any:
    return loading.load(path, allow_pickle=True, config=names, cache_dir=path.parent / "cache")


def test_predictions_are_those_of_the_published_network(weights, names, tmp_path):
    """In float64, to the rounding of the sine table, which both compute in float32."""
    model = load(write(tmp_path / "ckpt.pth", weights), names)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    network = model.unet.double()
    for t, label in ((0, 0), (7, 2), (640, None)):
        labels = torch.full((2,), 3 if label is None else label)
        with torch.no_grad():
            ours = network(x.double(), torch.tensor([t, t]), class_labels=labels).sample
        theirs = published(weights, x, t, label)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours, published(weights, x, t, 1), atol=1e-2)


def test_the_published_networks_have_their_parameters():
    """CIFAR-10: 38,632,323 parameters in 334 tensors; STL-10, with a fifth level: 83,159,683."""
    one: dict[str, Any] = dict(side=32, channels=(128, 256, 256, 256), attends=(False, True, False, False))
    other: dict[str, Any] = dict(side=64, channels=(*one["channels"], 512), attends=(False, *one["attends"]))
    with torch.device("meta"):
        cifar10, stl10 = (
            ddim_checkpoint.tensors_of(
                SideBySideUNet2DModel(**network_options(**shape, layers=2, num_classes=10)).state_dict()
            )
            for shape in (one, other)
        )
    assert (sum(w.numel() for w in cifar10.values()), len(cifar10)) == (38_632_323, 334)
    assert sum(w.numel() for w in stl10.values()) == 83_159_683


@pytest.mark.parametrize("states", ["four", "five", "no average", "bare"])
def test_the_average_is_read_if_there_is_one(states, weights, names, tmp_path):
    model = load(write(tmp_path / "ckpt.pth", weights, states=states), names)
    read = ddim_checkpoint.tensors_of(model.unet.state_dict())
    assert read.keys() == weights.keys() and all(torch.equal(read[name], w) for name, w in weights.items())
    assert ("moving average" in " ".join(model.notes)) == (states in {"four", "five"})
    assert (model.classes, model.resolution, model.prediction_type) == (CLASSES, 16, "epsilon")
    a = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
    torch.testing.assert_close(model.alphas_cumprod.double(), a, rtol=1e-4, atol=1e-7)
    assert not model.scheduler.config["clip_sample"]


def test_names_of_known_data_sets_go_with_ten_classes(tmp_path):
    ten = {n: w.contiguous() for n, w in ddim_checkpoint.tensors_of(small(10).state_dict()).items()}
    path = write(tmp_path / "ckpt.pth", ten)
    assert load(path, "ddpm-cifar10").classes[1::8] == ("automobile", "truck")
    assert load(path, "ddpm-stl10").classes[2] == "car"


def test_a_class_is_erased_and_the_result_is_such_a_checkpoint_again(weights, names, tmp_path, capsys):
    base, run = write(tmp_path / "ckpt.pth", weights), tmp_path / "run"
    flags = ["--num-forget", "4", "--num-retain", "4", "--batch-size", "2", "--steps", "2", "--num-train-steps", "2"]
    flags += ["--num-samples", "0", "--quiet", "--cache-dir", str(tmp_path / "cache"), "--density", "0.3"]
    read = ["--model", str(base), "--allow-pickle", "--config", names]
    cli.main(["--concept", "cat", *read, "--output", str(run), "--save", "single-file", *flags])
    erased, before = load(run, None), load(base, names)
    assert erased.classes == CLASSES
    change = delta.load(run / "delta.safetensors")
    after = erased.state_of(erased.network)
    assert 0 < json.loads((run / "run.json").read_text())["weights"]["changed"]
    assert delta.content_hash(delta.remove(after, change)) == delta.content_hash(before.state_of(before.network))

    published_again = load_file(run / "run.safetensors")
    expected = ddim_checkpoint.tensors_of(erased.unet.state_dict())
    assert published_again.keys() == weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in published_again.items())
    again = load(run / "run.safetensors", names)
    assert delta.content_hash(again.state_of(again.network)) == delta.content_hash(after)

    opened: Any = DDIMPipeline.from_pretrained(run)  # pyright: ignore[reportUnknownMemberType]
    x, labels = torch.randn(1, 3, 16, 16), torch.tensor([1])
    with torch.no_grad():
        seen = [unet(x, 10, class_labels=labels).sample for unet in (opened.unet, erased.unet)]
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_the_size_of_a_layer_is_not_taken_from_the_file(weights, names, tmp_path):
    """Reading costs no more memory than the file, whatever number is in the name of a level."""
    with pytest.raises(EraseError, match="does not hold the weights of a UNet of DDIM's code"):
        load(write(tmp_path / "ckpt.pth", weights | {"down.999999999.block.0.conv1.bias": torch.ones(1)}), names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"null_classes_emb": None}, "is an unconditional pixel model"),
        ({"mid.block_1.conv2.bias": None}, r"lacks 'mid.block_1.conv2.bias'"),
        ({"logvar": torch.zeros(1000)}, r"has a weight too many, 'logvar'"),
        ({"cemb.dense.1.bias": torch.zeros(3)}, r"of the shape \[3\]; it must be float of the shape \[128\]"),
        ({"norm_out.bias": torch.zeros(32, dtype=torch.int64)}, "'norm_out.bias' is int64"),
        ({"norm_out.bias": torch.full((32,), math.nan)}, "'norm_out.bias' holds values that are not finite"),
        ({"classes_emb.weight": torch.zeros(5, 32)}, "has 5 classes, but 3 are named"),
        ({"conv_in.weight": torch.zeros(33, 3, 3, 3)}, r"'conv_in.weight' is float32 of the shape \[33, 3, 3, 3\]"),
        ({"down.0.block.0.conv1.weight": torch.zeros(())}, "does not hold the weights of a UNet of DDIM's code"),
        ({f"{way}.0.attn.{n}.q.weight": None for way in ("down", "up") for n in range(3)}, "no level has attention"),
    ],
)
def test_other_files_are_refused_in_one_line_and_nothing_is_kept(change, message, weights, names, tmp_path):
    state = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    with pytest.raises(EraseError, match=message) as error:
        load(write(tmp_path / "ckpt.pth", state), names)
    assert "\n" not in str(error.value) and str(tmp_path / "ckpt.pth") in str(error.value)
    assert not [*tmp_path.glob("cache/**/*")]


def test_a_pickle_needs_permission_and_classes_need_names(weights, names, tmp_path):
    path = write(tmp_path / "ckpt.pth", weights)
    with pytest.raises(EraseError, match="is a pickle, which can run code when loaded"):
        loading.load(path, config=names)
    for config in (None, str(tmp_path)):
        with pytest.raises(EraseError, match="give --config ddpm-cifar10 or ddpm-stl10, or --config DIR"):
            load(path, config)
    save_file(weights, tmp_path / "ckpt.safetensors")
    assert loading.load(tmp_path / "ckpt.safetensors", config=names, cache_dir=tmp_path / "cache").classes == CLASSES


@pytest.mark.parametrize("states", ["four", "five", "no average", "bare", "safetensors", "old"])
@pytest.mark.parametrize("config", [None, "ddpm-cifar", "folder"])
def test_a_concept_of_a_checkpoint_without_class_names_is_answered_with_the_choices(
    states, config, weights, tmp_path, capsys
):
    """In one line, by both commands; no class is known, so a preset's name and a misspelt one get the same answer."""
    path = tmp_path / ("ckpt.safetensors" if states == "safetensors" else "ckpt.pth")
    if states == "safetensors":
        save_file(weights, path)
    elif states == "old":  # of torch before 1.6
        torch.save([weights, {}, 1, weights], path, _use_new_zipfile_serialization=False)
    else:
        write(path, weights, states=states)
    (tmp_path / "folder").mkdir()
    read = ["--model", str(path), *([] if config is None else ["--config", str(tmp_path / config)])]
    commands: list[Any] = [(cli.main, [*read, "--output", str(tmp_path / "run")])]
    commands += [(evaluation.main, ["generate", "--task", "mini-pixel", *read, "--output", str(tmp_path / "run")])]
    for (main, arguments), concept in product(commands, ("airplane", "church")):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--concept", concept])
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and len(said.splitlines()) == 1, said
        assert f"{path} is a pixel model without class names" in said and "unknown concept" not in said
        assert "give --config ddpm-cifar10 or ddpm-stl10, or --config DIR" in said
        assert (f"--config {tmp_path / str(config)} names no classes" in said) == (config is not None)
    assert not (tmp_path / "run").exists()


def test_other_files_are_not_taken_for_such_a_checkpoint(weights, tmp_path, capsys):
    """Another layout keeps the answer about presets, and a file that is not there is none."""
    save_file({"temb.dense.1.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for name in ("other.safetensors", "missing.pth"):
        with pytest.raises(SystemExit):
            cli.main(["--concept", "airplane", "--model", str(tmp_path / name), "--output", str(tmp_path / "run")])
        assert "unknown concept 'airplane'" in capsys.readouterr().err
