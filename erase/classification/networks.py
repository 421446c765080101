"""Image classifiers by name, with their normalisation inside: built from a seed, saved to and loaded from a file."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase import tensor_files
from erase.classification.settings import NETWORKS
from erase.delta import layout_of, require_layout
from erase.errors import EraseError

SMALL_IMAGE = 64  # pixels a side; for images up to this size the first layer keeps the resolution


@dataclass(frozen=True)
class Shape:
    """What a network is built for.

    size: side of the images in pixels. mean, std: of each channel, on pixels in [0, 1].
    """

    network: str
    num_classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Classifier(nn.Module):
    """Logits, [n, classes], for images [n, c, h, w] of uint8 or of float in [0, 1]; it normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.to(self.mean.dtype) / 255
        logits = self.network((x - self.mean) / self.std)
        return logits if isinstance(logits, Tensor) else logits.logits


def build(shape: Shape, seed: int) -> Classifier:
    """A network with random weights that depend on the seed alone.

    Raises:
        EraseError: unknown network.
    """
    if shape.network not in _BUILDERS:
        raise EraseError(f"unknown network {shape.network!r}; choose {', '.join(NETWORKS)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(_BUILDERS[shape.network](shape), shape.mean, shape.std).eval()


def save(path: str | Path, model: Classifier, shape: Shape, header: dict[str, Any]) -> None:
    """Write weights, buffers and the shape to one safetensors file.

    header: how the weights were made, as JSON values.
    """
    tensor_files.write_tensors(path, model.state_dict(), {**header, "kind": "classifier", "shape": asdict(shape)})


def load(path: str | Path) -> tuple[Classifier, Shape, dict[str, Any]]:
    """The classifier of a file that `save` wrote, or of model.safetensors in a folder; its shape and its header.

    Raises:
        EraseError: no such file, or no classifier.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    header = tensor_files.read_metadata(path)
    if header.get("kind") != "classifier":
        raise EraseError(f"{path} is not a classifier: its header does not say which network it is")
    shape = _shape(header.get("shape"), path)
    model, state = build(shape, seed=0), tensor_files.read_tensors(path)
    expected = f"a {shape.network} for {shape.num_classes} classes"
    try:
        require_layout(layout_of(state), layout_of(model.state_dict()), expected)
    except EraseError as error:
        raise EraseError(f"{path} is damaged: {error}; copy or make it again") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise EraseError(f"{path} is damaged: {name!r} holds values that are not finite; copy or make it again")
    model.load_state_dict(state)
    return model, shape, header


_MOST = {"num_classes": 100_000, "channels": 64, "size": 4096}


def _shape(stored: Any, path: Path) -> Shape:
    """The shape in a file's header.

    Raises:
        EraseError: it describes no network.
    """
    try:
        shape = Shape(**{**stored, **{name: tuple(map(float, stored[name])) for name in ("mean", "std")}})
        numbers = {name: getattr(shape, name) for name in _MOST}
        whole = all(type(number) is int and 0 < number <= _MOST[name] for name, number in numbers.items())
        if not whole or not len(shape.mean) == len(shape.std) == shape.channels or not isinstance(shape.network, str):
            raise ValueError
        if not all(map(math.isfinite, shape.mean)) or not all(0 < std < math.inf for std in shape.std):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise EraseError(f"{path} is damaged: its header describes no network; copy or make it again") from error
    return shape


def require_fit(shape: Shape, num_classes: int, channels: int, size: int, where: str) -> None:
    """Raise an EraseError unless a network fits the images and the number of classes; `where` names its file."""
    for word, here, there in (
        ("classes", shape.num_classes, num_classes),
        ("channels", shape.channels, channels),
        ("pixels a side", shape.size, size),
    ):
        if here != there:
            raise EraseError(f"{where} is a {shape.network} for {here} {word}, but the data set has {there}")


# --- architectures ----------------------------------------------------------------------------------------------------


def _small(shape: Shape) -> nn.Module:
    """Three convolutions: 25,000 weights that learn digits in seconds."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    layers = [*stage(shape.channels, 16), *stage(16, 32), pool, *stage(32, 64), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, shape.num_classes))


def _mlp(shape: Shape) -> nn.Module:
    """Two hidden layers of 128 with batch normalisation: 27,000 weights for digits, a second of training."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]

    layers = [nn.Flatten(), *stage(shape.channels * shape.size**2, 128), *stage(128, 128)]
    return nn.Sequential(*layers, nn.Linear(128, shape.num_classes))


class _Residual(nn.Module):
    """x + g(g(x)), where g is a 3 x 3 convolution with batch normalisation and ReLU."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = _convolution(width, width, 3), _convolution(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class _Scaled(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def _convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def _resnet9s(shape: Shape) -> nn.Module:
    """A residual network of 0.46 million weights for 32 x 32 images: 81 % on CIFAR-10 after minutes on one CPU core.

    As the ResNet-9 of Coleman et al. (DAWNBench, 2017), but narrower and with a first layer of stride 2. The factor of
    the logits makes training with learning rates around 0.2 stable.
    """
    return nn.Sequential(
        _convolution(shape.channels, 32, 4, stride=2),
        _convolution(32, 64, 3),
        nn.MaxPool2d(2),
        _Residual(64),
        _convolution(64, 128, 3),
        nn.MaxPool2d(2),
        _Residual(128),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(128, shape.num_classes),
        _Scaled(0.125),
    )


def _resnet(
    layer_type: str, depths: Sequence[int], widths: Sequence[int], *, small_stem: bool = True
) -> Callable[[Shape], nn.Module]:
    """small_stem: use a smaller stem for small images; else the ImageNet stem of He et al. (2016) for all."""

    def make(shape: Shape) -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            num_channels=shape.channels,
            embedding_size=64,
            hidden_sizes=list(widths),
            depths=list(depths),
            layer_type=layer_type,
        )
        config.num_labels = shape.num_classes
        network = ResNetForImageClassification(config)
        if small_stem and shape.size <= SMALL_IMAGE:  # He et al.'s for CIFAR: 3 x 3, no stride, no pooling
            stem: Any = network.resnet.embedder
            stem.embedder.convolution = nn.Conv2d(shape.channels, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(stem.embedder.convolution.weight, mode="fan_out", nonlinearity="relu")
            stem.pooler = nn.Identity()
        return network

    return make


def _vgg16_bn(shape: Shape) -> nn.Module:
    """Configuration D of Simonyan & Zisserman (2015) with batch normalisation and one linear layer, as for CIFAR."""
    layers: list[nn.Module] = []
    inputs = shape.channels
    for outputs, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, shape.num_classes))


