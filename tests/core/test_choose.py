"""From scores to a selection: scope, budget, random scores."""

import pytest
import torch

from diffora.core.choose import choose
from diffora.core.counts import adapter_parameters
from diffora.core.dam import discretise, discretise_globally
from diffora.core.draws import random_scores

SHAPES = [[(8, 8), (8, 8), (8, 32)]] * 2
SCORES = torch.tensor([[0.3, 0.1, 0.6], [0.9, 0.8, 0.7]])


def test_layer_scope_selects_the_best_of_each_layer():
    choice = choose(SCORES, SHAPES, "layer", 0.4, 4, None)
    assert choice.mask.tolist() == [[False, False, True], [True, False, False]]
    assert (choice.k, choice.rank, choice.rank_at_width) == (1, None, False)


def test_global_scope_selects_the_best_of_the_grid():
    choice = choose(SCORES, SHAPES, "global", 0.5, 4, None)
    assert choice.mask.tolist() == [[False] * 3, [True] * 3]
    assert (choice.k, choice.rank) == (None, None)


def test_with_layer_scope_a_budget_sets_the_rank():
    choice = choose(SCORES, SHAPES, "layer", 0.4, 1, None, budget=200)
    assert choice.rank == 3 and not choice.rank_at_width  # 40 and 16 parameters at rank 1
    assert choice.mask.tolist() == choose(SCORES, SHAPES, "layer", 0.4, 1, None).mask.tolist()


def test_the_rank_stops_at_the_smallest_width_of_a_selected_module():
    choice = choose(SCORES, SHAPES, "layer", 0.4, 1, None, budget=10_000)
    assert choice.rank == 8 and choice.rank_at_width
    exact = choose(SCORES, SHAPES, "layer", 0.4, 1, None, budget=8 * 56)
    assert exact.rank == 8 and not exact.rank_at_width
    narrow = choose(SCORES[:1, :2], [[(8, 8), (4, 8)]], "layer", 1.0, 1, None, budget=10_000)
    assert narrow.rank == 4 and narrow.rank_at_width


def test_with_global_scope_a_budget_sets_the_number_of_modules():
    choice = choose(SCORES, SHAPES, "global", 0.0, 2, 1, budget=200)
    cost = adapter_parameters(SHAPES, choice.mask, 2, 1)
    more = discretise_globally(SCORES, int(choice.mask.sum()) + 1)
    assert cost <= 200 < adapter_parameters(SHAPES, more, 2, 1) and choice.rank is None


@pytest.mark.parametrize(("scope", "shared_rank"), [("layer", None), ("global", 4)])
def test_a_budget_too_small_for_any_selection_is_refused(scope, shared_rank):
    with pytest.raises(ValueError, match="a budget of 5 parameters is too small"):
        choose(SCORES, SHAPES, scope, 0.4, 4, shared_rank, budget=5)


def test_an_empty_selection_has_no_rank():
    assert choose(SCORES, SHAPES, "layer", 0.0, 4, 2, budget=1000).rank is None


def test_random_scores_depend_on_the_seed_alone():
    one, two = random_scores(12, 6, seed=0), random_scores(12, 6, seed=1)
    assert torch.equal(one, random_scores(12, 6, seed=0)) and not torch.equal(one, two)
    assert discretise(one, 3).sum(-1).tolist() == [3] * 12


def test_a_random_global_selection_is_not_even_over_the_layers():
    selected = discretise_globally(random_scores(12, 6, seed=0), 36)
    assert selected.sum() == 36 and len(set(selected.sum(-1).tolist())) > 1
