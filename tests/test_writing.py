"""Files are complete or absent, also after any failure while they are written."""

import errno
import os
import pickle
import shutil
import stat
import time
import zipfile

import pyarrow as pa
import pytest
import torch
from failures import largest_file, refusing
from safetensors.torch import load_file, save_file

from diffora.errors import WriteError
from diffora.files import atomic, atomic_folder, check_writable, kept, remove_leftovers, write_text

TENSORS = {"weight": torch.zeros(100_000)}


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


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_gets_the_permissions_that_open_would_give(tmp_path, writer, mask):
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
def test_without_space_the_message_names_the_file_and_the_old_file_stays(tmp_path, writer):
    """The full disk is imitated by ``ulimit -f``."""
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
def test_a_refused_system_call_gives_a_message_and_leaves_no_file(tmp_path, monkeypatch, call, number, words):
    monkeypatch.setattr(os, call, refusing(getattr(os, call), number))
    with pytest.raises(WriteError, match=words) as caught:
        write_text(tmp_path / "new" / "file", "text")
    monkeypatch.undo()
    assert str(caught.value).startswith(f"{tmp_path / 'new' / 'file'} cannot be written: ")
    sent = pickle.loads(pickle.dumps(caught.value))  # like the workers of a sweep
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


def test_other_errors_while_writing_are_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic(tmp_path / "file"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(KeyError), atomic(tmp_path / "file"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_only_scratch_files_of_dead_processes_are_removed(tmp_path):
    def left_by(pid, host, age=0):
        with atomic(tmp_path / "x") as scratch:
            pattern = scratch.name
        name = pattern.replace(str(os.getpid()), str(pid), 1)
        file = tmp_path / (name if host is None else name.replace(name.split("-", 1)[1], f"{host}.part"))
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
        return file

    dead = 2**22 + 1  # above the largest process id of Linux
    days = 2 * 86400
    gone = [
        left_by(dead, None),
        left_by(10**30, None),
        left_by(dead, "far-away", days),
        left_by(os.getpid(), None, days),
    ]
    there = [left_by(os.getppid(), None), left_by(dead, "elsewhere"), tmp_path / ".notes.part"]
    (tmp_path / ".notes.part").touch()
    (tmp_path / ".a.1.part").mkdir()
    remove_leftovers(tmp_path)
    assert not any(file.exists() for file in gone) and all(file.exists() for file in there)
    assert (tmp_path / ".a.1.part").is_dir()


@pytest.mark.parametrize("again", [False, True])
def test_a_removed_folder_is_not_created_again(tmp_path, again):
    with kept(tmp_path / "run"):
        write_text(tmp_path / "run" / "a" / "b", "")
        shutil.rmtree(tmp_path / "run")
        if again:
            (tmp_path / "run").mkdir()
        with pytest.raises(WriteError, match="removed or replaced while this process was writing to it"):
            write_text(tmp_path / "run" / "a" / "b", "")
    assert (tmp_path / "run").exists() == again and not list(tmp_path.glob("run/*"))
    write_text(tmp_path / "run" / "b", "")


def test_checking_a_place_leaves_no_file(tmp_path, monkeypatch):
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
