"""The script on made landscapes whose truth is known: nothing to find, and modules with a known worth."""

import json
import sys

import numpy as np
import pytest
from conftest import REPO
from scipy import stats

sys.path.insert(0, str(REPO / "scripts"))
import selection_landscape as script
from pages import completed

LAYERS, TYPES, M = 6, ["a", "b", "c", "d"], 6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def column(rng, truth, noise=1.0, masks=40, seeds=2, task="cola", setting="global"):
    """Masks of M modules anywhere; their worth is the sum of the modules' truth."""
    found = {"task": task, "setting": setting, "metric": "accuracy", "types": TYPES, "masks": {}}
    flags = np.zeros((masks, LAYERS * len(TYPES)), dtype=bool)
    for i, row in enumerate(flags):
        row[rng.permutation(row.size)[:M]] = True
        values = 80 + row @ truth + rng.normal(0, noise, seeds) + np.arange(seeds)
        selected = [np.flatnonzero(of).tolist() for of in row.reshape(LAYERS, -1)]
        found["masks"][f"mask {i}"] = {"selected": selected, "values": {str(s): v for s, v in enumerate(values)}}
    return found, flags


def scores(vector):
    return np.reshape(vector, (LAYERS, len(TYPES))).tolist()


def test_planted_worth_is_found_by_the_selector_that_knows_it(rng):
    columns, truth = {}, {}
    for task in ("cola", "mrpc", "rte"):
        truth[task] = rng.normal(0, 1.0, LAYERS * len(TYPES))
        columns[f"{task} global"], _ = column(rng, truth[task], task=task)
    known = {
        "good": {name: {"0": scores(truth[name.split()[0]])} for name in columns},
        "blind": {name: {str(s): scores(rng.normal(size=24)) for s in (0, 1)} for name in columns},
        "inverse": {name: {"0": scores(-truth[name.split()[0]])} for name in columns},
        "constant": {name: {"0": scores(np.ones(24))} for name in columns},
        "elsewhere": {"sst2 k1": {"0": scores(np.ones(24))}},
    }
    found = script.analysed(columns, {"scores": known, "types": dict.fromkeys(columns, TYPES)}, draws=400)
    for name, of in found["anything_to_find"].items():
        assert of["verdict"] == "open" and of["p"] < 1e-3 and of["low"] < of["mask"] < of["high"], name
        assert of["residual"] == pytest.approx(1.0, abs=0.35) and of["runs"] == 80
    rows = found["which_scores"]["global"]["selectors"]
    good, blind, inverse = rows["good"], rows["blind"], rows["inverse"]
    assert good["grid"]["value"] > 0.8 and good["grid"]["p"] == pytest.approx(1 / 401) and good["type"]["p"] < 0.01
    assert good["interval"][0] < good["grid"]["value"] < good["interval"][1] and good["p_holm"] < 0.01
    assert inverse["grid"]["value"] < -0.8 and inverse["grid"]["p_worse"] < 0.01 and inverse["grid"]["p"] > 0.99
    assert abs(blind["grid"]["value"]) < 0.5 and blind["behind"]["mean"] > 0.5 and blind["behind"]["low"] > 0
    assert rows["constant"]["tasks"] == {} and "grid" not in rows["constant"]
    assert "elsewhere" not in rows
    text = script.text_of(found)
    assert text.index("| good |") < text.index("| blind |") < text.index("| inverse |") < text.index("| constant |")
    assert "all masks have one score" in text


def test_a_correlation_is_scipys_of_the_summed_scores_and_the_mean_results(rng):
    truth = rng.normal(size=24)
    one, flags = column(rng, truth)
    vectors = [truth + rng.normal(size=24) for _ in range(2)]
    by_seed = {str(s): scores(v) for s, v in enumerate(vectors)}
    ranking = script.Ranking(one, TYPES, by_seed, draws=10)
    means = [np.mean(list(mask["values"].values())) for mask in one["masks"].values()]
    each = [stats.spearmanr(flags @ v, means).statistic for v in vectors]
    assert ranking.value == pytest.approx(np.tanh(np.arctanh(each).mean()))
    together = sum((v - v.mean()) / v.std() for v in vectors)
    ensemble = stats.spearmanr(flags @ together, means).statistic
    assert script.pooled([ranking])["ensemble"] == pytest.approx(ensemble)


def test_types_may_be_in_another_order_and_more_than_those_of_the_masks(rng):
    truth = rng.normal(size=24)
    one, _ = column(rng, truth)
    same = script.Ranking(one, TYPES, {"0": scores(truth)}, draws=10).value
    turned = np.insert(np.reshape(truth, (LAYERS, 4))[:, ::-1], 2, np.nan, axis=1)  # d, c, one that is not there, b, a
    other = script.Ranking(one, ["d", "c", "x", "b", "a"], {"0": turned.tolist()}, draws=10).value
    assert other == pytest.approx(same)
    with pytest.raises(SystemExit, match="do not fit"):
        script.Ranking(one, TYPES[:3], {"0": scores(truth)}, draws=10)


