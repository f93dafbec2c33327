"""Best updates of a rank, compared with other updates; and bounds, compared with the true errors."""

import math

import pytest
import torch

from diffora.theory.approximation import best_error, best_update, network_bound, orthonormal_error

G = torch.Generator().manual_seed(0)
E = torch.randn(7, 5, dtype=torch.float64, generator=G)


@pytest.mark.parametrize("rank", [0, 1, 3, 5, 9])
def test_best_update_leaves_the_other_singular_values(rank):
    update = best_update(E, rank)
    spectral, frobenius = best_error(E, rank)
    values = torch.linalg.svdvals(E)
    assert torch.linalg.matrix_rank(update) == min(rank, 5)
    assert torch.linalg.matrix_norm(E - update, 2).item() == pytest.approx(spectral, abs=1e-12)
    assert torch.linalg.matrix_norm(E - update).item() == pytest.approx(frobenius, abs=1e-12)
    assert spectral == pytest.approx(values[rank].item() if rank < 5 else 0)


@pytest.mark.parametrize("shape", [(3, 4, 4), (4, 4, 4), (2, 3, 7, 5)])
def test_best_updates_of_a_batch_are_those_of_its_matrices(shape):
    batch = torch.randn(shape, dtype=torch.float64, generator=G)
    each = torch.stack([best_update(e, 2) for e in batch.flatten(0, -3)]).reshape(shape)
    torch.testing.assert_close(best_update(batch, 2), each)


def test_no_other_update_of_the_rank_is_nearer():
    for _ in range(200):
        noise = 0.3 * torch.randn(7, 5, dtype=torch.float64, generator=G)
        other = best_update(best_update(E, 2) + noise, 2)
        assert torch.linalg.matrix_norm(E - other, 2).item() >= best_error(E, 2)[0] - 1e-12
        assert torch.linalg.matrix_norm(E - other).item() >= best_error(E, 2)[1] - 1e-12


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_orthonormal_factors_reach_the_stated_error_and_no_less(scaling):
    u, _, vh = torch.linalg.svd(E, full_matrices=False)
    least = orthonormal_error(E, 2, scaling)
    assert torch.linalg.matrix_norm(E - scaling * u[:, :2] @ vh[:2]).item() == pytest.approx(least)
    for _ in range(200):
        a = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64, generator=G))[0].T
        b = torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64, generator=G))[0]
        assert torch.linalg.matrix_norm(E - scaling * b @ a).item() >= least - 1e-12
    assert least >= best_error(E, 2)[1]


def test_orthonormal_factors_can_be_worse_than_no_update():
    small = 0.1 * E / torch.linalg.matrix_norm(E, 2)
    assert orthonormal_error(small, 2) > torch.linalg.matrix_norm(small)


def network(depth, d=6):
    weights = [torch.randn(d, d, dtype=torch.float64, generator=G) / math.sqrt(d) for _ in range(depth)]
    return weights, [torch.randn(d, dtype=torch.float64, generator=G) for _ in range(depth)]


def forward(weights, biases, x):
    for w, b in zip(weights, biases, strict=True):
        x = (x @ w.T + b).relu()
    return x


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("rank", [0, 2, 6])
def test_the_bound_holds_for_the_adapters_of_its_proof(depth, rank):
    x = torch.randn(4000, 6, dtype=torch.float64, generator=G) @ torch.randn(6, 6, dtype=torch.float64, generator=G)
    moment = x.T @ x / len(x)
    for _ in range(5):
        (target, biases), (frozen, _) = network(depth), network(depth)
        e = [t - w for t, w in zip(target, frozen, strict=True)]
        adapted = [w + best_update(each, rank) for w, each in zip(frozen, e, strict=True)]
        errors = [best_error(each, rank)[0] for each in e]
        gap = forward(adapted, biases, x) - forward(target, biases, x)
        reached = torch.linalg.vector_norm(gap, dim=1).mean().item()
        assert reached <= network_bound(target, biases, errors, moment) + 1e-12
        assert (reached == pytest.approx(0, abs=1e-9)) == (rank == 6)


def test_the_bound_of_one_layer_and_the_printed_beta():
    eye = torch.eye(16).double()
    target, bias = 0.1 * eye, torch.zeros(16).double()
    assert network_bound([target], [bias], [0.2], eye) == pytest.approx(4 * 0.2)
    assert network_bound([target], [bias], [0.2], eye, printed=True) == pytest.approx(2 * 0.2)


def test_the_printed_bound_can_be_too_small():
    """Without the ReLU, 15 of 16 directions keep their error of 0.2 for any update of rank 1."""
    eye = torch.eye(16).double()
    x = torch.randn(20_000, 16, dtype=torch.float64, generator=G)
    reached = torch.linalg.vector_norm(x @ (0.2 * eye - best_update(0.2 * eye, 1)), dim=1).mean().item()
    args = [0.1 * eye], [torch.zeros(16).double()], [0.2], eye
    assert network_bound(*args, printed=True) < reached < network_bound(*args)
