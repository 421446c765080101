"""Families are found by the pipeline's class, ours and those of other packages; nothing else knows an architecture."""

import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from contract.example_family import Watercolour

import erase
from erase import delta, erase_concept, tensor_files
from erase import registry as parts
from erase.cli import load_line, main
from erase.errors import EraseError
from erase.evaluation import generate
from erase.families import loading, registry, sd
from erase.options.settings import Settings

PACKAGE = Path(erase.__file__).parent
FAMILY_FOLDERS = {"families", "export", "mini"}  # mini builds a Stable Diffusion of its own
NAMES = re.compile(r"\battn[12]\b|\bto_[kv]\b|StableDiffusionPipeline|UNet2DConditionModel|^unet\.|stable-diffusion")
COMPONENT = "unet"
GUIDANCE = 7.5  # of Stable Diffusion's pipeline
ATTRIBUTES = {"unet", "text_encoder"}
OPTIONS = {"settings", "given", "drawing"}  # the option --unet is an attribute of these
ALLOWED = {
    ("cli.py", "unet"): "the option --unet, and a form of `export --to`",
    ("evaluation/commands/run.py", "unet"): "the option --unet",
    ("evaluation/sources.py", ".unet"): "the option --unet, in a dataclass of options",
    ("guards.py", ".attn2"): "NAG changes the text attention of a pipeline of diffusers, which has this name there",
    ("guards.py", "unet"): "guards change a pipeline of diffusers, whose component it is",
    ("guiders.py", "7.5"): "the default of diffusers' guiders",
    ("methods/scissorhands.py", ".attn1."): "its published code renews self-attention of two named blocks",
    ("methods/scissorhands.py", "7.5"): "its published code's guidance of the forget term",
    ("options/recipes.py", "7.5"): "the guidance inside the mask's loss in SalUn's code",
    ("options/training.py", "7.5"): "the default that --help shows; a family has its own",
    ("options/settings.py", "CompVis/stable-diffusion-v1-4"): "the default of --model",
    ("options/settings.py", "unet"): "a form of --save",
    ("pickles.py", "unet"): "a key under which checkpoint files of other programs hold weights",
    ("runs/card.py", "unet"): "the option --unet",
    ("runs/folders.py", "unet.safetensors"): "the name of a published file",
    ("runs/forms.py", "unet"): "a form of --save",
    ("runs/identity.py", "unet"): "the option --unet",
    ("runs/job.py", "CompVis/stable-diffusion-v1-4"): "the default of `model`",
}


