"""Where a GPU's time and memory go: mask, training and drawing as shares of what its matrix products reach.

`python eval/speed.py --only gpu --size full` takes SD v1.4's UNet in random weights. Without a GPU the
floors are printed as the estimates that they are, and the same code runs at the small size to stay alive.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from bench import jobs
from erase import masks
from erase.errors import EraseError
from erase.families.modes import predicting
from erase.methods.relabel import Relabel
from erase.options.declare import MIXED_PRECISION
from erase.training import batches, loop, saliency_pass

ASSUMED_RATE = 790e12  # FLOP/s of a bf16 product on an H200, for estimates
GIGABYTES = (24, 16, 12, 8)  # of cards that a run may have to fit


@dataclass(frozen=True)
class Variant:
    """One way to run the UNet. precision: of its products; `weights`: bf16 for rounded storage with masters."""

    precision: str = "fp32"
    attention: str = "sdpa"
    weights: str = "fp32"
    compiled: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        extras = [word for word in ("compiled", "channels_last") if getattr(self, word)]
        weights = [] if self.weights == "fp32" else [f"{self.weights} weights"]
        return ", ".join([self.precision, self.attention, *weights, *extras])


VARIANTS = (
    Variant(),
    Variant("tf32"),
    Variant("bf16"),
    Variant("bf16", weights="bf16"),
    Variant("bf16", attention="xformers"),
    Variant("bf16", channels_last=True),
    Variant("bf16", compiled=True),
)


def report(size: str, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure all variants, and which cards would do; at the small size on a CPU when there is no GPU."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    full, result = forward_flops("full"), {"has_gpu": has_gpu, "estimate": {}, "variants": {}, "fits": {}}
    show("SD v1.4, 512 pixels: FLOP and, as an estimate, seconds at 790 TFLOP/s (a bf16 product on an H200)")
    for phase, forwards in work().items():
        seconds = forwards * full / ASSUMED_RATE
        result["estimate"][phase] = {"flop": forwards * full, "seconds": seconds}
        show(f"  {phase:34} {forwards * full / 1e15:6.1f} PFLOP {seconds:6.1f} s, at 40 % of it {seconds / 0.4:6.1f} s")
    if not has_gpu:
        show(
            "there is no GPU here: nothing else is measured at full size; the small size on the CPU shows that it runs"
        )
        size = "small"
    flops = forward_flops(size)
    batch = 8 if size == "full" else 1
    for variant in VARIANTS:
        if not has_gpu and (variant.attention == "xformers" or variant.compiled or variant.precision == "tf32"):
            continue
        try:
            measured = measure(variant, size, device, batch, flops)
        except EraseError as error:  # xformers is not installed, or has no kernels for this card
            result["variants"][variant.name] = {"skipped": str(error)}
            show(f"{variant.name:32} skipped: {error}")
            continue
        result["variants"][variant.name] = {**asdict(variant), **measured}
        for phase, values in measured.items():
            show(
                f"{variant.name:32} {phase:9} {values['seconds']:9.3f} s  peak {values['peak_bytes'] / 1e9:6.2f} GB  "
                f"{values['share']:5.1%} of the product's rate"
            )
    if has_gpu and size == "full":
        for gigabytes in GIGABYTES:
            for density in (0.5, 0.1):
                fits = does_fit(gigabytes, density, device)
                result["fits"][f"{gigabytes} GB, {density:.0%}"] = fits
                show(
                    f"{gigabytes:3} GB, {density:.0%} of the weights, low memory: {'fits' if fits else 'does not fit'}"
                )
    return result


def work() -> dict[str, float]:
    """How many forward passes of one image each phase of `--concept nudity` is worth; forward and backward are 3."""
    return {
        "drawing 1,600 latents, 50 steps": 1600 * 50 * 2,
        "mask, 800 images": 800 * 3,
        "training, 100 steps of 8 + 8": 100 * 8 * (2 * 3 + 2),  # two branches, two predictions of the base
    }


def forward_flops(size: str) -> float:
    """Of one image through the UNet: a dry run on "meta", since the CPU's attention kernels are not counted."""
    unet = jobs.build_unet(size, "meta")
    side, width = unet.config["sample_size"], unet.config["cross_attention_dim"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.empty(1, 4, side, side), torch.tensor([5]), encoder_hidden_states=torch.empty(1, 77, width))
    return float(counter.get_total_flops())


