"""`eval-concept`: images, scores, reports; every stage is also a command of its own and continues where it stopped."""

import sys
from collections.abc import Sequence

from erase.commandline import Command, Parser, serve, silence_libraries
from erase.evaluation.commands import attack, compare, export, generate, listing, report, run, score, verify, words
from erase.version import __version__

DESCRIPTION = """\
Evaluate concept erasure: generate images with the base and the erased model for the same prompts and seeds, judge
them, and report the figures with intervals."""
EPILOG = """\
commands (each has its own --help):
  run       generate, score and report: an erased model and its base
  attack    attack a model and report how often the concept comes back
  generate  generate the images of one model
  score     store the judges' raw outputs for generated images
  report    compute the figures from the scores
  compare   put several reports into one table
  export    write outcomes as a table, or figures into a model card
  verify    hash all images and score some of them again
  list      show all tasks, judges and attacks
  words     find words that occur with a concept, as retain prompts for erase-concept

examples:
  eval-concept run --model runs/circle --task mini
  eval-concept run --model runs/nudity --task i2p --subset sexual
  eval-concept run --model runs/circle --task mini --require 'mini.ua>=0.95' --require 'mini.ra_drop<=0.03'
  eval-concept compare runs/evaluation/circle/mini runs/evaluation/esd/mini --output runs/compared
  eval-concept run --model mini --concept circle --task mini --guard sld-strong
  eval-concept run --model runs/nudity --task prompts --prompts my_prompts.csv --judge nudenet
  eval-concept attack --model runs/circle --attack learnt-word --require 'attack.learnt-word<=0.1'
  eval-concept run --task images --images my_images --judge nudenet
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exit code 0: done; 2: an error of the user; 3: a rule is not met; 130: interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    silence_libraries(quiet="--quiet" in arguments)
    interrupted = "interrupted; the same command continues"
    serve("eval-concept", COMMANDS, _no_command, arguments, shared={"generate"}, interrupted=interrupted)


def _no_command(arguments: list[str]) -> None:
    """--help, --version, or an error that names the commands."""
    parser = Parser("eval-concept", DESCRIPTION, epilog=EPILOG, usage="eval-concept COMMAND [options]")
    parser.add_argument("--version", action="version", version=f"eval-concept {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=", ".join(COMMANDS))
    given = parser.parse_args(arguments)
    problem = f"unknown command {given.command!r}" if given.command else "no command given"
    parser.error(f"{problem}; choose {', '.join(COMMANDS)}")


COMMANDS: dict[str, Command] = {
    "run": run.run,
    "attack": attack.run,
    "generate": generate.run,
    "score": score.run,
    "report": report.run,
    "compare": compare.run,
    "export": export.run,
    "verify": verify.run,
    "list": listing.run,
    "words": words.run,
}

if __name__ == "__main__":
    main()