def test_p_is_uniform_where_there_is_nothing_to_know(rng):
    """Scores and worths are alike on all tasks, as preferences for kinds of modules are."""
    p_values = []
    for _ in range(60):
        truth, preference = rng.normal(size=24), scores(rng.normal(size=24))
        columns = {}
        for task in ("cola", "mrpc", "rte"):
            columns[f"{task} global"], _ = column(rng, truth, task=task, masks=20)
        known = {"scores": {"fixed": {name: {"0": preference} for name in columns}}}
        found = script.which_scores(columns, known | {"types": dict.fromkeys(columns, TYPES)}, draws=200)
        p_values.append(found["global"]["selectors"]["fixed"]["grid"]["p"])
    assert stats.kstest(p_values, "uniform").pvalue > 0.01 and np.mean(np.array(p_values) < 0.05) < 0.15


def test_a_column_where_masks_do_not_matter_is_closed(rng):
    nothing, _ = column(rng, np.zeros(24), noise=0.2)
    found = script.anything_to_find(nothing)
    assert found["verdict"].startswith("closed") and found["mask"] < 0.3
    loud = [script.anything_to_find(column(rng, np.zeros(24), noise=3.0)[0]) for _ in range(5)]
    assert {of["verdict"].split(";")[0] for of in loud} <= {"closed", "open by the estimate only"}
    assert script.openness(0.0, 0.0, 0.99).startswith("closed; the masks differ less than noise")
    assert script.openness(0.2, 0.29, 0.01) == "closed" and script.openness(0.2, 0.31, 0.01).endswith(
        "up to 0.3 is possible"
    )
    assert script.openness(0.4, 0.9, 0.01) == "open" and script.openness(0.4, 0.9, 0.2) == "open by the estimate only"
    assert all(of["high"] >= 0.3 or of["high"] == 0 for of in loud) and all(of["detectable"] > 1 for of in loud)


def test_closed_columns_do_not_count_in_the_mean_over_tasks(rng):
    truth = rng.normal(size=24)
    columns = {f"{task} global": column(rng, truth, task=task)[0] for task in ("cola", "mrpc")}
    columns["rte global"] = column(rng, np.zeros(24), noise=0.1, task="rte")[0]
    columns["rte k1"] = column(rng, np.zeros(24), noise=0.1, task="rte", setting="k1")[0]
    known = {"scores": {"good": {name: {"0": scores(truth)} for name in columns}}}
    found = script.analysed(columns, known | {"types": dict.fromkeys(columns, TYPES)}, draws=100)
    both, only = found["which_scores"]["global"], found["which_scores"]["k1"]
    assert both["closed"] == ["rte"] and both["masks"] == {"cola": 40, "mrpc": 40, "rte": 40}
    tasks = both["selectors"]["good"]["tasks"]
    z = np.arctanh([tasks[task]["value"] for task in ("cola", "mrpc")])
    assert both["selectors"]["good"]["grid"]["value"] == pytest.approx(np.tanh(z.mean())) and "rte" in tasks
    assert only["closed"] == ["rte"] and "grid" not in only["selectors"]["good"]
    text = script.text_of(found)
    assert "| rte, 40 masks, closed |" in text and "| closed |  |" in text


def test_incomplete_columns_say_what_is_there(rng):
    truth = rng.normal(size=24)
    one, _ = column(np.random.default_rng(5), truth, noise=0.1)
    for name in list(one["masks"])[10:]:
        del one["masks"][name]["values"]["1"]
    found = script.anything_to_find(one)
    assert (found["runs"], found["all_masks"], found["masks"], found["seeds"]) == (50, 40, 10, 2)
    # seed 1 is one point higher, and masks without it are not behind for that
    means = list(script.worth(one).values())
    scale = [v["values"]["0"] for v in one["masks"].values()]
    assert np.abs(np.subtract(means, scale) - 0.5).max() < 0.5
    for mask in one["masks"].values():
        mask["values"].pop("1", None)
    assert "f" not in script.anything_to_find(one) and len(script.worth(one)) == 40
    assert "too few runs" in script.text_of(script.analysed({"cola global": one}, {"scores": {}, "types": {}}, 10))


def write(folder, record, selection):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "selection.json").write_text(json.dumps(selection))


