"""Class forgetting in a pixel diffusion model of CIFAR-10, in slices of a few minutes on a GPU.

    python eval/cifar10_diffusion.py --data CIFAR10 --output runs/cifar10-diffusion --seconds 540   # again until done

The small protocol of a public re-run of SalUn: a UNet of about ten million weights without attention, 220 epochs, batch
256, AdamW 2e-4, average 0.9995, DDIM 100 steps, guidance 2; then SalUn with its mask, with a random mask of the same
density and without one, 1,000 steps at 1e-4, beside the base and the copied label row. FA is the share of 500 images of
the forgotten class in which a classifier of real images, trained here, sees it; FID compares 500 images of each other
class with all real ones in that classifier's features. FIDs in other features are no FIDs of this table.
Every call works for `--seconds`, saves its state and ends with exit code 3 as long as work is left. A call that is
interrupted or killed loses a minute of a training.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mini_methods
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from erase import erase_concept, files, tensor_files
from erase.classification import data as labelled
from erase.commandline import reporting
from erase.concepts import of_class
from erase.errors import EraseError
from erase.families import loading

FORGET = "airplane"
SAVE_SECONDS = 60  # of a training, after which its state is saved
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VARIANTS: dict[str, dict[str, Any]] = {
    "salun": {"method": "salun"},
    "salun --mask random": {"method": "salun", "mask": "random"},
    "relabel": {"method": "relabel"},
}
# FA in percent and FID of published tables; their reference sets, samplers and networks differ from these and from
# each other, so they may only be compared with the base in their own row
PUBLISHED = (
    ("EraseDiff's table, airplane, before unlearning", "-", "9.6"),
    ("EraseDiff's table, airplane, SalUn", "-", "9.2"),
    ("SFRon's and DualOptim's table, five classes, SA", "0 to 14.2", "21.1 to 29.0"),
    ("SFRon's and DualOptim's table, five classes, SalUn", "0 to 1.4", "20.2 to 21.2"),
    ("SFRon's and DualOptim's table, five classes, SFRon", "0 to 7.4", "18.4 to 20.7"),
)


@dataclass(frozen=True)
class Sizes:
    """Everything that decides the result. The defaults are the protocol; `SMOKE` takes a CPU two minutes.

    num_train: training images, as many of each class; None: all.
    """

    num_train: int | None = None
    channels: tuple[int, ...] = (64, 96, 128, 192)
    layers: int = 2
    epochs: int = 220
    batch: int = 256
    learning_rate: float = 2e-4
    ema: float = 0.9995
    judge_epochs: int = 30
    erase_steps: int = 1000
    erase_batch: int = 128
    num_data: int = 1000
    sampling_steps: int = 100
    num_forget: int = 500
    num_each: int = 500


SMOKE = Sizes(40, (8, 16), 1, 1, 8, judge_epochs=1, erase_steps=2, erase_batch=2, num_data=4, sampling_steps=2,
              num_forget=4, num_each=12)  # fmt: skip


class OutOfTime(Exception):
    """The slice is over; the state is saved."""


@dataclass(frozen=True)
class Run:
    """What every stage is given. ends: when the slice is over, as `time.monotonic()`."""

    folder: Path
    dataset: labelled.Dataset
    sizes: Sizes
    device: torch.device
    ends: float

    def require_time(self) -> None:
        if time.monotonic() > self.ends:
            raise OutOfTime


class Judge(nn.Module):
    """A residual network on images in [-1, 1]: 128 features and the logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )

        def twice(width: int) -> nn.Module:
            return nn.Sequential(unit(width, width), unit(width, width))

        self.first = nn.Sequential(unit(3, 64), unit(64, 128), nn.MaxPool2d(2))
        self.second = twice(128)
        self.third = nn.Sequential(unit(128, 256), nn.MaxPool2d(2), unit(256, 256), nn.MaxPool2d(2))
        self.fourth = twice(256)
        self.features = nn.Linear(256, 128)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        x = self.third(x + self.second(x))
        x = self.features((x + self.fourth(x)).amax((2, 3)))
        return x, self.head(x.relu())


def pixels(images: labelled.Images, device: torch.device) -> Tensor:
    """[n, 3, h, w] in [-1, 1]."""
    return images.x.to(device).float() / 127.5 - 1


def cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / total))


def sliced(
    run: Run, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, total: int, step: Callable[[int], None],
    more: dict[str, Any],
) -> None:  # fmt: skip
    """Call `step` for every number below `total`, continuing from NAME.pt.

    The state is saved there every minute, since a machine can be lost at any moment, and when the slice is over.
    more: further state, which is restored in place.
    """
    path, start = run.folder / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        for key, tensors in more.items():
            for ours, stored in zip(tensors, state[key], strict=True):
                ours.copy_(stored)
        start = state["step"]
    saved = time.monotonic()
    for number in range(start, total):
        now = time.monotonic()
        if now > run.ends or now - saved > SAVE_SECONDS:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": number, **more}
            files.write_pickle(path, state)
            saved = now
        if now > run.ends:
            print(f"{name}: {number:,} of {total:,} steps", flush=True)
            raise OutOfTime
        step(number)


def batch_of(run: Run, stage: str, number: int, size: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Flipped training images and labels of a step, a pure function of the stage and the number."""
    draw = torch.Generator().manual_seed(number * 1000 + len(stage))
    rows = torch.randint(len(run.dataset.train), (size,), generator=draw)
    images, flips = run.dataset.train[rows], torch.rand(size, generator=draw) < 0.5
    x = pixels(images, run.device)
    return torch.where(flips.to(run.device)[:, None, None, None], x.flip(3), x), images.y.to(run.device), draw


def train_judge(run: Run) -> Judge:
    """A classifier of real images; its test accuracy is in its file."""
    path, judge = run.folder / "judge.safetensors", Judge(len(run.dataset.classes)).to(run.device)
    if path.exists():
        judge.load_state_dict({key: tensor.to(run.device) for key, tensor in tensor_files.read_tensors(path).items()})
        return judge.eval()
    torch.manual_seed(0)
    judge = Judge(len(run.dataset.classes)).to(run.device)
    optimizer = torch.optim.SGD(judge.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    total = max(1, run.sizes.judge_epochs * len(run.dataset.train) // run.sizes.batch)

    def step(number: int) -> None:
        x, y, draw = batch_of(run, "judge", number, run.sizes.batch)
        shift = torch.randint(-4, 5, (2,), generator=draw).tolist()
        x = F.pad(x, (4, 4, 4, 4))[
            :, :, 4 + shift[0] : 4 + shift[0] + x.shape[2], 4 + shift[1] : 4 + shift[1] + x.shape[3]
        ]
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * cosine(number, total)
        optimizer.zero_grad()
        F.cross_entropy(judge(x)[1], y, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimizer.step()

    sliced(run, "judge", judge, optimizer, total, step, {})
    judge.eval()
    right = [
        look(judge, pixels(part, run.device))[1].argmax(1).eq(part.y.to(run.device))
        for part in run.dataset.test.batches(1000)
    ]
    tensor_files.write_tensors(path, judge.state_dict(), {"accuracy": torch.cat(right).float().mean().item()})
    return judge


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """FID of two sets of features, [n, d], in float64, without torchmetrics, which a bare GPU machine lacks."""
    covariances = [np.cov(one, rowvar=False) for one in (a.astype(np.float64), b.astype(np.float64))]
    roots = np.real(np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex))).sum()
    means = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    return float(means @ means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots)


@torch.no_grad()
def look(judge: Judge, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, 128] and logits of images."""
    seen = [judge(part) for part in x.split(500)]
    return torch.cat([features for features, _ in seen]), torch.cat([logits for _, logits in seen])


def train_base(run: Run) -> Path:
    """The diffusion model as a pipeline folder: epsilon prediction, linear betas, one label in ten dropped."""
    folder, sizes, classes = run.folder / "base", run.sizes, run.dataset.classes
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    levels = len(sizes.channels)
    shape: dict[str, Any] = {
        "down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels,
        "add_attention": False, "norm_num_groups": 8, "num_class_embeds": len(classes) + 1,
    }  # fmt: skip
    size = run.dataset.size
    unet: Any = UNet2DModel(sample_size=size, block_out_channels=sizes.channels, layers_per_block=sizes.layers, **shape)
    unet.to(run.device)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    alphas = scheduler.alphas_cumprod.to(run.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=sizes.learning_rate)
    averages = [parameter.detach().clone() for parameter in unet.parameters()]
    total = max(1, sizes.epochs * len(run.dataset.train) // sizes.batch)

    def step(number: int) -> None:
        x, y, draw = batch_of(run, "base model", number, sizes.batch)
        y = y.masked_fill((torch.rand(len(y), generator=draw) < 0.1).to(run.device), len(classes))
        t = torch.randint(1000, (len(x),), generator=draw).to(run.device)
        eps = torch.randn(x.shape, generator=draw).to(run.device)
        a = alphas[t][:, None, None, None]
        with torch.autocast(run.device.type, torch.bfloat16):
            predicted = unet(a.sqrt() * x + (1 - a).sqrt() * eps, t, y).sample
        optimizer.zero_grad()
        F.mse_loss(predicted.float(), eps).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        decay = min(sizes.ema, (number + 1) / (number + 10))
        torch._foreach_lerp_(averages, [p.detach() for p in unet.parameters()], 1 - decay)

    sliced(run, "base", unet, optimizer, total, step, {"averages": averages})
    with torch.no_grad():
        for parameter, average in zip(unet.parameters(), averages, strict=True):
            parameter.copy_(average)
    DDIMPipeline(unet=unet.cpu(), scheduler=scheduler).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    index = files.read_json(folder / "model_index.json")
    labels = {str(label): name for label, name in enumerate(classes)}
    files.write_json(folder / "model_index.json", dict(index) | {"id2label": labels})
    return folder


def erased(run: Run, base: Path, variant: str) -> Any:
    """The model of a variant, on the device."""
    if variant in VARIANTS:
        sizes = run.sizes
        output = run.folder / mini_methods.cell_name(FORGET, variant, 0)
        done = erase_concept(
            FORGET, str(base), output=str(output), quiet=True, recipe="reference", device=str(run.device),
            alpha=3.072, learning_rate=1e-4, num_train_steps=sizes.erase_steps, batch_size=sizes.erase_batch,
            max_grad_norm=1.0, num_forget=sizes.num_data, num_retain=sizes.num_data * 3, guidance_scale=2.0,
            num_inference_steps=sizes.sampling_steps, generation_batch_size=500, num_samples=0, mask_guidance=2.0,
            save=("pipeline",), cache_dir=str(run.folder / "cache"), **VARIANTS[variant],
        )  # fmt: skip
        return loading.load(done.folder, device=run.device)
    model = loading.load(base, device=run.device)
    if variant == "row copy":
        anchor = of_class(FORGET, model.classes).anchor[0]
        forget, other = (model.classes.index(name) for name in (FORGET, anchor))
        with torch.no_grad():
            model.class_vectors[forget] = model.class_vectors[other]
    return model


def evaluate(run: Run, judge: Judge, variant: str, base: Path) -> dict[str, Any]:
    """FA and FID of one variant; "real images" is the floor: half of the test images against the training images."""
    names = [name for name in run.dataset.classes if name != FORGET]
    kept = run.dataset.train[run.dataset.train.y != run.dataset.classes.index(FORGET)]
    real = look(judge, pixels(kept, run.device))[0].cpu().numpy()
    record: dict[str, Any] = {"variant": variant, "num_real": len(real), "sizes": asdict(run.sizes)}
    if variant == "real images":
        test = run.dataset.test[run.dataset.test.y != run.dataset.classes.index(FORGET)]
        test = test[: run.sizes.num_each * len(names)]
        found = look(judge, pixels(test, run.device))[0].cpu().numpy()
        return record | {"fid": frechet(found, real), "num": len(found)}
    model = erased(run, base, variant)
    how: dict[str, Any] = {"steps": run.sizes.sampling_steps, "guidance": 2.0, "size": run.dataset.size}

    def drawn(wanted: list[str], first: int) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, len(wanted), 500):
            run.require_time()
            seeds = range(first + start, first + start + len(wanted[start : start + 500]))
            images = model.decode(model.draw(wanted[start : start + 500], [*seeds], **how))
            parts.append(look(judge, images.to(run.device)))
        return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])

    logits = drawn([FORGET] * run.sizes.num_forget, 10_000_000)[1]
    wanted = [name for name in names for _ in range(run.sizes.num_each)]
    features, others = drawn(wanted, 20_000_000)
    label = run.dataset.classes.index(FORGET)
    right = torch.tensor([run.dataset.classes.index(name) for name in wanted])
    return record | {
        "shown": "".join(str(int(seen)) for seen in (logits.argmax(1) == label).tolist()),
        "probability": logits.softmax(1)[:, label].mean().item(),
        "retained": (others.argmax(1).cpu() == right).float().mean().item(),
        "fid": frechet(features.cpu().numpy(), real),
        "num": len(features),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: this run's rows, then the published ones."""
    from erase import statistics

    lines = []
    for cell in results["cells"]:
        fa = "-"
        if "shown" in cell:
            outcomes = [value == "1" for value in cell["shown"]]
            fa = mini_methods.share(statistics.rate("FA", outcomes, higher_is_better=False), interval=True)
        kept = f"{cell['retained']:.1%}" if "retained" in cell else "-"
        lines.append([cell["variant"], fa, kept, f"{cell['fid']:.2f}", f"{cell['num']:,}"])
    lines += [[f"{name} (published)", fa, "-", fid, "-"] for name, fa, fid in PUBLISHED]
    return mini_methods.markdown(["", "FA", "others recognised", "FID", "images"], lines)


def slice_of(run: Run) -> dict[str, Any]:
    """Work until everything is done, or the slice is over (`OutOfTime`)."""
    judge = train_judge(run)
    run.require_time()
    base = train_base(run)
    cells = []
    for variant in ("real images", "base", "row copy", *VARIANTS):
        path = run.folder / "cells" / f"{mini_methods.cell_name(FORGET, variant, 0)}.json"
        if not path.exists():
            run.require_time()
            files.write_json(path, evaluate(run, judge, variant, base))
        cells.append(files.read_json(path))
    accuracy = tensor_files.read_metadata(run.folder / "judge.safetensors")["accuracy"]
    results = {"judge_accuracy": accuracy, "data": run.dataset.name, "cells": cells}
    files.write_json(run.folder / "results.json", results)
    return results


def work(data: str, output: str | Path, *, seconds: float, device: str, sizes: Sizes) -> dict[str, Any] | None:
    """One slice; the results when all is done, else None."""
    folder = Path(output)
    dataset = labelled.load(data, folder / "cache")
    if dataset.name == "cifar10" and FORGET not in dataset.classes:  # CIFAR's files without their names
        dataset = replace(dataset, classes=CLASSES)
    if FORGET not in dataset.classes:
        raise EraseError(f"{data} has no class {FORGET!r}; give the folder of CIFAR-10's images")
    if sizes.num_train:
        dataset = dataset.first(sizes.num_train)
    if any(Path(data).glob("train/*/*.jp*g")):  # not exactly CIFAR-10
        dataset = replace(dataset, name=f"{dataset.name} (JPEG copy)")
    try:
        return slice_of(Run(folder, dataset, sizes, torch.device(device), time.monotonic() + seconds))
    except OutOfTime:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10: its python or binary files, or train/CLASS/image")
    parser.add_argument("--output", default="runs/cifar10-diffusion", help="folder of all state [%(default)s]")
    parser.add_argument("--device", default="cuda", help="cuda or cpu [cuda]")
    parser.add_argument("--seconds", type=float, default=540, help="length of this slice [540]")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that everything runs")
    with reporting(Path(__file__).name, "interrupted; the same command continues from its state of a minute before"):
        given = parser.parse_args()
        how: dict[str, Any] = {"seconds": given.seconds, "device": given.device}
        if given.device == "cuda" and not torch.cuda.is_available():
            raise EraseError("torch sees no CUDA device; --device cpu --smoke shows that everything runs")
        results = work(given.data, given.output, sizes=SMOKE if given.smoke else Sizes(), **how)
    if results is None:
        print("not done yet: the same command continues")
        sys.exit(3)
    toy = "toy sizes (--smoke), the figures mean nothing: " if given.smoke else ""
    print(f"{toy}{results['data']}, judge: {results['judge_accuracy']:.1%} of test images\n\n{table(results)}")


if __name__ == "__main__":
    main()
