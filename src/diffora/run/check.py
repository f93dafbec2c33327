"""Finds every mistake in a configuration before anything is loaded or written."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from diffora.backbones.load import model_problems
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.loop import own
from diffora.methods.base import Method
from diffora.methods.diffora import DiffoRA
from diffora.methods.random import Random
from diffora.run.conflicts import conflicts
from diffora.scoring.selectors import find_selector
from diffora.scoring.warm_start import weights_file
from diffora.settings.identity import plain
from diffora.settings.read import Reading, known_part, read_sections, section_of
from diffora.settings.sections import Settings
from diffora.tasks.base import Task, read_task
from diffora.training import optimisers
from diffora.trust import class_at


def check(cfg: DictConfig) -> tuple[Settings, Task]:
    """Read a composed configuration.

    Returns:
        (the typed settings, with the method; the task)

    Raises:
        UserError: the configuration has mistakes; it lists all of them.
    """
    reading = Reading.of(cfg)
    if problem := reading.recipe_for_other_tasks():
        raise UserError(problem)
    sections = read_sections(reading)
    method, task = _method(reading), _task(reading)
    found = reading.found
    if "model" in sections:
        found |= {text: text for text in model_problems(sections["model"], sections.get("dry_run", False))}
    if task is not None and sections.get("predict") and not task.test_splits:
        found["predict"] = f"predict=true: task={task.name} has no split to predict"
    if "finetune" in sections:
        recipe = None if task is None else task.cfg.recipe.warmup_steps
        found |= {text: text for text in optimisers.problems(sections["finetune"], recipe)}
    found |= {text: text for text in own.problems(sections.get("trainer"), sections.get("logger"))}
    if method is not None:
        found |= {text: text for text in [*_selector_problems(method), *_selection_problems(method)]}
    if found:
        raise UserError(list(reading.own_mistakes().values()))
    assert method is not None and task is not None
    settings = Settings(**sections, method=method, task=task.cfg, composed=plain(cfg))
    if problems := list(conflicts(settings)):
        raise UserError(problems)
    return settings, task


def section_problems(cfg: DictConfig, names: Sequence[str]) -> list[str]:
    """The mistakes in some sections of an earlier run's configuration. Keys that no longer exist are ignored."""
    reading = Reading.of(cfg)
    if problem := reading.recipe_for_other_tasks():
        return [problem]
    for field in dataclasses.fields(Settings):
        section, value = section_of(field.type), reading.values.get(field.name)
        if section is not None and isinstance(value, dict):
            reading.values[field.name] = known_part(section, value)
    read_sections(reading)
    if "task" in names:
        _task(reading, ignore_unknown=True)
    return [text for key, text in reading.own_mistakes().items() if key.partition(".")[0] in names]


def _method(reading: Reading) -> Method | None:
    """The method; its mistakes are added to ``reading.found``."""
    if reading.found.keys() & {"method", "method._target_", "method.name"}:
        return None
    try:
        kind = class_at(reading.values["method"]["_target_"], Method, "method._target_")
    except UserError as error:
        reading.found |= {text: text for text in error.problems}
        return None
    method: Method | None = kind.read(reading.values, reading.found)
    return method


def _task(reading: Reading, ignore_unknown: bool = False) -> Task | None:
    """The task; its mistakes are added to ``reading.found``."""
    if reading.found.keys() & {"task", "task._target_", "task.name"}:
        return None
    try:
        return read_task(reading.values["task"], reading.found, ignore_unknown)
    except UserError as error:
        reading.found |= {text: text for text in error.problems}
        return None


def _selector_problems(method: Method) -> list[str]:
    """The mistakes in a user's own selector. Its module is imported here."""
    try:
        if method.scoring is not None:
            find_selector(method.scoring.selector)
    except UserError as error:
        return error.problems
    return []


def _selection_problems(method: Method) -> list[str]:
    """The mistakes in the selection file that a method names."""
    if isinstance(method, DiffoRA) and isinstance(method.selection, str):
        file = Path(method.selection).expanduser()
        tensors = weights_file(file)
        if problems := _file_problems("method.selection", file):
            return problems
        if method.warm_start and not tensors.is_file():
            return [f"method.warm_start=true needs {tensors}, which a search with method.warm_start=true leaves"]
    if isinstance(method, Random) and method.like is not None and (file := Path(method.like).expanduser()).exists():
        return _file_problems("method.like", file)  # in a sweep, another run makes it first
    return []


def _file_problems(key: str, file: Path) -> list[str]:
    """The mistakes in a selection file."""
    try:
        Selection.load(file)
    except UserError as error:
        return [f"{key}: {problem}" for problem in error.problems]
    return []
