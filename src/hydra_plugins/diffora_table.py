"""Hydra's sweeper for this project: tables of experiments and plain sweeps. A failed run does not stop the others.

It checks all configurations before the first run starts and skips runs that are complete. It lists failed runs at the
end, with exit status 1. Runs are started by the configured launcher.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from diffora.errors import UserError, explained
from diffora.run.arguments import has_key
from diffora.run.directory import check_sweep_place
from diffora.run.sweep import Table, cells, combinations, parse, table_of, values
from diffora.settings.quotes import quoted

ConfigStore.instance().store(group="hydra/sweeper", name="table", node=Table, provider="diffora")

SHOWN = 20  # the most problems to show before anything starts
MANY = 20  # announce the check if there are more runs than this

Jobs = dict[Path, tuple[str, ...]]  # the overrides of each run, by its folder


class TableSweeper(Sweeper):
    """Runs the sweeps that `diffora.run.sweep` describes."""

    def __init__(self, **table: Any) -> None:
        pass  # the table comes from each experiment= on the command line

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.command = hydra_context.config_loader, config
        self.runner = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        path = self.loader.get_search_path().get_path()
        self.added = [e.path for e in path if e.provider == "command-line" or e.provider.startswith("hydra.searchpath")]
        home = next(Path(e.path.removeprefix("file://")) for e in path if e.provider == "main")
        self.primary = home, str(config.hydra.job.config_name)
        self.kind = launcher = str(config.hydra.launcher._target_).rpartition(".")[2]
        self.local = launcher in ("BasicLauncher", "JoblibLauncher")  # other launchers may run on another machine
        subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[call-overload, index]
        self.named_by_overrides = "override" in str(subdir)  # the seed's too, so that it has to be composed
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.known_errors: set[tuple[str, ...]] = set()  # those whose reasons were found

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep that the command line asks for.

        Raises:
            UserError: every mistake in any configuration, before anything runs; or the runs that failed.
        """
        if any(line.lstrip("+").startswith("hydra.run.dir=") for line in self.command.hydra.overrides.hydra):
            raise UserError("hydra.run.dir= is of a single run: give a sweep hydra.sweep.dir=")
        check_sweep_place(Path(self.command.hydra.sweep.dir))
        jobs = self.fitting(self.jobs(arguments))
        if len(jobs) > MANY:
            print(f"checking {len(jobs)} runs", flush=True)
        missing = self.missing(jobs)
        done = len(jobs) - len(missing)
        places = ", ".join(dict.fromkeys(str(folder.parent) for folder in jobs))
        print(f"runs: {len(jobs)} in {places}, {done} complete", flush=True)
        if self.command.dry_run:
            for folder, overrides in missing.items():
                print(f"  {folder.name}: {' '.join(overrides)}")
            return
        if failed := self.launch(missing):
            again = "the same command"
            if "resume=true" not in next(iter(missing.values())):
                again += f" with resume=true hydra.sweep.dir={self.command.hydra.sweep.dir}"
            alike: dict[str, list[Path]] = {}
            for folder, message in failed.items():
                alike.setdefault(message, []).append(folder)
            raise UserError(
                [f"{len(failed)} of {len(missing)} runs failed; {again} does what is missing"]
                + [
                    f"{folder}{f' and {len(others)} more' if others else ''}: {message}"
                    for message, (folder, *others) in alike.items()
                ]
            )
        print(f"\nall {len(jobs)} runs are complete", flush=True)

    def jobs(self, arguments: Sequence[str]) -> Jobs:
        """All runs, with those that are complete.

        A table is written to a folder of its own below ``outputs``, or to ``hydra.sweep.dir=``. Each of several
        experiments has a folder of its own there.
        """
        from diffora.run.composition import composition_problems, short, with_sweep_hint

        given = parse(arguments, self.loader)
        for override in given:
            if override.key_or_group in ("scale", "dry_run", "resume") and len(values(override)) > 1:
                raise UserError(f"{override.input_line}: a sweep takes one value of it")
        experiments = [value for o in given if o.key_or_group == "experiment" for value in values(o)] or [""]
        others = [o for o in given if o.key_or_group != "experiment"]
        resuming = () if any(o.key_or_group == "resume" for o in given) else ("resume=true",)
        elsewhere = any(line.lstrip("+").startswith("hydra.sweep.dir=") for line in self.command.hydra.overrides.hydra)
        present = Path(self.command.hydra.sweep.dir)
        chosen = {name: (f"experiment={name}",) if name else () for name in experiments}
        tables = {name: table_of(self.compose(choice).hydra.sweeper) for name, choice in chosen.items()}
        has_table = any(table.rows for table in tables.values())
        found: Jobs = {}
        for experiment, table in tables.items():
            choice = chosen[experiment]
            name = f"{experiment}-{self.command.scale}" if table.rows else experiment
            place = present / name if len(experiments) > 1 else present
            if table.rows and not elsewhere:
                place = Path("outputs") / name
                self.command.hydra.sweep.dir = str(place)
            if table.rows:
                of_cells = cells(others, table, experiment, self.command.scale, place)
                for cell, overrides in of_cells.items():
                    found[place / cell] = (*overrides, *resuming)
                if recipe := [str(o.input_line) for o in others if o.key_or_group == "recipe"]:
                    _say_kept(recipe[0], others, chain(*of_cells.values()))
                continue
            without_scale = [o for o in others if not (has_table and o.key_or_group == "scale")]
            for number, overrides in enumerate(combinations(without_scale)):
                try:
                    cfg = self.compose((*choice, *overrides))
                except (HydraException, OmegaConfBaseException) as error:
                    typed = [str(o.input_line) for o in others]  # first all values, then those of this run
                    for lines in (typed, overrides):
                        if reasons := composition_problems([*choice, *lines], self.added, self.primary):
                            raise UserError(with_sweep_hint(reasons)) from error
                    raise UserError(with_sweep_hint([short(error)])) from error
                with open_dict(cfg.hydra.job):
                    cfg.hydra.job.num = number
                folder = place / cfg.hydra.sweep.subdir
                if folder in found:
                    raise UserError(f"hydra.sweep.subdir gives two runs one folder: {folder}")
                found[folder] = (*choice, *overrides)
        return found

    def fitting(self, jobs: Jobs) -> Jobs:
        """Remove ``++key=value`` from runs that do not have the key, if other runs have it, and say so.

        Runs that become equal are run once.
        """
        keys = {line: parse([line])[0].key_or_group for line in chain(*jobs.values()) if line.startswith("++")}
        present: dict[str, set[Path]] = {key: set() for key in keys.values()}
        for folder, overrides in jobs.items() if keys else ():
            try:
                cfg = self.compose(tuple(line for line in overrides if line not in keys))
            except (HydraException, OmegaConfBaseException):  # reported by `missing`
                continue
            for key in present:
                if has_key(cfg, key):
                    present[key].add(folder)
        for key, folders in present.items():
            if folders and len(folders) < len(jobs):
                print(f"++{key} is left out of {len(jobs) - len(folders)} of {len(jobs)} runs, which have no {key}")
        left: dict[tuple[str, ...], Path] = {}
        for folder, overrides in jobs.items():
            kept = tuple(o for o in overrides if o not in keys or not present[keys[o]] or folder in present[keys[o]])
            left.setdefault(kept, folder)
        if len(left) < len(jobs):
            print(f"{len(jobs) - len(left)} runs are the same as others, and left out")
        return {folder: overrides for overrides, folder in left.items()}

    def compose(self, overrides: tuple[str, ...]) -> DictConfig:
        """A run's configuration; valid until the next call.

        Composing takes Hydra a third of a second, so runs that differ only in their seed share one.
        """
        setting, seed = (overrides, ()) if self.named_by_overrides else _apart(overrides)
        if setting not in self.composed:
            self.composed[setting] = self.loader.load_sweep_config(self.command, list(setting))
        cfg = self.composed[setting]
        for override in parse(seed):
            cfg.seed = override.value()
        return cfg

    def missing(self, jobs: Jobs) -> Jobs:
        """The runs that are not complete yet. All configurations are checked first.

        Raises:
            UserError: every problem of any run, up to `SHOWN`.
        """
        from diffora.run.composition import with_sweep_hint
        from diffora.run.imports import import_run

        import_run()
        from diffora.loop.process import quiet_libraries
        from diffora.run.sweep_check import SweepCheck

        quiet_libraries()  # before Lightning prints what devices it finds
        sweep_check = SweepCheck(self.local)
        found: Jobs = {}
        impossible: set[tuple[str, ...]] = set()  # settings that cannot be composed
        problems: dict[str, None] = {}  # each problem once, in order
        for folder, overrides in jobs.items():
            setting, seed = _apart(overrides)
            if setting in impossible:
                continue
            try:
                cfg = self.compose(overrides)
            except (HydraException, OmegaConfBaseException) as error:
                impossible.add(setting)
                if len(problems) < SHOWN:
                    problems |= dict.fromkeys(self.reasons(error, overrides))
                continue
            with open_dict(cfg):
                cfg.pop("hydra", None)
            try:
                if not sweep_check.is_complete(cfg, folder, (setting, seed)):
                    found[folder] = overrides
            except UserError as error:
                problems |= dict.fromkeys(error.problems)
        problems = dict.fromkeys(with_sweep_hint(list(problems)))
        if len(problems) > SHOWN:
            problems = dict.fromkeys([*list(problems)[:SHOWN], f"and {len(problems) - SHOWN} more"])
        if problems:
            raise UserError(list(problems))
        return found

    def reasons(self, error: Exception, overrides: tuple[str, ...]) -> list[str]:
        """Why a run cannot be composed. Empty for an error that another run of the same method had already.

        Finding the reasons takes seconds, so the first run with an error stands for the others.
        """
        from diffora.run.composition import composition_problems, short

        kind = (str(error), *(line for line in overrides if line.startswith("method=")))
        if kind in self.known_errors:
            return []
        self.known_errors.add(kind)
        return composition_problems(list(overrides), self.added, self.primary) or [short(error)]

    def launch(self, jobs: Jobs) -> dict[Path, str]:
        """Start runs. Returns the reason for each run that did not complete, judged by the record in its folder.

        Runs that take their size from the selections of other runs start after those.
        """
        waiting = {folder: lines for folder, lines in jobs.items() if any(o.startswith("method.like=") for o in lines)}
        first = {folder: lines for folder, lines in jobs.items() if folder not in waiting}
        return self.launch_at_once(first, 0) | self.launch_at_once(waiting, len(first))

    def launch_at_once(self, jobs: Jobs, number: int) -> dict[Path, str]:
        """Give runs to the launcher; the first gets job number ``number``."""
        from diffora.loop.process import is_main
        from diffora.run.record import missing_files, read_record
        from diffora.run.workers import ended_runs_shown, waiting_for_all

        batch = []
        for folder, overrides in jobs.items():
            # Workers on other machines may have another current folder.
            place = folder.parent if self.local else folder.parent.absolute()
            batch.append([*overrides, f"hydra.sweep.dir={quoted(place)}", f"hydra.sweep.subdir={quoted(folder.name)}"])
        lost = "it did not end"
        lines = nullcontext() if self.kind == "BasicLauncher" else ended_runs_shown(jobs)
        try:
            with waiting_for_all(self.kind), lines:
                returned = list(self.runner.launch(batch, initial_job_idx=number)) if batch else []
        except Exception as error:  # a worker of the launcher died; the folders tell which runs completed
            returned, lost = [], str(explained(error) or f"{type(error).__name__}: {error}")
        if not is_main():  # the first process still writes the last run
            return {}
        failed = {}
        for folder, job in zip_longest(jobs, returned):
            record = read_record(folder) or {}
            ended = "selected" if self.compose(tuple(jobs[folder])).search_only else "completed"
            if record.get("status") == ended and not missing_files(folder, record):
                continue
            if job is not None and job.status == JobStatus.FAILED:
                failed[folder] = str(job._return_value)  # `return_value` would raise it
            elif job is not None and job.status == JobStatus.COMPLETED and not folder.is_dir():
                failed[folder] = "it ended, but not in this folder: all machines must see the folder of the sweep"
            else:
                failed[folder] = record.get("error") or lost
        return failed


def _say_kept(recipe: str, typed: Sequence[Override], lines: Iterable[str]) -> None:
    """Say which numbers a table sets itself, where a recipe does not change them."""
    keys = {line.partition("=")[0] for line in lines} - {o.key_or_group for o in typed}
    if kept := sorted(key for key in keys if key.startswith(("finetune.", "task.recipe."))):
        print(f"{recipe} does not change what the table sets: {', '.join(kept)}")


def _apart(overrides: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the setting, the seed)"""
    seed = tuple(line for line in overrides if line.startswith("seed="))
    return tuple(line for line in overrides if line not in seed), seed
