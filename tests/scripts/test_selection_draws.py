"""The script's result for a search whose rank among random selections is known."""

import itertools
import json
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "scripts"))
import selection_draws as script
from pages import completed


def run(folder, row, seed, metric, maximise=True, parameters=100, status="completed"):
    folder = folder / f"{row}-{seed}"
    folder.mkdir(parents=True)
    method = "diffora" if row == "search" else "random"
    record = {"status": status, "method": method, "row": row, "column": "cola", "seed": seed, "main_metric": "matthews"}
    record |= {"metrics": {"validation/matthews": metric, "held_out/matthews": metric / 2}}
    record |= {"metric_facts": {"matthews": {"maximise": maximise}}}
    (folder / "run.json").write_text(json.dumps(record | {"params": {"adapter": parameters}}))


@pytest.fixture
def folder(tmp_path):
    for seed in range(3):
        run(tmp_path, "search", seed, (0.25, 0.1, 0.9)[seed])  # beats 2 of 4 draws; 0, with a tie; 4
        for draw in range(4):
            run(tmp_path, f"draw {draw}", seed, 0.1 * (draw + 1))
    run(tmp_path, "draw 9", 0, 9.0, status="failed")
    run(tmp_path, "draw 1", 3, 0.5)  # a seed whose search has not run
    return tmp_path


def test_percentiles_and_gains_by_seed(folder):
    [seeds] = script.places(completed(folder)).values()
    assert [script.percentile(one, "validation") for one in seeds] == pytest.approx([50, 12.5, 100])
    place, gain = script.over_seeds(seeds, "validation")
    assert place.n == 3 and 50 + place.mean == pytest.approx(162.5 / 3)
    assert gain.mean == pytest.approx((0.25 + 0.1 + 0.9) / 3 - 0.25) and gain.low < gain.mean < gain.high
    text = script.table({"cola": seeds})
    assert "| cola | 0 | 100 | 4 | 0.250 ± 0.129 | 0.400 | 0.250 | 50 |" in text
    assert "- cola, validation matthews, 3 seeds: percentile 54 (0 to 100), gain +0.1667" in text
    # each seed has 5 runs, with places 0, 25, 50, 75, 100; in the second two share the lowest
    places = itertools.product((0, 25, 50, 75, 100), (12.5, 12.5, 50, 75, 100), (0, 25, 50, 75, 100))
    apart, together = script.tests(seeds, "validation")
    assert apart.p == pytest.approx(sum(sum(of) >= 162.5 for of in places) / 125)
    # in all seeds: draw 3 is at 250 / 3, draw 2 at 175 / 3, the search at 162.5 / 3
    assert together.p == pytest.approx(3 / 5)
    assert text.count(f"; p = {apart.p:.3f}, as one choice p = 0.600") == 2


def test_if_lower_is_better_the_lowest_has_the_highest_percentile(tmp_path):
    run(tmp_path, "search", 0, 2.0, maximise=False)
    for draw in range(2):
        run(tmp_path, f"draw {draw}", 0, 3.0 + draw, maximise=False, parameters=90 + draw)
    [seeds] = script.places(completed(tmp_path)).values()
    assert script.percentile(seeds[0], "validation") == 100
    text = script.table({"chat": seeds})
    assert "| 100 (90 to 91) | 2 |" in text and "gain +1.5000; p = 0.333" in text


def test_the_page_gets_table_and_picture(folder, tmp_path, monkeypatch, capsys):
    docs = tmp_path / "docs"
    for place in ("images", "data"):
        (docs / place).mkdir(parents=True)
    page = docs / "selection.md"
    page.write_text("before\n<!-- begin selection_draws -->\nold\n<!-- end selection_draws -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["script", str(folder), "--page", str(page)])
    script.main()
    assert "old" not in page.read_text() and "| cola | 2 |" in page.read_text()
    assert (docs / "images/selection_draws.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["script", str(docs / "data/selection_draws.json")])
    script.main()
    assert capsys.readouterr().out == printed  # the table needs no runs
    (docs / "data/selection_draws.json").unlink()
    monkeypatch.setattr(sys, "argv", ["script", str(docs)])
    with pytest.raises(SystemExit, match="no finished search"):
        script.main()
