"""The embedded model's judge: a small CNN, trained on drawings, that recognises object, colour and style."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from erase.mini import world
from erase.tensor_files import read_metadata, read_tensors

NONE = "none"  # an image that does not show exactly one object of the world
HEADS: dict[str, tuple[str, ...]] = {
    "object": (*world.OBJECTS, NONE),
    "colour": (*world.COLOURS, NONE),
    "style": (*world.STYLES, NONE),
}


class Judge(nn.Module):
    """Logits of object, colour and style for images [n, 3, 64, 64] in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

        self.trunk = nn.Sequential(*stage(3, 24), *stage(24, 48), *stage(48, 96), *stage(96, 96), nn.Flatten())
        self.heads = nn.ModuleDict({head: nn.Linear(96 * 16, len(labels)) for head, labels in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {head: layer(features) for head, layer in self.heads.items()}


def load(path: str | Path) -> Judge:
    """The trained judge. Its accuracy on held-out drawings is in the file's header (`accuracy`)."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in read_tensors(path).items()})
    return judge.eval()


def accuracy(path: str | Path) -> dict[str, float]:
    """Share of held-out drawings that each head recognises, and under "num_drawings" their number."""
    return read_metadata(path)["accuracy"]


def to_tensor(images: Iterable[np.ndarray]) -> Tensor:
    """A tensor [n, 3, 64, 64] in [-1, 1] of uint8 images [64, 64, 3]."""
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def name(judge: Judge, images: Iterable[np.ndarray], *, batch_size: int = 128) -> list[dict[str, str]]:
    """The judge's answer for each uint8 image [64, 64, 3]: {"object": ..., "colour": ..., "style": ...}."""
    images, answers = list(images), []
    for start in range(0, len(images), batch_size):
        logits = judge(to_tensor(images[start : start + batch_size]))
        best = {head: values.argmax(1).tolist() for head, values in logits.items()}
        num = len(best["object"])
        answers += [{head: HEADS[head][best[head][index]] for head in HEADS} for index in range(num)]
    return answers


def examples(rng: np.random.Generator, num: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Drawings with their labels. One in ten does not show exactly one object; 30 % are blurred or noisy."""
    images, labels = [], {head: [] for head in HEADS}
    for _ in range(num):
        scene = world.sample_scene(rng)
        image = world.draw(scene, rng)
        truth = {"object": scene.object, "colour": scene.colour or NONE, "style": scene.style or NONE}
        if rng.random() < 0.1:
            image, truth = _nothing(image, rng), dict.fromkeys(HEADS, NONE)
        images.append(image)
        for head in HEADS:
            labels[head].append(HEADS[head].index(truth[head]))
    batch = to_tensor(images)
    kind = rng.random(num)
    blurred = torch.nn.functional.avg_pool2d(batch, 3, 1, 1, count_include_pad=False)
    batch = torch.where(torch.from_numpy(kind < 0.15)[:, None, None, None], blurred, batch)
    noise = torch.from_numpy(rng.normal(0, 0.12, batch.shape).astype(np.float32))
    batch = torch.where(torch.from_numpy((kind > 0.15) & (kind < 0.3))[:, None, None, None], batch + noise, batch)
    return batch.clamp(-1, 1), {head: torch.tensor(values) for head, values in labels.items()}


def _nothing(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image without an object: plain background, noise, a mix of two drawings, or shuffled tiles of a drawing."""
    kind = rng.integers(4)
    if kind == 0:
        return np.broadcast_to(image[:1, :1], image.shape).copy()
    if kind == 1:
        return rng.integers(0, 256, image.shape, dtype=np.uint8)
    if kind == 2:
        other = world.draw(world.sample_scene(rng), rng)
        return (image // 2 + other // 2).astype(np.uint8)
    tiles = image.reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 16, 3)
    return tiles[rng.permutation(16)].reshape(4, 4, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(64, 64, 3)
