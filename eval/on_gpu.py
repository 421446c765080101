"""What the product does on one CUDA GPU: it runs the GPU tests and the real commands, and times them.

    python eval/on_gpu.py                                   # all parts, under 20 minutes
    python eval/on_gpu.py --only environment,tests,command  # these only, each under 4 minutes
    python eval/on_gpu.py --slice 540                       # nine minutes of it; repeat until nothing is left
    python eval/on_gpu.py --only cifar10 --cifar10 FOLDER   # nine minutes of SalUn's CIFAR-10 tables; repeat to go on
    python eval/on_gpu.py --only cifar10-diffusion --cifar10 FOLDER   # the same for class forgetting in pixel diffusion
    python eval/on_gpu.py --only mini-tables                # nine minutes of the tables of the embedded model; the same
    python eval/on_gpu.py --dry-run                         # the same code at toy size on the CPU, to see that it runs

The machine needs torch, diffusers, transformers, accelerate, safetensors and pytest, and this repository on PYTHONPATH;
no network and no other package. Every part is a process of its own and writes its figures into one JSON file as soon as
it has them. A part that fails leaves its error there, the next one starts, and the exit code is 1 at the end.

Stable Diffusion v1.4 is here its exact architecture with random weights: the script builds the folder itself. Seconds
and bytes are those of the real model; images and losses mean nothing.
"""

import argparse
import copy
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path("eval/results")  # of real runs only
PART_SECONDS = 240  # a part that takes longer is stopped and recorded as failed; a dry run has four times as long
SLICE_SECONDS = 540  # of the parts SLICED, which are stopped then and continue when they are started again
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pytest")
OPTIONAL = ("scipy", "matplotlib", "sklearn", "nudenet", "peft", "triton", "xformers", "bitsandbytes")


@dataclass(frozen=True)
class Job:
    """What every part is given.

    work: a folder for models and runs, 10 GB. toy: sizes at which a CPU takes seconds. ends: when the part is stopped,
    as `time.monotonic()`. cifar10: a folder with CIFAR-10's images. known: figures of the part from an earlier slice,
    which are not measured again.
    """

    output: Path
    work: Path
    device: str
    toy: bool
    ends: float
    cifar10: Path
    known: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return max(1.0, self.ends - time.monotonic())

    @property
    def model_name(self) -> str:
        return "toy, random weights" if self.toy else "SD v1.4, random weights"

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def cli(self, *arguments: Any, module: str = "erase.cli") -> dict[str, Any]:
        """Run a command as a user does; raises with its last line when it fails."""
        return self.process([sys.executable, "-m", module, *map(str, arguments)])

    def process(self, command: Sequence[str]) -> dict[str, Any]:
        """Wall seconds of a process that ends with exit code 0."""
        start = time.monotonic()
        done = self.try_process(command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:4])} ended with {done.returncode}: {last_line(done.stderr)}")
        return {"wall_seconds": round(time.monotonic() - start, 2)}

    def try_process(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        how: dict[str, Any] = {"env": offline(), "cwd": REPOSITORY, "timeout": self.seconds_left}
        return subprocess.run(list(command), capture_output=True, text=True, **how)


class Report:
    """The JSON file: {"parts": {name: figures}}; each `put` is on the disk when it returns, whole or not at all."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"parts": {}}

    def put(self, part: str, **figures: Any) -> None:
        from erase import files

        content = self.read()
        content["parts"].setdefault(part, {}).update(figures)
        files.write_json(self.path, content)
        print(f"{part:12} {json.dumps(figures)[:400]}", flush=True)

    def begin(self, part: str, *, anew: bool) -> None:
        """Forget what an earlier call found out about the part; if not `anew`, only that it failed or was stopped."""
        from erase import files

        content = self.read()
        kept = {} if anew else content["parts"].pop(part, {})
        content["parts"][part] = {name: kept[name] for name in kept if name not in ("error", "part_seconds")}
        files.write_json(self.path, content)

    def known(self, part: str) -> dict[str, Any]:
        """The part's figures, without those that are only an error."""
        figures = self.read()["parts"].get(part, {})
        return {name: value for name, value in figures.items() if not (isinstance(value, dict) and "error" in value)}

    def is_finished(self, part: str) -> bool:
        found = self.read()["parts"].get(part, {})
        return "part_seconds" in found and "error" not in found


def offline() -> dict[str, str]:
    """The environment of every process: this repository on PYTHONPATH, and no attempt to reach the hub."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"


# --- the model ------------------------------------------------------------------------------------------------------

VOCABULARY = 49_408  # tokens of CLIP ViT-L/14
COUNTS = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}  # weights of SD v1.4
PNDM = {  # SD v1.4's scheduler
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def make_tokenizer() -> Any:
    """A CLIP tokenizer of the real one's size: its byte alphabet, and pairs of letters in place of its merges."""
    from transformers import CLIPTokenizer

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the byte alphabet of GPT-2 and CLIP
    letters = [chr(n) for n in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    words, ends = [*letters, *(f"{letter}</w>" for letter in letters)], ["<|startoftext|>", "<|endoftext|>"]
    pairs = list(islice(product(letters, letters), VOCABULARY - len(words) - len(ends)))
    words += [*(a + b for a, b in pairs), *ends]
    vocabulary: Any = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)  # pyright: ignore[reportArgumentType]


def build_model(folder: Path, device: str, toy: bool = False) -> dict[str, int]:
    """Write SD v1.4's architecture with random weights as a diffusers folder; weights of each part. 4.3 GB.

    device: where the weights are made; a GPU takes a second, a CPU a minute. toy: the same parts, much narrower.
    """
    import torch
    from bench.jobs import SD14_UNET
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel, __version__
    from transformers import CLIPTextConfig, CLIPTextModel

    vae_channels: Any
    width, layers = (16, 1) if toy else (768, 12)
    vae_channels, groups = ((8, 8, 8, 8), 8) if toy else ((128, 256, 512, 512), 32)
    unet = dict(SD14_UNET)
    if toy:
        unet |= {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 8, "sample_size": 8}
        unet |= {"cross_attention_dim": width, "layers_per_block": 1}
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    words = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2 if toy else 12,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    torch.manual_seed(0)
    makers: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**unet),
        "vae": lambda: AutoencoderKL(
            **blocks,
            block_out_channels=vae_channels,
            layers_per_block=2,
            norm_num_groups=groups,
            sample_size=8 * unet["sample_size"],
        ),
        "text_encoder": lambda: CLIPTextModel(words),
    }
    counts = {}
    for name, make in makers.items():
        with torch.device(device):
            part = make()
        counts[name] = sum(weights.numel() for weights in part.parameters())
        part.save_pretrained(folder / name)
        del part
    if not toy and counts != COUNTS:
        raise RuntimeError(f"this is not SD v1.4: {counts}, where {COUNTS} is right")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    PNDMScheduler(**PNDM).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": __version__}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return counts


