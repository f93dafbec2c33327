import csv
import itertools
import json
import math
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPO
from made_runs import FACTS, LAYERS, TYPES, change_record, made_run
from scipy import stats

from diffora.errors import UserError
from diffora.records import MetricFacts, Record
from diffora.report import charts, page, pictures, tables
from diffora.report.agreement import stability
from diffora.report.comparisons import comparisons_of, curves_of
from diffora.report.formats import comma_separated, comparisons_csv, costs_csv, latex, markdown
from diffora.report.layout import PAIRS, TextTable, comparisons_table, cost_table, main_table, signed
from diffora.report.pictures import best_cells
from diffora.report.results import ResultColumn
from diffora.report.runs import Run, differing, gather
from diffora.report.selections import agreement, selections
from diffora.report.statistics import Difference, Spread, detectable, holm, paired, spread, verdict
from diffora.report.tables import specification, tables_of

METRICS = {name: MetricFacts(**facts) for name, facts in FACTS.items()}
HOSTILE = "<script>alert(1)</script> & 100% of $x_1$ | \"a\" </td>"  # fmt: skip


# --- statistics ---


def test_a_spread_is_the_mean_and_the_sample_standard_deviation():
    values = [0.91, 0.93, 0.9, 0.97]
    found = spread(values)
    assert (found.mean, found.std, found.n) == (
        pytest.approx(np.mean(values)),
        pytest.approx(np.std(values, ddof=1)),
        4,
    )
    assert spread([2.0]) == Spread(2.0, None, 1) and spread([]) is None


def test_a_paired_difference_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.92, 0.01, 6), rng.normal(0.91, 0.01, 6)
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx((ours - theirs).mean()) and found.n == 6
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, test.pvalue))


def test_only_common_seeds_are_paired():
    found = paired({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.0, 0: 0.5, 8: -100.0})
    assert found.n == 2 and found.mean == pytest.approx(0.75)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_without_spread_there_is_no_test():
    assert paired({0: 1.0}, {0: 0.5}) == Difference(0.5, None, None, None, 1)
    same = paired({0: 0.3, 1: 0.2, 2: 0.9}, {0: 0.2, 1: 0.1, 2: 0.8})  # they differ only by rounding
    assert same.p is None and verdict(same) == "no test"


def test_the_verdict_follows_from_the_interval():
    assert verdict(Difference(1.0, 0.1, 1.9, 0.03, 5)) == "better"
    assert verdict(Difference(-1.0, -1.9, -0.1, 0.03, 5)) == "worse"
    assert verdict(Difference(1.0, -0.1, 2.1, 0.07, 5)) == "undecided"


def test_holm_adjusts_as_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_agreement_of_selections_against_chance():
    one = np.array([[True, True, False, False]])
    other = np.array([[True, False, True, False]])
    found = stability(np.array([one, other]), by_layer=True, draws=20_000)
    assert found.jaccard == pytest.approx(1 / 3)
    # for two draws of 2 of 4: probability 1/6 of equal sets, 4/6 of one common element, 1/6 of none
    assert found.chance == pytest.approx(1 / 6 + 4 / 6 / 3, abs=0.01)
    assert stability(np.array([one, one, one]), by_layer=True).jaccard == 1.0
    assert stability(np.array([one, ~one]), by_layer=True).jaccard == 0.0
    assert stability(np.array([one]), by_layer=True) is None


def test_random_selections_have_the_size_of_each_layer_or_of_the_whole():
    full = np.array([[True, True], [False, False]])
    assert stability(np.array([full, full]), by_layer=True).chance == 1.0  # all modules of layer 1, none of layer 2
    assert stability(np.array([full, full]), by_layer=False).chance < 0.9


def test_random_selections_stay_inside_a_grid_of_blocks():
    present = np.array([[True, True, False, False], [False, False, True, True]])
    for by_layer in (True, False):
        assert stability(np.array([present, present]), by_layer, present).chance == 1.0  # nothing else can be selected


# --- gathering ---


def test_runs_below_a_folder_are_gathered_once(tmp_path):
    for seed in range(3):
        made_run(tmp_path / "a" / f"run{seed}", seed=seed)
    made_run(tmp_path / "a" / "run0" / "checkpoints" / "not_a_run")
    made_run(tmp_path / "dry", status="dry_run")
    found = gather([tmp_path, tmp_path / "a"])
    assert [run.seed for run in found.runs] == [0, 1, 2] and found.broken == []
    assert len(found.runs[0].history) == 3 and found.runs[0].record.history == []


def test_broken_records_are_listed_and_left_out(tmp_path):
    contents = [
        "{",
        "[]",
        '{"method": "lora"}',
        "\udc80",
        '{"method":"m","task":"t","model":"x","status":"s","seed":"0"}',
        '{"method":"m","task":"t","model":"x","status":"completed","seed":0}',
    ]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    made_run(tmp_path / "good")
    found = gather([tmp_path])
    assert len(found.runs) == 1 and len(found.broken) == len(contents)
    reasons = [reason for _, reason in found.broken]
    assert all(reasons)
    assert reasons[-2].startswith("not the record of a run: setting_id, settings, config_hash are missing")
    assert "seed must be a whole number" in reasons[-2] and "metrics, params, time, memory are missing" in reasons[-1]


def test_runs_behind_links_are_gathered_and_a_link_back_ends(tmp_path):
    made_run(tmp_path / "elsewhere" / "run", seed=4)
    made_run(tmp_path / "all" / "sweep" / "run0")
    (tmp_path / "all" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "sweep" / "back").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "sweep" / "itself").symlink_to(tmp_path / "all" / "sweep")
    assert sorted(run.seed for run in gather([tmp_path / "all"]).runs) == [0, 4]


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    made_run(tmp_path / "run")
    made_run(tmp_path / "closed" / "run", seed=1)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = gather([tmp_path])
    assert [run.seed for run in found.runs] == [0]
    assert [path.name for path, _ in found.broken] == ["closed"]


def test_a_report_without_a_readable_run_replaces_nothing(tmp_path):
    run = made_run(tmp_path / "run")
    page.write(gather([tmp_path]), tmp_path / "out", [tmp_path])
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")}
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"no run can be read; .*run\.json: not the record of a run"):
        page.write(gather([tmp_path]), tmp_path / "out", [tmp_path])
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")} and len(before) > 4


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=re.escape(f"no run.json below {tmp_path}")):
        gather([tmp_path])


def test_runs_that_differ_in_the_seed_only_have_one_setting(tmp_path):
    for seed in range(2):
        made_run(tmp_path / f"r{seed}", "random", seed, settings={"rank": 4, "resume": seed > 0})
        made_run(tmp_path / f"l{seed}", "random", seed, settings={"rank": 4, "finetune": {"lr": 0.1}})
    runs = gather([tmp_path]).runs
    assert len({run.setting for run in runs}) == 2  # the draw follows the seed
    wanted = {"method.name": "random", "method.draw": "${seed}", "rank": 4, "finetune.lr": 0.1}
    assert wanted.items() <= runs[0].config.items() and "resume" not in runs[0].config
    assert runs[0].record.settings is runs[1].record.settings  # in memory once


def test_keys_that_always_agree_are_named_once():
    configs = [{"rank": 1, "search.rank": 1, "lr": 3}, {"rank": 2, "search.rank": 2, "lr": 3}]
    assert differing(configs) == ["rank"]


# --- tables ---

SPEC = {
    "title": "[D] Table 9: a test",
    "percent": True,
    "seeds": {"paper": [0], "small": [0, 1, 2]},
    "rows": [
        {"name": "full FT", "set": ["method=full_ft"], "paper": {"params": "184M", "stsb": 91.6, "digits": "80/81"}},
        {"name": "DiffoRA", "set": ["method=diffora"], "paper": {"params": "0.35M", "stsb": "91.70"}},
        {"name": "random", "set": ["method=random"], "paper": None},
    ],
    "columns": {
        "paper": {"stsb": {"set": ["task=stsb"]}},
        "small": {
            "paraphrase": {"set": ["task=paraphrase"], "metrics": ["validation/accuracy", "validation/f1"]},
            "digits": {"set": ["task=digits"], "percent": False, "metrics": ["update/rank", "validation/accuracy"]},
        },
    },
}


