"""Every trained method: the laws of erasure on a toy pipeline, and each formula against an obvious computation."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss

from erase import delta, masks, methods, tensor_files
from erase.concepts import Concept
from erase.data import latents
from erase.data.latents import Data
from erase.errors import EraseError
from erase.families import loading, scope, sd, stored_unet
from erase.files import read_json
from erase.methods import METHODS, balance
from erase.methods.ablation import Ablation
from erase.methods.ascent import GradientAscent
from erase.methods.erasediff import EraseDiff
from erase.methods.esd import ESD
from erase.methods.fmn import ForgetMeNot
from erase.methods.inputs import Batch
from erase.methods.relabel import Relabel
from erase.methods.scissorhands import Scissorhands
from erase.methods.sdd import SelfDistillation
from erase.methods.soft import Soft
from erase.mini import train as mini
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.training import batches, exchanged, loop

TRAINED = [name for name in METHODS if hasattr(methods.load(name), "loss")]
FORMULAS = list({METHODS[name].path: name for name in TRAINED}.values())  # one name of each class
RECIPE = batches.Recipe(num_steps=4, batch_size=2, learning_rate=1e-2, checkpoint_every=2, way_steps=4)
CONCEPT = Concept(
    "cat",
    "object",
    forget=("a photo of a cat", "a kitten"),
    anchor=("a photo of a dog", "a puppy"),
    retain=("a tree",),
)


@pytest.fixture
def model(toy_pipeline_dir) -> sd.Model:
    return loading.load(toy_pipeline_dir)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def gathered(model, cache_dir):
    """Data as a method asks for it, drawn by the toy model."""

    def gather(method: Any, **options: Any) -> Data:
        plan = latents.Plan(
            num_forget=4,
            num_retain=3,
            steps=2,
            guidance=2.0,
            size=8,
            batch_size=4,
            seed=0,
            pictures=getattr(method, "pictures", "concept"),
            retains=getattr(method, "retains", True),
        )
        plan = replace(plan, **options)
        return latents.gather(model, CONCEPT, plan, model_hash="toy", cache_dir=cache_dir, quiet=True)

    return gather


def made(name: str) -> Any:
    """The method, with so few preparing batches and so many new values that a toy shows them."""
    method = methods.make(name, {}, ())
    if isinstance(method, Scissorhands):
        return replace(method, sparsity=0.9, prepare_batches=2)
    return method


def state_of(model: sd.Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}


def erased(folder, method, data, accelerator, path, *, recipe=RECIPE, scope_name="full", density: float | None = 0.5):
    model = loading.load(folder)
    parameters = scope.inside(dict(model.unet.named_parameters()), scope_name)
    shapes = {name: p.shape for name, p in parameters.items()}
    mask = None if density is None else masks.random_mask(shapes, density, seed=0)
    losses = loop.train(model, method, data, parameters, mask, recipe, accelerator, state_path=path, quiet=True)
    return model, mask, parameters, losses


# --- the laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope_name, density", [("full", 0.3), ("xattn-kv", None)])
@pytest.mark.parametrize("name", TRAINED)
def test_the_laws(toy_pipeline_dir, gathered, accelerator, tmp_path, name, scope_name, density):
    """Nothing outside mask and scope moves by one bit, what is inside does and the forget prediction with it; no step
    changes nothing; same seed, same bits; what is saved comes back exactly, and off again.
    """
    method = made(name)
    data = gathered(method)
    base = loading.load(toy_pipeline_dir)
    before = state_of(base)
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([100, 700]), data.text[data.forget.prompt[:2]]

    def once(number: int, steps: int):
        recipe = replace(RECIPE, num_steps=steps, weight_decay=0.01)
        path = tmp_path / f"{number}.pt"
        return erased(
            toy_pipeline_dir, method, data, accelerator, path, recipe=recipe, scope_name=scope_name, density=density
        )

    model, mask, parameters, losses = once(0, 3)
    after = state_of(model)
    assert len(losses) == 3 and all(math.isfinite(value) for step in losses for value in step.values())
    moved = 0
    for key, tensor in after.items():
        same = tensor.view(torch.int32) == before[key].view(torch.int32)
        may_move = torch.zeros_like(same)
        if key in parameters:
            may_move = torch.ones_like(same) if mask is None else mask[key]
        assert same[~may_move].all(), key
        moved += int((~same).sum())
    assert moved > 0
    assert not torch.equal(model(x, t, c), base(x, t, c))
    assert not any(p.requires_grad or p.grad is not None for p in model.unet.parameters())

    nothing, *_ = once(1, 0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in nothing.unet.state_dict().items())
    again, *_ = once(2, 3)
    assert all(torch.equal(tensor, after[key]) for key, tensor in again.unet.state_dict().items())

    path = tmp_path / "delta.safetensors"
    delta.save(path, delta.difference(before, after, {"made_for": "toy"}))
    restored = delta.apply(before, delta.load(path))
    assert all(torch.equal(restored[key], after[key]) for key in after)
    removed = delta.remove(restored, delta.load(path))
    assert all(torch.equal(removed[key], before[key]) for key in before)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", FORMULAS)
def test_interrupted_and_resumed_equals_uninterrupted(
    toy_pipeline_dir, gathered, accelerator, tmp_path, name, monkeypatch
):
    """The cut comes in the fourth step; the last checkpoint is of the second."""
    method = made(name)
    data = gathered(method)
    whole, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "whole.pt")
    step, calls = loop.MaskedAdam.step, []

    def cut(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return step(self, *arguments)

    monkeypatch.setattr(loop.MaskedAdam, "step", cut)
    with pytest.raises(Interrupted):
        erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "cut.pt")
    monkeypatch.setattr(loop.MaskedAdam, "step", step)
    assert len(tensor_files.read_metadata(tmp_path / "cut.pt")["losses"]) == 2
    resumed, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "cut.pt")
    for key, tensor in whole.unet.state_dict().items():
        assert torch.equal(tensor, resumed.unet.state_dict()[key]), key


@pytest.mark.parametrize("name", FORMULAS)
def test_parts_of_a_batch_and_checkpointing_give_what_the_whole_gives(
    toy_pipeline_dir, gathered, accelerator, tmp_path, name
):
    """One step's losses, up to float32 rounding: all are means over pictures."""
    method, results = made(name), []
    if isinstance(method, Scissorhands):
        method = replace(method, sparsity=1 - 1e-3)  # rounding must not choose other weights
    data = gathered(method)
    for accumulation in (1, 2):
        model = loading.load(toy_pipeline_dir)
        parameters = dict(model.unet.named_parameters())
        recipe = replace(RECIPE, num_steps=1, accumulation=accumulation)
        path = tmp_path / f"{accumulation}.pt"
        options = {"state_path": path, "quiet": True, "checkpointing": accumulation > 1}
        results += loop.train(model, method, data, parameters, None, recipe, accelerator, **options)
        assert not model.unet.is_gradient_checkpointing
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_every_method_says_what_it_costs_and_breaks():
    for name in TRAINED:
        text = str(methods.load(name).__doc__)
        assert "=" in text and "Costs" in text and "Known to break" in text, name


