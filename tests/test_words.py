"""Robust SalUn and the words that are learned during its training."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy_training as toy
from accelerate import Accelerator
from loaded import load_sd
from toy_training import CONCEPT, RECIPE, erased, gathered, state_of

from erase import erase_concept, methods
from erase.data.latents import Data
from erase.data.prompt_states import with_word
from erase.errors import EraseError
from erase.families import sd
from erase.methods.relabel import Relabel
from erase.methods.robust import Robust
from erase.options.recipes import resolve
from erase.options.settings import Settings
from erase.runs import planning
from erase.training import loop, memory
from erase.training.batches import batches, generator, sample
from erase.training.words import WORD, Words, spread_timesteps, token_of


@pytest.fixture
def model(toy_pipeline_dir) -> sd.StableDiffusion:
    return load_sd(toy_pipeline_dir)


@pytest.fixture
def data(model, cache_dir) -> Data:
    return gathered(model, Robust(), cache_dir)


def learned(model: sd.StableDiffusion, data: Data, method: Robust, share: int = 2, **recipe: Any) -> Words:
    assert method.attack is not None
    return Words(model, method.attack, data, replace(RECIPE, **recipe), share, Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("prompt", "anchor", "expected"),
    [
        ("a photo of a cat", "a photo of a dog", "a photo of a ~"),
        ("a kitten", "a puppy", "a ~"),
        ("a photo of a nude person", "a photo of a person wearing clothes", "a photo of a ~ person"),
        ("nude man on a nude beach", "man on a beach", "~ man on a beach"),
        ("cat", "a photo of a dog", "~"),
        ("a cat", "a cat", "~"),
        ("a cat", "", "~"),
        ("", "a dog", "~"),
    ],
)
def test_a_word_replaces_what_the_anchor_lacks(prompt, anchor, expected):
    assert with_word(prompt, anchor, WORD) == expected


def test_words_begin_at_the_mean_and_at_the_concepts_own_tokens(model, data):
    """Every other word; a word that starts again draws another of these tokens sooner or later."""
    found = learned(model, data, Robust(words=4))
    table = model.token_embeddings.detach()
    own = {tuple(table[token].tolist()) for token in (*model.tokens("cat"), *model.tokens("kitten"))}
    assert [tuple(row) in own for row in found.values["word"].tolist()] == [False, True, False, True]
    assert torch.equal(found.values["word"][0], table.mean(0)) and torch.equal(found.values["word"][2], table.mean(0))
    assert len({tuple(found._start(1, restarts).tolist()) for restarts in range(80)}) == len(own) > 1


def test_words_take_turns_and_start_again(model, data, monkeypatch):
    """Two words, attacked twice after every second step, which start again after three of their own steps."""
    found = learned(model, data, Robust(words=2, attack_every=2, attack_steps=2, restart_after=3))
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(found, "_step", lambda word, number, gradient, halt: taken.append((word, number)))
    said = []
    for step in range(8):
        found.values["word"][0], found.values["word"][1] = 0, 1
        (states,) = found.said(torch.tensor([0]), step)
        said += [w for w in (0, 1) if torch.equal(states.text_states, spoken(model, torch.full((8,), float(w))))]
        found.after(step, None)
    assert taken == [(0, 1), (0, 2), (1, 1), (1, 2), (0, 3), (0, 1), (1, 3), (1, 1)]
    assert said == [0, 0, 0, 0, 1, 1, 0, 0]


def spoken(model: sd.StableDiffusion, vector: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_with(["a photo of a ~"], token_of(model), vector).text_states


@pytest.mark.slow
@pytest.mark.ci
def test_an_attack_lowers_the_diffusion_loss_of_a_model_that_stays(model, data):
    """On a fixed draw of noise; every word, from where it began."""
    method = Robust(words=2, attack_lr=0.3, restart_after=1000)
    found = learned(model, data, method)
    before, network = found.values["word"].clone(), state_of(model)
    for step in range(120):
        found.after(step, None)
    assert all(torch.equal(tensor, network[name]) for name, tensor in model.unet.state_dict().items())
    x, t = data.forget.mean, torch.tensor([100, 400, 600, 900])
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def loss(vector: torch.Tensor) -> float:
        c = model.encode_with(["a photo of a ~", "a ~"] * 2, token_of(model), vector)
        return (model(model.add_noise(x, eps, t), t, c) - eps).square().mean().item()

    for first, last in zip(before, found.values["word"], strict=True):
        assert loss(last) < loss(first)


def test_an_attack_in_parts_is_the_attack_as_a_whole(model, data):
    whole, parts = (learned(model, data, Robust(attack_batch=5), share=share) for share in (5, 2))
    one, other = (each._gradient(1, (0, 0)) for each in (whole, parts))
    assert one.norm() > 0 and torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_a_bad_step_leaves_the_words(model, data):
    """Also where a word would have started again."""
    found = learned(model, data, Robust(words=1, restart_after=2))
    found.after(0, torch.tensor(0))
    kept = {name: tensor.clone() for name, tensor in found.values.items()}
    assert kept["exp_avg"].abs().sum() > 0  # control: it was attacked
    for step in (1, 2, 3):
        found.after(step, torch.tensor(1))
    assert all(torch.equal(found.values[name], tensor) for name, tensor in kept.items())


ONE = replace(CONCEPT, forget=CONCEPT.forget[:1], anchor=CONCEPT.anchor[:1])


def test_training_is_that_of_the_equations(toy_pipeline_dir, tmp_path, monkeypatch):
    """An independent transcription with torch's Adam, over nine steps in which both words start again."""
    monkeypatch.setattr(toy, "CONCEPT", ONE)
    method = Robust(alpha=3, beta=0.7, words=2, attack_steps=2, attack_batch=3, attack_lr=0.05, restart_after=4)
    base, model = load_sd(toy_pipeline_dir), load_sd(toy_pipeline_dir)
    data = gathered(base, method, tmp_path)
    recipe = replace(RECIPE, num_steps=9, schedule="cosine", proportion_empty=0.5)
    token = token_of(base)
    token_rows = [i for i, is_own in enumerate(data.words[0].tolist()) if is_own]
    own = [base.tokens(ONE.forget[0])[place - 1] for place in token_rows]

    def start(word: int, restarts: int) -> torch.Tensor:
        table = base.token_embeddings.detach()
        if word == 0:
            return table.mean(0)
        chosen = torch.randint(len(own), (), generator=generator(recipe.seed, "word", word, restarts))
        return table[own[int(chosen)]].clone()

    def learner(word: int, restarts: int) -> tuple[torch.Tensor, torch.optim.Adam]:
        vector = start(word, restarts).clone().requires_grad_(True)
        return vector, torch.optim.Adam([vector], lr=0.05)

    learners, counts = [learner(0, 0), learner(1, 0)], [0, 0]
    optimizer = torch.optim.Adam(model.unet.requires_grad_(True).parameters(), lr=recipe.learning_rate)  # pyright: ignore
    mse = torch.nn.functional.mse_loss
    for step in range(recipe.num_steps):
        (b,) = batches(model, data, recipe, step, 2, Accelerator(cpu=True))
        vector = learners[(step - 1) % 2 if step else 0][0].detach()
        c_v = model.encode_with(["a photo of a ~"] * 2, token, vector)
        with torch.no_grad():
            y, keep = base(b.x_forget, b.t_forget, b.c_target), base(b.x_retain, b.t_retain, b.c_retain)
        loss = mse(model(b.x_forget, b.t_forget, b.c_forget), y)
        loss += 0.7 * mse(model(b.x_forget, b.t_forget, c_v.each(torch.Tensor.detach)), y)
        loss += 3 * mse(model(b.x_retain, b.t_retain, b.c_retain), keep)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(step)
        optimizer.step()
        word = step % 2
        for taken in range(2):
            if counts[word] and counts[word] % 4 == 0:
                learners[word] = learner(word, counts[word] // 4)
            vector, adam = learners[word]
            draw = generator(recipe.seed, "words", step, taken)
            rows = torch.randint(len(data.forget), (3,), generator=draw)
            x, t = sample(data.forget, rows, draw), spread_timesteps(3, 1000, draw)
            eps = torch.randn(x.shape, generator=draw)
            found = model(model.add_noise(x, eps, t), t, model.encode_with(["a photo of a ~"] * 3, token, vector))
            (vector.grad,) = torch.autograd.grad(mse(found, eps), [vector])
            adam.step()
            counts[word] += 1
    before = state_of(base)
    ours = load_sd(toy_pipeline_dir)
    how: dict[str, Any] = {"state_path": tmp_path / "t.pt", "quiet": True}
    losses = loop.train(
        ours, method, data, dict(ours.unet.named_parameters()), None, recipe, Accelerator(cpu=True), **how
    )
    assert losses[0].keys() == {"forget", "words", "retain"}
    theirs, found = (torch.cat([w.reshape(-1) for w in state_of(one).values()]) for one in (model, ours))
    moved = theirs - torch.cat([w.reshape(-1) for w in before.values()])
    assert (theirs - found).norm() < 1e-4 * moved.norm()


@pytest.mark.slow
@pytest.mark.ci
def test_without_words_it_is_relabelling(toy_pipeline_dir, data, tmp_path):
    """Bit for bit; control: with words it is not."""
    found = [
        state_of(erased(toy_pipeline_dir, method, data, Accelerator(cpu=True), tmp_path / f"{number}.pt")[0])
        for number, method in enumerate((Relabel(alpha=2), Robust(alpha=2, beta=0), Robust(alpha=2)))
    ]
    relabelled, none, robust = found
    assert all(torch.equal(relabelled[name], none[name]) for name in none)
    assert any(not torch.equal(relabelled[name], robust[name]) for name in none)


def test_all_terms_of_one_pass_are_those_of_three(model, data):
    """Values up to rounding, with and without words."""
    frozen = load_sd(model.folder)
    with torch.no_grad():
        for weight in model.unet.parameters():
            weight.mul_(1.1)
    method = Robust(alpha=0.7, beta=0.3)
    assert method.joins
    for said in (None, lambda rows: learned(model, data, method).said(rows, 0)):
        (batch,) = batches(model, data, RECIPE, 0, 2, Accelerator(cpu=True), None, said)
        terms, joined = dict(method.loss(model, frozen, batch)), method.together(model, frozen, batch)
        assert (
            terms.keys() == joined.keys() == ({"forget", "retain"} if said is None else {"forget", "words", "retain"})
        )
        assert all(joined[name].item() == pytest.approx(term.item(), rel=1e-4) for name, term in terms.items())


# --- as an option of a run


def test_the_preset_is_masked_with_a_falling_rate_and_empty_prompts():
    found = resolve(Settings("church", method="salun-robust"), "object", {})
    assert (found.mask, found.scope, found.target) == ("saliency", "full", "anchor")
    assert (found.lr_scheduler, found.proportion_empty_prompts, found.alpha) == ("cosine", 0.5, 5.0)


@pytest.mark.parametrize("name", ["words", "attack_every", "attack_steps", "attack_batch", "restart_after"])
def test_counts_are_at_least_one(name):
    with pytest.raises(EraseError, match=f"^salun-robust has {name}=0; it must be at least 1$"):
        methods.make("salun-robust", {}, (f"{name}=0",))


def test_fp16_is_refused_in_one_line_and_chosen_by_nobody(toy_pipeline_dir, tmp_path):
    with pytest.raises(EraseError, match="^salun-robust learns words by gradients of its own, which --precision fp16"):
        erase_concept(
            CONCEPT,
            str(toy_pipeline_dir),
            method="salun-robust",
            precision="fp16",
            device="cpu",
            output=str(tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()
    settings = Settings("cat", method="salun-robust")
    assert not planning.can_scale(settings, Robust()) and planning.can_scale(settings, Robust(beta=0))


def test_a_method_that_learns_words_must_see_the_concept(toy_pipeline_dir, data, tmp_path):
    class Anchored(Robust):
        images = "anchor"

    with pytest.raises(EraseError, match="^a method with an attack trains on images of the concept"):
        erased(toy_pipeline_dir, Anchored(), data, Accelerator(cpu=True), tmp_path / "t.pt")


@pytest.mark.slow
@pytest.mark.ci
def test_the_estimate_counts_the_text_encoder(tiny_pipeline_dir):
    model = load_sd(tiny_pipeline_dir)
    stored = sum(parameter.nbytes for parameter in model.text_encoder.parameters())
    one, two = (memory.text_passes(model, num) for num in (1, 2))
    assert stored < one < two and two - one == one - stored
    parameters = dict(model.unet.named_parameters())
    needs = []
    for given in ((), ("beta=0",)):
        settings = resolve(Settings("cat", method="salun-robust", set=given), "object", {})
        needs.append(planning.needed_memory(settings, model, parameters)["training"])
    assert needs[0] - needs[1] == memory.text_passes(model, 8)
