"""Ensembles: standardised scores, and the confidence of each module, against independent computations."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from diffora.core import ensemble
from diffora.core.certainty import certainty, is_decided
from diffora.core.dam import RELAXATIONS, discretise, discretise_globally
from diffora.core.ensemble import confidence, log_gates, member_seed, standardised

ALL = torch.ones(3, 4, dtype=torch.bool)
SOME = torch.tensor([[True, True, True, True], [True, True, False, False], [False, True, True, True]])


@pytest.mark.parametrize("present", [ALL, SOME])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_standardised_scores_are_those_of_numpy(present, scope):
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) * 7 + 100
    found = standardised(scores.masked_fill(~present, float("nan")), present, scope).numpy()
    values, known = scores.double().numpy(), present.numpy()
    expected = np.zeros((3, 4))
    for row in range(3) if scope == "layer" else [slice(None)]:
        those = values[row][known[row]]
        expected[row] = np.where(known[row], (values[row] - those.mean()) / those.std(), 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_equal_scores_become_0_and_one_alone_in_its_layer_too():
    assert standardised(torch.full((3, 4), 0.1), ALL, "layer").eq(0).all()
    alone = torch.tensor([[True, False], [True, True]])
    assert standardised(torch.tensor([[5.0, 9.0], [1.0, 3.0]]), alone, "layer").tolist() == [[0, 0], [-1, 1]]


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_logarithms_of_gates_are_gamma_up_to_a_constant_of_each_layer(name):
    gamma = torch.randn(3, 4, dtype=torch.float64)
    found = log_gates(RELAXATIONS[name](gamma), name, [4] * 3)
    shift = found - gamma
    torch.testing.assert_close(shift, shift.mean(-1, keepdim=True).expand(3, 4))
    assert name == "softmax" or shift.abs().max() < 1e-9


def test_gates_of_layers_of_different_sizes_are_compared_with_their_start():
    start = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3]])
    assert log_gates(start, "softmax", SOME.sum(-1).tolist())[SOME].abs().max() < 1e-6


def test_a_closed_gate_stays_finite():
    assert log_gates(torch.tensor([[0.0, 1.0]]), "sigmoid", [2]).isfinite().all()
    assert log_gates(torch.tensor([[0.0, 1.0]]), "softmax", [2]).isfinite().all()


def test_seeds_of_members_are_all_different_and_the_first_is_the_runs():
    seeds = [member_seed(seed, member) for seed in range(20) for member in range(20)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32
    assert [member_seed(seed, 0) for seed in (0, 7)] == [0, 7]


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("gap", [0.0, 0.4, 1.5])
def test_of_two_modules_one_is_selected_with_the_probability_of_students_t(n, gap):
    """A new mean of n minus this one, over the estimated deviation of that difference, is Student's t with n - 1."""
    members = np.random.default_rng(n).normal(size=(n, 1, 2)) + np.array([gap, 0.0])
    differences = members[:, 0, 0] - members[:, 0, 1]
    error = differences.std(ddof=1) * math.sqrt(2 / n)
    expected = student.cdf(differences.mean() / error, n - 1)
    found = confidence(torch.from_numpy(members), lambda scores: discretise(scores, 1))
    assert found is not None and found.sum() == pytest.approx(1)
    assert found[0, 0].item() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 1000))


def test_two_members_know_their_spread_with_one_degree_of_freedom(monkeypatch):
    monkeypatch.setattr(ensemble, "DRAWS", 20_000)
    members = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]]], dtype=torch.float64)
    found = confidence(members, lambda scores: scores > scores.flip(-1))
    ratio = 2 / math.sqrt(2)  # the mean of the differences 3 and 1, over their standard deviation
    assert found[0, 0].item() == pytest.approx(student.cdf(ratio, 1), abs=0.012)
    assert student.cdf(ratio, 2) - student.cdf(ratio, 1) > 0.04


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_confidence_is_the_share_of_a_plain_loop_over_repeats(scope):
    members = np.random.default_rng(3).normal(size=(4, 3, 4))

    def choose(scores):
        return discretise(scores, 2) if scope == "layer" else discretise_globally(scores, 5)

    found = confidence(torch.from_numpy(members), choose).numpy()
    rng, counts, mean = np.random.default_rng(9), np.zeros((3, 4)), members.mean(0)
    for _ in range(4000):
        noise = sum(rng.normal() * (member - mean) for member in members) * math.sqrt(2 / (4 * 3))
        repeat = mean + noise / math.sqrt(rng.chisquare(3) / 3)
        rows = repeat if scope == "layer" else repeat.reshape(1, -1)
        best = np.argsort(-rows, axis=-1)[:, : 2 if scope == "layer" else 5]
        for row, columns in enumerate(best):
            counts.reshape(len(rows), -1)[row, columns] += 1
    np.testing.assert_allclose(found, counts / 4000, atol=0.075)


def test_what_is_decided_is_decided_again():
    """Modules with real differences: of those that are decided, a new ensemble treats at least 9 of 10 alike."""
    generator = torch.Generator().manual_seed(0)
    worth = 1.5 * torch.randn(8, 6, generator=generator, dtype=torch.float64)
    present = torch.ones(8, 6, dtype=torch.bool)

    def members():
        noisy = worth + torch.randn(5, 8, 6, generator=generator, dtype=torch.float64)
        return torch.stack([standardised(each, present, "layer") for each in noisy])

    found = confidence(members(), lambda scores: discretise(scores, 3))
    again = torch.stack([discretise(members().mean(0), 3) for _ in range(40)]).double().mean(0)
    decided = torch.maximum(found, 1 - found) >= 0.95
    same = torch.where(found > 0.5, again, 1 - again)
    assert 10 < decided.sum() < 46
    assert same[decided].mean() > 0.9 > same[~decided].mean()


def test_modules_with_equal_scores_in_every_member_are_a_coin_toss():
    scores = torch.randn(5, 1, 3, dtype=torch.float64) / 10 + torch.tensor([1.0, 1.0, -9.0], dtype=torch.float64)
    scores[..., 1] = scores[..., 0]
    found = confidence(scores, lambda repeat: discretise(repeat, 1))
    assert 0.45 < found[0, 0] < 0.55 and found[0, 2] == 0 and float(found.sum()) == 1


def test_members_that_do_not_differ_say_nothing():
    one = torch.randn(1, 3, 4, dtype=torch.float64)
    assert confidence(one, lambda scores: discretise(scores, 2)) is None
    assert confidence(one.expand(5, 3, 4), lambda scores: discretise(scores, 2)) is None


def test_words_count_decided_modules_and_skip_missing_ones():
    rows = [[0.95, 0.5, None], [0.05, 0.06, 1.0]]
    assert [is_decided(v) for row in rows for v in row if v is not None] == [True, False, True, False, True]
    assert certainty(rows, 7).startswith("3 of 5 modules decided by an ensemble of 7")
    assert certainty(rows, 7).endswith("2 undecided")