@pytest.fixture
def spec(tmp_path, monkeypatch):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "table9.yaml").write_text(yaml.safe_dump({"hydra": {"sweeper": SPEC}}, sort_keys=False))
    monkeypatch.setattr(tables, "conf_dir", lambda: tmp_path / "conf")
    return tmp_path / "runs"


def fill(folder, rows=("DiffoRA", "random", "full FT"), seeds=range(3), column="paraphrase", **more):
    """Runs of some rows: DiffoRA 0.80, 0.81, …, random 0.70, 0.72, …, full FT 0.9, …"""
    base = {"DiffoRA": (0.80, 0.01), "random": (0.70, 0.02), "full FT": (0.9, 0.0)}
    method = {"DiffoRA": "diffora", "random": "random", "full FT": "full_ft"}
    for row in rows:
        start, step = base[row]
        for seed in seeds:
            place = folder / f"{row}-{column}-{seed}"
            made_run(place, method[row], seed, start + step * seed, ("table9", row, column), task=column, **more)


def test_an_experiment_has_the_layout_of_its_file(spec):
    fill(spec)
    fill(spec, ["random"], column="digits")
    (table,) = tables_of(gather([spec]).runs)
    grid = main_table(table)
    assert table.title == "[D] Table 9: a test (small scale)" and table.name == "table9-small"
    assert grid.head == [
        "method",
        *(f"parameters: {name}" for name in ("adapter", "head", "paper")),
        *(f"paraphrase, accuracy/f1: {name}" for name in ("dev_best", "held_out")),
        *(f"digits, rank/accuracy: {name}" for name in ("dev_best", "held_out", "paper")),
        "paper: stsb",
        "n",
        "time: search",
        "time: total",
    ]
    full, diffora, random = (dict(zip(grid.head, row, strict=True)) for row in grid.rows)
    assert [row[0] for row in grid.rows] == ["full FT", "DiffoRA", "random"]
    assert diffora["paraphrase, accuracy/f1: dev_best"] == "81.00 ± 1.00 / 40.50 ± 0.50"
    assert diffora["paraphrase, accuracy/f1: held_out"].startswith("80.00 ± 1.00 / 27.00")
    assert diffora["parameters: paper"] == "0.35M" and diffora["paper: stsb"] == "91.70"
    assert diffora["digits, rank/accuracy: dev_best"] == "" and diffora["n"] == "3 / –"
    assert random["digits, rank/accuracy: dev_best"] == "3.500 ± 0.000 / 0.7200 ± 0.0200"  # not in per cent
    assert random["parameters: paper"] == "" and full["digits, rank/accuracy: paper"] == "80/81"
    assert diffora["time: search"] == "20 s / –" and random["time: search"] == ""


def test_rows_without_runs_are_named(spec):
    fill(spec, ["DiffoRA"])
    (table,) = tables_of(gather([spec]).runs)
    assert any("no runs yet: full FT; random" in note for note in table.notes)
    assert comparisons_of(table) == []


def test_an_experiment_without_a_file_is_shown_as_found(spec):
    made_run(spec / "a", cell=("../../nothing here", "my row", "my column"))
    (table,) = tables_of(gather([spec]).runs)
    assert table.rows == ["my row"] and "conf/experiment has no table" in table.notes[0]
    files = page.write(gather([spec]), spec / "out", [spec])
    assert all((spec / "out") in file.resolve().parents for file in files)


def test_files_that_no_report_wrote_are_not_replaced(spec):
    made_run(spec / "a")
    for name in ("index.html", "runs.csv"):
        out = spec / f"mine-{name}"
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(UserError, match=f"has {name}, which no report wrote: choose another folder"):
            page.write(gather([spec]), out, [spec])
        assert (out / name).read_text() == "mine" and len(list(out.iterdir())) == 1
    page.write(gather([spec]), spec / "out", [spec])
    page.write(gather([spec]), spec / "out", [spec])


def test_every_table_of_the_project_can_be_shown(tmp_path):
    number = itertools.count()
    for file in sorted((REPO / "conf" / "experiment").glob("*.yaml")):
        spec = specification(file.stem) or {}
        for row, scale in itertools.product(spec.get("rows", []), ("paper", "small")):
            column = next(iter(spec["columns"].get(scale, {})), None)
            if column is not None:
                made_run(tmp_path / f"{next(number)}", cell=(file.stem, row["name"], column), scale=scale)
    found = tables_of(gather([tmp_path]).runs)
    assert found
    for table in found:
        spec = specification(table.name.rpartition("-")[0])
        grid = main_table(table)
        assert [row[0] for row in grid.rows] == [row["name"] for row in spec["rows"]]
        shown = {cell for row in grid.rows for cell in row}
        figures = {str(value) for row in spec["rows"] for value in (row.get("paper") or {}).values()}
        assert figures <= shown, table.name


def test_comparisons_are_paired_and_use_the_direction_of_the_metric(spec):
    fill(spec)
    (table,) = tables_of(gather([spec]).runs)
    against = {c.baseline: c for c in comparisons_of(table)}
    assert set(against) == {"random", "full FT"}
    found = against["random"].dev_best
    want = stats.ttest_rel([80, 81, 82], [70, 72, 74])
    assert (found.mean, found.p) == pytest.approx((9.0, want.pvalue)) and found.n == 3
    assert against["random"].held_out.mean == pytest.approx(9.0)
    assert against["random"].fair and against["random"].ratio == 1.0
    assert against["full FT"].dev_best.mean == pytest.approx(-9.0)
    assert against["full FT"].p_holm == pytest.approx(max(found.p, min(1, 2 * against["full FT"].dev_best.p)))

    lower = FACTS | {"accuracy": {"unit": "fraction", "maximise": False}}
    for file in spec.rglob("run.json"):
        change_record(file.parent, metric_facts=lower)
    (table,) = tables_of(gather([spec]).runs)
    assert next(c for c in comparisons_of(table) if c.baseline == "random").dev_best.mean == pytest.approx(-9.0)
    assert pictures.best_cells(table) == {("random", "paraphrase, accuracy/f1")}


def test_unequal_sizes_are_marked(spec):
    fill(spec, ["DiffoRA"], adapter=1120)
    fill(spec, ["random"], adapter=1000)
    fill(spec, ["full FT"], adapter=1020)
    (table,) = tables_of(gather([spec]).runs)
    assert {c.baseline: c.fair for c in comparisons_of(table)} == {"random": False, "full FT": True}
    grid = comparisons_table(table, comparisons_of(table))
    assert any("1.12 (unequal)" in row for row in grid.rows)


def test_another_selector_is_a_baseline_of_the_search(spec):
    fill(spec, ["DiffoRA"])
    for seed in range(3):
        run = made_run(spec / f"g{seed}", "diffora", seed, cell=("table9", "gradient", "paraphrase"))
        record = json.loads((run / "run.json").read_text())
        change_record(run, selection=record["selection"] | {"selector": "gradient"})
    (table,) = tables_of(gather([spec]).runs)
    assert table.ours == ["DiffoRA"] and [c.baseline for c in comparisons_of(table)] == ["gradient"]


def test_the_latest_of_repeated_runs_counts(spec):
    fill(spec)
    again = made_run(spec / "again", "random", 0, 0.5, ("table9", "random", "paraphrase"))
    os.utime(again / "run.json", (2e9, 2e9))
    (table,) = tables_of(gather([spec]).runs)
    cell = table.cells["random", "paraphrase"]
    assert cell.by_seed("validation/accuracy") == {0: 0.5, 1: 0.72, 2: 0.74}
    assert any("1 runs were repeated later" in note for note in table.notes)


