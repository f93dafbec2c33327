"""Values that no setting expects, and the outcomes that are allowed, for `test_config` and longer campaigns."""

import json
import random
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffora.errors import UserError
from diffora.run.check import check
from diffora.settings import identity

NASTY: list[Any] = [
    float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, -1, 0, 1, 0.5, 2.0, 10**10, 10**20, -(10**20),
    10**400, "", " ", "foo", "1e-3", "null", "a\nb", "ρ = 0.2 \N{PILE OF POO}", "\udc80", "nul\0", "x" * 100_000, "~",
    "~nobody-of-that-name/x", "/" + "y" * 300, "/", "..", [], [1], [[]], [None], ["a", "a"], {}, {"a": 1}, {1: 2},
    {"a": {"b": float("nan")}}, None, True, False, "${oc.env:HOME}", "${nothing}", "${seed}", "${rank}", "${task}",
    "${.x}", "${", "???", ["${nothing}"], ["???"], b"bytes",
]  # fmt: skip
"""Values that replace every setting. OmegaConf gives texts with ``${}`` and ``???`` their special meaning."""

BASES = (
    ("method=diffora", "task=paraphrase", "model=tiny", "trainer=cpu"),
    ("method=adalora", "task=squad_v2", "model=bert_base"),
    ("method=rm_lora", "task=digits", "model=tiny_vit", "debug=fast"),
    ("method=eva", "task=chat", "model=qwen", "logger=[csv,tensorboard,wandb]"),
    ("method=houlsby", "task=food101", "model=vit_base"),
    ("method=random", "task=mrpc", "recipe=rm_lora"),
    ("method=sora", "task=stsb", "model=hf", "model.path=some/model"),
)
"""Choices that together have nearly all settings."""


def keys_of(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, groups and their members, by its full name."""
    for name in node:
        yield f"{prefix}{name}"
        value = OmegaConf.to_container(node, resolve=False)[name]
        if isinstance(value, dict):
            yield from keys_of(node[name], f"{prefix}{name}.")


def put(cfg: DictConfig, key: str, value: Any) -> DictConfig | None:
    """A copy of a configuration with another value; None if OmegaConf itself refuses the value."""
    changed = cfg.copy()
    try:
        OmegaConf.update(changed, key, value, merge=False, force_add=True)
    except Exception:
        return None
    return changed


def without(cfg: DictConfig, key: str) -> DictConfig:
    """A copy of a configuration that lacks a key."""
    changed = cfg.copy()
    OmegaConf.set_struct(changed, False)
    parent, _, name = key.rpartition(".")
    del (OmegaConf.select(changed, parent) if parent else changed)[name]
    OmegaConf.set_struct(changed, True)
    return changed


def outcome(cfg: DictConfig) -> list[str] | None:
    """The messages of `check` for a configuration; None if it accepts it. Other exceptions are not caught.

    An accepted configuration must be writable as JSON, with finite numbers only.
    """
    try:
        check(cfg)
    except UserError as error:
        if not all(error.problems):
            raise AssertionError("an empty message") from error
        return error.problems
    json.dumps(identity.plain(cfg), allow_nan=False)
    identity.config_hash(cfg)
    return None


def cases(bases: list[DictConfig], seed: int, most: int) -> Iterator[tuple[str, Any, DictConfig]]:
    """At most ``most`` random configurations with one key changed, or removed (value ``DELETED``)."""
    everything = [(base, key, value) for base in bases for key in keys_of(base) for value in [*NASTY, DELETED]]
    for base, key, value in random.Random(seed).sample(everything, min(most, len(everything))):
        changed = without(base, key) if value is DELETED else put(base, key, value)
        if changed is not None:
            yield key, value, changed


DELETED = object()
