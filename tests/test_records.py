"""The record of a run: writing it, reading it, and refusing wrong ones."""

import dataclasses
import json
import time

import pytest

from diffora.errors import UserError
from diffora.records import (
    FIELDS,
    KINDS,
    MetricFacts,
    Record,
    SelectionSource,
    check,
    facts_of,
    read_content,
    write_record,
)
from diffora.run.record import metric_facts, new_record, read_record
from diffora.tasks.base import get_task

FACTS = {"method": "lora", "task": "mrpc", "model": "tiny", "seed": 1, "setting_id": "a", "settings": {"rank": 2}}
RUNNING = {**FACTS, "status": "running", "config_hash": "b"}


def test_a_new_record_has_every_fact_that_a_report_needs(cfg, tmp_path):
    composed = cfg("task=mrpc", "model=tiny", "method=random", "seed=5", "cell.row=x")
    content = new_record(composed, "d" * 16) | metric_facts(get_task(composed.task))
    write_record(tmp_path, content)
    record = Record.of(read_content(tmp_path / "run.json"))
    assert (record.method, record.task, record.model, record.seed) == ("random", "mrpc", "tiny", 5)
    assert record.follows_seed == ["method.draw"] and record.settings["method"]["draw"] == "${seed}"
    assert record.main_metric == "accuracy" and record.row == "x"
    assert not content.keys() - set(FIELDS)
    assert sorted(FIELDS) == sorted(key for keys, _ in KINDS.values() for key in keys)
    written = read_record(tmp_path)
    assert time.time() - 60 < written.pop("written") <= time.time()
    assert written == json.loads(json.dumps(content))


@pytest.mark.parametrize(
    ("task", "metric", "unit", "maximise"),
    [
        ("mrpc", "validation/accuracy", "fraction", True),
        ("mrpc", "generalisation_gap", "fraction", False),
        ("squad", "held_out/f1", "percent", True),
        ("squad_v2", "best_f1_thresh", "", True),
        ("dialogue", "last/perplexity", "perplexity", False),
        ("dialogue", "train/loss", "loss", False),
        ("mrpc", "update/orthogonality_loss", "", False),
        ("mrpc", "held_out/epoch", "epochs", False),
        ("dialogue", "forgetting/increase", "loss", False),
        ("mrpc", "update/stable_rank", "rank", True),
    ],
)
def test_units_and_directions_of_metrics(cfg, task, metric, unit, maximise):
    facts = metric_facts(get_task(cfg(f"task={task}").task))
    record = Record.of(RUNNING | facts)
    assert facts_of(metric, record.metric_facts) == MetricFacts(unit, maximise)


def test_a_metric_that_a_record_does_not_explain_has_no_unit():
    assert facts_of("validation/mine", {}) == MetricFacts("", True)


def test_nested_facts_are_typed():
    source = {"seed": 3, "made": "search (rho 0.5, 3fa2c1)", "selects": "4be1f0"}
    record = Record.of(RUNNING | {"sources": {"method.like": source}, "selection": None})
    assert record.sources == {"method.like": SelectionSource(**source)} and record.selection == {}
    assert dataclasses.asdict(record)["sources"] == {"method.like": source}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "1"}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"row": 5, "error": []}, "row, error must be text or null"),
        ({"settings": []}, "settings must be an object"),
        ({"follows_seed": "method.draw"}, "follows_seed must be a list of text"),
        ({"history": [1]}, "history must be a list of objects"),
        ({"metric_facts": {"f1": {"unit": 1, "maximise": True}}}, "metric_facts must be an object of {unit: text"),
        ({"metric_facts": {"f1": {"unit": "", "maximise": True, "more": 1}}}, "metric_facts must be an object of"),
        ({"sources": {"method.like": {"seed": 1}}}, "sources must be an object of {seed: whole number or null"),
        ({"status": "completed"}, "metrics, params, time, memory are missing"),
        ({"status": "completed", "seed": None}, "are missing; seed must be a whole number"),
    ],
)
def test_all_faults_of_a_record_are_named_at_once(changes, message):
    with pytest.raises(UserError, match=r"^not the record of a run: ") as caught:
        Record.of(RUNNING | changes)
    assert message in str(caught.value)


def test_the_record_of_an_earlier_version_is_named_as_such():
    old = {key: value for key, value in RUNNING.items() if key not in ("setting_id", "settings")}
    with pytest.raises(UserError, match=r"setting_id, settings are missing \(a run of an earlier version"):
        Record.of(old)


def test_a_run_continues_without_the_facts_that_only_a_report_needs():
    check({"status": "failed"})
    with pytest.raises(UserError, match="method, task, model, seed, setting_id, settings, config_hash are missing"):
        Record.of({"status": "failed"})