def test_the_time_in_a_record_counts_before_that_of_its_file(spec):
    fill(spec)
    again = made_run(spec / "again", "random", 0, 0.5, ("table9", "random", "paraphrase"), written=1e9)
    os.utime(again / "run.json", (4e9, 4e9))  # copied later than all others
    (table,) = tables_of(gather([spec]).runs)
    assert table.cells["random", "paraphrase"].by_seed("validation/accuracy") == {0: 0.7, 1: 0.72, 2: 0.74}


def test_own_data_with_other_metrics_have_a_table_of_their_own(tmp_path):
    for seed in range(2):
        made_run(tmp_path / f"c{seed}", seed=seed, task="text")
        metrics = {"validation/perplexity": 3.0 + seed}
        made_run(tmp_path / f"r{seed}", seed=seed, task="text", main_metric="perplexity", metrics=metrics)
    made_run(tmp_path / "failed", seed=2, task="text", status="failed", main_metric=None)
    first, second = tables_of(gather([tmp_path]).runs)
    assert (first.title, second.title) == ("text with tiny, accuracy", "text with tiny, perplexity")
    assert first.name != second.name and not any("no finite" in note for note in first.notes + second.notes)


def test_the_first_screen_shows_a_baseline_on_the_same_data(tmp_path):
    for seed in range(3):
        made_run(tmp_path / f"d{seed}", "diffora", seed, 0.8 + seed / 100, settings={"rank": 4, "rho": 0.5})
        made_run(tmp_path / f"l{seed}", "lora", seed, 0.7 + seed / 200)
        made_run(tmp_path / f"b{seed}", "bitfit", seed, 0.95, data_hash="other")
    found = tables_of(gather([tmp_path]).runs)
    (line,) = page.glance(found, {table.name: comparisons_of(table) for table in found})
    assert (line["ours"]["row"], line["baseline"]["row"], line["verdict"]) == ("diffora, r = 4", "lora", "better")


def test_means_over_common_seeds_leave_out_seeds_of_other_data(tmp_path):
    for seed in range(3):
        data = "other" if seed == 0 else "d"
        made_run(tmp_path / f"d{seed}", "diffora", seed, 0.8 + seed / 100, settings={"rho": 0.5}, data_hash=data)
        made_run(tmp_path / f"l{seed}", "lora", seed, 0.7 + seed / 200)
    found = tables_of(gather([tmp_path]).runs)
    (line,) = page.glance(found, {table.name: comparisons_of(table) for table in found})
    assert line["common"] == "0.8150 ± 0.0071 and 0.7075 ± 0.0035"


def test_notes_name_other_settings_and_versions(spec):
    fill(spec, ["random"], settings={"finetune": {"epochs": 3}}, versions={"torch": "2.1"}, git_commit="a" * 40)
    changed = {"finetune": {"epochs": 30}, "trainer": {"precision": "bf16-mixed"}}
    made = {"cell": ("table9", "DiffoRA", "paraphrase"), "settings": changed, "git_commit": "b" * 40}
    made_run(spec / "x", "diffora", 0, versions={"torch": "2.2"}, **made)
    (table,) = tables_of(gather([spec]).runs)
    assert "rows differ in more than their method: paraphrase: finetune.epochs, trainer.precision" in table.notes
    assert "the runs are of several versions: torch 2.1, 2.2; commit aaaaaaaa, bbbbbbbb" in table.notes


def test_a_completed_record_must_say_what_its_metrics_are(tmp_path):
    run = made_run(tmp_path / "run")
    content = json.loads((run / "run.json").read_text())
    del content["metric_facts"]
    (run / "run.json").write_text(json.dumps(content))
    assert "metric_facts is missing" in gather([tmp_path]).broken[0][1]


def test_tables_with_similar_names_have_different_files(tmp_path):
    for i, task in enumerate(("a b", "a-b")):
        made_run(tmp_path / str(i), task=task)
    files = page.write(gather([tmp_path]), tmp_path / "out", [tmp_path])
    assert len(set(files)) == len(files) == 2 * 4 + 2


def test_settings_are_not_mixed_within_a_cell(spec):
    fill(spec, ["random"], settings={"rank": 4})
    other = made_run(spec / "o", "random", 5, 0.1, ("table9", "random", "paraphrase"), settings={"rank": 8})
    os.utime(other / "run.json", (1e9, 1e9))
    (table,) = tables_of(gather([spec]).runs)
    assert set(table.cells["random", "paraphrase"].runs) == {0, 1, 2}
    assert any("1 runs with other settings left out (different: rank)" in note for note in table.notes)


def test_different_data_and_few_seeds_give_notes(spec):
    fill(spec, ["random"])
    made_run(spec / "x", "diffora", 0, cell=("table9", "DiffoRA", "paraphrase"), data_hash="other")
    (table,) = tables_of(gather([spec]).runs)
    notes = " ".join(table.notes)
    assert "2 different versions of the data" in notes and "only 1 seed," in notes


def test_runs_on_different_data_are_not_compared(tmp_path):
    for seed in range(3):
        for method, score in (("diffora", 0.9), ("lora", 0.5)):
            data = "one" if method == "diffora" or seed == 2 else "other"
            settings = {"rank": 4, "rho": 0.5} if method == "diffora" else {"rank": 4}
            made_run(tmp_path / f"{method}{seed}", method, seed, score + seed / 100, settings=settings, data_hash=data)
    (table,) = tables_of(gather([tmp_path]).runs)
    (found,) = comparisons_of(table)
    assert found.dev_best.n == 1 and found.dev_best.low is None  # seed 2 only
    assert not best_cells(table) and any("not compared, and no mean is bold" in note for note in table.notes)


def test_runs_of_no_experiment_are_grouped_by_setting(tmp_path):
    for seed in range(2):
        for rank in (2, 4):
            settings = {"rank": rank, "search": {"rank": rank}, "finetune": {"lr": rank / 100}}
            made_run(tmp_path / f"l{rank}{seed}", "lora", seed, 0.7 + rank / 100, settings=settings)
        made_run(tmp_path / f"d{seed}", "diffora", seed, 0.9, settings={"rank": 4, "rho": 0.5})
        made_run(tmp_path / f"c{seed}", "lora", seed, task="cola")
    cola, paraphrase = tables_of(gather([tmp_path]).runs)
    assert cola.title == "cola with tiny"
    assert paraphrase.rows == ["diffora, r = 4", "lora, r = 4, finetune.lr=0.04", "lora, r = 2, finetune.lr=0.02"]
    assert all(len(cell.runs) == 2 for cell in paraphrase.cells.values())


def test_curves_join_settings_that_differ_only_in_rho(tmp_path):
    for rho, score in ((0.2, 0.7), (0.5, 0.8), (0.9, 0.75)):
        for seed in range(2):
            made_run(tmp_path / f"{rho}-{seed}", "diffora", seed, score + seed / 100, settings={"rank": 4, "rho": rho})
    made_run(tmp_path / "other", "diffora", 0, settings={"rank": 8, "rho": 0.4, "search": {"rank": 8}})
    (table,) = tables_of(gather([tmp_path]).runs)
    (curve,) = curves_of(table)
    assert (curve.dial, curve.name) == ("rho", "diffora, rank = 4")
    assert [(x, pytest.approx(s.mean), s.n) for x, s in curve.points] == [
        (0.2, 0.705, 2),
        (0.5, 0.805, 2),
        (0.9, 0.755, 2),
    ]


def test_two_selections_of_one_size_make_no_curve(tmp_path):
    for like, scores in (("a", (0.6, 0.7)), ("b", (0.8, 0.9))):
        for rho, score in zip((0.2, 0.5), scores, strict=True):
            settings = {"rank": 4, "rho": rho, "method": {"like": f"{like}{rho}"}}
            made_run(tmp_path / f"{like}{rho}", "random", 0, score, settings=settings)
    (table,) = tables_of(gather([tmp_path]).runs)
    assert len(table.rows) == 4 and not curves_of(table)


def test_all_of_the_best_means_are_bold(tmp_path):
    for method, score in (("lora", 0.9), ("bitfit", 0.9), ("random", 0.8)):
        made_run(tmp_path / method, method, 0, score, ("own", method, "a"))
    (table,) = tables_of(gather([tmp_path]).runs)
    assert {row for row, _ in best_cells(table)} == {"lora", "bitfit"}