def names_in(source: str) -> Iterator[str]:
    """Names of an architecture in code and strings; docstrings may explain with them."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if NAMES.search(node.value) or node.value == COMPONENT:
                yield node.value
        elif isinstance(node, ast.Constant) and node.value == GUIDANCE:
            yield str(GUIDANCE)
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            if not (isinstance(node.value, ast.Name) and node.value.id in OPTIONS):
                yield f".{node.attr}"
        elif isinstance(node, (ast.Name, ast.alias, ast.Attribute)):
            name = {ast.Name: "id", ast.alias: "name", ast.Attribute: "attr"}[type(node)]
            if NAMES.search(getattr(node, name)):
                yield getattr(node, name)


def test_no_other_room_names_parts_of_an_architecture():
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in FAMILY_FOLDERS
        for name in names_in(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        'x = name.endswith("attn2.to_v.weight")',
        'x = f"unet.{name}"',
        'x = name.removeprefix("unet.")',
        "model.unet.state_dict()",
        "model.network.text_encoder",
        "from diffusers import StableDiffusionPipeline",
        "isinstance(x, diffusers.UNet2DConditionModel)",
        'x = hashes["unet"]',
        'x = model.startswith("CompVis/stable-diffusion")',
        "guidance = given or 7.5",
    ],
)
def test_the_scan_sees_each_kind_of_name(source):
    assert [*names_in(source)]


@pytest.mark.parametrize("source", ['"""The keys: attn2.to_k."""', "settings.unet", "unet = 1"])
def test_the_scan_lets_options_and_explanations_pass(source):
    assert not [*names_in(source)]


# --- which family serves a pipeline --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", registry.made_registry())
    monkeypatch.setattr(registry, "_GIVEN", {})
    monkeypatch.setattr(parts, "_GROUPS_WITH_GIVEN", set())


def renamed(folder: Path, name: str, target: Path) -> Path:
    """A copy of a pipeline folder whose pipeline has another class."""
    shutil.copytree(folder, target)
    path = target / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
    return target


@pytest.fixture
def watercolour_dir(toy_pipeline_dir, tmp_path) -> Path:
    return renamed(toy_pipeline_dir, "WatercolourPipeline", tmp_path / "watercolour")


def test_stable_diffusion_serves_its_pipeline_and_looks_at_those_that_no_family_names(toy_pipeline_dir, tmp_path):
    assert loading.family_of(toy_pipeline_dir) is sd.StableDiffusion
    other = renamed(toy_pipeline_dir, "FluxPipeline", tmp_path / "flux")
    with pytest.raises(EraseError, match=r"flux is FLUX, which this version does not know; this version knows text-to"):
        loading.load(other)


def test_a_given_family_loads_its_pipeline_and_no_other(toy_pipeline_dir, watercolour_dir):
    assert type(loading.load(watercolour_dir)) is sd.StableDiffusion
    assert registry.give(Watercolour) == "contract.example_family:Watercolour"
    assert type(loading.load(watercolour_dir)) is Watercolour
    assert type(loading.load(toy_pipeline_dir)) is sd.StableDiffusion
    registry.give(Watercolour)  # a second time changes nothing


def test_a_family_may_load_a_kind_that_is_refused_otherwise(toy_pipeline_dir, tmp_path):
    class Flux(Watercolour):
        pipelines = ("FluxPipeline",)

        @classmethod
        def other_kind(cls, folder):
            return None if "flux" in folder.name else "FLUX of another kind"

    registry.give(Flux)
    assert type(loading.load(renamed(toy_pipeline_dir, "FluxPipeline", tmp_path / "flux"))) is Flux
    with pytest.raises(EraseError, match="other is FLUX of another kind, which this version does not know"):
        loading.load(renamed(toy_pipeline_dir, "FluxPipeline", tmp_path / "other"))


def installed(folder: Path, monkeypatch: Any, pipeline: str, source: str) -> None:
    """A distribution with one family, on the path as pip would put it there."""
    info = folder / "erase_paint-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: erase-paint\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[erase.families]\n{pipeline} = erase_paint:Paint\n")
    (folder / "erase_paint.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "erase_paint", raising=False)
    monkeypatch.setattr(registry, "FAMILIES", registry.made_registry())


PAINT = "from contract.example_family import Watercolour\nclass Paint(Watercolour): ...\n"


def test_the_family_of_an_installed_package_is_imported_when_its_pipeline_is_loaded(
    toy_pipeline_dir, watercolour_dir, tmp_path, monkeypatch
):
    installed(tmp_path / "site", monkeypatch, "WatercolourPipeline", PAINT)
    loading.load(toy_pipeline_dir)
    assert "erase_paint" not in sys.modules
    assert type(loading.load(watercolour_dir)).__name__ == "Paint"
    with pytest.raises(EraseError, match="loads WatercolourPipeline, which erase_paint:Paint loads already"):
        registry.give(Watercolour)


def test_a_broken_package_is_an_error_that_names_it_and_only_for_its_own_pipelines(
    toy_pipeline_dir, watercolour_dir, tmp_path, monkeypatch
):
    installed(tmp_path / "site", monkeypatch, "WatercolourPipeline", "import no_such_module")
    loading.load(toy_pipeline_dir)
    with pytest.raises(EraseError, match="'WatercolourPipeline' of the package erase-paint cannot be imported"):
        loading.load(watercolour_dir)


def test_a_pipeline_that_two_packages_load_is_refused_without_an_option_that_does_not_exist(
    toy_pipeline_dir, tmp_path, monkeypatch
):
    installed(tmp_path / "site", monkeypatch, "StableDiffusionPipeline", PAINT)
    with pytest.raises(
        EraseError, match="in 2 installed packages, erase-concept and erase-paint; uninstall all but one$"
    ):
        loading.load(toy_pipeline_dir)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"family": "water colour"}, "has the family name 'water colour'; it must be an identifier"),
        ({"pipelines": ()}, "has no pipelines"),
        ({"guidance_scale": 0.0}, "has no guidance_scale"),
        ({"part": "transformer"}, "trains 'transformer', which is not one of its parts"),
        ({"num_timestep": 10}, "defines 'num_timestep'; did you mean num_timesteps"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(attributes, message):
    with pytest.raises(EraseError, match=message):
        registry.give(type("Bad", (Watercolour,), attributes))


def test_a_family_without_its_abstract_parts_is_refused():
    with pytest.raises(EraseError, match="does not define .*from_folder"):
        registry.give(type("Bare", (registry.Family,), {"family": "bare", "pipelines": ("BarePipeline",)}))  # type: ignore


def test_a_run_uses_the_family_from_the_folder_to_the_card(watercolour_dir, tmp_path, monkeypatch, capsys):
    """Load, train, publish and read again: the family's own class each time, and its pipeline in what is printed."""
    seen = []
    monkeypatch.setattr(Watercolour, "predict", lambda *a: seen.append(1) or sd.StableDiffusion.predict(*a))
    registry.give(Watercolour)
    options: dict[str, Any] = {"kind": "object", "anchor": ("a dog",), "retain": ("a house",), "num_samples": 0}
    options |= {"num_forget": 2, "num_retain": 2, "num_train_steps": 1, "num_inference_steps": 1, "batch_size": 2}
    options |= {"cache_dir": str(tmp_path / "cache")}
    run = erase_concept("cat", watercolour_dir, output=str(tmp_path / "run"), quiet=True, **options)
    assert seen and run.record.weights.changed > 0
    assert "from contract.example_family import WatercolourPipeline\n" in (run.folder / "README.md").read_text()
    assert "import WatercolourPipeline as WATERCOLOUR; pipeline = WATERCOLOUR.from_pretrained" in load_line(run.folder)
    exec(load_line(run.folder), {})
    change = run.folder / "delta.safetensors"
    model = generate.load_model(str(watercolour_dir), delta_path=str(change))
    assert type(model) is Watercolour
    assert delta.content_hash(model.state_of(model.network)) == run.record.model.result_hash
    main(["remove", "--delta", str(change), "--model", str(run.folder), "--output", str(tmp_path / "back")])
    assert run.record.model.base_hash[:12] in capsys.readouterr().out
    base, back = loading.load(watercolour_dir), loading.load(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(base.network.parameters(), back.network.parameters(), strict=True))


