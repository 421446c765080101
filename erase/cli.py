"""`erase-concept`: arguments in, one call, a few lines out; the only place that prints or exits."""

import argparse
import difflib
import errno
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from erase import __version__, concepts, progress
from erase.errors import EraseError, no_file, printable
from erase.settings import MIXED_PRECISION, SD_DEFAULTS, Settings, flag, forms

GROUPS = {
    "what": "what to erase, from what",
    "how": "how: method x scope x mask",
    "data": "images to train on",
    "training": "training",
    "files": "files",
}
DESCRIPTION = """\
Take a concept out of a Stable Diffusion model: generate images of it, find the weights that matter for it,
retrain only those, and write a diffusers folder."""
EPILOG = """\
The defaults are those for Stable Diffusion 1; a model may bring its own in erase_defaults.json, as 'mini' does.

examples:
  erase-concept --concept circle --model mini --output runs/circle
  erase-concept --concept nudity
  erase-concept --concept "pixel art" --kind style --model path/to/diffusers/folder
  erase-concept remove --delta runs/circle/delta.safetensors --model runs/circle --output restored

other commands (each has its own --help):
  apply    erase again, from a delta
  remove   undo an erasure: restore the base weights
  export   write other forms of a finished run
  inspect  show what a delta or a mask holds
"""


class Help(argparse.RawDescriptionHelpFormatter):
    """Help texts that are broken between words only: a model's name has hyphens of its own."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=32, **options)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations whose errors are one line, and which takes --num_forget for --num-forget."""

    def __init__(self, prog: str, description: str, *, example: str = "", **options: Any) -> None:
        """example: arguments that work, shown at the end of the help."""
        options.setdefault("formatter_class", Help)
        if example:
            options["epilog"] = f"example:\n  {prog} {example}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = [_dashes(arg) for arg in (sys.argv[1:] if args is None else args)]
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            guess = difflib.get_close_matches(unknown[0].partition("=")[0], [*known, *COMMANDS], n=1)
            hint = f"did you mean {guess[0]}? " if guess else ""
            self.error(f"unknown argument {unknown[0]!r}; {hint}(see {self.prog} --help)")
        return given


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 0 done, 2 for what the user can mend, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with reporting("erase-concept"):
        if arguments and arguments[0] in COMMANDS:
            COMMANDS[arguments[0]](arguments[1:])
        else:
            _erase(arguments)


