"""The identity of a configuration: its plain form, its hash, and the differences between two configurations."""

import hashlib
import json
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffora.errors import called
from diffora.settings.checks import show

NOT_IN_HASH = ("resume", "search_only", "dry_run", "scale", "cell", "debug", "logger")
"""Sections that cannot change a result."""


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def config_hash(cfg: DictConfig) -> str:
    """Hash of everything in a composed configuration that can change a result."""
    content = {key: value for key, value in plain(cfg).items() if key not in NOT_IN_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two plain configurations differ, as ``key: old -> new``, without what `config_hash` leaves out."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        if not prefix and key in NOT_IN_HASH:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {show(a)} -> {show(b)}")
    return found


def short_name(path: str | None) -> str:
    """A name for the model at ``model.path`` that can be a part of a folder's name: the last part of the path."""
    last = re.split(r"[/\\]", str(path or "").rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "hf"


OmegaConf.register_new_resolver("short_name", short_name, replace=True)  # for conf/model/hf.yaml
OmegaConf.register_new_resolver("called", called, replace=True)  # for the help in conf/hydra/default.yaml