class Ink(Watercolour):
    """Has a default of everything that a family may state, other than Stable Diffusion's."""

    guidance_scale = 3.0
    tags = ("ink",)
    licences = {"inkmakers/": "mit"}
    scopes = {"full": lambda name: True, "strokes": lambda name: "attn1" in name}

    @classmethod
    def other_kind(cls, folder):
        return None

    @classmethod
    def knows_file(cls, shapes):
        return "strokes.weight" in shapes

    @classmethod
    def convert(cls, path, *, allow_pickle=False, config=None, cache_dir=None):
        return path.with_suffix(""), ["read as ink"]


OPTIONS_OF_RUN: dict[str, Any] = {
    "kind": "object",
    "anchor": ("a dog",),
    "retain": ("a house",),
    "num_samples": 0,
    "num_forget": 2,
    "num_retain": 2,
    "num_train_steps": 1,
    "num_inference_steps": 1,
    "batch_size": 2,
    "quiet": True,
}


def test_guidance_scopes_and_tags_are_the_familys(watercolour_dir, toy_pipeline_dir, tmp_path):
    with pytest.raises(EraseError, match="--scope is 'strokes'; choose full, xattn"):
        Settings("cat", scope="strokes")
    registry.give(Ink)
    options = {**OPTIONS_OF_RUN, "cache_dir": str(tmp_path / "cache")}
    run = erase_concept("cat", watercolour_dir, output=str(tmp_path / "run"), scope="strokes", **options)
    assert run.record.settings["guidance_scale"] == 3.0
    assert {*delta.load(run.folder / "delta.safetensors").changed} <= {
        f"unet.{name}" for name in loading.load(watercolour_dir).trainable("strokes")
    }
    card = (run.folder / "README.md").read_text()
    assert "- ink\n" in card and "stable-diffusion" not in card
    with pytest.raises(
        EraseError,
        match=r"--scope is 'stroke', which this model does not have; did you mean strokes\? \(full, strokes, text, "
        r"text-first\)",
    ):
        erase_concept("cat", watercolour_dir, output=str(tmp_path / "no"), scope="stroke", **options)
    assert not (tmp_path / "no").exists()
    control = erase_concept("cat", toy_pipeline_dir, output=str(tmp_path / "sd"), **options)
    assert control.record.settings["guidance_scale"] == 7.5
    assert "- stable-diffusion\n" in (control.folder / "README.md").read_text()


