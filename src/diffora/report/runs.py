"""Finished and unfinished runs, gathered from their folders: tens of thousands in seconds."""

import functools
import gc
import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffora.errors import UserError
from diffora.files import MOST_DEPTH, MOST_YAML, parse_yaml, read_json, read_text
from diffora.report.statistics import finite
from diffora.run.record import NAME, record_in
from diffora.settings.identity import NOT_IN_HASH, short_name

INSIDE = {"checkpoints", "logs", "adapter", "model", "wandb", "predictions"}  # of a run's folder, where no run is
NO_SETTING = (*NOT_IN_HASH, "seed", "predict")
TEXTS = ("experiment", "row", "column", "scale", "error", "main_metric", "data_hash")  # of a record, or null

# Lines of a block of config.yaml, each with the deeper lines that continue a long value.
PATH = re.compile(r"\n  path: (.*(?:\n   +.*)*)")
MACHINE = re.compile(r"\n  (?:accelerator|devices|strategy|deterministic|gradient_checkpointing|num_workers): .*")
LIKE = re.compile(r"\n  like: (?!null\n|null$)(.*(?:\n   +.*)*)")
FOLLOWER = re.compile(r"\n( +)(draw|projection_prng_key|selection): (?!null\n|null$|\[)(.*(?:\n\1 +.*)*)")


@dataclass(frozen=True, eq=False)
class Run:
    """A record and where it lies.

    Attributes:
        folder: the run directory.
        record: ``run.json`` without the history.
        setting: the configuration without seed, place, machine and what changes no result: one text for all seeds of a
            setting.
        written: when the record was written, seconds since the epoch.
    """

    folder: Path
    record: dict[str, Any]
    setting: str
    written: float

    def __getitem__(self, key: str) -> Any:
        return self.record.get(key)

    @property
    def seed(self) -> int:
        return int(self.record["seed"])

    def value(self, part: str, key: str) -> float | None:
        """A number such as ``("params", "adapter")``; None where it is not there."""
        return finite(self.record[part].get(key))

    def metric(self, key: str) -> float | None:
        return self.value("metrics", key)

    @property
    def main_metric(self) -> str:
        """The task's main metric; old records do not say, and have it first."""
        if isinstance(name := self["main_metric"], str):
            return name
        names = [key.partition("/")[2] for key in self.record["metrics"] if key.startswith("validation/")]
        return next((name for name in names if name != "loss"), "accuracy")

    @property
    def config(self) -> dict[str, Any]:
        """The setting as ``{"finetune.lr": 0.001, …}``, without the task's recipe: what it says is used elsewhere."""
        return config_of(self.setting)

    def read(self, name: str) -> Any:
        """A JSON file of the run's folder; None where it is missing or broken."""
        try:
            return read_json(self.folder / name)
        except (OSError, UserError):
            return None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The epochs of the fine-tuning, read again from the file."""
        record = self.read(NAME)  # which may have changed since
        found = record.get("history") if isinstance(record, dict) else None
        return [epoch for epoch in found if isinstance(epoch, dict)] if isinstance(found, list) else []


@dataclass(frozen=True)
class Gathered:
    """All runs below some folders, and the files that are none, with the reason."""

    runs: list[Run]
    broken: list[tuple[Path, str]]


def gather(folders: Iterable[Path | str]) -> Gathered:
    """Read every ``run.json`` below the folders. Dry runs are left out.

    Raises:
        UserError: a folder that is not there, or no run.json in any of them.
    """
    roots = [Path(folder) for folder in folders]
    if missing := [root for root in roots if not root.is_dir()]:
        raise UserError([f"{root} is not a folder" for root in missing])
    runs, broken = [], []
    files = sorted({file for root in roots for file in _records(os.path.realpath(root))})
    collecting = gc.isenabled()
    gc.disable()  # it would pass over a million objects again and again, all of which stay
    for file in files:
        path = Path(file)
        try:
            found = _read(path)
        except (OSError, UserError) as error:
            broken.append((path, str(error).removeprefix(f"{path} ")))
            continue
        if found is not None:
            runs.append(found)
    if collecting:
        gc.enable()
    if not files:
        places = ", ".join(map(str, roots))
        raise UserError(f"no {NAME} below {places}: give the folder of a run or sweep, as python train.py names it")
    return Gathered(_followers_told(runs), broken)


def _records(root: str) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        if NAME in files:
            subfolders[:] = [name for name in subfolders if name not in INSIDE]
            yield os.path.join(folder, NAME)


def _read(file: Path) -> Run | None:
    """The run, or None for a dry run.

    Raises:
        UserError: not a record, or a config.yaml beside it that cannot be read.
    """
    written = os.stat(file).st_mtime
    record = record_in(file)
    if not isinstance(record, dict):
        raise UserError("not a record: no JSON object")
    if wrong := [key for key in ("method", "task", "model", "status") if not isinstance(record.get(key), str)]:
        raise UserError(f"not a record: {', '.join(wrong)} must be text")
    if wrong := [key for key in TEXTS if not isinstance(record.get(key), str | None)]:
        raise UserError(f"not a record: {', '.join(wrong)} must be text or null")
    if not isinstance(record.get("seed"), int):
        raise UserError("not a record: seed must be a whole number")
    if record["status"] == "dry_run":
        return None
    record.pop("history", None)  # most of the file; read again for the few that are drawn
    for part in ("metrics", "params", "time", "memory", "selection"):
        if not isinstance(record.get(part), dict):
            record[part] = {}
    return Run(file.parent, record, _setting(file.parent, record), written)


def _setting(folder: Path, record: Mapping[str, Any]) -> str:
    """What a run's seeds have in common, as text, for YAML takes a hundred times as long."""
    file = folder / "config.yaml"
    try:
        text = read_text(file, MOST_YAML)
    except FileNotFoundError:
        return sys.intern(f"method:\n  name: {json.dumps(record['method'])}\nmodel: {json.dumps(record['model'])}\n")
    if _doubtful(text):
        parse_yaml(text, file)
    blocks = []
    for block in _blocks(text):
        name = block.partition(":")[0]
        if name not in NO_SETTING:
            own = {"task": record.get("data_hash"), "method": record["seed"]}.get(name)
            blocks.append(_placeless(block, own))
    return sys.intern("\n".join(blocks))


