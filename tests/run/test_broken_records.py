"""Damaged records, settings and search files of a run are never used as results, or overwritten without asking."""

import json

import pytest
from failures import SHORT_LORA

from diffora.errors import UserError
from diffora.files import write_text
from diffora.records import write_record
from diffora.report.runs import gather
from diffora.run import experiment
from diffora.run.directory import account, finished
from diffora.run.experiment import run
from diffora.run.record import read_record, why_broken

BROKEN = {
    "a list": b"[]",
    "no fields": b"{}",
    "a number": b"7",
    "empty": b"",
    "cut": b'{"status": "comp',
    "not utf-8": b'{"status": "\xff\xfe"}',
    "nested 5000 levels": b"[" * 5000 + b"]" * 5000,
    "nested 5000 levels inside": b'{"status": "running", "x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    "status a number": b'{"status": 5}',
    "complete without results": b'{"status": "completed"}',
    "results of the wrong kind": b'{"status": "completed", "method": "a", "task": "a", "model": "a", '
    b'"config_hash": "a", "metrics": [], "params": 3, "time": {}, "memory": null}',
    "files no list": b'{"status": "running", "files": {"a": 1}}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_reported_and_not_read(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    assert read_record(tmp_path) is None
    assert str(tmp_path / "run.json") in why_broken(tmp_path) and "\n" not in why_broken(tmp_path)


def test_a_missing_record_is_not_reported_as_broken(tmp_path):
    assert read_record(tmp_path) is None and why_broken(tmp_path) is None
    (tmp_path / "run.json").mkdir()
    assert read_record(tmp_path) is None and "is not a regular file" in why_broken(tmp_path)


def test_a_folder_with_checkpoints_and_a_broken_record_needs_resume(cfg, tmp_path, caplog):
    (tmp_path / "run.json").write_text("{}")
    assert finished(cfg(*SHORT_LORA), tmp_path) is None and finished(cfg(*SHORT_LORA, "resume=true"), tmp_path) is None
    write_text(tmp_path / "checkpoints" / "finetune-0001-0.ckpt", "")
    assert finished(cfg(*SHORT_LORA, "resume=true"), tmp_path) is None
    assert caplog.text.count("run.json is not the record of a run") == 3
    with pytest.raises(UserError, match=r"run\.json is not the record.*it has checkpoints: continue with resume=true"):
        finished(cfg(*SHORT_LORA), tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [("0.75", "0.95"), ('"completed"', '"failed"'), ('"sha256": "', '"sha256": "0')]
)
def test_an_edited_record_is_broken(tmp_path, old, new):
    """The edits change a digit of a metric, the status, or the digest. A record without a digest is not checked."""
    parts = {key: {} for key in ("params", "time", "memory")}
    names = dict.fromkeys(("method", "task", "model", "config_hash"), "x")
    record = {"status": "completed", "metrics": {"validation/accuracy": 0.75}, "seed": 0, **parts, **names}
    record |= {"setting_id": "x", "settings": {}, "main_metric": "accuracy", "metric_facts": {}}
    write_record(tmp_path, record)
    assert read_record(tmp_path).items() >= record.items() and why_broken(tmp_path) is None
    assert [run.record.metrics for run in gather([tmp_path]).runs] == [record["metrics"]]
    text = (tmp_path / "run.json").read_text()
    assert text.count(old) == 1
    (tmp_path / "run.json").write_text(text.replace(old, new))
    assert read_record(tmp_path) is None and "is not as the run left it" in why_broken(tmp_path)
    assert [file for file, _ in gather([tmp_path]).broken] == [tmp_path / "run.json"]
    content = json.loads(text.replace(old, new))
    del content["sha256"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert read_record(tmp_path) == content


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"a: *b", b"- 1", None])
def test_a_run_with_a_broken_config_does_not_resume(cfg, tmp_path, content):
    with account(cfg(*SHORT_LORA), tmp_path, {"status": "running", "config_hash": "another"}, None):
        pass
    (tmp_path / "config.yaml").unlink() if content is None else (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml.*settings are unknown"):
        run(cfg(*SHORT_LORA, "resume=true"), tmp_path)


def test_broken_files_of_a_search_are_written_again(cfg, quick, tmp_path, monkeypatch, caplog):
    short = [*quick, "task.train_rows=64", "search.epochs=1", "search.batch_size=8", "finetune.epochs=1"]

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "finetune", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(cfg(*short), tmp_path)
    before = (tmp_path / "selection.json").read_text()
    monkeypatch.delattr("diffora.scoring.bilevel.SearchModule.training_step")  # the search is not repeated
    kept = (tmp_path / "trajectory.json").read_text()
    for broken in ({"search.json": "[]"}, {"search.json": "{", "run.json": "[]"}, {"trajectory.json": kept[:-9]}):
        for name, content in broken.items():
            (tmp_path / name).write_text(content)
        with pytest.raises(KeyboardInterrupt):
            run(cfg(*short, "resume=true"), tmp_path)
        assert (tmp_path / "selection.json").read_text() == before
        assert (tmp_path / "trajectory.json").read_text() == kept
        assert all(str(tmp_path / name) in caplog.text for name in broken)
