"""The embedded model's judge: a small CNN, trained on real drawings, that names object, colour and style."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from erase.mini import world
from erase.tensor_files import read_metadata, read_tensors

NONE = "none"  # a picture that shows no single object of the world
HEADS: dict[str, tuple[str, ...]] = {
    "object": (*world.OBJECTS, NONE),
    "colour": (*world.COLOURS, NONE),
    "style": (*world.STYLES, NONE),
}


class Judge(nn.Module):
    """Logits of object, colour and style for pictures [n, 3, 64, 64] in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

        self.trunk = nn.Sequential(*stage(3, 24), *stage(24, 48), *stage(48, 96), *stage(96, 96), nn.Flatten())
        self.heads = nn.ModuleDict({head: nn.Linear(96 * 16, len(labels)) for head, labels in HEADS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.trunk(pictures)
        return {head: layer(features) for head, layer in self.heads.items()}


def load(path: str | Path) -> Judge:
    """The trained judge; its accuracy on held-out drawings is in the file's header (`accuracy`)."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in read_tensors(path).items()})
    return judge.eval()


def accuracy(path: str | Path) -> dict[str, float]:
    """Share of held-out drawings named correctly, for each head, with their number under "num_drawings"."""
    return read_metadata(path)["accuracy"]


def to_tensor(pictures: Iterable[np.ndarray]) -> Tensor:
    """uint8 pictures [64, 64, 3] to a tensor [n, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def name(judge: Judge, pictures: Iterable[np.ndarray], *, batch_size: int = 128) -> list[dict[str, str]]:
    """What the judge sees in each uint8 picture [64, 64, 3]: {"object": ..., "colour": ..., "style": ...}."""
    pictures, answers = list(pictures), []
    for start in range(0, len(pictures), batch_size):
        logits = judge(to_tensor(pictures[start : start + batch_size]))
        best = {head: values.argmax(1).tolist() for head, values in logits.items()}
        num = len(best["object"])
        answers += [{head: HEADS[head][best[head][index]] for head in HEADS} for index in range(num)]
    return answers


def examples(rng: np.random.Generator, num: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Drawings with their labels, one in ten showing no single object; a third blurred, faded or noisy."""
    pictures, labels = [], {head: [] for head in HEADS}
    for _ in range(num):
        scene = world.sample_scene(rng)
        picture = world.draw(scene, rng)
        truth = {"object": scene.object, "colour": scene.colour or NONE, "style": scene.style or NONE}
        if rng.random() < 0.1:
            picture, truth = _nothing(picture, rng), dict.fromkeys(HEADS, NONE)
        pictures.append(picture)
        for head in HEADS:
            labels[head].append(HEADS[head].index(truth[head]))
    batch = to_tensor(pictures)
    kind = rng.random(num)
    blurred = torch.nn.functional.avg_pool2d(batch, 3, 1, 1, count_include_pad=False)
    batch = torch.where(torch.from_numpy(kind < 0.15)[:, None, None, None], blurred, batch)
    noise = torch.from_numpy(rng.normal(0, 0.12, batch.shape).astype(np.float32))
    batch = torch.where(torch.from_numpy((kind > 0.15) & (kind < 0.3))[:, None, None, None], batch + noise, batch)
    return batch.clamp(-1, 1), {head: torch.tensor(values) for head, values in labels.items()}


def _nothing(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Plain ground, noise, a mix of two drawings, or a drawing cut into shuffled tiles."""
    kind = rng.integers(4)
    if kind == 0:
        return np.broadcast_to(picture[:1, :1], picture.shape).copy()
    if kind == 1:
        return rng.integers(0, 256, picture.shape, dtype=np.uint8)
    if kind == 2:
        other = world.draw(world.sample_scene(rng), rng)
        return (picture // 2 + other // 2).astype(np.uint8)
    tiles = picture.reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 16, 3)
    return tiles[rng.permutation(16)].reshape(4, 4, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(64, 64, 3)
