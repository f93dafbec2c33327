"""The script's tables for runs whose scales and differences are known."""

import json
import statistics
import sys

import pytest
from conftest import REPO

from diffora.report.statistics import paired

sys.path.insert(0, str(REPO / "scripts"))
import selection_matters as script

SELECTING = {"weight_sharing": True, "shared_rank": 2, "alpha": 8}
ROWS = {
    "search": ({"rank": 4}, {**SELECTING, "shared_scale": "own"}, (2, 4)),
    "search, s = 2": ({"rank": 4}, {**SELECTING, "shared_scale": "same"}, (2, 2)),
    "search, s = 4": ({"rank": 4}, {**SELECTING, "shared_scale": "same", "alpha": 16}, (4, 4)),
    "search, alone": ({"rank": 4}, {**SELECTING, "weight_sharing": False, "shared_scale": "own"}, (2, None)),
    "LoRA, r = 2": ({"rank": 2}, {"alpha": 8}, (4, None)),
    "sharing alone": ({}, {"shared_rank": 2, "alpha": 8}, (None, 4)),
    "sharing alone, s = 2": ({}, {"shared_rank": 2, "alpha": 4}, (None, 2)),
}
SEEDS = range(3)


def accuracy(row: str, seed: int, split: str) -> float:
    return 0.5 + 0.01 * list(ROWS).index(row) * (seed + 1) + 0.001 * seed + 0.2 * (split == "held_out")


def write(folder, row: str, seed: int) -> None:
    settings, method, _ = ROWS[row]
    folder = folder / f"{row}-{seed}"
    folder.mkdir(parents=True)
    metrics = {f"{split}/accuracy": accuracy(row, seed, split) for split in ("validation", "held_out")}
    record = {"status": "completed", "row": row, "column": "digits", "seed": seed, "main_metric": "accuracy"}
    record |= {"settings": {**settings, "method": method}, "metrics": metrics, "params": {"adapter": 100 + seed}}
    (folder / "run.json").write_text(json.dumps(record | {"config_hash": f"{row}{seed}"}))


@pytest.fixture
def rows(tmp_path):
    for row in ROWS:
        for seed in SEEDS:
            write(tmp_path, row, seed)
    return script.rows_of(script.completed(tmp_path))


def test_the_scales_are_those_of_the_settings(rows):
    assert {row["row"]: (row["own"], row["shared"]) for row in rows} == {name: ROWS[name][2] for name in ROWS}


def test_a_column_has_the_rows_whose_pairs_all_have_its_scale(rows):
    where = {
        scale: [script.at(rows, name, scale) for name in ("search", "LoRA, r = 2", "sharing alone")]
        for scale in script.SCALES
    }
    assert [row and row["row"] for row in where[None]] == ["search", "LoRA, r = 2", "sharing alone"]
    assert [row and row["row"] for row in where[2.0]] == ["search, s = 2", None, "sharing alone, s = 2"]
    assert [row and row["row"] for row in where[4.0]] == ["search, s = 4", "LoRA, r = 2", "sharing alone"]


def test_means_and_differences(rows):
    text = script.table(rows)
    values = [100 * accuracy("search, s = 4", seed, "held_out") for seed in SEEDS]
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in text
    found = {(what, scale): pairs for what, scale, pairs in script.compared(rows)}
    assert set(found) == {
        ("search − search, alone", "s = 2 and 4"),  # at one alpha
        ("LoRA, r = 2 − search, alone", "s = 2 and 4"),
        ("search − search, alone", "s = 2"),
        ("search", "s = 4 − s = 2"),
        ("sharing alone", "s = 4 − s = 2"),
    }
    ours, theirs = ({s: accuracy(row, s, "validation") for s in SEEDS} for row in ("search, s = 2", "search, alone"))
    assert found["search − search, alone", "s = 2"]["validation"] == paired(ours, theirs)
    mean = statistics.mean(100 * (ours[seed] - theirs[seed]) for seed in SEEDS)
    assert mean < 0 and f"| search − search, alone | s = 2 | −{-mean:.1f} (" in text
    assert "| search | 100 to 102 | " in text and "(s = 2, s = 4)" in text


def test_runs_of_one_row_with_two_settings_are_refused(tmp_path):
    write(tmp_path, "search", 0)
    file = tmp_path / "search-0" / "run.json"
    record = json.loads(file.read_text())
    record["settings"]["method"]["alpha"] = 16
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps(record | {"seed": 1}))
    with pytest.raises(SystemExit, match=r"seed 0 has method\.alpha=8, others method\.alpha=16"):
        script.rows_of(script.completed(tmp_path))


def test_the_page_gets_the_table_and_the_json_gives_it_again(rows, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    (tmp_path / "data").mkdir()
    page.write_text("before\n<!-- begin selection_matters_digits -->\n<!-- end selection_matters_digits -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["selection_matters.py", str(tmp_path), "--page", str(page)])
    script.main()
    first = capsys.readouterr().out
    assert first.strip() in page.read_text() and page.read_text().endswith("after\n")
    monkeypatch.setattr(sys, "argv", ["selection_matters.py", str(tmp_path / "data" / "selection_matters_digits.json")])
    script.main()
    assert capsys.readouterr().out == first
