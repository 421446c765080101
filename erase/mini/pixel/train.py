"""The training of the embedded pixel model from a seed: judge, UNet, assembly.

Each stage trains on drawings that depend on (seed, stage, step) alone, saves its state regularly and continues from it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from erase import files, tensor_files
from erase.errors import EraseError
from erase.mini.assembly import finish
from erase.mini.fitting import fit
from erase.mini.pixel import judge as judging
from erase.mini.pixel.drawings import CLASSES, SIZE, sample, to_tensor
from erase.progress import each
from erase.words import listed

STAGES = ("judge", "unet")

# Settings for a model of this size. `erase-concept` reads them from the model folder.
DEFAULTS: dict[str, Any] = {
    "family": "mini-pixel",
    "guidance_scale": 2.0,
    "num_inference_steps": 25,
    "learning_rate": 2e-4,
    "batch_size": 16,
    "num_forget": 96,
    "num_retain": 180,
    "generation_batch_size": 64,
    "num_train_steps": 100,
    "sampler": "model",
    "methods": {
        "ga": {"learning_rate": 5e-5, "num_train_steps": 30, "set": ["alpha=1"]},
        "esd-u": {"learning_rate": 5e-5, "batch_size": 4},
        "esd-full": {"learning_rate": 5e-5, "batch_size": 4},
        "sdd": {"scope": "full", "batch_size": 4, "set": ["teacher_decay=0.98"]},
        "ca": {"scope": "full"},
        "erasediff": {"learning_rate": 1e-4},
        "sa": {"num_train_steps": 300, "batch_size": 16, "set": ["curvature_batches=20"]},
    },
}


@dataclass(frozen=True)
class Budget:
    """Steps and batch sizes of each stage. The defaults made the weights that ship.

    gamma: min-SNR-gamma (Hang et al., ICCV 2023), for v predictions.
    """

    num_drawings: int = 24_000
    judge_steps: int = 1500
    judge_batch: int = 64
    unet_steps: int = 4100
    unet_batch: int = 32
    learning_rate: float = 1e-3
    gamma: float = 5.0
    label_dropout: float = 0.1


@dataclass(frozen=True)
class _Job:
    """What every stage receives. work: folder for checkpoints and finished stages."""

    work: Path
    seed: int
    budget: Budget
    device: torch.device
    without: str | None
    quiet: bool

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The random numbers of one step of a stage."""
        return np.random.default_rng([self.seed, 10 + STAGES.index(stage), step])

    def drawings(self, stage: str) -> tuple[np.ndarray, np.ndarray]:
        """The training images of a stage and their labels; the judge sees every class."""
        classes = [name for name in CLASSES if stage == "judge" or name != self.without]
        parts = range(0, self.budget.num_drawings, 1000)
        drawn = [
            sample(1000, np.random.default_rng([self.seed, 20 + STAGES.index(stage), start]), classes)
            for start in each(parts, "drawings", "parts", quiet=self.quiet)
        ]
        return np.concatenate([images for images, _ in drawn]), np.concatenate([labels for _, labels in drawn])


def make_unet() -> UNet2DModel:
    """A UNet of 2.5 million weights whose last label, len(CLASSES), is the null class of guidance."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=len(CLASSES) + 1,
    )


def make_scheduler() -> DDIMScheduler:
    """DDPM's linear betas (Ho et al., NeurIPS 2020) and v prediction."""
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction")


def train(
    output: str | Path,
    *,
    seed: int = 0,
    without: str | None = None,
    stages: tuple[str, ...] = STAGES,
    budget: Budget | None = None,
    device: str = "cpu",
    parts_from: str | Path | None = None,
    quiet: bool = False,
) -> Path:
    """Train the embedded pixel model and write it as a folder for diffusers' DDIMPipeline that includes the judge.

    output: the pipeline folder. Unfinished work is in `output/work`, and the same call continues it.
    without: a class that the UNet's data never shows; the result is the reference for unlearning it. The judge is
        trained on all classes.
    parts_from: folder of a trained model whose judge is used.

    Returns the pipeline folder when all stages are done, else the work folder.

    Raises:
        EraseError: there is no such class, or `output` holds another training.
    """
    budget, output = budget or Budget(), Path(output)
    work = output / "work"
    if without is not None and without not in CLASSES:
        raise EraseError(f"mini-pixel has no class {without!r}; its classes are {listed(CLASSES, 'and')}")
    identity = {"seed": seed, "without": without, "parts_from": parts_from and str(parts_from), **asdict(budget)}
    if (work / "identity.json").exists() and json.loads((work / "identity.json").read_text()) != identity:
        raise EraseError(f"{work} holds another training; choose another --output or delete it")
    files.write_json(work / "identity.json", identity)
    if parts_from is not None:
        files.copy(Path(parts_from) / "judge.safetensors", work / "judge.safetensors")
    job = _Job(work, seed, budget, torch.device(device), without, quiet)
    for stage in stages:
        if not (work / f"{stage}.safetensors").exists():
            _TRAIN[stage](job)
    if any(not (work / f"{stage}.safetensors").exists() for stage in STAGES):
        return work
    return assemble(output)


