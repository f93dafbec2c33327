"""How a command ends: exit codes and messages of failures, and terminals that cannot show everything."""

import errno
import io
import logging
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPO
from omegaconf import OmegaConf

import diffora
from diffora.__main__ import PROGRAMS, dispatch
from diffora.cli import command, primary
from diffora.cli.train import job, options_first, select
from diffora.cli.train import main as train_command
from diffora.errors import UserError, called, without_secrets
from diffora.loop.launch import torchrun
from diffora.places import conf_dir
from diffora.run.composition import check_added, composition_problems
from diffora.settings import identity  # noqa: F401  # registers resolvers that conf/ needs


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
    "typed",
    ["+hydra.job.env_set.MY_PASSWORD=s3cret", "hydra.job.env_set={MODE: fast, API_TOKEN: s3cret}"],
)
def test_a_secret_for_the_environment_is_not_taken_from_the_command_line(typed):
    """W&B records the command line."""
    with pytest.raises(UserError, match=r"hydra\.job\.env_set: (MY_PASSWORD|API_TOKEN) must not be") as refused:
        train_command(["experiment=quickstart", typed])
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/x does not answer", "https://…@host/x does not answer"),
        ("https://token@host", "https://…@host"),
        ("https://host/?a=1&api_key=abc&b=2", "https://host/?a=1&api_key=…&b=2"),
        ("https://host/a@b?page=2", "https://host/a@b?page=2"),
        ("https://me:p@ss@host", "https://…@host"),
        ("https://host/x?apikey=abc", "https://host/x?apikey=…"),
        (
            "ssh://git@github.com/x data/a?key=3 https://h?sort_key=a",
            "ssh://git@github.com/x data/a?key=3 https://h?sort_key=a",
        ),
    ],
)
def test_addresses_are_shown_without_their_secrets(text, shown):
    assert without_secrets(text) == shown


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
        (RuntimeError("Could not determine home directory."), 1, "was ~/ meant?"),
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


# --- the command and its programs ---


def test_the_help_names_every_program_and_no_argument_shows_it(capsys):
    dispatch(["--help"])
    helped = capsys.readouterr().out
    dispatch([])
    assert capsys.readouterr().out == helped
    assert all(f"\n  {name} " in helped and what in helped for name, (_, what) in PROGRAMS.items())


def test_the_version_is_the_packages(capsys):
    dispatch(["--version"])
    assert capsys.readouterr().out == f"diffora {diffora.__version__}\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_a_function_of_its_arguments(program):
    module, _, function = PROGRAMS[program][0].partition(":")
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    assert f"\ndef {function}(arguments: list[str]) -> None:" in Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "method=lora"], "no program trian; did you mean train?"),
        (["exprot"], "did you mean export?"),
        (["xyz"], "no program xyz; It has train, select"),
        (["method=lora", "-m"], "method=lora comes after the name of a program: diffora train method=lora -m"),
        (["-m", "seed=0,1"], "diffora train -m seed=0,1"),
    ],
)
def test_a_wrong_program_is_named_with_the_nearest(arguments, words):
    with pytest.raises(UserError) as refused:
        dispatch(arguments)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("start", "train", "export", "many"),
    [
        ("train.py", "python train.py", "python -m diffora export", "train.py"),
        ("../code/report.py", "python ../code/train.py", "python -m diffora export", "../code/train.py"),
        ("/opt/bin/diffora", "diffora train", "diffora export", "-m diffora train"),
        ("/lib/diffora/__main__.py", "python -m diffora train", "python -m diffora export", "-m diffora train"),
        ("/lib/ipykernel_launcher.py", "diffora train", "diffora export", "-m diffora train"),
        ("", "diffora train", "diffora export", "-m diffora train"),
    ],
)
def test_messages_name_the_command_as_the_user_called_it(monkeypatch, start, train, export, many):
    monkeypatch.setattr("sys.argv", [start, "x"])
    assert (called("train"), called("export")) == (train, export)
    assert torchrun() == f"torchrun --nproc-per-node=N {many}"
    help_text = OmegaConf.create({"help": OmegaConf.load(conf_dir() / "hydra" / "default.yaml").help}).help.template
    assert f"\n  {train} method=diffora" in help_text and f"`{train} --cfg" in help_text