def test_rank_and_orthogonality_are_in_a_table(spec):
    fill(spec, ["random"])
    (table,) = tables_of(gather([spec]).runs)
    grid = cost_table(table)
    row = dict(zip(grid.head, grid.rows[0], strict=True))
    assert row["rank of ΔW"] == "3.500 ± 0.000" and row["orthogonality loss of ΔW"] == "70.25 ± 0.00"


def test_short_times_keep_their_digits(tmp_path):
    for seed, step in enumerate((0.0123, 0.0129)):
        time = {"search_s": 0.0, "finetune_s": 61.2, "step_s": step, "total_s": 100.0}
        made_run(tmp_path / str(seed), "lora", seed, time=time)
    (table,) = tables_of(gather([tmp_path]).runs)
    grid = cost_table(table)
    row = dict(zip(grid.head, grid.rows[0], strict=True))
    assert (row["a step, s"], row["fine-tuning, s"]) == ("0.013 ± 0.000", "61 ± 0")


def test_strange_values_in_records_do_not_stop_the_report(tmp_path):
    facts = {"setting_id": "s", "settings": {}, "config_hash": "c"}
    record = {"method": "lora", "task": "mrpc", "model": "m", "seed": 0, "status": "completed", **facts}
    record |= {"metrics": {}, "params": {}, "time": {}, "memory": {}, "main_metric": "accuracy"}
    record["metric_facts"] = {}
    changes = [{}, {"metrics": {"validation/accuracy": None}}, {"metrics": {"validation/accuracy": "high"}, "seed": 1}]
    changes += [{"params": {"adapter": math.nan}, "selection": {"selected": 3}, "settings": {"rank": [1]}, "seed": 2}]
    for i, change in enumerate(changes):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "run.json").write_text(json.dumps(record | change))
    gathered = gather([tmp_path])
    page.write(gathered, tmp_path / "out", [tmp_path])
    assert len(gathered.runs) == 4
    assert [run.config for run in gathered.runs] == [{}, {}, {}, {"rank": [1]}]  # an edited record


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", b"[]"),
        ("run.json", b"{}"),
        ("run.json", b'{"status": "\xff"}'),
        ("run.json", b"[" * 5000 + b"]" * 5000),
        ("run.json", b'{"method": "lora", "task": "t", "model": "m", "seed": 1e999, "status": "completed"}'),
        ("selection.json", b"[" * 5000),
        ("selection.json", b'{"selected": 5, "types": ["a"]}'),
        ("trajectory.json", b"\xff"),
        ("trajectory.json", b'{"types": [], "rounds": 1e308, "gamma_bar": [[[1.0]], [[1.0]]]}'),
        ("config.yaml", b"\xff: ["),  # a report does not read it
    ],
)
def test_a_broken_file_does_not_stop_the_report(tmp_path, file, content):
    """C: broken records, JSON nested 5,000 levels deep"""
    for seed in range(2):
        made_run(tmp_path / f"{seed}", "diffora", seed, settings={"rank": 4, "rho": 0.5})
    (tmp_path / "1" / file).write_bytes(content)
    gathered = gather([tmp_path])
    html = page.write(gathered, tmp_path / "out", [tmp_path])[0].read_text()
    if file == "run.json":
        assert [path for path, _ in gathered.broken] == [tmp_path / "1" / "run.json"]
        assert "unreadable" in html
    else:
        assert len(gathered.runs) == 2 and not gathered.broken


def test_numbers_too_large_to_square_are_left_out(tmp_path):
    for seed, metric in enumerate((1e308, -(10**40), 0.5)):
        made_run(tmp_path / f"{seed}", "lora", seed, metrics={"validation/accuracy": metric, "best_epoch": 1e308})
        record = json.loads((tmp_path / f"{seed}" / "run.json").read_text())
        record["history"][0]["generalisation_gap"] = metric
        (tmp_path / f"{seed}" / "run.json").write_text(json.dumps(record))
    html = page.write(gather([tmp_path]), tmp_path / "out", [tmp_path])[0].read_text()
    first_row = html.partition("<td>lora</td>")[2].partition("</tr>")[0]
    assert '<td data-value="2">2</td>' in first_row  # 1e308 is left out, and n says so
    assert "1e+308" not in html and not re.search(r"\bnan\b", html)


# --- as text, pictures and a page ---


def test_hostile_names_stay_text(tmp_path):
    for seed in range(2):
        cell = ("x", HOSTILE, HOSTILE)
        made_run(tmp_path / f"{seed}", "diffora", seed, 0.5 + seed / 10, cell=cell, task=HOSTILE, model=HOSTILE)
        made_run(
            tmp_path / f"b{seed}", HOSTILE, seed, task=HOSTILE, error=HOSTILE, status="failed" if seed else "completed"
        )
    files = page.write(gather([tmp_path]), tmp_path / "out", [tmp_path])
    html = files[0].read_text()

    class Elements(HTMLParser):
        scripts: list[str] = []  # noqa: RUF012
        inside = False

        def handle_starttag(self, tag, attrs):
            self.inside = tag == "script"
            self.scripts += [""] if self.inside else []

        def handle_data(self, data):
            if self.inside:
                self.scripts[-1] += data

    elements = Elements()
    elements.feed(html)
    assert len(elements.scripts) == 2  # the data and the page's own
    rows = json.loads(elements.scripts[0])["rows"]
    assert sum(HOSTILE in row for row in rows) == 4
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html

    grid = TextTable(HOSTILE, [("a_b", [HOSTILE, "^~\\"])], [[HOSTILE, "1 ± 2"]])
    text = latex(grid)
    assert r"\& 100\% of \$x\_1\$" in text and r"1 $\pm$ 2" in text and r"\textasciicircum{}\textasciitilde{}" in text
    assert not re.search(r"(?<!\\)[%_#](?!\d)", text.replace("\\\\", ""))
    line = markdown(grid).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3 and "<script>" not in line
    assert comma_separated(grid).count("\n") == 2


def test_latex_has_no_letters_that_it_does_not_know():
    text = latex(TextTable("", [("", ["median σ/σ₁ of ΔW, ρ ± − –"])], [["λ"]]))
    assert text.isascii() and r"$\sigma$/$\sigma$$_1$" in text


def test_latex_has_as_many_cells_in_each_line(spec):
    fill(spec)
    (table,) = tables_of(gather([spec]).runs)
    grid = main_table(table)
    lines = [line for line in latex(grid).splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") + 1 for line in lines[1:]} == {len(grid.head)} and len(lines) == 2 + len(grid.rows)


def test_pictures_of_selections_are_frequencies_over_seeds(spec):
    fill(spec, ["DiffoRA"], seeds=range(4))
    (table,) = tables_of(gather([spec]).runs)
    cell = table.cells["DiffoRA", "paraphrase"]
    found = pictures.dams("DiffoRA", "paraphrase", cell)
    selected = [run.record.selection["selected"] for run in cell.runs.values()]
    share = sum(TYPES[0] in rows[0] for rows in selected) / 4
    assert f"layer 1: {share:.3f}" in found.frequency
    assert len(found.seeds) == 4 and len(found.trajectory) == LAYERS and found.stability.n == 4


def test_ticks_are_round_and_within():
    assert charts.ticks(0.0, 1.0) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert charts.ticks(-0.013, 0.021) == pytest.approx([-0.01, 0, 0.01, 0.02])
    assert charts.ticks(3, 3) == [3]


def test_only_the_best_of_many_settings_are_shown_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 4)
    monkeypatch.setattr(page, "PICTURED", 2)
    for i in range(7):
        made_run(tmp_path / f"{i}", "diffora", 0, 0.5 + i / 100, settings={"rank": 4, "rho": i / 10})
    files = page.write(gather([tmp_path]), tmp_path / "out", [tmp_path])
    html = files[0].read_text()
    assert "There are 7 settings; the 4 best are shown" in html
    assert "Selections are drawn for 2 settings; 2 more are not drawn." in html
    listed = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert len(listed["rows"]) == 7 and {len(row) for row in listed["rows"]} == {len(listed["columns"])}


