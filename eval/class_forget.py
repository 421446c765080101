"""Imagenette's classes: erase each of the ten from one model and evaluate them all; finished work is skipped.

python eval/class_forget.py --model CompVis/stable-diffusion-v1-4 --output runs/imagenette
python eval/class_forget.py --concept church --concept tench --output runs/imagenette --num-images 50
"""

import argparse
from pathlib import Path

from erase import erase_concept, words
from erase.commandline import reporting
from erase.evaluation import cli
from erase.evaluation.tasks.class_forget import IMAGENETTE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="CompVis/stable-diffusion-v1-4", help="model to erase from [%(default)s]")
    parser.add_argument("--concept", action="append", help="class; may be repeated [all ten]")
    parser.add_argument("--output", default="runs/imagenette", help="folder of all runs and reports [%(default)s]")
    given, options = parser.parse_known_args()
    root = Path(given.output)
    for concept in given.concept or [name.lower() for name in IMAGENETTE]:
        run = erase_concept(concept, given.model, output=str(root / words.slug(concept)))
        cli.main(
            ["run", "--model", str(run.folder), "--task", "class-forget", "--output", str(root / "reports"), *options]
        )


if __name__ == "__main__":
    with reporting("class_forget.py", "interrupted; the same command continues"):
        main()
