"""`unlearn-classifier`: parses arguments, calls one function, prints a few lines."""

import sys
from collections.abc import Sequence
from typing import Any

from erase.classification.presets import PRESETS
from erase.classification.settings import Settings
from erase.commandline import Command, Parser, add_config_file, add_options, serve, silence_libraries
from erase.errors import printable
from erase.files import default_cache_dir
from erase.options import config_file
from erase.version import __version__

WHAT, TRAINING = {"what": "data"}, {"training": "training"}
QUIET: dict[str, Any] = {"action": "store_true", "help": "no progress on stderr"}
GROUPS = {**WHAT, "method": "method", "how": "mask", **TRAINING}
DESCRIPTION = """\
Make an image classifier forget some of its training images: find the weights that matter for them, retrain only
those, and measure how far the result is from a model that was trained without them."""
EPILOG = """\
examples:
  unlearn-classifier --data digits --forget 10% --method salun --output runs/digits
  unlearn-classifier train --data digits --output runs/digits-original
  unlearn-classifier --data digits --forget class:3 --method ft --model runs/digits-original --output runs/digits-ft
  unlearn-classifier compare --data digits --methods all --seeds 5 --output runs/digits-compared

other commands (each has its own --help):
  train    train the original model, or with --without-forget the retrained model
  compare  compare methods with retraining, on several seeds
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exit code 0: done; 2: an error that the user can correct; 130: interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    silence_libraries(quiet="--quiet" in arguments)
    continues = arguments[:1] == ["compare"]
    what = "after the last finished line" if continues else "a training of minutes from its last stored epoch"
    interrupted = f"interrupted; the same command continues {what}"
    serve("unlearn-classifier", COMMANDS, _unlearn, arguments, interrupted=interrupted)


def _unlearn(arguments: list[str]) -> None:
    parser = Parser(
        "unlearn-classifier",
        DESCRIPTION,
        epilog=EPILOG,
        usage="unlearn-classifier [--data DATA] [--forget WHAT] [--method METHOD] [--output DIR] [options]",
    )
    parser.add_argument("--version", action="version", version=f"unlearn-classifier {__version__}")
    add_config_file(parser)
    add_options(parser, Settings, GROUPS)
    parser.add_argument("--quiet", **QUIET)
    given = vars(parser.parse_args(arguments))
    quiet = given.pop("quiet")
    settings = Settings(**config_file.merged(given.pop("config_file"), given, Settings))

    from erase import files
    from erase.classification import split
    from erase.classification.membership import measure
    from erase.classification.run import run

    result = run(settings, default_cache_dir(), quiet=quiet, tell=_tell)
    parts = split.parts(result.dataset, result.split)
    both = {"before": result.original, "after": result.model}
    scores = {when: measure(model, *parts, seed=settings.seed) for when, model in both.items() if model is not None}
    plain = {when: {name: vars(score) for name, score in of.items()} for when, of in scores.items()}
    files.write_json(result.folder / "scores.json", plain)
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in result.record["seconds"].items())
    print(
        f"{printable(result.folder)}: {len(result.split.forget):,} images forgotten with {settings.method} ({seconds})"
    )
    titles = {"before": "original", "after": "unlearned"}
    print(f"{'':22} {' -> '.join(titles[when] for when in scores)}")
    for name in scores["after"]:
        values = " -> ".join(f"{100 * of[name].value:5.1f} %" for of in scores.values())
        print(f"{name:22} {values}  (n = {scores['after'][name].n:,})")


def _train(arguments: list[str]) -> None:
    parser = Parser(
        "unlearn-classifier train",
        "Train the original model, or with --without-forget the retrained model.",
        example="--data digits --train-epochs 5 --output runs/digits-original",
    )
    parser.add_argument("--without-forget", action="store_true", help="train on the retain set only")
    parser.add_argument("--quiet", **QUIET)
    add_options(parser, Settings, WHAT | TRAINING, hidden=("epochs", "learning_rate", "optimizer"))
    given = vars(parser.parse_args(arguments))
    without_forget, quiet = given.pop("without_forget"), given.pop("quiet")
    settings = _settings(given | {"method": "retrain"})

    from erase.classification import split
    from erase.classification.membership import correctness, outputs
    from erase.classification.run import run_training

    result = run_training(settings, default_cache_dir(), without_forget=without_forget, quiet=quiet)
    test = outputs(result.model, split.parts(result.dataset, result.split)[2])
    accuracy = correctness(test).mean()
    print(f"{printable(result.folder)}: trained in {result.record['seconds']['train']:.0f} s")
    print(f"test accuracy {accuracy:.2%} (n = {len(test):,})")


def _compare(arguments: list[str]) -> None:
    parser = Parser(
        "unlearn-classifier compare",
        "Compare methods with retraining on several seeds. Every method runs once on every seed; an interrupted "
        "comparison continues. Writes results.json, table.md and plot.png.",
        example="--data digits --methods ft salun --seeds 2 --output runs/digits-compared",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="METHOD",
        help=f"all, or some of {', '.join(PRESETS)}, or names or module:Class of other packages [default: all]",
    )
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="number of seeds; the first one is --seed [default: 5]"
    )
    parser.add_argument(
        "--densities", type=float, nargs="+", default=[], metavar="X", help="add SalUn at these densities to the table"
    )
    parser.add_argument(
        "--controls", action="store_true", help="add SalUn with other masks and other saliency scores to the table"
    )
    parser.add_argument(
        "--shadows",
        type=int,
        default=0,
        metavar="N",
        help="pairs of shadow models per seed for the LiRA attack [default: 0]",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="methods that run at once, each in a process of its own with its own memory; the figures are the same "
        "[default: 1]",
    )
    parser.add_argument("--quiet", **QUIET)
    add_options(parser, Settings, GROUPS, hidden=("method", "model", "allow_pickle"))
    given = vars(parser.parse_args(arguments))
    asked = {name: given.pop(name) for name in ("methods", "seeds", "densities", "controls", "shadows", "jobs")}
    quiet = given.pop("quiet")
    _require_comparable(parser, asked, given)
    settings = _settings(given)
    for name in asked["methods"]:
        if name not in ("all", *PRESETS):
            from erase.classification.methods import find

            find(name)

    from erase.classification.compare import compare, rows, table

    folder = given["output"] or f"{settings.resolved().output}-compared"
    lines = rows(settings, asked["methods"], densities=asked["densities"], controls=asked["controls"])
    seeds = range(settings.seed, settings.seed + asked["seeds"])
    how: dict[str, Any] = {"shadows": asked["shadows"], "jobs": asked["jobs"], "tell": _tell, "quiet": quiet}
    print(table(compare(settings, lines, seeds, folder, default_cache_dir(), **how)))
    print(f"{printable(folder)}: results.json, table.md, plot.png")


def _require_comparable(parser: Parser, asked: dict[str, Any], given: dict[str, Any]) -> None:
    """End with one line for an option that compare cannot follow. asked: its own options. given: those of a run."""
    if not 1 <= asked["seeds"] <= 10_000:
        parser.error(f"--seeds is {asked['seeds']}; it must be at least 1 and at most 10000")
    if not 0 <= asked["shadows"] <= 10_000:
        parser.error(f"--shadows is {asked['shadows']}; it must be 0 or more and at most 10000")
    if not 1 <= asked["jobs"] <= 64:
        parser.error(f"--jobs is {asked['jobs']}; it must be at least 1 and at most 64")
    if given["model"] is not None:
        parser.error("--model does not go with compare, which trains an original model for every seed")
    if given["method"] is not None:
        parser.error("--method does not go with compare; use --methods")
    for density in asked["densities"]:
        if not 0 < density <= 1:
            parser.error(f"--densities has {density}; each must be above 0 and at most 1")


COMMANDS: dict[str, Command] = {"train": _train, "compare": _compare}


def _tell(line: str) -> None:
    print(printable(line), flush=True)


def _settings(given: dict[str, Any]) -> Settings:
    return Settings(**{name: value for name, value in given.items() if value is not None})


if __name__ == "__main__":
    main()