def test_the_command_line_is_checked(tmp_path):
    assert page.request([str(tmp_path), f"output={tmp_path / 'o'}"]) == ([tmp_path], tmp_path / "o", 0.5)
    assert page.request([str(tmp_path), "margin=0.3"])[2] == 0.3
    with pytest.raises(UserError) as wrong:
        page.request([str(tmp_path), "margin=nan", "margin=-1", "margin=half", "margin="])
    assert [m.partition(" must")[0] for m in wrong.value.problems] == [
        "margin=nan",
        "margin=-1",
        "margin=half",
        "margin=",
    ]
    with pytest.raises(UserError, match=r"outptu=x: a report takes folders"):
        page.request([str(tmp_path), "outptu=x"])
    with pytest.raises(UserError, match="an argument is empty"):  # "$RUNS" that is not set
        page.request([""])
    with pytest.raises(UserError, match="no folder of runs"):
        page.request(["output=x"])


def test_a_margin_in_points_decides_what_is_equivalent(spec):
    for seed, (ours, random_) in enumerate([(0.8, 0.801), (0.8, 0.799), (0.9, 0.901), (0.7, 0.699), (0.8, 0.8)]):
        for row, method, score in (("DiffoRA", "diffora", ours), ("random", "random", random_)):
            made_run(spec / f"{row}{seed}", method, seed, score, ("table9", row, "paraphrase"))
    table = table_of(spec)
    (found,) = comparisons_of(table)
    assert found.verdict == "equivalent" and found.told(found.verdict) == "equivalent within ±0.5"
    (narrow,) = comparisons_of(table, margin=0.05)
    assert narrow.verdict == "undecided" == narrow.told(narrow.verdict)
    (tally, _) = page.tallies([table], {table.name: [found]})
    assert tally["counts"]["equivalent"] == tally["n"] == 1 and tally["counts"]["undecided"] == 0
    html = page.write(gather([spec]), spec / "out", [spec], margin=0.4)[0].read_text()
    assert '<span class="equivalent">equivalent within ±0.4</span>' in html and "smaller than 0.4 points" in html
    assert f"detectable: {found.dev_best.detectable:.4f}" in html
    assert 'class="equivalent">equivalent within ±0.4</td>' in html
    assert "undecided" in page.write(gather([spec]), spec / "out", [spec], margin=0.05)[0].read_text()


def test_costs_have_mean_and_deviation_in_the_unit_of_the_table(spec):
    fill(spec, ["DiffoRA"])
    for seed, file in enumerate(sorted(spec.rglob("run.json"))):
        metrics = json.loads(file.read_text())["metrics"] | {"generalisation_gap": 0.02 + 0.01 * seed}
        change_record(file.parent, metrics=metrics, time={"finetune_s": 60.0 + 2 * seed, "total_s": 90.0})
    ((line,), column) = list(csv.DictReader(costs_csv(table_of(spec)).splitlines())), table_of(spec).columns[0]
    assert column.factor("generalisation_gap") == 100
    assert (float(line["generalisation gap"]), float(line["generalisation gap: std"])) == pytest.approx((3.0, 1.0))
    assert (float(line["fine-tuning, s"]), float(line["fine-tuning, s: std"])) == pytest.approx((62.0, 2.0))


def test_a_margin_in_points_is_a_hundredth_of_it_where_fractions_are_shown(tmp_path):
    for seed, (ours, random_) in enumerate([(0.8, 0.805), (0.8, 0.795), (0.9, 0.905), (0.7, 0.695)]):
        for method, score in (("diffora", ours), ("random", random_)):
            made_run(tmp_path / f"{method}{seed}", method, seed, score)
    table = table_of(tmp_path)
    assert not table.columns[0].percent
    (found,), (wide,) = comparisons_of(table), comparisons_of(table, margin=2)
    assert (found.margin, wide.margin) == pytest.approx((0.005, 0.02))
    assert (found.verdict, wide.verdict) == ("undecided", "equivalent")


def test_holms_correction_counts_the_comparisons_with_baselines_only():
    scores = {"a: 1": (0.80, 0.81, 0.84), "a: 2": (0.85, 0.87, 0.88), "b": (0.70, 0.72, 0.75)}
    runs = [
        in_memory("lora" if name == "b" else "diffora", seed, name, score)
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]
    (table,) = tables_of(runs)
    found = comparisons_of(table)
    assert [c.variant for c in found] == [False, False, True] and found[2].p_holm is None
    adjusted = holm([c.dev_best.p for c in found[:2]])
    assert [c.p_holm for c in found[:2]] == pytest.approx(adjusted) and max(adjusted) < 0.1


def test_a_margin_in_points_says_nothing_about_a_loss(tmp_path):
    for seed in range(3):
        for method in ("diffora", "random"):
            facts = {"main_metric": "perplexity", "metrics": {"validation/perplexity": 3 + 0.0001 * seed}}
            made_run(tmp_path / f"{method}{seed}", method, seed, **facts)
    (found,) = comparisons_of(table_of(tmp_path))
    assert found.margin is None and found.column.compared == "validation/perplexity"


def test_only_fractions_are_shown_in_per_cent():
    column = ResultColumn("c", ("validation/accuracy", "update/rank"), True, METRICS)
    assert column.factor("validation/accuracy") == column.factor("validation_mismatched/accuracy") == 100
    assert column.factor("update/rank") == 1 and column.held_out() == ("held_out/accuracy",)


# --- numbers that can be trusted ---


def in_memory(method, seed, setting, score, **changes):
    """A run without files."""
    record = {
        "method": method,
        "task": "t",
        "model": "m",
        "seed": seed,
        "status": "completed",
        "main_metric": "accuracy",
    }
    parts = {"metrics": {"validation/accuracy": score}, "params": {"adapter": 10}, "time": {}, "memory": {}}
    facts = {"setting_id": setting, "settings": {"method": {"name": setting}}, "config_hash": ""}
    content = {**record, **parts, **facts, "metric_facts": FACTS, **changes}
    return Run(Path(f"{method}{setting}{seed}"), Record.of(content), setting, {"method.name": setting}, 0.0)


def table_of(folder):
    (table,) = tables_of(gather([folder]).runs)
    return table


def test_losses_are_never_shown_in_per_cent(spec):
    column = ResultColumn("c", ("validation/accuracy", "validation/loss"), True, METRICS)
    assert column.factor("train/accuracy") == column.factor("generalisation_gap") == 100
    assert {column.factor(key) for key in ("train/loss", "validation/loss", "validation/perplexity")} == {1}
    gap = {"generalisation_gap": MetricFacts("perplexity", False)}
    column = ResultColumn("c", ("validation/perplexity",), True, METRICS | gap)
    assert column.factor("generalisation_gap") == 1 and not column.maximise
    fill(spec, ["random"])
    charts_, _, _ = pictures.training_charts(table_of(spec))
    assert any("0.4" in chart and "100" not in chart for title, chart in charts_ if "training loss" in title)


def test_evaluations_within_an_epoch_are_drawn_where_they_are():
    history = [{"epoch": at, "train/loss": 1 - at} for at in (0.25, 0.5, 1.0)]
    points = pictures._means([history, history[:2]], "train/loss", 1.0)
    assert points == [(0.25, 0.75), (0.5, 0.5)]


def test_all_comparisons_are_computed_and_the_first_are_listed():
    rng = random.Random(0)
    runs = [in_memory("diffora", s, f"a: {i}", rng.random()) for i in range(30) for s in range(3)]
    runs += [in_memory("lora", s + 3 * (i == 0), f"b: {i}", rng.random()) for i in range(20) for s in range(3)]
    (table,) = tables_of(runs)
    found = comparisons_of(table)
    assert len(found) == 30 * 19 + 30 * 29 / 2  # one baseline has other seeds
    (tally, _) = page.tallies([table], {table.name: found})
    assert tally["n"] == 570
    p_values = [c.dev_best.p for c in found if not c.variant]
    assert [c.p_holm for c in found if not c.variant] == pytest.approx(holm(p_values))
    grid = comparisons_table(table, found)
    assert len(grid.rows) == PAIRS and grid.notes[0].startswith("The first 400 of 1,005 comparisons")
    assert comparisons_csv(found).count("\n") == 1006


