"""Checks of the composed configuration: every mistake at once, before torch or any weight is loaded."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Check = tuple[Callable[[Any], bool], str]


def _whole(least: int) -> Check:
    return lambda v: _is_int(v) and v >= least, f"a whole number of at least {least}"


def _number(test: Callable[[float], bool], words: str) -> Check:
    return lambda v: (_is_int(v) or isinstance(v, float)) and math.isfinite(v) and test(v), words


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _or_null(check: Check) -> Check:
    return lambda v: v is None or check[0](v), f"{check[1]}, or null"


def _one_of(*values: Any) -> Check:
    return lambda v: v in values, "one of " + ", ".join(map(str, values))


POSITIVE = _number(lambda v: v > 0, "a number above 0")
NOT_NEGATIVE = _number(lambda v: v >= 0, "a number of at least 0")
FRACTION = _number(lambda v: 0 < v < 1, "a number between 0 and 1")
FLAG: Check = (lambda v: isinstance(v, bool), "true or false")
TEXT: Check = (lambda v: isinstance(v, str) and bool(v), "text")
ANY: Check = (lambda v: True, "")

RULES: dict[str, Check] = {
    "seed": _whole(0),
    "resume": FLAG,
    "predict": FLAG,
    "dry_run": FLAG,
    "scale": _one_of("paper", "small"),
    "cell.experiment": _or_null(TEXT),
    "cell.row": _or_null(TEXT),
    "cell.column": _or_null(TEXT),
    "rank": ANY,  # rank, rho, finetune.dropout and method.* are the method's to check: diffora.methods.base
    "rho": ANY,
    "search.epochs": _whole(1),
    "search.batch_size": _whole(1),
    "search.lr": POSITIVE,
    "search.gamma_lr": POSITIVE,
    "search.update": _one_of("alternating", "simultaneous"),
    "search.order": _one_of(1, 2),
    "search.train_steps": _whole(1),
    "search.fraction": _number(lambda v: 0 < v <= 1, "a number in (0, 1]: the share of the training rows to search on"),
    "search.valid_fraction": FRACTION,
    "search.rank": _whole(1),
    "search.weight_decay": NOT_NEGATIVE,
    "search.clip": _or_null(POSITIVE),
    "search.accumulate": _whole(1),
    "finetune.epochs": _whole(1),
    "finetune.batch_size": _whole(1),
    "finetune.lr": POSITIVE,
    "finetune.dropout": ANY,
    "finetune.warmup_steps": _whole(0),
    "finetune.early_stop": _or_null(_whole(1)),
    "finetune.weight_decay": NOT_NEGATIVE,
    "finetune.clip": _or_null(POSITIVE),
    "finetune.accumulate": _whole(1),
    "task._target_": TEXT,
    "task.name": TEXT,
    "task.path": _or_null(TEXT),
    "task.max_train_rows": _or_null(_whole(1)),
    "task.max_length": _whole(4),
    "task.train_rows": _whole(1),
    "task.validation_rows": _whole(2),
    "task.hub": TEXT,
    "task.hub_config": _or_null(TEXT),
    "task.train_split": TEXT,
    "task.packing": FLAG,
    "task.train_on": _one_of("completion", "all"),
    "task.train_file": _or_null(TEXT),
    "task.validation_file": _or_null(TEXT),
    "task.unanswerable": FLAG,
    "task.null_threshold": _number(lambda v: True, "a number"),
    "task.doc_stride": _whole(0),
    "task.max_question_length": _whole(1),
    "task.n_best": _whole(1),
    "task.max_answer_length": _whole(1),
    "task.validation_split": _or_null(TEXT),
    "task.image_column": TEXT,
    "task.label_column": TEXT,
    "task.num_labels": _or_null(_whole(2)),
    "task.train_head": FLAG,
    "task.augment.crop_area": _or_null(_number(lambda v: 0 < v <= 1, "a number in (0, 1]: a share of the area")),
    "task.augment.flip": FLAG,
    "task.augment.shift": _number(lambda v: 0 <= v < 0.5, "a number from 0 to below 0.5: a share of the side"),
    "task.recipe.*": ANY,
    "model.name": TEXT,
    "model.path": (TEXT[0], "a hub id or a folder"),
    "model.layer": _or_null(TEXT),
    "model.candidates": _or_null(
        (
            lambda v: isinstance(v, list) and bool(v) and len(set(v)) == len(v),
            "a list of the linear modules of a layer, each once",
        )
    ),
    "model.roles.*": TEXT,
    "model.full_ft_lr": POSITIVE,
    "model.trust_remote_code": FLAG,
    "model.dtype": _one_of("float32", "bfloat16", "float16"),
    "model.quantise": _one_of(None, "8bit", "4bit"),
    "model.config.*": ANY,
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": (lambda v: v == "auto" or (_is_int(v) and v >= 1), "a whole number of at least 1, or auto"),
    "trainer.strategy": TEXT,
    "trainer.precision": _one_of("32-true", "bf16-mixed", "16-mixed"),
    "trainer.deterministic": _one_of(True, False, "warn"),
    "trainer.num_workers": _whole(0),
    "trainer.gradient_checkpointing": FLAG,
    "logger.*": ANY,
    "debug.traceback": FLAG,
    "debug.detect_anomaly": FLAG,
    "method.*": ANY,
}


def problems(cfg: DictConfig) -> list[str]:
    """Every key that nothing reads and every value that cannot be right, one message each."""
    rows = cfg.task.recipe.get("of", {cfg.task.name: {}})
    if cfg.task.name not in rows:
        return [f"recipe= gives no settings for task={cfg.task.name}: it has them for {', '.join(rows)}"]
    found: list[str] = []
    leaves = dict(_leaves(cfg, "", found))
    for key, value in leaves.items():
        rule = RULES.get(key) or next((RULES[p] for p in RULES if p.endswith(".*") and key.startswith(p[:-1])), None)
        if rule is None:
            found.append(unknown_key(key, [*leaves, *(k for k in RULES if not k.endswith("*"))]))
        elif not rule[0](value):
            found.append(f"{key}={_show(value)} must be {rule[1]}")
    if not found:
        found += _combinations(cfg)
    return found


def _leaves(node: DictConfig, prefix: str, found: list[str]) -> Iterator[tuple[str, Any]]:
    for name in node:
        key = f"{prefix}{name!s}"
        try:
            value = node[name]
        except OmegaConfBaseException as error:  # an interpolation that leads nowhere
            found.append(f"{key}: {str(error).splitlines()[0]}")
            continue
        if OmegaConf.is_interpolation(node, str(name)):
            source = OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[index]
            if "task.recipe." not in source and not (isinstance(value, str) and "${" in value):
                continue  # the value of another key, which is checked under its own name; text with ${ is no such
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{key}.", found)
        else:
            yield key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _combinations(cfg: DictConfig) -> Iterator[str]:
    for stage in ("search", "finetune"):
        if stage in cfg and cfg[stage].batch_size % cfg[stage].accumulate:
            yield (
                f"{stage}.batch_size={cfg[stage].batch_size} must be a multiple of "
                f"{stage}.accumulate={cfg[stage].accumulate}: the batch is cut into that many parts"
            )
    if "search" in cfg and cfg.search.get("order") == 2 and cfg.trainer.precision == "16-mixed":
        yield "search.order=2 does not go with trainer.precision=16-mixed: use bf16-mixed or 32-true"
    if "search" in cfg and cfg.search.get("order") == 2 and cfg.search["update"] == "simultaneous":
        yield (
            "search.order=2 does not go with search.update=simultaneous: it differentiates through a weight step that "
            "the Gamma step foresees; use search.update=alternating"
        )
    if "search" in cfg and cfg.search.get("order") == 2 and cfg.trainer.gradient_checkpointing:
        yield "search.order=2 differentiates twice, which does not go with trainer.gradient_checkpointing=true"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that nothing reads, with what may have been meant."""
    near = get_close_matches(key, {*known} - {key}, n=1, cutoff=0.6)
    return f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "")


def _show(value: Any) -> str:
    return "null" if value is None else repr(value) if isinstance(value, str) else str(value)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


NOT_IN_HASH = ("resume", "dry_run", "scale", "cell", "debug", "logger")


def config_hash(cfg: DictConfig) -> str:
    """Hash of everything in the configuration that can change a result."""
    content = {key: value for key, value in plain(cfg).items() if key not in NOT_IN_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two configurations differ, as ``key: old -> new``, leaving out what `config_hash` leaves out."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        if not prefix and key in NOT_IN_HASH:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {_show(a)} -> {_show(b)}")
    return found


def short_name(path: str | None) -> str:
    """A name for a model of which only ``model.path`` is known, fit for names of folders: the last part of the path."""
    last = re.split(r"[/\\]", str(path or "").rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "hf"


OmegaConf.register_new_resolver("short_name", short_name, replace=True)  # for conf/model/hf.yaml


def conf_dir() -> Path:
    """The project's ``conf/`` folder."""
    return Path(__file__).resolve().parents[2] / "conf"
