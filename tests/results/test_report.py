import itertools
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from conftest import REPO
from made_runs import LAYERS, TYPES, made_run
from scipy import stats

from diffora.errors import UserError
from diffora.results import charts, page, pictures, tables
from diffora.results.comparisons import comparisons_of, curves_of, verdict
from diffora.results.formats import comma_separated, latex, markdown
from diffora.results.grids import Grid, comparisons_grid, main_grid, measures_grid
from diffora.results.runs import differing, gather
from diffora.results.statistics import Difference, Spread, holm, paired, spread, stability
from diffora.results.tables import Column, specification, tables_of

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


def test_pairs_are_those_of_common_seeds():
    found = paired({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.0, 0: 0.5, 8: -100.0})
    assert found.n == 2 and found.mean == pytest.approx(0.75)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_without_spread_there_is_no_test():
    assert paired({0: 1.0}, {0: 0.5}) == Difference(0.5, None, None, None, 1)
    same = paired({0: 0.3, 1: 0.2, 2: 0.9}, {0: 0.2, 1: 0.1, 2: 0.8})  # differ by roundings alone
    assert same.p is None and verdict(same) == "no test"


def test_the_verdict_is_what_the_interval_says():
    assert verdict(Difference(1.0, 0.1, 1.9, 0.03, 5)) == "ahead"
    assert verdict(Difference(-1.0, -1.9, -0.1, 0.03, 5)) == "behind"
    assert verdict(Difference(1.0, -0.1, 2.1, 0.07, 5)) == "undecided"


def test_holm_adjusts_as_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_agreement_of_selections_against_chance():
    one = np.array([[True, True, False, False]])
    other = np.array([[True, False, True, False]])
    found = stability(np.array([one, other]), by_layer=True, draws=20_000)
    assert found.jaccard == pytest.approx(1 / 3)
    # of two draws of 2 of 4: both the same 1/6, one in common 4/6, none 1/6
    assert found.chance == pytest.approx(1 / 6 + 4 / 6 / 3, abs=0.01)
    assert stability(np.array([one, one, one]), by_layer=True).jaccard == 1.0
    assert stability(np.array([one, ~one]), by_layer=True).jaccard == 0.0
    assert stability(np.array([one]), by_layer=True) is None


def test_chance_keeps_to_the_sizes_of_layers_or_of_the_whole():
    full = np.array([[True, True], [False, False]])
    assert stability(np.array([full, full]), by_layer=True).chance == 1.0  # all of layer 1, nothing of layer 2
    assert stability(np.array([full, full]), by_layer=False).chance < 0.9


# --- gathering ---


def test_runs_are_gathered_from_below_once(tmp_path):
    for seed in range(3):
        made_run(tmp_path / "a" / f"run{seed}", seed=seed)
    made_run(tmp_path / "a" / "run0" / "checkpoints" / "not_a_run")
    made_run(tmp_path / "dry", status="dry_run")
    found = gather([tmp_path, tmp_path / "a"])
    assert [run.seed for run in found.runs] == [0, 1, 2] and found.broken == []
    assert len(found.runs[0].history) == 3 and "history" not in found.runs[0].record


def test_broken_records_are_listed_and_left_out(tmp_path):
    contents = [
        "{",
        "[]",
        '{"method": "lora"}',
        "\udc80",
        '{"method":"m","task":"t","model":"x","status":"s","seed":"0"}',
    ]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    made_run(tmp_path / "good")
    found = gather([tmp_path])
    assert len(found.runs) == 1 and len(found.broken) == len(contents)
    assert all(reason for _, reason in found.broken)


def test_what_cannot_be_gathered_is_said(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=re.escape(f"no run.json below {tmp_path}")):
        gather([tmp_path])