def test_n_counts_the_seeds_that_have_a_value(tmp_path):
    for seed in range(5):
        value = None if seed in (1, 3) else 10.0 + seed
        metrics = {"validation/perplexity": value, "held_out/perplexity": value}
        made_run(tmp_path / f"{seed}", seed=seed, metrics=metrics, main_metric="perplexity")
    grid = main_table(table_of(tmp_path))
    assert dict(zip(grid.head, grid.rows[0], strict=True))["n"] == "3"
    assert "paraphrase: no finite perplexity: lora (2 of 5 runs)" in grid.notes
    assert any("some rows have only 3 seeds" in note for note in grid.notes)


def test_means_over_different_seeds_are_not_ranked(spec):
    fill(spec, ["DiffoRA"], seeds=range(4))
    fill(spec, ["random"], seeds=range(2))
    fill(spec, ["full FT"], seeds=[3])
    table = table_of(spec)
    assert pictures.best_cells(table) == set()
    assert any("the rows have different seeds" in note for note in table.notes)
    found = comparisons_of(table)
    (line,) = page.glance([table], {table.name: found})
    assert line["baseline"]["row"] == "full FT" and line["p"] == ""
    assert line["common"] == "83.00 and 90.00"  # of seed 3, where our mean is 81.5
    html = page.write(gather([spec]), spec / "out", [spec])[0].read_text()
    assert "n = 1, few seeds; means over the common seeds: 83.00 and 90.00" in html

    for seed in (0, 1, 2):
        fill(spec, ["full FT"], seeds=[seed])
    for seed in (2, 3):
        fill(spec, ["random"], seeds=[seed])
    table = table_of(spec)
    assert pictures.best_cells(table) == {("full FT", "paraphrase, accuracy/f1")}
    assert not any("different seeds" in note for note in table.notes)
    assert page.glance([table], {table.name: comparisons_of(table)})[0]["common"] == ""


def with_selection(folder, seed, selection=None, of=None, **content):
    """A DiffoRA run that takes the selection file of the run ``of``, or a given list of modules."""
    if of is not None:
        source = json.loads((of / "selection.json").read_text()) | content
        (of / "selection.json").write_text(json.dumps(source))
    settings = {"method": {"selection": selection or str(of / "selection.json")}}
    made_run(folder, "diffora", seed, settings=settings)
    if of is None:
        source = json.loads((folder / "selection.json").read_text()) | content
    (folder / "selection.json").write_text(json.dumps(source))
    record = json.loads((folder / "run.json").read_text())
    chosen = {key: source[key] for key in ("selector", "k", "rank", "selected")}
    change_record(folder, selection=chosen, time=record["time"] | {"search_s": 0.0})


def test_one_selection_for_all_seeds_has_no_agreement(tmp_path):
    search = made_run(tmp_path / "searches" / "0", "diffora", 0)
    for seed in range(3):
        with_selection(tmp_path / "runs" / f"reused{seed}", seed, of=search)
        given = [[*TYPES[:2]]] * LAYERS
        with_selection(tmp_path / "given" / f"{seed}", seed, list(TYPES[:2]), selected=given, selector="given")
    table = table_of(tmp_path / "runs")
    ((place, cell),) = table.cells.items()
    found = pictures.dams(*place, cell)
    assert found.stability is None and found.single == "reused" and found.seeds == []
    row = dict(zip(main_table(table).head, main_table(table).rows[0], strict=True))
    assert row["time: search"] == "reused" and row["n"] == "3"
    assert "All seeds have the same selection (reused)." in page.write(
        gather([tmp_path / "runs"]), tmp_path / "out", [tmp_path]
    )[0].read_text().replace("\n", " ")

    for seed in range(3):  # like method.like with one draw, whose file has the seed of the run
        run = made_run(tmp_path / "drawn" / f"{seed}", "random", seed, settings={"method": {"draw": 7}})
        (run / "selection.json").write_text(json.dumps({"types": TYPES, "selected": [TYPES[:1]] * 2, "seed": seed}))
    ((place, cell),) = table_of(tmp_path / "drawn").cells.items()
    assert pictures.dams(*place, cell).single == "reused" and not cell.reused

    table = table_of(tmp_path / "given")
    ((place, cell),) = table.cells.items()
    assert pictures.dams(*place, cell).single == "given" and main_table(table).rows[0][-2] == ""


def test_selections_that_a_tie_decided_do_not_count_as_agreement(tmp_path):
    for seed in range(3):
        folder = made_run(tmp_path / f"{seed}", "diffora", seed)
        content = json.loads((folder / "selection.json").read_text())
        equal = [[1 / len(TYPES)] * len(TYPES)] * LAYERS
        content |= {"gamma_bar": equal, "selected": [[*TYPES[:2]]] * LAYERS}
        (folder / "selection.json").write_text(json.dumps(content))
    ((place, cell),) = table_of(tmp_path).cells.items()
    assert all(found.tied for found in selections(cell).values()) and agreement(selections(cell)) is None
    moved = [[0.3, 0.2, *[0.5 / (len(TYPES) - 2)] * (len(TYPES) - 2)]] * LAYERS
    for seed in (0, 1):
        (tmp_path / f"{seed}" / "selection.json").write_text(json.dumps(content | {"gamma_bar": moved, "seed": seed}))
    found = selections(table_of(tmp_path).cells[place])
    assert [found[seed].tied for seed in range(3)] == [False, False, True] and agreement(found).n == 2


def test_selections_of_each_seeds_own_search_are_one_setting_in_any_folder(tmp_path):
    for seed in range(3):
        search = made_run(tmp_path / "searches" / f"{seed}", "diffora", seed)
        with_selection(tmp_path / "runs" / f"a{seed}", seed, of=search)
        with_selection(tmp_path / "runs" / f"b{seed}", seed, of=search, config={"search": {"lr": 0.5}})
    table = table_of(tmp_path / "runs")
    assert sorted(len(cell.runs) for cell in table.cells.values()) == [3, 3]  # two ways to search
    found = [pictures.dams(*place, cell) for place, cell in table.cells.items()]
    assert [(dam.single, dam.stability.n) for dam in found] == [("", 3)] * 2
    assert all(cell.reused for cell in table.cells.values())


def test_a_given_draw_is_part_of_the_setting(tmp_path):
    def runs(name, draws):
        for i, (seed, draw) in enumerate(draws):
            settings = {"rank": 4} if draw is None else {"rank": 4, "method": {"draw": draw}}
            made_run(tmp_path / name / f"{i}", "random", seed, settings=settings)
        return {row: sorted(cell.runs) for (row, _), cell in table_of(tmp_path / name).cells.items()}

    seeds = range(5)
    assert runs("own", [(s, None) for s in seeds]) == {"random, r = 4": [*seeds]}
    assert runs("fixed", [(s, 0) for s in seeds]) == {"random, r = 4": [*seeds]}
    crossed = runs("crossed", itertools.product(range(3), range(6)))
    assert crossed == {f"random, r = 4, method.draw={draw}": [0, 1, 2] for draw in range(6)}
    assert runs("one seed", [(0, draw) for draw in range(3)]) == {
        f"random, r = 4, method.draw={draw}": [0] for draw in range(3)
    }
    assert runs("one more", [*((s, None) for s in seeds), (0, 7)]) == {
        "random, r = 4, method.draw=${seed}": [*seeds],
        "random, r = 4, method.draw=7": [0],
    }