@contextmanager
def reporting(prog: str, interrupted: str = "interrupted") -> Iterator[None]:
    """Turn what the user can mend into one line and exit code 2, and an interrupt into 130.

    A file or folder that cannot be read or written is the user's to mend; other exceptions stay tracebacks.
    """
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
        print(f"{prog}: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    else:
        return
    print(f"{prog}: {one_line(reason)}", file=sys.stderr)
    raise SystemExit(2)


def _erase(arguments: list[str]) -> None:
    parser = Parser(
        prog="erase-concept",
        usage="erase-concept --concept CONCEPT [--model MODEL] [--output DIR] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"erase-concept {__version__}")
    parser.add_argument("--list", action="store_true", help="show the presets and exit")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_options(parser, Settings, GROUPS)
    given = vars(parser.parse_args(arguments))
    if given.pop("list"):
        for name in concepts.names():
            concept = concepts.load(name)
            world = "embedded model" if concept.judge.get("type") == "mini" else "any Stable Diffusion"
            print(f"{name:20} {concept.kind:7} {world:21} {concept.forget[0]!r} -> {concept.pairs()[0][1]!r}")
        return
    quiet = given.pop("quiet")
    given["concept"] = list(dict.fromkeys(given["concept"] or ()))  # each once
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    for name in settings.concept:  # misspelt or refused: an error before the seconds in which torch is imported
        concepts.find(name, settings.kind, forget=settings.forget, anchor=settings.anchor, retain=settings.retain)
    silence_libraries(quiet)
    from erase.run import run

    try:
        result = run(settings, quiet=quiet, tell=_tell)
    except KeyboardInterrupt:
        again = "the same command without --overwrite" if settings.overwrite else "the same command"
        print(f"erase-concept: interrupted; {again} continues", file=sys.stderr)
        raise SystemExit(130) from None
    if not result.record:  # a helper process of a distributed run
        return
    from erase import records

    record, weights = result.record, result.record["weights"]
    if result.is_new:
        erased = dict.fromkeys(one["name"] for one in record["concepts"][: len(settings.concept)])
        total = sum(record["seconds"].values())
        phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in record["seconds"].items())
        told = f"{', '.join(erased)} erased from {record['settings']['model']} in {total:.0f} s ({phases})"
    else:
        told = f"finished already{records.when(record)}, files verified; --overwrite makes it again"
    print(printable(f"{result.folder}: {told}"))
    if result.added:
        print(f"written beside it: {', '.join(result.added)}")
    print(f"{weights['changed']:,} of {weights['total']:,} weights changed; delta.safetensors takes it back exactly")
    if "model_index.json" in record["files"]:
        print(f"load it: {load_line(result.folder)}")


def load_line(folder: Path) -> str:
    """Python that loads a pipeline so that it generates images, whatever characters its path has."""
    from erase import export

    dtype = ", dtype=torch.float32" if export.needs_dtype(folder) else ""
    torch = "import torch; " if dtype else ""
    loading = f"pipeline = SD.from_pretrained({str(folder)!r}{dtype})"
    return f"{torch}from diffusers import StableDiffusionPipeline as SD; {loading}"


def add_options(parser: argparse.ArgumentParser, options: type, titles: Mapping[str, str]) -> None:
    """One argument for each field of a dataclass of options, in its group; nothing is written down twice.

    titles: of the groups; fields of other groups are left out.
    """
    groups = {name: parser.add_argument_group(title) for name, title in titles.items()}
    for item in (item for item in fields(options) if item.metadata["group"] in groups):
        form = forms(options)[item.name]
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
        groups[item.metadata["group"]].add_argument(flag(item.name), *item.metadata.get("aliases", ()), **argument)
        if item.name == "precision":
            add_mixed_precision(groups[item.metadata["group"]])


def add_mixed_precision(group: Any) -> None:
    """--precision under the name that diffusers' scripts give it."""
    group.add_argument("--mixed-precision", metavar="{" + ",".join(MIXED_PRECISION) + "}", help="another name for it")


def _shown_default(item: Field[Any]) -> str:
    """The default as `--help` shows it; "" if there is none, or only the absence of a flag."""
    default = SD_DEFAULTS.get(item.name) if item.default is None else item.default
    if isinstance(default, tuple):
        default = ", ".join(default)
    return item.metadata.get("shown") or ("" if default is None or isinstance(default, bool) else str(default))


# --- deltas and masks -----------------------------------------------------------------------------------------------


def _delta_parser(command: str, description: str, example: str) -> Parser:
    parser = Parser(prog=f"erase-concept {command}", description=description, example=example)
    parser.add_argument("--delta", required=True, help="delta.safetensors of a run")
    parser.add_argument("--model", required=True, help="'mini', a diffusers folder, a hub id, or a checkpoint file")
    parser.add_argument("--output", required=True, help="diffusers folder to write")
    parser.add_argument("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    for name in ("unet", "config", "revision", "cache_dir"):  # the same options as in the main command
        item = Settings.__dataclass_fields__[name]
        shown = item.metadata.get("shown")
        about = "where single files are converted" if name == "cache_dir" else item.metadata["help"]
        text = about + (f" [default: {shown}]" if shown else "")
        parser.add_argument(flag(name), metavar=item.metadata.get("metavar") or name.split("_")[-1].upper(), help=text)
    return parser


def _apply(arguments: list[str]) -> None:
    about = "Erase again: apply a delta to the base model that it was made from."
    parser = _delta_parser("apply", about, "--delta runs/circle/delta.safetensors --model mini --output erased")
    _switch(parser.parse_args(arguments), "apply")


def _remove(arguments: list[str]) -> None:
    about = "Undo an erasure: restore the base model from the erased one."
    parser = _delta_parser("remove", about, "--delta runs/circle/delta.safetensors --model runs/circle --output base")
    _switch(parser.parse_args(arguments), "remove")


def _switch(given: argparse.Namespace, direction: str) -> None:
    if not Path(given.delta).is_file():
        raise EraseError(no_file(given.delta))
    output = Path(given.output)
    if output.is_symlink():
        raise EraseError(f"{output} is a link; remove it or choose another --output")
    is_taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if is_taken and not (output / "model_index.json").is_file():
        raise EraseError(f"{output} exists already; choose another --output")
    silence_libraries()
    from erase import delta

    change = delta.load(given.delta)  # a file that is no delta must not wait for diffusers

    from erase import components, export, files, forms, models

    folder = models.locate(
        given.model,
        allow_pickle=given.allow_pickle,
        config=given.config,
        revision=given.revision,
        cache_dir=Path(given.cache_dir).expanduser() if given.cache_dir else None,
        tell=_tell,
    )
    for part in ("vae", "text_encoder"):  # copied: who opens the result must meet no pickle that was not allowed
        components.weight_files(folder / part, allow_pickle=given.allow_pickle)
    state = forms.unet_state(models.load_unet(folder, given.allow_pickle, given.unet, _tell))
    new = delta.apply(state, change) if direction == "apply" else delta.remove(state, change)
    exact = ""
    if direction == "remove":
        dtype = forms.base_dtype(change, new)
        exact = ", the base's bit for bit" if dtype else ", the base's value for value (its dtype is not recorded)"
    else:
        dtype = None
    if is_taken and not export.is_result(folder, output, forms.plain(new), dtype=dtype):
        raise EraseError(f"{output} exists already; choose another --output")
    if not is_taken:
        with files.replacing_folder(output) as whole:
            export.save_pipeline(folder, whole, forms.plain(new), dtype=dtype)
    word = "written already" if is_taken else "written"
    print(f"{printable(output)}: {word}; UNet {delta.content_hash(new)[:12]}{exact}")
    print(f"load it: {load_line(output)}")


def _export(arguments: list[str]) -> None:
    parser = Parser(
        prog="erase-concept export",
        description="Write other forms of a finished run.",
        example="runs/circle --to single-file",
    )
    parser.add_argument("folder", help="run folder")
    choices = ("pipeline", "unet", "single-file", "lora")
    parser.add_argument("--to", action="append", required=True, choices=choices, help="form; may be repeated")
    parser.add_argument("--output", metavar="DIR", help="folder to write to [default: the run folder]")
    parser.add_argument("--lora-rank", type=int, metavar="N", help="rank of a LoRA [default: the run's]")
    parser.add_argument(
        "--model", help="the base, for a run that was saved without its pipeline [default: where the run found it]"
    )
    parser.add_argument("--config", metavar="DIR", help="diffusers folder for a base that is a single file")
    parser.add_argument("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    given = parser.parse_args(arguments)
    if given.lora_rank is not None and given.lora_rank < 1:
        raise EraseError(f"--lora-rank is {given.lora_rank}; it must be at least 1")
    silence_libraries()
    from erase import forms

    written = forms.add(
        Path(given.folder),
        list(dict.fromkeys(given.to)),
        output=None if given.output is None else Path(given.output),
        rank=given.lora_rank,
        model=given.model,
        config=given.config,
        allow_pickle=given.allow_pickle,
    )
    for form, path in written.items():
        print(f"{printable(path)}: written ({form})")


def _tell(line: str) -> None:
    print(f"erase-concept: {one_line(line)}", flush=True)


def _inspect(arguments: list[str]) -> None:
    parser = Parser(
        prog="erase-concept inspect",
        description="Show what a delta or a mask holds, block by block.",
        example="runs/circle/delta.safetensors",
    )
    parser.add_argument("file", help="delta.safetensors or mask.safetensors")
    path = parser.parse_args(arguments).file
    silence_libraries()
    from erase import delta, export, files, saliency

    header = files.read_metadata(path)
    if header.get("kind") == "mask":
        mask, header = saliency.load(path)
        shares = saliency.fraction_by_block(mask, export.block_of)
        described = {key: value for key, value in header.items() if key != "shapes"}
        word = "may move"
    else:
        change = delta.load(path)
        shares = delta.summary(change, lambda name: export.block_of(name.removeprefix("unet.")))
        concept = change.provenance.get("concept", {})
        described = {
            "kind": f"delta ({change.kind})",
            "base": change.provenance.get("base"),
            "base_hash": change.base_hash,
            "result_hash": change.result_hash,
            "concept": concept.get("name") if isinstance(concept, dict) else concept,
            "method": change.provenance.get("method"),
        }
        word = "changed"
    for key, value in described.items():
        print(f"{printable(key):14} {printable(value)}")
    ones, total = (sum(share[i] for share in shares.values()) for i in (0, 1))
    print(f"{'block':34} {word:>12} {'of':>12} {'share':>7}")
    for block, (some, of) in [*shares.items(), ("all", (ones, total))]:
        print(f"{printable(block):34} {some:12,} {of:12,} {some / max(of, 1):7.1%}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "apply": _apply,
    "remove": _remove,
    "export": _export,
    "inspect": _inspect,
}


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


if __name__ == "__main__":
    main()
