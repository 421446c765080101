"""Parts that all commands share: options from dataclasses, help texts, errors in one line."""

import argparse
import errno
import logging
import os
import select
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import Any, NoReturn, TextIO

from erase import progress
from erase.errors import EraseError, printable
from erase.options.declare import MIXED_PRECISION, flag, forms_of
from erase.processes import is_first_to_say, require_shareable
from erase.words import did_you_mean


class Help(argparse.RawDescriptionHelpFormatter):
    """Help texts whose lines break between words only, because names of models contain hyphens."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=32, **options)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations whose errors are one line, and which takes --num_forget for --num-forget."""

    def __init__(
        self, prog: str, description: str, *, example: str = "", commands: Iterable[str] = (), **options: Any
    ) -> None:
        """example: arguments that work, shown at the end of the help. commands: for did-you-mean."""
        self.commands = commands
        options.setdefault("formatter_class", Help)
        if example:
            options["epilog"] = f"example:\n  {prog} {example}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        line = f"{self.prog}: {one_line(message)}"
        self.exit(2, f"{line}\n" if is_first_to_say(line) else None)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = [_dashes(arg) for arg in (sys.argv[1:] if args is None else args)]
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            hint = did_you_mean(unknown[0].partition("=")[0], [*known, *self.commands])
            hint = f"; {hint}" if hint else " "
            self.error(f"unknown argument {unknown[0]!r}{hint}(see {self.prog} --help)")
        return given


Command = Callable[[list[str]], None]


def serve(
    prog: str,
    commands: Mapping[str, Command],
    otherwise: Command,
    argv: Sequence[str] | None,
    *,
    shared: Collection[str] = (),
    interrupted: str = "interrupted",
) -> None:
    """Run the command that the first argument names, else `otherwise` with all of them; see `reporting`.

    shared: commands whose work several processes share; "" is `otherwise`. Others refuse to run several times at once.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with reporting(prog, interrupted):
        require_shareable(prog, arguments[0] if arguments and arguments[0] in commands else "", shared)
        if arguments and arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
        else:
            otherwise(arguments)


@contextmanager
def reporting(prog: str, interrupted: str = "interrupted") -> Iterator[None]:
    """Turn errors that the user can correct into one line and exit code 2, an interrupt into 130, a closed pipe into 1.

    Files and folders that cannot be read or written are such errors; other exceptions stay tracebacks. A reader
    that closes the pipe, as `| head` does, ends the command without a message.
    """
    try:
        with _errors_in_one_line(prog, interrupted):
            yield
    except BrokenPipeError:
        if not any([_flush_fails(stream) or _has_no_reader(stream) for stream in (sys.stdout, sys.stderr)]):
            raise  # another pipe, such as one to a helper process
        raise SystemExit(1) from None
    except SystemExit as end:
        if any([_flush_fails(stream) for stream in (sys.stdout, sys.stderr)]):
            raise SystemExit(end.code or 1) from None
        raise
    if any([_flush_fails(stream) for stream in (sys.stdout, sys.stderr)]):
        raise SystemExit(1)


def _flush_fails(stream: TextIO) -> bool:
    """Whether the reader has closed the pipe. The stream is then redirected, so that its last flush is silent."""
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _has_no_reader(stream: TextIO) -> bool:
    """Whether the stream is a pipe without a reader; False on Windows, which cannot tell."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(stream, 0)  # errors are always reported
    return bool(poll.poll(0))


@contextmanager
def _errors_in_one_line(prog: str, interrupted: str) -> Iterator[None]:
    try:
        yield
    except EraseError as error:
        reason = str(error)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        reason = f"{where}{error.strerror}"
    except KeyboardInterrupt:
        say(f"{prog}: {interrupted}")
        raise SystemExit(130) from None
    else:
        return
    say(f"{prog}: {one_line(reason)}")
    raise SystemExit(2)


def add_options(
    parser: argparse.ArgumentParser, options: type, titles: Mapping[str, str], *, hidden: Collection[str] = ()
) -> None:
    """One argument for each field of a dataclass of options, in its group; nothing is written down twice.

    titles: of the groups; fields of other groups are left out. hidden: fields that the help does not show, because the
    command refuses them with a message that says what to give instead.
    """
    groups = {name: parser.add_argument_group(title) for name, title in titles.items()}
    for item in (item for item in fields(options) if item.metadata["group"] in groups):
        form = forms_of(options)[item.name]
        shown = _shown_default(item)
        help_text = item.metadata["help"] + (f" [default: {shown}]" if shown else "")
        argument: dict[str, Any] = {"dest": item.name, "help": help_text.replace("%", "%%"), "default": None}
        if form.type is bool:
            argument["action"] = "store_true"
        else:
            word = {int: "N", float: "X"}.get(form.type, item.name.split("_")[-1].upper())
            choices = "{" + ",".join(form.choices) + "}" if form.choices else None
            argument["metavar"] = item.metadata.get("metavar") or choices or word
            argument["action"] = "append" if form.is_repeated else "store"
            argument["type"] = form.type
        if item.name in hidden:
            argument["help"] = argparse.SUPPRESS
        groups[item.metadata["group"]].add_argument(flag(item.name), *item.metadata.get("aliases", ()), **argument)
        if item.name == "precision":
            add_mixed_precision(groups[item.metadata["group"]])


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """--config-file, which `config_file.merged` reads."""
    about = "TOML file of options, or the run.json of a run to repeat; options of the command line win"
    parser.add_argument("--config-file", metavar="FILE", help=about)


def add_mixed_precision(group: Any) -> None:
    """--precision under the name that diffusers' scripts give it."""
    choices = "{" + ",".join(MIXED_PRECISION) + "}"
    group.add_argument("--mixed-precision", metavar=choices, help="the same as --precision; no means fp32")


def _shown_default(item: Field[Any]) -> str:
    """The default as `--help` shows it; "" if there is none, or only the absence of a flag."""
    default = item.default
    if isinstance(default, tuple):
        default = ", ".join(default)
    return item.metadata.get("shown") or ("" if default is None or isinstance(default, bool) else str(default))


def say(line: str) -> None:
    """Print the line on stderr, in one of several processes that all have it to say."""
    if is_first_to_say(line):
        print(line, file=sys.stderr)


def one_line(message: str) -> str:
    """A message on one line, without control characters that names and files may have brought into it."""
    return printable(" ".join(line.strip() for line in message.splitlines()))


def _dashes(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def silence_libraries(quiet: bool = False) -> None:
    """No warnings about image processors that this project does not use; with `quiet` no bars for downloads either."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # matplotlib warns where it has no folder for its settings, bitsandbytes of kernels that are not used here
    for name in ("matplotlib", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if quiet:
        progress.hide_downloads()
