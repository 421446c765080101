"""Parts that take hours, in slices that continue where the one before was stopped."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_parts.job import REPOSITORY, Job, Part, last_line, offline, rounded
from gpu_parts.models import random_cifar

NO_SCIPY = {"skipped": "this machine lacks scipy or matplotlib, which the figures are computed with"}


def lacks_scipy() -> bool:
    return importlib.util.find_spec("scipy") is None


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
