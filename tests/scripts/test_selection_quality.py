"""The script's result for selectors whose quality is known."""

import itertools
import json
import sys

import numpy as np
import pytest
from conftest import REPO
from scipy import stats

sys.path.insert(0, str(REPO / "scripts"))
import selection_quality as script

TYPES = "abcd"  # d is larger than the others
SUBSETS = list(itertools.combinations(TYPES, 2))  # worth 0.0, 0.1, … 0.5, in this order


def run(folder, row, seed, chosen, metric, selector="given", maximise=True, status="completed"):
    folder = folder / f"{row}-{seed}"
    folder.mkdir(parents=True)
    record = {"status": status, "row": row, "column": "paraphrase", "seed": seed, "main_metric": "accuracy"}
    record |= {"metric_facts": {"accuracy": {"maximise": maximise}}, "metrics": {"validation/accuracy": metric}}
    record |= {"params": {"adapter": 3 if "d" in chosen else 2}}
    record |= {"selection": {"selector": selector, "selected": [list(chosen)]}}
    (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture
def folder(tmp_path):
    for i, subset in enumerate(SUBSETS):
        for seed in (0, 1):
            run(tmp_path, "".join(subset), seed, subset, 0.1 * i + 0.001 * seed)
    run(tmp_path, "broken", 0, SUBSETS[0], 9.0, status="failed")
    return tmp_path


def test_percentiles_gains_and_intervals(folder):
    for seed in range(4):
        run(folder, "best", seed, SUBSETS[-1], 0.0, "search")  # only the result of its subset counts
        run(folder, "mixed", seed, SUBSETS[(0, 5, 1, 4)[seed]], 0.7, "gradient")
    found = script.quality(script.completed(folder))
    assert (found["subsets"], found["seeds_of_a_subset"]) == (6, 2)
    assert [found[key] for key in ("worst", "chance", "best")] == pytest.approx([0.0005, 0.2505, 0.5005])
    best, mixed = found["selectors"]["best"], found["selectors"]["mixed"]
    assert best["percentile"] == pytest.approx(100 * 5.5 / 6) and best["jaccard"] == 1 and best["share"] == 1
    assert best["low"] is None  # no spread, no interval
    assert mixed["percentile"] == pytest.approx(50) and mixed["low"] < 50 < mixed["high"]
    # mixed chooses two pairs of opposite subsets, and opposite subsets are at 50 together, whatever the labels
    assert best["p"] == pytest.approx(1 / 6) and mixed["p"] == mixed["p_worse"] == 1
    assert best["equal_size"]["p"] == pytest.approx(1 / 3) and found["module_sizes"] == [1, 1, 1, 2]
    # ab 0.0, ac 0.1, bc 0.3 are of one size, ad 0.2, bd 0.4, cd 0.5 of another: a choice is compared with its own
    assert mixed["equal_size"]["percentile"] == pytest.approx(100 * (0.5 + 2.5 + 1.5 + 1.5) / 3 / 4)
    assert best["equal_size"]["gain"] == pytest.approx(0.5 - (0.2 + 0.4 + 0.5) / 3)
    assert [group[:2] for group in found["sizes"]] == [[2, 3], [3, 3]]
    assert mixed["gain"] == pytest.approx(0, abs=1e-9) and mixed["jaccard"] < 1
    assert found["reliability"] > 0.99
    values = np.array([[0.1 * i + 0.001 * seed for seed in (0, 1)] for i in range(6)])
    test = stats.f_oneway(*values)
    assert (found["subsets_f"], found["subsets_p"]) == pytest.approx((test.statistic, test.pvalue))
    within = values.var(1, ddof=1).mean()
    assert found["subsets_sd"] == pytest.approx((values.mean(1).var(ddof=1) - within / 2) ** 0.5)
    text = script.table(found)
    assert text.index("| best |") < text.index("| mixed |") and "| 92 | 0.167 |" in text


def test_an_interval_ends_at_the_possible_percentiles(folder):
    for seed, subset in enumerate((SUBSETS[-1], SUBSETS[-1], SUBSETS[-2])):
        run(folder, "good", seed, subset, 0.0, "search")
    good = script.quality(script.completed(folder))["selectors"]["good"]
    assert good["high"] == pytest.approx(100 * 5.5 / 6) and good["low"] < good["percentile"] < good["high"]


def test_only_common_seeds_of_all_subsets_count_and_no_subset_may_be_missing(folder):
    run(folder, "ab", 2, SUBSETS[0], 5.0)
    assert script.quality(script.completed(folder))["worst"] == pytest.approx(0.0005)
    for seed in (0, 1):
        (folder / f"cd-{seed}" / "run.json").unlink()
    with pytest.raises(SystemExit, match="5 of 6 subsets"):
        script.quality(script.completed(folder))


def edited(file, **facts):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(json.loads((file.parents[1] / "ab-0" / "run.json").read_text()) | facts))


