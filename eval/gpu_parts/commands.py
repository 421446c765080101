"""Parts that run what a user runs: the commands and the tests marked `gpu`."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_parts.job import REPOSITORY, Job, Part, fresh, judged, last_line, read, rounded
from gpu_parts.models import model_folder, random_cifar, xl_folder
from gpu_parts.sliced import NO_SCIPY, lacks_scipy

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pytest")
OPTIONAL = ("scipy", "matplotlib", "sklearn", "nudenet", "peft", "triton", "xformers", "bitsandbytes")


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
        found = in_limit(job, limit, "erase.cli", [*arguments, "--device", job.device])
        if found["fits"]:
            found["seconds"] = read(run / "run.json")["seconds"]
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


def turns(job: Job) -> Part:
    """`eval-concept generate` with Stable Diffusion XL on 8 GB, where its networks take turns, and on the whole GPU."""
    folder, images = xl_folder(job), {}
    yield {"model": "toy, random weights" if job.toy else "Stable Diffusion XL, random weights", "images": 2}
    prompts = job.work / "prompts.txt"
    prompts.write_text("a photo of a dog\na painting of a ship\n", encoding="utf-8")
    for name, limit in {"8 GB": 8, "the whole GPU": 1e6}.items():
        output = fresh(job.work / f"turns-{name.replace(' ', '-')}")
        arguments = ["generate", "--model", folder, "--concept", "nudity", "--task", "prompts", "--prompts", prompts]
        arguments += ["--num-images", 1, "--steps", 2 if job.toy else 10, "--device", job.device, "--quiet"]
        found = in_limit(job, limit, "erase.evaluation.cli", [*arguments, "--output", output])
        yield {name: {**found, "target": "fits", "is_met": found["fits"]}}
        if not found["fits"]:
            raise RuntimeError(f"{name}: {found['error']}")
        images[name] = [path.read_bytes() for path in sorted((output / "images").iterdir())]
        shutil.rmtree(output)
    one, other = images.values()
    if len(one) != 2:
        raise RuntimeError(f"{len(one)} images, where 2 were asked for")
    yield {"same images": one == other}


def in_limit(job: Job, limit: float, module: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """A command in a process that may allocate so many GB: whether it fits, its seconds, its peak and its error.

    fits: None if it failed for another reason than memory.
    """
    script = [sys.executable, str(REPOSITORY / "eval" / "on_gpu.py"), "limited", str(limit), module]
    start = time.monotonic()
    try:
        done = job.try_process([*script, *map(str, arguments)])
    except subprocess.TimeoutExpired:
        return {"fits": None, "error": f"not finished in {time.monotonic() - start:.0f} s"}
    peak = re.search(r"peak_bytes (\d+)", done.stderr)
    found: dict[str, Any] = {"fits": done.returncode == 0, "wall_seconds": rounded(time.monotonic() - start)}
    found |= {"peak_bytes": int(peak[1])} if peak else {}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("peak_bytes")]
        found["error"] = last_line("\n".join(said))
        if "out of memory" not in done.stderr:
            found["fits"] = None
    return found


def limited(gigabytes: float, module: str, arguments: Sequence[str]) -> None:
    """A command in a process whose CUDA memory is limited; says its peak on stderr, whatever happens."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    try:
        importlib.import_module(module).main(arguments)
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
