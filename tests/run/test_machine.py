"""What the machine can do to a run: full disks, read-only places, folders that vanish, broken records, no memory.

Rows of the list of bad inputs are named with their letter; all of them were called a fault of the program, or stopped
more than themselves.
"""

import errno
import io
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import stat
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffora import cli
from diffora.errors import UserError, WriteError, explained, out_of_memory
from diffora.files import atomic, atomic_folder, check_writable, kept, remove_leftovers, write_text
from diffora.loop.launch import launch_problems
from diffora.loop.parts import Parts
from diffora.records import write_record
from diffora.report.runs import gather
from diffora.run import experiment
from diffora.run.directory import account, finished
from diffora.run.experiment import run
from diffora.run.record import missing_files, read_record, why_broken
from diffora.tasks.glue import GlueTask
from diffora.tasks.tokenise import Collator

TENSORS = {"weight": torch.zeros(100_000)}
LORA = [
    "experiment=quickstart",
    "method=lora",
    "task.train_rows=64",
    "task.validation_rows=32",
    "finetune.epochs=2",
    "finetune.warmup_steps=2",
]


def write_arrow(path):
    with pa.OSFile(str(path), "wb") as file:
        file.write(bytes(400_000))


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", bytes(400_000))


WRITERS = {
    "text": lambda path: path.write_text("x" * 400_000),
    "safetensors": lambda path: save_file(TENSORS, path),
    "torch": lambda path: torch.save(TENSORS, path),
    "arrow": write_arrow,
    "zip": write_zip,
}


