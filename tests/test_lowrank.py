"""Changes of low rank in place of weights: what may change, what is written, and that diffusers loads it as a LoRA."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from erase import erase_concept, files, tensor_files
from erase.concepts import Concept
from erase.errors import EraseError
from erase.families import loading, stored_unet
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.training import lowrank

CONCEPT = Concept("cat", "object", forget=("a cat",), anchor=("a dog",), retain=("a tree", "a boat"))
RANK = 2


def erase(model, output, **options):
    few = dict(num_forget=2, num_retain=2, num_inference_steps=2, num_train_steps=4, batch_size=2, num_samples=0)
    options = {"method": "leco", "rank": RANK, "learning_rate": 0.05, "checkpointing_steps": 1, **few, **options}
    return erase_concept(CONCEPT, str(model), output=str(output), device="cpu", quiet=True, **options)


def test_every_change_is_of_that_rank_and_all_of_it_is_in_the_lora(toy_pipeline_dir, tmp_path):
    """Only matrices inside the scope move, and the LoRA on the base is the run folder's model."""
    pytest.importorskip("peft")
    folder = erase(toy_pipeline_dir, tmp_path / "run", save=("pipeline", "lora")).folder
    base, erased = (stored_unet.load_unet(path).state_dict() for path in (toy_pipeline_dir, folder))
    moved = {name for name in base if not torch.equal(base[name], erased[name])}
    assert moved == {name for name in base if ".attn2." in name and name.endswith("weight")}
    for name in moved:
        values = torch.linalg.svdvals((erased[name] - base[name]).double())
        assert values[RANK:].max() < 1e-5 * values[0] < values[RANK - 1], name

    pipelines = [
        StableDiffusionPipeline.from_pretrained(path, safety_checker=None) for path in (toy_pipeline_dir, folder)
    ]
    lora = pipelines[0]
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([100, 700]), torch.randn(2, 16, 8)
    with torch.no_grad():
        before, expected = (pipeline.unet(x, t, c).sample for pipeline in pipelines)
        lora.load_lora_weights(str(folder))
        assert lora.get_list_adapters()  # diffusers only warns of a file whose names it does not know
        found = lora.unet(x, t, c).sample
    change = (expected - before).abs().max()
    assert change > 1e-3 and (found - expected).abs().max() < 1e-3 * change


def test_no_step_changes_nothing_and_a_continued_run_ends_the_same(toy_pipeline_dir, tmp_path, monkeypatch):
    nothing = erase(toy_pipeline_dir, tmp_path / "nothing", num_train_steps=0)
    assert nothing.record.weights.changed == 0
    whole = erase(toy_pipeline_dir, tmp_path / "whole")
    keep = files.replacing

    def interrupted(path):
        if path.name == "training.safetensors" and path.exists():
            raise KeyboardInterrupt
        return keep(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tensor_files, "replacing", interrupted)
        erase(toy_pipeline_dir, tmp_path / "continued")
    continued = erase(toy_pipeline_dir, tmp_path / "continued")
    assert continued.record.model.result_hash == whole.record.model.result_hash
    assert continued.record.losses == whole.record.losses


def test_the_model_is_whole_again_after_an_error(toy_pipeline_dir):
    model = loading.load(toy_pipeline_dir)
    unet = model.network
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(KeyError), lowrank.factors(model, dict(unet.named_parameters()), RANK, torch.Generator()):
        assert unet.state_dict().keys() != before.keys()
        raise KeyError
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": "random"}, "does not go with a mask"),
        ({"method": "salun"}, "does not go with a mask"),
        ({"method": "uce"}, "does not go with uce"),
        ({"method": "salun-soft"}, "does not go with salun-soft"),
        ({"weights": "bf16"}, "does not go with --weights bf16"),
        ({"rank": 0}, "--rank is 0; it must be at least 1"),
    ],
)
def test_what_does_not_go_with_a_rank_is_one_line(toy_pipeline_dir, tmp_path, options, message):
    with pytest.raises(EraseError, match=message):
        erase(toy_pipeline_dir, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_without_a_matrix_in_the_scope_the_scopes_that_have_one_are_named(toy_pipeline_dir):
    def message(model, names):
        weights = dict(model.network.named_parameters())
        with (
            pytest.raises(EraseError) as caught,
            lowrank.factors(model, {name: weights[name] for name in names}, RANK, torch.Generator()),
        ):
            pass
        return str(caught.value)

    model = loading.load(toy_pipeline_dir)
    assert message(model, ["conv_in.weight"]).endswith(
        "use --scope full, xattn, xattn-kv, attn, selfattn, noxattn or notime"
    )
    pixels = loading.load("mini-pixel")
    assert message(pixels, ["conv_in.weight"]).endswith("mini-pixel has none, leave --rank out")


def test_the_loras_rank_is_that_of_the_training():
    plain, given = Settings(concept=("cat",)), {"concept": ("cat",), "method": "leco"}
    assert resolve(plain, "object", {}).lora_rank == 64
    assert resolve(Settings(**given), "object", {}).lora_rank == 4
    assert resolve(Settings(**given, lora_rank=8), "object", {}).lora_rank == 8
