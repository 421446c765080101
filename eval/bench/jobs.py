"""The jobs that `bench` times: each is prepared once in a process of its own, and then done as often as asked."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from erase.errors import EraseError, missing

# Standard library and the errors only: the parent must stay small, as a child's peak begins with its parent's size.

SD14_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SMALL_UNET: dict[str, Any] = {
    **SD14_UNET,
    "sample_size": 16,
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 32,
}
SD14_VAE = (128, 256, 512, 512)
SMALL_VAE = (32, 32, 32, 32)
NUM_SCORES = {"small": 2_000_000, "full": 100_000_000}

Turn = Callable[[], dict[str, float]]  # does the job and says what there is to say besides time and memory


@dataclass(frozen=True)
class Job:
    """One of the generators below by name, and its arguments: plain data, since it travels to another process."""

    name: str
    arguments: tuple[Any, ...] = ()


def serve(pipe: Any, job: Job, size: str) -> None:
    """Say when the job is "ready"; do it at every "turn" and answer with what it took; at the "end" with memory.

    An answer that is a text says why the job cannot be done here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the parent, and the parent this process
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no word about image processors that nobody uses
    jobs = globals()[job.name](size, *job.arguments)
    try:
        turn: Turn | EraseError = next(jobs)
    except EraseError as error:
        turn = error
    before = _resident()
    with suppress(EOFError, BrokenPipeError):  # the parent has closed the pipe
        while True:
            asked = pipe.recv()
            if isinstance(turn, EraseError):
                pipe.send(str(turn))
            elif asked == "ready":
                pipe.send({})
            elif asked == "turn":
                wall, cpu = time.perf_counter(), _cpu_seconds()
                measured = turn()
                pipe.send({"cpu_seconds": _cpu_seconds() - cpu, "wall_seconds": time.perf_counter() - wall, **measured})
            else:
                import resource

                peak = max(
                    resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
                )
                peak *= 1 if sys.platform == "darwin" else 1024
                pipe.send({"peak_bytes": peak, "extra_bytes": max(0, peak - before)})
    jobs.close()


def _cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _resident() -> int:
    import resource

    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


# --- the mask -------------------------------------------------------------------------------------------------------


def num_scores(size: str) -> int:
    """How many scores or weights: by the size's name, or a number."""
    return NUM_SCORES.get(size) or int(size)


def _scores(size: str) -> dict[str, Any]:
    """Sixteen tensors of scores without structure."""
    import torch

    each = num_scores(size) // 16
    draw = torch.Generator().manual_seed(0)
    return {f"{i}": torch.empty(each).exponential_(generator=draw) for i in range(16)}


def our_selection(size: str) -> Iterator[Turn]:
    from erase import masks

    scores = _scores(size)

    def turn() -> dict[str, float]:
        masks.select(scores, 0.5)
        return {"weights": float(num_scores(size))}

    yield turn


def plain_selection(size: str) -> Iterator[Turn]:
    from bench import plain

    scores = _scores(size)

    def turn() -> dict[str, float]:
        plain.argsort_mask(scores, 0.5)
        return {}

    yield turn


