"""``train`` and ``select``: Hydra reads their arguments, and calls `job` for each run."""

import logging
import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from diffora.cli import added_paths, fail, primary, values_of
from diffora.cli.environment import prepare
from diffora.errors import SECRET, UserError, called
from diffora.run.composition import check_added
from diffora.run.imports import import_run
from diffora.trust import look_in

SELECT = """\
Search and select modules, without fine-tuning: selection.json and its pictures.

  {select} method=diffora task=mrpc
  {select} experiment=quickstart                   in seconds, without network or GPU
  {select} method.selector=attribution task=mrpc   another way to score the modules
  {select} -m seed=0,1,2 task=mrpc                 a sweep

It takes every choice and value of `{train}` (see its --help), and sets search_only=true. At the end it says how to
use the selection. Methods that select no modules are refused."""

log = logging.getLogger(__name__)

_typed: list[str] = []
"""The command line as it was typed, while Hydra reads a part of it."""
NOT_STARTED = "the sweep ends here, because its processes work together; the same command does what is missing"
_to_say: list[str] = []
"""Lines for the start of the first run, when it is known that there is one."""


def main(arguments: list[str]) -> None:
    """One run, or with ``-m`` a sweep.

    Raises:
        Exception: Hydra's and those of the run; `diffora.cli.command` explains them.
    """
    _refuse_secrets(arguments)
    if waiting := prepare(os.environ):
        _to_say.append(waiting)
    import hydra  # slow, and `--help` of `select` does not need it

    global _typed
    _typed = sys.argv
    sys.argv = [sys.argv[0], *options_first(arguments)]  # where Hydra looks for arguments
    folder, name = primary()
    if values_of("--config-path", "-cp"):  # Hydra would look for it beside this module, not in the current folder
        sys.argv += ["--config-path", str(folder)]  # the last one counts
    look_in(check_added(added_paths(), folder))
    hydra.main(version_base="1.3", config_path=str(folder), config_name=name)(job)()


def _refuse_secrets(arguments: list[str]) -> None:
    """Raise a UserError if Hydra should set an environment variable that holds a secret: W&B records the command."""
    for argument in arguments:
        names = re.findall(r"(\w+)\s*[:=](?!\s*['\"]?\$\{oc\.env:)", argument) if "env_set" in argument else []
        if secret := [name for name in names if SECRET.search(name)]:
            raise UserError(
                f"hydra.job.env_set: {secret[0]} must not be on the command line, which is recorded; set the "
                "environment variable before you start the program"
            )


def select(arguments: list[str]) -> None:
    """The same, with ``search_only=true``.

    Raises:
        UserError: the arguments set ``search_only`` themselves.
    """
    if {"-h", "--help"} & set(arguments):
        print(SELECT.format(select=called("select"), train=called("train")))
        return
    if given := [a for a in arguments if a.lstrip("+~").partition("=")[0] == "search_only"]:
        raise UserError(f"{given[0]}: `{called('select')}` sets search_only=true itself; leave it out")
    main(["search_only=true", *arguments])


def options_first(arguments: list[str]) -> list[str]:
    """Arguments with Hydra's options before all settings. Hydra refuses settings that have options between them."""
    options: list[str] = []
    settings: list[str] = []
    before = ""
    for argument in arguments:
        value = before in WITH_VALUE or (before in ("--info", "-i") and "=" not in argument)
        (options if value or argument.startswith("-") else settings).append(argument)
        before = "" if value else argument
    return [*options, *settings]


WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
)
"""Hydra's options that take the next argument."""


def job(cfg: DictConfig) -> float | None:
    """One run: returns the task's main metric, for sweeps to optimise."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if _typed:
        sys.argv = _typed  # Lightning starts the other processes of a run with it
    hydra = HydraConfig.get()
    sources = [source for source in hydra.runtime.config_sources if source.schema == "file"]
    look_in(Path(source.path) for source in sources if source.provider != "main")  # a launcher's worker needs it
    if hydra.mode == RunMode.MULTIRUN:
        print(f"\n{hydra.runtime.output_dir}", flush=True)
    elif hydra.sweeper.get("rows"):
        name = hydra.runtime.choices["experiment"]
        with suppress(OSError):
            os.rmdir(hydra.runtime.output_dir)
        table = f"{called('train')} -m experiment={name} scale=…"
        fail(f"experiment={name} is a table of runs, which takes -m: {table}")
    while _to_say:
        log.info(_to_say.pop())
    import_run()
    from diffora.run.experiment import train

    # If a run fails in one of several processes, that process must not begin the next run while the others wait for it.
    together = hydra.mode == RunMode.MULTIRUN and int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        return train(cfg)
    except UserError as error:
        with suppress(OSError):  # Hydra has made the run directory; it is kept if it has content
            os.rmdir(hydra.runtime.output_dir)
        if together:
            fail(*error.problems, NOT_STARTED)
        if cfg.get("debug") or hydra.mode == RunMode.MULTIRUN:
            raise  # the other jobs of the sweep continue
        fail(*error.problems)
    except Exception:
        if together:
            traceback.print_exc()
            fail(NOT_STARTED)
        raise
