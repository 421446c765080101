"""Merging: the erased weights averaged with the base's, W = (1 - a) W_erased + a W_base, as users merge checkpoints."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from erase.errors import EraseError
from erase.evaluation.attacks.changed import changed, networks, weights_of
from erase.evaluation.attacks.protocol import CONTROL, Attack, Finding, Given
from erase.training.batches import generator


@dataclass(frozen=True)
class Merge(Attack):
    """Which averages are tried.

    percents: shares of the base, rising. At 100 % the model is the base.
    """

    about = "the weights of network and text encoders: averaged with the base's"
    needs = "the weights of the erased model and of the base"
    unit = "% of the base"
    control = "each weight moves as far, with a random sign"
    limits = ("A base that can be downloaded makes this attack free.",)
    is_random = False

    percents: tuple[int, ...] = (25, 50)

    def __post_init__(self) -> None:
        if not self.percents or sorted(set(self.percents)) != list(self.percents) or self.percents[-1] > 100:
            raise EraseError(f"percents is {'|'.join(map(str, self.percents))}; the numbers must rise up to 100")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(map(str, self.percents))

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        found = {str(percent): Finding(facts={"percent": percent}) for percent in self.percents}
        return found | {CONTROL: Finding(facts={"percent": self.percents[-1], "random_signs": True})}

    @contextmanager
    def attacked(self, given: Given, finding: Finding) -> Generator[None]:
        share, random = finding.facts["percent"] / 100, finding.facts.get("random_signs", False)
        pairs = zip(networks(given.model), networks(given.open_base()), strict=True)
        with ExitStack() as stack:
            for network, other in pairs:
                base, merged = weights_of(other), {}
                for name, weight in weights_of(network).items():
                    step = share * (base[name].to(weight) - weight)
                    if random:
                        signs = torch.randint(2, step.shape, generator=generator(0, "merge", name)) * 2 - 1
                        step = step * signs.to(step)
                    merged[name] = weight + step
                stack.enter_context(changed(network, merged))
            yield
