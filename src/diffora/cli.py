"""Around `train.py`: one clear message for what the user can mend, a traceback only with ``debug=…``."""

import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig

from diffora.errors import UserError, explained
from diffora.files import conf_dir
from diffora.settings.config import RULES, unknown_key  # its resolvers must be there before Hydra resolves


def command(main: Callable[[], object]) -> None:
    """Run a Hydra main function; on failure print one message to stderr and exit with status 1."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we began, as `>&-` does
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # of another kind where a program or a test has replaced it
        with suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # an ASCII terminal
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves its exceptions to us
    if any(a.startswith("debug=") and a not in ("debug=", "debug=null") for a in sys.argv):
        main()
        return
    logging.raiseExceptions = False  # a log that cannot be written, its disk full, is no reason for a traceback
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
    except BrokenPipeError:  # whoever read our output has gone, as in `| head`
        fail("the output was closed; a run continues with resume=true and the same hydra.run.dir", status=141)
    except UserError as error:
        fail(*error.problems)
    except Exception as error:
        if told := explained(error):
            fail(*told.problems)
        if type(error).__module__.partition(".")[0] in ("hydra", "omegaconf") or _came_while_composing(error):
            plugin = _missing_plugin(error)
            problems = [plugin] if plugin else composition_problems(overrides(), added_paths()) or [short(error)]
            fail(*(with_sweep_hint(problems) if {"-m", "--multirun"}.intersection(sys.argv) else problems))
        fail(f"{type(error).__name__}: {error}", "This is a fault of the program; debug=default shows where.")


def _came_while_composing(error: Exception) -> bool:
    """Whether an error came from Hydra on its way to a run or a sweep, and not from these."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    begun = any(frame.f_code is job.__code__ for frame in frames) or "hydra_plugins.diffora_table" in modules
    return not begun and any(module.startswith("hydra.") for module in modules)


def job(cfg: DictConfig) -> float | None:
    """One run: returns the task's main metric, for sweeps to optimise."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        print(f"\n{hydra.runtime.output_dir}", flush=True)
    elif hydra.sweeper.get("rows"):
        name = hydra.runtime.choices["experiment"]
        with suppress(OSError):
            os.rmdir(hydra.runtime.output_dir)
        fail(f"experiment={name} is a table of runs, which takes -m: python train.py -m experiment={name} scale=…")
    import_run()
    from diffora.run.experiment import train

    try:
        return train(cfg)
    except UserError as error:
        with suppress(OSError):  # Hydra has made the run directory; one with something in it stays
            os.rmdir(hydra.runtime.output_dir)
        if cfg.get("debug") or hydra.mode == RunMode.MULTIRUN:
            raise  # the sweep's other jobs go on
        fail(*error.problems)


def import_run() -> None:
    """Import all that a run needs, once, without looking for garbage meanwhile.

    Thousands of modules make hundreds of thousands of objects that stay. Python's collector would pass over all of
    them again and again, which takes a seventh of the time; afterwards they are put out of its sight.
    """
    if "diffora.run.experiment" in sys.modules or not gc.isenabled():
        return  # a later job of a sweep: what earlier ones left must not be kept
    gc.disable()
    try:
        import diffora.run.experiment  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()


def fail(*problems: str, status: int = 1) -> NoReturn:
    """Print messages to stderr and exit."""
    with suppress(OSError):
        for problem in problems:
            print(f"error: {_visible(problem)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # closed or full: what is left goes nowhere, so that Python does not try again at its end
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(status)


def _visible(text: str) -> str:
    """A message without control characters, which steer a terminal: it may quote somebody else's file."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def overrides() -> list[str]:
    """The overrides on the command line."""
    return [a for a in sys.argv[1:] if a.startswith("~") or ("=" in a and not a.startswith("--"))]


def added_paths() -> list[str]:
    """The folders of configurations that the command line adds: ``--config-dir`` and ``hydra.searchpath``."""
    from diffora.run.sweep import parse

    found = []
    for argument, following in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True):
        name, given, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(f"file://{os.path.abspath(value if given else following)}")
        elif name.lstrip("+") == "hydra.searchpath":
            with suppress(Exception):  # not of the form name=[…], which Hydra says itself
                value_of: Any = parse([argument])[0].value()
                found += map(str, value_of)
    return found


def with_sweep_hint(problems: list[str]) -> list[str]:
    """These problems of a sweep, and how a setting is given that only some of its runs have."""
    if "has no setting" not in "".join(problems):
        return problems
    return [
        *problems,
        "a setting that only some of the swept methods or tasks have is written with ++, as in ++search.epochs=1: the "
        "runs that have it take it, the others go without",
    ]


