"""What the product does on one CUDA GPU: it runs the GPU tests and the real commands, and times them.

    python eval/on_gpu.py                                   # all parts, under 25 minutes
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
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu_parts import commands, sliced
from gpu_parts.job import REPOSITORY, Job, Part, Report, last_line, offline, rounded
from gpu_parts.steps import steps

RESULTS = Path("eval/results")  # of real runs only
PART_SECONDS = 240  # a part that takes longer is stopped and recorded as failed; a dry run has four times as long
SLICE_SECONDS = 540  # of the parts SLICED, which are stopped then and continue when they are started again

PARTS: dict[str, Callable[[Job], Part]] = {
    "environment": commands.environment,
    "tests": commands.tests,
    "command": commands.command,
    "low-memory": commands.low_memory,
    "turns": commands.turns,
    "steps": steps,
    "mini": commands.mini,
    "methods": commands.methods,
    "evaluation": commands.evaluation,
    "classifiers": commands.classifiers,
    "cifar10": sliced.cifar10,
    "cifar10-diffusion": sliced.cifar10_diffusion,
    "mini-tables": sliced.mini_tables,
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
    if arguments[:1] == ["limited"]:
        commands.limited(float(arguments[1]), arguments[2], arguments[3:])
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
    parser.add_argument("--work", default="runs/on-gpu", help="folder for models and runs, 20 GB [%(default)s]")
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
    sys.path.insert(0, str(REPOSITORY))
    from erase.commandline import reporting

    with reporting("on_gpu.py", "interrupted; the same command continues"):
        raise SystemExit(main())
