"""A finished run, loaded again: its settings, its weights, and whether the backbone is still the same."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from diffora import digests
from diffora.adapters.manifest import read_manifest
from diffora.api import load_adapter
from diffora.backbones.load import load_backbone
from diffora.core.lowrank import set_kernel
from diffora.errors import UserError, first_line
from diffora.files import read_yaml
from diffora.places import conf_dir
from diffora.run.arguments import has_key
from diffora.run.composition import composition_problems
from diffora.run.record import WEIGHTS, check_as_left, read_record, why_broken
from diffora.settings.quotes import quoted
from diffora.settings.read import model_of
from diffora.tasks.base import Task, get_task
from diffora.trust import class_at, settings

log = logging.getLogger(__name__)

SECTIONS = ("task", "model", "trainer")
"""The sections of a run's settings that matter after its training."""


# --- settings ---


def finished_run(folder: Path, values: dict[str, Any]) -> tuple[DictConfig, Path, dict[str, Any]]:
    """(sections ``task``, ``model`` and ``trainer``; the folder of the weights; the record) of a finished run.

    Args:
        folder: the run directory.
        values: settings of the command line, which replace the run's.

    Raises:
        UserError: it is not a finished run, its files changed since, or a setting does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if not (folder / "config.yaml").is_file() and (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is an adapter: give the run directory that it lies in")
    if broken := why_broken(folder):
        raise UserError(broken)
    record = read_record(folder)
    if (status := (record or {}).get("status")) != "completed":
        raise UserError(f"{folder} is not a finished run: {f'its status is {status}' if status else 'no run.json'}")
    assert record is not None
    cfg, weights = settings_of_run(folder)
    check_as_left(folder, record)
    cfg = override(cfg, [], values)
    file = None if "task._target_" in values else folder / "config.yaml"
    class_at(cfg.task.get("_target_"), Task, "task._target_", file)
    return cfg, weights, record


def settings_of_run(folder: Path) -> tuple[DictConfig, Path]:
    """(settings in a run's folder, the folder of its weights).

    Somebody else may have written the settings. So they allow no code from the checkpoint; only the command line can.

    Raises:
        UserError: it is not a run directory, or it has no weights.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"run={folder} is not a run directory: it has no config.yaml")
    weights = [folder / name for name in WEIGHTS if (folder / name).is_dir()]
    if not weights:
        raise UserError(f"run={folder} has no adapter/ or model/: the run is not finished, or it only selected")
    cfg = settings(read_yaml(file), file, SECTIONS)
    OmegaConf.update(cfg, "model.trust_remote_code", False)
    return cfg, weights[0]


def composed(choices: list[str], paths: Sequence[str]) -> DictConfig:
    """The default configuration with some choices, such as ``task=sst2``.

    Args:
        paths: folders with more choices than ``conf/``, as ``file://…``.

    Raises:
        UserError: every choice that does not exist.
    """
    from hydra import compose, initialize_config_dir

    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            added = [f"hydra.searchpath=[{','.join(map(quoted, paths))}]"] if paths else []
            return compose("config", [*added, *choices])
    except Exception as error:
        raise UserError(composition_problems(choices, paths) or [first_line(error)]) from error


def override(cfg: DictConfig, choices: list[str], values: dict[str, Any], paths: Sequence[str] = ()) -> DictConfig:
    """Settings with some sections replaced, and then some values.

    Args:
        paths: folders with more choices than ``conf/``, as ``file://…``.

    Raises:
        UserError: every key that its section does not have.
    """
    for choice in choices:
        name = choice.partition("=")[0]
        cfg[name] = composed([choice], paths)[name]
    problems = []
    for key, value in values.items():
        section = key.partition(".")[0]
        if not has_key(cfg, key):
            present = ", ".join(
                f"{section}.{name}" for name in cfg[section] if name not in ("_target_", "recipe", "config")
            )
            problems.append(
                f"{section}={cfg[section].name if 'name' in cfg[section] else ''} has no {key}; it has {present}"
            )
            continue
        OmegaConf.update(cfg, key, value)
    if problems:
        raise UserError(problems)
    return cfg


# --- weights ---


def load_trained(
    cfg: DictConfig, weights: Path, method: str | None = None, task: Task | None = None
) -> tuple[nn.Module, Any]:
    """A trained model in evaluation mode, and its tokenizer or image processor.

    Args:
        cfg: sections ``task`` and ``model``.
        weights: folder of an adapter for that model, or of a whole model (full fine-tuning).
        method: as in `load_adapter`.
        task: the task, if its rows are already loaded, so that it knows its classes.

    Raises:
        UserError: a model, processor or adapter that cannot be read, or that does not fit the others.
    """
    task = task or get_task(cfg.task)
    section = model_of(cfg.model)
    whole = (weights / "config.json").is_file()
    loaded = replace(section, path=str(weights)) if whole else section
    # Whole models of earlier versions have no tokenizer; the base model's is the same.
    complete = any((weights / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))
    processor = task.processor(loaded if complete else section)
    backbone = load_backbone(loaded, task.model_request(), processor, finetuned=whole)
    if not whole:
        load_adapter(backbone, weights, method)
        set_kernel(backbone.model, section.kernel)
    return backbone.model.eval(), processor


def check_backbone(cfg: DictConfig, weights: Path, own_backbone: bool) -> None:
    """Refuse a backbone that is not the one that the weights were trained on. If the user chose it, only warn.

    Args:
        cfg: section ``model``.
        weights: folder of an adapter, or of a whole model.
        own_backbone: whether the user chose the backbone.
    """
    whole = (weights / "config.json").is_file()  # a fully fine-tuned model is not put on a backbone
    record = read_record(weights.parent) or {}
    trained = None if whole else record.get("backbone") or manifest_of(weights).get("backbone")
    path = cfg.model.path
    if whole and not record.get("digests"):
        log.warning(f"{weights} may not be as its run left it: no run.json has its digests")
    if not trained:
        if not whole and not own_backbone:
            log.warning(f"{path} may not be the backbone that the run was trained on: no file says which that was")
        return
    for change in digests.changes({"backbone": trained}, {"backbone": digests.backbone(path)}):
        if not own_backbone:
            raise UserError(
                f"{change} in {path} since the run was trained; bring them back, or say that you want this backbone: "
                f"model.path={path}"
            )
        log.warning(f"{path} is not the backbone that the run was trained on: {change}")


def manifest_of(weights: Path) -> dict[str, Any]:
    """The manifest of an adapter; empty without one, and for a whole model."""
    try:
        return read_manifest(weights)
    except FileNotFoundError:
        return {}
