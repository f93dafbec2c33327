"""Finished and unfinished runs, gathered from their folders: tens of thousands in seconds."""

import gc
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffora.errors import UserError, called, reason
from diffora.files import read_json
from diffora.records import NAME, Record, SelectionSource, read_content
from diffora.report.statistics import finite

INSIDE = {"checkpoints", "logs", "adapter", "model", "wandb", "predictions"}  # folders of a run that hold no runs


@dataclass(frozen=True, eq=False)
class Run:
    """A record and where it lies.

    Attributes:
        folder: the run directory.
        record: ``run.json`` without the history.
        setting: the same text for all runs that differ in nothing but the seed, the place and the machine.
        config: the setting as ``{"finetune.lr": 0.001, …}``, without the task's recipe, whose values stand elsewhere.
        written: when the record was written, in seconds since 1970; of earlier versions, the time of the file.
    """

    folder: Path
    record: Record
    setting: str
    config: Mapping[str, Any]
    written: float

    @property
    def seed(self) -> int:
        return self.record.seed

    def value(self, part: str, key: str) -> float | None:
        """A number such as ``("params", "adapter")``; None if it is missing or not finite."""
        return finite(getattr(self.record, part).get(key))

    def metric(self, key: str) -> float | None:
        return self.value("metrics", key)

    @property
    def main_metric(self) -> str:
        """The task's main metric; in a record that does not say, the first metric of the validation rows."""
        if self.record.main_metric is not None:
            return self.record.main_metric
        names = [key.partition("/")[2] for key in self.record.metrics if key.startswith("validation/")]
        return next((name for name in names if name != "loss"), "accuracy")

    def read(self, name: str) -> Any:
        """The content of a JSON file in the run's folder; None if it is missing or broken."""
        try:
            return read_json(self.folder / name)
        except (OSError, UserError):
            return None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The epochs of the fine-tuning, read from the file each time: `record` is without them, to save memory."""
        content = self.read(NAME)  # the file may have changed
        found = content.get("history") if isinstance(content, dict) else None
        return [epoch for epoch in found if isinstance(epoch, dict)] if isinstance(found, list) else []


@dataclass(frozen=True)
class Gathered:
    """All runs below some folders, and the files that cannot be used, with the reason."""

    runs: list[Run]
    broken: list[tuple[Path, str]]


def gather(folders: Iterable[Path | str]) -> Gathered:
    """Read every ``run.json`` below the folders. Dry runs are left out.

    Raises:
        UserError: a folder does not exist, or there is no run.json below any of them.
    """
    roots = [Path(folder) for folder in folders]
    if missing := [root for root in roots if not root.is_dir()]:
        raise UserError([f"{root} is not a folder" for root in missing])
    runs: list[Run] = []
    broken: list[tuple[Path, str]] = []
    configs: Configs = {}
    files = sorted({file for root in roots for file in _files(os.path.realpath(root), broken)})
    collecting = gc.isenabled()
    gc.disable()  # millions of objects are made and none is garbage, so collecting would only take time
    for file in files:
        path = Path(file)
        try:
            found = _read(path, configs)
        except (OSError, UserError) as error:
            broken.append((path, str(error).removeprefix(f"{path} ")))
            continue
        if found is not None:
            runs.append(found)
    if collecting:
        gc.enable()
    if not files:
        places = ", ".join(map(str, roots))
        raise UserError(f"no {NAME} below {places}: give the folder of a run or sweep, as {called('train')} names it")
    return Gathered(with_sources(runs), broken)


def _files(root: str, broken: list[tuple[Path, str]]) -> Iterator[str]:
    """Every ``run.json`` below a folder, also behind links. Folders that cannot be read are added to ``broken``."""
    seen: set[str] = set()  # a link may lead back

    def unreadable(error: OSError) -> None:
        broken.append((Path(error.filename), reason(error)))

    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        if NAME in files:
            subfolders[:] = [name for name in subfolders if name not in INSIDE]
            yield os.path.join(os.path.realpath(folder), NAME)
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for name in links:
            place = os.path.realpath(os.path.join(folder, name))
            if place in seen or f"{root}{os.sep}".startswith(os.path.join(place, "")):
                subfolders.remove(name)
            seen.add(place)


Configs = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Settings and their flat form by setting_id: runs of one setting share them in memory."""


def _read(file: Path, configs: Configs) -> Run | None:
    """The run, or None for a dry run.

    Raises:
        UserError: the file is not the record of a run.
    """
    content = read_content(file)
    if isinstance(content, dict):
        content.pop("history", None)  # the largest part; read again for the few runs whose curves are drawn
    record = Record.of(content)
    if record.status == "dry_run":
        return None
    settings, config = configs.setdefault(record.setting_id, (record.settings, flat(record.settings)))
    if settings == record.settings:
        record = replace(record, settings=settings)
    else:  # an edited record
        config = flat(record.settings)
    written = finite(record.written)
    return Run(file.parent, record, record.setting_id, config, os.stat(file).st_mtime if written is None else written)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as ``{"finetune.lr": 0.001, …}``, without ``task.recipe``."""
    return dict(_leaves(settings, ""))


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            if key != "task.recipe":
                yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def with_sources(runs: Sequence[Run]) -> list[Run]:
    """The runs, with what their settings say about selection files: one for each seed, or one for several seeds.

    A record says which seed's search made the file. Runs that differ in nothing but the seed show whether that was the
    rule: if each seed has the selection of its own search, they are one setting, whatever each search selected. If
    several seeds have the same selection, or one that another seed's search made, what it selects belongs to the
    setting. A file whose path was made from the seed always counts as each seed's own.
    """
    told = list(runs)
    configs: dict[tuple[int, str, str], dict[str, Any]] = {}  # runs with the same text share it in memory

    def named(run: Run, key: str, text: str) -> Run:
        """The run with another text for a value of its configuration."""
        config = configs.setdefault((id(run.config), key, text), {**run.config, key: text})
        return replace(run, config=config)

    groups: dict[tuple[str, tuple[str | None, ...]], list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        r = run.record
        for key, source in r.sources.items():
            if key in r.follows_seed:
                told[i] = named(told[i], key, f"each seed's {source.made}")
            else:
                place = (r.experiment, r.scale, r.row, r.column, r.task, r.model)
                groups[key, (r.setting_id, *place)].append(i)
    for (key, _), members in groups.items():
        users: dict[tuple[int | None, str], set[int]] = defaultdict(set)
        for i in members:
            users[_identity(runs[i].record.sources[key])].add(runs[i].seed)
        own = {identity for identity, seeds in users.items() if seeds == {identity[0]}}
        if len(own) == 1 < len(users):  # only by chance does one of several given selections have this seed
            own = set()
        for i in members:
            source = runs[i].record.sources[key]
            if _identity(source) in own:
                told[i] = named(told[i], key, f"each seed's {source.made}")
            else:
                given = named(told[i], key, f"{source.selects} from {source.made}")
                told[i] = replace(given, setting=f"{given.setting} {source.selects}")
    return told


def _identity(source: SelectionSource) -> tuple[int | None, str]:
    return source.seed, source.selects


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which settings differ, shortest first. Of keys whose values always agree, only the first is named."""
    keys = sorted({key for config in configs for key in config}, key=lambda key: (key.count("."), len(key), key))
    seen: set[tuple[str, ...]] = set()
    found = []
    for key in keys:
        values = tuple(json.dumps(config.get(key), sort_keys=True, default=str) for config in configs)
        if len(set(values)) > 1 and values not in seen:
            seen.add(values)
            found.append(key)
    return found