# --- the formulas ---------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(model, gathered, accelerator) -> Batch:
    data = gathered(Relabel())
    return next(batches.batches(model, data, replace(RECIPE, batch_size=3), 0, 3, accelerator))


def noise_in(model: sd.Model, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """By diffusers alone."""
    with torch.no_grad():
        return model.unet(x, t, encoder_hidden_states=text).sample


def terms_of(method: Any, model: Any, frozen: Any, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: term.item() for name, term in method.loss(model, frozen, batch)}


@pytest.fixture
def moved_model(toy_pipeline_dir) -> sd.Model:
    """The toy after some training: another model than the frozen one."""
    model = loading.load(toy_pipeline_dir)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


def test_ascent_is_the_negative_diffusion_loss_of_diffusers(model, batch):
    terms = terms_of(GradientAscent(alpha=0.3), model, None, batch)
    seen = noise_in(model, batch.x_forget, batch.t_forget, batch.c_forget)
    kept = noise_in(model, batch.x_retain, batch.t_retain, batch.c_retain)
    assert terms["forget"] == pytest.approx(-mse_loss(seen, batch.eps_forget).item(), rel=1e-6)
    assert terms["retain"] == pytest.approx(0.3 * mse_loss(kept, batch.eps_retain).item(), rel=1e-6)
    assert set(terms_of(GradientAscent(alpha=0), model, None, batch)) == {"forget"}


def test_terms_are_means_so_that_alpha_has_no_unit():
    """P27: the sum over a picture's 3 x 32 x 32 values, which SalUn's DDPM code has in one of its terms, is 3,072 times
    ours."""
    draw = torch.Generator().manual_seed(0)
    shape = (2, 3, 32, 32)
    batch = Batch(**{field.name: torch.randn(shape, generator=draw).double() for field in fields(Batch)})
    predict: Any = lambda x, t, text: x * text  # noqa: E731
    terms = dict(Relabel(alpha=2.0, distill_retain=False).loss(predict, predict, batch))
    seen = (batch.x_forget * batch.c_forget - batch.x_target * batch.c_target).square()
    kept = 2 * (batch.x_retain * batch.c_retain - batch.eps_retain).square()
    for term, squares in (("forget", seen), ("retain", kept)):
        assert squares.sum((1, 2, 3)).mean().item() == pytest.approx(3072 * terms[term].item(), rel=1e-9)


def test_esds_targets_are_those_of_its_code_and_its_paper(model, moved_model, batch):
    x, t = batch.x_forget, batch.t_forget
    c, e = noise_in(model, x, t, batch.c_forget), noise_in(model, x, t, batch.c_empty)
    ours = noise_in(moved_model, x, t, batch.c_forget)
    for method, target in [
        (ESD(2.0, "current"), c - 2 * (c - e)),
        (ESD(0.7, "paper"), e - 0.7 * (c - e)),
        (ESD(1.0, "current"), e),  # the unconditional prediction
        (ESD(2.0, "current"), e - (c - e)),  # which is the paper's with eta = 1
    ]:
        assert terms_of(method, moved_model, model, batch)["forget"] == pytest.approx(
            mse_loss(ours, target).item(), 1e-4
        )
    assert terms_of(ESD(0.0), model, model, batch)["forget"] == pytest.approx(0, abs=1e-12)
    assert terms_of(ESD(1.0), model, model, batch)["forget"] > 1e-8


@pytest.mark.parametrize("end", [True, False])
def test_forget_me_nots_norm_is_that_of_softmax_over_queries_and_keys(model, batch, end):
    """Against attention computed from what goes into each layer; and the model is as it was afterwards."""
    layers = {name: layer for name, layer in model.unet.named_modules() if name.endswith("attn2")}
    inputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, named, name=name: inputs.update({name: (given[0], named["encoder_hidden_states"])}),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    before = noise_in(model, batch.x_forget, batch.t_forget, batch.c_forget)
    for hook in hooks:
        hook.remove()
    where = batch.words | batch.end if end else batch.words
    assert 0 < batch.words[0].sum() < 77 and batch.end[0, -1] and not (batch.words & batch.end).any()
    expected = []
    for row in range(len(where)):
        total = 0.0
        for name, (x, text) in inputs.items():
            layer: Any = layers[name]
            q, k = layer.to_q(x[row]), layer.to_k(text[row])
            width = q.shape[1] // layer.heads
            for h in range(layer.heads):
                part = slice(h * width, (h + 1) * width)
                probabilities = (q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1)
                assert torch.allclose(probabilities.sum(1), torch.ones(len(q)))
                total += probabilities[:, where[row]].square().sum().item()
        expected.append(math.sqrt(total))
    processors = {name: layer.processor for name, layer in layers.items()}
    model.unet.enable_gradient_checkpointing()
    found = terms_of(ForgetMeNot(end), model, None, batch)["forget"]
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert model.unet.is_gradient_checkpointing and len(inputs) == len(layers) > 0
    assert all(layer.processor is processors[name] for name, layer in layers.items())
    assert torch.equal(noise_in(model, batch.x_forget, batch.t_forget, batch.c_forget), before)


def test_forgetting_lowers_the_attention_to_the_words(toy_pipeline_dir, gathered, accelerator, tmp_path):
    data = gathered(ForgetMeNot())
    recipe = replace(RECIPE, num_steps=20)
    *_, losses = erased(toy_pipeline_dir, ForgetMeNot(), data, accelerator, tmp_path / "t.pt", recipe=recipe)
    assert losses[-1]["forget"] < losses[0]["forget"]


def test_the_concepts_words_are_those_that_the_anchor_lacks(gathered, model):
    """The toy's tokens are letters: in 'a photo of a cat' and '... dog' all but the last three are shared."""
    data = gathered(ForgetMeNot())
    assert data.words[0].nonzero().view(-1).tolist() == [10, 11, 12]
    assert data.end[0].nonzero().view(-1).tolist() == list(range(13, 77))
    assert model.tokenizer.convert_ids_to_tokens(model.tokens("a photo of a cat"))[9:] == ["c", "a", "t</w>"]


def test_concept_ablation_names_the_anchors_pictures_as_the_concept(model, moved_model, gathered, accelerator):
    data = gathered(Ablation())
    assert [data.prompts[row] for row in data.forget.prompt[:2]] == list(CONCEPT.forget)
    drawn = model.draw([CONCEPT.anchor[i % 2] for i in range(4)], range(4), steps=2, guidance=2.0, size=8)
    assert torch.equal(data.forget.mean, drawn)
    assert not torch.allclose(gathered(Relabel()).forget.mean, drawn)
    batch = next(batches.batches(model, data, RECIPE, 0, 2, accelerator))
    for is_frozen in (True, False):
        teacher = model if is_frozen else moved_model
        target = noise_in(teacher, batch.x_forget, batch.t_forget, batch.c_target)
        seen = noise_in(moved_model, batch.x_forget, batch.t_forget, batch.c_forget)
        terms = terms_of(Ablation(frozen_target=is_frozen), moved_model, model, batch)
        assert terms == {"forget": pytest.approx(mse_loss(seen, target).item(), rel=1e-5)}
    kept = noise_in(moved_model, batch.x_retain, batch.t_retain, batch.c_retain)
    terms = terms_of(Ablation(alpha=0.5), moved_model, model, batch)
    assert terms["retain"] == pytest.approx(0.5 * mse_loss(kept, batch.eps_retain).item(), rel=1e-5)


def test_self_distillation_aims_at_the_models_own_unconditional_prediction(moved_model, batch):
    x, t = batch.x_forget, batch.t_forget
    expected = mse_loss(noise_in(moved_model, x, t, batch.c_forget), noise_in(moved_model, x, t, batch.c_empty))
    found = terms_of(SelfDistillation(), moved_model, None, batch)
    assert found == {"forget": pytest.approx(expected.item(), rel=1e-5)}


def test_the_teacher_is_the_average_and_the_result(toy_pipeline_dir, gathered, accelerator, tmp_path):
    """After one step it has gone 1 - decay of the way, in float32; the first way is the base's own for any decay."""
    data, results = gathered(SelfDistillation()), {}
    assert not data.forget.mean.any() and len(data.retain) == 1
    for decay in (0.0, 0.75, 1.0):
        method, path = SelfDistillation(decay), tmp_path / f"{decay}.pt"
        recipe = replace(RECIPE, num_steps=1)
        results[decay] = state_of(erased(toy_pipeline_dir, method, data, accelerator, path, recipe=recipe)[0])
    base = stored_unet.load_unet(toy_pipeline_dir).state_dict()
    for key, start in base.items():
        assert torch.equal(results[1.0][key], start)
        expected = start + 0.25 * (results[0.0][key] - start)
        torch.testing.assert_close(results[0.75][key], expected, rtol=1e-6, atol=1e-7)


def test_the_teachers_latents_are_points_on_its_own_way(toy_pipeline_dir, model, gathered, accelerator):
    """Against DDIM with guidance, written out; the way of another model is another."""
    from diffusers import DDIMScheduler

    data, recipe = gathered(SelfDistillation()), replace(RECIPE, way_steps=5, way_guidance=3.0, batch_size=4)
    parameters = dict(model.unet.named_parameters())
    optimizer = loop.MaskedAdam(parameters, None)
    batch = next(batches.batches(model, data, recipe, 1, 4, accelerator, exchanged.Exchanged(model, optimizer)))
    scheduler = DDIMScheduler.from_config(model.scheduler.config)  # pyright: ignore
    scheduler.set_timesteps(5)  # pyright: ignore
    times = scheduler.timesteps.tolist()  # pyright: ignore
    assert len({int(t) for t in batch.t_forget}) > 1
    for row, time in enumerate(batch.t_forget.tolist()):
        x, c, e = (part[row : row + 1] for part in (batch.eps_forget, batch.c_forget, batch.c_empty))
        for t in times[: times.index(time)]:
            at = torch.tensor([t])
            conditional, empty = noise_in(model, x, at, c), noise_in(model, x, at, e)
            x = scheduler.step(empty + 3 * (conditional - empty), t, x).prev_sample  # pyright: ignore
        torch.testing.assert_close(batch.x_forget[row : row + 1], x, rtol=1e-4, atol=1e-4)


def test_trajectories_are_points_of_the_frozen_models_way_under_the_forget_prompt(model, gathered):
    data = gathered(ESD(), num_forget=12, steps=4)
    assert data.forget.t is not None and len(data.retain) == 1
    times = data.forget.t.tolist()
    assert set(times) <= {751, 501, 251, 1} and len(set(times)) == 4
    first = times.index(751)  # no step taken: the noise of this picture's seed
    noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(first))
    assert torch.equal(data.forget.mean[first], noise)


