import itertools
import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffora.core.dam import (
    adapter_parameters,
    discretise,
    discretise_globally,
    entropy,
    expected_adapter_parameters,
    expected_globally,
    extreme_adapter_parameters,
    largest_prefix,
    largest_rank,
    modules_per_layer,
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
    low, high = (counts[36] for counts in extreme_adapter_parameters(shapes, 4, 2))
    assert (low, high) == (239_616, 454_656)
    assert low < 350_000 < high and expected_adapter_parameters(shapes, 3, 4, 2) == 359_417


def test_the_dearest_selection_leaves_every_shared_pair_it_can():
    """FFN in and out everywhere and always the same attention module has fewer parameters: that one is not shared."""
    shapes = [DEBERTA_LAYER] * 12
    mask = torch.zeros(12, 6, dtype=torch.bool)
    mask[:, 4:] = True
    mask[:, 0] = True
    assert adapter_parameters(shapes, mask, 4, 2) == 451_584
    mask[0, :2] = torch.tensor([False, True])
    assert adapter_parameters(shapes, mask, 4, 2) == 454_656


def grids(layers: int, types: int):
    sizes = st.sampled_from([(2, 2), (2, 3), (4, 2), (5, 5)])
    return st.lists(st.lists(sizes, min_size=types, max_size=types), min_size=layers, max_size=layers)


def masks_of(layers, types):
    for flags in itertools.product([False, True], repeat=layers * types):
        yield torch.tensor(flags).view(layers, types)


SHARED = st.sampled_from([None, 1, 3, 20])


@settings(max_examples=25, deadline=None)
@given(grids(3, 2), st.integers(1, 4), SHARED)
def test_extremes_are_those_of_all_selections(shapes, rank, shared_rank):
    counts = [[] for _ in range(7)]
    for mask in masks_of(3, 2):
        counts[int(mask.sum())].append(adapter_parameters(shapes, mask, rank, shared_rank))
    least, most = extreme_adapter_parameters(shapes, rank, shared_rank)
    assert least == [min(c) for c in counts] and most == [max(c) for c in counts]


@settings(max_examples=25, deadline=None)
@given(grids(1, 3), st.integers(1, 4), SHARED, st.integers(0, 3))
def test_extremes_are_exact_for_k_per_layer_where_layers_are_alike(row, rank, shared_rank, k):
    shapes = row * 3
    counts = [
        adapter_parameters(shapes, mask, rank, shared_rank)
        for mask in masks_of(3, 3)
        if mask.sum(-1).tolist() == [k] * 3
    ]
    least, most = extreme_adapter_parameters(shapes, rank, shared_rank)
    assert (least[3 * k], most[3 * k]) == (min(counts), max(counts))


@settings(max_examples=10, deadline=None)
@given(grids(3, 2), SHARED, st.integers(0, 6))
def test_expected_global_count_is_the_mean_over_all_selections(shapes, shared_rank, m):
    counts = [adapter_parameters(shapes, mask, 2, shared_rank) for mask in masks_of(3, 2) if mask.sum() == m]
    assert expected_globally(shapes, m, 2, shared_rank) == round(Fraction(sum(counts), len(counts)))


def test_global_takes_the_largest_entries_wherever_they_are():
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.6, 0.7]])
    assert discretise_globally(scores, 3).tolist() == [[False] * 3, [True] * 3]
    assert discretise_globally(scores, 4).tolist() == [[False, True, False], [True] * 3]


@pytest.mark.filterwarnings("ignore:the scores do not separate")
@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(0, 12))
def test_global_selects_exactly_m_also_with_ties(values, m):
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


@settings(max_examples=50, deadline=None)
@given(grids(3, 2), st.integers(0, 63), SHARED, st.integers(0, 900))
def test_the_rank_is_the_largest_within_the_budget(shapes, bits, shared_rank, budget):
    mask = torch.tensor([bool(bits >> i & 1) for i in range(6)]).view(3, 2)
    rank = largest_rank(shapes, mask, shared_rank, budget)
    if not mask.any():
        assert rank is None
        return
    assert adapter_parameters(shapes, mask, rank + 1, shared_rank) > budget
    assert rank == 0 or adapter_parameters(shapes, mask, rank, shared_rank) <= budget


@settings(max_examples=50, deadline=None)
@given(grids(3, 2), st.permutations(range(6)), st.integers(1, 3), SHARED, st.integers(0, 300))
def test_the_prefix_is_the_largest_within_the_budget(shapes, order, rank, shared_rank, budget):
    scores = torch.tensor(order, dtype=torch.float64).view(3, 2)
    m = largest_prefix(shapes, scores, rank, shared_rank, budget)
    counts = [adapter_parameters(shapes, discretise_globally(scores, n), rank, shared_rank) for n in range(7)]
    fitting = [n for n, count in enumerate(counts) if count <= budget]
    assert m == (max(fitting) if fitting else None)


def test_the_last_module_of_a_type_may_make_a_selection_cheaper():
    shapes = [[(5, 5), (9, 9)]] * 3
    scores = torch.tensor([[0.9, 0.3], [0.8, 0.2], [0.7, 0.1]])
    counts = [adapter_parameters(shapes, discretise_globally(scores, n), 1, 2) for n in range(7)]
    assert counts == [56, 66, 76, 66, 84, 102, 84]
    sizes = [largest_prefix(shapes, scores, 1, 2, budget) for budget in (55, 56, 65, 66, 76, 83, 84)]
    assert sizes == [None, 0, 0, 3, 3, 3, 6]