def model_folder(job: Job) -> Path:
    """The folder in `work`; made the first time."""
    folder = job.work / ("toy-sd" if job.toy else "sd-v1-4-random")
    if not (folder / "model_index.json").is_file():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        build_model(folder, job.device, job.toy)
    return folder


# --- parts ----------------------------------------------------------------------------------------------------------

Part = Iterator[dict[str, Any]]  # figures, as soon as there are some


def environment(job: Job) -> Part:
    """Versions, card and driver."""
    import torch

    import erase

    versions = {name: version_of(name) for name in (*PACKAGES, *OPTIONAL)}
    yield {"versions": {"erase-concept": erase.__version__, "python": platform.python_version(), **versions}}
    yield {"cpu_cores": os.cpu_count(), "platform": platform.platform(), "random_weights": True, "toy": job.toy}
    if job.on_cuda:
        card = torch.cuda.get_device_properties(job.device)
        yield {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_bytes": card.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "driver": driver(),
        }


def version_of(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version({"sklearn": "scikit-learn"}.get(package, package))
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return last_line(subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout)


def tests(job: Job) -> Part:
    """The tests marked `gpu`: counts, and the names and last lines of those that fail."""
    marked = [
        path for path in sorted((REPOSITORY / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")
    ]
    found = job.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={found}"]
    done = job.try_process([*command, *map(str, marked)])
    if not found.is_file():
        raise RuntimeError(f"pytest ended with {done.returncode}: {last_line(done.stderr or done.stdout)}")
    suite = next(ElementTree.parse(found).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    bad = {
        f"{case.get('classname')}::{case.get('name')}": last_line(fault.get("message") or fault.text or "")
        for case in suite.iter("testcase")
        for fault in [*case.iter("failure"), *case.iter("error")]
    }
    yield {"files": [path.name for path in marked], **counts, "failed": bad, "seconds": float(suite.get("time", "nan"))}
    if done.returncode not in (0, 5):  # 5: nothing was collected
        raise RuntimeError(f"{len(bad)} GPU tests fail, first {next(iter(bad), last_line(done.stdout))}")
    if job.on_cuda and counts["skipped"] == counts["tests"]:
        raise RuntimeError("no GPU test ran")


def command(job: Job) -> Part:
    """`erase-concept --concept nudity` on SD v1.4: seconds of each phase, and what 1,600 images and 100 steps take."""
    start = time.monotonic()
    folder = model_folder(job)
    yield {
        "model": "SD v1.4, random weights" if not job.toy else "toy",
        "build_seconds": rounded(time.monotonic() - start),
    }
    num, steps = (2, 2) if job.toy else (16, 10)
    run = fresh(job.work / "command")
    arguments = ["--concept", "nudity", "--model", folder, "--output", run, "--cache-dir", run / "cache"]
    arguments += ["--num-forget", num, "--num-retain", num, "--num-train-steps", steps, "--device", job.device]
    arguments += ["--num-inference-steps", 2, "--num-samples", 2, "--batch-size", 2] if job.toy else []
    shown = " ".join(["erase-concept", *(Path(str(word)).name for word in arguments)])
    took = job.cli(*arguments)
    record = read(run / "run.json")
    seconds = record["seconds"]
    settings = record["settings"]
    yield {
        "command": shown,
        **took,
        "images": [num, num],
        "train_steps": steps,
        "sampler": [settings.get("sampler"), settings["num_inference_steps"]],
        "compute": record["compute"],
        "seconds": seconds,
        "peak_memory_bytes": record["peak_memory_bytes"],
        "weights_changed": record["weights"]["changed"],
        "samples_png": (run / "samples.png").is_file(),
    }
    scaled = {"data": 1600 / (2 * num), "mask": 800 / num, "train": 100 / steps}
    whole = {phase: rounded(value * scaled.get(phase, 1)) for phase, value in seconds.items()}
    yield {
        "extrapolated_to": "800 + 800 images, 100 steps; an upper bound, as each phase's start-up is scaled too",
        "extrapolated_seconds": {**whole, "total": rounded(sum(whole.values()))},
    }
    yield {"all in": judged(sum(whole.values()), 300), "output phase": judged(seconds["output"], 8)}
    shutil.rmtree(run)


# GB of the cards that are imitated, and the options with which they should do
LIMITS = {8: ["--low-memory", "--density", 0.1], 12: ["--low-memory"], 16: ["--low-memory"], 24: []}


def low_memory(job: Job) -> Part:
    """Runs in processes that may allocate as much as cards of 8 to 24 GB have: does each fit, with its options?"""
    folder = model_folder(job)
    limits = [8, 24] if job.toy else [limit for limit in LIMITS if limit * 1e9 <= card_bytes(job)]
    together = job.toy or sum(limits) * 1e9 < 0.9 * card_bytes(job)
    yield {
        "model": job.model_name,
        "limit": "10^9 bytes for torch's allocator; the rest of a card (0.6 GB of 8 GiB) is left to the CUDA context",
        "at_once": together,
    }

    def attempt(limit: int) -> tuple[int, dict[str, Any]]:
        run = fresh(job.work / f"low-memory-{limit}")
        arguments = ["--concept", "nudity", "--model", folder, "--output", run, "--cache-dir", run / "cache"]
        num, samples = (2, 2) if job.toy else (8, 6)
        arguments += [*LIMITS[limit], "--save", "delta", "--num-forget", num, "--num-retain", num]
        arguments += ["--num-samples", samples, "--num-inference-steps", 4, "--num-train-steps", 1]
        # with --low-memory images pass one by one, whatever the batch
        arguments += ["--batch-size", 2] if job.toy or "--low-memory" in LIMITS[limit] else []
        arguments += ["--device", job.device]
        start = time.monotonic()
        try:
            done = job.try_process([sys.executable, __file__, "limited", str(limit), *map(str, arguments)])
        except subprocess.TimeoutExpired:
            return limit, {"fits": None, "error": f"not finished in {time.monotonic() - start:.0f} s"}
        peak = re.search(r"peak_bytes (\d+)", done.stderr)
        found: dict[str, Any] = {"fits": done.returncode == 0, "wall_seconds": rounded(time.monotonic() - start)}
        found |= {"peak_bytes": int(peak[1])} if peak else {}
        if done.returncode == 0:
            found["seconds"] = read(run / "run.json")["seconds"]
        else:
            said = [line for line in done.stderr.splitlines() if not line.startswith("peak_bytes")]
            found["error"] = last_line("\n".join(said))
            if "out of memory" not in done.stderr:
                found["fits"] = None  # it failed for another reason
        shutil.rmtree(run, ignore_errors=True)
        return limit, found

    def name_of(limit: int) -> str:
        return f"{limit} GB, {' '.join(map(str, LIMITS[limit])) or 'no option'}"

    failed = []
    with ThreadPoolExecutor(len(limits) if together else 1) as pool:
        for limit, found in pool.map(attempt, [limit for limit in limits if name_of(limit) not in job.known]):
            yield {name_of(limit): {**found, "target": "fits", "is_met": found["fits"]}}
            failed += [f"{limit} GB: {found['error']}"] if found["fits"] is None else []
    if failed:
        raise RuntimeError("; ".join(failed))


def limited(arguments: Sequence[str]) -> None:
    """`erase-concept` in a process whose CUDA memory is limited; says its peak on stderr, whatever happens."""
    import torch

    from erase import cli

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(arguments[0]) * 1e9 / total))
    try:
        cli.main(arguments[1:])
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        if torch.cuda.is_available():
            print(f"peak_bytes {torch.cuda.max_memory_allocated()}", file=sys.stderr)


def card_bytes(job: Job) -> int:
    import torch

    return torch.cuda.get_device_properties(job.device).total_memory if job.on_cuda else 0


def methods(job: Job) -> Part:
    """Every method on the embedded model for a few steps: seconds, finite losses, a result that loads and changed."""
    from erase.methods import METHODS

    failed = []
    names = list(METHODS)[:2] + ["uce"] if job.toy else METHODS
    for name in (name for name in names if name not in job.known):
        try:
            yield {name: one_method(job, name)}
        except Exception as error:
            yield {name: {"error": last_line(f"{type(error).__name__}: {error}")}}
            failed.append(name)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def one_method(job: Job, name: str) -> dict[str, Any]:
    import math

    from erase import delta, erase_concept, masks, methods
    from erase.families import loading, stored_unet

    folder = fresh(job.work / "methods" / name)
    start = time.monotonic()
    few: dict[str, Any] = {"num_inference_steps": 3}
    if issubclass(methods.load(name), methods.TrainedMethod):
        few |= {"num_forget": 4, "num_retain": 4, "num_train_steps": 2, "batch_size": 2}
    run = erase_concept(
        "circle",
        "mini",
        method=name,
        output=str(folder),
        cache_dir=str(job.work / "cache"),
        device=job.device,
        num_samples=1,
        quiet=True,
        **few,
    )
    seconds = time.monotonic() - start
    losses = [value for step in run.record.losses for value in step.values()]
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"a loss is not finite: {losses}")
    loading.load(folder)
    change = delta.load(folder / "delta.safetensors")
    changed = run.record.weights.changed
    may_move = None
    if (folder / "mask.safetensors").is_file():
        mask, _ = masks.load(folder / "mask.safetensors")
        may_move = masks.count(mask)
        base = stored_unet.load_unet(loading.MINI_DIR).state_dict()
        new = stored_unet.load_unet(folder).state_dict()
        outside = [key for key, bits in mask.items() if (base[key] != new[key])[~bits].any()]
        if outside:
            raise RuntimeError(f"{outside[0]} changed outside the mask")
    if not changed or changed != sum(change.changed.values()):
        raise RuntimeError(f"{changed} weights changed")
    return {"seconds": rounded(seconds), "steps": len(run.record.losses), "changed": changed, "may_move": may_move}


def mini(job: Job) -> Part:
    """The embedded model on the GPU and on the CPU, with and without --low-memory, and whether bits repeat."""
    steps, num = (2, 4) if job.toy else (20, 32)
    common = ["--concept", "circle", "--model", "mini", "--num-samples", 1, "--num-forget", num, "--num-retain", num]
    common += ["--num-inference-steps", 2, "--batch-size", 2] if job.toy else []
    variants: dict[str, list[Any]] = {job.device: ["--device", job.device], "cpu": ["--device", "cpu"]}
    variants["again"] = variants[job.device]
    variants["two steps"] = [*variants[job.device], "--num-train-steps", 2]
    variants["two steps, low memory"] = [*variants["two steps"], "--low-memory"]
    hashes = {}
    for name, options in variants.items():
        if name in job.known and (name not in {job.device, "again"} or "same_bits_twice" in job.known):
            continue
        run = fresh(job.work / "mini")
        places = ["--output", run, "--cache-dir", run / "cache"]
        took = job.cli(*common, *places, "--num-train-steps", steps, *options)
        record = read(run / "run.json")
        hashes[name] = record["model"]["result_hash"]
        yield {name: {**took, "train_steps": len(record["losses"]), "seconds": record["seconds"]}}
        shutil.rmtree(run)
    if "same_bits_twice" not in job.known:
        yield {"same_bits_twice": hashes[job.device] == hashes["again"]}
    run = fresh(job.work / "mini")
    few = [*common, "--num-train-steps", steps] if job.toy else ["--concept", "circle", "--model", "mini"]
    took = job.cli(*few, "--output", run, "--cache-dir", run / "cache", "--device", job.device)
    yield {
        "--concept circle --model mini": judged(took["wall_seconds"], 25)
        | {"seconds": read(run / "run.json")["seconds"]}
    }
    shutil.rmtree(run)


def evaluation(job: Job) -> Part:
    """`eval-concept run --task mini` of a run on the embedded model; without scipy and matplotlib no report."""
    folder = job.work / "methods" / "salun"
    if not (folder / "run.json").is_file():
        one_method(job, "salun")
    missing = [name for name in ("scipy", "matplotlib") if importlib.util.find_spec(name) is None]
    output = fresh(job.work / "evaluation")
    how = ["--task", "mini", "--device", job.device, "--batch-size", 32, "--quiet"]
    how += ["--limit", 4, "--steps", 2] if job.toy else []
    if missing:
        took = 0.0
        for arm, model in {"erased": folder, "base": "mini"}.items():
            done = job.cli(
                *("generate", "--concept", "circle", "--model", model, "--output", output / arm, *how),
                module="erase.evaluation.cli",
            )
            took += done["wall_seconds"]
            took += job.cli("score", output / arm, "--quiet", module="erase.evaluation.cli")["wall_seconds"]
        lines = (output / "erased" / "scores" / "mini.jsonl").read_text("utf-8").splitlines()
        yield {"wall_seconds": rounded(took), "images_scored": len(lines)}
        yield {"skipped": f"the report, as this machine lacks {' and '.join(missing)}; images and scores were made"}
        return
    took = job.cli("run", "--model", folder, "--output", output, *how, module="erase.evaluation.cli")
    results = read(next(output.glob("salun/mini/results.json")))
    shown = {one["name"]: [one["erased"]["value"], one["erased"]["n"]] for one in results["scores"]}
    yield {**took, "scores": shown, "erased_in_steps": read(folder / "run.json")["settings"]["num_train_steps"]}


def classifiers(job: Job) -> Part:
    """Three methods of `unlearn-classifier` on random images in CIFAR-10's format, with the settings of CIFAR-10."""
    from erase.classification import run
    from erase.classification.settings import Settings

    data = random_cifar(job.work / "cifar", *((64, 32) if job.toy else (10_240, 1_024)))
    network = "small" if job.toy else "resnet18"
    yield {"images": "random", "num": 64 if job.toy else 10_240, "network": network}
    original: dict[str, Any] = {}
    for method in ("salun", "ft", "bs"):
        output = fresh(job.work / f"classifier-{method}")
        how: dict[str, Any] = {"network": network, "epochs": 1, "train_epochs": 1, "device": job.device, **original}
        how |= {"train_learning_rate": 0.01, "learning_rate": 0.001}
        done = run.run(Settings(data=str(data), method=method, output=str(output), **how), job.work / "cache")
        yield {method: {"seconds": done.record["seconds"], "weights": done.record["weights"]}}
        if not done.record["weights"].get("changed"):
            raise RuntimeError(f"{method} changed nothing")
        original = {"model": str(job.work / "classifier-salun" / "original")}
    if lacks_scipy() or importlib.util.find_spec("matplotlib") is None:
        yield {"cells at once": NO_SCIPY}
        return
    yield {"cells at once": cells_at_once(job, data, network)}


NO_SCIPY = {"skipped": "this machine lacks scipy or matplotlib, which the figures are computed with"}


def lacks_scipy() -> bool:
    return importlib.util.find_spec("scipy") is None


def cells_at_once(job: Job, data: Path, network: str) -> dict[str, Any]:
    """Seconds of `unlearn-classifier compare` with one, two and three cells at once on one GPU: does that save time?

    Of six cells, the original model's included, which the others wait for; the start of the processes is included too.
    """
    methods, seconds = ["ft", "rl"] if job.toy else ["ft", "rl", "salun"], {}
    for jobs in (1, 2) if job.toy else (1, 2, 3):
        output = fresh(job.work / "cells")
        how = ["compare", "--data", data, "--network", network, "--methods", *methods, "--seeds", 1, "--jobs", jobs]
        how += ["--train-epochs", 1 if job.toy else 5, "--epochs", 1 if job.toy else 5, "--train-learning-rate", 0.01]
        how += ["--learning-rate", 0.001, "--device", job.device, "--output", output, "--quiet"]
        seconds[jobs] = job.cli(*how, module="erase.classification.cli")["wall_seconds"]
    ratios = {f"ratio of {jobs}": rounded(value / seconds[1]) for jobs, value in seconds.items() if jobs > 1}
    return {"seconds": {str(jobs): value for jobs, value in seconds.items()}, **ratios}


def cifar10(job: Job) -> Part:
    """A slice of eval/cifar10.py, seed by seed: how many cells are finished, and the tables of these.

    Whatever a slice had begun when it was stopped continues from its state of a minute before.
    """
    data = random_cifar(job.work / "cifar10-data", 64, 32) if job.toy else job.cifar10
    output = job.work / "cifar10"
    command = [sys.executable, str(REPOSITORY / "eval" / "cifar10.py"), "--data", str(data), "--output", str(output)]
    command += ["--quiet", *(["--protocol", "toy", "--methods", "ft"] if job.toy else [])]
    if lacks_scipy():
        yield NO_SCIPY
        return
    start, is_whole = time.monotonic(), True
    how: dict[str, Any] = {"env": offline(), "cwd": REPOSITORY, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, timeout=max(1.0, job.seconds_left - 20), **how)
    except subprocess.TimeoutExpired:
        is_whole = False
    else:
        if done.returncode:
            raise RuntimeError(f"cifar10.py ended with {done.returncode}: {last_line(done.stderr)}")
    cells = sorted(str(path.relative_to(output)) for path in output.glob("*/cells/*.json"))
    yield {"finished": is_whole, "cells": len(cells), "wall_seconds": rounded(time.monotonic() - start)}
    if (output / "results.json").is_file():
        shutil.copyfile(output / "results.json", job.output.with_name("classification-cifar10-full.json"))
        yield {"results": "classification-cifar10-full.json, beside this file; cifar10.py --print prints the tables"}


def cifar10_diffusion(job: Job) -> Part:
    """A slice of eval/cifar10_diffusion.py: whether all is done, and its results when it is."""
    if lacks_scipy():
        yield NO_SCIPY
        return
    import cifar10_diffusion as recipe

    data = random_cifar(job.work / "cifar10-data", 64, 32) if job.toy else job.cifar10
    sizes, output = recipe.SMOKE if job.toy else recipe.Sizes(), job.work / "cifar10-diffusion"
    found = recipe.work(str(data), output, seconds=job.seconds_left - 60, device=job.device, sizes=sizes)
    yield {"finished": found is not None, "cells": len([*(output / "cells").glob("*.json")])}
    if found is not None:
        yield {"judge_accuracy": found["judge_accuracy"], "table": recipe.table(found).splitlines()}
        shutil.copyfile(output / "results.json", job.output.with_name("cifar10-diffusion.json"))


def mini_tables(job: Job) -> Part:
    """A slice of the embedded model's tables: three retrained models of each concept, all methods, all attacks on them.

    The processes share the GPU, since one cannot keep it busy with so small a network.
    """
    if lacks_scipy():
        yield NO_SCIPY
        return
    jobs, folder = 2 if job.toy else max(1, min(8, (os.cpu_count() or 2) // 2)), job.work / "mini-tables"
    tables = {"methods": ["mini_methods.py"], "attacked": ["attacked_methods.py"]}
    common = ["--device", job.device, "--jobs", str(jobs)]
    golds: dict[str, list[Path]] = {}
    if job.toy:
        common += ["--concept", "circle", "--variant", "uce", "--seeds", "1"]
        tables["attacked"] += ["--part", "kept"]
    else:
        golds = {c: [folder / f"gold-{c}-{n}" for n in (1, 2, 3)] for c in ("circle", "striped", "nudity")}
    missing = [(c, path) for c, paths in golds.items() for path in paths if not (path / "model_index.json").is_file()]
    training = [
        [sys.executable, "-m", "erase.mini", "train", "--without", {"nudity": "nude"}.get(concept, concept)]
        + ["--seed", path.name[-1], "--parts-from", str(REPOSITORY / "erase" / "mini" / "weights")]
        + ["--output", str(path), "--device", job.device]
        for concept, path in missing
    ]
    if not finish(training, jobs, job):
        yield {"retrained": {"finished": False}}
        return
    for name, script in tables.items():
        num, output = 3 if name == "methods" else 1, folder / name
        known = [f"{concept}={path}" for concept, paths in golds.items() for path in paths[:num]]
        command = [sys.executable, str(REPOSITORY / "eval" / script[0]), *script[1:], *common, "--output", str(output)]
        is_whole = finish([command + [word for one in known for word in ("--gold", one)]], 1, job)
        yield {name: {"finished": is_whole, "cells": len([*(output / "cells").glob("*.json")])}}
        if not is_whole:
            return
        shutil.copyfile(output / "results.json", job.output.with_name(f"mini-{name}.json"))


def finish(commands: Sequence[Sequence[str]], at_once: int, job: Job) -> bool:
    """Run the commands, so many at once; whether all ended before the slice did. Those left are stopped.

    Raises:
        RuntimeError: one failed; its last line.
    """
    waiting, running = list(commands), list[tuple[subprocess.Popen[str], str, Path]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                log = job.work / f"log-{len(waiting)}.txt"
                how: dict[str, Any] = {"env": offline() | {"OMP_NUM_THREADS": "1"}, "cwd": REPOSITORY, "text": True}
                how |= {"stderr": subprocess.STDOUT, "start_new_session": True}
                command = waiting.pop(0)
                with log.open("w", encoding="utf-8") as output:
                    running.append((subprocess.Popen(command, stdout=output, **how), Path(command[1]).name, log))
            if job.seconds_left <= 20:
                return False
            time.sleep(0.2)
            for one, name, log in [*running]:
                if one.poll() is not None:
                    running.remove((one, name, log))
                    if one.returncode:
                        what = last_line(log.read_text(encoding="utf-8", errors="replace"))
                        raise RuntimeError(f"{name} ended with {one.returncode}: {what}")
        return True
    finally:
        for one, *_ in running:
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()


def random_cifar(folder: Path, num_train: int, num_test: int) -> Path:
    """CIFAR-10's binary version with random images: a label byte and 3,072 pixels each."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for name, num in (("data_batch_1.bin", num_train), ("test_batch.bin", num_test)):
        rows = draw.integers(0, 256, (num, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(num) % 10
        (folder / name).write_bytes(rows.tobytes())
    return folder


# --- side by side with a plain script -------------------------------------------------------------------------------


def steps(job: Job) -> Part:
    """Training step, optimizer, mask pass, drawing and a ResNet-18 step of the product and of a plain script.

    Both sides do the same work in turn, in one process. A ratio is the product's median over the plain script's.
    """
    folder, batch = model_folder(job), 2 if job.toy else 8
    rounds, num = (1, 3) if job.toy else (3, 5)
    ours = Ours(job, folder, batch)
    plain = Plain(job, ours)
    yield {
        "model": job.model_name,
        "precision": ours.settings.precision,
        "plain": "bf16 autocast, dense fused AdamW, gradients times a float mask, bf16 copy of the base as teacher, "
        "both branches in one batch; bf16 pipeline; channels_last and fused SGD for the classifier",
    }
    classifier = Classifiers(job)
    pairs: dict[str, tuple[Callable[[], list[float]], Callable[[], list[float]], float | None]] = {
        "training step": (lambda: ours.train(num), lambda: timed(job, plain.train, num), 1.0),
        "training step, graphs": (lambda: ours.train(num, replays=True), lambda: timed(job, plain.train, num), 0.7),
        "mask pass, an image": (ours.score, lambda: [s / batch for s in timed(job, plain.score, num)], None),
        "optimizer": (lambda: timed(job, ours.update, num), lambda: timed(job, plain.update, num), None),
        f"{batch} images, {ours.draw_steps} steps": (
            lambda: timed(job, ours.draw, 2),
            lambda: timed(job, plain.draw, 2),
            None,
        ),
        f"{classifier.network} on 32 x 32, {classifier.batch} images": (
            lambda: classifier.ours(num),
            lambda: timed(job, classifier.plain, num),
            1.0,
        ),
    }
    seconds = {}
    for name, (mine, theirs, limit) in pairs.items():
        if name in job.known:
            seconds[name] = job.known[name]["ours"]
            continue
        found = compared(job, mine, theirs, rounds)
        seconds[name] = found["ours"]
        yield {name: found | ({} if limit is None else {"target": limit, "is_met": found["ratio"] <= limit})}
        if limit is not None and found["peak_share"] is not None and name == "training step":
            yield {"training step, peak memory": judged(found["peak_share"], 0.7)}
    at_once, drawn = ours.drawn()
    yield {
        "optimizer, seconds": judged(seconds["optimizer"], 0.015),
        "optimizer, bytes per weight": judged(ours.bytes_per_weight(), 4.2),
        "mask, 800 images": judged(800 * seconds["mask pass, an image"], 9),
        f"1,600 images, {at_once} at once": judged(1600 * drawn, 200),
        "classifier step": judged(seconds[f"{classifier.network} on 32 x 32, {classifier.batch} images"], 0.009),
    }
    waits = {
        "training step": counted(job, ours.ticks, lambda: ours.train(num)),
        "mask pass": counted(job, ours.ticks, ours.score),
        "classifier step": counted(job, classifier.ticks, lambda: classifier.ours(num)),
    }
    yield {"host_waits_per_step": waits}
    yield {"launches_per_step": launched(ours, classifier)}


def launched(ours: "Ours", classifier: "Classifiers") -> dict[str, Any]:
    """Kernels, copies and graphs that a steady step launches, and waits of the host; see `bench.launches`."""
    from bench import launches

    def draw(num: int) -> None:
        ours.draw_steps = num
        ours.draw()

    kept = ours.draw_steps
    found = {
        "training step": launches.per_step(lambda num: ours.train(num)),
        "training step, graphs": launches.per_step(lambda num: ours.train(num, replays=True)),
        "optimizer": launches.per_step(lambda num: [ours.update() for _ in range(num)]),
        "image generation": launches.per_step(draw),
        "classifier step": launches.per_step(lambda num: classifier.ours(num)),
    }
    ours.draw_steps = kept
    waits = {name: sum(n for what, n in one.items() if what.startswith(launches.WAITS)) for name, one in found.items()}
    counts = {name: launches.num_launches(one) for name, one in found.items()}
    return {name: {"launches": rounded(counts[name]), "waits": rounded(waits[name])} for name in found}


def judged(value: float, limit: float) -> dict[str, Any]:
    """A figure that should be at most `limit`; of the real model on a GPU only."""
    return {"value": rounded(value), "target": limit, "is_met": value <= limit}


def compared(
    job: Job, ours: Callable[[], list[float]], plain: Callable[[], list[float]], rounds: int
) -> dict[str, Any]:
    """Medians of interleaved repeats, in seconds, with the range of each; ratio: ours over plain.

    peak_share: of the memory that each side takes at most, what is there before included; None without a GPU.
    """
    import torch

    seconds: tuple[list[float], list[float]] = ([], [])
    peaks = [0, 0]
    for _ in range(rounds):
        for side, measure in enumerate((ours, plain)):
            if job.on_cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds[side].extend(measure())
            peaks[side] = max(peaks[side], torch.cuda.max_memory_allocated() if job.on_cuda else 0)
    one, other = (statistics.median(found) for found in seconds)
    ranges = [[rounded(min(found)), rounded(max(found))] for found in seconds]
    return {
        "ours": rounded(one),
        "plain": rounded(other),
        "ratio": rounded(one / other),
        "ranges": ranges,
        "repeats": len(seconds[0]),
        "peak_bytes": peaks,
        "peak_share": peaks[0] / peaks[1] if job.on_cuda else None,
    }


class Ticks:
    """When steps begin. Called by the product in the middle of its own loop; `seconds` are of the steps between."""

    def __init__(self, job: Job):
        self.job, self.times, self.marks = job, [], []
        self.count: Callable[[], int] | None = None

    def __call__(self) -> None:
        if self.count is not None:
            self.marks.append(self.count())  # before the wait of our own
        synchronize(self.job)
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of all steps but the first, which allocates; and the last, which no other follows."""
        between = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        self.times = []
        if len(between) < 2:
            raise RuntimeError("the product's loop no longer passes through the place where steps are counted")
        return between[1:]


def synchronize(job: Job) -> None:
    import torch

    if job.on_cuda:
        torch.cuda.synchronize()


def timed(job: Job, work: Callable[[], Any], num: int) -> list[float]:
    """Seconds of each call but the first."""
    found = []
    for _ in range(num):
        synchronize(job)
        start = time.perf_counter()
        work()
        synchronize(job)
        found.append(time.perf_counter() - start)
    return found[1:]


def counted(job: Job, ticks: Ticks, work: Callable[[], Any]) -> dict[str, Any] | None:
    """How often the host waits for the GPU in a steady step, as torch's sync_debug_mode sees it, and where most."""
    import torch

    if not job.on_cuda:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ticks.count, ticks.marks = lambda: len(caught), []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            ticks.count = None
    first, last = ticks.marks[-2:]
    waits = [warning for warning in caught[first:last] if "synchroniz" in str(warning.message)]
    places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits)
    return {"waits": len(waits), "most": dict(places.most_common(5))}


class Ours:
    """The product's loops on SD v1.4, with the settings that `erase-concept --concept nudity` would run with."""

    def __init__(self, job: Job, folder: Path, batch: int):
        from bench import jobs

        from erase import device, masks
        from erase.families import loading, scope
        from erase.options.recipes import resolve
        from erase.options.settings import Settings
        from erase.runs import machine, planning

        self.job, self.batch, self.ticks = job, batch, Ticks(job)
        given = Settings(concept=("nudity",), model=str(folder), device=job.device, batch_size=batch)
        compute = device.choose(given.device, given.precision)
        given = replace(given, precision=compute.precision)
        self.accelerator = machine.make_accelerator(given, job.work / "steps", compute)
        self.model: Any = loading.load(folder, device=compute.device)  # a Stable Diffusion, whose parts are used below
        self.model.precision = compute.precision
        self.settings = resolve(given, "nudity", self.model.defaults, can_round=job.on_cuda)
        self.plan, self.method = planning.make_plan(self.settings, self.model), planning.make_method(self.settings)
        self.recipe = planning.make_recipe(self.settings, self.plan, "object")
        self.parameters = scope.inside(dict(self.model.unet.named_parameters()), str(self.settings.scope))
        self.mask = masks.pack(jobs.random_mask_of(self.model.unet, self.settings.density))
        self.data = jobs.random_data(self.model, 6 * batch)
        self.mask_data = jobs.random_data(self.model, 16 * batch)  # in groups of 32 images on a GPU
        self.draw_steps = 2 if job.toy else self.plan.steps
        self.optimizer = self.gradients = None

    def train(self, num: int, *, replays: bool = False) -> list[float]:
        """Steps of `loop.train`, whose optimizer steps once each.

        replays: with CUDA graphs, which the loop makes in its first step; else without.
        """
        from erase.optim import MaskedAdam
        from erase.training import loop

        recipe, plain = replace(self.recipe, num_steps=num + 2), MaskedAdam.step
        how: dict[str, Any] = {"state_path": self.job.work / "none", "quiet": True}

        def step(optimizer: Any, *arguments: Any) -> Any:
            self.ticks()
            return plain(optimizer, *arguments)

        with mock.patch.object(MaskedAdam, "step", step), mock.patch.object(loop, "REPAYS", 0 if replays else 10**9):
            method: Any = self.method  # one that trains
            loop.train(self.model, method, self.data, self.parameters, self.mask, recipe, self.accelerator, **how)
        return self.ticks.seconds()

    def score(self) -> list[float]:
        """Seconds an image of `saliency_pass.accumulate`, which asks the model once a group of batches."""
        from erase.training import saliency_pass

        how: dict[str, Any] = {"score": self.settings.score, "guidance": float(self.settings.mask_guidance or 0)}
        how |= {"batch_size": self.batch, "seed": 0, "state_path": self.job.work / "none", "quiet": True}
        rows: list[int] = []

        def ticking(x: Any, *arguments: Any) -> Any:
            rows.append(len(x))
            self.ticks()
            return self.model(x, *arguments)

        ticked: Any = with_ticks(self.model, "__call__", lambda: None)
        type(ticked).__call__ = lambda _, *arguments: ticking(*arguments)
        saliency_pass.accumulate(ticked, self.mask_data, self.parameters, self.accelerator, **how)
        return [found / num for found, num in zip(self.ticks.seconds(), rows[1:], strict=False)]

    def update(self) -> None:
        """What the masked optimizer does with gradients that are there: gather them and step."""
        import torch

        from erase.optim import MaskedAdam

        parameters = [parameter.requires_grad_(True) for parameter in self.parameters.values()]
        if self.optimizer is None:
            self.optimizer = MaskedAdam(self.parameters, self.mask, lr=1e-5)
            self.gradients = [torch.full_like(parameter, 1e-3) for parameter in parameters]
        with self.optimizer.gathering():
            torch.autograd.backward(parameters, self.gradients)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def bytes_per_weight(self) -> float:
        """Of the optimizer's state, and of where the masked weights are."""
        if self.optimizer is None:  # a slice that continues behind the row of the optimizer
            self.update()
        assert self.optimizer is not None
        return self.optimizer.num_bytes() / sum(parameter.numel() for parameter in self.parameters.values())

    def drawn(self) -> tuple[int, float]:
        """Images that are generated at once by default, and the seconds of one."""
        from erase.training import memory

        num = 2 if self.job.toy else memory.images_at_once(self.model, self.plan.size)
        how: dict[str, Any] = {"guidance": self.plan.guidance, "size": self.plan.size, "sampler": self.plan.sampler}
        prompts = ["a photo of a person"] * num
        return num, statistics.median(
            timed(self.job, lambda: self.model.draw(prompts, range(num), steps=self.draw_steps, **how), 3)
        ) / num

    def draw(self) -> None:
        """Training images as `erase.data.latents` generates them."""
        prompts, seeds = ["a photo of a person"] * self.batch, list(range(self.batch))
        how: dict[str, Any] = {"guidance": self.plan.guidance, "size": self.plan.size, "sampler": self.plan.sampler}
        self.model.draw(prompts, seeds, steps=self.draw_steps, **how)


class Plain:
    """A plain training script for the same job: short, dense, and with all that torch has to make it fast.

    AdamW is dense and fused, gradients are multiplied by a float mask, the teacher is a bf16 copy of the base, and
    forget and retain images go through the UNet in one batch under bf16 autocast.
    """

    def __init__(self, job: Job, ours: Ours):
        import torch

        self.job, self.ours, self.n = job, ours, ours.batch
        self.device = ours.model.device
        self.unet: Any = copy.deepcopy(ours.model.unet).requires_grad_(True)
        self.teacher: Any = copy.deepcopy(ours.model.unet).requires_grad_(False)
        self.teacher.to(torch.bfloat16)
        self.parameters: list[Any] = list(self.unet.parameters())
        named = dict(self.unet.named_parameters())
        self.mask = [ours.mask[name].to(self.device, torch.float32) for name in named]
        self.adam = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=True)
        self.gradients: Any = None
        self.pipeline: Any = None

    def batch(self, rows: int) -> tuple[Any, Any, Any, Any]:
        """Noisy latents, timesteps, noise and text states, as the product makes them."""
        import torch

        data, draw = self.ours.data, torch.Generator().manual_seed(0)
        which = torch.randint(len(data.forget), (rows,), generator=draw)
        x, t = data.forget.mean[which], torch.randint(0, 1000, (rows,), generator=draw)
        eps, text = torch.randn(x.shape, generator=draw), data.text[data.forget.prompt[which]].text_states
        x, t, eps, text = (tensor.to(self.device) for tensor in (x, t, eps, text))
        return self.ours.model.add_noise(x, eps, t), t, eps, text

    def train(self) -> None:
        import torch
        import torch.nn.functional as F

        x, t, _, text = self.batch(2 * self.n)
        with torch.no_grad():
            wanted = self.teacher(x.bfloat16(), t, encoder_hidden_states=text.bfloat16()).sample.float()
        with torch.autocast(self.device.type, torch.bfloat16):
            found = self.unet(x, t, encoder_hidden_states=text).sample.float()
        forget, retain = (F.mse_loss(a, b) for a, b in zip(found.chunk(2), wanted.chunk(2), strict=True))
        (forget + retain).backward()
        self.step()

    def step(self) -> None:
        import torch

        torch._foreach_mul_([parameter.grad for parameter in self.parameters], self.mask)
        self.adam.step()
        self.adam.zero_grad()

    def update(self) -> None:
        import torch

        if self.gradients is None:
            self.gradients = [torch.full_like(parameter, 1e-3) for parameter in self.parameters]
        torch.autograd.backward(self.parameters, self.gradients)
        self.step()

    def score(self) -> None:
        """A batch of the mask pass: the gradient is added to what is there."""
        import torch
        import torch.nn.functional as F

        x, t, eps, text = self.batch(self.n)
        with torch.autocast(self.device.type, torch.bfloat16):
            found = self.unet(x, t, encoder_hidden_states=text).sample.float()
        F.mse_loss(found, eps).backward()

    def draw(self) -> None:
        """A stock bf16 pipeline with the product's sampler, steps and batch."""
        import torch
        from diffusers import StableDiffusionPipeline

        model, plan = self.ours.model, self.ours.plan
        if self.pipeline is None:
            text_encoder: Any = copy.deepcopy(model.text_encoder)
            parts: Any = {
                "vae": model.vae,
                "text_encoder": text_encoder.to(torch.bfloat16),
                "tokenizer": model.tokenizer,
                "unet": self.teacher,
                "scheduler": model.sampler(plan.sampler),
                "safety_checker": None,
                "feature_extractor": None,
            }
            self.pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
            self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline(
            ["a photo of a person"] * self.n,
            height=plan.size,
            width=plan.size,
            num_inference_steps=self.ours.draw_steps,
            guidance_scale=plan.guidance,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )


class Classifiers:
    """A network for 32 x 32 images on random ones: the product's descent, and a plain loop in channels_last."""

    def __init__(self, job: Job):
        from erase import masks
        from erase.classification import methods, networks, run
        from erase.classification.settings import Settings

        self.job, self.ticks, self.batch = job, Ticks(job), 8 if job.toy else 256
        self.network = "small" if job.toy else "resnet18"
        data = random_cifar(job.work / "cifar-steps", 8 * self.batch, 32)
        how: dict[str, Any] = {"network": self.network, "batch_size": self.batch, "epochs": 1, "learning_rate": 1e-4}
        settings = Settings(data=str(data), device=job.device, output=str(job.work / "none"), **how).resolved()
        self.dataset, _ = run.prepare(settings, job.work / "cache")
        self.recipe = run.recipes(settings, self.dataset)[1]
        sizes = (len(self.dataset.classes), self.dataset.channels, self.dataset.size)
        shape = networks.Shape(self.network, *sizes, self.dataset.mean, self.dataset.std)
        self.model = networks.build(shape, seed=0).to(job.device)
        self.copy = copy.deepcopy(self.model)
        self.named = dict(self.model.named_parameters())
        self.mask = masks.random_mask({name: p.shape for name, p in self.named.items()}, 0.5, seed=0)
        self.plan = methods.Plan
        self.plain_state: Any = None

    def ours(self, num: int) -> list[float]:
        """Steps of `descent.descend` on labelled images, masked."""
        import torch
        import torch.nn.functional as F

        from erase.classification import replayed
        from erase.classification.descent import descend

        def loss(x: Any, y: Any, at: Any) -> Any:
            self.ticks()
            return F.cross_entropy(self.model(x), y)

        images = self.dataset.train[torch.arange((num + 1) * self.batch).to(self.dataset.train.y.device)]
        plan = self.plan(passes=lambda: [images], loss=loss)
        with mock.patch.object(replayed, "AFTER", 0):  # the graph is made in the first step
            descend(self.model, plan, self.recipe, torch.Generator().manual_seed(0), self.mask)
        return self.ticks.seconds()

    def plain(self) -> None:
        import torch
        import torch.nn.functional as F

        if self.plain_state is None:
            model = self.copy.train().requires_grad_(True).to(memory_format=torch.channels_last)  # pyright: ignore
            parameters = list(model.parameters())
            sgd = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
            mask = [self.mask[name].to(p.device, torch.float32) for name, p in model.named_parameters()]
            images = self.dataset.train
            x = (images.x[: self.batch].float() / 255).contiguous(memory_format=torch.channels_last)
            self.plain_state = model, parameters, sgd, mask, x, images.y[: self.batch]
        model, parameters, sgd, mask, x, y = self.plain_state
        F.cross_entropy(model(x), y).backward()
        torch._foreach_mul_([parameter.grad for parameter in parameters], mask)
        sgd.step()
        sgd.zero_grad()


def with_ticks(thing: Any, name: str, ticks: Callable[[], None]) -> Any:
    """The same object, whose method `name` calls `ticks` first."""
    method = getattr(type(thing), name)

    def ticking(self: Any, *arguments: Any) -> Any:
        ticks()
        return method(self, *arguments)

    counted = object.__new__(type(type(thing).__name__, (type(thing),), {name: ticking}))
    vars(counted).update(vars(thing))
    return counted


# --- helpers --------------------------------------------------------------------------------------------------------


def fresh(folder: Path) -> Path:
    """The folder's path, with nothing there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


# --- the command ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Job], Part]] = {
    "environment": environment,
    "tests": tests,
    "command": command,
    "low-memory": low_memory,
    "steps": steps,
    "mini": mini,
    "methods": methods,
    "evaluation": evaluation,
    "classifiers": classifiers,
    "cifar10": cifar10,
    "cifar10-diffusion": cifar10_diffusion,
    "mini-tables": mini_tables,
}
WITH_CIFAR10 = ("cifar10", "cifar10-diffusion")
SLICED = (*WITH_CIFAR10, "mini-tables")  # which need many slices


def run_part(name: str, job: Job) -> None:
    """One part in this process; its figures, its seconds and its error go into the JSON file."""
    report, start = Report(job.output), time.monotonic()
    try:
        for figures in PARTS[name](job):
            report.put(name, **figures)
    except Exception as error:
        traceback.print_exc()
        report.put(name, error=last_line(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None
    finally:
        report.put(name, part_seconds=rounded(time.monotonic() - start))


def run_parts(names: Sequence[str], given: argparse.Namespace) -> tuple[int, list[str]]:
    """Every part in a process of its own, one after the other; how many failed, and those that a slice had no time for.

    A slice leaves out what is finished, and begins a part only if it can also end.
    """
    report, num_failed, begun, is_first = Report(Path(given.output)), 0, time.monotonic(), True
    sliced = given.slice is not None
    left = [name for name in names if not (sliced and report.is_finished(name))]
    while left:
        name, needed = left[0], limit(left[0], given.dry_run) + 15
        if sliced and not is_first and time.monotonic() - begun + needed > given.slice:
            break
        left, is_first = left[1:], False
        report.begin(name, anew=not sliced)
        options = ["--output", given.output, "--work", given.work, "--cifar10", given.cifar10]
        options += ["--dry-run"] if given.dry_run else []
        command = [sys.executable, __file__, "part", name, *options]
        start = time.monotonic()
        try:
            code = subprocess.run(command, env=offline(), timeout=limit(name, given.dry_run) + 15).returncode
            lost = f"the process ended with {code}"
        except subprocess.TimeoutExpired:
            code, lost = 1, f"stopped after {limit(name, given.dry_run) + 15} s"
        if code and "error" not in report.read()["parts"].get(name, {}):  # it could not say so itself
            report.put(name, error=lost, part_seconds=rounded(time.monotonic() - start))
        num_failed += code != 0
    return num_failed, left


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.path.insert(0, str(REPOSITORY))
    if arguments[:1] == ["limited"]:
        limited(arguments[1:])
        return 0
    part = arguments[1] if arguments[:1] == ["part"] else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in PARTS if name not in SLICED]
    parser.add_argument(
        "--only",
        default=",".join(default),
        metavar="A,B",
        help=f"parts to run, also {', '.join(SLICED)} [{','.join(default)}]",
    )
    parser.add_argument("--output", help="JSON to write [eval/results/on-gpu.json; of a dry run on-gpu.json in --work]")
    parser.add_argument("--work", default="runs/on-gpu", help="folder for models and runs, 10 GB [%(default)s]")
    parser.add_argument(
        "--cifar10",
        default="data/cifar10",
        metavar="FOLDER",
        help="CIFAR-10's images for the parts cifar10 and cifar10-diffusion [%(default)s]",
    )
    parser.add_argument(
        "--slice",
        type=int,
        metavar="SECONDS",
        help="begin no part that might take longer than this; the same command continues with what is not finished, "
        "and ends with exit code 3 while something is left",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="toy sizes on the CPU: shows that the script runs; writes into the folder dry-run of --work",
    )
    given = parser.parse_args(arguments[2:] if part else arguments)
    if given.dry_run and not part:
        given.work = str(Path(given.work) / "dry-run")  # so that a real run does not continue with toy cells
    given.output = given.output or str(Path(given.work) / "on-gpu.json" if given.dry_run else RESULTS / "on-gpu.json")
    names = given.only.split(",")
    if given.slice is not None and given.slice < PART_SECONDS + 15:
        parser.error(f"--slice is {given.slice}; a part may take {PART_SECONDS + 15} seconds, so give at least these")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    for name in ("output", "work", "cifar10"):
        setattr(given, name, str(Path(getattr(given, name)).resolve()))
    if given.dry_run and Path(given.output).is_relative_to(REPOSITORY / RESULTS):
        parser.error(f"--dry-run writes no results into {RESULTS}, which is for real ones; choose another --output")
    if {*WITH_CIFAR10} & {*names} and not given.dry_run and not Path(given.cifar10).is_dir():
        parser.error(f"--cifar10 is {given.cifar10}; give the folder of CIFAR-10's images")
    Path(given.work).mkdir(parents=True, exist_ok=True)
    device = "cpu" if given.dry_run else "cuda"
    if part:
        ends = time.monotonic() + limit(part, given.dry_run)
        known = Report(Path(given.output)).known(part)
        job = Job(Path(given.output), Path(given.work), device, given.dry_run, ends, Path(given.cifar10), known)
        run_part(part, job)
        return 0
    if not given.dry_run and not has_cuda():
        parser.error("torch sees no CUDA device; --dry-run runs the same code at toy size on the CPU")
    num_failed, left = run_parts(names, given)
    print(f"{given.output}: {len(names)} parts, {num_failed} failed")
    if left:
        print(f"the same command continues with {', '.join(left)}")
    return 1 if num_failed else 3 if left else 0


def limit(part: str, dry_run: bool) -> int:
    """Seconds after which a part is stopped."""
    return 4 * PART_SECONDS if dry_run else SLICE_SECONDS if part in SLICED else PART_SECONDS


def has_cuda() -> bool:
    """Asked in another process, so that this one takes no memory of the card."""
    asked = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked]).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