# --- the proximal step ----------------------------------------------------------------------------------------------


def test_the_soft_threshold_has_the_references_values():
    """P15: RandomState(3).randn(101), z = 50; float32 here."""
    moved = {"w": torch.from_numpy(np.random.RandomState(3).randn(101)).float()}
    tau = masks.kth_largest({"w": moved["w"].abs()}, 101 - 50 + 1)
    assert tau == pytest.approx(0.8037660945765764, rel=1e-7)
    Soft(kept=0.5, kept_at_end=0.5).shrink(moved, 0, 1)
    assert int((moved["w"] == 0).sum()) == 50
    assert moved["w"].abs().sum().item() == pytest.approx(27.93604359275173, rel=1e-6)


def test_the_share_that_is_put_back_falls_in_a_straight_line():
    """P15: the reference's own values, of its schedule to zero; ours ends at the share that theirs really ends with."""
    forget, retain, epochs, weights = 121, 1064, 5, 859520964
    steps, method = epochs * (forget + retain), Soft(kept=0.5, kept_at_end=0)
    golden = {(0, 0): 429687948, (0, 120): 420983938, (1, 0): 343735852, (4, 120): 77175553}
    for (epoch, number), z in golden.items():
        assert int(method.share(epoch * (forget + retain) + number, steps) * weights) == z
    assert Soft().share(99, 100) == Soft().kept_at_end == pytest.approx(77175553 / weights, abs=0.001)
    shares = [Soft().share(step, 100) for step in range(100)]
    assert np.allclose(np.diff(shares), (0.09 - 0.5) / 100) and shares[0] < 0.5


