"""AdvUnlearn: each step trains against a prompt that was learned on its own latents."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loaded import load_sd
from test_text_scope import flat
from toy_training import RECIPE, erased, gathered

from erase import erase_concept
from erase.errors import EraseError
from erase.methods.advunlearn import AdvUnlearn
from erase.options.settings import Settings
from erase.runs.planning import can_scale
from erase.training.batches import batches, generator

METHOD = AdvUnlearn(guidance=1.2, alpha=0.7, warm_up=6, attack_steps=3, attack_lr=0.05)
RATE, LONG = 1e-3, replace(RECIPE, num_steps=20, learning_rate=1e-3, checkpoint_every=50)


@pytest.mark.parametrize("fast", [False, True])
def test_training_is_that_of_the_equations(toy_pipeline_dir, tmp_path, fast):
    """In float64 with torch's Adam for weights and prefixes, 20 steps; without the attack it is far away."""
    base, accelerator, method = load_sd(toy_pipeline_dir), Accelerator(cpu=True), replace(METHOD, fast=fast)
    data = gathered(base, method, tmp_path)
    view: Any = load_sd(toy_pipeline_dir).for_scope("text")
    unet, frozen = deepcopy(base.unet).double(), deepcopy(base.text_encoder).double()
    table = base.token_embeddings.detach().double()

    def noise(encoder: Any, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        put = encoder.get_input_embeddings().register_forward_hook(lambda *_: embeddings.double())
        states = encoder(torch.zeros(embeddings.shape[:2], dtype=torch.int64)).last_hidden_state
        put.remove()
        return unet(x.double(), t, encoder_hidden_states=states).sample

    def run(*, attacks: bool) -> torch.Tensor:
        text = deepcopy(frozen)
        trained = [p.requires_grad_(True) for name, p in text.named_parameters() if name.startswith("encoder.")]
        adam = torch.optim.Adam(trained, lr=RATE)
        for step in range(20):
            view.network.load_state_dict(text.state_dict())
            b = next(batches(view, data, LONG, step, 2, accelerator, lambda: nullcontext(view)))
            x, t, c = b.x_forget, b.t_forget, b.c_forget.text_states
            with torch.no_grad():
                e_f, e_0 = noise(frozen, x, t, c), noise(frozen, x, t, b.c_empty.text_states)
                e_r = noise(frozen, b.x_retain, b.t_retain, b.c_retain.text_states)
            if step >= 6 and attacks:
                starts = torch.randint(len(table), (2,), generator=generator(0, "prefix", step))
                a = table[starts][:, None].requires_grad_(True)
                attack = torch.optim.Adam([a], lr=0.05)
                for _ in range(3):
                    said = torch.cat([c[:, :1], a, c[:, 1:-1]], 1)
                    loss = (noise(text, x, t, said) - e_f).square().mean() * 2
                    (a.grad,) = torch.autograd.grad(loss, [a])
                    if fast:
                        a.grad.sign_()
                    attack.step()
                c = torch.cat([c[:, :1], a.detach(), c[:, 1:-1]], 1)
            loss = (noise(text, x, t, c) - e_0 + 1.2 * (e_f - e_0)).square().mean()
            kept = noise(text, b.x_retain, b.t_retain, b.c_retain.text_states)
            loss = loss + 0.7 * (kept - e_r).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        return flat(text) - flat(frozen)

    theirs, without = run(attacks=True), run(attacks=False)
    how: dict[str, Any] = {"recipe": LONG, "density": None}
    model, *_ = erased(toy_pipeline_dir, method, data, accelerator, tmp_path / "t", **how)
    ours = flat(model.text_encoder) - flat(frozen)
    assert (ours - theirs).norm() < 2e-3 * theirs.norm()
    assert (ours - without).norm() > 0.05 * theirs.norm()  # control


def test_it_trains_other_scopes_too_and_says_how_many_steps_it_needs(toy_pipeline_dir, tmp_path, capsys):
    """With a scope of the UNet the prompts behind the prefixes are encoded by the text encoder as it is."""
    how: dict[str, Any] = dict(num_forget=2, num_retain=2, num_inference_steps=2, num_train_steps=2, batch_size=2)
    run = erase_concept(
        "cat", str(toy_pipeline_dir), kind="object", method=METHOD, scope="xattn", output=str(tmp_path / "run"),
        set={"warm_up": 1}, num_samples=0, save=("delta",), quiet=True, learning_rate=1e-2, device="cpu", **how,
    )  # fmt: skip
    assert run.record.model.part == "unet" and run.record.weights.changed
    assert METHOD.least_steps == 7 and replace(METHOD, attack_steps=0).prefix is None


def test_settings_out_of_range_are_refused():
    every: tuple[dict[str, Any], ...] = ({"warm_up": -1}, {"attack_steps": -1}, {"attack_lr": 0.0})
    for wrong in every:
        with pytest.raises(EraseError, match="advunlearn has warm_up="):
            AdvUnlearn(**wrong)
    assert not can_scale(Settings(concept="cat", method="advunlearn"), METHOD)
