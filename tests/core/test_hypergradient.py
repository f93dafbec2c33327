"""The bi-level gradients against closed forms and finite differences, in float64."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from diffora.core.hypergradient import first_order, unrolled

torch.manual_seed(0)
N, M = 4, 3
H = torch.randn(N, N, dtype=torch.float64)
H = H @ H.T + torch.eye(N, dtype=torch.float64)  # Hessian of the training loss in w
C = torch.randn(N, M, dtype=torch.float64)  # its mixed derivative in w and gamma
P = torch.randn(N, N, dtype=torch.float64)
P = P @ P.T  # Hessian of the validation loss in w
Q = torch.randn(N, M, dtype=torch.float64)
q = torch.randn(M, dtype=torch.float64)


def losses(gamma):
    """Quadratics: L_train = w'Hw/2 + w'C gamma, L_valid = w'Pw/2 + w'Q gamma + q'gamma."""

    def train(params):
        (w,) = params
        return w @ H @ w / 2 + w @ C @ gamma

    def valid(params):
        (w,) = params
        return w @ P @ w / 2 + w @ Q @ gamma + q @ gamma

    return train, valid


def leaves():
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(N, dtype=torch.float64, generator=generator, requires_grad=True)
    gamma = torch.randn(M, dtype=torch.float64, generator=generator, requires_grad=True)
    return w, gamma


def test_first_order_is_the_partial_derivative():
    w, gamma = leaves()
    _, valid = losses(gamma)
    torch.testing.assert_close(first_order(valid([w]), gamma), (Q.T @ w + q).detach())
    assert w.grad is None and gamma.grad is None


def test_unrolled_equals_the_closed_form_of_the_quadratic():
    w, gamma = leaves()
    train, valid = losses(gamma)
    xi = 0.1
    stepped = (w - xi * (H @ w + C @ gamma)).detach()
    expected = Q.T @ stepped + q - xi * C.T @ (P @ stepped + Q @ gamma.detach())
    torch.testing.assert_close(unrolled(train, valid, [w], gamma, xi), expected)
    assert w.grad is None and gamma.grad is None


def test_a_weight_that_a_loss_does_not_use_has_no_part_in_the_unrolled_gradient():
    w, gamma = leaves()
    train, valid = losses(gamma)
    idle = torch.ones(2, dtype=torch.float64, requires_grad=True)
    expected = unrolled(train, valid, [w], gamma, 0.1)
    for place in (0, 1):
        params = [idle, w] if place == 0 else [w, idle]
        found = unrolled(
            lambda p, at=1 - place: train([p[at]]), lambda p, at=1 - place: valid([p[at]]), params, gamma, 0.1
        )
        torch.testing.assert_close(found, expected)


def test_two_processes_find_the_unrolled_gradient_of_one():
    """Each has a training loss of its own. The inner step is that of their mean, not one for each."""
    bent = [torch.eye(N, dtype=torch.float64), -torch.eye(N, dtype=torch.float64) / 2]
    meet, present = Barrier(2, timeout=60), [[], []]

    def losses_of(rank, w_gamma):
        train, valid = losses(w_gamma[1])
        return lambda params: train(params) + params[0] @ bent[rank] @ params[0] * w_gamma[1].sum(), valid

    def process(rank):
        def mean(grads):
            present[rank] = grads
            meet.wait()
            found = [(a + b) / 2 for a, b in zip(*present, strict=True)]
            meet.wait()
            return found

        w, gamma = leaves()
        return unrolled(*losses_of(rank, (w, gamma)), [w], gamma, 0.1, mean, mean)

    w, gamma = leaves()
    trains, valid = [losses_of(rank, (w, gamma))[0] for rank in (0, 1)], losses(gamma)[1]
    expected = unrolled(lambda params: sum(train(params) for train in trains) / 2, valid, [w], gamma, 0.1)
    alone = [unrolled(train, valid, [w], gamma, 0.1) for train in trains]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(process, (0, 1)):
            torch.testing.assert_close(found, expected)
    assert (sum(alone) / 2 - expected).norm() > 1e-3 * expected.norm()


def test_unrolled_with_a_zero_step_is_first_order():
    w, gamma = leaves()
    train, valid = losses(gamma)
    torch.testing.assert_close(unrolled(train, valid, [w], gamma, 0.0), first_order(valid([w]), gamma))


def test_unrolled_against_finite_differences_of_the_stepped_loss():
    """On a problem that is not quadratic: the derivative of gamma -> L_valid(w - xi dL_train/dw, gamma)."""
    w, gamma = leaves()
    xi = 0.3

    def train(params, g):
        return (torch.tanh(params[0] @ C) * g).pow(2).sum() + params[0].pow(4).sum() / 4

    def valid(params, g):
        return torch.cosh((params[0] @ Q - g) / 3).sum()

    def stepped_loss(g):
        grad = torch.autograd.grad(train([w], g), w)[0]
        return valid([w - xi * grad], g).detach()

    exact = unrolled(lambda p: train(p, gamma), lambda p: valid(p, gamma), [w], gamma, xi)
    eps = 1e-6
    for j in range(M):
        step = torch.zeros(M, dtype=torch.float64)
        step[j] = eps
        numeric = (stepped_loss(gamma.detach() + step) - stepped_loss(gamma.detach() - step)) / (2 * eps)
        torch.testing.assert_close(exact[j], numeric, rtol=1e-6, atol=1e-8)


def test_many_unrolled_steps_approach_the_true_hypergradient():
    """At the lower level's optimum w*(gamma) = -H^-1 C gamma, the implicit gradient has a closed form. One unrolled
    step from the optimum gives the first term of its Neumann series; xi = H^-1 would give the whole gradient."""
    _, gamma = leaves()
    train, valid = losses(gamma)
    optimum = (-torch.linalg.solve(H, C @ gamma)).detach().requires_grad_()
    implicit = Q.T @ optimum + q - C.T @ torch.linalg.solve(H, P @ optimum + Q @ gamma)
    xi = 0.05
    one_step = unrolled(train, valid, [optimum], gamma, xi)
    series = Q.T @ optimum + q - xi * C.T @ (P @ optimum + Q @ gamma)
    torch.testing.assert_close(one_step, series.detach())
    assert (one_step - implicit).norm() < (first_order(valid([optimum]), gamma) - implicit).norm()


def test_a_gates_gradient_is_zero_if_the_gradient_of_b_is_zero():
    """Gate and B scale the same product g B A x, so g dL/dg = <dL/dB, B>. If B has converged, Gamma has no gradient."""
    torch.manual_seed(2)
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64)
    a = torch.randn(2, 5, dtype=torch.float64)
    gate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(b):
        return ((gate * x @ a.T @ b - y).tanh() ** 2).mean()

    b = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    of_gate, of_b = torch.autograd.grad(loss(b), [gate, b])
    torch.testing.assert_close(gate * of_gate, (of_b * b).sum())
    assert of_gate.abs() > 1e-3
    optimizer = torch.optim.LBFGS(
        [b], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(b)
        value.backward(inputs=[b])
        return value

    optimizer.step(closure)
    assert torch.autograd.grad(loss(b), gate)[0].abs() < 1e-8
