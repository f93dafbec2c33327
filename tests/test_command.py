"""How a command ends: exit codes and messages of failures, and terminals that cannot show everything."""

import errno
import io
import logging
import sys
from contextlib import nullcontext

import pytest

from diffora.cli import command
from diffora.errors import UserError


def ended(capsys, error):
    """Run a command that raises ``error``; return its exit status and what it printed to stderr."""

    def main():
        raise error

    raising = logging.raiseExceptions
    try:
        with pytest.raises(SystemExit) as caught:
            command(main)
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
def test_a_failure_of_the_machine_is_not_called_a_fault_of_the_program(capsys, error, status, words):
    code, err = ended(capsys, error)
    assert code == status and words in err and err.count("error: ") == 1 and "fault of the program" not in err


def test_an_unexpected_error_is_called_a_fault_of_the_program(capsys):
    assert "This is a fault of the program" in ended(capsys, ZeroDivisionError("x"))[1]


def test_an_ascii_terminal_gets_escapes_for_other_characters(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    raising = logging.raiseExceptions
    command(lambda: print("ρ = 0.2 ─ café"))
    logging.raiseExceptions = raising
    assert screen.buffer.getvalue() == b"\\u03c1 = 0.2 \\u2500 caf\\xe9\n"


@pytest.mark.parametrize("fails", [False, True])
def test_a_command_runs_with_closed_output(monkeypatch, fails):
    """As in ``python train.py … >&-``: Python has no stream to write to."""

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