def _train_judge(job: _Job) -> None:
    images, labels = job.drawings("judge")
    torch.manual_seed(job.seed)
    judge = judging.Judge().to(job.device)

    def loss(step: int) -> Tensor:
        rng = job.rng("judge", step)
        chosen = rng.integers(len(images), size=job.budget.judge_batch)
        batch, wanted = judging.examples(images[chosen], labels[chosen], rng)
        return F.cross_entropy(judge(batch.to(job.device))[1], wanted.to(job.device))

    path = job.work / "judge.pt"
    steps = job.budget.judge_steps
    seconds = fit(path, {"judge": judge}, loss, steps=steps, lr=2e-3, ema_decay=0.98, quiet=job.quiet)
    judge.cpu().eval()
    fresh, truth = sample(2000, np.random.default_rng([job.seed, 99]))
    named = judging.names(judging.look(judge, to_tensor(fresh))[1])
    right = sum(name == CLASSES[label] for name, label in zip(named, truth, strict=True))
    metadata = {"accuracy": {"class": right / len(truth), "num_drawings": len(truth)}, "seconds": seconds}
    tensor_files.write_tensors(job.work / "judge.safetensors", judge.state_dict(), metadata)
    path.unlink(missing_ok=True)


def _train_unet(job: _Job) -> None:
    """v prediction with min-SNR weights: min(snr, gamma) / (snr + 1) of the squared error of v."""
    drawn, labels = job.drawings("unet")
    images = to_tensor(drawn)
    torch.manual_seed(job.seed)
    unet: Any = make_unet()
    unet.to(job.device)
    alphas, num = make_scheduler().alphas_cumprod, job.budget.unet_batch

    def loss(step: int) -> Tensor:
        rng = job.rng("unet", step)
        chosen = torch.from_numpy(rng.integers(len(images), size=num))
        dropped = torch.from_numpy(rng.random(num) < job.budget.label_dropout)
        c = torch.from_numpy(labels)[chosen].masked_fill(dropped, len(CLASSES))
        x = images[chosen]
        eps = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        t = torch.from_numpy(((np.arange(num) + rng.random(num)) / num * 1000).astype(np.int64))
        a = alphas[t][:, None, None, None]
        noisy, v = a.sqrt() * x + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x
        noisy, t, c, v = (tensor.to(job.device) for tensor in (noisy, t, c, v))
        snr = (a / (1 - a)).flatten().to(job.device)
        weight = snr.clamp(max=job.budget.gamma) / (snr + 1)
        with torch.autocast(job.device.type, torch.bfloat16):  # 0.7 of the time, also on a CPU
            predicted = unet(noisy, t, c).sample
        return (weight * (predicted.float() - v).square().mean((1, 2, 3))).mean()

    path = job.work / "unet.pt"
    how: dict[str, Any] = {"ema_decay": 0.998, "weight_decay": 1e-3, "warmup": 100, "quiet": job.quiet}
    seconds = fit(path, {"unet": unet}, loss, steps=job.budget.unet_steps, lr=job.budget.learning_rate, **how)
    metadata = {"seconds": seconds, "samples": job.budget.unet_steps * num}
    tensor_files.write_tensors(job.work / "unet.safetensors", unet.cpu().state_dict(), metadata)
    path.unlink(missing_ok=True)


_TRAIN: dict[str, Callable[[_Job], None]] = {"judge": _train_judge, "unet": _train_unet}


def assemble(output: Path) -> Path:
    """Write the trained parts as an fp16 pipeline folder with the class names, the judge and recommended settings."""
    work = output / "work"
    unet = make_unet()
    unet.load_state_dict(tensor_files.read_tensors(work / "unet.safetensors"))
    pipeline = DDIMPipeline(unet=unet, scheduler=make_scheduler())  # pyright: ignore[reportArgumentType]
    pipeline.to(torch.float16)
    pipeline.save_pretrained(output)
    index = json.loads((output / "model_index.json").read_text())
    files.write_json(output / "model_index.json", index | {"id2label": {str(i): n for i, n in enumerate(CLASSES)}})
    return finish(output, STAGES, DEFAULTS)