@pytest.fixture
def folders(tmp_path, rng):
    """Runs of 12 masks on two tasks, lower is better on one; and the scores of a search and of another selector."""
    truth = rng.normal(size=24)
    for task in ("cola", "chat"):
        made, _ = column(rng, truth / 100, noise=0.001, masks=12, task=task)
        sign, unit = (1, "fraction") if task == "cola" else (-1, "loss")
        for row, mask in made["masks"].items():
            for seed, value in mask["values"].items():
                record = {
                    "status": "completed",
                    "row": row,
                    "column": f"{task} global",
                    "seed": int(seed),
                    "task": task,
                }
                record |= {"main_metric": "score", "metric_facts": {"score": {"unit": unit, "maximise": sign > 0}}}
                record |= {"metrics": {"validation/score": sign * (value - 80)}, "data_hash": task}
                chosen = [[TYPES[i] for i in of] for of in mask["selected"]]
                record |= {"selection": {"selector": "random", "selected": chosen}}
                write(tmp_path / "runs" / f"{row}-{task}-{seed}", record, {})
        gates = np.exp(np.reshape(truth, (LAYERS, 4)))
        gates /= gates.sum(1, keepdims=True)
        for name, values in (("search", {"gamma_bar": gates.tolist()}), ("plop", {"scores": scores(-truth)})):
            record = {"status": "selected", "row": None, "column": None, "seed": 0, "task": task}
            file = {"selector": name, "types": TYPES, "gamma_bar": None, "scores": None} | values
            write(tmp_path / "scores" / f"{name}-{task}", record, file)
    return tmp_path


def test_from_files_to_the_page_and_again_from_its_json(folders, monkeypatch, capsys):
    docs = folders / "docs"
    for place in ("images", "data"):
        (docs / place).mkdir(parents=True)
    page = docs / "page.md"
    page.write_text("before\n<!-- begin selection_landscape -->\nold\n<!-- end selection_landscape -->\nafter\n")
    random_ = {"selector": "random", "types": TYPES, "gamma_bar": None, "scores": scores(np.ones(24))}
    for file in (folders / "runs").rglob("selection.json"):  # a mask has the scores of its draw, and is no selector
        file.write_text(json.dumps(random_))
    arguments = ["script", str(folders / "runs"), "--scores", str(folders), "--draws", "100"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--page", str(page)])
    script.main()
    printed = capsys.readouterr().out
    text = page.read_text()
    assert "old" not in text and printed.strip() in text and (docs / "images/selection_landscape.png").exists()
    found = json.loads((docs / "data/selection_landscape.json").read_text())
    assert found["anything_to_find"]["cola global"]["verdict"] == "open"
    rows = found["which_scores"]["global"]["selectors"]
    assert sorted(rows) == ["plop", "search"]
    assert rows["plop"]["tasks"]["chat"]["value"] < -0.7  # lower is better there, and truth is still good
    assert "Worth of the same masks on two tasks" not in text  # the masks differ
    monkeypatch.setattr(sys, "argv", ["script", str(docs / "data/selection_landscape.json"), "--draws", "100"])
    script.main()
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(sys, "argv", ["script", str(folders / "scores")])
    with pytest.raises(SystemExit, match="no finished run of a row"):
        script.main()


def test_a_landscape_grows_from_its_json_and_further_runs(folders, monkeypatch, capsys):
    docs = folders / "docs"
    for place in ("images", "data"):
        (docs / place).mkdir(parents=True)
    page, data = docs / "page.md", docs / "data/selection_landscape.json"
    page.write_text("<!-- begin selection_landscape -->\n<!-- end selection_landscape -->\n")
    later = folders / "later"
    later.mkdir()
    for file in sorted((folders / "runs").rglob("run.json")):
        if json.loads(file.read_text())["seed"] == 1:
            file.parent.rename(later / file.parent.name)
    (folders / "scores" / "search-cola").rename(later / "search-cola")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments), "--draws", "100"])
        script.main()
        return capsys.readouterr().out

    run(folders / "runs", "--scores", folders / "scores", "--page", page)
    rows = json.loads(data.read_text())["which_scores"]["global"]["selectors"]
    assert list(rows["search"]["tasks"]) == ["chat"]
    grown = run(data, later, "--scores", later)
    for folder in [*later.iterdir()]:
        if folder.name != "search-cola":
            folder.rename(folders / "runs" / folder.name)
    (later / "search-cola").rename(folders / "scores" / "search-cola")
    assert grown == run(folders / "runs", "--scores", folders / "scores")
    record = next((folders / "runs").rglob("run.json"))
    changed = json.loads(record.read_text())
    changed["metrics"] = dict.fromkeys(changed["metrics"], 0.123)
    record.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="in one place and"):
        run(data, folders / "runs")