def test_a_setting_is_the_configuration_without_seed_and_place(tmp_path):
    for seed in range(2):
        made_run(
            tmp_path / f"r{seed}", "random", seed, settings={"rank": 4, "logger": {"csv": True}, "resume": seed > 0}
        )
        made_run(tmp_path / f"l{seed}", "random", seed, settings={"rank": 4, "finetune": {"lr": 0.1}})
    settings = [run.setting for run in gather([tmp_path]).runs]
    assert len(set(settings)) == 2  # random's draw follows the seed
    runs = gather([tmp_path]).runs
    assert runs[0].config == {"method.name": "random", "rank": 4, "finetune.lr": 0.1}


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
    grid = main_grid(table)
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
    assert diffora["digits, rank/accuracy: dev_best"] == "" and diffora["n"] == "3"
    assert random["digits, rank/accuracy: dev_best"] == "3.500 ± 0.000 / 0.7200 ± 0.0200"  # not in per cent
    assert random["parameters: paper"] == "" and full["digits, rank/accuracy: paper"] == "80/81"
    assert diffora["time: search"] == "20 s" and random["time: search"] == ""


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
        grid = main_grid(table)
        assert [row[0] for row in grid.rows] == [row["name"] for row in spec["rows"]]
        shown = {cell for row in grid.rows for cell in row}
        figures = {str(value) for row in spec["rows"] for value in (row.get("paper") or {}).values()}
        assert figures <= shown, table.name


def test_comparisons_are_paired_and_know_which_way_is_better(spec):
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

    for file in spec.rglob("run.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"maximise": False}))
    (table,) = tables_of(gather([spec]).runs)
    assert next(c for c in comparisons_of(table) if c.baseline == "random").dev_best.mean == pytest.approx(-9.0)
    assert pictures.best_cells(table) == {("random", "paraphrase, accuracy/f1")}


def test_unequal_sizes_are_marked(spec):
    fill(spec, ["DiffoRA"], adapter=1120)
    fill(spec, ["random"], adapter=1000)
    fill(spec, ["full FT"], adapter=1020)
    (table,) = tables_of(gather([spec]).runs)
    assert {c.baseline: c.fair for c in comparisons_of(table)} == {"random": False, "full FT": True}
    grid = comparisons_grid(table, comparisons_of(table))
    assert any("1.12 (unequal)" in row for row in grid.rows)


def test_another_selector_is_a_baseline_of_the_search(spec):
    fill(spec, ["DiffoRA"])
    for seed in range(3):
        run = made_run(spec / f"g{seed}", "diffora", seed, cell=("table9", "gradient", "paraphrase"))
        record = json.loads((run / "run.json").read_text())
        record["selection"]["selector"] = "gradient"
        (run / "run.json").write_text(json.dumps(record))
    (table,) = tables_of(gather([spec]).runs)
    assert table.ours == ["DiffoRA"] and [c.baseline for c in comparisons_of(table)] == ["gradient"]


def test_of_repeated_runs_the_later_one_counts(spec):
    fill(spec)
    again = made_run(spec / "again", "random", 0, 0.5, ("table9", "random", "paraphrase"))
    os.utime(again / "run.json", (2e9, 2e9))
    (table,) = tables_of(gather([spec]).runs)
    cell = table.cells["random", "paraphrase"]
    assert cell.by_seed("validation/accuracy") == {0: 0.5, 1: 0.72, 2: 0.74}
    assert any("1 runs were made again" in note for note in table.notes)


def test_tables_of_like_names_have_files_of_their_own(tmp_path):
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
    assert any("1 runs of other settings (rank) left out" in note for note in table.notes)


def test_other_data_and_few_seeds_are_said(spec):
    fill(spec, ["random"])
    made_run(spec / "x", "diffora", 0, cell=("table9", "DiffoRA", "paraphrase"), data_hash="other")
    (table,) = tables_of(gather([spec]).runs)
    notes = " ".join(table.notes)
    assert "2 different versions of the data" in notes and "1 seed only" in notes


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


def test_curves_join_settings_that_differ_in_nothing_else(tmp_path):
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


def test_rank_and_orthogonality_are_in_a_table(spec):
    fill(spec, ["random"])
    (table,) = tables_of(gather([spec]).runs)
    grid = measures_grid(table)
    row = dict(zip(grid.head, grid.rows[0], strict=True))
    assert row["rank of ΔW"] == "3.500 ± 0.000" and row["orthogonality loss of ΔW"] == "70.25 ± 0.00"


def test_old_and_strange_records_do_no_harm(tmp_path):
    record = {"method": "lora", "task": "mrpc", "model": "m", "seed": 0, "status": "completed"}
    changes = [{}, {"metrics": {"validation/accuracy": None}}, {"metrics": {"validation/accuracy": "high"}, "seed": 1}]
    changes += [{"metrics": [], "params": {"adapter": math.nan}, "selection": {"selected": 3}, "history": 7, "seed": 2}]
    for i, change in enumerate(changes):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "run.json").write_text(json.dumps(record | change))
    gathered = gather([tmp_path])
    page.write(gathered, tmp_path / "out", [tmp_path])
    assert len(gathered.runs) == 4


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

    grid = Grid(HOSTILE, [("a_b", [HOSTILE, "^~\\"])], [[HOSTILE, "1 ± 2"]])
    text = latex(grid)
    assert r"\& 100\% of \$x\_1\$" in text and r"1 $\pm$ 2" in text and r"\textasciicircum{}\textasciitilde{}" in text
    assert not re.search(r"(?<!\\)[%_#](?!\d)", text.replace("\\\\", ""))
    line = markdown(grid).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3 and "<script>" not in line
    assert comma_separated(grid).count("\n") == 2


