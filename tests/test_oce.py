"""OCE against its equation, and the laws that make it what it is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import polar
from test_closed import text as text
from test_closed import weights as weights
from torch import Tensor

from erase.errors import EraseError
from erase.methods.inputs import Text
from erase.methods.oce import OCE, rotation


def values(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: W for name, W in weights.items() if "to_v" in name}


def span(columns: np.ndarray) -> np.ndarray:
    """By QR of the normalised columns, as in the paper."""
    Q, _ = np.linalg.qr(columns / np.linalg.norm(columns, axis=0))
    return Q @ Q.T


@pytest.mark.parametrize("scales", [(20.0, 3.0, 0.0, 1.0), (5.0, 1.0, 2.0, 0.5)])
def test_the_weights_are_those_of_the_equation(text, weights, scales):
    """An independent transcription with numpy's QR and scipy's polar decomposition, in float64."""
    s_e, s_g, s_c, lamb = scales
    method = OCE(erase_scale=s_e, global_scale=s_g, concept_scale=s_c, lamb=lamb)
    new, _ = method.solve(values(weights), text)
    every = torch.cat([text.retain.flatten(0, 1), text.empty[0]]).double().numpy().T
    pick = lambda states, at: np.stack([states[i, int(p)].double().numpy() for i, p in enumerate(at)], 1)  # noqa: E731
    c_e, c_a, k = (
        pick(text.forget, text.forget_at),
        pick(text.anchor, text.anchor_at),
        pick(text.retain, text.retain_at),
    )
    compared = 0
    for name, tensor in values(weights).items():
        W = tensor.double().numpy()
        M = -s_e * span(W @ c_e) @ (np.eye(len(W)) - span(W @ c_a)) + s_g * W @ (every @ every.T / every.shape[1]) @ W.T
        M += s_c * W @ k @ k.T @ W.T + lamb * W @ W.T
        M += 1e-9 * np.eye(len(W))  # a matrix of more rows than columns has directions without any value
        P, _ = polar(M)
        if np.linalg.det(P) > 0:
            assert np.abs(P.T @ W - new[name].numpy()).max() < 1e-6
            compared += 1
        assert np.abs(new[name].numpy() - W).max() > 0.01
    assert compared


def test_norms_and_angles_of_all_values_stay(text, weights):
    for rounds in (0, 2):
        new, notes = OCE(rounds=rounds).solve(values(weights), text)
        assert all(change > 0.01 for change in notes["relative_change"])
        for name, W in values(weights).items():
            W = W.double()
            assert torch.allclose(new[name].T @ new[name], W.T @ W, atol=1e-10)


def test_no_other_rotation_has_a_larger_product(text, weights):
    """Against a thousand random rotations near it and far from it."""
    method, draw = OCE(erase_scale=5, global_scale=1, lamb=0.5), torch.Generator().manual_seed(0)
    W = values(weights)["up.attn2.to_v.weight"].double()
    c_e, c_a = text.pairs("last")
    C_g, k = torch.eye(8, dtype=torch.float64), text.kept("last")
    P = rotation(method, W, c_e, c_a, C_g, k)
    assert torch.allclose(P @ P.T, torch.eye(12, dtype=torch.float64)) and torch.linalg.det(P) > 0

    def product(Q: Tensor) -> float:
        U, s, _ = torch.linalg.svd(W @ c_e / (W @ c_e).norm(dim=0), full_matrices=False)
        V, t, _ = torch.linalg.svd(W @ c_a / (W @ c_a).norm(dim=0), full_matrices=False)
        M = -5 * U @ U.T @ (torch.eye(12, dtype=torch.float64) - V @ V.T) + W @ C_g @ W.T + 0.5 * W @ W.T
        return float((Q * M).sum())

    for number in range(1000):
        A = torch.randn(12, 12, generator=draw, dtype=torch.float64) * (0.01, 0.1, 1.0)[number % 3]
        Q = torch.matrix_exp(A - A.T)
        assert product(Q @ P) <= product(P) + 1e-9


def test_a_round_erases_what_still_led_to_the_concept(text, weights):
    """The derived embeddings are among the erased ones, so a further round gives other weights."""
    one, two = (OCE(rounds=rounds).solve(values(weights), text)[0] for rounds in (0, 1))
    assert all((one[name] - two[name]).abs().max() > 1e-3 for name in one)


def test_settings_out_of_range_are_refused(text: Text):
    assert replace(OCE(), rounds=1).rounds == 1
    every: tuple[dict[str, Any], ...] = ({"rounds": -1}, {"xi": 0}, {"least": 0})
    for wrong in every:
        with pytest.raises(EraseError, match="oce has rounds="):
            OCE(**wrong)
