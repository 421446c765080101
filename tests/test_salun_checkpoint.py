"""Laws of reading classifiers of SalUn's code: same logits, nothing unpickled without being said, clear refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from erase.classification import cli as classifier_cli
from erase.classification import data, networks, salun_checkpoint
from erase.classification.data import Dataset, Images
from erase.errors import EraseError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN))
        self.register_buffer("std", torch.tensor(STD))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (getattr(self, name)[None, :, None, None] for name in ("mean", "std"))
        return (x - mean) / std


class ResNet18(nn.Module):
    """He et al. (2016) for CIFAR, with torchvision's names and the normalisation inside."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.normalize = Normalize()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        for number, (inputs, outputs, stride) in enumerate(widths, start=1):
            setattr(self, f"layer{number}", nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1)))
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(self.normalize(x))).relu()
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


def images(n: int, seed: int) -> Images:
    x = torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Images(x, torch.arange(n) % 3)


DATASET = Dataset("toy", images(12, 0), images(6, 1), ("a", "b", "c"), MEAN, STD)


@pytest.fixture(scope="module")
def theirs() -> ResNet18:
    """With statistics of batch normalisation that are not the initial ones."""
    torch.manual_seed(0)
    model = ResNet18(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def checkpoint(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """As their code writes it; the accuracies are scalars of numpy."""
    content = {"result": {"train_ta": [np.float64(99.5)]}, "epoch": 182, "best_sa": np.float64(94.5), **more}
    torch.save({**content, "state_dict": state}, path)
    return path


def read(path: Path, network: str = "resnet18", **how: Any) -> Any:
    return salun_checkpoint.load(path, network, DATASET, **{"allow_pickle": True, **how})


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_classifier_gives_the_logits_of_their_code(theirs, prefix, tmp_path):
    """Up to the rounding of convolutions in another memory format. (4.4)"""
    said: list[str] = []
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    model, shape = read(checkpoint(tmp_path / "0model_SA_best.pth.tar", state), tell=said.append)
    x = DATASET.train.x
    with torch.no_grad():
        assert torch.allclose(model(x), theirs(x.float() / 255), atol=1e-4)
    assert (shape.network, shape.num_classes, shape.size) == ("resnet18", 3, 16)
    assert len(said) == 1 and "numpy" in said[0] and "none of their code ran" in said[0]


def test_the_whole_command_begins_from_it(theirs, tmp_path, monkeypatch, capsys):
    """The unlearned model is written in our format, which is read without a flag. (4.4)"""
    monkeypatch.setattr(data, "load", lambda name, cache_dir, **_: DATASET)
    path = checkpoint(tmp_path / "0model_SA_best.pth.tar", theirs.state_dict())
    options = ["--data", "toy", "--network", "resnet18", "--forget", "25%", "--method", "ga", "--epochs", "1"]
    options += ["--model", str(path), "--output", str(tmp_path / "run"), "--learning-rate", "1e-6", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        classifier_cli.main(options)
    assert end.value.code == 2 and "is a pickle, which can run code" in capsys.readouterr().err
    classifier_cli.main([*options, "--allow-pickle", "--quiet"])
    captured = capsys.readouterr()
    assert "also holds objects that are no weights" in captured.out and captured.err == ""
    model, shape, _ = networks.load(tmp_path / "run")
    assert shape.network == "resnet18"


def test_a_file_without_normalisation_takes_the_data_sets(theirs, tmp_path):
    said: list[str] = []
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("normalize")}
    path = tmp_path / "plain.pth"
    torch.save(state, path)
    _, shape = read(path, tell=said.append)
    assert shape.mean == pytest.approx(MEAN) and "does not say how images are normalised" in said[0]


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({}, {"allow_pickle": False}, "is a pickle, which can run code when loaded; pass --allow-pickle"),
        ({}, {"network": "vgg16_bn"}, "is read as a ResNet, not as vgg16_bn; give --network resnet18, "),
        ({}, {"network": "resnet50"}, "is no resnet50: .*give the --network that it was trained as"),
        ({"features.0.weight": torch.zeros(1)}, {}, "has a weight 'features.0.weight', which SalUn's ResNets"),
        ({"layer5.0.conv1.weight": torch.zeros(1)}, {}, "has a weight 'layer5.0.conv1.weight'"),
        ({"layer1.0.conv1.weight": torch.zeros(1)}, {}, "is no resnet18: .*has 1 weights here but 36864"),
        ({"fc.weight": None}, {}, "holds no ResNet: it has no conv1.weight or no fc.weight"),
        ({"bn1.running_mean": None}, {}, "is no resnet18: .*embedder.normalization.running_mean' is missing"),
    ],
)
def test_another_file_is_one_line(change, how, message, theirs, tmp_path):
    """(4.4, 4.10)"""
    state = {name: tensor for name, tensor in {**theirs.state_dict(), **change}.items() if tensor is not None}
    path = checkpoint(tmp_path / "a.pth.tar", state)
    with pytest.raises(EraseError, match=f"^{path} {message}") as error:
        read(path, **how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"x" * 100])
def test_a_damaged_file_is_one_line(content, tmp_path):
    path = tmp_path / "a.pth.tar"
    path.write_bytes(content)
    with pytest.raises(EraseError, match=f"^{path} "):
        read(path)
    with pytest.raises(EraseError, match="no such file"):
        read(tmp_path / "b.pth.tar")