def _doubtful(text: str) -> bool:
    """Whether YAML may have aliases, tags or deep nesting, so that it is worth the time to parse all of it."""
    marked = ("&" in text or "!" in text) and re.search(r"(?:^|[\s,:\[{?-])[&!]\S", text)
    deep = text.count("[") + text.count("{") > MOST_DEPTH or "\n" + " " * 80 in text or "- " * 9 in text
    return bool(marked) or deep


@functools.lru_cache(maxsize=4096)
def _placeless(block: str, own: str | int | None) -> str:
    """A block that is the same on every machine.

    Data are known by their hash, a model by the last part of its path, and the selections that ``method.like`` names,
    one for each seed, by their run's folder without seed, number and time.

    Args:
        own: the hash of the run's data for ``task:``, its seed for ``method:``.
    """
    if block.startswith("task:"):
        return PATH.sub(f"\n  data: {json.dumps(str(own)[:8])}", block) if own else block
    if block.startswith("method:"):
        return LIKE.sub(lambda line: f"\n  like: {json.dumps(_pattern(line[1], own))}", block)
    if block.startswith("model:"):
        return PATH.sub(lambda line: f"\n  path: {short_name(line[1])}", block)
    return MACHINE.sub("", block) if block.startswith("trainer:") else block


def _pattern(path: str, seed: str | int | None) -> str:
    """The folder of a selection file, as runs and sweeps name it, without what differs between seeds."""
    folder = re.split(r"[/\\]", path.strip("'\""))[-2:][0]
    return re.sub(rf"^\d+-|(?<=seed){seed}(?!\d)|-\d{{8}}-\d{{6}}$", "", folder)


def _followers_told(runs: Sequence[Run]) -> list[Run]:
    """The runs, with ``seed`` in their settings for a draw or a selection that follows the seed.

    A run's own files do not say whether ``draw: 0`` was given or is that of seed 0. The runs that differ in nothing
    else do: what several seeds have was given, and so was the only one that is a seed's own.
    """
    told = list(runs)
    groups: dict[tuple[str, ...], list[tuple[int, re.Match[str], int | None, str]]] = defaultdict(list)
    for i, run in enumerate(runs):
        if line := FOLLOWER.search(run.setting):
            seed, value, made = _origin(run, line[2], line[3])
            alike = (run.setting[: line.start()], run.setting[line.end() :], made)
            place = tuple(str(run[key]) for key in ("experiment", "scale", "row", "column", "task", "model"))
            groups[alike + place].append((i, line, seed, value))
    for (before, after, made, *_), members in groups.items():
        seeds = defaultdict(set)
        for i, _, seed, value in members:
            seeds[seed, value].add(runs[i].seed)
        following = {of for of, found in seeds.items() if found == {of[0]}}
        if len(following) == 1 < len(seeds):
            following = set()
        for i, line, seed, value in members:
            text = f"seed {made}".rstrip() if (seed, value) in following else value
            setting = f"{before}\n{line[1]}{line[2]}: {json.dumps(text) if made else text}{after}"
            told[i] = replace(runs[i], setting=sys.intern(setting))
    return told


def _origin(run: Run, key: str, value: str) -> tuple[int | None, str, str]:
    """Of a draw or a selection file: the seed that it is of, what tells it from others, and a selection's making."""
    if key != "selection":
        return (int(value) if value.isdecimal() else None), value, ""
    found = run.read("selection.json")
    found = found if isinstance(found, dict) else run["selection"]
    if "selected" not in found:
        return None, value, ""
    config = found.get("config")
    making = [found.get("selector"), found.get("rho"), config.get("search") if isinstance(config, dict) else None]
    seed = found.get("seed")
    return seed if isinstance(seed, int) else None, _digest([found["selected"], found.get("rank")]), _digest(making)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]


def _blocks(text: str) -> list[str]:
    """A YAML mapping cut at its top-level keys."""
    return re.split(r"\n(?=[^\s-])", text.rstrip("\n"))


@functools.lru_cache(maxsize=4096)
def config_of(setting: str) -> dict[str, Any]:
    """The flat configuration behind a setting's text."""
    flat: dict[str, Any] = {}
    for block in _blocks(setting):
        flat |= _flat_block(block)
    return flat


@functools.lru_cache(maxsize=4096)
def _flat_block(block: str) -> dict[str, Any]:
    """Most settings share most of their blocks, so each is parsed once."""
    try:
        content = parse_yaml(block, Path("config.yaml"))
    except UserError:
        return {}
    return dict(_leaves(content, "")) if isinstance(content, dict) else {}


def _leaves(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if key == "task.recipe":
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which settings differ, shortest first, each group of keys that always agree once."""
    keys = sorted({key for config in configs for key in config}, key=lambda key: (key.count("."), len(key), key))
    seen: set[tuple[str, ...]] = set()
    found = []
    for key in keys:
        values = tuple(json.dumps(config.get(key), sort_keys=True, default=str) for config in configs)
        if len(set(values)) > 1 and values not in seen:
            seen.add(values)
            found.append(key)
    return found
