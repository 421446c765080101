"""The same jobs done the plain way, as SalUn's code and training scripts do them: what `bench` compares with.

Written for the purpose from the published formulas; nothing here is used by a run.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def argsort_mask(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """int64 zeros and ones: the rank of each score, by sorting the sorting, against int(N * density)."""
    every = -torch.cat([score.flatten() for score in scores.values()])
    k = int(len(every) * density)
    ranks = torch.argsort(torch.argsort(every))
    mask, start = {}, 0
    for name, score in scores.items():
        part = ranks[start : start + score.numel()]
        mask[name] = (part < k).long().reshape(score.shape)
        start += score.numel()
    return mask


def classifier_masks(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], densities: Sequence[float]
) -> dict[float, dict[str, Tensor]]:
    """Masks as SalUn's `generate_mask.py` makes them: gradients of -CE added up batch by batch, then everything is
    sorted again for every density."""
    model.eval()
    gradients: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in batches:
        model.zero_grad()
        loss = -F.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[name] += parameter.grad
    gradients = {name: gradient.abs() for name, gradient in gradients.items()}
    return {density: argsort_mask(gradients, density) for density in densities}


class DenseAdam:
    """torch's Adam over whole tensors, after each gradient was multiplied in place with its mask, int64 in SalUn's.

    What each step of SalUn's `random_label.py` does: `grad *= mask[name]` for all 686 tensors, then `Adam.step()`.
    It runs on a GPU, where torch chooses the foreach Adam; so that one it is here too, with its temporaries. (On a CPU
    torch would choose a loop, which takes 0.8 to 0.95 of its time.) Left out is what belongs to no optimizer: the
    mask's way from the host to the GPU, 6.9 GB a step, and a sleep of 0.1 s.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], mask: Mapping[str, Tensor], lr: float, *, foreach: bool = True
    ):
        self.parameters, self.mask = parameters, mask
        self.adam = torch.optim.Adam(parameters.values(), lr=lr, foreach=foreach)

    def step(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                parameter.grad *= self.mask[name]
        self.adam.step()

    def num_bytes(self) -> int:
        """Of both moments and the mask."""
        moments = (t for state in self.adam.state.values() for t in state.values() if t.ndim or t.numel() > 1)
        return sum(t.nbytes for t in (*moments, *self.mask.values()))


class DenseSGD:
    """torch's SGD over whole tensors as SalUn's code for classifiers has it: `grad *= mask`, a step, and then
    p = p m + theta_0 (1 - m) and momentum *= m, tensor by tensor; whether a mask is all ones is asked every time."""

    def __init__(self, parameters: Mapping[str, Parameter], mask: Mapping[str, Tensor], lr: float):
        self.parameters, self.mask = parameters, mask
        self.start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.sgd = torch.optim.SGD(parameters.values(), lr=lr, momentum=0.9, weight_decay=5e-4)

    @torch.no_grad()
    def step(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                parameter.grad *= self.mask[name]
        self.sgd.step()
        for name, parameter in self.parameters.items():
            mask = self.mask[name]
            if bool((mask == 1).all()):
                continue
            parameter.copy_(parameter * mask + self.start[name] * (1 - mask))
            self.sgd.state[parameter]["momentum_buffer"].mul_(mask)


def classifier_step(model: nn.Module, optimizer: DenseSGD, x: Tensor, y: Tensor) -> tuple[float, float]:
    """One step on the true or random labels `y`, statistics of batch normalisation following; loss and accuracy, which
    SalUn's code reads at every step. Loading and augmenting the images is left out."""
    model.train()
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    optimizer.sgd.zero_grad()
    loss.backward()
    optimizer.step()
    right = logits.detach().float().topk(1, dim=1).indices.t().eq(y.view(1, -1))
    return loss.item(), right.float().mean().item()


def svc_attack(
    members: "NDArray[np.float64]", others: "NDArray[np.float64]", target: "NDArray[np.float64]"
) -> "NDArray[np.bool_]":
    """Which of `target` look unseen to scikit-learn's SVC(C=3, gamma="auto", kernel="rbf"), as SalUn's code fits it."""
    import numpy as np
    from sklearn.svm import SVC

    x = np.concatenate([members, others])[:, None]
    fitted = SVC(C=3, gamma="auto", kernel="rbf").fit(x, np.arange(len(x)) < len(members))
    return ~fitted.predict(target[:, None])


def salun_step(
    unet: Any,
    vae: Any,
    text_encoder: Any,
    scheduler: Any,
    optimizer: DenseAdam,
    images: Mapping[str, Tensor],
    words: Mapping[str, Tensor],
    alpha: float = 0.5,
) -> float:
    """One step of random labels: images and words are encoded anew, both branches go through before one backward.

    images: "forget" and "retain", [n, 3, h, w], in [-1, 1]. words: "forget", "other" and "retain", token ids, [n, 77].
    """
    optimizer.adam.zero_grad()

    def encoded(which: str) -> Tensor:
        with torch.no_grad():
            return vae.encode(images[which]).latent_dist.sample() * vae.config.scaling_factor

    def said(which: str) -> Tensor:
        with torch.no_grad():
            return text_encoder(words[which]).last_hidden_state

    z_f, z_p, z_r = encoded("forget"), encoded("forget"), encoded("retain")
    eps_f, eps_r = torch.randn_like(z_f), torch.randn_like(z_r)
    t_f, t_r = (torch.randint(0, 1000, (len(z),)) for z in (z_f, z_r))
    output = unet(scheduler.add_noise(z_r, eps_r, t_r), t_r, said("retain")).sample
    retain = (output - eps_r).square().mean()
    output = unet(scheduler.add_noise(z_f, eps_f, t_f), t_f, said("forget")).sample
    other = unet(scheduler.add_noise(z_p, eps_f, t_f), t_f, said("other")).sample.detach()
    loss = (output - other).square().mean() + alpha * retain
    loss.backward()
    optimizer.step()
    return loss.item()


def drawn_latents(pipeline: Any, prompts: list[str], steps: int, guidance: float, size: int) -> Tensor:
    """Latents by way of images: one call of the pipeline a prompt, decoded, made 8-bit, and encoded again."""
    latents = []
    for seed, prompt in enumerate(prompts):
        image = pipeline(
            prompt,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        pixels = (image * 255).round().to(torch.uint8).float() / 127.5 - 1
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels).latent_dist
        latents.append(posterior.mean * pipeline.vae.config.scaling_factor)
    return torch.cat(latents)