@pytest.mark.parametrize(
    ("line", "expected", "others"),
    [
        ("diffora ", set(PROGRAMS), {"method="}),
        ("diffora tr", {"train"}, {"method="}),
        ("diffora train method=dif", {"method=diffora"}, {"method=lora", "train"}),
        ("diffora select task=s", {"task=sst2", "task=squad"}, {"task=mrpc"}),
        ("diffora train method=lora finetune.ep", {"finetune.epochs="}, {"finetune.lr="}),
        ("diffora report out", set(), {"train", "method="}),
    ],
)
def test_the_shell_completes_programs_choices_and_values(line, expected, others, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/opt/bin/diffora", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", line)
    dispatch(sys.argv[1:])
    found = set(capsys.readouterr().out.split())
    assert expected <= found and not others & found


def test_the_script_for_the_shell_is_for_this_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/lib/diffora/__main__.py", "-sc", "install=bash"])
    dispatch(sys.argv[1:])
    assert capsys.readouterr().out.strip().endswith("-F hydra_bash_completion diffora")
    assert "@hydra.main" in (REPO / "train.py").read_text()  # Hydra's script looks for it


def test_select_is_train_with_search_only(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("sys.argv", ["diffora"])
    monkeypatch.setattr("diffora.cli.train.main", seen.append)
    select(["-m", "--config-dir=x=y", "seed=0,1", "rho=0.5"])
    select([])
    assert seen == [["search_only=true", "-m", "--config-dir=x=y", "seed=0,1", "rho=0.5"], ["search_only=true"]]
    select(["--help"])
    assert "diffora select method=diffora task=mrpc" in capsys.readouterr().out and len(seen) == 2
    with pytest.raises(UserError, match="search_only=false: `diffora select` sets search_only=true itself"):
        select(["search_only=false"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a=1 -m b=2 --config-dir c d=3", "-m --config-dir c a=1 b=2 d=3"),
        ("a=1 --config-dir=x=y ~b", "--config-dir=x=y a=1 ~b"),
        ("a=1 -cd b=c d=2 --cfg job", "-cd b=c --cfg job a=1 d=2"),
        ("--info a=1 -i plugins b=2", "--info -i plugins a=1 b=2"),
        ("word -m", "-m word"),
    ],
)
def test_options_may_stand_between_settings(given, expected):
    assert " ".join(options_first(given.split())) == expected


def test_other_processes_of_a_run_get_the_whole_command(monkeypatch, tmp_path):
    """Hydra reads the arguments without ``train``; Lightning starts the other processes with all of them."""
    typed = ["/opt/bin/diffora", "train", "dry_run=true", "experiment=quickstart", f"hydra.run.dir={tmp_path}"]
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", typed)
    monkeypatch.setattr("diffora.run.experiment.train", lambda cfg: seen.append(list(sys.argv)))
    monkeypatch.setattr("diffora.cli.train._typed", [])
    dispatch(typed[1:])
    assert seen == [typed] and job.__module__ == "diffora.cli.train"


def test_the_help_imports_nothing_large():
    code = (
        "import sys; from diffora.__main__ import dispatch; dispatch(['--help']); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "hydra", "lightning", "transformers", "numpy"} & set(done.stderr.split())


# --- choices and classes of the user ---


def test_a_file_that_hydra_would_not_read_is_refused(tmp_path):
    for name in ("task/mrpc.yaml", "task/mine.yaml", "config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a: 1\n")
    place = f"file://{tmp_path}"
    assert composition_problems([], [place]) == [
        f"{tmp_path / name} would not be read, because diffora has {name} too: give it another name"
        for name in ("config.yaml", "task/mrpc.yaml")
    ]
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "task/mrpc.yaml").write_bytes((conf_dir() / "task/mrpc.yaml").read_bytes())
    assert check_added([place, "pkg://somewhere"], conf_dir()) == [tmp_path]


def test_another_primary_configuration_is_used_for_messages(tmp_path, monkeypatch):
    (tmp_path / "group").mkdir()
    (tmp_path / "group/one.yaml").write_text("x: 1\n")
    (tmp_path / "main.yaml").write_text("defaults: [group: one]\n")
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr("sys.argv", ["diffora", "train", "-cp", tmp_path.name, "--config-name=main", "group=on"])
    assert primary() == (tmp_path, "main")
    assert composition_problems(["group=on"], [], primary())[0] == "group=on is not one of: one; did you mean one?"
