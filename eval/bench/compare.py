"""Seconds, peak memory and file size, side by side with a plain implementation of the same job.

    python eval/speed.py                     # small: a minute or so, the targets are not judged
    python eval/speed.py --size full         # the sizes of SD v1.4; the plain step takes 20 GB
    python eval/speed.py --size full --only selection --output selection.json

Every job runs in a process of its own, ours and the plain one in turns; what is shown are medians. Seconds are those of
the CPU, all threads together, since on a shared machine the clock on the wall measures the others too.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import jobs
from erase.errors import EraseError


@dataclass(frozen=True)
class Check:
    """A target: `relation` "times" wants plain / ours >= limit, "share" ours / plain <= limit, "<=" and ">=" ours."""

    measure: str
    relation: str
    limit: float

    def value(self, plain: dict[str, float], ours: dict[str, float]) -> float | None:
        if self.relation in {"<=", ">="}:
            return ours.get(self.measure)
        if not plain.get(self.measure) or not ours.get(self.measure):
            return None
        a, b = plain[self.measure], ours[self.measure]
        return a / b if self.relation == "times" else b / a

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.relation in {"times", ">="} else value <= self.limit


@dataclass(frozen=True)
class Item:
    """One line of the table: our job, the plain one if there is one, and what is to be reached at full size.

    is_alone: at full size there is no room for both processes at once, so each turn has its own.
    """

    title: str
    ours: jobs.Job
    plain: jobs.Job | None
    checks: tuple[Check, ...]
    is_alone: bool = False


def _steps(density: float, share: float, *, checkpointing: bool = False) -> Item:
    how = ", checkpointing" if checkpointing else ""
    checks = [Check("peak_bytes", "share", share)]
    if not checkpointing:
        checks.append(Check("cpu_seconds", "times", 1.5))
    return Item(
        f"SalUn steps, 1 + 1 images, {density:.0%} of the weights{how}",
        jobs.Job("our_steps", (density, checkpointing)),
        jobs.Job("plain_steps", (density,)),
        tuple(checks),
        is_alone=True,
    )


def _optimizer(density: float, num_bytes: float, times: float) -> Item:
    return Item(
        f"optimizer step, {density:.0%} of the weights",
        jobs.Job("our_optimizer", (density,)),
        jobs.Job("plain_optimizer", (density,)),
        (Check("bytes_per_weight", "<=", num_bytes), Check("cpu_seconds", "times", times)),
    )


def _masks(how_many: str, densities: tuple[float, ...], times: float) -> Item:
    return Item(
        f"mask of ResNet-18 for {how_many}, after a pass over 64 images",
        jobs.Job("our_classifier_masks", (densities,)),
        jobs.Job("plain_classifier_masks", (densities,)),
        (Check("cpu_seconds", "times", times),),
    )


ITEMS: dict[str, Item] = {
    "selection": Item(
        "exact selection of the larger half of the scores",
        jobs.Job("our_selection"),
        jobs.Job("plain_selection"),
        (Check("cpu_seconds", "times", 15), Check("extra_bytes_per_weight", "<=", 2)),
    ),
    "whole-mask": Item(
        "mask of every tensor of the UNet, selected and saved",
        jobs.Job("our_whole_mask"),
        None,
        (Check("extra_bytes", "<=", 6e9), Check("cpu_seconds", "<=", 60), Check("bits_per_weight", "<=", 1.01)),
    ),
    "mask-file": Item(
        "loading a mask file",
        jobs.Job("our_mask_file"),
        jobs.Job("plain_mask_file"),
        (Check("bits_per_weight", "<=", 1.01), Check("cpu_seconds", "times", 30)),
    ),
    "optimizer-50": _optimizer(0.5, 4.2, 3),
    "optimizer-10": _optimizer(0.1, 1.2, 7),
    "base-50": Item(
        "frozen base: exchanged twice / a second copy of the weights",
        jobs.Job("our_base", (0.5,)),
        jobs.Job("plain_base"),
        (Check("bytes_per_weight", "share", 0.55),),
    ),
    "steps-50": _steps(0.5, 0.78),
    "steps-10": _steps(0.1, 0.60),
    "steps-10-low": _steps(0.1, 0.48, checkpointing=True),
    "classifier-mask": _masks("ten densities, as SalUn's code makes", tuple(i / 10 for i in range(1, 11)), 5),
    "classifier-mask-1": _masks("one density", (0.5,), 1),
    "classifier-step": Item(
        "two steps of ResNet-18 on 64 images, half of the weights",
        jobs.Job("our_classifier_steps"),
        jobs.Job("plain_classifier_steps"),
        (Check("cpu_seconds", "times", 1.5),),
    ),
    "classifier-step-bf16": Item(
        "the same two steps, ours with --mixed-precision bf16",
        jobs.Job("our_classifier_steps", ("bf16",)),
        jobs.Job("plain_classifier_steps"),
        (Check("cpu_seconds", "times", 1.5),),
    ),
    "classifier-update": Item(
        "of such a step what follows the backward pass, ten times",
        jobs.Job("our_classifier_update"),
        jobs.Job("plain_classifier_update"),
        (Check("cpu_seconds", "times", 1.5),),
    ),
    "classifier-mia": Item(
        "membership attack, fitted to 20,000 images",
        jobs.Job("our_attack"),
        jobs.Job("plain_attack"),
        (Check("cpu_seconds", "times", 5),),
    ),
    "drawing": Item(
        "drawing latents with the embedded model",
        jobs.Job("our_drawing"),
        jobs.Job("plain_drawing"),
        (Check("cpu_seconds", "times", 1.3),),
    ),
    "sampler": Item(
        "drawing latents in 10 steps of dpm++ / 25 of the embedded model's own",
        jobs.Job("our_sampler"),
        jobs.Job("plain_sampler"),
        (Check("cpu_seconds", "times", 2),),
    ),
    "nudenet": Item(
        "NudeNet, decoding included", jobs.Job("our_nudenet"), None, (Check("images_per_second", ">=", 30),)
    ),
    "help": Item("erase-concept --help", jobs.Job("our_help"), None, (Check("cpu_seconds", "<=", 1),)),
    "mini": Item("erase-concept --model mini", jobs.Job("our_mini"), None, (Check("wall_seconds", "<=", 180),)),
}


def measure(name: str, size: str, rounds: int) -> dict[str, Any]:
    """Medians of `rounds` turns of one item, ours and plain alternating; {"skipped": why} where it cannot run here."""
    item = ITEMS[name]
    sides = {"plain": item.plain, "ours": item.ours} if item.plain else {"ours": item.ours}
    try:
        turns = take_turns(sides, size, rounds, is_alone=item.is_alone and size == "full")
    except EraseError as error:
        return {"title": item.title, "skipped": str(error)}
    result: dict[str, Any] = {"title": item.title, "rounds": rounds}
    for side, measured in turns.items():
        result[side] = {key: statistics.median(turn[key] for turn in measured) for key in measured[0]}
    weights = result["ours"].get("weights")
    for side in turns:
        if weights:
            result[side]["extra_bytes_per_weight"] = result[side]["extra_bytes"] / weights
    result["checks"] = []
    for check in item.checks:
        value = check.value(result.get("plain", {}), result["ours"])
        target = {"measure": check.measure, "relation": check.relation, "limit": check.limit, "value": value}
        if size == "full" and value is not None:
            target["is_met"] = check.is_met(value)
        result["checks"].append(target)
    return result


def take_turns(
    sides: dict[str, jobs.Job], size: str, rounds: int, *, is_alone: bool
) -> dict[str, list[dict[str, float]]]:
    """What each side's turns took, the sides alternating."""
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    if is_alone:
        for _ in range(rounds):
            for side, job in sides.items():
                turns[side] += take_turns({side: job}, size, 1, is_alone=False)[side]
        return turns
    children = {side: _Child(job, size) for side, job in sides.items()}
    try:
        for child in children.values():
            child.ask("ready")
        for _ in range(rounds):
            for side, child in children.items():
                turns[side].append(child.ask("turn"))
        for side, child in children.items():
            memory = child.ask("end")
            turns[side] = [{**turn, **memory} for turn in turns[side]]
    finally:
        for child in children.values():
            child.stop()
    return turns


