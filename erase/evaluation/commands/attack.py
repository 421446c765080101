"""`eval-concept attack`: how often a concept comes back."""

from pathlib import Path

from erase.commandline import Parser, add_options
from erase.evaluation.attacks.registry import ATTACKS
from erase.evaluation.commands.ending import require, typed
from erase.evaluation.flags import (
    DRAWING,
    concept_options,
    judge_options,
    notes_of,
    options_of,
    quiet_option,
    report_options,
)
from erase.evaluation.options import AttackOptions, Drawing


def run(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept attack",
        "Attack an erased model, its base and optionally a retrained model; report how often the concept comes back.",
        example="--model runs/circle --attack learnt-word --quick",
    )
    parser.add_argument("--model", required=True, help="run folder, or any model with --base")
    parser.add_argument(
        "--attack", "--attacks", dest="attacks", nargs="+", required=True, help=f"attacks: {', '.join(ATTACKS.names())}"
    )
    parser.add_argument("--base", help="base model [default: the one in run.json]")
    parser.add_argument(
        "--retrained", "--gold", dest="gold", metavar="MODEL", help="model trained without the concept, also attacked"
    )
    parser.add_argument(
        "--budget", type=int, nargs="+", default=[], metavar="N",
        help="budgets, in steps, after which images are generated; one number N means 0, 25, 50 and 100 %% of N "
             "[default: the attack's own]",
    )  # fmt: skip
    parser.add_argument(
        "--output", default="runs/attacks", metavar="DIR", help="folder of images and reports [default: %(default)s]"
    )
    parser.add_argument("--judge", metavar="JUDGE", help="judge of the images [default: the concept's own]")
    judge_options(parser)
    concept_options(parser)
    add_options(parser, AttackOptions, {"attack": "the attack"})
    add_options(parser, Drawing, DRAWING)
    report_options(parser)
    quiet_option(parser)
    given = parser.parse_args(arguments)
    options, drawing = options_of(AttackOptions, given), options_of(Drawing, given)
    from erase.evaluation import attacking

    request = attacking.Request(
        model=given.model,
        attacks=list(dict.fromkeys(given.attacks)),
        output=Path(given.output),
        options=options,
        drawing=drawing,
        budget=given.budget,
        concept=given.concept,
        kind=given.kind,
        base=given.base,
        gold=given.gold,
        judge=given.judge,
        judge_models=given.judge_model,
        require=given.require,
        show=given.show,
        quiet=given.quiet,
        command=typed(),
        given=[name for name, value in vars(given).items() if value is not None],
    )
    require(attacking.run(request, print, notes_of(given)), given.require)
