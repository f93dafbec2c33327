"""Gram matrices: exact values against closed forms and samples, inequalities between them, and gradient descent."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffora.theory.gram import (
    TwoLayerNet,
    active_together,
    convergence_bound,
    generalisation_bound,
    gram,
    least_eigenvalue,
    sampled_least_eigenvalue,
    sampled_patterns,
    tangent_kernel,
)

SEEDS = st.integers(0, 2**32 - 1)


def problem(seed, n=6, d=5, batch=()):
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(*batch, n, d, dtype=torch.float64, generator=g), dim=-1)
    gate = torch.rand(*batch, d, dtype=torch.float64, generator=g)
    return x, gate, torch.randn(*batch, d, dtype=torch.float64, generator=g)


def angles(x):
    x = torch.nn.functional.normalize(x, dim=-1)
    return torch.arccos((x @ x.T).clamp(-1, 1))


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_arc_cosine_form_without_pretrained_weights(seed):
    x, gate, w0 = problem(seed)
    for g in (torch.ones_like(gate), gate):
        torch.testing.assert_close(
            active_together(x, g, 0 * w0), (math.pi - angles(x * g)) / (2 * math.pi), atol=2e-8, rtol=0
        )  # arccos near 1 is good to half the digits


def quadrant(h, k, angle):
    """P[U <= h, V <= k] by adaptive integration over U; the correlation is cos(angle)."""
    integrate, stats = pytest.importorskip("scipy.integrate"), pytest.importorskip("scipy.stats")
    rho, q = math.cos(angle), math.sin(angle)
    step = k / rho if abs(rho) > 1e-3 else 0.0  # where the integrand is steepest
    points = sorted({p for p in (step - 20 * q, step - q, step, step + q, step + 20 * q) if -9 < p < h})
    return integrate.quad(
        lambda z: stats.norm.pdf(z) * stats.norm.cdf((k - rho * z) / q), -9, h, points=points, epsabs=1e-13, limit=500
    )[0]


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_probabilities_are_those_of_correlated_normal_variables(seed):
    x, gate, w0 = problem(seed, n=3)
    found = active_together(x, gate, w0)
    h = (x @ w0) / torch.linalg.vector_norm(x * gate, dim=1)
    torch.testing.assert_close(found.diagonal(), torch.special.ndtr(h))
    for i in range(3):
        for j in range(i):
            expected = quadrant(h[i].item(), h[j].item(), angles(x * gate)[i, j].item())
            assert found[i, j].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("angle", [1e-6, 1e-4, 0.01, 0.3, math.pi - 0.03, math.pi - 1e-5])
@pytest.mark.parametrize("w0", [[0.7, 0.2], [-0.3, 2.0], [0.0, 30.0], [1.0, 900.0]])
def test_nearly_parallel_and_opposite_inputs(angle, w0):
    """Here the integrand falls from 1 to 0 within a small part of its range."""
    x = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    w0 = torch.tensor(w0, dtype=torch.float64)
    found = active_together(x, torch.ones(2), w0)[0, 1].item()
    assert found == pytest.approx(quadrant(*(x @ w0).clamp(max=8).tolist(), angle), abs=1e-9)


def test_parallel_inputs_are_active_together():
    x = torch.tensor([[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]])
    found = active_together(x, torch.ones(2), torch.tensor([0.3, 0.1]))
    assert found[0, 1].item() == pytest.approx(found[0, 0].item(), abs=1e-10)
    assert found[0, 2].item() == pytest.approx(0, abs=1e-10)


def test_an_input_that_the_gate_removes_has_the_sign_of_its_pretrained_part():
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 1.0]])
    found = active_together(x, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5]))
    third = torch.special.ndtr(torch.tensor(0.5, dtype=torch.float64))
    expected = torch.stack([torch.tensor([1.0, 0, third]), torch.zeros(3), torch.tensor([third, 0, third])])
    torch.testing.assert_close(found, expected.double(), atol=1e-7, rtol=0)
    assert active_together(x, torch.zeros(2), torch.zeros(2)).eq(1).all()  # 0 >= 0


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_probabilities_are_a_positive_semi_definite_matrix(seed):
    x, gate, w0 = problem(seed, n=8, d=3)
    found = active_together(x, gate, w0)
    assert least_eigenvalue(found) > -1e-12
    assert least_eigenvalue(gram(x, found)) > -1e-12
    assert ((found > -1e-12) & (found <= 1)).all()


def test_a_batch_gives_the_values_of_its_problems():
    x, gate, w0 = problem(0, batch=(2, 3))
    whole = active_together(x, gate, w0)
    kernels = tangent_kernel(x, gate, whole)
    for i in range(2):
        for j in range(3):
            one = active_together(x[i, j], gate[i, j], w0[i, j])
            torch.testing.assert_close(whole[i, j], one)
            torch.testing.assert_close(kernels[i, j], tangent_kernel(x[i, j], gate[i, j], one))


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_sampling_agrees_within_its_error(seed):
    x, gate, w0 = problem(seed)
    exact = active_together(x, gate, w0)
    samples = 20_000
    patterns = sampled_patterns(x, gate, w0, samples, torch.Generator().manual_seed(seed))
    error = (exact * (1 - exact)).clamp(min=0).div(samples).sqrt() + 1 / samples
    assert ((patterns.T @ patterns / samples - exact).abs() < 6 * error).all()
    value, its_error = sampled_least_eigenvalue(x, patterns)
    assert abs(value - least_eigenvalue(gram(x, exact)).item()) < 6 * its_error + 1e-4  # and the downward bias
    assert value == pytest.approx(least_eigenvalue(gram(x, patterns.T @ patterns / samples)).item(), abs=1e-12)


def test_sampled_error_is_the_spread_of_estimates():
    x, gate, w0 = problem(3, n=4)
    g = torch.Generator().manual_seed(0)
    pairs = torch.tensor([sampled_least_eigenvalue(x, sampled_patterns(x, gate, w0, 2000, g)) for _ in range(200)])
    assert pairs[:, 1].mean().item() == pytest.approx(pairs[:, 0].std().item(), rel=0.25)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_kernel_is_never_above_the_papers_matrix(seed):
    x, gate, w0 = problem(seed)
    active = active_together(x, gate, w0)
    assert least_eigenvalue(gram(x, active) - tangent_kernel(x, gate, active)) > -1e-12
    assert least_eigenvalue(tangent_kernel(x, gate, active)) <= least_eigenvalue(gram(x, active)) + 1e-12


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_more_inputs_never_raise_the_least_eigenvalue(seed):
    x, gate, w0 = problem(seed, n=7)
    matrices = [gram(x[:n], active_together(x[:n], gate, w0)) for n in range(1, 8)]
    values = torch.stack([least_eigenvalue(matrix) for matrix in matrices])
    assert (values.diff() <= 1e-12).all()


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_without_pretrained_weights_the_assumption_needs_equal_angles(seed):
    """The diagonals are then equal, so a semi-definite difference must be zero."""
    x, gate, w0 = problem(seed)
    difference = active_together(x, gate, 0 * w0) - active_together(x, torch.ones_like(gate), 0 * w0)
    assert difference.trace().item() == pytest.approx(0, abs=1e-12)
    assert difference.abs().max() > 1e-6
    assert least_eigenvalue(difference) < -1e-7
    even = active_together(x, 0.3 * torch.ones_like(gate), 0 * w0)
    torch.testing.assert_close(even, active_together(x, torch.ones_like(gate), 0 * w0))


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_assumption_needs_inputs_on_which_the_pretrained_neuron_is_active(seed):
    x, gate, w0 = problem(seed, n=3)
    difference = active_together(x, gate, w0) - active_together(x, torch.ones_like(gate), w0)
    off = (x @ w0) < 0
    assert (difference.diagonal()[off] < 0).all() and (difference.diagonal()[~off] > 0).all()


def test_the_theorems_conclusion_about_the_matrices_follows_from_its_assumption():
    x, gate, w0 = problem(11, n=2, d=4, batch=(4000,))
    plain, gated = active_together(x, torch.ones_like(gate), w0), active_together(x, gate, w0)
    holds = least_eigenvalue(gated - plain) >= 0
    assert 10 < holds.sum() < 4000
    assert (least_eigenvalue(gram(x, gated)) >= least_eigenvalue(gram(x, plain)) - 1e-12)[holds].all()


def test_a_net_without_trained_coordinates_breaks_the_claimed_bound():
    """One input on which w0 is active, and Gamma = 0. The assumption holds and the claimed rate is 1, but nothing
    is trained."""
    x, gate, w0 = torch.tensor([[0.6, 0.8]]).double(), torch.zeros(2).double(), torch.tensor([1.0, 1.0]).double()
    plain, gated = active_together(x, torch.ones_like(gate), w0), active_together(x, gate, w0)
    assert least_eigenvalue(gated - plain) > 0
    assert least_eigenvalue(gram(x, gated)).item() == pytest.approx(1)
    net = TwoLayerNet.drawn(256, gate, w0, torch.Generator().manual_seed(0))
    losses = net.descend(x, torch.tensor([1.0]).double(), lr=0.1, steps=50)
    assert losses[-1] == losses[0] and tangent_kernel(x, gate, gated).abs().max() == 0
    assert losses[-1] / losses[0] > convergence_bound(1.0, torch.tensor(5.0))


def test_a_step_of_descent_uses_the_gradient_of_autograd():
    x, gate, w0 = problem(5)
    y = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    net = TwoLayerNet.drawn(32, gate, w0, torch.Generator().manual_seed(2))
    w = net.w.clone().requires_grad_()
    loss = (((w0 + w * gate) @ x.T).relu().T @ net.a / math.sqrt(32) - y).square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, w)
    losses = net.descend(x, y, lr=0.1, steps=1)
    torch.testing.assert_close(net.w, w.detach() - 0.1 * gradient)
    assert losses[0].item() == pytest.approx(2 * loss.item())
    assert losses[1].item() == pytest.approx((net(x) - y).square().sum().item())


def test_a_wide_net_follows_the_kernel_not_the_papers_matrix():
    x, gate, w0 = problem(7, n=4)
    y = torch.tensor([1.0, -1, 1, 1]).double()
    net = TwoLayerNet.drawn(40_000, gate, w0, torch.Generator().manual_seed(0))
    residual = net(x) - y
    time, steps = 4.0, 80
    reached = net.descend(x, y, lr=time / steps, steps=steps)[-1].item()
    active = active_together(x, gate, w0)
    expected = {}
    for name, matrix in (("kernel", tangent_kernel(x, gate, active)), ("paper", gram(x, active))):
        expected[name] = (torch.linalg.matrix_exp(-matrix * time) @ residual).square().sum().item()
    assert reached == pytest.approx(expected["kernel"], rel=0.05)
    assert reached > 1.5 * expected["paper"]


def test_generalisation_terms():
    matrix = torch.diag(torch.tensor([0.5, 0.25, 0.125])).double()
    y = torch.tensor([1.0, -1.0, 2.0]).double()
    fit, worst = generalisation_bound(matrix, y)
    assert fit == pytest.approx(math.sqrt((2 + 4 + 32) / 3))
    assert worst == pytest.approx(math.sqrt(6 / (0.125 * 3)))
    assert generalisation_bound(matrix, torch.tensor([0.0, 0.0, 1.0]).double())[0] <= worst
    with pytest.raises(ValueError, match="singular"):
        generalisation_bound(torch.ones(3, 3).double(), y)
