"""Options that several commands of eval-concept share."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from erase.commandline import Parser, add_options
from erase.evaluation.judges import registry as judging
from erase.evaluation.options import Drawing, Options
from erase.options.declare import forms_of
from erase.options.settings import Settings

TASK = {"task": "task", "features": "FID and KID"}
DRAWING = {"drawing": "image generation"}


def task_options(parser: Parser, *, several: bool = False) -> None:
    concept_options(parser)
    if several:
        parser.add_argument(
            "--task", "--tasks", dest="tasks", nargs="+", required=True, help="tasks; see eval-concept list"
        )
    else:
        parser.add_argument("--task", required=True, help="task; see eval-concept list")
    add_options(parser, Options, TASK)
    add_options(parser, Drawing, DRAWING)


def concept_options(parser: Parser) -> None:
    parser.add_argument("--concept", help="preset, .toml, or free text with --kind [default: that of the run folder]")
    parser.add_argument("--kind", choices=forms_of(Settings)["kind"].choices, help="kind of a free-text concept")


def judge_options(parser: Parser, chosen: str = "") -> None:
    """chosen: the default of --judge as the help shows it; empty for a command without --judge."""
    if chosen:
        parser.add_argument("--judge", action="append", default=[], metavar="JUDGE",
                            help=f"{', '.join(judging.JUDGES.names())}, or package.module:Class; "
                                 f"may be repeated [default: {chosen}]")  # fmt: skip
    parser.add_argument("--judge-model", action="append", default=[], metavar="[JUDGE=]PATH",
                        help="hub id, folder or weights of a judge; may be repeated "
                             "[default: the judge's own]")  # fmt: skip


def quiet_option(parser: Parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def notes_of(given: argparse.Namespace) -> Callable[[str], None]:
    """Writes what was read from prompt files and models to stderr, unless --quiet is given."""
    return lambda note: print(note, file=sys.stderr) if note and not given.quiet else None


def options_of(options: type[Any], given: argparse.Namespace) -> Any:
    """A dataclass of options from what was given of them."""
    names = options.__dataclass_fields__  # with those that only __post_init__ sees
    return options(**{name: getattr(given, name) for name in names if getattr(given, name, None) is not None})


def report_options(parser: Parser) -> None:
    parser.add_argument("--require", action="append", default=[], metavar="RULE",
                        help="rule such as 'mini.ua>=0.95'; exit code 3 if it is not met; may be repeated")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="do not blur images with nudity in the report")
