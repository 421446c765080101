"""Laws of `import erase`: what a caller may hand over, and that it means the same as on the command line."""

import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel

import erase
from erase import EraseError, delta, methods
from erase.families import loading
from erase.methods.esd import ESD
from erase.methods.relabel import Relabel
from erase.options.settings import Settings


def test_the_public_names_are_listed_and_importing_them_all_works():
    """`dir(erase)`, `__all__` and `from erase import *` (4.9)."""
    names = {"erase_concept", "Run", "Concept", "Method", "EraseError", "load_delta", "apply", "remove"}
    assert dir(erase) == sorted(names) == sorted(erase.__all__)
    space: dict[str, Any] = {}
    exec("from erase import *", space)
    assert names <= space.keys()
    with pytest.raises(AttributeError, match="has no attribute 'erase_concpet'"):
        _ = erase.erase_concpet


def test_a_delta_is_loaded_applied_and_removed_by_public_names(tmp_path):
    base, new = {"unet.w": torch.zeros(9)}, {"unet.w": torch.arange(9.0)}
    delta.save(tmp_path / "delta.safetensors", delta.difference(base, new))
    change = erase.load_delta(tmp_path / "delta.safetensors")
    erased = erase.apply(base, change)
    assert torch.equal(erased["unet.w"], new["unet.w"])
    assert torch.equal(erase.remove(erased, change)["unet.w"], base["unet.w"])


def test_the_version_is_written_once_and_the_package_is_typed():
    root = Path(erase.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["tool"]["hatch"]["version"]["path"] == "erase/version.py"
    assert (root / "py.typed").is_file()


def test_importing_the_package_imports_no_torch():
    code = "import sys, erase; dir(erase); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_hyperparameters_in_a_mapping_are_those_in_texts():
    """The value is not lost (4.9)."""
    one = Settings(concept="church", method="ga", set={"alpha": 0.5})  # pyright: ignore[reportArgumentType]
    assert one.set == ("alpha=0.5",)
    assert methods.make("ga", {}, one.set) == methods.make("ga", {}, ("alpha=0.5",))
    flags: Any = {"filter": False, "rho": 1e-7}
    speed = methods.make("speed", {}, Settings(concept="church", method="speed", set=flags).set)
    assert (speed.filter, speed.rho) == (False, 1e-7)
    with pytest.raises(EraseError, match="--set is 3; it must be a string or several"):
        Settings(concept="church", set=3)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Mine:
    """A method of somebody else's: the concept's prediction becomes `scale` times the anchor's."""

    scale: float = 1.0
    note: str = "none"

    def loss(self, model, frozen, batch):
        raise NotImplementedError


@dataclass(frozen=True)
class Needy:
    scale: float

    def solve(self, weights, text):
        raise NotImplementedError


def test_a_method_may_be_a_class_an_instance_or_its_name():
    """Classes are found by "module:Class", which is what records say (4.9)."""
    name = f"{__name__}:Mine"
    assert methods.give(Mine) == (name, {})
    assert methods.give(Mine(2.5, "x")) == (name, {"scale": 2.5, "note": "x"})
    made = methods.make(name, {}, ("scale=3",))
    assert made.hyperparameters() == {"scale": 3.0, "note": "none"} and isinstance(made, Mine)
    assert made == methods.make(name, {}, ("scale=3",)) != methods.make(name, {}, ())
    assert methods.load("erase.methods.relabel:Relabel") is Relabel
    settings = Settings(concept="church", method="erase.methods.esd:ESD")
    assert isinstance(methods.make(settings.method, {}, ()), ESD)
    assert methods.find(name).defaults() == {"scope": "full", "mask": "none", "target": "anchor"}
    for bad in ("nowhere:Mine", "erase.methods.esd:Nothing", ":", "erase:EraseError", "erase.methods:METHODS", "a b:c"):
        with pytest.raises(EraseError) as error:
            methods.make(bad, {}, ())
        assert repr(bad) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(EraseError, match="is no dataclass with a loss or a solve"):
        methods.give(Path)
    with pytest.raises(EraseError, match="cannot be made .*scale"):
        methods.make(f"{methods.give(Needy)[0]}", {}, ())
    with pytest.raises(EraseError, match="--method is 'salum'"):  # control
        Settings(concept="church", method="salum")


@pytest.fixture
def asked(monkeypatch):
    """The settings with which `erase_concept` would have started."""
    seen: list[Settings] = []
    monkeypatch.setattr("erase.runs.job.run", lambda settings, *_, **__: seen.append(settings))

    def ask(*arguments: Any, **options: Any) -> Settings:
        erase.erase_concept(*arguments, **options)
        return seen[-1]

    return ask


def test_a_call_takes_paths_classes_and_mappings(asked, tmp_path):
    """(4.9)"""
    settings = asked("church", tmp_path, method=Mine(2.0), set={"note": "y"})
    assert settings.model == str(tmp_path) and settings.method == f"{__name__}:Mine"
    assert settings.set == ("scale=2.0", "note=y")
    assert asked("church", method="ga", set="alpha=0.5").set == ("alpha=0.5",)
    assert asked("church", method="ga", set=["alpha=0.5"]).set == ("alpha=0.5",)


def test_a_pipeline_in_memory_is_a_model(asked, toy_pipeline_dir, tmp_path, cache_dir):
    """Written to the cache once, with the same bits; a changed pipeline is another model (4.9)."""
    pipeline = StableDiffusionPipeline.from_pretrained(toy_pipeline_dir)
    folder = asked("church", pipeline).model
    assert Path(folder).parent == cache_dir / "pipelines"
    written, base = loading.load(folder), loading.load(toy_pipeline_dir)
    for part in ("unet", "vae", "text_encoder"):
        here, there = getattr(written, part).state_dict(), getattr(base, part).state_dict()
        assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())
    assert torch.equal(written.encode_text(["a cat"]).text_states, base.encode_text(["a cat"]).text_states)
    assert loading.keep(pipeline) == Path(folder)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.add_(1)
    assert loading.keep(pipeline) != Path(folder)
    assert loading.keep(pipeline, tmp_path / "other").is_relative_to(tmp_path / "other")


def test_other_objects_are_refused_in_one_line(asked, toy_pipeline_dir):
    blocks: Any = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    network = UNet2DModel(block_out_channels=(32,), **blocks)
    for model in (3, None, network, loading.load(toy_pipeline_dir)):
        with pytest.raises(EraseError, match=f"the model is a {type(model).__name__}; give 'mini', ") as error:
            asked("church", model)
        assert "\n" not in str(error.value)
    with pytest.raises(EraseError, match="^a DDPMPipeline in memory cannot be read; save it, and give its folder$"):
        asked("church", DDPMPipeline(network, DDPMScheduler()))
    pipeline = StableDiffusionPipeline.from_pretrained(toy_pipeline_dir)
    pipeline.vae.to("meta")
    with pytest.raises(EraseError, match="the pipeline's vae is not in memory"):
        asked("church", pipeline)
