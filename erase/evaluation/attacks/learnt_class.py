"""Concept inversion (Pham et al., ICLR 2024) for class-conditional models: a class vector, learned from images.

Only the vector of the forgotten label is trained, by the diffusion loss min_v E ||eps - eps_theta(x_t, v)||^2; every
other weight stays. A copied label row has forgotten a label and no image, so this attack brings its class back.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.conditioning import Conditioning
from erase.evaluation.attacks.changed import changed
from erase.evaluation.attacks.protocol import CONTROL, Attack, Finding, Given, budget_of, checked_points
from erase.families.protocol import Family
from erase.progress import progress
from erase.training.batches import generator
from erase.training.words import spread_timesteps


@dataclass(frozen=True)
class LearntClass(Attack):
    """How the class vector is learned.

    num_steps, batch_size, learning_rate: of Adam; the vector begins as the mean of all classes. With 150 steps at 0.2
        it finds the class behind a copied label row of the embedded pixel model; with 60 steps at 0.03 it does not.
    at: points of the curve, in steps, the last one `num_steps`; empty for 0, 25, 50 and 100 %.
    """

    about = "the label: a new class vector, learned from images of the class"
    needs = "the model's gradients and images of the class"
    finds_classes = True
    control = "a random vector, drawn from the mean and variance of all classes"
    limits = ("An attacker with other images or more steps may find more than this vector did.",)

    num_steps: int = 150
    at: tuple[int, ...] = ()
    batch_size: int = 16
    learning_rate: float = 0.2
    num_shown: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        checked_points(self.at, self.num_steps)

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(map(str, checked_points(self.at, self.num_steps)))

    def with_budget(self, budget: Sequence[int]) -> "LearntClass":
        return replace(self, **budget_of(budget))

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        points = checked_points(self.at, self.num_steps)
        label = label_of(given.model, given.concept.forget[0])
        learned = learn_at(given.model, label, given.shown.latents, replace(self, seed=seed), points, quiet=given.quiet)
        found = {str(point): Finding({"vector": learned[point]}) for point in points}
        table = given.model.class_vectors.detach()[:-1].cpu()
        noise = torch.randn(table.shape[1], generator=generator(seed, "random class"))
        return found | {CONTROL: Finding({"vector": table.mean(0) + table.std(0) * noise})}

    @contextmanager
    def attacked(self, given: Given, finding: Finding) -> Generator[None]:
        table = given.model.class_vectors.detach().clone()
        table[label_of(given.model, given.concept.forget[0])] = finding.tensors["vector"].to(table)
        with changed(given.model.network, {table_name(given.model): table}):
            yield


def label_of(model: Family, prompt: str) -> int:
    """The label of a class name."""
    labels = model.encode_text([prompt]).labels
    assert labels is not None
    return int(labels[0])


def table_name(model: Family) -> str:
    """The name of the table of class vectors among the network's parameters."""
    return next(name for name, weight in model.network.named_parameters() if weight is model.class_vectors)


def learn_at(
    model: Family, label: int, images: Tensor, attack: LearntClass, points: Sequence[int], *, quiet: bool = False
) -> dict[int, Tensor]:
    """The class vector, [d], after each of these numbers of steps. images: of the class, [n, c, h, w]."""
    table = model.class_vectors
    vector = table.detach()[:-1].mean(0)
    optimizer = torch.optim.Adam([vector], lr=attack.learning_rate)
    found = {0: vector.detach().cpu().clone()} if 0 in points else {}
    start = table.detach().clone()
    start[label] = vector
    with (
        changed(model.network, {table_name(model): start}),
        progress(attack.num_steps, "learnt class", "steps", quiet=quiet) as bar,
    ):
        try:
            table.requires_grad_(True)
            for step in range(attack.num_steps):
                draw = generator(attack.seed, "class inversion", step)
                x = images[torch.randint(len(images), (attack.batch_size,), generator=draw)].to(model.device)
                t = spread_timesteps(attack.batch_size, model.num_timesteps, draw).to(model.device)
                eps = torch.randn(x.shape, generator=draw).to(model.device)
                c = Conditioning(labels=torch.full((attack.batch_size,), label, device=model.device))
                loss = F.mse_loss(model(model.add_noise(x, eps, t), t, c), eps)
                vector.grad = torch.autograd.grad(loss, [table])[0][label]
                optimizer.step()
                with torch.no_grad():
                    table[label] = vector
                if step + 1 in points:
                    found[step + 1] = vector.detach().cpu().clone()
                bar.note(loss=f"{loss.item():.4f}")
                bar.update()
        finally:
            table.requires_grad_(False)
    return found
