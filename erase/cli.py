"""`erase-concept`: parses arguments, calls one function, prints a few lines; the only place that prints or exits."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from erase import concepts
from erase.commandline import Command, Parser, add_config_file, add_options, one_line, say, serve, silence_libraries
from erase.errors import EraseError, no_file, printable
from erase.options import config_file, model_classes
from erase.options.declare import flag
from erase.options.settings import Settings
from erase.processes import rank_and_world
from erase.version import __version__

GROUPS = {
    "what": "concept, model and output",
    "how": "method, scope and mask",
    "data": "training images",
    "training": "training",
    "files": "files",
}
DESCRIPTION = """\
Remove a concept from a Stable Diffusion model: generate images of it, find the weights that matter for it,
retrain only those, and write a diffusers folder."""
EPILOG = """\
The defaults shown are those for Stable Diffusion 1. "for salun" means the default method; other methods have
their own defaults (docs/methods.md). A model folder can bring its own, as 'mini' does.

examples:
  erase-concept --concept circle --model mini --output runs/circle
  erase-concept --concept nudity
  erase-concept --concept "pixel art" --kind style --model path/to/diffusers/folder
  erase-concept remove --delta runs/circle/delta.safetensors --model runs/circle --output restored

other commands (each has its own --help):
  apply    apply a delta to the base model
  remove   undo an erasure: restore the base weights
  export   write a finished run in another form, such as a single file or a LoRA
  inspect  show how many weights of each block a delta or a mask contains
"""


PICKLE = Settings.__dataclass_fields__["allow_pickle"].metadata["help"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exit code 0: done; 2: an error that the user can correct; 130: interrupted."""
    serve("erase-concept", COMMANDS, _erase, argv, shared={""})


