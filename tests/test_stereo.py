"""STEREO: rounds of learned words, then one erasure from the original weights."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import toy_training as toy
from accelerate import Accelerator
from loaded import load_sd
from toy_training import CONCEPT, RECIPE, erased, gathered

from erase.errors import EraseError
from erase.methods.protocol import Turn
from erase.methods.recare import ReCARE
from erase.methods.stereo import Stereo
from erase.options.settings import Settings
from erase.runs.planning import require_retain_rows
from erase.training.batches import batches, generator, sample
from erase.training.words import Words, spread_timesteps, token_of

ONE = replace(CONCEPT, forget=CONCEPT.forget[:1], anchor=CONCEPT.anchor[:1])
HOW: dict[str, Any] = dict(words=2, word_steps=3, word_batch=3, word_lr=0.05, alpha=0.7, strength=1.5)
STEREO, RECARE = Stereo(**HOW, search_guidance=1.2), ReCARE(**HOW, search_guidance=1.2)
RATE, LONG = 1e-3, replace(RECIPE, num_steps=20, learning_rate=1e-3, checkpoint_every=50)


def test_the_erasure_starts_from_the_first_weights_with_a_new_optimizer():
    """Two words and 20 steps: two rounds of six, and the eight that are left."""
    turns = [STEREO.turn(step, 20) for step in range(20)]
    assert turns[0] == Turn(remember=True, rate=0.25) and turns[12] == Turn(rewind=True, renew=True)
    assert {*turns[1:12]} == {Turn(rate=0.25)} and {*turns[13:]} == {Turn()}


def test_batches_hold_the_words_found_so_far(toy_pipeline_dir, cache_dir):
    model = load_sd(toy_pipeline_dir)
    data = gathered(model, STEREO, cache_dir)
    words = Words(model, STEREO.attack, data, LONG, 2, Accelerator(cpu=True))
    attacked = []
    words._step = lambda word, number, gradient, halt: attacked.append((step, word, number))  # pyright: ignore
    num = []
    for step in range(20):
        num.append(len(words.said(torch.tensor([0]), step)))
        words.after(step, None)
    assert num == [0] * 6 + [1] * 6 + [2] * 8
    assert attacked == [(5, 0, 1), (5, 0, 2), (5, 0, 3), (11, 1, 1), (11, 1, 2), (11, 1, 3)]


@pytest.mark.parametrize("method", [STEREO, RECARE])
@pytest.mark.slow
@pytest.mark.ci
def test_training_is_that_of_the_equations(toy_pipeline_dir, tmp_path, monkeypatch, method):
    """An independent transcription in float64 with torch's Adam, 20 steps; from the searched weights it is far away.

    ReCARE erases the words too, and keeps retain prompts on the noised images of the concept.
    """
    monkeypatch.setattr(toy, "CONCEPT", ONE)
    base, accelerator = load_sd(toy_pipeline_dir), Accelerator(cpu=True)
    data = gathered(base, method, tmp_path)
    token, table = token_of(base), base.token_embeddings.detach()
    own = [base.tokens(ONE.forget[0])[i - 1] for i, is_own in enumerate(data.words[0].tolist()) if is_own]
    first = int(torch.randint(len(own), (), generator=generator(0, "word", 1, 0)))
    starts, words = [table.mean(0), table[own[first]]], []
    frozen = deepcopy(base.unet).double()

    def noise(net: Any, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return net(x.double(), t, encoder_hidden_states=states.double()).sample

    def learn(net: Any, step: int, start: torch.Tensor) -> torch.Tensor:
        vector = start.clone().requires_grad_(True)
        adam = torch.optim.Adam([vector], lr=0.05)
        for taken in range(3):
            draw = generator(0, "words", step, taken)
            rows = torch.randint(len(data.forget), (3,), generator=draw)
            x, t = sample(data.forget, rows, draw), spread_timesteps(3, 1000, draw)
            eps = torch.randn(x.shape, generator=draw)
            c = base.encode_with(["a photo of a ~"] * 3, token, vector).text_states
            loss = (noise(net, base.add_noise(x, eps, t), t, c) - eps).square().mean()
            (vector.grad,) = torch.autograd.grad(loss, [vector])
            adam.step()
        return vector.detach()

    def run(*, rewinds: bool) -> torch.Tensor:
        unet = deepcopy(frozen).requires_grad_(True)
        adam = torch.optim.Adam(unet.parameters(), lr=RATE / 4)
        for step in range(20):
            if step == 12:
                unet = deepcopy(frozen).requires_grad_(True) if rewinds else unet
                adam = torch.optim.Adam(unet.parameters(), lr=RATE)
            b = next(batches(base, data, LONG, step, 2, accelerator))
            x, t = b.x_forget, b.t_forget
            x_r, t_r = (x, t) if method is RECARE else (b.x_retain, b.t_retain)
            with torch.no_grad():
                said = [base.encode_with(["a photo of a ~"] * 2, token, word).text_states for word in words]
                e_0, e_a = (noise(frozen, x, t, c.text_states) for c in (b.c_empty, b.c_target))
                e_r = noise(frozen, x_r, t_r, b.c_retain.text_states)
                asked = [b.c_forget.text_states, *said]
                e = [noise(frozen, x, t, c) for c in asked]
            if step < 12:
                losses = [
                    (noise(unet, x, t, c) - (1 - 1.2) * one - 1.2 * e_0).square().mean()
                    for c, one in zip(asked, e, strict=True)
                ]
                loss = torch.stack(losses).mean()
            else:
                target = e_0 + 0.5 * (e_a - e_0) - 2.5 * ((e[1] + e[2]) / 2 - e_0)
                kept = (noise(unet, x_r, t_r, b.c_retain.text_states) - e_r).square().mean()
                erased_by = asked if method is RECARE else asked[:1]
                loss = sum((noise(unet, x, t, c) - target).square().mean() for c in erased_by) / len(erased_by)
                loss = loss + 0.7 * kept
            adam.zero_grad()
            loss.backward()
            adam.step()
            if step in (5, 11):
                words.append(learn(unet, step, starts[len(words)]))
        return torch.cat([p.detach().reshape(-1) for p in unet.parameters()])

    before = torch.cat([p.reshape(-1) for p in frozen.parameters()])
    theirs = run(rewinds=True) - before
    model, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "t", recipe=LONG, density=None)
    ours = torch.cat([p.detach().double().reshape(-1) for p in model.unet.parameters()]) - before
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    words.clear()
    other = run(rewinds=False) - before
    assert (ours - other).norm() > 0.1 * theirs.norm()  # control


def test_settings_out_of_range_are_refused():
    with pytest.raises(EraseError, match="stereo has words=0; it must be at least 1"):
        Stereo(words=0)
    with pytest.raises(EraseError, match="recare has search_rate=0"):
        ReCARE(search_rate=0)


def test_recare_generates_no_retain_images(toy_pipeline_dir, cache_dir, tmp_path):
    """Their names alone are used, so that options about the images are refused."""
    model = load_sd(toy_pipeline_dir)
    retain = gathered(model, RECARE, cache_dir).retain
    assert not retain.mean.any() and gathered(model, STEREO, cache_dir).retain.mean.any()  # control
    assert len(retain.prompt) == 3
    with pytest.raises(EraseError, match="uses retain prompts, not images; give --retain instead of --retain-images"):
        gathered(model, RECARE, cache_dir, retain_images=str(tmp_path))
    with pytest.raises(EraseError, match="--anchor-every is 2, but recare retains prompts on images of the concept"):
        require_retain_rows(Settings(concept="cat", method="recare", anchor_every=2), RECARE)