def our_whole_mask(size: str) -> Iterator[Turn]:
    import torch

    from erase import masks

    unet = build_unet(size, "meta")
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.empty(p.shape).exponential_(generator=draw) for name, p in unet.named_parameters()}
    weights = sum(score.numel() for score in scores.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"

        def turn() -> dict[str, float]:
            masks.save(path, masks.select(scores, 0.5), {})
            return {"weights": float(weights), "bits_per_weight": 8 * path.stat().st_size / weights}

        yield turn


def _random_bits(size: str) -> dict[str, Any]:
    import torch

    draw = torch.Generator().manual_seed(0)
    return {"w": torch.empty(num_scores(size), dtype=torch.uint8).random_(0, 2, generator=draw).bool()}


def our_mask_file(size: str) -> Iterator[Turn]:
    from erase import masks

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"
        masks.save(path, _random_bits(size), {})

        def turn() -> dict[str, float]:
            masks.load(path)
            return {"bits_per_weight": 8 * path.stat().st_size / num_scores(size)}

        yield turn


def plain_mask_file(size: str) -> Iterator[Turn]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.pt"
        torch.save({name: bits.long() for name, bits in _random_bits(size).items()}, path)

        def turn() -> dict[str, float]:
            torch.load(path, weights_only=True)
            return {"bits_per_weight": 8 * path.stat().st_size / num_scores(size)}

        yield turn


# --- the optimizer --------------------------------------------------------------------------------------------------


def _weights(size: str, density: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sixteen parameters with gradients, and a mask."""
    import torch

    from erase import masks

    draw = torch.Generator().manual_seed(0)
    shape = (num_scores(size) // 16,)
    weights = {str(i): torch.nn.Parameter(torch.randn(shape, generator=draw)) for i in range(16)}
    for weight in weights.values():
        weight.grad = torch.randn(shape, generator=draw)
    return weights, masks.random_mask({name: shape for name in weights}, density, seed=0)


def our_optimizer(size: str, density: float) -> Iterator[Turn]:
    from erase.optim import MaskedAdam

    weights, mask = _weights(size, density)
    optimizer = MaskedAdam(weights, mask)
    optimizer.step()

    def turn() -> dict[str, float]:
        optimizer.step()
        return {"bytes_per_weight": optimizer.num_bytes() / num_scores(size)}

    yield turn


def plain_optimizer(size: str, density: float) -> Iterator[Turn]:
    from bench.plain import DenseAdam

    weights, mask = _weights(size, density)
    optimizer = DenseAdam(weights, {name: bits.long() for name, bits in mask.items()}, lr=1e-5)
    optimizer.step()

    def turn() -> dict[str, float]:
        optimizer.step()
        return {"bytes_per_weight": optimizer.num_bytes() / num_scores(size)}

    yield turn


def our_base(size: str, density: float) -> Iterator[Turn]:
    """The masked weights' values of then, exchanged for the length of a prediction."""
    from erase.optim import MaskedAdam

    weights, mask = _weights(size, density)
    optimizer = MaskedAdam(weights, mask)
    base = optimizer.masked_weights()

    def turn() -> dict[str, float]:
        optimizer.exchange(base)
        optimizer.exchange(base)
        return {"bytes_per_weight": sum(values.nbytes for values in base.values()) / num_scores(size)}

    yield turn


def plain_base(size: str) -> Iterator[Turn]:
    """A second copy; it costs memory and, once made, no time."""
    weights, _ = _weights(size, 0.5)
    base = {name: weight.detach().clone() for name, weight in weights.items()}
    yield lambda: {"bytes_per_weight": sum(values.nbytes for values in base.values()) / num_scores(size)}


# --- training steps -------------------------------------------------------------------------------------------------


def build_unet(size: str, device: str = "cpu") -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**(SD14_UNET if size == "full" else SMALL_UNET)).eval().requires_grad_(False)


def random_model(size: str, device: str = "cpu") -> Any:
    """Stable Diffusion's UNet without its other parts, in random weights."""
    from diffusers import DDIMScheduler

    from erase.families import sd

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    absent: Any = None  # mask and training need neither VAE nor words
    unet = build_unet(size).to(device)
    vae: Any = SimpleNamespace(config={"block_out_channels": (1, 1, 1, 1)})  # only its scale is asked for
    return sd.StableDiffusion("random", Path(), unet, vae, absent, absent, scheduler, {})


def random_data(model: Any, num: int = 1) -> Any:
    """Latents and text states of `num` forget and `num` retain images, in noise."""
    import torch

    from erase.conditioning import Conditioning
    from erase.data.latents import Data, ImageLatents

    shape = (num, 4, model.unet.config["sample_size"], model.unet.config["sample_size"])
    draw = torch.Generator().manual_seed(0)

    def images(row: int) -> ImageLatents:
        latents = torch.randn(shape, generator=draw)
        return ImageLatents(latents, torch.zeros(shape), torch.full((num,), row))

    text = torch.randn(4, 77, model.unet.config["cross_attention_dim"], generator=draw)
    forget, retain = images(1), images(3)
    places, names = torch.zeros(num, text.shape[1], dtype=torch.bool), ("", "f", "a", "r")
    told = Conditioning(text)
    rows, others = torch.full((num,), 2), torch.tensor([2])
    return Data(forget, retain, rows, others, places, places, names, told, told[:1], "random", {})


def random_mask_of(unet: Any, density: float) -> dict[str, Any]:
    """Bernoulli, tensor by tensor, so that making it takes no memory that the steps do not."""
    import torch

    draw = torch.Generator().manual_seed(0)
    threshold = int(density * 32768)
    return {
        name: torch.empty(p.shape, dtype=torch.int16).random_(0, 32768, generator=draw) < threshold
        for name, p in unet.named_parameters()
    }


def our_steps(size: str, density: float, checkpointing: bool) -> Iterator[Turn]:
    """Two steps from cached latents and text states, same loss as the plain ones: the second has the moments too."""
    from accelerate import Accelerator

    from erase import masks
    from erase.methods.relabel import Relabel
    from erase.training import batches, loop

    model, accelerator = random_model(size), Accelerator(cpu=True)
    data, parameters = random_data(model), dict(model.unet.named_parameters())
    mask = masks.pack(random_mask_of(model.unet, density))
    recipe = batches.Recipe(num_steps=2, batch_size=1, learning_rate=1e-5, target="fixed")
    method = Relabel(alpha=0.5, frozen_target=False, distill_retain=False)

    def turn() -> dict[str, float]:
        options: dict[str, Any] = {"state_path": Path("none"), "checkpointing": checkpointing, "quiet": True}
        loop.train(model, method, data, parameters, mask, recipe, accelerator, **options)
        return {}

    yield turn


def our_mask_pass(size: str, num: int) -> Iterator[Turn]:
    """Scores from the gradients of `num` images, eight at a time; `size` as for the steps."""
    from accelerate import Accelerator

    from erase.training import saliency_pass

    model, accelerator = random_model(size), Accelerator(cpu=True)
    data, parameters = random_data(model, num), dict(model.unet.named_parameters())
    options: dict[str, Any] = {"score": "abs_sum", "guidance": 0.0, "batch_size": 8, "seed": 0}

    def turn() -> dict[str, float]:
        path = Path("none")
        saliency_pass.accumulate(model, data, parameters, accelerator, **options, state_path=path, quiet=True)
        return {}

    yield turn


def plain_steps(size: str, density: float) -> Iterator[Turn]:
    """The same two steps, images and words encoded at each, dense gradients and Adam.

    With a bool mask and torch's loop over tensors, which fits into 24 GB: SalUn's int64 mask and the foreach Adam's
    temporaries would take 9 GB more.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    from bench import plain

    unet = build_unet(size).requires_grad_(True)
    channels: Any = SD14_VAE if size == "full" else SMALL_VAE
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2, **blocks).eval()
    width = unet.config["cross_attention_dim"]
    layers, heads = (12, 12) if size == "full" else (2, 2)
    words = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads
    )
    text_encoder = CLIPTextModel(words).eval()
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = plain.DenseAdam(dict(unet.named_parameters()), random_mask_of(unet, density), lr=1e-5, foreach=False)
    side = 8 * unet.config["sample_size"]
    images = {which: torch.rand(1, 3, side, side) * 2 - 1 for which in ("forget", "retain")}
    ids = {which: torch.randint(0, 40_000, (1, 77)) for which in ("forget", "other", "retain")}

    def turn() -> dict[str, float]:
        for _ in range(2):
            plain.salun_step(unet, vae, text_encoder, scheduler, optimizer, images, ids)
        return {}

    yield turn


# --- image classifiers ----------------------------------------------------------------------------------------------


def _classifier(size: str) -> tuple[Any, Any]:
    """ResNet-18 for 32 x 32 pixels in random weights, and 64 images; at the small size a small network, and 8."""
    import torch

    from erase.classification import networks
    from erase.classification.data import Images

    network, num = ("resnet18", 64) if size == "full" else ("small", 8)
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (num, 3, 32, 32), generator=draw, dtype=torch.uint8)
    model = networks.build(networks.Shape(network, 10, 3, 32, (0.5,) * 3, (0.5,) * 3), seed=0)
    return model, Images(x, torch.arange(num) % 10)


def our_classifier_masks(size: str, densities: tuple[float, ...]) -> Iterator[Turn]:
    from erase import masks
    from erase.classification.descent import saliency_scores

    model, images = _classifier(size)

    def turn() -> dict[str, float]:
        scores = saliency_scores(model, images)
        for density in densities:
            masks.select(scores, density)
        return {}

    yield turn


def plain_classifier_masks(size: str, densities: tuple[float, ...]) -> Iterator[Turn]:
    from bench import plain

    model, images = _classifier(size)

    def turn() -> dict[str, float]:
        plain.classifier_masks(model, [(images.x.float() / 255, images.y)], densities)
        return {}

    yield turn


STEP_SIZE = 1e-5  # small: in random weights the loss must stay finite, and the size does not matter for time


def our_classifier_steps(size: str, precision: Literal["fp32", "bf16"] = "fp32") -> Iterator[Turn]:
    """Two steps on 64 images, which are cropped and mirrored too."""
    import torch

    from erase.classification.descent import Recipe, descend
    from erase.classification.methods import Plan

    model, images = _classifier(size)
    mask = random_mask_of(model, 0.5)
    how: dict[str, Any] = {"batch_size": len(images), "padding": 4, "flip": True, "precision": precision}
    recipe = Recipe(epochs=2, learning_rate=STEP_SIZE, **how)
    plan = Plan(passes=lambda: [images])

    def turn() -> dict[str, float]:
        descend(model, plan, recipe, torch.Generator().manual_seed(0), mask)
        return {}

    yield turn


def plain_classifier_steps(size: str) -> Iterator[Turn]:
    """The same two, of which the images' way to the model is left out."""
    from bench import plain

    model, images = _classifier(size)
    mask, x = {name: bits.long() for name, bits in random_mask_of(model, 0.5).items()}, images.x.float() / 255

    def turn() -> dict[str, float]:
        optimizer = plain.DenseSGD(dict(model.named_parameters()), mask, lr=STEP_SIZE)
        for _ in range(2):
            plain.classifier_step(model, optimizer, x, images.y)
        return {}

    yield turn


def _with_gradients(size: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A classifier's parameters, each with a gradient, and a mask."""
    import torch

    model, _ = _classifier(size)
    named = dict(model.named_parameters())
    draw = torch.Generator().manual_seed(0)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    return named, random_mask_of(model, 0.5)


def our_classifier_update(size: str) -> Iterator[Turn]:
    from erase.optim.sgd import MaskedSGD

    named, mask = _with_gradients(size)
    yield _ten_times(MaskedSGD(named, mask, lr=STEP_SIZE))


def plain_classifier_update(size: str) -> Iterator[Turn]:
    from bench.plain import DenseSGD

    named, mask = _with_gradients(size)
    yield _ten_times(DenseSGD(named, {name: bits.long() for name, bits in mask.items()}, lr=STEP_SIZE))


def _ten_times(optimizer: Any) -> Turn:
    optimizer.step()

    def turn() -> dict[str, float]:
        for _ in range(10):
            optimizer.step()
        return {}

    return turn


def our_attack(size: str) -> Iterator[Turn]:
    from erase.classification.membership import svc_attack

    yield _attack(size, svc_attack)


def plain_attack(size: str) -> Iterator[Turn]:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise missing("scikit-learn") from error
    from bench.plain import svc_attack

    yield _attack(size, svc_attack)


def _attack(size: str, attack: Any) -> Turn:
    """On confidences as of 10,000 images seen and as many unseen; 4,500 are to be told apart, and both kinds."""
    import numpy as np

    num = 10_000 if size == "full" else 300
    random = np.random.default_rng(0)
    members, others, target = (random.beta(a, 1, n) for a, n in ((30, num), (5, num), (15, num * 9 // 20)))

    def turn() -> dict[str, float]:
        unseen = attack(members, others, np.concatenate([target, members, others]))
        right = np.concatenate([~unseen[len(target) : -num], unseen[-num:]])
        return {"unseen": float(unseen[: len(target)].mean()), "accuracy": float(right.mean())}

    return turn


# --- drawing and whole commands -------------------------------------------------------------------------------------


def _drawing(size: str) -> tuple[list[str], dict[str, Any]]:
    num = 4 if size == "small" else 16
    prompts = ["a red circle", "a blue square", "a green triangle", "a yellow circle"] * (num // 4)
    return prompts, {"steps": 10 if size == "small" else 50, "guidance": 3.0}


def our_drawing(size: str) -> Iterator[Turn]:
    from erase.families import loading

    model = loading.load("mini")
    prompts, how = _drawing(size)

    def turn() -> dict[str, float]:
        model.draw(prompts, list(range(len(prompts))), size=model.resolution, **how)
        return {"images": float(len(prompts))}

    yield turn


def our_sampler(size: str) -> Iterator[Turn]:
    yield _sampled(size, "dpm++", 10)


def plain_sampler(size: str) -> Iterator[Turn]:
    yield _sampled(size, "model", 25)


def _sampled(size: str, sampler: Any, steps: int) -> Turn:
    """Training images as `erase-concept --model mini` draws them, eight at a time."""
    from erase.families import loading

    model = loading.load("mini")
    prompts, how = _drawing(size)

    def turn() -> dict[str, float]:
        seeds, how["steps"] = list(range(len(prompts))), steps
        model.draw(prompts, seeds, size=model.resolution, sampler=sampler, **how)
        return {"images": float(len(prompts))}

    return turn


def plain_drawing(size: str) -> Iterator[Turn]:
    import torch
    from diffusers import StableDiffusionPipeline

    from bench import plain
    from erase.families import loading

    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        loading.MINI_DIR, local_files_only=True, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts, how = _drawing(size)
    side = pipeline.unet.config["sample_size"] * pipeline.vae_scale_factor

    def turn() -> dict[str, float]:
        plain.drawn_latents(pipeline, prompts, size=side, **how)
        return {}

    yield turn


def our_nudenet(size: str) -> Iterator[Turn]:
    """Scoring images from their PNG files' bytes on."""
    import io

    import numpy as np
    from PIL import Image

    try:
        from erase.evaluation.judges.nudenet import NudeNet
    except ImportError as error:
        raise EraseError("the nudity detector is not part of this version") from error
    detector = NudeNet()
    num = 8 if size == "small" else 64
    draw = np.random.default_rng(0)
    stored = []
    for _ in range(num):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(file, "PNG", compress_level=1)
        stored.append(file.getvalue())

    def turn() -> dict[str, float]:
        start = _cpu_seconds()
        images = [np.asarray(Image.open(io.BytesIO(content))) for content in stored]
        detector.score(images, [""] * num)
        return {"images_per_second": num / (_cpu_seconds() - start)}

    yield turn


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "erase.cli", *arguments], check=True, capture_output=True)


def our_help(size: str) -> Iterator[Turn]:
    def turn() -> dict[str, float]:
        _command("--help")
        return {}

    yield turn


def our_mini(size: str) -> Iterator[Turn]:
    """From nothing, an empty cache included; the small size draws, trains and shows next to nothing."""

    def turn() -> dict[str, float]:
        little = ["--num-forget", "2", "--num-retain", "2", "--num-inference-steps", "2", "--num-train-steps", "1"]
        little += ["--batch-size", "2", "--num-samples", "0"]
        with tempfile.TemporaryDirectory() as folder:
            places = ["--output", f"{folder}/run", "--cache-dir", f"{folder}/cache"]
            _command("--concept", "circle", "--model", "mini", *places, *(little if size == "small" else []))
        return {}

    yield turn