def measure(variant: Variant, size: str, device: torch.device, batch: int, flops: float) -> dict[str, dict[str, float]]:
    """Seconds, peak bytes and share of the product's rate of one batch of mask and training, and one denoising step."""
    rate = product_rate(variant, device)
    with _running(variant, size, device) as (model, accelerator):
        data, parameters = jobs.random_data(model, batch), dict(model.unet.named_parameters())
        mask = masks.random_mask({name: p.shape for name, p in parameters.items()}, 0.5, seed=0)
        phases = {
            "mask": (lambda: _mask_pass(model, data, parameters, accelerator, batch), 3 * batch),
            "training": (lambda: _steps(model, data, parameters, mask, accelerator, batch), 2 * 8 * batch),
            "drawing": (lambda: _denoise(model, data, accelerator), 2 * batch),
        }
        measured = {}
        for phase, (job, forwards) in phases.items():
            job()  # kernels are chosen and compiled the first time
            seconds, peak = _timed(job, device)
            measured[phase] = {
                "seconds": seconds,
                "peak_bytes": float(peak),
                "share": forwards * flops / seconds / rate,
            }
    return measured


@contextmanager
def _running(variant: Variant, size: str, device: torch.device) -> Iterator[tuple[Any, Accelerator]]:
    """A random model set up as the variant says; what is global is put back."""
    AcceleratorState._reset_state()
    try:
        precision = "bf16" if variant.precision == "bf16" else "no"
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        model = jobs.random_model(size, str(device))
        model.use_attention(variant.attention)
        if variant.weights == "bf16":
            stored = {name: p.detach().cpu().clone() for name, p in model.unet.named_parameters()}
            model.round_network(torch.bfloat16)
            _read_from(model, stored)
        if variant.channels_last:
            model.unet.to(memory_format=torch.channels_last)
        if variant.compiled:
            model.unet.compile()
        with _tf32(variant.precision == "tf32"):
            yield model, accelerator
    finally:
        AcceleratorState._reset_state()


def _read_from(model: Any, stored: dict[str, torch.Tensor]) -> None:
    """Let the model take its exact weights from memory, as no folder holds the random ones."""

    def reload_network() -> None:  # straight back to rounded weights, for the next measurement
        for name, parameter in model.unet.named_parameters():
            parameter.data = stored[name].to(parameter.device, torch.bfloat16)

    model.stored_weights, model.reload_network = lambda: stored, reload_network


def _mask_pass(model: Any, data: Any, parameters: Any, accelerator: Accelerator, batch: int) -> None:
    options: dict[str, Any] = {"score": "abs_sum", "guidance": 0.0, "seed": 0, "quiet": True}
    saliency_pass.accumulate(model, data, parameters, accelerator, batch_size=batch, state_path=Path("none"), **options)


def _steps(
    model: Any, data: Any, parameters: Any, mask: Any, accelerator: Accelerator, batch: int, **recipe: Any
) -> None:
    """Two steps of the default recipe, so that the second has the moments of the first."""
    checkpointing = recipe.pop("checkpointing", False)
    plan = batches.Recipe(num_steps=2, batch_size=batch, learning_rate=1e-5, **recipe)
    options: dict[str, Any] = {"state_path": Path("none"), "checkpointing": checkpointing, "quiet": True}
    loop.train(model, Relabel(), data, parameters, mask, plan, accelerator, **options)


@torch.no_grad()
def _denoise(model: Any, data: Any, accelerator: Accelerator) -> None:
    """One step of guided drawing for the batch: the UNet with and without words."""
    x = torch.cat([data.forget.mean] * 2).to(model.device)
    text = data.text[[1] * (len(x) // 2) + [0] * (len(x) // 2)].to(model.device)
    with predicting(model.unet, MIXED_PRECISION[accelerator.mixed_precision]):  # as `Model.draw` does
        model(x, torch.full((len(x),), 500, device=model.device), text)


def _timed(job: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    if device.type != "cuda":
        start = time.perf_counter()
        job()
        return time.perf_counter() - start, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    job()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated()


def product_rate(variant: Variant, device: torch.device) -> float:
    """FLOP/s of a large square matrix product in the variant's precision."""
    n = 8192 if device.type == "cuda" else 256
    dtype = torch.bfloat16 if variant.precision == "bf16" else torch.float32
    with _tf32(variant.precision == "tf32"):
        a = torch.randn(n, n, device=device, dtype=dtype)
        torch.mm(a, a)
        seconds = sorted(_timed(lambda: torch.mm(a, a), device)[0] for _ in range(5))[2]
    return 2 * n**3 / seconds


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    backends: Any = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, was_allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = was_allowed


def does_fit(gigabytes: float, density: float, device: torch.device) -> bool:
    """Whether `--low-memory` steps at full size run in a process that may take so much of the GPU."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    try:
        with _running(Variant("bf16", weights="bf16"), "full", device) as (model, accelerator):
            data, parameters = jobs.random_data(model, 8), dict(model.unet.named_parameters())
            _mask_pass(model, data, parameters, accelerator, 8)
            mask = masks.pack(jobs.random_mask_of(model.unet, density))
            _steps(model, data, parameters, mask, accelerator, 8, accumulation=8, checkpointing=True)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
