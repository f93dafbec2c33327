"""The identity of a configuration: its plain form, its hash, and the differences between two configurations."""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffora.errors import called
from diffora.files import json_digest
from diffora.settings.checks import show

NOT_IN_HASH = ("resume", "search_only", "dry_run", "scale", "cell", "debug", "logger")
"""Sections that cannot change a result."""
TRAINER_NOT_IN_HASH = ("num_proc", "num_workers", "cache_prefix_limit")
"""Keys of ``trainer`` that cannot change a result."""


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def deciding(composed: Mapping[str, Any]) -> dict[str, Any]:
    """What can change a result, of a composed configuration in plain containers."""
    found = {key: value for key, value in composed.items() if key not in NOT_IN_HASH}
    if isinstance(trainer := found.get("trainer"), dict):
        found["trainer"] = {key: value for key, value in trainer.items() if key not in TRAINER_NOT_IN_HASH}
    return found


def same_form(value: Any) -> Any:
    """Plain containers in which equal settings have one form: 1 for 1.0, and no key for null."""
    if isinstance(value, dict):
        return {key: same_form(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [same_form(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def config_hash(cfg: DictConfig) -> str:
    """Hash of everything in a composed configuration that can change a result."""
    return json_digest(same_form(deciding(plain(cfg))))[:16]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Where two plain configurations differ, as ``key: old -> new``, without what `config_hash` leaves out."""
    return _differences(deciding(old), deciding(new))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {show(a)} -> {show(b)}")
    return found


def short_name(path: str | None) -> str:
    """A name for the model at ``model.path`` that can be a part of a folder's name: the last part of the path."""
    last = re.split(r"[/\\]", str(path or "").rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "hf"


OmegaConf.register_new_resolver("short_name", short_name, replace=True)  # for conf/model/hf.yaml
OmegaConf.register_new_resolver("called", called, replace=True)  # for the help in conf/hydra/default.yaml