@contextmanager
def largest_file(n_bytes):
    """What ``ulimit -f`` does, which stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refusing(function, number, when=lambda *_: True):
    """A function of `os` that fails as a system call does."""

    def refused(*arguments, **more):
        if when(*arguments):
            raise OSError(number, os.strerror(number), *[a for a in arguments[:1] if isinstance(a, str | Path)])
        return function(*arguments, **more)

    return refused


# --- files ---


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_file_has_the_permissions_of_one_that_is_simply_opened(tmp_path, writer, mask):
    before = os.umask(mask)
    try:
        with atomic(tmp_path / "file") as scratch:
            WRITERS[writer](scratch)
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "plain")}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_does_not_fit_is_named_and_the_one_before_it_stays(tmp_path, writer):
    """C: full disk, imitated by ulimit -f"""
    file = tmp_path / "file"
    file.write_text("before")
    with (
        largest_file(50_000),
        pytest.raises(WriteError, match=r"ulimit -f.*give the same command again") as caught,
        atomic(file) as scratch,
    ):
        WRITERS[writer](scratch)
    assert str(file) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "before"


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("fsync", errno.ENOSPC, "the disk is full; free some space"),
        ("fsync", errno.EDQUOT, "your disk quota is used up; free some space"),
        ("fsync", errno.EIO, "input/output error"),
        ("open", errno.EROFS, "the file system is read-only"),
        ("open", errno.EACCES, "permission denied"),
        ("replace", errno.EACCES, "permission denied"),
        ("replace", errno.ENOSPC, "the disk is full"),
    ],
)
def test_what_the_system_refuses_is_said_in_words_and_leaves_nothing(tmp_path, monkeypatch, call, number, words):
    monkeypatch.setattr(os, call, refusing(getattr(os, call), number))
    with pytest.raises(WriteError, match=words) as caught:
        write_text(tmp_path / "new" / "file", "text")
    monkeypatch.undo()
    assert str(caught.value).startswith(f"{tmp_path / 'new' / 'file'} cannot be written: ")
    sent = pickle.loads(pickle.dumps(caught.value))  # as a sweep's workers send it
    assert type(sent) is WriteError and sent.problems == caught.value.problems == [str(sent)]
    assert isinstance(caught.value, OSError) and caught.value.strerror in words + "; the disk reports an " + words
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_folder_of_files_is_complete_or_absent(tmp_path, mask):
    def write(size):
        with atomic_folder(tmp_path / "model") as scratch:
            (scratch / "config.json").write_text("{}")
            save_file({"w": torch.zeros(size)}, scratch / "model.safetensors")

    before = os.umask(mask)
    try:
        write(10)
        write(20)
        with largest_file(50_000), pytest.raises(WriteError, match=r"model cannot be written.*ulimit"):
            write(100_000)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert len(load_file(tmp_path / "model/model.safetensors")["w"]) == 20
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()} == {0o666 & ~mask}


def test_other_failures_while_writing_are_left_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic(tmp_path / "file"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(KeyError), atomic(tmp_path / "file"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_scratch_files_of_dead_processes_go_and_those_of_live_ones_and_other_machines_stay(tmp_path):
    def left_by(pid, host, age=0):
        with atomic(tmp_path / "x") as scratch:
            pattern = scratch.name
        name = pattern.replace(str(os.getpid()), str(pid), 1)
        file = tmp_path / (name if host is None else name.replace(name.split("-", 1)[1], f"{host}.part"))
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
        return file

    dead = 2**22 + 1  # above the largest that Linux gives
    days = 2 * 86400
    gone = [left_by(dead, None), left_by(10**30, None), left_by(dead, "far-away", days), left_by(1, None, days)]
    there = [left_by(os.getppid(), None), left_by(dead, "elsewhere"), tmp_path / ".notes.part"]
    (tmp_path / ".notes.part").touch()
    (tmp_path / ".a.1.part").mkdir()
    remove_leftovers(tmp_path)
    assert not any(file.exists() for file in gone) and all(file.exists() for file in there)
    assert (tmp_path / ".a.1.part").is_dir()


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_removed_is_not_made_anew(tmp_path, again):
    with kept(tmp_path / "run"):
        write_text(tmp_path / "run" / "a" / "b", "")
        shutil.rmtree(tmp_path / "run")
        if again:
            (tmp_path / "run").mkdir()
        with pytest.raises(WriteError, match="removed or replaced while this process was writing to it"):
            write_text(tmp_path / "run" / "a" / "b", "")
    assert (tmp_path / "run").exists() == again and not list(tmp_path.glob("run/*"))
    write_text(tmp_path / "run" / "b", "")


def test_a_place_is_tried_without_leaving_anything(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in ("file", "file/a", "file/a/b"):
        with pytest.raises(WriteError, match="a part of this path is a file"):
            check_writable(tmp_path / place)
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.ENOSPC))
    with pytest.raises(WriteError, match="the disk is full"):
        check_writable(tmp_path)


# --- runs ---


@pytest.fixture
def whole(cfg, tmp_path):
    """A run that nothing happens to."""
    torch.set_num_threads(1)
    return run(cfg(*LORA), tmp_path / "whole")


def test_a_full_disk_ends_a_run_with_one_message_and_costs_nothing_but_time(cfg, tmp_path, whole):
    """C: full disk"""
    folder = tmp_path / "run"
    with largest_file(300_000), pytest.raises(UserError, match=r"finetune-0001.ckpt cannot be written") as caught:
        run(cfg(*LORA), folder)
    assert f"resume=true hydra.run.dir={folder}" in str(caught.value)
    record = read_record(folder)
    assert record["status"] == "failed" and record["error"] == str(caught.value)
    assert not list(folder.rglob("*.part")) and not list(folder.glob("checkpoints/*"))
    again = run(cfg(*LORA, "resume=true"), folder)
    assert again.record["history"] == whole.record["history"]
    ours, theirs = (load_file(place / "adapter/adapter_model.safetensors") for place in (folder, whole.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_whose_result_is_gone_is_not_complete(cfg, tmp_path, whole, caplog):
    files = read_record(whole.folder)["files"]
    assert {"config.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(files)
    before = load_file(whole.folder / "adapter/adapter_model.safetensors")
    shutil.rmtree(whole.folder / "adapter")
    again = run(cfg(*LORA, "resume=true"), whole.folder)
    assert "adapter/adapter_model.safetensors" in caplog.text and "done again" in caplog.text
    assert again.model is not None and missing_files(whole.folder, read_record(whole.folder)) == []
    after = load_file(whole.folder / "adapter/adapter_model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert run(cfg(*LORA, "resume=true"), whole.folder).model is None  # complete: nothing was done


def test_a_folder_that_is_removed_while_a_run_is_at_work_is_a_failed_run(cfg, tmp_path, monkeypatch):
    """C: directory deleted while running"""
    loss = GlueTask.loss

    def removes(self, output, batch):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return loss(self, output, batch)

    monkeypatch.setattr(GlueTask, "loss", removes)
    with pytest.raises(UserError, match=f"{tmp_path / 'run'} was removed or replaced"):
        run(cfg(*LORA), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_that_vanish_at_the_end_are_a_failed_run_too(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "write_predictions", lambda parts: shutil.rmtree(parts.folder / "adapter") or [])
    with pytest.raises(UserError, match=r"adapter/adapter_config.json.* is gone"):
        run(cfg(*LORA, "finetune.epochs=1"), tmp_path / "run")
    assert read_record(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("number", [None, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_where_nothing_can_be_written_is_found_before_anything_is_loaded(cfg, tmp_path, monkeypatch, number):
    """C: read-only run directory, run directory below a file"""
    (tmp_path / "file").touch()
    folder = tmp_path / ("file/run" if number is None else "run")
    monkeypatch.delattr(Parts, "load")
    if number is not None:
        folder.mkdir()
        monkeypatch.setattr(os, "open", refusing(os.open, number, lambda path, *_: str(path).startswith(str(folder))))
    with pytest.raises(WriteError, match=f"{folder} cannot be written: "):
        run(cfg(*LORA), folder)


def test_what_fails_after_the_end_does_not_make_a_failed_run_of_it(cfg, tmp_path):
    def work(record):
        with account(cfg(), tmp_path, record):
            record["status"] = "completed"
            write_text(tmp_path / "run.json", '{"status": "kept"}')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work({"status": "running"})
    assert read_record(tmp_path)["status"] == "kept"


def test_a_record_that_cannot_be_written_does_not_hide_why_the_run_failed(cfg, tmp_path, monkeypatch, caplog):
    def work():
        with account(cfg(), tmp_path, {"status": "running"}):
            monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.ENOSPC))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    monkeypatch.undo()
    assert "the disk is full" in caplog.text and read_record(tmp_path)["status"] == "running"


def test_a_log_that_does_not_fit_changes_nothing(cfg, tmp_path, monkeypatch):
    def work(error):
        with account(cfg(), tmp_path, {"status": "running"}):
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
def test_a_file_system_without_locks_costs_a_warning(cfg, tmp_path, monkeypatch, recwarn, caplog, number):
    import fcntl

    if number != errno.ENOSYS:  # filelock knows another way for this one
        (tmp_path / ".lock").write_text("of a dead process")
    monkeypatch.setattr(fcntl, "flock", refusing(fcntl.flock, number))
    with account(cfg(), tmp_path, {"status": "running"}):
        assert read_record(tmp_path)["status"] == "running"
    assert number == errno.ENOSYS or "no locks" in caplog.text


# --- broken records ---

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
def test_a_broken_record_is_no_record(tmp_path, content):
    """C: run.json that is [], {} or not UTF-8; JSON nested 5,000 levels deep"""
    (tmp_path / "run.json").write_bytes(content)
    assert read_record(tmp_path) is None
    assert str(tmp_path / "run.json") in why_broken(tmp_path) and "\n" not in why_broken(tmp_path)


def test_no_record_is_not_a_broken_one(tmp_path):
    assert read_record(tmp_path) is None and why_broken(tmp_path) is None
    (tmp_path / "run.json").mkdir()
    assert read_record(tmp_path) is None and "is not a regular file" in why_broken(tmp_path)


def test_a_broken_record_beside_checkpoints_is_not_overwritten_unasked(cfg, tmp_path, caplog):
    (tmp_path / "run.json").write_text("{}")
    assert finished(cfg(*LORA), tmp_path) is None and finished(cfg(*LORA, "resume=true"), tmp_path) is None
    write_text(tmp_path / "checkpoints" / "finetune-0001-0.ckpt", "")
    assert finished(cfg(*LORA, "resume=true"), tmp_path) is None
    assert caplog.text.count("run.json is not the record of a run") == 3
    with pytest.raises(UserError, match=r"run\.json is not the record.*it has checkpoints: continue with resume=true"):
        finished(cfg(*LORA), tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [("0.75", "0.95"), ('"completed"', '"failed"'), ('"sha256": "', '"sha256": "0')]
)
def test_a_record_that_changed_after_it_was_written_is_broken(tmp_path, old, new):
    """One digit of a metric, a word, or the digest itself. Without its digest it is taken as it is."""
    parts = {key: {} for key in ("params", "time", "memory")}
    names = dict.fromkeys(("method", "task", "model", "config_hash"), "x")
    record = {"status": "completed", "metrics": {"validation/accuracy": 0.75}, "seed": 0, **parts, **names}
    record |= {"setting_id": "x", "settings": {}}
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record and why_broken(tmp_path) is None
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
def test_a_run_with_broken_settings_does_not_resume_and_says_so(cfg, tmp_path, content):
    """C: config.yaml broken on resume"""
    with account(cfg(*LORA), tmp_path, {"status": "running", "config_hash": "another"}):
        pass
    (tmp_path / "config.yaml").unlink() if content is None else (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml.*settings are unknown"):
        run(cfg(*LORA, "resume=true"), tmp_path)


def test_a_search_with_broken_files_goes_on_from_its_checkpoints(cfg, quick, tmp_path, monkeypatch, caplog):
    short = [*quick, "task.train_rows=64", "search.epochs=1", "search.batch_size=8", "finetune.epochs=1"]

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "finetune", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(cfg(*short), tmp_path)
    before = (tmp_path / "selection.json").read_text()
    monkeypatch.delattr("diffora.search.bilevel.SearchModule.training_step")  # nothing is searched again
    kept = (tmp_path / "trajectory.json").read_text()
    for broken in ({"search.json": "[]"}, {"search.json": "{", "run.json": "[]"}, {"trajectory.json": kept[:-9]}):
        for name, content in broken.items():
            (tmp_path / name).write_text(content)
        with pytest.raises(KeyboardInterrupt):
            run(cfg(*short, "resume=true"), tmp_path)
        assert (tmp_path / "selection.json").read_text() == before
        assert (tmp_path / "trajectory.json").read_text() == kept
        assert all(str(tmp_path / name) in caplog.text for name in broken)


# --- memory ---

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
SHORTAGES = [
    (RuntimeError(CPU), "out of memory, 4 TiB were asked for"),
    (MemoryError(), "out of memory"),
    (MemoryError("Unable to allocate 7.28 TiB for an array"), "out of memory, 7.28 TiB were asked for"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0"), "20.00 MiB were asked for"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "num_workers"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "num_workers"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), "/dev/shm"),
    (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: No space left"), "/dev/shm"),
]


@pytest.mark.parametrize(("error", "words"), SHORTAGES)
def test_want_of_memory_is_recognised(error, words):
    assert words in out_of_memory(error) and words in str(explained(error))


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("out of memory"), KeyError("x"), OSError("x")])
def test_other_failures_are_not_taken_for_want_of_memory(error):
    assert out_of_memory(error) is None and explained(error) is None


def test_torch_says_it_in_these_words():
    for shape in [(10**14,), (2**40, 2**30)]:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(*shape)
        assert out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("diffora.run.experiment.Parts.load", "smaller model"),
        ("diffora.methods.lora.LoRA.adapt", "smaller batch_size, rank"),
        ("diffora.tasks.glue.GlueTask.loss", r"finetune.accumulate=2 halves"),
        ("diffora.run.experiment.new_record", None),
    ],
)
def test_memory_that_runs_out_anywhere_in_a_run_is_one_message(cfg, tmp_path, monkeypatch, place, words):
    """C: no memory for an allocation"""

    def fails(*_, **__):
        raise RuntimeError(CPU)

    monkeypatch.setattr(place, fails)
    if words is None:
        with pytest.raises(RuntimeError) as caught:
            run(cfg(*LORA), tmp_path / "run")
        assert explained(caught.value)
        return
    with pytest.raises(UserError, match=f"out of memory, 4 TiB.*{words}"):
        run(cfg(*LORA), tmp_path / "run")


def test_a_process_that_loads_batches_and_is_killed_is_one_message(cfg, tmp_path, monkeypatch):
    def killed(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Collator, "__call__", killed)
    with pytest.raises(UserError, match=r"a process that loads batches was killed.*trainer\.num_workers=0"):
        run(cfg(*LORA, "trainer.num_workers=1"), tmp_path / "run")


def test_memory_that_runs_out_in_prediction_names_the_batch(cfg, monkeypatch):
    from conftest import batch_of
    from small import rows_of, small_deberta, small_task

    from diffora.loop.predict import predict
    from diffora.tasks.base import Split

    def fails(*_):
        raise RuntimeError(CPU)

    task, rows = small_task(), rows_of(8)
    monkeypatch.setattr(GlueTask, "outputs", fails)
    trainer = cfg(*LORA).trainer
    with pytest.raises(UserError, match=r"with batches of 8 rows; try batch_size=4"):
        predict(small_deberta(), task, Split(rows, rows), lambda _: batch_of(8), 8, trainer)


# --- launchers ---


@pytest.mark.parametrize(
    ("environment", "devices", "words"),
    [
        ({"SLURM_NTASKS": "2"}, 1, "srun did not start this process"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, 2, "srun did not start this process"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, 2, "--ntasks-per-node=2"),
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            1,
            "trainer.devices=1 must be 2",
        ),
        ({"SLURM_NTASKS": "two"}, 1, "SLURM_NTASKS=two must be a whole number"),
        ({"SLURM_PROCID": "1"}, 1, "without SLURM_NTASKS"),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "1"}, 1, "interactive"),
        ({"LOCAL_RANK": "1"}, 1, "LOCAL_RANK=1 is set without WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, 2, "LOCAL_RANK=0 is set without WORLD_SIZE"),
        ({"RANK": "1"}, 1, "RANK=1 is set without WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, "without LOCAL_RANK"),
        ({"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "2"}, 2, "must be less than WORLD_SIZE=2"),
        ({"LOCAL_RANK": "-1", "WORLD_SIZE": "x"}, 1, "LOCAL_RANK=-1 must be a whole number"),
        ({"TORCHELASTIC_RUN_ID": "a", "LOCAL_RANK": "0"}, 1, "without RANK, WORLD_SIZE"),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, "trainer.devices=1 must"),
    ],
)
def test_launch_variables_that_contradict_each_other_are_named(environment, devices, words):
    """C: SLURM_NTASKS=2 outside SLURM's own launch"""
    assert words in next(launch_problems(environment, devices))


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, 1),
        ({}, 4),
        ({"LOCAL_RANK": "0"}, 1),  # what Lightning leaves behind
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}, 2),  # what it gives the processes that it starts
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 2),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "auto"),
        ({"SLURM_NTASKS": "1"}, 1),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"}, 1),
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            2,
        ),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),  # what submitit starts
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, 1),
    ],
)
def test_launch_variables_that_agree_are_taken(environment, devices):
    assert list(launch_problems(environment, devices)) == []


