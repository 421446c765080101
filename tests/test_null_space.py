"""--null-space: keys and values of retained prompts stay, whatever the method trains."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loaded import load_sd
from toy_training import CONCEPT, RECIPE, gathered, made, state_of

from erase import delta, erase_concept, masks
from erase.data import prompt_states
from erase.errors import EraseError
from erase.families import scope, sd
from erase.methods.inputs import Text
from erase.methods.null_space import null_projector
from erase.methods.relabel import Relabel
from erase.training import batches, loop
from erase.training.null_space import NullSpace

KINDS = ("relabel", "salun-soft", "sdd", "erasediff", "scissorhands")  # each changes weights in another way
SMALL: dict[str, Any] = dict(num_forget=4, num_retain=2, num_inference_steps=2, num_train_steps=3, batch_size=2)
SMALL |= dict(num_samples=0, save=("delta",), quiet=True, learning_rate=1e-2)


def few_states(model: sd.StableDiffusion) -> Text:
    """The toy's prompts, with all but four retained states left out: its text states have 8 dimensions."""
    text = prompt_states.read_text(model, CONCEPT)
    return replace(text, retain=text.retain[:, :3], empty=text.empty[:, :1], runs=((0, 1, 3),))


def trained(
    folder: Path, path: Path, data: Any, method: Any, null: Any, *, density: float | None = None, **recipe: Any
):
    """(model, mask) after training all weights; null: makes the projection from model, parameters and mask."""
    model = load_sd(folder)
    parameters, mask = dict(model.unet.named_parameters()), None
    if density is not None:
        mask = masks.random_mask({n: p.shape for n, p in parameters.items()}, density, 0, by_rows=model.is_text_map)
    how: dict[str, Any] = {"state_path": path, "quiet": True, "null": null and null(model, parameters, mask)}
    loop.train(model, method, data, parameters, mask, replace(RECIPE, **recipe), Accelerator(cpu=True), **how)
    return model, mask


def exactly(model: sd.StableDiffusion, parameters: Any, mask: Any) -> NullSpace:
    return NullSpace(model, few_states(model), 0, parameters, mask)


def farthest(before: sd.StableDiffusion, after: sd.StableDiffusion) -> float:
    """The largest |W' r - W r| / (|W| |r|) over text maps and retained states."""
    text, worst = few_states(before), 0.0
    r = torch.cat([text.kept("all"), text.empty[0].double().T], dim=1)
    old, new = state_of(before), state_of(after)
    for name in filter(before.is_text_map, old):
        moved = ((new[name].double() - old[name].double()) @ r).norm(dim=0)
        worst = max(worst, float((moved / (old[name].double().norm() * r.norm(dim=0))).max()))
    return worst


def test_the_projector_takes_what_no_embedding_has_a_part_in():
    """Three vectors in eight dimensions leave five; with a threshold, also directions in which they are small."""
    draw = torch.Generator().manual_seed(0)
    r = torch.randn(8, 3, generator=draw, dtype=torch.float64)
    P = null_projector(r, 0)
    assert torch.allclose(P, P @ P, atol=1e-12) and torch.allclose(P, P.T) and round(float(P.trace())) == 5
    assert (P @ r).abs().max() < 1e-10
    sizes = torch.linalg.eigvalsh(r @ r.T / 3)
    assert round(float(null_projector(r, float(sizes[-2]) + 1e-6).trace())) == 7


@pytest.mark.parametrize(("name", "density"), [*((name, 0.6) for name in KINDS), ("relabel", None)])
def test_keys_and_values_of_retained_states_stay(toy_pipeline_dir, cache_dir, tmp_path, name, density):
    """To float32's rounding (2^-24 for each of 8 products), for every method and with a mask, which holds as ever."""
    method, base = made(name), load_sd(toy_pipeline_dir)
    data = gathered(base, method, cache_dir)
    model, mask = trained(toy_pipeline_dir, tmp_path / "a", data, method, exactly, density=density)
    assert farthest(base, model) < 3e-7
    before, after = state_of(base), state_of(model)
    assert any(not torch.equal(before[n], after[n]) for n in filter(base.is_text_map, before))
    for key, bits in (mask or {}).items():
        same = before[key].view(torch.int32) == after[key].view(torch.int32)
        assert same[~bits].all()
    without, _ = trained(toy_pipeline_dir, tmp_path / "b", data, method, None, density=density)
    assert farthest(base, without) > 1e-4  # control


