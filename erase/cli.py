"""`erase-concept`: arguments in, one call, a few lines out; the only place that prints or exits."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

from erase import __version__, concepts
from erase.errors import EraseError
from erase.settings import Settings, choices_of, flag

GROUPS = {
    "what": "what to erase, from what",
    "how": "how: method x scope x mask",
    "data": "pictures to train on",
    "training": "training",
    "files": "files",
}
EXAMPLE = """\
examples:
  erase-concept --concept circle --model mini --output runs/circle
  erase-concept --concept nudity
  erase-concept --concept "Van Gogh" --kind style --model path/to/diffusers/folder
  erase-concept remove --delta runs/circle/delta.safetensors --model runs/circle --output restored

other commands (each has its own --help): apply, remove, inspect
"""
COMMANDS = ("apply", "remove", "inspect")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes --num_forget for --num-forget."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = [_dashes(arg) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_args(args, namespace)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 0 done, 2 for what the user can mend, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in COMMANDS:
            globals()[f"_{arguments[0]}"](arguments[1:])
        else:
            _erase(arguments)
    except EraseError as error:
        print(f"erase-concept: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("erase-concept: interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


def _erase(arguments: list[str]) -> None:
    parser = Parser(
        prog="erase-concept",
        description="Take a concept out of a Stable Diffusion model: draw pictures of it, find the weights that matter "
        "for it, retrain only those, and write a diffusers folder.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"erase-concept {__version__}")
    parser.add_argument("--list", action="store_true", help="show the presets and exit")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    _add_settings(parser)
    given = vars(parser.parse_args(arguments))
    if given.pop("list"):
        for name in concepts.names():
            concept = concepts.load(name)
            world = "embedded model" if concept.judge.get("type") == "mini" else "any Stable Diffusion"
            print(f"{name:20} {concept.kind:7} {world:21} {concept.forget[0]!r} -> {concept.pairs()[0][1]!r}")
        return
    quiet = given.pop("quiet") or not sys.stderr.isatty()
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    _silence_libraries()
    from erase.run import run

    result = run(settings, quiet=quiet)
    if not result.record:  # a helper process of a distributed run
        return
    record, weights = result.record, result.record["weights"]
    total = sum(record["seconds"].values())
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in record["seconds"].items())
    print(f"{result.folder}: {settings.concept} erased from {settings.model} in {total:.0f} s ({phases})")
    print(f"{weights['changed']:,} of {weights['total']:,} weights changed; delta.safetensors takes it back exactly")
    if "pipeline" in settings.save:
        print(f'load it: StableDiffusionPipeline.from_pretrained("{result.folder}")')


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for each field of Settings, in its group; nothing is written down twice."""
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for item in fields(Settings):
        help_text = item.metadata["help"].replace("%", "%%")
        default = item.default if item.default is not MISSING else None
        if default not in (None, "", (), False):
            shown = ", ".join(default) if isinstance(default, tuple) else default
            help_text += f" [{shown}]"
        options: dict[str, Any] = {"dest": item.name, "help": help_text, "default": None}
        annotation = str(item.type)
        if item.type is bool:
            options["action"] = "store_true"
        else:
            options["action"] = "append" if "tuple" in annotation else "store"
            options["type"] = int if "int" in annotation else float if "float" in annotation else str
            choices = choices_of(item.type)
            options["metavar"] = "{" + ",".join(choices) + "}" if choices else item.name.split("_")[-1].upper()
        groups[item.metadata["group"]].add_argument(flag(item.name), **options)


# --- deltas and masks -----------------------------------------------------------------------------------------------


def _delta_parser(command: str, description: str) -> Parser:
    parser = Parser(prog=f"erase-concept {command}", description=description, allow_abbrev=False)
    parser.add_argument("--delta", required=True, help="delta.safetensors of a run")
    parser.add_argument("--model", required=True, help="'mini', a diffusers folder, or a hub id")
    parser.add_argument("--output", required=True, help="diffusers folder to write")
    parser.add_argument("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    return parser


def _apply(arguments: list[str]) -> None:
    parser = _delta_parser("apply", "Erase again: apply a delta to the base model that it was made from.")
    _switch(parser.parse_args(arguments), "apply")


def _remove(arguments: list[str]) -> None:
    parser = _delta_parser("remove", "Take an erasure back: restore the base model from the erased one, bit for bit.")
    _switch(parser.parse_args(arguments), "remove")


def _switch(given: argparse.Namespace, direction: str) -> None:
    if not Path(given.delta).is_file():
        raise EraseError(f"{given.delta}: no such file")
    output = Path(given.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise EraseError(f"{output} exists already; choose another --output")
    _silence_libraries()
    from erase import delta, export, models
    from erase.run import unet_state

    change = delta.load(given.delta)
    folder = models.locate(given.model, allow_pickle=given.allow_pickle)
    state = unet_state(models.load_unet(folder, given.allow_pickle))
    new = delta.apply(state, change) if direction == "apply" else delta.remove(state, change)
    export.save_pipeline(folder, output, {name.removeprefix("unet."): tensor for name, tensor in new.items()})
    print(f"{output}: written; UNet {delta.content_hash(new)[:12]}")


def _inspect(arguments: list[str]) -> None:
    parser = Parser(
        prog="erase-concept inspect",
        description="Show what a delta or a mask holds, block by block.",
        allow_abbrev=False,
    )
    parser.add_argument("file", help="delta.safetensors or mask.safetensors")
    path = parser.parse_args(arguments).file
    _silence_libraries()
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
            "concept": concept.get("name"),
            "method": change.provenance.get("method"),
        }
        word = "changed"
    for key, value in described.items():
        print(f"{key:14} {value}")
    ones, total = (sum(share[i] for share in shares.values()) for i in (0, 1))
    print(f"{'block':34} {word:>12} {'of':>12} {'share':>7}")
    for block, (some, of) in [*shares.items(), ("all", (ones, total))]:
        print(f"{block:34} {some:12,} {of:12,} {some / of:7.1%}")


def _dashes(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _silence_libraries() -> None:
    """No warnings about image processors that this project does not use; progress bars are ours."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


if __name__ == "__main__":
    main()
