"""What every registered family must satisfy, ours and one of another package, on a toy pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.example_family import Watercolour

from erase import delta
from erase.errors import EraseError
from erase.families import registry
from erase.families.protocol import Family

PROMPTS = ["a photo of a cat", "a house"]
CLASSES = [*dict.fromkeys(map(registry.FAMILIES.load, registry.FAMILIES.names())), Watercolour]


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.family)
def model(request, toy_pipeline_dir, toy_sdxl_dir, toy_sd3_dir, toy_ddpm_dir, tmp_path) -> Family:
    """Loaded from a folder that names its pipeline. A family of another architecture brings a toy folder of its own."""
    folders = {"sdxl": toy_sdxl_dir, "sd3": toy_sd3_dir, "ddpm": toy_ddpm_dir}
    folder = Path(shutil.copytree(folders.get(request.param.family, toy_pipeline_dir), tmp_path / "toy"))
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": request.param.pipelines[0]}))
    assert request.param.other_kind(folder) is None
    return request.param.from_folder(folder, folder)


def prompts_of(model: Family) -> list[str]:
    """Two prompts of the model: of a class-conditional one, class names."""
    return [*model.classes[:2]] or PROMPTS


@pytest.mark.parametrize("name", registry.FAMILIES.names())
def test_a_family_is_registered_under_a_pipeline_that_it_names(name):
    assert name in registry.FAMILIES.load(name).pipelines


def test_parts_and_their_hashes(model):
    assert {model.part, *model.data_parts} <= {*model.parts}
    assert model.hash_of(model.part) == delta.content_hash(model.state_of(model.network))
    assert len({model.hash_of(part) for part in model.parts}) == len(model.parts)


def test_the_network_is_read_again_with_the_same_bits(model):
    again = model.read_network(model.folder)
    assert delta.content_hash(model.state_of(again)) == delta.content_hash(model.state_of(model.network))
    state = delta.in_component(model.part, model.state_of(model.network))
    assert state.keys() == model.network.state_dict().keys()


def test_every_scope_holds_parameters_and_full_holds_all(model):
    own = dict(model.network.named_parameters())
    assert model.trainable("full").keys() == own.keys()
    for scope in model.scopes:
        assert 0 < len(model.trainable(scope)) <= len(own)


def test_text_maps_multiply_text_states_and_value_maps_are_some_of_them(model):
    if type(model).is_text_map is Family.is_text_map:
        with pytest.raises(EraseError, match="has no maps of text states"):
            model.require_text_maps()
        pytest.skip("no text maps")
    model.require_text_maps()
    width = model.encode_text([""]).text_states.shape[-1]
    maps = {name: w for name, w in model.network.named_parameters() if model.is_text_map(name)}
    values = [name for name, _ in model.network.named_parameters() if model.is_value_map(name)]
    assert values and {*values} <= {*maps}  # equal where keys and values have one map
    assert all(w.ndim == 2 and w.shape[1] == width for w in maps.values())


def test_blank_inputs_are_the_networks_and_a_prediction_has_the_shape_of_its_latents(model):
    network: Any = model.network
    shape = (3, *model.latent_shape(model.resolution))
    assert network(**model.blank_inputs(3, model.resolution, torch.float32)).sample.shape == shape
    t = torch.tensor([0, 1, model.num_timesteps - 1])
    x = model.add_noise(torch.zeros(shape), torch.ones(shape), t)
    c = model.unconditional().expand(3)
    assert model(x, t, c).shape == shape and model(x, t, c).isfinite().all()


def test_the_unconditional_branch_is_one_row_encoded_before_or_not(model):
    one, two = model.unconditional(), model.unconditional(model.encode_text([""]))
    assert len(one) == 1
    torch.testing.assert_close(vars(one), vars(two))


def test_prompts_of_classes_are_their_labels_and_class_vectors_are_the_networks(model):
    if not model.classes:
        with pytest.raises(EraseError, match="has no class labels"):
            _ = model.class_vectors
        pytest.skip("no class labels")
    labels = model.encode_text([*model.classes, ""]).labels
    assert labels is not None and labels.tolist() == [*range(len(model.class_vectors))]
    assert any(parameter is model.class_vectors for parameter in model.network.parameters())
    with pytest.raises(EraseError, match="names no class of"):
        model.encode_text(["a photo of a house"])


def require_table(model: Family) -> None:
    """Skip a family without a single table of token embeddings, which says so in one line."""
    if type(model).token_embeddings is Family.token_embeddings:
        for call in (lambda: model.encode_with(PROMPTS, 0, torch.zeros(1)), lambda: model.encode_tokens([[1]])):
            with pytest.raises(EraseError, match="has no table of token embeddings"):
                call()
        pytest.skip("no table of token embeddings")


def test_text_encoders_hold_the_table_of_token_embeddings(model):
    require_table(model)
    own = {id(parameter) for encoder in model.text_encoders for parameter in encoder.parameters()}
    assert own and not own & {id(parameter) for parameter in model.network.parameters()}
    shapes = [parameter.shape for encoder in model.text_encoders for parameter in encoder.parameters()]
    vocabulary, width = model.token_embeddings.shape
    assert sum(shape[1] for shape in shapes if len(shape) == 2 and shape[0] == vocabulary) == width


def test_a_tokens_own_embedding_gives_the_prompts_own_states_and_another_has_a_gradient(model):
    require_table(model)
    token = model.tokens("cat")[0]
    own = model.token_embeddings[token].detach()
    with torch.no_grad():
        assert torch.equal(model.encode_with(PROMPTS, token, own).text_states, model.encode_text(PROMPTS).text_states)
    other = (own + 1).requires_grad_(True)
    states = model.encode_with(PROMPTS, token, other).text_states
    (gradient,) = torch.autograd.grad(states.square().sum(), [other])
    assert gradient.abs().max() > 0


def test_tokens_give_the_states_of_their_text_and_embeddings_have_a_gradient(model):
    require_table(model)
    tokens = [model.tokens("cat"), model.tokens("hat")]
    assert [model.text_of(row) for row in tokens] == ["cat", "hat"]
    own = model.token_embeddings[torch.tensor(tokens)].detach()
    with torch.no_grad():
        for c in (model.encode_tokens(tokens), model.encode_tokens(tokens, own)):
            torch.testing.assert_close(c.text_states, model.encode_text(["cat", "hat"]).text_states)
    other = (own + 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.encode_tokens(tokens, other).text_states.square().sum(), [other])
    assert (gradient.abs().sum((0, 2)) > 0).all()


def test_embeddings_may_stand_between_tokens_and_long_texts_are_cut_as_the_tokenizer_does(model):
    require_table(model)
    (a,), (b,), length = model.tokens("a"), model.tokens("b"), model.max_tokens - 2
    own = model.token_embeddings[torch.tensor([[b, b]] * 2)].detach()
    with torch.no_grad():
        between = model.encode_tokens([[0, a, a, 0]] * 2, own, at=[0, 3])
        torch.testing.assert_close(between.text_states, model.encode_text(["b a a b"] * 2).text_states)
        for more in (0, 1, 5):
            read = model.encode_text([" ".join("a" * (length + more))])
            cut = model.encode_tokens([[a] * (length + more)])
            torch.testing.assert_close(cut.text_states, read.text_states)
            if read.pooled is not None and cut.pooled is not None:
                torch.testing.assert_close(cut.pooled, read.pooled)


def test_a_trajectory_that_is_continued_ends_where_it_would_have_ended(model):
    x = torch.randn(2, *model.latent_shape(model.resolution), generator=torch.Generator().manual_seed(0))
    prompts = prompts_of(model)
    c, empty, how = model.encode_text(prompts), model.unconditional(), {"steps": 5, "guidance": 2.0}
    whole = model.draw_from(x, prompts, start=0, **how)
    part, t = model.trajectory(x, torch.tensor([3, 3]), c, empty, **how)
    assert len(model.times(5)) == 5 and t.tolist() == [model.times(5)[3]] * 2
    torch.testing.assert_close(model.draw_from(part, prompts, start=3, **how), whole)
    assert not torch.allclose(model.draw_from(part, prompts, start=2, **how), whole)


def test_images_and_latents_go_both_ways(model):
    side = model.resolution
    mean, std = model.encode_images(torch.zeros(2, 3, side, side))
    assert mean.shape == std.shape == (2, *model.latent_shape(side)) and side % model.multiple == 0
    assert model.decode(mean).shape == (2, 3, side, side)


def test_the_same_seed_generates_the_same_latents_also_after_parts_were_freed(model):
    how: dict[str, Any] = {"steps": 2, "guidance": 2.0, "size": model.resolution}
    prompts = prompts_of(model)
    first = model.draw(prompts, [1, 2], **how)
    model.release()
    again, other = model.draw(prompts, [1, 2], **how), model.draw(prompts, [3, 4], **how)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_code_that_opens_a_folder_names_the_familys_pipeline(model):
    *_, imported, opened = model.loading_code(model.folder, repr(str(model.folder)))
    assert imported == f"from {model.pipeline_module} import {model.pipelines[0]}"
    exec("\n".join(model.loading_code(model.folder, repr(str(model.folder)))), {})
    assert opened.startswith(f"pipeline = {model.pipelines[0]}.from_pretrained(")
