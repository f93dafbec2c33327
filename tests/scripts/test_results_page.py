"""docs/results/results.md begins with what docs/results/data/claims.json says; the sources of its figures agree."""

import json
import math
import re
import sys

import pytest
import yaml
from conftest import REPO
from scipy import stats

from diffora.report.statistics import Difference, verdict

sys.path.insert(0, str(REPO / "scripts"))
import results_page as script

CONTENT = json.loads(script.DATA.read_text())
MEASURED = [one for claim in CONTENT["claims"] for one in claim["measured"]]
DIFFERENCES = [(one, d) for one in MEASURED for d in one.get("differences", ())]


def target(one):
    """The text of the page behind the link of a measurement, without line breaks."""
    return " ".join((script.PAGE.parent / one["where"] if one["where"] else script.PAGE).read_text().split())


def test_the_page_and_the_figures_are_those_that_the_script_makes():
    hint = "run python scripts/results_page.py"
    assert script.filled(CONTENT) == CONTENT, hint
    for name, made in {"claims": script.text(CONTENT), "measurements": script.table(CONTENT)}.items():
        between = script.PAGE.read_text().partition(f"<!-- begin {name} -->")[2].partition(f"<!-- end {name} -->")[0]
        assert between == f"\n\n{made}\n\n", hint


def test_every_verdict_follows_from_its_interval_with_a_margin_of_half_a_point():
    assert CONTENT["margin"] == 0.5
    for one, d in DIFFERENCES:
        found = Difference(d["mean"], d["low"], d["high"], d["p"], d["n"])
        assert d["verdict"] == verdict(found, None if "unit" in one else 0.5), (one["on"], d["of"])
    assert len(DIFFERENCES) > 50 and {"better", "worse", "undecided"} < {d["verdict"] for _, d in DIFFERENCES}


def seeds_of(d):
    """Ours and theirs by seed, read independently of the script; None for other inputs."""
    if "values" in d:
        return [{seed: pair[i] for seed, pair in d["values"].items()} for i in (0, 1)]
    if "rows" not in d:
        return None
    metric = d.get("metric", "value")
    return [{seed: run[metric] for seed, run in runs.items()} for runs in runs_of(d)]


def runs_of(d):
    """The runs of ours and theirs by seed, from the file that a difference names."""
    rows = json.loads((REPO / d["file"]).read_text())
    if "task" in d:
        return [rows[d["task"]]["rows"][name]["seeds"] for name in d["rows"]]
    if isinstance(rows, dict):
        return [rows[name] for name in d["rows"]]
    return [next(r for r in rows if all(r[k] == v for k, v in facts.items()))["seeds"] for facts in d["rows"]]


def test_intervals_agree_with_scipy():
    checked = 0
    for one, d in DIFFERENCES:
        if "means" in d:
            (mean, std, n), (other, other_std, other_n) = d["means"]
            welch = stats.ttest_ind_from_stats(mean, std, n, other, other_std, other_n, equal_var=False)
            error = math.hypot(std / math.sqrt(n), other_std / math.sqrt(other_n))
            low, high = stats.t.interval(0.95, min(n, other_n) - 1, mean - other, error)
            assert d["p"] >= welch.pvalue - 1e-5  # fewer degrees of freedom: never more certain than Welch's test
        elif (by_seed := seeds_of(d)) and d["n"] > 1:
            factor = 100 if "rows" in d and "unit" not in one else 1
            common = by_seed[0].keys() & by_seed[1].keys()
            found = stats.ttest_1samp([factor * (by_seed[0][s] - by_seed[1][s]) for s in common], 0)
            low, high = found.confidence_interval(0.95)
            assert d["p"] == pytest.approx(found.pvalue, abs=1e-5) and d["n"] == len(common)
        else:
            continue
        checked += 1
        assert (d["low"], d["high"]) == pytest.approx((low, high), abs=1e-3), (one["on"], d["of"])
        if "rows" in d or "values" in d:
            assert {str(seed) for seed in one["seeds"]} == set(common), (one["on"], d["of"])
    assert checked > 40