def test_training_is_adam_with_a_projection_of_the_change_after_each_step(toy_pipeline_dir, cache_dir, tmp_path):
    """An independent transcription in float64, 20 steps of the relabelling loss over all weights."""
    method, base = Relabel(), load_sd(toy_pipeline_dir)
    data, recipe = gathered(base, method, cache_dir), {"num_steps": 20, "learning_rate": 1e-3, "checkpoint_every": 50}
    model, _ = trained(toy_pipeline_dir, tmp_path / "a", data, method, exactly, **recipe)
    unet, frozen = deepcopy(base.unet).double().requires_grad_(True), deepcopy(base.unet).double()
    adam = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0)
    text = few_states(base)
    r = torch.cat([text.kept("all"), text.empty[0].double().T], dim=1)
    U, sizes, _ = torch.linalg.svd(r)
    U = U[:, int((sizes > 1e-6 * sizes[0]).sum()) :]

    def noise(net: Any, x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        return net(x.double(), t, encoder_hidden_states=c.states.double()).sample

    for step in range(20):
        batch = next(batches.batches(base, data, replace(RECIPE, **recipe), step, 2, Accelerator(cpu=True)))
        x, t = batch.x_forget, batch.t_forget
        with torch.no_grad():
            y = noise(frozen, batch.x_target, t, batch.c_target)
            keep = noise(frozen, batch.x_retain, batch.t_retain, batch.c_retain)
        loss = (noise(unet, x, t, batch.c_forget) - y).square().mean()
        loss = loss + (noise(unet, batch.x_retain, batch.t_retain, batch.c_retain) - keep).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for (name, now), old in zip(unet.named_parameters(), frozen.parameters(), strict=True):
                if "attn2.to_k" in name or "attn2.to_v" in name:
                    now.copy_(old + (now - old) @ U @ U.T)
    plain, _ = trained(toy_pipeline_dir, tmp_path / "b", data, method, None, **recipe)

    def change(net: Any) -> torch.Tensor:
        both = zip(net.parameters(), base.unet.parameters(), strict=True)
        return torch.cat([(new.double() - old.double()).reshape(-1) for new, old in both])

    ours, theirs, other = map(change, (model.unet, unet, plain.unet))
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    assert (other - theirs).norm() / theirs.norm() > 0.01  # control


def test_interrupted_and_resumed_equals_uninterrupted(toy_pipeline_dir, cache_dir, tmp_path, monkeypatch):
    method = Relabel()
    data = gathered(load_sd(toy_pipeline_dir), method, cache_dir)
    whole, _ = trained(toy_pipeline_dir, tmp_path / "whole", data, method, exactly, density=0.6)
    step, calls = loop.MaskedAdam.step, []

    def cut(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(loop.MaskedAdam, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        trained(toy_pipeline_dir, tmp_path / "cut", data, method, exactly, density=0.6)
    monkeypatch.setattr(loop.MaskedAdam, "step", step)
    again, _ = trained(toy_pipeline_dir, tmp_path / "cut", data, method, exactly, density=0.6)
    assert all(torch.equal(tensor, again.unet.state_dict()[key]) for key, tensor in whole.unet.state_dict().items())


@pytest.mark.parametrize("mask", ["saliency", "random", "none"])
def test_a_run_takes_whole_rows_and_says_how_many_directions_there_are(toy_pipeline_dir, tmp_path, mask):
    """At most one row of all keys and values is cut, and the mask has exactly as many ones as ever."""
    how: dict[str, Any] = {**SMALL, "scope": "xattn-kv", "mask": mask, "null_space": 0.5}
    how |= {} if mask == "none" else {"density": 0.3}
    run = erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **how)
    assert 0 < run.record.method["null_space_dimensions"] < run.record.method["of"] == 8
    assert run.record.weights.changed > 0
    with pytest.raises(EraseError, match="differs in --null-space"):
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **{**how, "null_space": 0.4})
    if mask != "none":
        made_mask, _ = masks.load(tmp_path / "run" / "mask.safetensors")
        total = sum(bits.numel() for bits in made_mask.values())
        cut = sum(int((bits.any(1) & ~bits.all(1)).sum()) for bits in made_mask.values())
        assert masks.count(made_mask) == int(total * 0.3) and cut <= 1
        inside = {f"unet.{name}": bits for name, bits in made_mask.items()}
        base = {f"unet.{key}": tensor for key, tensor in load_sd(toy_pipeline_dir).unet.state_dict().items()}
        after = delta.apply(base, delta.load(tmp_path / "run" / "delta.safetensors"))
        assert all(torch.equal(after[key][~bits], base[key][~bits]) for key, bits in inside.items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scope": "selfattn"}, "--null-space is about keys and values of cross-attention, and the scope has none"),
        ({"mask": "none", "rank": 2}, "--rank 2 does not go with --null-space"),
        ({"method": "leco"}, "--rank 4, leco's own, does not go with --null-space"),
        ({"weights": "bf16"}, "--weights bf16 does not go with --null-space"),
        ({"method": "uce"}, "--null-space 0.5 has no effect: uce is a closed form"),
    ],
)
def test_what_it_does_not_go_with_is_refused_before_the_first_image(toy_pipeline_dir, tmp_path, options, told):
    few = {"quiet": True, "null_space": 0.5, **options}
    with pytest.raises(EraseError, match=f"^{told}"):
        erase_concept(CONCEPT, str(toy_pipeline_dir), output=str(tmp_path / "run"), **few)
    assert not (tmp_path / "run").exists()


def test_retained_states_that_fill_all_dimensions_are_refused(toy_pipeline_dir):
    model = load_sd(toy_pipeline_dir)
    text, parameters = few_states(model), dict(model.unet.named_parameters())
    assert NullSpace(model, text, 0, parameters, None).rank == 8 - 3  # control: the start token and two others
    many = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    full = replace(text, retain=many, retain_at=text.retain_at.expand(4, -1))
    with pytest.raises(EraseError, match="^--null-space 0 leaves no direction: the retained prompts fill all 8 dim"):
        NullSpace(model, full, 0, parameters, None)


def test_a_mask_without_whole_rows_is_refused(toy_pipeline_dir):
    model = load_sd(toy_pipeline_dir)
    parameters = scope.inside(dict(model.unet.named_parameters()), "xattn-kv")
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    exactly(model, parameters, mask)  # control
    for bits in mask.values():
        bits[:, 0] = False
    with pytest.raises(EraseError, match="the mask has none; use --mask none"):
        exactly(model, parameters, mask)
