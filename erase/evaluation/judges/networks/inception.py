"""The Inception network of FID: TensorFlow's graph of 2015-12-05, weights from a local file, features [n, 2048].

It differs from the Inception-v3 of other libraries: averages leave out the padding, the last block pools by the
maximum, there are 1,008 classes, and images are resized as TensorFlow 1 does. FID is defined by these (Heusel et al.
2017, arXiv:1706.08500); with another network it is another number.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from erase.errors import EraseError, no_file
from erase.files import file_hash

SIZE = 299
FILE_NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")  # the same bytes
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAMES[0]}"


def resize(image: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize of [..., h, w] to [..., size, size]: no antialias, corner pixels at the corner.

    Output pixel i lies at i * old / new (others say (i + 1/2) * old / new - 1/2).
    """
    return _resize_rows(_resize_rows(image, size).mT, size).mT


def _resize_rows(image: Tensor, size: int) -> Tensor:
    width = image.shape[-1]
    position = torch.arange(size, device=image.device, dtype=torch.float32) * (width / size)
    left = position.long().clamp_max(width - 1)
    right = (left + 1).clamp_max(width - 1)
    return image[..., left] + (image[..., right] - image[..., left]) * (position - left)


class Step(NamedTuple):
    """A convolution inside a block; with stride 1 the image keeps its size, with stride 2 nothing is padded."""

    name: str
    outputs: int
    kernel: int | tuple[int, int]
    stride: int = 1


class Convolution(nn.Module):
    """With batch normalisation and ReLU after it, as everywhere in this network."""

    def __init__(self, inputs: int, outputs: int, kernel: Any, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)))


POOLS = {
    "mean": lambda x: avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "max": lambda x: max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: max_pool2d(x, 3, stride=2),
}


class Block(nn.Module):
    """Branches side by side, their channels one after the other.

    A branch is a row of steps: a pool, a convolution, or (at its end) a list of convolutions side by side.
    """

    def __init__(self, inputs: int, *branches: Sequence[str | Step | list[Step]]) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = inputs
            for step in branch:
                for name, outputs, kernel, stride in _convolutions(step):
                    high, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    padding = (high // 2, wide // 2) if stride == 1 else 0
                    self.add_module(name, Convolution(width, outputs, (high, wide), stride, padding))
                width = sum(one.outputs for one in _convolutions(step)) or width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._follow(branch, x) for branch in self.branches], 1)

    def _follow(self, branch: Sequence[str | Step | list[Step]], x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = POOLS[step](x)
            else:
                x = torch.cat([self.get_submodule(one.name)(x) for one in _convolutions(step)], 1)
        return x


def _convolutions(step: str | Step | list[Step]) -> list[Step]:
    if isinstance(step, str):
        return []
    return step if isinstance(step, list) else [step]


def _block_35(inputs: int, pooled: int) -> Block:
    return Block(
        inputs,
        [Step("branch1x1", 64, 1)],
        [Step("branch5x5_1", 48, 1), Step("branch5x5_2", 64, 5)],
        [Step("branch3x3dbl_1", 64, 1), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3)],
        ["mean", Step("branch_pool", pooled, 1)],
    )


def _block_35_to_17(inputs: int) -> Block:
    return Block(
        inputs,
        [Step("branch3x3", 384, 3, 2)],
        [Step("branch3x3dbl_1", 64, 1), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3, 2)],
        ["halve"],
    )


def _block_17(inputs: int, narrow: int) -> Block:
    return Block(
        inputs,
        [Step("branch1x1", 192, 1)],
        [Step("branch7x7_1", narrow, 1), Step("branch7x7_2", narrow, (1, 7)), Step("branch7x7_3", 192, (7, 1))],
        [
            Step("branch7x7dbl_1", narrow, 1),
            Step("branch7x7dbl_2", narrow, (7, 1)),
            Step("branch7x7dbl_3", narrow, (1, 7)),
            Step("branch7x7dbl_4", narrow, (7, 1)),
            Step("branch7x7dbl_5", 192, (1, 7)),
        ],
        ["mean", Step("branch_pool", 192, 1)],
    )