def test_values_that_differ_between_columns_are_listed_in_column_order(spec):
    fill(spec, ["random"], seeds=range(3), adapter=222)
    fill(spec, ["random"], seeds=range(2), column="digits", adapter=111)
    fill(spec, ["DiffoRA"], column="digits", adapter=333)
    grid = main_table(table_of(spec))
    diffora, random = (dict(zip(grid.head, row, strict=True)) for row in grid.rows[1:])
    assert (random["parameters: adapter"], random["n"], random["time: search"]) == ("222 / 111", "3 / 2", "")
    assert (diffora["parameters: adapter"], diffora["n"], diffora["time: search"]) == ("– / 333", "– / 3", "– / 20 s")
    assert any("one value for each column, in the order of the columns" in note for note in grid.notes)
    assert grid.rows[0][1] == grid.rows[0][-3] == ""  # full FT has no runs


def test_failed_runs_are_noted_with_their_cell(spec):
    fill(spec, ["random"], seeds=range(2))
    fill(spec, ["random"], seeds=[2, 3], status="failed")
    made_run(spec / "first try", "random", 0, cell=("table9", "random", "paraphrase"), status="failed")
    fill(spec, ["full FT"], seeds=[0], status="interrupted")
    notes = table_of(spec).notes
    assert "not completed: random, paraphrase: 2 more seeds failed; full FT, paraphrase: 1 seed interrupted" in notes
    assert "no runs yet: DiffoRA" in notes

    for seed in range(3):
        made_run(spec / "own" / f"{seed}", seed=seed, status="failed" if seed else "completed")
    made_run(spec / "own" / "other", seed=9, status="failed", settings={"rank": 9})
    notes = table_of(spec / "own").notes
    assert "not completed: lora: 2 more seeds failed" in notes and "1 more settings have no completed run" in notes


def test_odd_records_are_listed_or_shown_and_never_stop_the_report(tmp_path):
    made_run(tmp_path / "surrogate", seed=1, status="failed", error="no file caf\udce9.csv")
    made_run(tmp_path / "long", task="x" * 300, experiment=None)
    for i, changes in enumerate([{"experiment": 5}, {"data_hash": ["x"]}, {"row": {}}, {"error": 1}]):
        made_run(tmp_path / f"odd{i}", **changes)
    huge = made_run(tmp_path / "huge") / "run.json"
    huge.write_text(huge.read_text().replace('"adapter": 1000', '"adapter": 1' + "0" * 400))
    gathered = gather([tmp_path])
    assert sorted(reason.removeprefix("not the record of a run: ") for _, reason in gathered.broken) == [
        f"{key} must be text or null" for key in ("data_hash", "error", "experiment", "row")
    ]
    files = page.write(gathered, tmp_path / "out", [tmp_path])
    assert r"no file caf\udce9.csv" in files[0].read_text(encoding="utf-8")
    assert max(len(file.name) for file in files) < 200


