"""Laws of `--config-file`: it repeats a run, the command line wins over it, and a bad one is one line."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from erase import cli, erase_concept, methods
from erase.classification import cli as classifier_cli
from erase.errors import EraseError
from erase.methods import METHODS
from erase.options import config_file
from erase.options.effect import OF_IMAGES, require_consistent
from erase.options.recipes import RECIPES, resolve
from erase.options.settings import Settings


@pytest.fixture
def asked(monkeypatch) -> list[Settings]:
    """The settings of each run that the command asks for; nothing is run."""
    found: list[Settings] = []

    def run(settings: Settings, **options: Any) -> None:
        found.append(settings)
        raise SystemExit(0)

    monkeypatch.setattr("erase.runs.job.run", run)
    return found


def settings_of(asked: list[Settings], *arguments: object) -> Settings:
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in arguments])
    assert end.value.code == 0
    return asked[-1]


def refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_file_says_what_options_say(tmp_path, asked):
    """Dashes and underscores, several values, switches, tables: the settings are those of the same options."""
    path = tmp_path / "run.toml"
    path.write_text(
        'concept = ["circle", "square"]\nmodel = "mini"\nnum-train-steps = 12\nlearning_rate = 1e-4\n'
        'low-memory = true\nsave = ["delta"]\nmixed_precision = "no"\n[set]\nalpha = 0.5\n'
    )
    options = ["--concept", "circle", "--concept", "square", "--model", "mini", "--num-train-steps", 12]
    options += ["--learning-rate", 1e-4, "--low-memory", "--save", "delta", "--precision", "fp32", "--set", "alpha=0.5"]
    assert settings_of(asked, "--config-file", path) == settings_of(asked, *options)


def test_an_option_of_the_command_line_wins(tmp_path, asked):
    path = tmp_path / "run.toml"
    path.write_text('concept = "circle"\nmodel = "mini"\nprecision = "bf16"\nseed = 3\n')
    found = settings_of(asked, "--config-file", path, "--concept", "square", "--mixed-precision", "no")
    assert (found.concept, found.precision, found.seed) == (("square",), "fp32", 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_train_stepz = 3", "'num_train_stepz'; did you mean num_train_steps"),
        ("seed = 'many'", "--seed is 'many'; it must be a whole number"),
        ("density = [0.5]", "--density is [0.5]; it must be a number"),
        ("low_memory = 'yes'", "--low-memory is 'yes'; it must be True or False"),
        ("concept = 'circle'\nconcept = 'square'", "not valid TOML"),
        ("concept = 'circle'\n[training]\nseed = 1", "'training'"),
        ("config-file = 'other.toml'", "'config-file'"),
        ("mixed_precision = ['no']", "--mixed-precision is ['no']; it must be a string"),
        ("seed = true", "--seed is True; it must be a whole number"),
        ("learning_rate = true", "--learning-rate is True; it must be a number"),
        ("num-forget = 3\nnum_forget = 4", "'num_forget' is a second value for --num-forget"),
        ("steps = 3\nnum_inference_steps = 4", "is a second value for --num-inference-steps"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, capsys, text, said):
    path = tmp_path / "run.toml"
    path.write_text(text)
    line = refusal(capsys, "--concept", "circle", "--model", "mini", "--config-file", path)
    assert str(path) in line and said in line
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"status": "running", "identity": {}}'])
def test_only_the_record_of_a_finished_run_is_taken(tmp_path, capsys, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    assert "run.json" in refusal(capsys, "--config-file", path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"set": 5}, "--set is 5; it must be a string or several strings"),
        ({"save": True}, "--save is True; it must be a string or several strings"),
        ({"method": ["uce"], "num_train_steps": 2}, "--method is ['uce']; it must be a string"),
        ({"num_train_steps": 2, "anchor_every": "two"}, "--anchor-every is 'two'; it must be a whole number"),
        ({"num_train_steps": 2, "stepz": 3}, "there is no option 'stepz'"),
    ],
)
def test_a_record_with_wrong_settings_is_one_line_that_names_it(tmp_path, capsys, settings, said):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"settings": settings}))
    line = refusal(capsys, "--concept", "circle", "--model", "mini", "--config-file", path)
    assert str(path) in line and said in line


def test_a_record_that_names_no_method_is_of_the_default_one(tmp_path, asked):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"settings": {"num_train_steps": 2}}))
    found = settings_of(asked, "--config-file", path, "--concept", "circle", "--model", "mini")
    assert (found.method, found.num_train_steps) == ("salun", 2)


@pytest.mark.parametrize("name", ["none.toml", "none.json"])
def test_a_missing_file_is_named(tmp_path, capsys, name):
    assert f"{name}: no such file" in refusal(capsys, "--config-file", tmp_path / name)


def test_a_folder_is_told_from_the_record_in_it(tmp_path, capsys):
    assert "give the run.json in it" in refusal(capsys, "--config-file", tmp_path)


def test_short_names_of_options_are_names_in_a_file_too(tmp_path, asked):
    path = tmp_path / "run.toml"
    path.write_text('concept = "circle"\nmodel = "mini"\nsteps = 3\nguidance = 2.0\nsize = 64\n')
    found = settings_of(asked, "--config-file", path)
    assert (found.num_inference_steps, found.guidance_scale, found.resolution) == (3, 2.0, 64)


@pytest.mark.parametrize("given", [("--method", "uce"), ("--recipe", "paper")])
def test_a_record_is_not_run_with_the_defaults_of_another_method(tmp_path, capsys, given):
    """Its settings are all filled in: another method or recipe would get none of its own."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"status": "done", "settings": asdict(Settings("circle", model="mini"))}))
    line = refusal(capsys, "--config-file", path, *given)
    assert f"{path} has every setting of {given[0]}" in line and ".toml" in line