def test_latex_has_as_many_cells_in_each_line(spec):
    fill(spec)
    (table,) = tables_of(gather([spec]).runs)
    grid = main_grid(table)
    lines = [line for line in latex(grid).splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") + 1 for line in lines[1:]} == {len(grid.head)} and len(lines) == 2 + len(grid.rows)


def test_pictures_of_selections_are_frequencies_over_seeds(spec):
    fill(spec, ["DiffoRA"], seeds=range(4))
    (table,) = tables_of(gather([spec]).runs)
    cell = table.cells["DiffoRA", "paraphrase"]
    found = pictures.dams("DiffoRA", "paraphrase", cell)
    selected = [run["selection"]["selected"] for run in cell.runs.values()]
    share = sum(TYPES[0] in rows[0] for rows in selected) / 4
    assert f"layer 1: {share:.3f}" in found.frequency
    assert len(found.seeds) == 4 and len(found.trajectory) == LAYERS and found.stability.n == 4


def test_ticks_are_round_and_within():
    assert charts.ticks(0.0, 1.0) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert charts.ticks(-0.013, 0.021) == pytest.approx([-0.01, 0, 0.01, 0.02])
    assert charts.ticks(3, 3) == [3]


def test_many_settings_are_cut_and_this_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 4)
    monkeypatch.setattr(page, "PICTURED", 2)
    for i in range(7):
        made_run(tmp_path / f"{i}", "diffora", 0, 0.5 + i / 100, settings={"rank": 4, "rho": i / 10})
    files = page.write(gather([tmp_path]), tmp_path / "out", [tmp_path])
    html = files[0].read_text()
    assert "7 settings, of which the 4 best are shown" in html
    assert "Selections are drawn for 2 settings; 2 more are not." in html
    listed = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert len(listed["rows"]) == 7 and {len(row) for row in listed["rows"]} == {len(listed["columns"])}


def test_the_command_line_is_checked(tmp_path):
    assert page.request([str(tmp_path), f"output={tmp_path / 'o'}"]) == ([tmp_path], tmp_path / "o")
    with pytest.raises(UserError, match=r"outptu=x: report\.py takes folders"):
        page.request([str(tmp_path), "outptu=x"])
    with pytest.raises(UserError, match="no folder of runs"):
        page.request(["output=x"])


def test_columns_know_what_is_a_score():
    column = Column("c", ("validation/accuracy", "update/rank"), True, True)
    assert column.factor("validation/accuracy") == column.factor("validation_mismatched/accuracy") == 100
    assert column.factor("update/rank") == 1 and column.held_out() == ("held_out/accuracy",)