class _Child:
    """A process that has prepared one job and does it whenever it is told to."""

    def __init__(self, job: jobs.Job, size: str):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=jobs.serve, args=(theirs, job, size), daemon=True)
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()

    def ask(self, what: str) -> dict[str, float]:
        try:
            self._pipe.send(what)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            raise EraseError("its process ended early; out of memory?") from error
        if isinstance(answer, str):
            raise EraseError(answer)
        return answer


def machine() -> dict[str, Any]:
    """What the figures depend on: kind of machine, its load, versions."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": total,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("erase-concept", "torch", "diffusers", "numpy", "safetensors")},
    }


def lines(name: str, result: dict[str, Any]) -> list[str]:
    """The rows of the table for one item, one a target."""
    if "skipped" in result:
        return [f"{name:17} skipped: {result['skipped']}"]
    rows = []
    for check in result["checks"]:
        sides = [result.get(side, {}).get(check["measure"]) for side in ("plain", "ours")]
        plain, ours = ("" if value is None else _shown(check["measure"], value) for value in sides)
        relation, limit, value = check["relation"], check["limit"], check["value"]
        ratio = f"{value:.2f}x" if value is not None and relation in {"times", "share"} else ""
        shown_limit = _shown(check["measure"], limit) if relation in {"<=", ">="} else f"{limit:g}x"
        target = f"{'>=' if relation in {'times', '>='} else '<='} {shown_limit}"
        verdict = {True: "met", False: "MISSED", None: ""}[check.get("is_met")]
        rows.append(
            f"{name:17} {check['measure']:23} {plain:>10} {ours:>10} {ratio:>9}  {target:12} {verdict}".rstrip()
        )
    return rows


def _shown(measure: str, value: float) -> str:
    if measure in {"peak_bytes", "extra_bytes"}:
        return f"{value / 1e9:.2f} GB"
    return f"{value:.3g}" + (" s" if measure.endswith("seconds") else "")


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(
        prog="python eval/speed.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=["small", "full"], default="small", help="default: small")
    parser.add_argument("--only", action="append", choices=[*ITEMS, "gpu"], help="one item; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side; default: 3")
    parser.add_argument("--output", help="JSON to write")
    given = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": machine(), "size": given.size, "items": {}}
    show(f"{'item':17} {'measure':23} {'plain':>10} {'ours':>10} {'ratio':>9}  target (at full size)")
    for name in given.only or ITEMS:
        if name == "gpu":
            from bench import gpu

            report["gpu"] = gpu.report(given.size, show)
            continue
        report["items"][name] = measure(name, given.size, given.rounds)
        for line in lines(name, report["items"][name]):
            show(line)
    if given.output:
        from erase import files

        files.write_json(given.output, report)
    missed = [
        name for name, item in report["items"].items() for c in item.get("checks", []) if c.get("is_met") is False
    ]
    if missed:
        show(f"missed: {', '.join(dict.fromkeys(missed))}")
