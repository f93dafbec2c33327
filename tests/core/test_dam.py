import itertools
import math
import warnings

import pytest
import torch

from diffora.core.dam import (
    adapter_parameters,
    cheapest_and_dearest,
    discretise,
    entropy,
    expected_adapter_parameters,
    modules_per_layer,
    random_selection,
    relax,
)

DEBERTA_LAYER = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]


def test_relax_is_equation_11():
    gamma = torch.randn(3, 6, dtype=torch.float64)
    expected = [[math.exp(g) / sum(math.exp(h) for h in row) for g in row] for row in gamma.tolist()]
    torch.testing.assert_close(relax(gamma), torch.tensor(expected, dtype=torch.float64))


def test_relax_gradient_in_float64():
    gamma = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relax, gamma)


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


def test_floats_would_get_the_floor_wrong():
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


def test_ties_give_exactly_k_lowest_columns_and_a_warning():
    with pytest.warns(UserWarning, match=r"does not separate the top 3 modules in layer\(s\) 0, 1"):
        selected = discretise(torch.full((2, 6), 1 / 6), 3)
    assert selected.tolist() == [[True] * 3 + [False] * 3] * 2


def test_a_tie_above_the_threshold_is_no_tie():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert discretise(torch.tensor([[0.4, 0.4, 0.2]]), 2).tolist() == [[True, True, False]]


def test_random_selection_has_k_per_layer_and_depends_on_the_seed():
    one, two = random_selection(12, 6, 3, seed=0), random_selection(12, 6, 3, seed=1)
    assert one.sum(-1).tolist() == [3] * 12
    assert torch.equal(one, random_selection(12, 6, 3, seed=0)) and not torch.equal(one, two)


def test_lora_counts_of_the_paper():
    everything = torch.ones(12, 6, dtype=torch.bool)
    assert adapter_parameters([DEBERTA_LAYER] * 12, everything, 2, None) == 331_776
    assert adapter_parameters([DEBERTA_LAYER] * 12, everything, 8, None) == 1_327_104


def test_shared_pairs_count_once_and_only_where_something_is_unselected():
    shapes = [[(4, 4), (4, 8)]] * 3
    mask = torch.tensor([[True, False], [True, False], [True, False]])
    assert adapter_parameters(shapes, mask, 3, 2) == 3 * 3 * 8 + 2 * 12
    assert adapter_parameters(shapes, mask, 3, None) == 3 * 3 * 8


def test_shared_pairs_are_one_per_shape():
    assert adapter_parameters([[(4, 4)], [(4, 6)]], torch.zeros(2, 1, dtype=torch.bool), 1, 1) == 8 + 10


@pytest.mark.parametrize("shared_rank", [None, 2])
def test_expected_count_is_the_mean_over_all_selections(shared_rank):
    shapes = [[(4, 4), (4, 8), (8, 4)]] * 2
    rows = [row for row in itertools.product([False, True], repeat=3) if sum(row) == 2]
    counts = [
        adapter_parameters(shapes, torch.tensor(mask), 3, shared_rank) for mask in itertools.product(rows, repeat=2)
    ]
    assert expected_adapter_parameters(shapes, 2, 3, shared_rank) == round(sum(counts) / len(counts))


def test_diffora_count_of_the_paper_lies_between_the_extremes():
    shapes = [DEBERTA_LAYER] * 12
    low, high = (adapter_parameters(shapes, mask, 4, 2) for mask in cheapest_and_dearest(shapes, 3))
    assert (low, high) == (239_616, 451_584)
    assert low < 350_000 < high and expected_adapter_parameters(shapes, 3, 4, 2) == 359_417