def _erase(arguments: list[str]) -> None:
    parser = Parser(
        commands=COMMANDS,
        prog="erase-concept",
        usage="erase-concept --concept CONCEPT [--model MODEL] [--output DIR] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"erase-concept {__version__}")
    parser.add_argument(
        "--list", action="store_true", help="show the presets, with the models that know them, and exit"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_config_file(parser)
    add_options(parser, Settings, GROUPS)
    given = vars(parser.parse_args(arguments))
    if given.pop("list"):
        for name in concepts.names():
            concept = concepts.load(name)
            is_mini, has_mini = (
                one.judge.get("type") == "mini" for one in (concept, concepts.load(name, model_family="mini"))
            )
            models = "embedded model" if is_mini else "all models" if has_mini else "other models"
            print(f"{name:17} {concept.kind:7} {models:15} {concept.forget[0]!r} -> {concept.pairs()[0][1]!r}")
        return
    quiet = given.pop("quiet")
    chosen = config_file.merged(given.pop("config_file"), given, Settings)
    chosen["concept"] = tuple(dict.fromkeys(chosen.get("concept", ())))  # each once
    settings = Settings(**chosen)
    for name in settings.concept:  # misspelt or refused: an error before the seconds in which torch is imported
        model = str(settings.base or settings.model)
        if settings.kind or not model_classes.class_concept(name, model, settings.config):
            concepts.find(name, settings.kind, forget=settings.forget, anchor=settings.anchor, retain=settings.retain)
    silence_libraries(quiet)
    from erase.runs.job import run
    from erase.runs.machine import leave_group

    try:
        result = run(settings, quiet=quiet, tell=_tell if rank_and_world()[0] == 0 else lambda line: None)
    except KeyboardInterrupt:
        again = "the same command without --overwrite" if settings.overwrite else "the same command"
        say(f"erase-concept: interrupted; {again} continues")
        raise SystemExit(130) from None
    leave_group()
    if not result.is_main_process:
        return
    from erase.runs import folders

    record, weights = result.record, result.record.weights
    if result.is_new:
        erased = dict.fromkeys(one.name for one in record.concepts[: len(settings.concept)])
        total = sum(record.seconds.values())
        phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in record.seconds.items())
        told = f"{', '.join(erased)} erased from {record.settings['model']} in {total:.0f} s ({phases})"
    else:
        told = f"already finished{folders.when(record)}, files verified; --overwrite repeats the run"
    print(printable(f"{result.folder}: {told}"))
    if result.added:
        print(f"also written: {', '.join(result.added)}")
    print(f"{weights.changed:,} of {weights.total:,} weights changed; delta.safetensors undoes this exactly")
    if "model_index.json" in record.files:
        print(f"load it: {load_line(result.folder)}")


def load_line(folder: Path) -> str:
    """Python that loads a pipeline so that it generates images, whatever characters its path has."""
    from erase.families import loading

    family = loading.family_of(folder)
    return "; ".join(family.loading_code(folder, repr(str(folder)), alias=family.family.upper()))


def _delta_parser(command: str, description: str, example: str) -> Parser:
    parser = Parser(prog=f"erase-concept {command}", description=description, example=example)
    parser.add_argument("--delta", required=True, help="delta.safetensors of a run")
    parser.add_argument("--model", required=True, help="'mini', a diffusers folder, a hub id, or a checkpoint file")
    parser.add_argument("--output", required=True, help="diffusers folder to write")
    parser.add_argument("--allow-pickle", action="store_true", help=PICKLE)
    for name in ("unet", "config", "revision", "cache_dir"):  # the same options as in the main command
        item = Settings.__dataclass_fields__[name]
        shown = item.metadata.get("shown")
        about = "cache for converted single-file models" if name == "cache_dir" else item.metadata["help"]
        text = about + (f" [default: {shown}]" if shown else "")
        parser.add_argument(flag(name), metavar=item.metadata.get("metavar") or name.split("_")[-1].upper(), help=text)
    return parser


def _apply(arguments: list[str]) -> None:
    about = "Apply a delta to the base model that it was made from, which erases the concept again."
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

    from erase import files
    from erase.export import pipeline, states
    from erase.families import architecture, components, loading

    folder = loading.locate(
        given.model,
        allow_pickle=given.allow_pickle,
        config=given.config,
        revision=given.revision,
        cache_dir=Path(given.cache_dir).expanduser() if given.cache_dir else None,
        tell=_tell,
    )
    family = loading.family_of(folder).trains(change.component)
    for part in family.data_parts:  # copied: who opens the result must meet no pickle that was not allowed
        if part in architecture.components(folder):  # the class names of a pixel model are in model_index.json
            components.weight_files(folder / part, allow_pickle=given.allow_pickle)
    network = family.read_network(folder, allow_pickle=given.allow_pickle, weights_file=given.unet, tell=_tell)
    state = family.state_of(network)
    new = delta.apply(state, change) if direction == "apply" else delta.remove(state, change)
    exact = ""
    if direction == "remove":
        dtype = states.base_dtype(change, new)
        exact = (
            ", equal to the base bit for bit" if dtype else ", equal to the base in value (its dtype is not recorded)"
        )
    else:
        dtype = None
    weights = delta.in_component(family.part, new)
    if is_taken and not pipeline.is_result(folder, output, weights, dtype=dtype, part=family.part):
        raise EraseError(f"{output} exists already; choose another --output")
    if not is_taken:
        with files.replacing_folder(output) as whole:
            pipeline.save_pipeline(folder, whole, weights, dtype=dtype, part=family.part)
    word = "already written" if is_taken else "written"
    print(f"{printable(output)}: {word}; content hash {delta.content_hash(new)[:12]}{exact}")
    print(f"load it: {load_line(output)}")


def _export(arguments: list[str]) -> None:
    parser = Parser(
        prog="erase-concept export",
        description="Write a finished run in another form, such as a single file or a LoRA.",
        example="runs/circle --to single-file",
    )
    parser.add_argument("folder", help="run folder")
    choices = ("pipeline", "unet", "single-file", "lora")
    parser.add_argument("--to", action="append", required=True, choices=choices, help="form to write; may be repeated")
    parser.add_argument("--output", metavar="DIR", help="folder to write to [default: the run folder]")
    parser.add_argument("--lora-rank", type=int, metavar="N", help="rank of the LoRA [default: the run's]")
    parser.add_argument(
        "--model", help="base model, for a run that was saved without its pipeline [default: the one in run.json]"
    )
    parser.add_argument(
        "--config",
        metavar="DIR",
        help="diffusers folder with the configs and the tokenizer of a single-file base model",
    )
    parser.add_argument("--allow-pickle", action="store_true", help=PICKLE)
    given = parser.parse_args(arguments)
    if given.lora_rank is not None and given.lora_rank < 1:
        raise EraseError(f"--lora-rank is {given.lora_rank}; it must be at least 1")
    silence_libraries()
    from erase.runs import forms

    written = forms.add(
        Path(given.folder),
        list(dict.fromkeys(given.to)),
        output=None if given.output is None else Path(given.output),
        rank=given.lora_rank,
        model=given.model,
        config=given.config,
        allow_pickle=given.allow_pickle,
        tell=_tell,
    )
    for form, path in written.items():
        print(f"{printable(path)}: written ({form})")


def _tell(line: str) -> None:
    """Print a line about the work; of several processes the first one does."""
    if rank_and_world()[0] == 0:
        print(f"erase-concept: {one_line(line)}", flush=True)


def _inspect(arguments: list[str]) -> None:
    parser = Parser(
        prog="erase-concept inspect",
        description="Show how many weights of each block a delta or a mask contains.",
        example="runs/circle/delta.safetensors",
    )
    parser.add_argument("file", help="delta.safetensors or mask.safetensors")
    path = parser.parse_args(arguments).file
    silence_libraries()
    from erase import delta, masks, tensor_files
    from erase.families import layers

    if tensor_files.read_metadata(path).get("kind") == "mask":
        mask, header = masks.load(path)
        shares = masks.fraction_by_block(mask, layers.block_of)
        described = {key: value for key, value in header.as_json().items() if key != "shapes"}
        word = "may change"
    else:
        change = delta.load(path)
        shares = delta.summary(change, layers.block_of)
        concept = change.provenance.get("concept", {})
        described = {
            "kind": "delta (exact)",
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


COMMANDS: dict[str, Command] = {
    "apply": _apply,
    "remove": _remove,
    "export": _export,
    "inspect": _inspect,
}
if __name__ == "__main__":
    main()
