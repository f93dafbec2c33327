"""The setting of a run: everything that decides its result, except the seed, the place and the machine.

The report puts runs with the same ``setting_id`` into one row and takes mean and spread over their seeds.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffora.adapters.fetch import adapter_digest
from diffora.errors import UserError
from diffora.files import read_json
from diffora.records import SelectionSource, short_digest
from diffora.settings.identity import deciding, plain, same_form, short_name

NOT_A_SETTING = ("seed", "predict")
MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "deterministic", "gradient_checkpointing", "compile")
"""Keys of ``trainer`` that say where and how fast a run goes, not what comes out."""
FILES = ("selection", "like")
"""Keys of ``method`` that may name a selection file."""

Place = tuple[str, ...]
"""A key of the configuration, its parts: ``("method", "draw")``."""


def setting_facts(cfg: DictConfig, data_hash: str | None, backbone: str | None = None) -> dict[str, Any]:
    """The fields ``setting_id``, ``settings``, ``follows_seed`` and ``sources`` of a `Record`.

    Args:
        cfg: the composed configuration with its interpolations.
        data_hash: of the training and validation rows; it replaces ``task.path``.
        backbone: digest of the backbone's files. Folders of one name may hold different models.
    """
    settings = {key: value for key, value in deciding(plain(cfg)).items() if key not in NOT_A_SETTING}
    follows = {place: text for place, text in seed_followers(cfg).items() if place[0] in settings}
    for place, text in follows.items():
        _put(settings, place, text)
    if data_hash and "path" in settings["task"]:
        settings["task"]["data"] = data_hash[:8]
        del settings["task"]["path"]
    settings["model"]["path"] = _model_name(settings["model"]["path"], backbone)
    settings["trainer"] = {key: value for key, value in settings["trainer"].items() if key not in MACHINE}
    sources = {}
    for name in FILES:
        file = cfg.method.get(name)
        if isinstance(file, str) and (source := selection_source(Path(file).expanduser())) is not None:
            sources[f"method.{name}"] = asdict(source)
            settings["method"][name] = source.made
    if isinstance(adapter := settings["method"].get("adapter"), str) and ("method", "adapter") not in follows:
        with suppress(UserError):  # which the method reports
            settings["method"]["adapter"] = adapter_digest(adapter)[:8]
    return {
        "setting_id": short_digest(same_form(settings)),
        "settings": settings,
        "follows_seed": [".".join(place) for place in follows],
        "sources": sources,
    }


def _model_name(path: str, digest: str | None) -> str:
    """The last part of a path; of a folder, with the first digits of the digest of its files."""
    name = short_name(path)
    return f"{name} ({digest[:8]})" if digest and Path(path).expanduser().is_dir() else name


def seed_followers(cfg: DictConfig) -> dict[Place, str]:
    """The keys whose value was made from the seed, and how the value is written: ``{("method", "draw"): "${seed}"}``.

    A value follows the seed if another seed gives another value.
    """
    other = deepcopy(cfg)
    other.seed = cfg.seed + 1
    written = OmegaConf.to_container(cfg, resolve=False)
    return {place: _written(written, place) for place in _differing(plain(cfg), other) if place != ("seed",)}


def _differing(values: Mapping[Any, Any], other: DictConfig) -> Iterator[Place]:
    """The keys whose values differ between the two configurations."""
    for key, value in values.items():
        found: Any = None
        with suppress(OmegaConfBaseException):  # there may be no value for the other seed
            found = other[key]
            if isinstance(value, dict) and isinstance(found, DictConfig):
                yield from ((str(key), *rest) for rest in _differing(value, found))
                continue
            found = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        if value != found:
            yield (str(key),)


def _written(node: Any, place: Place) -> str:
    """A value before it is resolved: its own interpolation, or that of its group."""
    for key in place:
        if not isinstance(node, dict):
            break
        node = node.get(key)
    return str(node)


def _put(node: dict[str, Any], place: Place, value: str) -> None:
    *groups, last = place
    for key in groups:
        node = node[key]
    node[last] = value


def selection_source(file: Path) -> SelectionSource | None:
    """What a selection file says about itself; None if it cannot be read, which the method reports."""
    try:
        content = read_json(file)
    except (OSError, UserError):
        return None
    if not isinstance(content, dict) or "selected" not in content:
        return None
    config, seed = content.get("config"), content.get("seed")
    config = config if isinstance(config, dict) else {}
    selector, rho = content.get("selector"), content.get("rho")
    where = [config.get("search"), config.get("task"), short_name(str(config.get("model"))), config.get("data_hash")]
    making = short_digest([content.get("method"), selector, rho, content.get("k"), *where])
    return SelectionSource(
        seed if type(seed) is int else None,
        f"{selector} (rho {rho}, {making[:6]})",
        short_digest([content["selected"], content.get("rank")])[:6],
    )
