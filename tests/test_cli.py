"""Laws of the command line that need no model: help, options, and errors that are one line and leave nothing behind."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import erase
from erase import cli, concepts, delta, masks
from erase.classification import cli as classifier_cli
from erase.errors import EraseError
from erase.evaluation import cli as eval_cli
from erase.families import scope
from erase.families.ddpm import PixelDiffusion
from erase.families.sdxl import StableDiffusionXL
from erase.families.text_trained import TextTrained
from erase.methods import METHODS
from erase.options.declare import Form, flag, form_of, forms_of
from erase.options.recipes import RECIPES
from erase.options.settings import SD_DEFAULTS, Settings

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    """Commands run in an empty folder, where anything that they leave behind is seen."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")  # the command sets them for its process
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(capsys):
    """Run the command; (exit code, its stdout, its stderr). An exception other than SystemExit comes through."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code: Any = 0
        try:
            cli.main(arguments)
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def asked(monkeypatch):
    """The settings with which the run would have started; nothing is run."""
    seen: list[Settings] = []

    class Stop(Exception):
        pass

    def stop(settings: Settings, **_: object) -> None:
        seen.append(settings)
        raise Stop

    def ask(*arguments: str) -> Settings:
        with pytest.raises(Stop):
            cli.main(arguments)
        return seen[-1]

    monkeypatch.setattr("erase.runs.job.run", stop)
    monkeypatch.setattr(cli.concepts, "find", lambda *_, **__: None)  # any word will do
    return ask


def shell_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)


def assert_refused(result: tuple[int, str, str], folder: Path, expected: str) -> None:
    """Exit code 2, one line that says `expected`, and an empty folder."""
    code, out, err = result
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert re.match(r"erase-concept( \w+)?: ", err) and re.search(expected, err), err
    assert not list(folder.iterdir())


# --- Help


def entry(text: str, name: str) -> str:
    """What --help says of a setting, on one line."""
    (found,) = re.findall(rf"^  {flag(name)}(?![-\w])(?: .*)?(?:\n {{20,}}.*)*", text, re.MULTILINE)
    return " ".join(found.split())


def test_help_answers_without_torch():
    code = """
import sys
from erase import cli
sys.argv = ["erase-concept", "--help"]
try:
    cli.main()
finally:
    assert not {"torch", "numpy", "diffusers", "transformers"} & set(sys.modules)
