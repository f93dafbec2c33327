"""The regulariser of R-LoRA and the measures of an update, each against a plain float64 computation."""

import numpy as np
import pytest
import torch

from diffora.core.orthogonality import (
    median_sigma,
    numerical_rank,
    orthogonality,
    orthogonality_loss,
    singular_values,
    stable_rank,
)

G = torch.Generator().manual_seed(0)
MATRICES = [torch.randn(r, d, dtype=torch.float64, generator=G) * 0.4 for r, d in [(2, 5), (3, 7), (2, 5), (3, 5)]]


def norms_squared():
    return [np.linalg.norm(m.numpy() @ m.numpy().T - np.eye(len(m)), "fro") ** 2 for m in MATRICES]


def test_squared_is_equation_10():
    assert orthogonality(MATRICES).item() == pytest.approx(sum(norms_squared()), rel=1e-12)


def test_mean_norm_is_the_released_code():
    expected = np.mean(np.sqrt(norms_squared()))
    assert orthogonality(MATRICES, "mean_norm").item() == pytest.approx(expected, rel=1e-12)


def test_gradient_of_equation_10_is_4_times_excess_times_matrix():
    matrices = [m.clone().requires_grad_() for m in MATRICES]
    orthogonality(matrices).backward()
    for m in matrices:
        excess = m.detach() @ m.detach().T - torch.eye(len(m), dtype=torch.float64)
        torch.testing.assert_close(m.grad, 4 * excess @ m.detach())


@pytest.mark.parametrize("form", ["squared", "mean_norm"])
def test_gradient_against_finite_differences(form):
    inputs = [m.clone().requires_grad_() for m in MATRICES]
    assert torch.autograd.gradcheck(lambda *ms: orthogonality(ms, form), inputs)


@pytest.mark.parametrize("form", ["squared", "mean_norm"])
def test_masked_rows_get_no_gradient_and_the_others_get_all_of_it(form):
    rows = [torch.tensor(r) for r in ([1], [0, 2], [0], [2])]
    masked, whole = ([m.clone().requires_grad_() for m in MATRICES] for _ in range(2))
    value = orthogonality(masked, form, rows)
    assert value.item() == pytest.approx(orthogonality(whole, form).item())
    value.backward()
    orthogonality(whole, form).backward()
    for a, b, live in zip(masked, whole, rows, strict=True):
        torch.testing.assert_close(a.grad[live], b.grad[live])
        dead = torch.ones(len(a), dtype=torch.bool)
        dead[live] = False
        assert a.grad[dead].abs().max() == 0 and a.grad[live].abs().max() > 0


def test_orthonormal_rows_have_loss_zero_and_a_finite_gradient():
    q = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64, generator=G))[0].T.contiguous().requires_grad_()
    for form in ("squared", "mean_norm"):
        value = orthogonality([q], form)
        assert value.item() == pytest.approx(0, abs=1e-12)
        (grad,) = torch.autograd.grad(value, q)
        assert torch.isfinite(grad).all()


def pair(rank, deficient=0):
    lora_a, lora_bt = torch.randn(rank, 30, generator=G), torch.randn(rank, 20, generator=G)
    if deficient:
        lora_a[-deficient:] = lora_a[:deficient] * 2
    return lora_a, lora_bt


@pytest.mark.parametrize(("rank", "deficient"), [(1, 0), (4, 0), (6, 2), (25, 0)])
def test_measures_are_those_of_the_whole_matrix(rank, deficient):
    lora_a, lora_bt = pair(rank, deficient)
    delta = 0.5 * lora_bt.double().T @ lora_a.double()
    values = singular_values(lora_a, lora_bt, 0.5)
    full = torch.linalg.svdvals(delta)
    torch.testing.assert_close(values, full[: len(values)], rtol=1e-8, atol=1e-8)
    assert full[len(values) :].sum() < 1e-8
    assert numerical_rank(values, 20, 30) == torch.linalg.matrix_rank(delta.float()) == min(rank - deficient, 20)
    expected = (delta @ delta.T - torch.eye(20).double()).square().sum().item()
    assert orthogonality_loss(values, 20) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-6, 0.5, 1e4])
@pytest.mark.parametrize(("rank", "deficient"), [(1, 0), (4, 0), (6, 2), (25, 0)])
def test_scale_free_measures_are_numpys(rank, deficient, scale):
    lora_a, lora_bt = pair(rank, deficient)
    delta = scale * lora_bt.double().numpy().T @ lora_a.double().numpy()
    full = np.linalg.svd(delta, compute_uv=False)[: min(rank, 20)]  # those of the adapter's directions
    values = singular_values(lora_a, lora_bt, scale)
    assert stable_rank(values) == pytest.approx(np.linalg.norm(delta) ** 2 / full[0] ** 2, rel=1e-10)
    assert median_sigma(values) == pytest.approx(np.median(full / full[0]), rel=1e-6, abs=1e-8)


def test_scale_free_measures_of_equal_directions_are_r_and_one():
    q = torch.linalg.qr(torch.randn(30, 8, generator=G))[0].T
    values = singular_values(q, q, 0.01)
    assert stable_rank(values) == pytest.approx(8, rel=1e-5) and median_sigma(values) == pytest.approx(1, rel=1e-5)
    one = torch.cat([q[:1], 1e-9 * q[1:]])
    values = singular_values(one, q, 3.0)
    assert stable_rank(values) == pytest.approx(1) and median_sigma(values) < 1e-8


def test_the_orthogonality_loss_depends_on_the_scale_and_the_others_do_not():
    """The loss of R-LoRA's fixed point, orthonormal A and B, at R = 40, s = 0.2 and d = 64."""
    q = torch.linalg.qr(torch.randn(64, 40, generator=G).double())[0].T
    at = {s: singular_values(q, q, s) for s in (0.0, 0.2, 1.0)}
    losses = {s: orthogonality_loss(values, 64) for s, values in at.items()}
    assert losses == pytest.approx({0.0: 64, 0.2: 60.864, 1.0: 24})
    assert stable_rank(at[0.2]) == pytest.approx(40) == stable_rank(at[1.0])


def test_a_zero_update_has_rank_0_and_the_orthogonality_loss_of_zero():
    values = singular_values(torch.randn(3, 30), torch.zeros(3, 20), 1.0)
    assert numerical_rank(values, 20, 30) == 0 and orthogonality_loss(values, 20) == pytest.approx(20)
    assert stable_rank(values) == 0 and median_sigma(values) == 0
    values = singular_values(torch.zeros(0, 30), torch.zeros(0, 20), 1.0)
    assert numerical_rank(values, 20, 30) == 0 and orthogonality_loss(values, 20) == pytest.approx(20)
    assert stable_rank(values) == 0 and median_sigma(values) == 0


def test_autocast_does_not_change_the_regulariser():
    """The rows have norm 1.0015, which bfloat16 rounds to 1."""
    q = torch.linalg.qr(torch.randn(64, 8, generator=G))[0].T * 1.0015
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = orthogonality([q])
    assert inside.item() == pytest.approx(8 * (1.0015**2 - 1) ** 2, rel=1e-2)