def test_runs_that_do_not_belong_together_are_refused(folder, capsys):
    again = folder / "again" / "run.json"
    edited(again)
    with pytest.raises(SystemExit, match="two runs are paraphrase, ab, seed 0"):
        script.quality(script.completed(folder))
    edited(again, seed=2, data_hash="other")
    with pytest.raises(SystemExit, match="has other data"):
        script.quality(script.completed(folder))
    edited(folder / "ab-0" / "run.json", settings={"finetune": {"epochs": 3}, "rank": 4}, git_commit="1" * 40)
    edited(again, seed=2, settings={"finetune": {"epochs": 3}}, git_commit="2" * 40)  # of a version without rank
    capsys.readouterr()
    assert script.quality(script.completed(folder))["subsets"] == 6
    assert "runs of 2 versions of the program: 11111111, 22222222" in capsys.readouterr().err
    edited(again, seed=2, settings={"finetune": {"epochs": 4}})
    with pytest.raises(SystemExit, match=r"seed 2 has finetune\.epochs=4, others finetune\.epochs=3"):
        script.quality(script.completed(folder))
    edited(again, row="ac", seed=2, settings={"finetune": {"epochs": 4}})  # subsets differ in the selection only
    with pytest.raises(SystemExit, match=r"ac, seed 2 has finetune\.epochs=4, others finetune\.epochs=3"):
        script.quality(script.completed(folder))


def test_random_choices_are_at_fifty_also_with_ties():
    values = {((name,),): worth for name, worth in zip("abcdef", (1, 1, 1, 2, 3, 3), strict=True)}
    assert sum(script.percentile(values, subset) for subset in values) / 6 == pytest.approx(50)


def test_a_lucky_choice_that_all_seeds_make_is_one_choice(folder):
    for seed in range(9):
        run(folder, "stubborn", seed, SUBSETS[-2], 0.0, "search")
    run(folder, "stubborn", 9, SUBSETS[-1], 0.0, "search")
    stubborn = script.quality(script.completed(folder))["selectors"]["stubborn"]
    assert stubborn["low"] > 50  # Student's t over seeds
    assert stubborn["p"] > 0.1 and stubborn["p_worse"] > 0.5


def test_if_lower_is_better_the_lowest_is_best(tmp_path):
    for i, subset in enumerate(SUBSETS):
        for seed in (0, 1):
            run(tmp_path, "".join(subset), seed, subset, 2.0 + i + 0.01 * seed, maximise=False)
    run(tmp_path, "search", 0, SUBSETS[0], 0.0, "search")
    found = script.quality(script.completed(tmp_path))
    assert found["best"] < found["chance"] < found["worst"] and found["selectors"]["search"]["percentile"] > 90


def test_the_page_gets_table_and_picture(folder, tmp_path, monkeypatch, capsys):
    run(folder, "search", 0, SUBSETS[3], 0.5, "search")
    docs = tmp_path / "docs"
    for place in ("images", "data"):
        (docs / place).mkdir(parents=True)
    page = docs / "selection.md"
    page.write_text("before\n<!-- begin selection_paraphrase -->\nold\n<!-- end selection_paraphrase -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["script", str(folder), "--page", str(page)])
    script.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| search |" in text
    assert (docs / "images/selection_paraphrase.png").stat().st_size > 1000
    assert json.loads((docs / "data/selection_paraphrase.json").read_text())["subsets"] == 6
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["script", str(docs / "data/selection_paraphrase.json")])
    script.main()
    assert capsys.readouterr().out == printed  # the table needs no runs
    (folder / "ab-0" / "run.json").unlink()
    monkeypatch.setattr(sys, "argv", ["script", str(folder), "--column", "elsewhere"])
    with pytest.raises(SystemExit, match="no finished run"):
        script.main()
