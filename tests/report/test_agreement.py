"""Agreement of selections beside chance, against all possible selections."""

from itertools import combinations, product

import numpy as np
import pytest

from diffora.report.agreement import stability

THERE = np.array([[True, True, True, True], [True, True, False, False], [False, True, True, True]])


def subsets(places, size):
    return [frozenset(chosen) for chosen in combinations(places, size)]


def all_selections(mask, there, by_layer):
    """Every selection of the same sizes as ``mask``, as sets of places."""
    places = [[(i, j) for j in range(there.shape[1]) if there[i, j]] for i in range(len(there))]
    if not by_layer:
        return subsets([place for layer in places for place in layer], int(mask.sum()))
    of_layers = [subsets(layer, int(row.sum())) for layer, row in zip(places, mask, strict=True)]
    return [frozenset().union(*parts) for parts in product(*of_layers)]


def jaccard(a, b):
    return len(a & b) / len(a | b) if a | b else 1.0


def mask_of(*rows):
    return np.array([[bool(int(flag)) for flag in row] for row in rows])


PAIRS = {
    "equal sizes": (mask_of("1100", "1000", "0110"), mask_of("0110", "0100", "0101")),
    "other sizes": (mask_of("1110", "0000", "0110"), mask_of("1000", "0100", "0000")),
    "an empty one": (mask_of("0000", "0000", "0000"), mask_of("1000", "0000", "0001")),
    "all and some": (THERE, mask_of("1000", "0100", "0100")),
    "two empty ones": (mask_of("0000", "0000", "0000"),) * 2,
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("by_layer", [True, False])
def test_chance_is_the_mean_over_all_pairs_of_selections_of_these_sizes(name, by_layer):
    first, second = PAIRS[name]
    ones, others = (all_selections(mask, THERE, by_layer) for mask in (first, second))
    expected = np.mean([jaccard(a, b) for a in ones for b in others])
    found = stability(np.array([first, second]), by_layer, THERE, draws=400)
    assert found.chance == pytest.approx(expected, rel=1e-12)
    places = [frozenset(zip(*np.nonzero(mask), strict=True)) for mask in (first, second)]
    assert found.jaccard == pytest.approx(jaccard(*places))


def test_p_is_the_share_of_pairs_that_agree_as_well():
    first, second = PAIRS["equal sizes"]
    ones = all_selections(first, THERE, True)
    found = stability(np.array([first, second]), True, THERE, draws=20_000)
    alike = [jaccard(a, b) >= found.jaccard - 1e-9 for a in ones for b in ones]
    assert found.p == pytest.approx(np.mean(alike), abs=0.015)


def test_of_several_selections_the_mean_over_pairs_is_compared():
    masks = np.array(
        [mask_of("1100", "1000", "0110"), mask_of("1000", "0100", "0101"), mask_of("1111", "0000", "0001")]
    )
    pairs = [stability(masks[[i, j]], False, THERE) for i, j in combinations(range(3), 2)]
    found = stability(masks, False, THERE, draws=4000)
    assert found.chance == pytest.approx(np.mean([pair.chance for pair in pairs]))
    assert found.jaccard == pytest.approx(np.mean([pair.jaccard for pair in pairs]))
    assert found.low <= found.chance <= found.high


def test_random_selections_do_not_agree_more_often_than_p_says():
    rng = np.random.default_rng(0)

    def p():
        masks = rng.random((3, 4, 6)).argsort(-1).argsort(-1) < 3
        return stability(masks, True, draws=200).p

    assert np.mean([p() <= 0.05 for _ in range(200)]) <= 0.1
    same = np.repeat(mask_of("110000", "101000", "011000")[None], 4, 0)
    assert stability(same, True).p < 0.01 and stability(same, True).jaccard == 1.0
