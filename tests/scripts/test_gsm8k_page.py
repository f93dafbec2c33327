"""The script's table for runs whose metrics are known, and that of the page."""

import json
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "scripts"))
import gsm8k_page as script
from pages import completed

PAGE = REPO / "docs" / "results" / "gsm8k.md"
RIGHT = {"LoRA, all modules": 0.5, "search": 0.4, "SoRA": 0.3, "random": 0.3}
FORGETTING = {"LoRA, all modules": 1.0, "search": 2.0, "SoRA": 0.1, "random": 0.5}


@pytest.fixture
def rows(tmp_path):
    for row in RIGHT:
        for seed in range(3):
            folder = tmp_path / f"{row}-{seed}"
            folder.mkdir()
            right = RIGHT[row] + 0.01 * seed * (1 if row == "search" else 3)
            metrics = {script.RIGHT: right, script.FORGETTING: FORGETTING[row]}
            record = {"status": "completed", "row": row, "column": "sums", "seed": seed, "metrics": metrics}
            record |= {"params": {"adapter": 100 + seed}, "config_hash": f"{row}{seed}"}
            (folder / "run.json").write_text(json.dumps(record))
    return script.rows_of(completed(tmp_path))


def test_differences_are_paired_over_seeds(rows):
    found = script.difference(rows, "search")
    assert found.mean == pytest.approx(-0.12) and found.n == 3
    assert script.difference(rows, script.ALL) is None


def test_the_front_has_the_methods_that_no_other_beats_in_both(rows):
    assert list(script.front(rows)) == ["LoRA, all modules", "SoRA"]  # random: as many right answers, more forgetting


def test_the_best_method_is_first_and_sizes_are_a_range(rows):
    first = script.table(rows).splitlines()[2]
    assert first == "| LoRA, all modules | 100 to 102 | 3 | 53.0 ± 3.0 | 1.00 ± 0.00 |  |  |  |"


def test_runs_of_two_columns_or_without_answers_are_refused():
    run = {"row": "search", "column": "sums", "seed": 0, "metrics": {script.RIGHT: 0.5, script.FORGETTING: 1.0}}
    with pytest.raises(SystemExit, match="gsm8k, sums"):
        script.rows_of([run, run | {"column": "gsm8k"}])
    with pytest.raises(SystemExit, match="search, seed 0 has no forgetting/increase"):
        script.rows_of([run | {"metrics": {script.RIGHT: 0.5}}])


def test_the_page_has_the_table_of_its_data():
    found = json.loads((PAGE.parent / "data" / f"{script.NAME}.json").read_text())
    between = PAGE.read_text().partition(f"<!-- begin {script.NAME} -->")[2]
    assert between.partition("\n![")[0].strip() == script.table(found)