def _vit(shape: Shape) -> nn.Module:
    """ViT-S (Steiner et al., 2022): 12 layers of 384, on patches of an eighth of the side, 16 pixels at most."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=shape.size,
        patch_size=max(1, min(16, shape.size // 8)),
        num_channels=shape.channels,
    )
    config.num_labels = shape.num_classes
    return ViTForImageClassification(config)


def _swin_t(shape: Shape) -> nn.Module:
    """Swin-T (Liu et al., 2021); small images use patches of 1 pixel (up to 32) or 2, and windows of 4."""
    from transformers import SwinConfig, SwinForImageClassification

    is_small = shape.size <= SMALL_IMAGE
    patch = (1 if shape.size <= 32 else 2) if is_small else 4
    last = math.ceil(shape.size / (patch * 8))  # side of the last stage's grid, which no window may exceed
    config = SwinConfig(
        image_size=shape.size,
        num_channels=shape.channels,
        patch_size=patch,
        window_size=min(4 if is_small else 7, last),
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
    )
    config.num_labels = shape.num_classes
    return SwinForImageClassification(config)


_BUILDERS: dict[str, Callable[[Shape], nn.Module]] = {
    "mlp": _mlp,
    "small": _small,
    "resnet9s": _resnet9s,
    "resnet18": _resnet("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet18_imagenet": _resnet("basic", (2, 2, 2, 2), (64, 128, 256, 512), small_stem=False),
    "resnet50": _resnet("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    "vgg16_bn": _vgg16_bn,
    "vit": _vit,
    "swin_t": _swin_t,
}
