import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffora.core.counts import (
    adapter_parameters,
    expected_adapter_parameters,
    expected_globally,
    extreme_adapter_parameters,
    extremes_by_layer,
    largest_prefix,
    largest_rank,
    present,
)
from diffora.core.dam import discretise_globally

DEBERTA_LAYER = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]


def test_lora_counts_of_the_paper():
    everything = torch.ones(12, 6, dtype=torch.bool)
    assert adapter_parameters([DEBERTA_LAYER] * 12, everything, 2, None) == 331_776
    assert adapter_parameters([DEBERTA_LAYER] * 12, everything, 8, None) == 1_327_104


def test_shared_pairs_count_once_and_only_if_a_module_is_unselected():
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


def test_the_largest_selection_keeps_as_many_shared_pairs_as_it_can():
    """If each layer selects both FFN modules and the same attention module, that module needs no shared pair."""
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
def test_extremes_equal_those_over_all_selections(shapes, rank, shared_rank):
    counts = [[] for _ in range(7)]
    for mask in masks_of(3, 2):
        counts[int(mask.sum())].append(adapter_parameters(shapes, mask, rank, shared_rank))
    least, most = extreme_adapter_parameters(shapes, rank, shared_rank)
    assert least == [min(c) for c in counts] and most == [max(c) for c in counts]


@settings(max_examples=25, deadline=None)
@given(grids(1, 3), st.integers(1, 4), SHARED, st.integers(0, 3))
def test_extremes_are_exact_for_k_per_layer_if_layers_are_equal(row, rank, shared_rank, k):
    shapes = row * 3
    counts = [
        adapter_parameters(shapes, mask, rank, shared_rank)
        for mask in masks_of(3, 3)
        if mask.sum(-1).tolist() == [k] * 3
    ]
    least, most = extreme_adapter_parameters(shapes, rank, shared_rank)
    assert (least[3 * k], most[3 * k]) == (min(counts), max(counts))


@settings(max_examples=40, deadline=None)
@given(grids(3, 3), st.integers(1, 4), SHARED, st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_extremes_by_layer_hold_for_every_selection(shapes, rank, shared_rank, ks):
    sizes = [sum(shape is not None for shape in row) for row in shapes]
    ks = [min(k, size) for k, size in zip(ks, sizes, strict=True)]
    counts = [
        adapter_parameters(shapes, mask, rank, shared_rank)
        for mask in masks_of(3, 3)
        if (mask & present(shapes)).equal(mask) and mask.sum(-1).tolist() == ks
    ]
    least, most = extremes_by_layer(shapes, ks, rank, shared_rank)
    assert least <= min(counts) and most >= max(counts)
    if shared_rank is None:
        assert (least, most) == (min(counts), max(counts))


@settings(max_examples=10, deadline=None)
@given(grids(3, 2), SHARED, st.integers(0, 6))
def test_expected_global_count_is_the_mean_over_all_selections(shapes, shared_rank, m):
    counts = [adapter_parameters(shapes, mask, 2, shared_rank) for mask in masks_of(3, 2) if mask.sum() == m]
    assert expected_globally(shapes, m, 2, shared_rank) == round(Fraction(sum(counts), len(counts)))


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


def test_selecting_the_last_module_of_a_type_can_reduce_the_parameters():
    shapes = [[(5, 5), (9, 9)]] * 3
    scores = torch.tensor([[0.9, 0.3], [0.8, 0.2], [0.7, 0.1]])
    counts = [adapter_parameters(shapes, discretise_globally(scores, n), 1, 2) for n in range(7)]
    assert counts == [56, 66, 76, 66, 84, 102, 84]
    sizes = [largest_prefix(shapes, scores, 1, 2, budget) for budget in (55, 56, 65, 66, 76, 83, 84)]
    assert sizes == [None, 0, 0, 3, 3, 3, 6]
