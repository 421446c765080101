"""Fisher forgetting: noise on weights that matter little for the retain set (Golatkar et al., CVPR 2020)."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.classification.data import Images
from erase.classification.methods.protocol import Solves, Task, Values, require_bounds

BATCH = 32  # F depends on it: gradients are averaged over a batch before they are squared
CLASS_VARIANCE = 1e-4  # of a forgotten class's row in the last layer, whose mean is 0


@dataclass(frozen=True)
class FisherForgetting(Solves):
    """theta <- mu + sqrt(s) N(0, 1), as in SalUn's code ("fisher_new").

    F = mean over batches of 32 images of D_r of sum_y mean(p_y) g_y^2, where g_y is the gradient of the batch's mean
    cross-entropy with the label y. s = alpha min(1 / F, cap); in the last layer alpha min(1 / F, cap / 10). In matrices
    and kernels s is averaged over the inputs (dimension 1). In the last layer and in vectors, such as the weights of
    batch normalisation, s is multiplied by 10. mu = theta. If D_f is a whole class, its row of the last layer has
    mu = 0 and s = 1e-4 before the multiplication.
    """

    alpha: Annotated[float, "variance of the noise where F is 1; a larger one forgets more and damages more"] = 1e-7
    cap: Annotated[float, "largest accepted 1 / F; limits the noise on weights with no effect on D_r"] = 1e3
    num_samples: Annotated[int, "number of images of D_r that F is estimated from, chosen at random; 0: all"] = 0

    def __post_init__(self) -> None:
        require_bounds(self, alpha=(0, 1e30), cap=(0, 1e30), num_samples=(0, 1_000_000_000))

    def solve(self, task: Task) -> Values:
        images = task.retain
        if self.num_samples:
            order = torch.randperm(len(images), generator=task.generator)[: self.num_samples]
            images = images[order.to(images.y.device)]
        gone = forgotten_class(task)
        new: Values = {}
        for (name, w), information in zip(task.parameters().items(), fisher(task, images), strict=True):
            mu, s = w.detach().clone(), self._variance(information, task.num_classes, gone)
            if gone is not None and len(mu) == task.num_classes:
                mu[gone] = 0
            new[name] = mu + s.sqrt() * torch.randn(mu.shape, generator=task.generator).to(mu)
        return new

    def _variance(self, information: Tensor, num_classes: int, gone: int | None) -> Tensor:
        is_last = len(information) == num_classes  # as in the code: any tensor with one row per class
        s = self.alpha * (1 / (information + 1e-8)).clamp(max=self.cap / 10 if is_last else self.cap)
        if s.dim() > 1:
            s = s.mean(1, keepdim=True).expand_as(information).clone()
        if is_last and gone is not None:
            s[gone] = CLASS_VARIANCE
        return 10 * s if is_last or s.dim() == 1 else s


def fisher(task: Task, images: Images) -> list[Tensor]:
    """F of every parameter, see `FisherForgetting`."""
    weights = list(task.parameters().values())
    total, num = [torch.zeros_like(w) for w in weights], 0
    for batch in task.loader(images, BATCH, shuffle=False):
        logits, num = task.model(batch.pixels), num + 1
        shares = logits.detach().softmax(1).mean(0)
        for y, share in enumerate(shares):
            loss = F.cross_entropy(logits, torch.full_like(batch.y, y))
            for one, g in zip(total, torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
                one += share * g.square()
    return [one / num for one in total]


def forgotten_class(task: Task) -> int | None:
    """The class that is forgotten as a whole; None if D_f has several classes or D_r has the class too."""
    first = int(task.forget.y[0])
    is_whole = bool((task.forget.y == first).all()) and not bool((task.retain.y == first).any())
    return first if is_whole else None
