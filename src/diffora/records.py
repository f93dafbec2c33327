"""``run.json``: the facts that a run writes. Reports, sweeps and resumed runs read them.

A run fills a dictionary step by step and writes it with `write_record`; `diffora.run.record` collects its facts.
A reader calls `read_content` and then `Record.of`, which checks every field.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffora.errors import UserError
from diffora.files import MOST_JSON, json_digest, parse_json, read_text, write_text

NAME = "run.json"

ENDED = ("completed", "selected")
"""The status of runs that did all they were asked to do; ``selected``: with ``search_only=true``."""


@dataclass(frozen=True, slots=True)
class MetricFacts:
    """What the numbers of a metric mean.

    Attributes:
        unit: ``fraction`` (of 1; a table may show it in per cent), ``percent``, ``loss``, ``perplexity``, ``epochs`` or
            ``rank``; empty for a number without a unit.
        maximise: whether a higher value is better.
    """

    unit: str
    maximise: bool


@dataclass(frozen=True, slots=True)
class SelectionSource:
    """A selection file that a run was given, ``method.selection`` or ``method.like``.

    Attributes:
        seed: of the run that made the selection; None where the file does not say.
        made: how it was made, as ``search (rho 0.5, 3fa2c1)`` with a digest of the settings: the same for all seeds.
        selects: digest of what it selects.
    """

    seed: int | None
    made: str
    selects: str


@dataclass(frozen=True, slots=True)
class Record:
    """The content of a ``run.json``.

    Attributes:
        method: name of the method; also ``task`` and ``model``.
        seed: of the run.
        status: ``running``, ``completed``, ``failed``, ``interrupted`` or ``dry_run``; ``selected`` if the run had
            ``search_only=true`` and is complete.
        setting_id: digest of `settings`: runs that differ in seed, place or machine only have the same one.
        settings: everything that decides the result, except the seed. Nested, with values instead of interpolations.
            Data are given by their hash, the model by its name, and a selection file by how it was made. A value that
            was made from the seed keeps its interpolation, such as ``${seed}``.
        follows_seed: the keys of the values that were made from the seed, such as ``method.draw``.
        sources: the selection files that the run was given, by the key of the setting.
        config_hash: hash of the whole configuration; a run continues only with the same one.
        experiment: the table that the run belongs to, with ``row``, ``column`` and ``scale``; None for a single run.
        error: why a run failed.
        main_metric: the metric that chooses the best epoch, without the name of a split.
        metric_facts: unit and direction by name of metric, without the name of a split.
        metrics: results by ``<split>/<metric>``, and others such as ``update/rank``. None: not a finite number.
        params: numbers of parameters.
        time: seconds of each stage.
        memory: peaks in MB.
        selection: which modules were selected; empty where the method selects none.
        step_time: with ``method.time_budget``: the lowest layer with adapters, and shares of the step time of LoRA on
            all modules, counted or measured (`diffora.run.steptime`).
        precision: with ``trainer.precision=auto``: what was chosen on the machine of the run, and why.
        prefix: with ``trainer.cache_prefix=true``, for each stage: how many layers were read from the cache (``layers``
            of ``of``), the size of its files in bytes, and the seconds until they were there.
        history: the metrics of each epoch.
        data_hash: hash of the training and validation rows.
        data: how many rows of each split were read, used and dropped, and why.
        backbone: digests of the backbone's files.
        inputs: digests of other files that the run was given, by the key of their setting.
        git_commit: commit of the program, with ``+`` where it was changed since.
        versions: of Python and packages.
        classes: names of the task's classes.
        files: the files of the result, relative to the run's folder.
        digests: sha256 of these files.
        written: when the record was written, in seconds since 1970; None in a record of an earlier version.
    """

    method: str
    task: str
    model: str
    seed: int
    status: str
    setting_id: str
    settings: dict[str, Any]
    config_hash: str
    follows_seed: list[str] = field(default_factory=list)
    sources: dict[str, SelectionSource] = field(default_factory=dict)
    experiment: str | None = None
    row: str | None = None
    column: str | None = None
    scale: str | None = None
    error: str | None = None
    main_metric: str | None = None
    metric_facts: dict[str, MetricFacts] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    time: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    step_time: dict[str, Any] = field(default_factory=dict)
    precision: str | None = None
    prefix: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    data_hash: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    digests: dict[str, Any] = field(default_factory=dict)
    written: float | None = None

    @classmethod
    def of(cls, content: Any) -> "Record":
        """The record in the content of a ``run.json``.

        Raises:
            UserError: the content is not a record; one message names every field that is missing or wrong.
        """
        completed = isinstance(content, dict) and content.get("status") == "completed"
        check(content, FACTS + (MEANING if completed else ()))
        values = {key: content[key] for key in FIELDS if content.get(key) is not None}
        for key, kind in (("metric_facts", MetricFacts), ("sources", SelectionSource)):
            if key in values:
                values[key] = {name: kind(**facts) for name, facts in values[key].items()}
        return cls(**values)


def facts_of(metric: str, known: Mapping[str, MetricFacts]) -> MetricFacts:
    """Unit and direction of a metric by its key, with or without a split: ``validation/f1``, ``update/rank``.

    Args:
        metric: the key.
        known: a record's `metric_facts`.
    """
    return known.get(metric) or known.get(metric.rpartition("/")[2], UNKNOWN)


UNKNOWN = MetricFacts("", True)
FIELDS = tuple(f.name for f in fields(Record))
FACTS = ("method", "task", "model", "seed", "status", "setting_id", "settings", "config_hash")
"""Fields that a report needs of every run."""
MEANING = ("main_metric", "metric_facts")
"""Fields without which a report cannot tell a good result from a bad one."""
COMPLETED = ("method", "task", "model", "config_hash")
RESULTS = ("metrics", "params", "time", "memory")


def check(content: Any, needed: Sequence[str] = ("status",)) -> None:
    """Check that some content is the record of a run: needed fields are there, and all fields are of the right kind.

    Args:
        content: of a ``run.json``.
        needed: the fields that must be there; a completed run must also have its results.

    Raises:
        UserError: one message names every field that is missing or wrong.
    """
    if not isinstance(content, dict):
        raise UserError("not the record of a run: it is not a JSON object")
    wanted = [*needed, *(COMPLETED + RESULTS if content.get("status") == "completed" else ())]
    missing = [key for key in dict.fromkeys(wanted) if key not in content]
    wrong = [f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
    if "setting_id" in missing and "config_hash" in content:
        wrong[0] += " (a run of an earlier version does not have them; repeat the run)"
    for words, (keys, fits) in KINDS.items():
        if odd := [key for key in keys if key in content and not fits(content[key])]:
            wrong.append(f"{', '.join(odd)} must be {words}")
    if wrong:
        raise UserError(f"not the record of a run: {'; '.join(wrong)}")


def _is_int(value: Any) -> bool:
    return type(value) is int


def _group_of(kind: type, **wanted: Any) -> Callable[[Any], bool]:
    """Whether a value is an object whose members have exactly the fields of a dataclass, each of its type."""
    names = {f.name for f in fields(kind)}

    def fits(member: Any) -> bool:
        if not isinstance(member, dict) or member.keys() != names:
            return False
        return all(isinstance(member[name], types) for name, types in wanted.items())

    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


KINDS: dict[str, tuple[tuple[str, ...], Callable[[Any], bool]]] = {
    "text": (
        ("method", "task", "model", "status", "setting_id", "config_hash"),
        lambda value: isinstance(value, str),
    ),
    "text or null": (
        ("experiment", "row", "column", "scale", "error", "main_metric", "data_hash", "git_commit", "precision"),
        lambda value: isinstance(value, str | None),
    ),
    "a whole number": (("seed",), _is_int),
    "a number or null": (("written",), lambda value: value is None or type(value) in (int, float)),
    "an object": (("settings", *RESULTS), lambda value: isinstance(value, dict)),
    "an object or null": (
        ("selection", "step_time", "prefix", "data", "backbone", "inputs", "versions", "digests"),
        lambda value: isinstance(value, dict | None),
    ),
    "a list of text": (
        ("follows_seed", "classes", "files"),
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    ),
    "a list of objects": (
        ("history",),
        lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
    ),
    "an object of {unit: text, maximise: true or false}": (
        ("metric_facts",),
        _group_of(MetricFacts, unit=str, maximise=bool),
    ),
    "an object of {seed: whole number or null, made: text, selects: text}": (
        ("sources",),
        _group_of(SelectionSource, seed=int | None, made=str, selects=str),
    ),
}
"""What each field must be, in words, and how that is checked."""


# --- the file ---

DIGEST = re.compile(r',\n "sha256": "([0-9a-f]{64})"\n\}\n')
"""The end of ``run.json``: the sha256 of all the text before it."""


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``run.json`` atomically, its digest last. Numbers that JSON does not have (NaN, infinity) become null."""
    text = json.dumps(_finite({**content, "written": time.time()}), indent=1).removesuffix("\n}")
    write_text(folder / NAME, f'{text},\n "sha256": "{_sha256(text)}"\n}}\n')


def read_content(file: Path) -> Any:
    """The content of a ``run.json`` without its digest, unchecked except for the digest, where there is one.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or was changed after the run wrote it.
    """
    text = read_text(file, MOST_JSON)
    content = parse_json(text, file)
    if isinstance(content, dict) and "sha256" in content:
        end = DIGEST.search(text, len(text) - 100)
        if end is None or end[1] != _sha256(text[: end.start()]):
            raise UserError(
                f"{file} is not as the run left it: it is damaged, or was edited. If you changed it on purpose, remove "
                "its entry sha256"
            )
        del content["sha256"]
    return content


def short_digest(content: object) -> str:
    """A short digest of plain containers: 16 hexadecimal digits. The order of keys does not matter."""
    return json_digest(content)[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