"""
    done = shell_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: erase-concept --concept ") and not done.stderr


@pytest.mark.parametrize("item", fields(Settings), ids=lambda item: item.name)
def test_help_has_every_setting_with_its_meaning_and_default(item, command, monkeypatch):
    """A setting without a default to name is a flag, or its meaning alone says what its absence does."""
    monkeypatch.setenv("COLUMNS", "1000")
    line = entry(command("--help")[1], item.name)
    assert item.metadata["help"] in line and len(item.metadata["help"]) > 10
    speaks_for_itself = {"concept", "kind", "forget", "anchor", "retain", "set", "config"}
    if item.type is not bool and item.name not in speaks_for_itself:
        assert re.search(r"\[default: \S.*\]$", line)


def test_help_names_the_defaults_that_are_used(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = command("--help")[1]
    for name, value in {**SD_DEFAULTS, "density": 0.5, "seed": 0}.items():
        assert re.search(rf"\[default: {re.escape(str(value))}( for salun)?(; on a GPU .*)?\]$", entry(text, name)), (
            name
        )


def test_help_says_whose_a_default_is_that_methods_bring_too(command, monkeypatch):
    """The control is a default of all methods, which names none."""
    monkeypatch.setenv("COLUMNS", "1000")
    text = command("--help")[1]
    brought = {name for preset in METHODS.values() for kind in ("object", "nudity") for name in preset.defaults(kind)}
    assert {"learning_rate", "num_train_steps", "alpha", "scope"} < brought
    for name in brought:
        shown = entry(text, name).rpartition("[default: ")[2]
        assert "salun" in shown or "method" in shown, f"{name}: {shown}"
    assert entry(text, "num_retain").endswith("[default: 800]")


def test_help_fits_a_terminal_and_breaks_no_name(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, text, _ = command("--help")
    assert "CompVis/stable-diffusion-v1-4" in text
    assert max(map(len, text.partition("options:")[2].partition("The defaults shown")[0].splitlines())) <= 80
    assert len(text.splitlines()[0]) <= 80


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_other_command_has_help_and_is_named_in_the_main_one(name, command):
    assert re.search(rf"^  {name} ", command("--help")[1], re.MULTILINE)
    code, text, _ = command(name, "--help")
    assert code == 0 and text.startswith(f"usage: erase-concept {name} ")


SUBCOMMANDS = [
    *((cli, f"erase-concept {name}") for name in cli.COMMANDS),
    *((eval_cli, f"eval-concept {name}") for name in eval_cli.COMMANDS if name != "list"),
    *((classifier_cli, f"unlearn-classifier {name}") for name in classifier_cli.COMMANDS),
]


@pytest.mark.parametrize(("module", "name"), SUBCOMMANDS)
def test_the_help_of_every_command_ends_with_an_example_of_options_that_it_has(module, name, capsys):
    with pytest.raises(SystemExit):
        module.main([name.split()[1], "--help"])
    text, _, example = capsys.readouterr().out.partition(f"\nexample:\n  {name} ")
    assert example.strip()
    assert all(re.search(rf"^  {word}[ ,]", text, re.MULTILINE) for word in example.split() if word.startswith("--"))


def test_the_examples_of_help_are_accepted(asked):
    lines = re.findall(r"^  erase-concept (--concept.*)$", cli.EPILOG, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert asked(*[quoted or plain for quoted, plain in re.findall(r'"([^"]+)"|(\S+)', line)]).concept


def test_list_shows_every_preset(command):
    code, out, err = command("--list")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert list(lines) == concepts.names()
    models = {"circle": "embedded model", "church": "other models", "nudity": "all models"}
    assert all(model in lines[name] for name, model in models.items())


def test_version_is_one_everywhere(command):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert command("--version") == (0, f"erase-concept {erase.__version__}\n", "")
    assert project["dynamic"] == ["version"]  # read from erase/__init__.py
    assert f"\nversion: {erase.__version__}\n" in citation


# --- Options


def test_every_setting_has_the_type_of_its_annotation():
    """Spelled out once, independently of how the annotations are read."""
    whole = "num_forget num_retain num_inference_steps resolution generation_batch_size num_train_steps batch_size "
    whole += "gradient_accumulation_steps seed checkpointing_steps num_samples lora_rank rank anchor_every alpha_every"
    real = "density mask_guidance mask_attack alpha guidance_scale learning_rate weight_decay max_grad_norm "
    real += "proportion_empty_prompts null_space"
    switches = "per_tensor gradient_checkpointing low_memory resume allow_pickle overwrite"
    found = forms_of(Settings)
    assert {name for name, form in found.items() if form.type is int} == set(whole.split())
    assert {name for name, form in found.items() if form.type is float} == set(real.split())
    assert {name for name, form in found.items() if form.type is bool} == set(switches.split())
    assert {name for name, form in found.items() if form.is_repeated} == set(
        "concept forget anchor retain save set".split()
    )
    assert {form.type for form in found.values()} == {int, float, bool, str}


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, Form(int)),
        (int | None, Form(int)),
        (float | None, Form(float)),
        (Literal["point", "float"], Form(str, ("point", "float"))),  # holds the letters of int and float
        (Literal["point"] | None, Form(str, ("point",))),
        (tuple[str, ...], Form(str, (), True)),
        (tuple[int, ...] | None, Form(int, (), True)),
        (tuple[Literal["a", "b"], ...], Form(str, ("a", "b"), True)),
    ],
)
def test_annotations_are_read_by_their_structure(annotation, expected):
    assert form_of(annotation) == expected


def test_choices_are_those_of_the_modules_that_use_them():
    assert forms_of(Settings)["method"].choices == tuple(METHODS)
    scopes = {**scope.SCOPES, **StableDiffusionXL.scopes, **TextTrained.scopes, **PixelDiffusion.scopes}
    assert forms_of(Settings)["scope"].choices == tuple(scopes)
    assert forms_of(Settings)["recipe"].choices == tuple(RECIPES)
    assert forms_of(Settings)["score"].choices == get_args(masks.Score)


@pytest.mark.parametrize("option", ["--num-forget", "--num_forget"])
def test_dashes_and_underscores_are_alike(option, asked):
    assert asked("--concept", "church", option, "3").num_forget == 3
    assert asked("--concept", "church", f"{option}=3", "--output=a_b").output == "a_b"


def test_every_setting_reaches_the_run(asked):
    """A value other than the default for each, as text."""
    examples = {int: "7", float: "0.25", str: "some text"}
    arguments, expected = [], {}
    for name, form in forms_of(Settings).items():
        text = form.choices[-1] if form.choices else examples.get(form.type, "")
        arguments += [flag(name)] if form.type is bool else [flag(name), text]
        plain = True if form.type is bool else form.type(text)
        expected[name] = (plain,) if form.is_repeated else plain
    assert asked(*arguments) == Settings(**expected)
    assert all(getattr(Settings("church"), name) != value for name, value in expected.items())


def test_repeated_options_add_up_and_replace_the_default(asked):
    settings = asked("--concept", "church", "--save", "delta", "--save", "lora", "--forget", "a b", "--forget", "c")
    assert settings.save == ("delta", "lora") and settings.forget == ("a b", "c")
    assert asked("--concept", "church").save == ("pipeline",)


def test_a_concept_that_is_given_twice_is_erased_once(asked):
    assert asked(*"--concept church --concept circle --concept church".split()).concept == ("church", "circle")


def test_settings_from_python_are_stored_as_json_can_write_them():
    loose: dict[str, Any] = dict(output=Path("a/b"), density=np.float64(0.5), num_forget=np.int64(3), save=["delta"])
    settings = Settings("church", **loose)
    assert settings == Settings("church", output="a/b", density=0.5, num_forget=3, save=("delta",))
    assert Settings("church", density=1) == Settings("church", density=1.0)
    one: Any = "one prompt"
    assert Settings("church", forget=one).forget == ("one prompt",)
    assert json.loads(json.dumps(vars(settings)))["output"] == "a/b"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_forget": 1.5}, "--num-forget is 1.5; it must be a whole number"),
        ({"density": "half"}, "--density is 'half'; it must be a number"),
        ({"density": None}, "--density is None; it must be a number"),
        ({"output": 3}, "--output is 3; it must be a string"),
        ({"resume": "no"}, "--resume is 'no'; it must be True or False"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(options, message):
    with pytest.raises(EraseError, match=re.escape(message)):
        Settings("church", **options)


# --- Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no concept given; for example --concept nudity"),
        ("--concept", "--concept: expected one argument"),
        ("--conc church", r"unknown argument '--conc'; did you mean --concept\?"),
        ("--concept church --batchsize 3", r"unknown argument '--batchsize'; did you mean --batch-size\?"),
        ("aply --delta d", r"unknown argument 'aply'; did you mean apply\?"),
        ("church", r"unknown argument 'church' \(see erase-concept --help\)"),
        ("remove --model m --output o", "arguments are required: --delta"),
        ("--concept churhc", r"unknown concept 'churhc'; did you mean church\?"),
        ("--concept horn", r"unknown concept 'horn'; did you mean french_horn\?"),
        ("--concept zebra", "unknown concept 'zebra'; the presets are .*church.*nudity.*--kind object"),
        ("--concept no.toml", "no.toml: no such file"),
        ("remove --delta . --model mini --output o", ". is a folder; a file is needed"),
        ("inspect .", ". is a folder; a file is needed"),
        ("--concept church --method salum", r"--method is 'salum'; did you mean salun\? \(salun, relabel"),
        ("--concept church --method 9", "--method is '9'; choose salun, relabel, salun-robust, salun-soft"),
        ("--concept church --recipe papr", r"--recipe is 'papr'; did you mean paper\? \(default, paper, reference\)"),
        ("--concept church --scope all", "--scope is 'all'; .*xattn"),
        ("--concept church --kind nudity", "--kind is 'nudity'; choose object, style"),
        ("--concept church --save zip", "--save is 'zip'; .*pipeline"),
        ("--concept church --density 0", "--density is 0.0; it must be above 0 and at most 1"),
        ("--concept church --density 1.5", "--density is 1.5; it must be above 0 and at most 1"),
        ("--concept church --density nan", "--density is nan; it must be above 0 and at most 1"),
        ("--concept church --density half", "--density: invalid float value: 'half'"),
        ("--concept church --num-train-steps -1", "--num-train-steps is -1; it must be 0 or more"),
        ("--concept church --num-train-steps 1.5", "--num-train-steps: invalid int value: '1.5'"),
        ("--concept church --num_forget 0", "--num-forget is 0; it must be at least 1"),
        ("--concept church --learning-rate nan", "--learning-rate is nan; it must be 0 or more"),
        ("--concept church --learning-rate inf", "--learning-rate is inf; it must be 0 or more"),
        ("--concept church --learning-rate=-1e-5", "--learning-rate is -1e-05; it must be 0 or more"),
        ("--concept church --max-grad-norm 0", "--max-grad-norm is 0, which stops all training"),
        ("--concept church --seed -1", "--seed is -1; it must be 0 or more"),
        ("--concept church --seed 4294967296", "--seed is 4294967296; it must be 0 or more and at most 4294967295"),
        ("--concept schoolgirl --kind object", "does not accept targets that involve minors"),
        ("--concept toddler", "does not accept targets that involve minors"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, command, empty_folder):
    assert_refused(command(*arguments.split()), empty_folder, message)


@pytest.mark.parametrize("name", [name for name, form in forms_of(Settings).items() if form.type in (int, float)])
def test_no_number_may_be_negative_or_nan(name):
    """A whole number that is NaN has the wrong type already."""
    for value in (-1, float("nan")):
        given: dict[str, Any] = {name: value}
        with pytest.raises(EraseError, match=f"^{flag(name)} is {value}"):
            Settings("church", **given)


def test_a_mistake_is_found_before_torch_is_imported():
    for options in ("'--concept', 'churhc'", "'--concept', 'church', '--method', 'salum'"):
        code = f"""
