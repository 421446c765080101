"""Attack by a learnt word: it trains nothing but the word, and it finds what a model still knows."""

import pytest
import torch
from loaded import load_sd

from erase.errors import EraseError
from erase.evaluation.attacks import learnt_word
from erase.evaluation.attacks.learnt_word import WORD, LearntWord
from erase.families import sd


@pytest.fixture
def model(toy_pipeline_dir) -> sd.StableDiffusion:
    return load_sd(toy_pipeline_dir)


def latents() -> torch.Tensor:
    return torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def state_of(model: sd.StableDiffusion) -> dict[str, torch.Tensor]:
    parts = {"unet": model.unet, "text": model.text_encoder}
    return {f"{part}.{name}": t.clone() for part, module in parts.items() for name, t in module.state_dict().items()}


def test_templates_with_minors_are_refused():
    """An attack generates what it asks for, as any prompt does (2.11)."""
    with pytest.raises(EraseError, match=r"involve minors \('girl' in the attack's templates\)"):
        LearntWord(templates=("a {} of a g1rl",))


def test_learning_changes_no_weight_and_leaves_no_hook(model):
    before = state_of(model)
    vector = learnt_word.learn(model, latents(), LearntWord(num_steps=3), quiet=True)
    after = state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert vector.shape == (8,) and not vector.requires_grad
    assert not model.text_encoder.get_input_embeddings()._forward_hooks
    assert all(p.grad is None for p in (*model.unet.parameters(), *model.text_encoder.parameters()))


def test_the_same_seed_learns_the_same_word_and_another_seed_another(model):
    first, again, other = (
        learnt_word.learn(model, latents(), LearntWord(num_steps=3, seed=seed), quiet=True) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_word_that_was_taught_is_read_as_it_was_while_it_was_learnt(model):
    vector = torch.arange(8.0)
    prompt = LearntWord().prompts(1)
    with torch.no_grad():
        learnt = model.encode_with(prompt, model.tokens(WORD)[0], vector).text_states
    untaught = model.encode_text(prompt)
    learnt_word.teach(model, vector)
    assert torch.equal(model.encode_text(prompt).text_states, learnt)
    assert not torch.equal(untaught.text_states, learnt)


def test_teaching_changes_one_row_only(model):
    before = state_of(model)
    learnt_word.teach(model, torch.zeros(8))
    changed = [name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])]
    (name,) = changed
    rows = (state_of(model)[name] != before[name]).any(1).nonzero().view(-1)
    assert rows.tolist() == model.tokens(WORD)


def test_the_word_lowers_the_loss_that_it_is_learnt_by(model):
    """On a fixed draw of noise the learnt word predicts better than the one it began with."""
    attack = LearntWord(num_steps=40, learning_rate=0.3, batch_size=8)
    x = latents()
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([50, 200, 400, 600, 800, 950])

    def loss(vector: torch.Tensor) -> float:
        learnt_word.teach(model, vector)
        text = model.encode_text(attack.prompts(1)).expand(6)
        with torch.no_grad():
            return (model(model.add_noise(x, eps, t), t, text) - eps).square().mean().item()

    start = model.text_encoder.get_input_embeddings().weight.mean(0).clone()
    learnt = learnt_word.learn(model, x, attack, quiet=True)
    assert loss(learnt) < loss(start)