def test_a_later_mask_may_lack_a_type_of_module():
    def columns(row, selected):
        mask = {"selected": selected, "values": {"0": 80.0}, "runs": {"0": row}}
        return {"cola global": {"setting": "global", "task": "cola", "settings": {}, "masks": {row: mask}}}

    early, late = columns("mask 10", [["b"], ["a", "c"]]), columns("mask 2", [["c"], ["c"]])
    file = {"columns": script.numbered(early), "scores": {}}
    grown = script.numbered(script.merged(script.named(file, grows=True)["columns"], late))["cola global"]
    assert grown == script.numbered(script.merged(early, late))["cola global"]
    assert list(grown["masks"]) == ["mask 2", "mask 10"] and grown["types"] == ["a", "b", "c"]
    assert grown["masks"]["mask 2"]["selected"] == [[2], [2]]


def test_scores_of_the_same_selector_and_seed_twice_are_refused(folders):
    columns = script.landscape(completed(folders / "runs"))
    again = folders / "scores" / "search-cola"
    write(folders / "scores" / "other", *(json.loads((again / f).read_text()) for f in ("run.json", "selection.json")))
    with pytest.raises(SystemExit, match="both have the scores of search for cola global, seed 0"):
        script.scores_of(folders / "scores", columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_hash": "others"}, "the scores of search, seed 1 are of other data than cola global"),
        ({"settings": {"search": {"epochs": 5}}}, "has search.epochs=5, other seeds of search search.epochs=2"),
    ],
)
def test_scores_of_other_data_or_settings_are_refused(folders, change, message):
    columns = script.landscape(completed(folders / "runs"))
    first = folders / "scores" / "search-cola"
    record, scores_file = (json.loads((first / f).read_text()) for f in ("run.json", "selection.json"))
    record |= {"data_hash": "cola", "settings": {"search": {"epochs": 2}}}
    (first / "run.json").write_text(json.dumps(record))
    second = folders / "scores" / "search-cola-1"
    write(second, record | {"seed": 1}, scores_file)
    assert list(script.scores_of(folders / "scores", columns)["scores"]["search"]["cola global"]) == ["0", "1"]
    (second / "run.json").write_text(json.dumps(record | {"seed": 1} | change))
    with pytest.raises(SystemExit, match=message):
        script.scores_of(folders / "scores", columns)


@pytest.mark.parametrize("what", ["another selection", "other data", "finetune.epochs="])
def test_masks_that_cannot_be_compared_are_refused(folders, what):
    file = folders / "runs" / "mask 3-cola-1" / "run.json"
    record = json.loads(file.read_text())
    if what == "another selection":
        record["selection"]["selected"][0] = ["a", "b", "c", "d"]
    elif what == "other data":
        record["data_hash"] = "other"
    else:
        record["settings"] = {"finetune": {"epochs": 5}}
        other = folders / "runs" / "mask 7-cola-0" / "run.json"
        other.write_text(json.dumps(json.loads(other.read_text()) | {"settings": {"finetune": {"epochs": 3}}}))
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=f"cola global, mask [37], seed [01] has {what}"):
        script.landscape(completed(folders / "runs"))


def test_masks_that_share_modules_agree_more_often_by_chance():
    rng = np.random.default_rng(0)
    apart = np.eye(12, dtype=bool).reshape(12, 3, 4)  # each mask has a module of its own: independent worths
    alike = np.array([rng.permutation(12) < 11 for _ in range(12)]).reshape(12, 3, 4)
    for masks, by, spread in ((apart, "modules", 1 / np.sqrt(11)), (alike, "parts", None)):
        found = script.chance_agreement(masks, by, 4000)
        assert abs(found.mean()) < 0.02 and abs(found).max() <= 1
        assert spread is None or found.std() == pytest.approx(spread, rel=0.05)
    pairs = np.array([[1, 1, 0, 0], [0, 0, 1, 1]] * 6, dtype=bool).reshape(12, 2, 2)  # two masks only
    assert script.chance_agreement(pairs, "modules", 500).std() > 0.5


def test_the_same_masks_on_two_tasks_are_compared(rng):
    truth = rng.normal(size=24)
    first, _ = column(np.random.default_rng(3), truth, noise=0.1)
    second, _ = column(np.random.default_rng(3), truth, noise=0.1, task="mrpc")
    ((one, other, n, rho, p, by_parts),) = script.tasks_agree({"cola global": first, "mrpc global": second})["global"]
    assert (one, other, n) == ("cola", "mrpc", 40) and rho > 0.9 and p < 0.001
    assert by_parts < 0.01
    for mask in second["masks"].values():
        mask["values"] = {"0": 1.0}
    assert script.tasks_agree({"cola global": first, "mrpc global": second}) == {}  # no order, no correlation