def test_what_is_put_back_is_the_bases_bit_for_bit(toy_pipeline_dir, gathered, accelerator, tmp_path):
    """Exactly z weights that may move are the base's after the last step; with a share of zero nearly none are."""
    data = gathered(Soft())
    base = stored_unet.load_unet(toy_pipeline_dir).state_dict()
    for kept in (0.4, 0.0):
        method, path = Soft(kept=0.5, kept_at_end=kept), tmp_path / f"{kept}.pt"
        model, mask, parameters, _ = erased(toy_pipeline_dir, method, data, accelerator, path)
        assert mask is not None
        same = sum(int((p[mask[key]] == base[key][mask[key]]).sum()) for key, p in parameters.items())
        total = masks.count(mask)
        assert same == int(kept * total) if kept else same < 0.01 * total


# --- cutting --------------------------------------------------------------------------------------------------------


def test_scissorhands_renews_exactly_the_most_sensitive_weights(
    toy_pipeline_dir, gathered, accelerator, tmp_path, monkeypatch
):
    """Against |w| sum |grad| from whole gradients; before the first step nothing else has changed."""
    method, density = Scissorhands(sparsity=0.9, prepare_batches=3), 0.5
    data = gathered(method)
    cut: dict[str, torch.Tensor] = {}

    def step(self, *_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(loop.MaskedAdam, "step", step)
    model = loading.load(toy_pipeline_dir)
    parameters = dict(model.unet.named_parameters())
    mask = masks.random_mask({key: p.shape for key, p in parameters.items()}, density, seed=0)
    mask["conv_in.bias"] = torch.zeros_like(mask["conv_in.bias"])  # a tensor that may not move at all
    with pytest.raises(Interrupted):
        path = tmp_path / "t.pt"
        loop.train(model, method, data, parameters, mask, RECIPE, accelerator, state_path=path, quiet=True)
    cut = state_of(model)

    fresh = loading.load(toy_pipeline_dir)
    weights = dict(fresh.unet.named_parameters())
    for parameter in weights.values():
        parameter.requires_grad_(True)
    scores = {key: torch.zeros_like(p) for key, p in weights.items()}
    for number in range(3):
        seen = next(batches.batches(fresh, data, RECIPE, ("prepare", number), 2, accelerator))
        with torch.no_grad():
            target = fresh(seen.x_forget, seen.t_forget, seen.c_target)
        loss = mse_loss(fresh(seen.x_forget, seen.t_forget, seen.c_forget), target)
        for key, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            scores[key] += gradient.abs() * weights[key].detach().abs()
    matrices = [key for key, p in weights.items() if p.dim() > 1]
    flat = torch.cat([scores[key][mask[key]] for key in matrices])
    num = int(len(flat) * (1 - 0.9))
    tau = flat.sort(descending=True).values[num]
    for key, tensor in cut.items():
        renewed = tensor != weights[key]
        expected = (scores[key] > tau) & mask[key] if key in matrices else torch.zeros_like(renewed)
        assert (renewed != expected).float().mean() < 0.01, key  # rounding may swap neighbours at the threshold
        if renewed.any():
            assert tensor[renewed].abs().max() <= math.sqrt(6 / weights[key][0].numel())
    assert sum(int((cut[key] != weights[key]).sum()) for key in cut) == num > 100


# --- balancing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.3, 1.2, math.pi / 2, 2.5])
def test_nash_weights_are_munbas_and_make_both_losses_fall_alike(angle):
    forget, retain = 3.0 * np.array([1.0, 0.0]), 0.2 * np.array([math.cos(angle), math.sin(angle)])
    a, b, d = (float(x) for x in (retain @ retain, retain @ forget, forget @ forget))
    w_f, w_r = balance.nash(d, b, a)
    step = w_f * forget + w_r * retain
    assert step @ forget / 3.0 == pytest.approx(step @ retain / 0.2)
    assert np.linalg.norm(step) == pytest.approx(math.sqrt(2))
    if abs(b) > 1e-9:  # their closed form divides by it
        theirs = math.sqrt((a * d - b * math.sqrt(a * d)) / (a * a * d - a * b * b))
        assert w_r == pytest.approx(theirs) and w_f == pytest.approx((1 - a * theirs**2) / (b * theirs))


def test_gradients_that_are_opposite_or_missing_have_finite_weights():
    assert balance.nash(4.0, -2.0, 1.0) == (1.5, 3.0)
    assert balance.nash(4.0, 0.0, 0.0) == balance.nash(0.0, 0.0, 4.0) == (1.0, 1.0)
    assert balance.projected(4.0, 0.0, 0.0) == (1.0, 1.0)
    assert balance.barrier(0.5, 0.0, 0.0, 1.0) == (0.0, 1.0)


def test_the_constraints_hold_with_the_smallest_change():
    draw = np.random.RandomState(0)
    is_active = set()
    for _ in range(50):
        f, r = draw.randn(2, 3)
        w_f, w_r = balance.projected(f @ f, f @ r, r @ r)
        rest = w_f * f + (w_r - 1) * r  # what is left of the forget gradient
        assert rest @ r >= -1e-9 and (w_r == 1) == (f @ r >= 0)
        lam, one = balance.barrier(0.5, f @ f, f @ r, r @ r)
        step = lam * f + one * r
        assert step @ f >= 0.5 * (f @ f) - 1e-9 and (lam == 0 or step @ f == pytest.approx(0.5 * (f @ f)))
        is_active |= {("gem", w_r > 1), ("bome", lam > 0)}
    assert len(is_active) == 4


@pytest.mark.parametrize(
    "method",
    [
        EraseDiff(balancing="bome"),
        EraseDiff(balancing="nash"),
        EraseDiff(),
        Scissorhands(balancing="gem", prepare_batches=0, sparsity=0.9999),
        Relabel(balancing="nash", frozen_target=False, distill_retain=False),
    ],
    ids=lambda method: f"{type(method).__name__}-{method.balancing}",
)
@pytest.mark.parametrize("density", [0.5, None])
def test_the_loop_weighs_the_gradients_of_masked_weights(
    toy_pipeline_dir, gathered, accelerator, tmp_path, monkeypatch, method, density
):
    """The gradient that the optimizer gets, against whole gradients of each term cut to the mask; in two parts."""
    data, got = gathered(method), []

    def step(self, *_: Any) -> None:
        got.extend(gradient.clone() for gradient in self.gradients())
        raise Interrupted

    monkeypatch.setattr(loop.MaskedAdam, "step", step)
    monkeypatch.delattr(Scissorhands, "prepare")
    recipe = replace(RECIPE, accumulation=2)
    with pytest.raises(Interrupted):
        erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "t.pt", recipe=recipe, density=density)
    model = loading.load(toy_pipeline_dir)
    parameters = dict(model.unet.named_parameters())
    mask = None
    if density is not None:
        mask = masks.random_mask({key: p.shape for key, p in parameters.items()}, density, seed=0)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    batch = next(batches.batches(model, data, RECIPE, 0, 2, accelerator))

    def cut(loss: torch.Tensor) -> torch.Tensor:
        gradients = zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
        return torch.cat([(g if mask is None else g[mask[key]]).reshape(-1) for key, g in gradients])

    f, r = (cut(term) for _, term in method.loss(model, None, batch))
    w_f, w_r = method.balance((f @ f).item(), (f @ r).item(), (r @ r).item()) if method.balance else (1.0, 1.0)
    expected, found = w_f * f + w_r * r, torch.cat([gradient.reshape(-1) for gradient in got])
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_erasediffs_step_is_the_retain_gradient_and_a_tenth_of_the_forget_gradient(model, batch):
    terms = terms_of(EraseDiff(), model, None, batch)
    whole = terms_of(Relabel(alpha=1, frozen_target=False, distill_retain=False), model, None, batch)
    assert terms["forget"] == pytest.approx(0.1 * whole["forget"]) and terms["retain"] == whole["retain"]


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("esd-x", "eta=2", "--set is 'eta=2'; esd-x has guidance=2.0, target=current"),
        ("esd-x", "guidance", "--set is 'guidance'; esd-x has guidance=2.0"),
        ("esd-x", "guidance=much", "--set is 'guidance=much'; it must be a number"),
        ("esd-x", "target=papr", "--set is 'target=papr'; choose current, paper"),
        ("fmn", "end=perhaps", "--set is 'end=perhaps'; it must be true or false"),
        ("scissorhands", "prepare_batches=1.5", "--set is 'prepare_batches=1.5'; it must be a whole number"),
    ],
)
def test_a_wrong_hyperparameter_is_one_line_that_says_what_is_right(name, text, message):
    with pytest.raises(EraseError) as error:
        methods.make(name, {}, (text,))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_hyperparameters_come_from_the_preset_the_options_and_set_in_this_order():
    assert methods.make("ga", {}, ()) == GradientAscent(alpha=0.1)
    assert methods.make("ga", {"alpha": 3.0, "frozen_target": True}, ()) == GradientAscent(alpha=3.0)
    assert methods.make("ga", {"alpha": 3.0}, ("alpha=0",)) == GradientAscent(alpha=0.0)
    assert methods.make("esd-u", {}, ()) == ESD(1.0, "paper")
    assert methods.make("esd-u", {}, ("target=current", "guidance=2")) == ESD(2.0, "current")
    assert methods.make("fmn", {}, ("end=false",)) == ForgetMeNot(end=False)


