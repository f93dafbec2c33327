"""The price and agreement of cheap searches, on made-up searches."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import search_price


def test_spearman_is_scipys_mean_over_layers_and_zero_without_an_order():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (5, 6)).astype(float), rng.normal(size=(5, 6))
    expected = np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert search_price.spearman(a, b) == pytest.approx(expected)
    assert search_price.spearman(np.ones((2, 3)), [[1, 2, 3], [3, 2, 1]]) == 0


def search(seed, seconds, rounds=5, moved_until=5):
    """Gates that go from equal to an order of their own, at ten points a round."""
    rng = np.random.default_rng(seed)
    order, gates = rng.permuted(np.tile(np.arange(4.0), (3, 1)), axis=1), []
    for point in range(10 * rounds + 1):
        noise = rng.normal(size=(3, 4)) * (2 if point < 10 * moved_until else 0)
        gates.append((order + noise).tolist())
    at = [point / 10 for point in range(10 * rounds + 1)]
    return {"seconds": seconds, "early": gates[0], "rounds": at, "gates": gates, "epochs": rounds, "k": 2}


def test_the_table_has_costs_and_compares_other_seeds():
    searches = {f"full-{seed}": search(seed, 10.0, moved_until=2) for seed in (0, 1)}
    searches |= {f"fast-{seed}": search(seed, 2.0, rounds=1, moved_until=0) for seed in (0, 1)}
    found = {"rows": None, "finetune": {"epoch_seconds": 4.0, "epochs": 10}, "searches": searches}
    rows = search_price.summary(found)
    assert rows["full search"]["share"] == 0.25 and rows["recipe=fast"]["share"] == 0.05
    assert rows["full search"]["same_seed"] == pytest.approx(1.0)
    ends = [searches[f"full-{seed}"]["gates"][-1] for seed in (0, 1)]
    assert rows["full search"]["other_seeds"] == pytest.approx(search_price.spearman(*ends))
    assert rows["recipe=fast"]["other_seeds"] == pytest.approx(search_price.spearman(*ends))
    assert rows["full search, first 1 of 5 rounds"]["share"] == pytest.approx(0.05)
    # The order is final at round 2, after a check there it is the same at three more.
    assert search_price.stop_of(searches["full-0"], 3) == pytest.approx(2.3)
    assert search_price.table({"mrpc": found}).count("\n") == len(rows) + 1


def test_the_first_part_of_finished_searches(tmp_path):
    for seed in (0, 1):
        made = search(seed, 1.0, moved_until=2)
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "trajectory.json").write_text(
            json.dumps({"rounds": made["rounds"], "gamma_bar": made["gates"]})
        )
    found = search_price.shortened([tmp_path / "0", tmp_path / "1"])
    assert found["seeds"] == 2 and found["rounds"] == 5
    last = found["rows"][-1]
    assert last["same_seed"] == pytest.approx(1.0) and last["other_seeds"] == found["rows"][-2]["other_seeds"]
    assert found["rows"][0]["same_seed"] < 0.95
