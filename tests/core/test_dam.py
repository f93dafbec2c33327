import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffora.core.dam import (
    RELAXATIONS,
    comparable,
    discretise,
    discretise_globally,
    entropy,
    initial_gamma,
    modules_per_layer,
    relax,
)
from diffora.core.picture import start_gate


def test_relax_is_equation_11():
    gamma = torch.randn(3, 6, dtype=torch.float64)
    expected = [[math.exp(g) / sum(math.exp(h) for h in row) for g in row] for row in gamma.tolist()]
    torch.testing.assert_close(relax(gamma), torch.tensor(expected, dtype=torch.float64))


def test_relax_gradient_in_float64():
    gamma = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relax, gamma)


def test_sigmoid_gates_are_independent_and_one_half_at_zero():
    gamma = torch.tensor([[0.0, 2.0, -3.0]], dtype=torch.float64)
    expected = [[1 / (1 + math.exp(-g)) for g in (0.0, 2.0, -3.0)]]
    torch.testing.assert_close(relax(gamma, "sigmoid"), torch.tensor(expected, dtype=torch.float64))
    other = gamma.clone()
    other[0, 1] = 5.0
    assert torch.equal(relax(other, "sigmoid")[0, [0, 2]], relax(gamma, "sigmoid")[0, [0, 2]])
    assert not torch.equal(relax(other)[0, [0, 2]], relax(gamma)[0, [0, 2]])


@pytest.mark.parametrize("relaxation", list(RELAXATIONS))
def test_the_start_gate_is_the_gate_of_each_module_at_gamma_zero(relaxation):
    gates = relax(torch.zeros(3, 5, dtype=torch.float64), relaxation)
    expected = {"softmax": 0.2, "scaled_softmax": 1.0, "sigmoid": 0.5}
    assert (gates == start_gate(relaxation, 5)).all() and gates[0, 0] == expected[relaxation]


def test_scaled_gates_have_mean_one_in_layers_of_any_size():
    gamma = initial_gamma(torch.tensor([[True] * 4, [True, False, True, False]])).double()
    gamma = gamma + torch.randn(2, 4, dtype=torch.float64)
    gates, present = relax(gamma, "scaled_softmax"), gamma.isfinite()
    assert [row[has].mean().item() for row, has in zip(gates, present, strict=True)] == pytest.approx([1.0, 1.0])
    assert (gates[~present] == 0).all()
    torch.testing.assert_close(gates, relax(gamma) * torch.tensor([[4.0], [2.0]]))
    assert torch.equal(comparable(gates, [4, 2]), gates)  # they are on one scale already
    free = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: relax(x, "scaled_softmax"), free)
    assert torch.autograd.gradgradcheck(lambda x: relax(x, "scaled_softmax"), free)


def test_an_unknown_relaxation_is_refused():
    with pytest.raises(ValueError, match="relaxation='hard' must be one of softmax, scaled_softmax, sigmoid"):
        relax(torch.zeros(1, 2), "hard")


def test_entropy_runs_from_log_n_to_zero():
    assert entropy(relax(torch.zeros(1, 6))).item() == pytest.approx(math.log(6))
    assert entropy(torch.tensor([[1.0, 0.0, 0.0]])).item() == 0


@pytest.mark.parametrize(
    ("rho", "n", "k"),
    [
        (0.2, 6, 1),
        (0.4, 6, 2),
        (0.5, 6, 3),
        (0.7, 6, 4),
        (0.9, 6, 5),
        (0, 6, 0),
        (1, 6, 6),
        (0.29, 100, 29),
        (0.7, 10, 7),
    ],
)
def test_k_is_the_exact_floor(rho, n, k):
    assert modules_per_layer(rho, n) == k


def test_floating_point_gives_a_wrong_floor():
    assert math.floor(0.29 * 100) == 28  # what modules_per_layer must not do


@pytest.mark.parametrize("rho", [-0.1, 1.01, float("nan")])
def test_rho_outside_its_range_is_refused(rho):
    with pytest.raises(ValueError, match="rho="):
        modules_per_layer(rho, 6)


def test_discretise_takes_the_largest_entries_of_each_row():
    gamma_bar = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.4, 0.05, 0.35, 0.2]])
    assert discretise(gamma_bar, 2).tolist() == [[False, True, False, True], [True, False, True, False]]


def test_discretise_is_equation_14_for_distinct_entries():
    gamma_bar = relax(torch.randn(20, 6))
    for k in range(1, 7):
        threshold = gamma_bar.sort(descending=True).values[:, k - 1 : k]
        assert torch.equal(discretise(gamma_bar, k), gamma_bar >= threshold)


def test_ties_select_the_k_lowest_columns_and_give_a_warning():
    with pytest.warns(UserWarning, match=r"do not separate the top 3 modules in layer\(s\) 0, 1"):
        selected = discretise(torch.full((2, 6), 1 / 6), 3)
    assert selected.tolist() == [[True] * 3 + [False] * 3] * 2


def test_a_tie_above_the_threshold_does_not_matter():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert discretise(torch.tensor([[0.4, 0.4, 0.2]]), 2).tolist() == [[True, True, False]]


def test_global_scope_takes_the_largest_entries_of_all_layers():
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.6, 0.7]])
    assert discretise_globally(scores, 3).tolist() == [[False] * 3, [True] * 3]
    assert discretise_globally(scores, 4).tolist() == [[False, True, False], [True] * 3]


@pytest.mark.filterwarnings("ignore:the scores do not separate")
@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(0, 12))
def test_global_scope_selects_exactly_m_even_with_ties(values, m):
    scores = torch.tensor(values, dtype=torch.float64).view(3, 4)
    selected = discretise_globally(scores, m)
    assert selected.sum() == m
    # Sorted by (score down, position up), the first m: no other rule would do.
    first = sorted(range(12), key=lambda i: (-values[i], i))[:m]
    assert selected.flatten().nonzero().flatten().tolist() == sorted(first)


def test_a_global_tie_warns_only_at_the_threshold():
    scores = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        discretise_globally(scores, 2)
        discretise_globally(scores, 0)
        discretise_globally(scores, 4)
    with pytest.warns(UserWarning, match="do not separate the top 3 modules of the grid"):
        assert discretise_globally(scores, 3).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("m", [-1, 5])
def test_a_size_outside_the_grid_is_refused(m):
    with pytest.raises(ValueError, match="between 0 and the 4 candidates"):
        discretise_globally(torch.zeros(2, 2), m)
