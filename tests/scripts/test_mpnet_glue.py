"""The table of the paper-scale runs for runs whose metrics are known, and that of the page."""

import json
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "scripts"))
import mpnet_glue as script
from pages import fill, merged

PAGE = REPO / "docs" / "results" / "mpnet.md"


def record(row, seed, value, column="cola"):
    metrics = {"validation/matthews": value, "held_out/matthews": 0.1}
    found = {"row": row, "column": column, "seed": seed, "main_metric": "matthews", "metrics": metrics}
    found |= {"params": {"adapter": 1000 + seed}, "time": {"total_s": 1800.0}, "history": [{}, {}]}
    return found | {"config_hash": f"{row}{seed}", "data_hash": "d", "git_commit": "c", "settings": {"lr": 1}}


@pytest.fixture
def runs():
    lora = [record(script.LORA, seed, 0.60 + 0.01 * seed) for seed in (0, 1, 2)]
    return [*lora, record("DiffoRA", 0, 0.62), record("DiffoRA", 1, 0.65)]


def test_rows_are_compared_with_lora_of_the_same_seeds(runs):
    lines = script.text_of(script.tables_of(runs)).splitlines()
    row = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert row["DiffoRA"].startswith("| DiffoRA | 1,000 to 1,001 | 2 | 63.50 ± 2.12 | +3.0 (")
    assert row["DiffoRA"].endswith("| undecided | 0.5 | 64.95 |")
    assert row[script.LORA] == "| LoRA, r = 2, s = 8 | 1,000 to 1,002 | 3 | 61.00 ± 1.00 |  |  | 0.5 | 63.54 |"
    assert row["random"] == "| random |  | 0 | not run |  |  |  |  |"
    assert "**stsb**" not in lines and "DiffoRA less random: not run." in lines


def test_diffora_is_compared_with_random_selections(runs):
    drawn = [record("random", seed, value) for seed, value in ((0, 0.60), (1, 0.62), (2, 0.70))]
    [line] = [line for line in script.text_of(script.tables_of([*runs, *drawn])).splitlines() if "less random" in line]
    assert line.startswith("DiffoRA less random, paired over 2 seeds: +2.5 (") and line.endswith(" (95 %), undecided.")
    one = script.text_of(script.tables_of([*runs, drawn[1]]))
    assert "DiffoRA less random, paired over 1 seed: +3.0." in one


def test_a_table_grows_from_its_figures_and_further_runs(runs):
    early, late = script.tables_of(runs[:4]), script.tables_of(runs[4:])
    assert merged(early, late) == script.tables_of(runs)
    assert merged(early, script.tables_of(runs[:4])) == early
    other = script.tables_of([record("DiffoRA", 0, 0.63)])
    with pytest.raises(SystemExit, match=r"DiffoRA, seeds, 0, value is 0\.62 in one place and 0\.63 in the other"):
        merged(early, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"data_hash": "e"}, "cola, data is d in"), ({"settings": {"lr": 2}}, "DiffoRA, settings, lr is 1 in")],
)
def test_further_runs_of_other_data_or_settings_are_refused(changed, message, runs):
    later = record("DiffoRA", 2, 0.6) | changed
    with pytest.raises(SystemExit, match=message):
        merged(script.tables_of(runs), script.tables_of([later]))


@pytest.mark.parametrize("changed", [{"column": "paraphrase"}, {"row": "DoRA"}])
def test_runs_of_another_experiment_or_scale_are_refused(changed, runs):
    with pytest.raises(SystemExit, match="is no run of experiment=mpnet_glue scale=paper"):
        script.tables_of([*runs, runs[0] | changed])


def test_a_folder_without_runs_beside_the_file_is_refused(tmp_path, monkeypatch):
    file = PAGE.parent / "data" / "mpnet_glue.json"
    monkeypatch.setattr(sys, "argv", ["script", str(file), str(tmp_path / "mistyped")])
    with pytest.raises(SystemExit, match=r"no finished run below .*mistyped"):
        script.main()


def test_a_file_without_settings_does_not_grow(tmp_path, monkeypatch):
    (tmp_path / "figures.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path / "figures.json"), str(tmp_path)])
    with pytest.raises(SystemExit, match="give the JSON file or folders"):
        fill(None, "figures", dict, str)


def test_the_page_has_the_table_of_its_data():
    found = json.loads((PAGE.parent / "data" / "mpnet_glue.json").read_text())
    between = PAGE.read_text().partition("<!-- begin mpnet_glue -->")[2].partition("<!-- end mpnet_glue -->")[0]
    assert between.strip() == script.text_of(found)
