"""The scopes of the text encoder: what is trained, how it is written and read again, and what is refused."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from loaded import load_sd
from safetensors.torch import load_file
from toy_training import CONCEPT, RECIPE, erased, gathered

from erase import delta, erase_concept
from erase.cli import main
from erase.errors import EraseError
from erase.evaluation import generate
from erase.evaluation.attacks.merge import Merge
from erase.evaluation.attacks.protocol import Finding
from erase.evaluation.attacks.round import Round
from erase.methods.hirm import HiRM
from erase.methods.relabel import Relabel
from erase.training.batches import batches

HOW: dict[str, Any] = dict(num_forget=4, num_retain=2, num_inference_steps=2, num_train_steps=3, batch_size=2)
HOW |= {"learning_rate": 1e-2, "num_samples": 2, "quiet": True, "device": "cpu"}
TEXT = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(toy_pipeline_dir, tmp_path_factory) -> Path:
    """SalUn in the text encoder, in all forms that there are."""
    output = tmp_path_factory.mktemp("text") / "run"
    erase_concept(
        CONCEPT, str(toy_pipeline_dir), scope="text", output=str(output), save=("pipeline", "single-file"), **HOW
    )
    return output


def test_prompts_are_the_embeddings_of_their_tokens_and_predictions_are_the_same(toy_pipeline_dir):
    """A prediction runs the text encoder, so that it can be trained; words are embeddings too."""
    model = load_sd(toy_pipeline_dir)
    text = model.for_scope("text")
    assert text.for_scope("text-first") is text and model.for_scope("xattn") is model
    assert text.network is model.text_encoder and text.denoiser is model.unet
    x, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 700])
    prompts = list(CONCEPT.forget)
    c, plain = text.encode_text(prompts), model.encode_text(prompts)
    assert not torch.equal(c.text_states, plain.text_states) and torch.equal(text(x, t, c), model(x, t, plain))
    drawn = [one.draw(prompts, [1, 2], steps=2, guidance=2.0, size=8) for one in (model, text)]
    assert torch.equal(*drawn)
    token, word = model.tokens("cat")[0], torch.randn(model.token_embeddings.shape[1])
    assert torch.equal(
        text(x, t, text.encode_with(prompts, token, word)), model(x, t, model.encode_with(prompts, token, word))
    )
    assert not text.trainable("text").keys() & {"embeddings.token_embedding.weight", "final_layer_norm.weight"}
    first = text.trainable("text-first")
    assert first and all(name.startswith(("encoder.layers.0.self_attn", "encoder.layers.0.mlp")) for name in first)
    assert len(first) < len(text.trainable("text")) and torch.equal(
        text.unconditional().text_states, text.encode_text([""]).text_states
    )


def flat(encoder: Any) -> torch.Tensor:
    """All weights but the biases of keys: their gradient is zero up to rounding, which Adam takes for a direction."""
    weights = [p.detach().double().reshape(-1) for name, p in encoder.named_parameters() if "k_proj.bias" not in name]
    return torch.cat(weights)


def test_relabelling_in_the_text_encoder_is_that_of_the_equation(toy_pipeline_dir, tmp_path):
    """In float64 with torch's Adam, 20 steps; the UNet stays as it is."""
    base, accelerator = load_sd(toy_pipeline_dir), Accelerator(cpu=True)
    recipe = replace(RECIPE, num_steps=20, learning_rate=1e-3, checkpoint_every=50)
    data = gathered(base, Relabel(alpha=0.7), tmp_path)
    text, unet, frozen = (deepcopy(one).double() for one in (base.text_encoder, base.unet, base.text_encoder))
    trained = [p.requires_grad_(True) for name, p in text.named_parameters() if name.startswith("encoder.")]
    adam, view = torch.optim.Adam(trained, lr=1e-3), base.for_scope("text")

    def noise(encoder: Any, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ids = base.tokenizer(
            [data.prompts[row] for row in rows.tolist()],
            padding="max_length",
            return_tensors="pt",
            max_length=base.max_tokens,
        )
        states = encoder(ids["input_ids"]).last_hidden_state
        return unet(x.double(), t, encoder_hidden_states=states).sample

    def rows_of(c: Any) -> torch.Tensor:
        every = view.encode_text(list(data.prompts)).text_states
        return torch.stack([(every == one).flatten(1).all(1).nonzero()[0, 0] for one in c.text_states])

    told = replace(data, text=view.encode_text(list(data.prompts)), unconditional=view.unconditional())
    for step in range(20):
        b = next(batches(view, told, recipe, step, 2, accelerator))
        f, a, r = (rows_of(c) for c in (b.c_forget, b.c_target, b.c_retain))
        with torch.no_grad():
            y, keep = noise(frozen, b.x_target, b.t_forget, a), noise(frozen, b.x_retain, b.t_retain, r)
        loss = (noise(text, b.x_forget, b.t_forget, f) - y).square().mean()
        loss = loss + 0.7 * (noise(text, b.x_retain, b.t_retain, r) - keep).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    model, *_ = erased(
        toy_pipeline_dir,
        Relabel(alpha=0.7),
        told,
        accelerator,
        tmp_path / "t",
        recipe=recipe,
        scope_name="text",
        density=None,
    )
    ours, theirs = (flat(one) - flat(frozen) for one in (model.text_encoder, text))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm() and theirs.norm() > 0
    assert all(torch.equal(p, q) for p, q in zip(model.unet.parameters(), base.unet.parameters(), strict=True))


@pytest.mark.parametrize("toward", ["random", "anchor"])
def test_hirm_is_that_of_the_equation(toy_pipeline_dir, tmp_path, toward):
    """In float64 with torch's AdamW, 20 steps: the first layer alone, by the last layer's attention."""
    base, accelerator = load_sd(toy_pipeline_dir), Accelerator(cpu=True)
    method = HiRM(toward=toward, strength=30.0, seed=3)
    recipe = replace(RECIPE, num_steps=20, learning_rate=1e-3, weight_decay=1e-2, checkpoint_every=50)
    data = gathered(base, method, tmp_path)
    text, frozen = deepcopy(base.text_encoder).double(), deepcopy(base.text_encoder).double()
    trained = [
        p.requires_grad_(True)
        for name, p in text.named_parameters()
        if "layers.0.self_attn" in name or "layers.0.mlp" in name
    ]
    adam = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-2)

    def attended(encoder: Any, embeddings: torch.Tensor) -> torch.Tensor:
        """Layer by layer."""
        h = embeddings.double() + encoder.embeddings.position_embedding.weight
        hidden = torch.full((h.shape[1], h.shape[1]), float("-inf"), dtype=h.dtype).triu(1)
        for layer in encoder.encoder.layers:
            seen, attn = layer.layer_norm1(h), layer.self_attn
            q, k, v = (
                part(seen).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
                for part in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            weights = (q @ k.transpose(-1, -2) * attn.scale + hidden).softmax(-1)
            out = attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
            h = h + out
            h = h + layer.mlp(layer.layer_norm2(h))
        return out

    view = base.for_scope("text-first")
    for step in range(20):
        b = next(batches(view, data, recipe, step, 2, accelerator))
        if toward == "anchor":
            with torch.no_grad():
                u = attended(frozen, b.c_target.text_states)
        else:
            r = torch.rand(b.c_forget.text_states.shape[1:], generator=torch.Generator().manual_seed(3)).double()
            u = 30.0 * r / r.norm()
        loss = (attended(text, b.c_forget.text_states) - u).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    model, *_ = erased(
        toy_pipeline_dir, method, data, accelerator, tmp_path / "t", recipe=recipe, scope_name="xattn-kv", density=None
    )
    ours, theirs = (flat(one) - flat(frozen) for one in (model.text_encoder, text))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm() and theirs.norm() > 0


def named(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file; versions of transformers name those of a text encoder with and without `text_model`."""
    return {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}


PREDICT = """
import sys, torch
from diffusers import StableDiffusionPipeline
p = StableDiffusionPipeline.from_pretrained(sys.argv[1])
for part in (p.unet, p.text_encoder):  # a CPU computes other bits with weights that lie elsewhere in a file
    for tensor in part.parameters():
        tensor.data = tensor.data.clone()
states = p.encode_prompt("a photo of a cat", "cpu", 1, False)[0]
x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(p.unet(x, torch.tensor([700]), states).sample, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.ci
def test_the_folder_predicts_in_a_fresh_process_what_the_erased_model_predicts(run, toy_pipeline_dir, tmp_path):
    change = delta.load(run / "delta.safetensors")
    assert change.component == "text_encoder" and all("encoder.layers." in name for name in change.changed)
    model = load_sd(toy_pipeline_dir)
    view = model.training("text_encoder")
    x, t, prompt = (
        torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([700]),
        ["a photo of a cat"],
    )
    before = model(x, t, model.encode_text(prompt))
    view.put_weights(delta.apply(view.state_of(view.network), change))
    with torch.no_grad():
        expected = model(x, t, model.encode_text(prompt))
    subprocess.run([sys.executable, "-c", PREDICT, str(run), str(tmp_path / "x.pt")], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "x.pt"), expected)
    assert (before - expected).abs().max() > 0.01
    base = load_file(toy_pipeline_dir / UNET)
    assert all(torch.equal(tensor, base[name]) for name, tensor in load_file(run / UNET).items())


def test_apply_and_remove_restore_the_bits(run, toy_pipeline_dir, tmp_path):
    for command, source, output, same in (
        ("apply", toy_pipeline_dir, "again", run),
        ("remove", run, "base", toy_pipeline_dir),
    ):
        main(
            [
                command,
                "--delta",
                str(run / "delta.safetensors"),
                "--model",
                str(source),
                "--output",
                str(tmp_path / output),
            ]
        )
        for file in (TEXT, UNET):
            found, expected = named(tmp_path / output / file), named(Path(same) / file)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        StableDiffusionPipeline.from_pretrained(tmp_path / output)


def test_a_single_file_has_the_erased_text_encoder(run, toy_pipeline_dir, tmp_path):
    """Written with the run, and exported from it later."""
    main(["export", str(run), "--to", "single-file", "--output", str(tmp_path)])
    name, place = f"{run.name}.safetensors", "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    erased, base = (
        named(Path(folder) / TEXT)["encoder.layers.0.mlp.fc1.weight"].half() for folder in (run, toy_pipeline_dir)
    )
    for path in (run / name, tmp_path / name):
        assert torch.equal(load_file(path)[place], erased) and not torch.equal(erased, base)


def test_the_evaluation_loads_folder_and_delta_as_one_and_checks_the_record(run, toy_pipeline_dir):
    from erase.evaluation import sources

    folder = generate.load_model(str(run), device="cpu")
    changed = generate.load_model(str(toy_pipeline_dir), delta_path=str(run / "delta.safetensors"), device="cpu")
    ours, theirs = (generate.model_hashes(model) for model in (folder, changed))
    base = generate.load_model(str(toy_pipeline_dir), device="cpu")
    assert ours == theirs and ours["unet"] == generate.model_hashes(base)["unet"]
    record = sources.run_record(str(run))
    assert record is not None and record.model.part == "text_encoder"
    assert generate.network_hash(folder, ours, record.model) == record.model.result_hash
    assert generate.network_hash(base, generate.model_hashes(base), record.model) == record.model.base_hash


def test_merging_brings_the_text_encoder_of_the_base_back(run, toy_pipeline_dir):
    model, base = (generate.load_model(str(folder), device="cpu") for folder in (run, toy_pipeline_dir))
    given: Any = type("Given", (), {"model": model, "open_base": staticmethod(lambda: base)})
    before = model.encode_text(["a photo of a cat"]).text_states
    with Merge(percents=(100,)).attacked(given, Finding(facts={"percent": 100})):
        merged = model.encode_text(["a photo of a cat"]).text_states
    assert torch.allclose(merged, base.encode_text(["a photo of a cat"]).text_states, atol=1e-5)
    assert not torch.allclose(before, merged, atol=1e-5) and torch.equal(
        model.encode_text(["a photo of a cat"]).text_states, before
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "uce"}, "closed forms change maps of the text states in the UNet; use --scope xattn-kv"),
        ({"null_space": 0.1}, "--null-space is about keys and values of cross-attention, and the scope has none"),
        ({"rank": 4, "mask": "none"}, "--rank 4 does not go with --scope text, which trains the text_encoder"),
        ({"method": "leco"}, "--rank 4, leco's own, does not go with --scope text, which trains the"),
        ({"weights": "bf16"}, "--weights bf16 does not go with --scope text, which trains the text_encoder"),
        ({"save": ("unet",)}, "the form unet has the weights of the unet, and this run changes the text_encoder"),
        ({"save": ("lora",)}, "no LoRA can be written"),
        ({"method": "hirm", "scope": "full"}, "this method trains a text encoder; use --scope text or text-first"),
        ({"scope": "txt"}, "--scope is 'txt'"),
    ],
)
def test_what_has_no_meaning_is_refused_before_the_first_image(toy_pipeline_dir, tmp_path, cache_dir, options, message):
    how = {"scope": "text"} | HOW | options
    if options.get("method") == "uce":
        how = {name: value for name, value in how.items() if name not in HOW} | {"num_samples": 0, "quiet": True}
    with pytest.raises(EraseError, match=message):
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **how)
    assert not (tmp_path / "run").exists() and not list(cache_dir.glob("latents/*"))


def test_a_second_run_changes_the_same_network(run, toy_pipeline_dir, tmp_path):
    message = "changed the text_encoder, but --scope full is of the unet; use a scope of the text_encoder, or give"
    with pytest.raises(EraseError, match=message):
        erase_concept(CONCEPT, base=str(run), output=str(tmp_path / "run"), scope="full", **HOW)


def test_rounding_is_of_the_text_encoder_too(run):
    model = generate.load_model(str(run), device="cpu")
    given: Any = type("Given", (), {"model": model})
    before = model.encode_text(["a photo of a cat"]).text_states
    with Round(kinds=("int4",)).attacked(given, Finding(facts={"kind": "int4"})):
        rounded = model.encode_text(["a photo of a cat"]).text_states
    assert not torch.allclose(before, rounded, atol=1e-5)
    assert torch.equal(model.encode_text(["a photo of a cat"]).text_states, before)