def test_guidance_of_an_evaluation_is_the_familys_where_nothing_else_says(watercolour_dir):
    registry.give(Ink)
    model: Any = loading.load(watercolour_dir)
    task: Any = SimpleNamespace(steps=None, guidance=None, samples=())
    assert generate.effective_settings(model, task, None, None)["guidance"] == 3.0
    assert generate.effective_settings(model, task, None, 2.0)["guidance"] == 2.0


def test_a_licence_is_stated_for_models_whose_licence_is_known():
    assert Ink.licence("inkmakers/pen") == "mit" and Ink.licence("other/pen") is None
    assert sd.StableDiffusion.licence("CompVis/stable-diffusion-v1-4") == "creativeml-openrail-m"


def test_a_single_file_is_read_by_the_family_that_knows_it(watercolour_dir, tmp_path):
    path = tmp_path / "watercolour.safetensors"
    tensor_files.write_tensors(path, {"strokes.weight": torch.zeros(2)})
    with pytest.raises(EraseError, match="cannot load"):
        loading.load(path, config=str(watercolour_dir))
    registry.give(Ink)
    model = loading.load(path)
    assert type(model) is Ink and model.notes[0] == "read as ink"


def test_a_download_is_of_the_components_that_the_pipeline_names(watercolour_dir, monkeypatch):
    asked = []

    def snapshot(repository, *, allow_patterns, **options):
        asked.append([*allow_patterns])
        return str(watercolour_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    index = watercolour_dir / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"colours": ["diffusers", "AutoencoderKL"]}))
    registry.give(Ink)
    assert type(loading.load("inkmakers/pen")) is Ink
    assert asked[0] == ["model_index.json"]
    assert {"colours/*.safetensors", "colours/*.json", "unet/*.safetensors"} <= {*asked[1]}
    assert not any("safety_checker" in pattern for pattern in asked[1])


def test_the_family_names_the_component_of_a_delta(toy_pipeline_dir):
    class Transformer(sd.StableDiffusion):
        part = "transformer"

    network = loading.load(toy_pipeline_dir).network
    state = Transformer.state_of(network)
    assert all(name.startswith("transformer.") for name in state)
    assert delta.in_component("transformer", state).keys() == network.state_dict().keys()


def test_the_example_of_the_page_is_the_tested_one():
    page = (PACKAGE.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- file watercolour.py -->\n```python\n(.*?)```", page, re.DOTALL)
    assert shown == (Path(__file__).parent / "contract" / "example_family.py").read_text(encoding="utf-8")


def test_a_scope_of_another_family_is_refused(toy_pipeline_dir):
    with pytest.raises(EraseError, match=r"--scope is 'pooled', which this model does not have; choose one of this"):
        loading.load(toy_pipeline_dir).trainable("pooled")