def composition_problems(given: list[str], paths: Sequence[str] = ()) -> list[str]:
    """Every reason why these overrides do not compose, and every wrong value among those that do.

    Hydra stops at the first mistake, so each override is tried for itself: first those that choose from ``conf/``, then
    the values, on top of the choices that work.

    Args:
        paths: where to look for choices besides ``conf/``, as in ``hydra.searchpath``.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from diffora.run.experiment import check
    from diffora.run.sweep import quoted

    folders = [Path(path.removeprefix("file://")) for path in paths if path.startswith("file://")]
    if lost := [f"--config-dir={folder} is not a folder" for folder in folders if not folder.is_dir()]:
        return lost
    GlobalHydra.instance().clear()
    groups = {group.name for folder in (conf_dir(), *folders) for group in folder.iterdir() if group.is_dir()}
    given = [o for o in given if not re.match(r"[+~]*hydra\b", o)]
    choices = [o for o in given if o.partition("=")[0].lstrip("+~") in groups]
    found: list[str] = []
    kept = [f"hydra.searchpath=[{','.join(map(quoted, paths))}]"] if paths else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for override in [*choices, *(o for o in given if o not in choices)]:
            right = []
            for line in _each_value(override):
                try:
                    compose("config", [*kept, line])
                    right.append(line)
                except Exception as error:
                    key = line.partition("=")[0]
                    options = re.search(r"Available options in '([^']*)':((?:\n\t\S+)*)", str(error))
                    if plugin := _missing_plugin(error):
                        found.append(plugin)
                    elif "Got NoneType" in str(error) or ("must be a string" in str(error) and key in groups):
                        files = [file for folder in (conf_dir(), *folders) for file in folder.glob(f"{key}/*.yaml")]
                        names = sorted({file.stem for file in files})
                        none = "; logger=[] for none" if key == "logger" else ""
                        found.append(f"{line} is not one of: {', '.join(names)}{none}")
                    elif options:
                        inner = re.search(r"Could not (?:find|load) '([^']*)'", str(error))
                        if inner and options[1] != key.lstrip("+"):  # in the defaults of the file that was chosen
                            line += f" asks for {inner[1]}, which"
                        found.append(f"{line} is not one of: {', '.join(options[2].split())}")
                    elif "is not in struct" in str(error) or "Could not override" in str(error):
                        found.append(_no_such_key(key, compose("config", kept), unknown_key))
                        break
                    else:
                        found.append(f"{line}: {short(error)}")
            kept += right[:1]
        try:
            check(compose("config", kept))
        except UserError as error:
            found += error.problems
    return found


def _missing_plugin(error: Exception) -> str | None:
    """What to install, where a launcher or sweeper is asked for that is not there."""
    wanted = re.search(r"Could not find 'hydra/(?:launcher|sweeper)/((joblib|submitit|ray|optuna)\w*)'", str(error))
    return f"{wanted[1]} is not installed: pip install 'diffora[{wanted[2]}]'" if wanted else None


def _each_value(override: str) -> list[str]:
    """A sweep's override for each of its values; what cannot be read stays as it is."""
    from diffora.run.sweep import parse, values

    try:
        [parsed] = parse([override])
        return [override] if parsed.is_delete() else [f"{parsed.get_key_element()}={v}" for v in values(parsed)]
    except Exception:
        return [override]


def _no_such_key(key: str, cfg: DictConfig, unknown: Callable[[str, Iterable[str]], str]) -> str:
    of_method = key.split(".")[0] in ("search", "rank", "rho", "method") or key == "finetune.dropout"
    if of_method and isinstance(cfg.get("method"), DictConfig):  # ~method takes it away
        there = [f"method.{name}" for name in cfg.method if name not in ("_target_", "name")]
        there += [name for name in ("rank", "rho", "search") if name in cfg]
        return f"method={cfg.method.name} has no setting {key}" + (f"; it has {', '.join(there)}" if there else "")
    if key.startswith("task.") and isinstance(cfg.get("task"), DictConfig):
        there = [f"task.{name}" for name in cfg.task if name != "_target_"]
        return f"task={cfg.task.name} has no setting {key}; it has {', '.join(there)}"
    known = [k for k in RULES if not k.endswith("*")]
    return unknown(key, [*known, *map(str, cfg)])


def short(error: Exception) -> str:
    """The first lines of Hydra's messages, without its advice on how to force a key in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line for line in lines[:3] if not line.startswith("To append"))