@pytest.mark.parametrize(("method", "set"), [("uce", ()), ("leco", ()), ("salun", ("alpha=0.5",))])
def test_a_record_repeats_methods_without_alpha_or_with_alpha_among_their_hyperparameters(
    method, set, tmp_path, toy_pipeline_dir
):
    how: dict[str, Any] = {"num_samples": 0, "save": ("delta",), "method": method, "set": set, "quiet": True}
    how |= {"num_inference_steps": 2}
    if method != "uce":
        how |= {"num_train_steps": 1, "num_forget": 2, "num_retain": 2, "batch_size": 1}
    first = erase_concept("church", str(toy_pipeline_dir), output=str(tmp_path / "one"), **how)
    cli.main(["--quiet", "--config-file", str(first.folder / "run.json"), "--output", str(tmp_path / "two")])
    second = json.loads((tmp_path / "two" / "run.json").read_text())
    assert second["model"]["result_hash"] == first.record.model.result_hash
    assert second["method"] == json.loads((first.folder / "run.json").read_text())["method"]


@pytest.mark.slow
@pytest.mark.ci
def test_the_record_of_a_run_repeats_it_to_the_bit(tmp_path, toy_pipeline_dir):
    """Also where the run chose values by itself, and where another folder is asked for; nothing is overwritten."""
    how: dict[str, Any] = {"num_train_steps": 2, "num_forget": 3, "num_retain": 3, "num_inference_steps": 2}
    how |= {"batch_size": 2, "num_samples": 0, "save": ("delta",), "resolution": 64, "recipe": "reference"}
    first = erase_concept(
        "church", str(toy_pipeline_dir), output=str(tmp_path / "one"), overwrite=True, quiet=True, **how
    )
    path = first.folder / "run.json"
    assert not {"overwrite", "resume"} & config_file.read(path, Settings).keys()
    cli.main(["--quiet", "--config-file", str(path), "--output", str(tmp_path / "two")])
    second = json.loads((tmp_path / "two" / "run.json").read_text())
    assert second["identity"] == json.loads(path.read_text())["identity"]
    assert second["model"]["result_hash"] == first.record.model.result_hash


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_recorded_settings_are_accepted_and_resolve_to_themselves(method, recipe, tmp_path):
    ways: list[dict[str, Any]] = [
        {},
        {"low_memory": True, "batch_size": 12},
        {"save": ("delta", "lora"), "mask": "random"},
        {"forget_images": "a", "retain_images": "b"},
    ]
    path = tmp_path / "run.json"
    if issubclass(methods.load(method), methods.ClosedForm):  # options without effect are refused
        ways = [{name: value for name, value in way.items() if name not in OF_IMAGES} for way in ways]
    for way in ways:
        for kind, of_model in (("nudity", dict[str, Any]()), ("object", {"family": "mini"})):
            once = resolve(Settings("church", method=method, recipe=recipe, **way), kind, of_model, part=4)
            path.write_text(json.dumps({"status": "done", "settings": asdict(once)}))
            given = Settings(**config_file.read(path, Settings))
            require_consistent(given)
            assert resolve(given, kind, of_model, part=4) == once


def test_every_setting_goes_through_a_record(tmp_path):
    """A setting that a record holds is one that a file may have."""
    settings = Settings(concept="circle", model="mini")
    for name in asdict(settings):
        path = tmp_path / "one.toml"
        path.write_text(f"{name} = []\n")
        try:
            config_file.read(path, Settings)
        except EraseError as error:
            assert "unknown" not in str(error)


def test_the_classifier_command_takes_a_file_too(tmp_path, monkeypatch):
    path = tmp_path / "run.toml"
    path.write_text('data = "digits"\nforget = "10%"\nmethod = "ft"\nepochs = 3\n')
    found: list[Any] = []

    def run(settings: Any, *rest: Any, **options: Any) -> None:
        found.append(settings)
        raise SystemExit(0)

    monkeypatch.setattr("erase.classification.run.run", run)
    with pytest.raises(SystemExit):
        classifier_cli.main(["--config-file", str(path), "--forget", "class:3"])
    assert (found[0].method, found[0].forget, found[0].epochs) == ("ft", "class:3", 3)
