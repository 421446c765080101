"""Double projections against the paper's equation, and the laws that make it what it is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import null_space, orth
from test_closed import text as text
from test_closed import weights as weights

from erase.errors import EraseError
from erase.methods.double import DoubleProjections
from erase.methods.inputs import Text


def columns(states: torch.Tensor, at: torch.Tensor) -> np.ndarray:
    return np.stack([states[i, int(place)].double().numpy() for i, place in enumerate(at)], axis=1)


@pytest.fixture
def few(text) -> Text:
    """One forget prompt, and retained embeddings that leave a null space: two prompts and one empty state."""
    one = {name: getattr(text, name)[:1] for name in ("forget", "anchor", "forget_at", "anchor_at")}
    two = {name: getattr(text, name)[:2] for name in ("retain", "retain_at")}
    return replace(text, empty=text.empty[:, :1].expand(1, 7, 8), **one, **two)


def test_the_weights_are_those_of_the_equation(few, weights):
    """W (c* - c) x^T / ||x||^2 U_2^T in numpy, for each W; the retained embeddings keep their keys and values."""
    new, notes = DoubleProjections().solve(weights, few)
    c, S = columns(few.forget, few.forget_at), columns(few.anchor, few.anchor_at)
    r = np.concatenate([columns(few.retain, few.retain_at), few.empty[0, :1].double().numpy().T], axis=1)
    U_2, safe = null_space(r.T), orth(S) @ orth(S).T
    x = U_2.T @ c
    assert notes["null_space_dimensions"] == U_2.shape[1] == 5 and notes["safe_dimensions"] == 1
    for name, tensor in weights.items():
        W = tensor.double().numpy()
        theirs = W @ (safe @ c - c) @ x.T / (x**2).sum() @ U_2.T
        ours = new[name].numpy() - W
        assert np.abs(ours - theirs).max() < 1e-10 and np.abs(theirs).max() > 0.01
        assert np.abs(ours @ r).max() < 1e-10
        assert np.abs(new[name].numpy() @ c - W @ safe @ c).max() < 1e-10


def test_every_erased_embedding_goes_to_the_safe_subspace_and_rounds_add_more(text, weights):
    """Three prompts; the rounds' embeddings no longer give what they gave before."""
    told = replace(text, retain=text.retain[:1], retain_at=text.retain_at[:1], empty=text.empty[:, :1].expand(1, 7, 8))
    C, S = columns(told.forget, told.forget_at), columns(told.anchor, told.anchor_at)
    safe = orth(S) @ orth(S).T
    once, twice = (DoubleProjections(rounds=rounds).solve(weights, told)[0] for rounds in (0, 1))
    for name, tensor in weights.items():
        W = tensor.double().numpy()
        assert np.abs(once[name].numpy() @ C - W @ safe @ C).max() < 1e-8
        assert (once[name] - twice[name]).abs().max() > 1e-3


def test_what_cannot_be_solved_is_refused(text, weights):
    with pytest.raises(EraseError, match="dp: the retained prompts fill all 8 dimensions of the text states; raise"):
        DoubleProjections(retain_tokens="all").solve(weights, text)
    wrong: tuple[dict[str, Any], ...] = ({"rounds": -1}, {"xi": 0.0}, {"least": 0.0}, {"threshold": -1.0})
    for one in wrong:
        with pytest.raises(EraseError, match="dp has threshold="):
            DoubleProjections(**one)
