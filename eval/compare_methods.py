"""Several methods and several seeds of each on one concept, under one task, in one table with intervals.

python eval/compare_methods.py --concept circle --model mini --task mini --seeds 3 --output runs/methods
"""

import argparse
from pathlib import Path
from typing import Any

from erase import erase_concept
from erase.commandline import reporting
from erase.evaluation import cli

METHODS: dict[str, dict[str, Any]] = {
    "salun": {},
    "salun-10": {"density": 0.1},
    "random-mask": {"mask": "random"},
    "no-mask": {"mask": "none"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", required=True, help="preset or .toml")
    parser.add_argument("--model", default="CompVis/stable-diffusion-v1-4", help="model to erase from [%(default)s]")
    parser.add_argument("--task", required=True, help="task of eval-concept")
    parser.add_argument("--seeds", type=int, default=3, help="erasures of each method [3]")
    parser.add_argument("--output", default="runs/methods", help="folder of all runs and reports [%(default)s]")
    given, options = parser.parse_known_args()
    root, reports = Path(given.output), []
    for name, settings in METHODS.items():
        for seed in range(given.seeds):
            output = root / f"{name}-{seed}"
            erase_concept(given.concept, given.model, output=str(output), seed=seed, num_samples=0, **settings)
            cli.main(["run", "--model", str(output), "--task", given.task, "--output", str(root / "reports"), *options])
            reports.append(f"{name}={root / 'reports' / output.name / given.task}")
    cli.main(["compare", *reports, "--output", str(root / "compared")])


if __name__ == "__main__":
    with reporting("compare_methods.py", "interrupted; the same command continues"):
        main()