import sys
from erase import cli
try:
    cli.main([{options}])
finally:
    print("torch" in sys.modules)
"""
        done = shell_python(code)
        assert (done.returncode, done.stdout) == (2, "False\n")


def test_an_error_of_several_lines_becomes_one(command, empty_folder, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise EraseError("first\n  second")

    monkeypatch.setattr(cli.concepts, "find", fail)
    assert_refused(command("--concept", "church"), empty_folder, "first second$")


def test_a_defect_of_ours_stays_a_traceback(command, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("defect")

    monkeypatch.setattr(cli.concepts, "find", fail)
    with pytest.raises(RuntimeError, match="defect"):
        command("--concept", "church")


def test_an_interrupt_exits_with_130(command, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.concepts, "find", interrupt)
    assert command("--concept", "church") == (130, "", "erase-concept: interrupted\n")


@pytest.mark.parametrize(("options", "advice"), [([], "same command"), (["--overwrite"], "same command without --ov")])
def test_an_interrupted_run_says_how_to_continue(options, advice, command, monkeypatch):
    """The same command with --overwrite would delete what there is to continue."""
    from erase.runs import job

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", interrupt)
    code, out, err = command("--concept", "church", *options)
    assert (code, out) == (130, "") and advice in err and err.count("\n") == 1


# --- Deltas and masks


@pytest.fixture
def broken_files(tmp_path) -> dict[str, Path]:
    """Files that are no delta and no mask, outside the folder that the commands run in."""
    made = {name: tmp_path / f"{name}.safetensors" for name in ("missing", "text", "empty", "cut", "other")}
    made["text"].write_text("not a tensor in sight")
    made["empty"].write_bytes(b"")
    change = delta.difference({"w": torch.zeros(64)}, {"w": torch.ones(64)}, {})
    delta.save(made["cut"], change)
    made["cut"].write_bytes(made["cut"].read_bytes()[:-8])
    save_file({"w": torch.zeros(2)}, made["other"])
    return made


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "cut", "other"])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_file_that_is_no_delta_is_one_line(name, kind, command, broken_files, empty_folder):
    path = str(broken_files[kind])
    others = {"inspect": [path], "export": [path, "--to", "unet"]}
    arguments = others.get(name, ["--delta", path, "--model", "nowhere", "--output", "restored"])
    assert_refused(command(name, *arguments), empty_folder, re.escape(path))


@pytest.mark.parametrize("name", ["apply", "remove"])
def test_an_output_that_exists_is_left_alone(name, command, tmp_path, empty_folder):
    change = delta.difference({"w": torch.zeros(64)}, {"w": torch.ones(64)}, {})
    delta.save(tmp_path / "delta.safetensors", change)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    arguments = ["--delta", str(tmp_path / "delta.safetensors"), "--model", "nowhere"]
    assert_refused(command(name, *arguments, "--output", str(tmp_path / "taken")), empty_folder, "taken exists already")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_inspect_shows_shares_block_by_block(command, tmp_path):
    """The control of the refusals above: 48 of 64 weights changed, 16 of 64 may change."""
    old, name = torch.zeros(64), "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    change = delta.difference(
        {f"unet.{name}": old}, {f"unet.{name}": torch.arange(64) // 16 + old}, {"method": "salun"}
    )
    delta.save(tmp_path / "delta.safetensors", change)
    masks.save(tmp_path / "mask.safetensors", {name: torch.arange(64) < 16}, {"density": 0.25})
    for file, share, said in (("delta", "75.0%", "method +salun"), ("mask", "25.0%", "density +0.25")):
        code, out, err = command("inspect", str(tmp_path / f"{file}.safetensors"))
        assert (code, err) == (0, "") and re.search(said, out)
        assert re.search(rf"^all .* {share}$", out, re.MULTILINE)


def test_inspect_of_an_empty_delta_divides_by_nothing(command, tmp_path):
    delta.save(tmp_path / "delta.safetensors", delta.difference({"w": torch.zeros(0)}, {"w": torch.zeros(0)}, {}))
    code, out, _ = command("inspect", str(tmp_path / "delta.safetensors"))
    assert code == 0 and "0.0%" in out


@pytest.mark.parametrize("value", ["1001", "-1", "nan", "inf", "99999999999999999999"])
@pytest.mark.parametrize("name", ["num_inference_steps", "guidance_scale"])
def test_a_number_beyond_what_a_model_can_do_is_refused(name, value):
    """Steps are at most the 1,000 timesteps of training, and guidance is finite (2.9)."""
    number: Any = float(value) if name == "guidance_scale" or value in {"nan", "inf"} else int(value)
    with pytest.raises(EraseError, match=f"--{name.replace('_', '-')} is .*it must be"):
        Settings(concept="circle", **{name: number})


def test_both_commands_names_for_steps_and_guidance_are_accepted(capsys):
    """`--steps` is `--num-inference-steps` and `--guidance` is `--guidance-scale` (4.8)."""
    for flags in (("--steps", "--guidance"), ("--num-inference-steps", "--guidance-scale")):
        with pytest.raises(SystemExit):
            cli.main(["--concept", "circle", flags[0], "0", flags[1], "0"])
        assert "--num-inference-steps is 0; it must be at least 1 and at most 1000" in capsys.readouterr().err