def test_what_is_not_in_a_json_file_is_on_the_page_behind_the_link():
    for one in MEASURED:
        page = target(one)
        for d in one.get("differences", [one.get("exact", {})]):
            for quote in d.get("quotes", ()):
                assert quote in page, (one["on"], quote)
            numbers = [float(x) for x in re.findall(r"[\d.]*\d", " ".join(d.get("quotes", ())))]
            numbers += [100 * x for x in numbers]  # the page has some accuracies as shares
            for number in [*d.get("stated", ())[:3], *(x for pair in d.get("means", ()) for x in pair[:2])]:
                assert any(abs(number) == pytest.approx(x) for x in numbers), (one["on"], number)
            assert d.get("quotes") or "rows" in d or "config_hashes" in d or "percentile" in one or "draws" in one


def test_every_link_leads_to_a_heading():
    for one in MEASURED:
        page = script.PAGE.parent / one["where"] if one["where"] else script.PAGE
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        slugs = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert one["section"] in slugs, one["section"]


def test_where_the_records_were_kept_every_run_has_the_hash_of_its_configuration():
    kept = [one for one in MEASURED if one["record"] == "kept"]
    for d in (d for one in kept for d in one["differences"]):
        if "config_hashes" in d:
            hashes = [h for pair in d["config_hashes"].values() for h in pair]
        else:
            hashes = [run["config_hash"] for runs in runs_of(d) for run in runs.values()]
        assert len(hashes) >= 2 * d["n"] and all(re.fullmatch("[0-9a-f]{16}", h) for h in hashes)
    assert len(kept) > 5


def test_a_choice_is_better_than_chance_only_by_both_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    cases = [(0.01, 0.04, 0.01, "better"), (0.01, 0.06, 0.01, "not shown"), (0.06, 0.01, 0.01, "not shown")]
    for p, at_equal_size, least, word in [*cases, (0.01, 0.05, 0.05, "no test")]:
        equal = {"percentile": 70.0, "p": at_equal_size, "p_least": least}
        selector = {"percentile": 90.0, "p": p, "p_least": 0.01, "seeds": [0, 1], "equal_size": equal}
        (tmp_path / "quality.json").write_text(json.dumps({"selectors": {"search": selector}}))
        assert script.with_percentile({"file": "quality.json", "selector": "search"})["verdict"] == word


def test_the_picture_has_every_difference_in_points():
    drawn = [d for _, d in script.rows(CONTENT) if d is not None]
    wanted = [d for one, d in DIFFERENCES if "unit" not in one and d["low"] is not None]
    wanted += [one["draws"] for one in MEASURED if "draws" in one]
    assert len(drawn) == len(wanted) and all(d in drawn for d in wanted)
    assert (script.PAGE.parent / "images" / "claims.png").is_file()


def paper(table, row, column):
    """A figure of the paper from the experiment's file; the first one of several."""
    content = yaml.safe_load((REPO / "conf" / "experiment" / f"{table}.yaml").read_text())
    facts = {r["name"]: r["paper"] for r in content["hydra"]["sweeper"]["rows"]}[row]
    return float(str(facts[column]).split("/")[0].split(" ")[0])


def test_the_papers_gains_are_those_of_the_experiments_files():
    says = {claim["claim"]: claim["says"] for claim in CONTENT["claims"]}
    chance = [
        paper("table3_random", f"DiffoRA, r = {r}", task) - paper("table3_random", f"random, r = {r}", task)
        for r in (1, 2, 4)
        for task in ("stsb", "squad")
    ]
    assert says["The search's selection beats a random one"] == f"+{min(chance):.1f} to +{max(chance):.1f} points"
    sharing = [
        paper("table5_weight_sharing", "sharing", task) - paper("table5_weight_sharing", "no sharing", task)
        for task in ("stsb", "rte", "mrpc")
    ]
    assert says["Weight sharing helps"] == f"+{min(sharing):.1f} to +{max(sharing):.1f} points"
    first = paper("table1_glue", "DiffoRA, r = 4", "mean") - paper("table1_glue", "LoRA, r = 2", "mean")
    eighth = paper("table8_roberta", "DiffoRA", "mean") - paper("table8_roberta", "LoRA, r = 8", "mean")
    assert says["DiffoRA beats its baselines"] == f"GLUE mean +{first:.1f} and +{eighth:.1f} over LoRA"
    squad = [
        paper(table, f"RM-LoRA, r = {r}", "squad") - paper(table, f"LoRA, r = {r}", "squad")
        for table, ranks in (("rm_table2_squad", (4, 8)), ("rm_table3_gpt2", (8, 16)))
        for r in ranks
    ]
    assert f"SQuAD +{min(squad):.1f} to +{max(squad):.1f} EM" in says["RM-LoRA's accuracy is above LoRA's"]