def _block_17_to_8(inputs: int) -> Block:
    return Block(
        inputs,
        [Step("branch3x3_1", 192, 1), Step("branch3x3_2", 320, 3, 2)],
        [
            Step("branch7x7x3_1", 192, 1),
            Step("branch7x7x3_2", 192, (1, 7)),
            Step("branch7x7x3_3", 192, (7, 1)),
            Step("branch7x7x3_4", 192, 3, 2),
        ],
        ["halve"],
    )


def _block_8(inputs: int, pool: str) -> Block:
    def crossed(name: str) -> list[Step]:
        return [Step(f"{name}a", 384, (1, 3)), Step(f"{name}b", 384, (3, 1))]

    return Block(
        inputs,
        [Step("branch1x1", 320, 1)],
        [Step("branch3x3_1", 384, 1), crossed("branch3x3_2")],
        [Step("branch3x3dbl_1", 448, 1), Step("branch3x3dbl_2", 384, 3), crossed("branch3x3dbl_3")],
        [pool, Step("branch_pool", 192, 1)],
    )


class Network(nn.Module):
    """Images [n, 3, 299, 299] in [-1, 1) to features [n, 2048]; the classes' layer is there for its weights only."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = _block_35(192, pooled=32)
        self.Mixed_5c = _block_35(256, pooled=64)
        self.Mixed_5d = _block_35(288, pooled=64)
        self.Mixed_6a = _block_35_to_17(288)
        self.Mixed_6b = _block_17(768, narrow=128)
        self.Mixed_6c = _block_17(768, narrow=160)
        self.Mixed_6d = _block_17(768, narrow=160)
        self.Mixed_6e = _block_17(768, narrow=192)
        self.Mixed_7a = _block_17_to_8(768)
        self.Mixed_7b = _block_8(1280, pool="mean")
        self.Mixed_7c = _block_8(2048, pool="max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(POOLS["halve"](x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


class Inception:
    """The network with its weights.

    path: the file named `FILE_NAMES`, or one of its layout; without it the cache of torch.hub is looked into, where
        torch-fidelity and pytorch-fid keep it.
    """

    def __init__(self, path: str | Path | None = None, device: str = "cpu") -> None:
        path = _find(path)
        self.device = device
        self.network = _load(path).to(device)
        self.weights = file_hash(path)  # the published file's begins with 6726825d

    @property
    def identity(self) -> dict[str, Any]:
        return {"weights": self.weights}

    @torch.inference_mode()
    def see(self, images: Sequence[np.ndarray]) -> Tensor:
        """Features of uint8 images [h, w, 3]: [n, 2048], on the CPU."""
        tensors = [torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) for image in images]
        x = torch.stack([resize(tensor.to(self.device), SIZE) for tensor in tensors])
        return self.network((x - 128) / 128).cpu()


def _find(path: str | Path | None) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    places = [Path(path).expanduser()] if path else [folder / name for name in FILE_NAMES]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        where = no_file(places[0]) if path else f"{folder} has no {FILE_NAMES[0]}"
        raise EraseError(f"{where}; FID needs these weights: put {URL} there, or give the path of your copy")
    return found


def _load(path: Path) -> Network:
    network = Network()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing, surplus = network.load_state_dict(state, strict=False)
    except Exception as error:  # pickle, zip and torch have their own kinds; all are the file's fault
        reason = " ".join(str(error).split())[:200]
        raise EraseError(f"{path} holds no Inception weights ({reason}); download {URL} again") from error
    wrong = {name for name in missing if not name.endswith("num_batches_tracked")} | set(surplus)
    if wrong:
        raise EraseError(f"{path} is no file of the 2015 Inception: {min(wrong)!r} does not fit; download {URL}")
    return network.requires_grad_(False).eval()