# --- the command ---


def ended(capsys, error):
    """(status, what was printed to stderr) of a command that raises."""

    def main():
        raise error

    raising = logging.raiseExceptions
    try:
        with pytest.raises(SystemExit) as caught:
            cli.command(main)
    finally:
        logging.raiseExceptions = raising
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/run"), 1, "error: /a/run: permission denied\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), 1, "a part of this path is a file"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full"),
        (OSError(errno.EMFILE, "Too many open files", "/a"), 1, "ulimit -n"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), 1, "Connection timed out"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("can't start new thread"), 1, "ulimit -u"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, "the output was closed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_machine_does_is_not_called_a_fault_of_the_program(capsys, error, status, words):
    code, err = ended(capsys, error)
    assert code == status and words in err and err.count("error: ") == 1 and "fault of the program" not in err


def test_a_fault_of_the_program_is_called_one(capsys):
    assert "This is a fault of the program" in ended(capsys, ZeroDivisionError("x"))[1]


def test_an_ascii_terminal_shows_what_it_can(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    raising = logging.raiseExceptions
    cli.command(lambda: print("ρ = 0.2 ─ café"))
    logging.raiseExceptions = raising
    assert screen.buffer.getvalue() == b"\\u03c1 = 0.2 \\u2500 caf\\xe9\n"


def test_evaluation_finds_out_that_it_cannot_write_before_it_loads_anything(cfg, tmp_path, monkeypatch):
    from diffora.run import evaluate

    (tmp_path / "file").touch()
    monkeypatch.delattr(evaluate, "get_task")
    request = evaluate.Request(cfg(*LORA), tmp_path, None, tmp_path / "file" / "out", 8)
    with pytest.raises(WriteError, match="a part of this path is a file"):
        evaluate.evaluate(request)


@pytest.mark.parametrize("fails", [False, True])
def test_an_output_that_was_closed_before_the_start_costs_nothing(monkeypatch, fails):
    """`python train.py … >&-`: Python then has no stream to write to at all."""
    from diffora.cli import command

    def main():
        print("a result")
        if fails:
            raise UserError("a mistake")

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(logging, "raiseExceptions", True)  # both are put back in the end
    for name in ("sys.stdout", "sys.stderr"):
        monkeypatch.setattr(name, None)
    with pytest.raises(SystemExit) if fails else nullcontext():
        command(main)
