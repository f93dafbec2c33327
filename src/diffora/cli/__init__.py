"""Around the commands: one clear message for what the user can fix, a traceback only with ``debug=…``."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from diffora.errors import UserError, explained
from diffora.places import conf_dir
from diffora.run.composition import composition_problems, missing_plugin, short, sweeps, with_sweep_hint
from diffora.settings import identity  # noqa: F401  # registers resolvers that conf/ needs


def command(main: Callable[[], object]) -> None:
    """Run a command; on failure print one message to stderr and exit with status 1."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we started, as `>&-` does
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a program or a test may have replaced the stream
        with suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for an ASCII terminal
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra passes its exceptions on to us
    if any(a.startswith("debug=") and a not in ("debug=", "debug=null") for a in sys.argv):
        main()
        return
    logging.raiseExceptions = False  # no traceback if a log cannot be written to a full disk
    try:
        os.getcwd()
    except FileNotFoundError:
        fail("the current folder was removed: change to another one")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail(
            "interrupted; the same command continues with resume=true and the same hydra.run.dir (a sweep: "
            "hydra.sweep.dir); a table of an experiment= continues without them",
            status=130,
        )
    except BrokenPipeError:  # the reader of our output is gone, as in `| head`
        fail("the output was closed; a run continues with resume=true and the same hydra.run.dir", status=141)
    except UserError as error:
        fail(*error.problems)
    except Exception as error:
        if told := explained(error):
            fail(*told.problems)
        if type(error).__module__.partition(".")[0] in ("hydra", "omegaconf") or _came_while_composing(error):
            plugin = missing_plugin(error)
            problems = (
                [plugin] if plugin else composition_problems(overrides(), added_paths(), primary()) or [short(error)]
            )
            if {"-m", "--multirun"}.intersection(sys.argv):
                problems = with_sweep_hint(problems)
            elif "Ambiguous value" in str(error):
                several = [f"{each}: several values are a sweep: add -m" for each in sweeps(overrides())]
                problems = [*several, *(problem for problem in problems if "Ambiguous value" not in problem)]
            fail(*problems)
        fail(f"{type(error).__name__}: {error}", "This is a fault of the program; debug=default shows where.")


def _came_while_composing(error: Exception) -> bool:
    """Whether an error came from Hydra before a run or a sweep started."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    begun = {"diffora.run.experiment", "hydra_plugins.diffora_table"}.intersection(modules)
    return not begun and any(module.startswith("hydra.") for module in modules)


def fail(*problems: str, status: int = 1) -> NoReturn:
    """Print messages to stderr and exit."""
    with suppress(OSError):
        for problem in problems:
            print(f"error: {_visible(problem)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # closed or full: discard the rest, so that Python does not try again at exit
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(status)


def _visible(text: str) -> str:
    """A message without control characters: it may quote a file from someone else, and they control a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def overrides() -> list[str]:
    """The overrides on the command line."""
    return [a for a in sys.argv[1:] if a.startswith("~") or ("=" in a and not a.startswith("--"))]


def primary() -> tuple[Path, str]:
    """(folder, name) of the configuration that all others are added to: ``--config-path`` and ``--config-name``."""
    folder, name = values_of("--config-path", "-cp"), values_of("--config-name", "-cn")
    return Path(folder[-1]).absolute() if folder else conf_dir(), name[-1] if name else "config"


def values_of(*names: str) -> list[str]:
    """The values of an option of Hydra on the command line: ``--name value`` or ``--name=value``."""
    found = []
    for argument, following in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True):
        name, given, value = argument.partition("=")
        if name in names:
            found.append(value if given else following)
    return found


def added_paths() -> list[str]:
    """The folders of configurations that the command line adds: ``--config-dir`` and ``hydra.searchpath``."""
    from diffora.run.sweep import parse

    found = [f"file://{os.path.abspath(value)}" for value in values_of("--config-dir", "-cd")]
    for override in overrides():
        if override.partition("=")[0].lstrip("+") == "hydra.searchpath":
            with suppress(Exception):  # not of the form name=[…]: Hydra says so itself
                value_of: Any = parse([override])[0].value()
                found += map(str, value_of)
    return found