def test_runs_that_differ_in_the_recipe_only_are_noted(spec):
    for seed in range(3):
        task = {"name": "paraphrase", "recipe": {"warmup_steps": 1 + seed // 2}}
        run = made_run(spec / f"{seed}", seed=seed, cell=("table9", "random", "paraphrase"), settings={"task": task})
        os.utime(run / "run.json", (1e9 + seed, 1e9 + seed))
    assert "random, paraphrase: 2 runs with other settings left out (different: task.recipe)" in table_of(spec).notes


def test_our_mean_is_shown_if_all_columns_have_runs(spec, monkeypatch):
    paper = {"params": "2M/1M", "paraphrase": "80/40", "digits": 70, "mean": 65.5}
    monkeypatch.setitem(SPEC["rows"][2], "paper", paper)
    monkeypatch.setitem(SPEC["columns"]["small"], "digits", {"set": ["task=digits"]})
    for row in (SPEC["rows"][0], SPEC["rows"][1]):
        monkeypatch.setitem(row, "paper", None)
    (spec.parent / "conf" / "experiment" / "table9.yaml").write_text(yaml.safe_dump({"hydra": {"sweeper": SPEC}}))
    fill(spec, ["random", "DiffoRA"])
    assert "paper: mean" in main_table(table_of(spec)).head  # also if some columns have no runs
    fill(spec, ["random"], seeds=range(1, 4), column="digits")
    grid = main_table(table_of(spec))
    by_row = {row[0]: dict(zip(grid.head, row, strict=True)) for row in grid.rows}
    values = [((72 + 36) / 2 + 72) / 2, ((74 + 37) / 2 + 74) / 2]  # seeds 1 and 2
    assert by_row["random"]["mean: dev_best"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert by_row["random"]["mean: paper"] == "65.5" and by_row["DiffoRA"]["mean: dev_best"] == ""
    assert any("trained / at inference, in [R] Table 1 with the head" in note for note in grid.notes)


def test_a_plot_of_differences_names_their_unit(spec):
    fill(spec)
    fill(spec, column="digits")
    table = table_of(spec)
    plots, _, _ = pictures.forests(table, comparisons_of(table))
    in_per_cent, as_fractions = (plot for _, plot in plots)
    assert "points, right of 0 is better" in in_per_cent
    assert "difference, right of 0 is better" in as_fractions


def test_a_generalisation_gap_has_the_unit_of_its_score(spec):
    fill(spec, ["random"])
    fill(spec, ["random"], column="digits")
    grid = cost_table(table_of(spec))
    gap = {row[1]: dict(zip(grid.head, row, strict=True))["generalisation gap"] for row in grid.rows}
    assert gap == {"paraphrase": "2.00 ± 0.00", "digits": "0.0200 ± 0.0000"}


def test_long_names_are_listed_in_a_key(tmp_path):
    for i, seed in itertools.product(range(2), range(3)):
        settings = {"rank": 4, "finetune": {"lr": 0.001 * (i + 1), "batch_size": 16 * (i + 1)}, "search": {"lr": i}}
        made_run(tmp_path / f"d{i}{seed}", "diffora", seed, 0.8 + seed / 100 + i / 50, settings=settings)
        made_run(tmp_path / f"l{i}{seed}", "lora", seed, 0.79 + seed / 90 + i / 40, settings=settings)
    table = table_of(tmp_path)
    assert all(("search.lr" in row) == row.startswith("diffora") for row in table.rows)
    ((_, plot),), key, _ = pictures.forests(table, comparisons_of(table))
    assert [row for _, row in key] == table.rows and [short for short, _ in key] == ["[1]", "[2]", "[3]", "[4]"]
    assert "diffora" not in plot
    ends = [(float(x), text) for x, text in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]*)', plot)]
    assert ends and all(x - 6.4 * len(text) > 0 for x, text in ends)


def test_pictures_of_a_setting_have_one_scale(spec):
    fill(spec, ["DiffoRA"], seeds=range(2))
    file = next(spec.glob("DiffoRA-*-1")) / "selection.json"
    content = json.loads(file.read_text())
    content["gamma_bar"] = [[0.25 + 0.01 * (-1) ** j for j in range(len(TYPES))]] * LAYERS
    file.write_text(json.dumps(content))
    found = pictures.dams("DiffoRA", "paraphrase", table_of(spec).cells["DiffoRA", "paraphrase"])
    assert found.scale == pytest.approx(0.05)
    strongest = [max(map(float, re.findall(r'fill-opacity="([\d.]+)"', picture))) for _, picture in found.seeds]
    assert strongest == [0.9, 0.18]
    html = page.write(gather([spec]), spec / "out", [spec])[0].read_text()
    assert "strongest at a distance of 0.050 from 1/N" in html
    assert not re.search(r'<[^>]* class="[^">]*"[^>]* class="', html)


def test_colours_of_independent_gates_start_at_a_half(spec):
    fill(spec, ["DiffoRA"], seeds=range(2))
    for number, file in enumerate(sorted(spec.glob("DiffoRA-*/selection.json"))):
        gates = [[0.5 + 0.1 * (-1) ** j * (number + 1) for j in range(len(TYPES))]] * LAYERS
        file.write_text(json.dumps(json.loads(file.read_text()) | {"gamma_bar": gates, "relaxation": "sigmoid"}))
    found = pictures.dams("DiffoRA", "paraphrase", table_of(spec).cells["DiffoRA", "paraphrase"])
    assert found.scale == pytest.approx(0.2)
    assert all(picture.count('class="more"') == picture.count('class="less"') for _, picture in found.seeds)
    html = page.write(gather([spec]), spec / "out", [spec])[0].read_text()
    assert "γ̄ is above 1/2" in html and "strongest at a distance of 0.200 from 1/2" in html


def test_the_mean_trajectory_is_over_all_seeds(spec, monkeypatch):
    monkeypatch.setattr(pictures, "SEEDS", 1)
    fill(spec, ["DiffoRA"], seeds=[2, 0, 1])
    cell = table_of(spec).cells["DiffoRA", "paraphrase"]
    assert list(cell.runs) == [0, 1, 2]
    seen = []
    monkeypatch.setattr(charts, "line_chart", lambda lines, *_, **__: seen.append(lines))
    pictures.trajectory_charts(cell, TYPES)
    ends = [json.loads((run.folder / "trajectory.json").read_text())["gamma_bar"][-1] for run in cell.runs.values()]
    (faint,), strong = ([line.points[-1][1] for line in seen[0] if line.faint is f][:1] for f in (True, False))
    assert faint == ends[0][0][0] and strong == [pytest.approx(np.mean([end[0][0] for end in ends]))]


def test_lines_that_are_not_drawn_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LINES", 2)
    for lr, rho in itertools.product((1, 2, 3), (0.2, 0.5)):
        settings = {"rank": 4, "rho": rho, "finetune": {"lr": lr}}
        made_run(tmp_path / f"{lr}{rho}", "diffora", 0, settings=settings)
    _, note = pictures.dial_charts(table_of(tmp_path))
    assert note == "1 more lines not drawn"
    assert note in page.write(gather([tmp_path]), tmp_path / "out", [tmp_path])[0].read_text()


def test_a_selection_without_its_file_is_read_from_the_record_if_the_settings_name_the_types(spec):
    """Without them, types that no seed selected would be missing, and chance would be another."""
    place = "DiffoRA", "paraphrase"
    for folder, candidates in (("unnamed", None), ("others", ["another"]), ("named", list(TYPES))):
        fill(spec / folder, ["DiffoRA"], seeds=range(2), settings={"model": {"candidates": candidates}})
    for file in spec.rglob("selection.json"):
        file.unlink()
    assert pictures.dams(*place, table_of(spec / "unnamed").cells[place]) is None
    assert pictures.dams(*place, table_of(spec / "others").cells[place]) is None
    found = pictures.dams(*place, table_of(spec / "named").cells[place])
    assert "layer 1: " in found.frequency and len(found.seeds) == 2 and found.scale is None
    for file in spec.rglob("run.json"):
        change_record(file.parent, selection={"selector": "search"})
    assert pictures.View(table_of(spec), [], False, 5).dams == []


def test_a_report_replaces_an_earlier_one(tmp_path):
    made_run(tmp_path / "a" / "run", task="old")
    made_run(tmp_path / "b" / "run", task="new")
    page.write(gather([tmp_path / "a"]), tmp_path / "out", [tmp_path])
    (tmp_path / "out" / "tables" / "mine.csv").touch()
    files = page.write(gather([tmp_path / "b"]), tmp_path / "out", [tmp_path])
    present = {file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert present == {*files, tmp_path / "out" / "tables" / "mine.csv"}


def csv_rows(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_data_files_hold_numbers(spec):
    fill(spec)
    page.write(gather([spec]), spec / "out", [spec])
    rows = csv_rows(spec / "out" / "tables" / "table9-small-comparisons.csv")
    (line,) = (row for row in rows if row["against"] == "random")
    want = stats.ttest_rel([80, 81, 82], [70, 72, 74])
    interval = want.confidence_interval(0.95)
    found = [float(line[f"difference {key}"]) for key in ("mean", "low", "high", "p", "n")]
    assert found == pytest.approx([9.0, interval.low, interval.high, want.pvalue, 3])
    assert float(line["difference detectable"]) == pytest.approx(detectable(np.std([10, 9, 8], ddof=1), 3))
    equivalent = stats.ttest_1samp([10, 9, 8], 0.5, alternative="less").pvalue
    assert (line["margin"], float(line["difference p of equivalence"])) == ("0.5", pytest.approx(equivalent))
    assert line["difference verdict"] == "better" and line["about equal size"] == "True"
    costs = csv_rows(spec / "out" / "tables" / "table9-small-cost.csv")
    (line,) = (row for row in costs if row["method"] == "DiffoRA")
    assert (float(line["search, s"]), float(line["search, s: std"]), int(line["runs"])) == (20.0, 0.0, 3)
    assert float(line["generalisation gap"]) == pytest.approx(2.0)


@pytest.mark.parametrize(("written", "rows"), [("seed${seed}", 1), ("seed0", 1), ("seed{}", 2)])
def test_a_selection_file_whose_path_has_the_seed_belongs_to_that_seed(tmp_path, written, rows):
    """Both files say that seed 0 made them, and select different modules. Only the interpolation shows the rule."""
    for seed in range(2):
        search = made_run(tmp_path / "searches" / f"seed{seed}", "diffora", seed)
        file = search / "selection.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 0}))
    for seed in range(2):
        like = f"{tmp_path}/searches/{written.format(seed) if '$' not in written else written}/selection.json"
        made_run(tmp_path / "runs" / f"{seed}", "random", seed, settings={"method": {"like": like}})
    assert len(table_of(tmp_path / "runs").cells) == rows


def test_draws_with_the_sizes_of_another_rows_selections_are_one_setting(tmp_path):
    for rho, seed in itertools.product((0.2, 0.5), range(3)):
        search = made_run(tmp_path / "searches" / f"{rho}-{seed}", "diffora", seed)
        file = search / "selection.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rho": rho}))
        settings = {"method": {"like": str(file)}, "rank": 4, "rho": rho}
        made_run(tmp_path / "runs" / f"{rho}-{seed}", "random", seed, settings=settings)
    table = table_of(tmp_path / "runs")
    assert [sorted(cell.runs) for cell in table.cells.values()] == [[0, 1, 2]] * 2
    likes = {cell.first.config["method.like"] for cell in table.cells.values()}
    assert {like.partition(",")[0] for like in likes} == {f"each seed's search (rho {rho}" for rho in (0.2, 0.5)}
    assert [len(curve.points) for curve in curves_of(table)] == [2]


def test_a_difference_has_as_many_digits_as_its_interval_needs():
    assert signed(Difference(0.0, -0.7346, 0.7346, 1.0, 5)) == "+0.00 (-0.73 to +0.73)"
    assert signed(Difference(0.03, -0.09, 0.12, 0.5, 3)) == "+0.0300 (-0.0900 to +0.1200)"
    assert signed(Difference(1.2, None, None, None, 1)) == "+1.20"


def test_the_metric_is_drawn_over_the_time_of_a_step(tmp_path):
    for i, (method, score, step) in enumerate((("lora", 0.8, 0.1), ("diffora", 0.82, 0.06), ("random", 0.79, 0.06))):
        for seed in (0, 1):
            cell = ("own", method, "a")
            time = {"search_s": 0.0, "finetune_s": 60.0, "total_s": 90.0, "step_s": step + 0.001 * seed}
            made_run(tmp_path / f"{i}{seed}", method, seed, score + 0.01 * seed, cell, adapter=12_345, time=time)
    [table] = tables_of(gather([tmp_path]).runs)
    [(title, chart)], legend, _ = pictures.time_charts(table)
    assert title and [name for _, name in legend] == ["lora", "diffora", "random"]
    assert chart.count("<circle") == 3 and chart.count("12.3k") == 3 and "a training step, ms" in chart
    assert "diffora: 60.5, 0.825 ± 0.0071" in chart


def test_without_times_of_steps_nothing_is_drawn_over_them(tmp_path):
    for method in ("lora", "random"):
        made_run(tmp_path / method, method, cell=("own", method, "a"))
    [table] = tables_of(gather([tmp_path]).runs)
    assert pictures.time_charts(table) == ([], [], "")
