"""The script's tables for runs whose metrics are known."""

import json
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "scripts"))
import selection_pays as script
from pages import completed

LAYERS = {"all modules": 1, "search": 2, "random": 1, "random, draw 100": 3, "top third": 5}
SHARES = {"2": {"share": 0.8}, "4": {"share": 0.6}}  # by index: layers 3 and 5


def accuracy(row: str, seed: int) -> float:
    return {
        "all modules": 0.80,
        "search": 0.81 + 0.001 * seed,
        "random": 0.79 + 0.002 * seed,
        "random, draw 100": 0.795 - 0.002 * seed,
        "top third": 0.7 + 0.01 * seed,
    }[row]


@pytest.fixture
def columns(tmp_path):
    for row, lowest in LAYERS.items():
        for seed in range(3):
            folder = tmp_path / f"{row}-{seed}"
            folder.mkdir()
            selected = [["q"] if layer >= lowest else [] for layer in range(1, 7)]
            metrics = {"validation/accuracy": accuracy(row, seed), "held_out/accuracy": accuracy(row, seed) - 0.1}
            record = {"status": "completed", "row": row, "column": "sst2", "seed": seed, "main_metric": "accuracy"}
            record |= {"metrics": metrics, "params": {"adapter": 100 + seed}, "selection": {"selected": selected}}
            if row == "top third":
                record["step_time"] = {"by_lowest_layer": SHARES}
            (folder / "run.json").write_text(json.dumps(record | {"config_hash": f"{row}{seed}"}))
    return script.rows_of(completed(tmp_path))


def test_the_best_of_two_draws_is_the_higher_one_of_each_seed(columns):
    rows = script.with_best(columns["sst2"]["rows"])
    best = {int(seed): of["validation"] for seed, of in rows[script.BEST]["seeds"].items()}
    assert best == {seed: max(accuracy("random", seed), accuracy("random, draw 100", seed)) for seed in range(3)}
    assert best[0] != accuracy("random", 0) and best[2] == accuracy("random", 2)  # each draw wins once


def test_the_share_of_a_step_is_linear_between_the_counted_layers(columns):
    column = columns["sst2"]
    assert column["shares"] == {"3": 0.8, "5": 0.6}
    of_row = {name: script.shares(column, row)[0] for name, row in column["rows"].items()}
    assert of_row == pytest.approx(
        {"all modules": 1, "search": 0.9, "random": 1, "random, draw 100": 0.8, "top third": 0.6}
    )


def test_differences_are_paired_over_seeds(columns):
    rows = script.with_best(columns["sst2"]["rows"])
    found = script.difference(rows, "search", "random")
    assert found.n == 3 and found.mean == pytest.approx(0.02 - 0.001)
    assert "search" in script.main_table(columns["sst2"]) and "+1.9" in script.question_table(columns)


def test_two_runs_of_one_seed_are_refused(columns, tmp_path):
    twice = tmp_path / "again"
    twice.mkdir()
    (twice / "run.json").write_text((tmp_path / "search-0" / "run.json").read_text())
    with pytest.raises(SystemExit, match="two runs are sst2, search, seed 0"):
        script.rows_of(completed(tmp_path))


def test_without_a_run_the_script_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selection_pays.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="no finished run"):
        script.main()
