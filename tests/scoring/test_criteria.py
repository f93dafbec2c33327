"""The criteria as pure functions."""

import math

import pytest
import torch

from diffora.scoring.criteria import gradient_norm, square_sums, weight_times_activation


def test_gradient_norm_is_frobenius():
    gradient = torch.randn(3, 4, dtype=torch.float64)
    expected = math.sqrt(sum(v * v for row in gradient.tolist() for v in row))
    assert gradient_norm(gradient).item() == pytest.approx(expected, rel=1e-12)


def test_weight_times_activation_against_a_plain_loop_without_padding():
    weight, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    x[mask == 0] = 100.0  # must not count
    tokens = [x[b, t].tolist() for b in range(2) for t in range(5) if mask[b, t]]
    norms = [math.sqrt(sum(token[j] ** 2 for token in tokens) / len(tokens)) for j in range(4)]
    expected = sum(abs(weight[i, j].item()) * norms[j] for i in range(3) for j in range(4)) / 12
    squares, count = square_sums(x, mask)
    assert count == 7
    assert weight_times_activation(weight, squares / count).item() == pytest.approx(expected, rel=1e-12)


def test_square_sums_add_up_over_parts():
    x, mask = torch.randn(6, 5, 4), torch.rand(6, 5) > 0.4
    whole, parts = square_sums(x, mask), [square_sums(x[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(whole[0], sum(p[0] for p in parts))
    assert whole[1] == sum(p[1] for p in parts)


def test_square_sums_of_half_precision_do_not_overflow():
    squares, _ = square_sums(torch.full((1, 2, 3), 1000.0, dtype=torch.float16), torch.ones(1, 2))
    assert squares.tolist() == [2e6] * 3
