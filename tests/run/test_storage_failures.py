"""Full disks, read-only folders and vanished folders during a run: one message, and no half-written file."""

import errno
import logging
import os
import shutil

import pytest
import torch
from failures import SHORT_LORA, largest_file, refusing
from safetensors.torch import load_file

from diffora.errors import UserError, WriteError
from diffora.files import write_text
from diffora.loop.parts import Parts
from diffora.run import evaluate, experiment
from diffora.run.directory import account, content
from diffora.run.experiment import run
from diffora.run.record import missing_files, read_record
from diffora.tasks.glue import GlueTask


@pytest.fixture
def whole(cfg, tmp_path):
    """A run without failures."""
    torch.set_num_threads(1)
    return run(cfg(*SHORT_LORA), tmp_path / "whole")


def test_a_run_resumes_exactly_after_a_full_disk(cfg, tmp_path, whole):
    folder = tmp_path / "run"
    with largest_file(300_000), pytest.raises(UserError, match=r"finetune-0001.ckpt cannot be written") as caught:
        run(cfg(*SHORT_LORA), folder)
    assert f"resume=true hydra.run.dir={folder}" in str(caught.value)
    record = read_record(folder)
    assert record["status"] == "failed" and record["error"] == str(caught.value)
    assert not list(folder.rglob("*.part")) and not list(folder.glob("checkpoints/*"))
    again = run(cfg(*SHORT_LORA, "resume=true"), folder)
    assert again.record["history"] == whole.record["history"]
    ours, theirs = (load_file(place / "adapter/adapter_model.safetensors") for place in (folder, whole.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_without_its_adapter_is_not_complete(cfg, tmp_path, whole, caplog):
    files = read_record(whole.folder)["files"]
    assert {"config.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(files)
    before = load_file(whole.folder / "adapter/adapter_model.safetensors")
    shutil.rmtree(whole.folder / "adapter")
    again = run(cfg(*SHORT_LORA, "resume=true"), whole.folder)
    assert "adapter/adapter_model.safetensors" in caplog.text and "the run is repeated" in caplog.text
    assert again.model is not None and missing_files(whole.folder, read_record(whole.folder)) == []
    after = load_file(whole.folder / "adapter/adapter_model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert run(cfg(*SHORT_LORA, "resume=true"), whole.folder).model is None  # complete: nothing was done


def test_removing_the_folder_during_a_run_fails_the_run(cfg, tmp_path, monkeypatch):
    loss = GlueTask.loss

    def removes(self, output, batch):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return loss(self, output, batch)

    monkeypatch.setattr(GlueTask, "loss", removes)
    with pytest.raises(UserError, match=f"{tmp_path / 'run'} was removed or replaced"):
        run(cfg(*SHORT_LORA), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_removing_the_adapter_at_the_end_fails_the_run(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(
        experiment, "write_predictions", lambda parts: shutil.rmtree(parts.folder / "adapter") or ([], {})
    )
    with pytest.raises(UserError, match=r"adapter/adapter_config.json.* is gone"):
        run(cfg(*SHORT_LORA, "finetune.epochs=1"), tmp_path / "run")
    assert read_record(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("number", [None, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_an_unwritable_folder_is_reported_before_anything_is_loaded(cfg, tmp_path, monkeypatch, number):
    """A read-only folder, a full disk, and a folder below a file."""
    (tmp_path / "file").touch()
    folder = tmp_path / ("file/run" if number is None else "run")
    monkeypatch.delattr(Parts, "load")
    if number is not None:
        folder.mkdir()
        monkeypatch.setattr(os, "open", refusing(os.open, number, lambda path, *_: str(path).startswith(str(folder))))
    with pytest.raises(WriteError, match=f"{folder} cannot be written: "):
        run(cfg(*SHORT_LORA), folder)


def test_an_error_after_the_end_does_not_change_a_completed_record(cfg, tmp_path):
    def work(record):
        with account(cfg(), tmp_path, record, content(tmp_path)):
            record["status"] = "completed"
            write_text(tmp_path / "run.json", '{"status": "kept"}')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work({"status": "running"})
    assert read_record(tmp_path)["status"] == "kept"


def test_the_error_of_a_run_is_raised_although_its_record_cannot_be_written(cfg, tmp_path, monkeypatch, caplog):
    def work():
        with account(cfg(), tmp_path, {"status": "running"}, content(tmp_path)):
            monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.ENOSPC))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    monkeypatch.undo()
    assert "the disk is full" in caplog.text and read_record(tmp_path)["status"] == "running"


def test_a_log_file_without_space_does_not_change_the_run(cfg, tmp_path, monkeypatch):
    def work(error):
        with account(cfg(), tmp_path, {"status": "running"}, content(tmp_path)):
            logging.getLogger("diffora").warning("a line")
            if error:
                raise error

    monkeypatch.setattr(logging, "raiseExceptions", False)  # as the command does
    (tmp_path / "run.log").symlink_to("/dev/full")
    work(None)
    with pytest.raises(ZeroDivisionError):
        work(ZeroDivisionError("the first"))
    assert read_record(tmp_path)["error"] == "the first"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_gives_a_warning(cfg, tmp_path, monkeypatch, recwarn, caplog, number):
    import fcntl

    if number != errno.ENOSYS:  # for ENOSYS, filelock uses another kind of lock
        (tmp_path / ".lock").write_text("of a dead process")
    monkeypatch.setattr(fcntl, "flock", refusing(fcntl.flock, number))
    with account(cfg(), tmp_path, {"status": "running"}, content(tmp_path)):
        assert read_record(tmp_path)["status"] == "running"
    assert number == errno.ENOSYS or "no locks" in caplog.text


def test_evaluation_reports_an_unwritable_folder_before_it_loads_anything(cfg, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delattr(evaluate, "get_task")
    request = evaluate.EvaluationRequest(cfg(*SHORT_LORA), tmp_path, None, tmp_path / "file" / "out", 8)
    with pytest.raises(WriteError, match="a part of this path is a file"):
        evaluate.evaluate(request)