def test_what_a_methods_name_implies_wins_over_the_recipe_and_loses_to_what_is_given():
    settings = resolve(Settings("church", method="ca", recipe="paper"), "object", {})
    assert (settings.alpha, settings.target, settings.scope, settings.mask) == (0.0, "anchor", "xattn-kv", "none")
    assert (settings.learning_rate, settings.num_train_steps, settings.weight_decay) == (8e-6, 100, 0.01)
    given = Settings("church", method="ca", alpha=2.0, scope="full", mask="random", weight_decay=0.5, batch_size=3)
    of_model = {"methods": {"ca": {"learning_rate": 1e-3, "set": ["alpha=1"]}}, "num_train_steps": 7}
    settings = resolve(replace(given, set=("frozen_target=false",)), "object", of_model)
    assert settings.set == ("frozen_target=false",)  # --alpha wins over the model's own
    assert (settings.alpha, settings.scope, settings.mask, settings.weight_decay) == (2.0, "full", "random", 0.5)
    assert (settings.learning_rate, settings.num_train_steps, settings.batch_size) == (1e-3, 7, 3)
    salun = resolve(Settings("church", recipe="paper"), "object", {})
    assert (salun.alpha, salun.target, salun.weight_decay) == (0.5, "fixed", 0.0)


def test_what_a_method_cannot_use_is_refused(toy_pipeline_dir, gathered, accelerator, tmp_path):
    from erase import erase_concept

    with pytest.raises(EraseError, match="--alpha is 0.5, but esd-x has no retain term"):
        erase_concept(CONCEPT, str(toy_pipeline_dir), method="esd-x", alpha=0.5, output=str(tmp_path / "run"))
    with pytest.raises(EraseError, match="no retain term; leave out --retain-images"):
        gathered(ESD(), retain_images=str(tmp_path))
    for method in (ESD(), SelfDistillation()):
        with pytest.raises(EraseError, match="sees no pictures; leave out --forget-images"):
            gathered(method, forget_images=str(tmp_path))
    with pytest.raises(EraseError, match="--target is fixed, but this method's pictures show the anchor"):
        recipe = replace(RECIPE, target="fixed")
        erased(toy_pipeline_dir, Ablation(), gathered(Ablation()), accelerator, tmp_path / "t.pt", recipe=recipe)


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
def test_a_whole_run_with_a_mask_records_its_method(toy_pipeline_dir, tmp_path, name):
    """--mask saliency needs pictures of the concept, whatever the method itself looks at."""
    from erase import erase_concept

    method = made(name)
    retains = getattr(method, "retains", True)
    concept = CONCEPT if retains else replace(CONCEPT, retain=())
    sizes: dict[str, Any] = dict(num_forget=4, num_retain=2, num_inference_steps=2, num_train_steps=2, batch_size=2)
    few = ("prepare_batches=1", "sparsity=0.5") if isinstance(method, Scissorhands) else ()
    run = erase_concept(
        concept,
        str(toy_pipeline_dir),
        method=name,
        mask="saliency",
        scope="xattn-kv",
        learning_rate=1e-2,
        output=str(tmp_path / "run"),
        num_samples=0,
        save=("delta",),
        set=few,
        quiet=True,
        **sizes,
    )
    assert run.record["method"]["name"] == name
    assert 0 < run.record["weights"]["changed"] <= run.record["mask"]["ones"]
    assert len(run.record["losses"]) == 2
    assert run.record["data"]["num_retain"] == (2 if retains else 1)


def test_the_embedded_models_advice_is_the_same_in_both_places_and_of_known_methods():
    advice = read_json(loading.MINI_DIR / "erase_defaults.json")
    assert advice == mini.DEFAULTS
    for name, settings in advice["methods"].items():
        methods.make(name, {}, settings.get("set", ()))
        Settings("circle", method=name, **settings)
