"""Checks of the composed configuration: every mistake at once, before torch or any weight is loaded."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffora.files import conf_dir, read_yaml

MOST = 10**9
"""No number of a configuration may be larger, unless its own rule says so: NaN and infinity neither."""


class Check(NamedTuple):
    """What a setting may be; ``words`` end the sentence "it must be"."""

    fits: Callable[[Any], bool]
    words: str


def whole(least: int, most: int = MOST) -> Check:
    """A whole number between two bounds."""
    return Check(lambda v: is_int(v) and least <= v <= most, f"a whole number of at least {least}, at most {most:,}")


def number(test: Callable[[float], bool], words: str) -> Check:
    """A number that passes ``test``, which ``words`` describe."""
    return Check(lambda v: (is_int(v) or isinstance(v, float)) and abs(v) <= MOST and test(v), words)


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def or_null(check: Check) -> Check:
    """What ``check`` accepts, or null."""
    return Check(lambda v: v is None or check.fits(v), f"{check.words}, or null")


def one_of(*values: Any) -> Check:
    """One of the values, of the same type."""
    words = "one of " + ", ".join("null" if v is None else str(v).lower() for v in values)
    return Check(lambda v: any(v == value and type(v) is type(value) for value in values), words)


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip() or len(value) > 4000 or "\0" in value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)  # which UTF-8 has not


def _is_path(value: Any) -> bool:
    if not _is_text(value) or any(len(part.encode()) > 255 for part in re.split(r"[/\\]", value)):
        return False
    try:
        Path(value).expanduser()
    except RuntimeError:  # ~name, of a user that there is not
        return False
    return True


LEAST = 1e-12
"""Smaller numbers than this stand for nothing: float32 rounds their effect away, and a run would end untrained."""
POSITIVE = number(lambda v: v >= LEAST, f"a number above 0, at most {MOST:,}, at least {LEAST:g}")
NOT_NEGATIVE = number(lambda v: v >= 0, f"a number of at least 0, at most {MOST:,}")
NUMBER = number(lambda v: True, f"a number, at most {MOST:,} in size")
FRACTION = number(lambda v: 0 < v < 1, "a number between 0 and 1")
RATE = number(lambda v: 0 <= v < 1, "a number in [0, 1): it is a rate")
SHARE_OF_MODULES = number(
    lambda v: 0 <= v <= 1, "a number in [0, 1]: it is the share of each layer's modules to select"
)
RANK = whole(1)
SEED = whole(0, 2**32 - 1)
LENGTH = 2**20  # tokens; more than any backbone takes
ROWS = 10**7  # of data that are generated
FLAG = Check(lambda v: isinstance(v, bool), "true or false")
TEXT = Check(_is_text, "text")
PATH = Check(_is_path, "the name of a file or folder, in UTF-8")
NULL = Check(lambda v: v is None, "null")
TEXTS = Check(lambda v: isinstance(v, list) and all(map(_is_text, v)), "a list of texts")
GROUP = Check(lambda v: isinstance(v, Mapping), "a group of settings")
ANY = Check(lambda v: True, "")

RULES: dict[str, Check] = {
    "seed": SEED,
    "resume": FLAG,
    "predict": FLAG,
    "dry_run": FLAG,
    "scale": one_of("paper", "small"),
    "cell.experiment": or_null(TEXT),
    "cell.row": or_null(TEXT),
    "cell.column": or_null(TEXT),
    "rank": RANK,  # whether a method has these three, diffora.methods.base knows; method.* is all its own to check
    "rho": SHARE_OF_MODULES,
    "finetune.dropout": RATE,
    "method._target_": TEXT,
    "method.name": TEXT,
    "method.*": ANY,
    "search.epochs": whole(1),
    "search.batch_size": whole(1),
    "search.lr": POSITIVE,
    "search.gamma_lr": POSITIVE,
    "search.update": one_of("alternating", "simultaneous"),
    "search.order": one_of(1, 2),
    "search.train_steps": whole(1),
    "search.fraction": number(lambda v: 0 < v <= 1, "a number in (0, 1]: the share of the training rows to search on"),
    "search.valid_fraction": FRACTION,
    "search.rank": RANK,
    "search.weight_decay": NOT_NEGATIVE,
    "search.clip": or_null(POSITIVE),
    "search.accumulate": whole(1),
    "finetune.epochs": whole(1),
    "finetune.batch_size": whole(1),
    "finetune.lr": POSITIVE,
    "finetune.warmup_steps": whole(0),
    "finetune.early_stop": or_null(whole(1)),
    "finetune.weight_decay": NOT_NEGATIVE,
    "finetune.clip": or_null(POSITIVE),
    "finetune.accumulate": whole(1),
    "task._target_": TEXT,
    "task.name": TEXT,
    "task.path": or_null(PATH),
    "task.max_train_rows": or_null(whole(1)),
    "task.max_length": whole(4, LENGTH),
    "task.train_rows": whole(1, ROWS),
    "task.validation_rows": whole(2, ROWS),
    "task.hub": TEXT,
    "task.hub_config": or_null(TEXT),
    "task.train_split": TEXT,
    "task.packing": FLAG,
    "task.train_on": one_of("completion", "all"),
    "task.train_file": or_null(PATH),
    "task.validation_file": or_null(PATH),
    "task.unanswerable": FLAG,
    "task.null_threshold": NUMBER,
    "task.doc_stride": whole(0, LENGTH),
    "task.max_question_length": whole(1, LENGTH),
    "task.n_best": whole(1, 1000),
    "task.max_answer_length": whole(1, LENGTH),
    "task.validation_split": or_null(TEXT),
    "task.image_column": TEXT,
    "task.label_column": TEXT,
    "task.num_labels": or_null(whole(2, 10**6)),
    "task.train_head": FLAG,
    "task.augment.crop_area": or_null(number(lambda v: 0 < v <= 1, "a number in (0, 1]: a share of the area")),
    "task.augment.flip": FLAG,
    "task.augment.shift": number(lambda v: 0 <= v < 0.5, "a number from 0 to below 0.5: a share of the side"),
    "task.recipe.rank": RANK,
    "task.recipe.rho": SHARE_OF_MODULES,
    "task.recipe.shared_rank": RANK,
    "task.recipe.alpha": POSITIVE,
    "task.recipe.dropout": RATE,
    "task.recipe.lr": POSITIVE,
    "task.recipe.full_ft_lr": POSITIVE,
    "task.recipe.batch_size": whole(1),
    "task.recipe.epochs": whole(1),
    "task.recipe.warmup_steps": whole(0),
    "task.recipe.early_stop": or_null(whole(1)),
    "task.recipe.search_epochs": whole(1),
    "task.recipe.sora_lambda": NOT_NEGATIVE,
    "task.recipe.of.*": ANY,  # what the others are taken from, by task
    "model.name": TEXT,
    "model.path": Check(_is_path, "a hub id or a folder"),
    "model.layer": or_null(TEXT),
    "model.candidates": or_null(
        Check(
            lambda v: TEXTS.fits(v) and bool(v) and len(set(v)) == len(v),
            "a list of the linear modules of a layer, each once",
        )
    ),
    "model.roles.*": TEXT,
    "model.full_ft_lr": POSITIVE,
    "model.trust_remote_code": FLAG,
    "model.dtype": one_of("float32", "bfloat16", "float16"),
    "model.quantise": one_of(None, "8bit", "4bit"),
    "model.config.*": ANY,
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": Check(lambda v: v == "auto" or whole(1, 10**6).fits(v), "a whole number of at least 1, or auto"),
    "trainer.strategy": one_of("auto", "ddp", "ddp_find_unused_parameters_true"),  # others are not tested
    "trainer.precision": one_of("32-true", "bf16-mixed", "16-mixed"),
    "trainer.deterministic": one_of(True, False, "warn"),
    "trainer.num_workers": whole(0, 256),
    "trainer.gradient_checkpointing": FLAG,
    "logger.csv": FLAG,
    "logger.tensorboard": FLAG,
    "logger.wandb.project": TEXT,
    "logger.wandb.entity": or_null(TEXT),
    "logger.wandb.group": or_null(TEXT),
    "logger.wandb.tags": TEXTS,
    "debug.detect_anomaly": FLAG,
}
MAY_BE_NULL = ("logger", "debug", "logger.wandb", "model.roles", "model.config")
"""Groups of settings that may be null or missing, like those of another method."""
SOMETIMES = ("rank", "rho", "finetune.dropout", "search.", "task.", "logger.", "debug.")
"""What a rule is about but only some configurations have: choices of method, task, recipe, logger."""


CHOSEN = {"method": "_target_", "task": "_target_", "model": "path"}
"""Groups that come from a file of their own, and the key that each such file has."""


def problems(cfg: DictConfig) -> list[str]:
    """Every key that nothing reads or that is missing, and every value that cannot be right: one message each."""
    return list(faults(cfg).values()) or list(_combinations(cfg))


def faults(cfg: DictConfig) -> dict[str, str]:
    """The messages of `problems` by key, without those about settings that do not go together."""
    rows = OmegaConf.select(cfg, "task.recipe.of", throw_on_resolution_failure=False)
    task = OmegaConf.select(cfg, "task.name", throw_on_resolution_failure=False)
    if isinstance(rows, DictConfig) and task is not None and task not in rows:
        return {"recipe": f"recipe= gives no settings for task={task}: it has them for {', '.join(map(str, rows))}"}
    found: dict[str, str] = {}
    leaves: dict[str, Any] = {}
    sources: dict[str, list[str]] = {}
    _read(cfg, "", leaves, sources, found)
    for key, value in leaves.items():
        if (rule := _rule(key)) is None:
            found[key] = unknown_key(key, [*leaves, *(k for k in RULES if not k.endswith("*"))])
        elif not rule.fits(value):
            found[key] = f"{key}={show(value)} must be {rule.words}"
        elif rule is ANY and (odd := odd_value(key, value)):
            found[key] = odd
    there = [key for key in (*leaves, *found) if _rule(key)]
    for key in _needed(leaves):
        if not any(_is_in(k, key) for k in there) and not any(_is_in(key, k) for k in found):
            group, _, member = key.partition(".")
            choice = (conf_dir() / group).is_dir() and member in ("", CHOSEN.get(group))
            found[key] = f"{key} is missing" + (f": choose one with {group}=<name>" if choice else "")
    # What is made of the value of another key, as in search.lr: ${finetune.lr}, is that key's mistake.
    faulty = [*found, *(group for group in CHOSEN if f"{group}.name" not in leaves)]
    own = {
        key: text
        for key, text in found.items()
        if not any(_is_in(source, k) for source in sources.get(key, ()) for k in faulty if k != key)
    }
    return own or found


def _read(
    node: DictConfig, prefix: str, leaves: dict[str, Any], sources: dict[str, list[str]], found: dict[str, str]
) -> None:
    """Fill in the values of a group by their keys, and what each is made of; and, as found, those that lead nowhere."""
    plain_node: Any = OmegaConf.to_container(node, resolve=False)
    for name in node:
        if not isinstance(name, str):
            found[f"{prefix}{name!r}"] = f"{prefix}{name!r}: the name of a setting must be text, which {name!r} is not"
            continue
        key = prefix + name
        sources[key] = _sources(plain_node[name], prefix)
        try:
            value = node[name]
            members = [rule[len(key) + 1 :] for rule in RULES if rule.startswith(f"{key}.")]
            if members and isinstance(value, DictConfig):
                _read(value, f"{key}.", leaves, sources, found)
            elif members and not (value is None and key in MAY_BE_NULL):
                names = ", ".join(dict.fromkeys(member.partition(".")[0] for member in members if member != "*"))
                found[key] = f"{key}={show(value)} must be a group of settings{names and f': {names}'}"
            elif not members:
                group = OmegaConf.is_config(value)
                leaves[key] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if group else value
        except OmegaConfBaseException as error:
            found[key] = f"{key}: {str(error).splitlines()[0]}"


def _sources(value: Any, prefix: str) -> list[str]:
    """The keys that interpolations in a value name (and other words in them, which are no keys)."""
    if isinstance(value, dict | list):
        return [s for item in (value.values() if isinstance(value, dict) else value) for s in _sources(item, prefix)]
    if not isinstance(value, str) or "${" not in value or len(value) > 1000:
        return []
    return re.findall(r"[a-zA-Z_][\w.]*\w", value) + [prefix + s for s in re.findall(r"\$\{\.([\w.]*\w)", value)]


def _needed(leaves: Mapping[str, Any]) -> Iterator[str]:
    """The keys that must be there, of a task those of its file in ``conf/``; each group before its members."""
    needed = [key for key in RULES if not key.endswith("*") and not key.startswith(SOMETIMES)]
    needed += ["task._target_", "task.name", "task.max_train_rows"]
    if "method.selector" in leaves:
        needed += [key for key in RULES if key.startswith("search.")]
    name = leaves.get("task.name")
    if isinstance(name, str) and _is_path(name) and (file := conf_dir() / "task" / f"{name}.yaml").is_file():
        for key, value in read_yaml(file).items():
            needed += [f"task.{key}.{inner}" for inner in value] if key == "augment" else [f"task.{key}"]
    for group, main in CHOSEN.items():
        if not any(f"{group}.{key}" in leaves for key in ("name", main)):  # then one message stands for all
            needed = [f"{group}.{main}", *(key for key in needed if not _is_in(key, group))]
    return iter(dict.fromkeys(group for key in needed for group in (key.rpartition(".")[0], key) if group))


def _rule(key: str) -> Check | None:
    return RULES.get(key) or next((RULES[r] for r in RULES if r.endswith(".*") and key.startswith(r[:-1])), None)


def _is_in(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")


def odd_value(key: str, value: Any) -> str | None:
    """What no setting may hold, however deep: numbers that are not finite or too large, names that are not text."""
    if isinstance(value, Mapping):
        if strange := [name for name in value if not isinstance(name, str)]:
            return f"{key}: the name of a setting must be text, not the number {strange[0]}"
        return next(filter(None, (odd_value(f"{key}.{name}", item) for name, item in value.items())), None)
    if isinstance(value, list):
        return next(filter(None, (odd_value(f"{key}[{place}]", item) for place, item in enumerate(value))), None)
    if is_int(value) or isinstance(value, float):
        return None if NUMBER.fits(value) else f"{key}={show(value)} must be {NUMBER.words}"
    if isinstance(value, str):
        return None if not value or _is_text(value) or len(value) > 4000 else f"{key}={show(value)} must be text"
    return None if value is None or isinstance(value, bool) else f"{key}={show(value)} must be text or a number"


def _combinations(cfg: DictConfig) -> Iterator[str]:
    for stage in ("search", "finetune"):
        if stage in cfg and cfg[stage].batch_size % cfg[stage].accumulate:
            yield (
                f"{stage}.batch_size={cfg[stage].batch_size} must be a multiple of "
                f"{stage}.accumulate={cfg[stage].accumulate}: the batch is cut into that many parts"
            )
    if cfg.method.get("warm_start") and cfg.method.get("selection") is None and cfg.search.rank != cfg.rank:
        yield (
            f"method.warm_start=true needs search.rank={cfg.search.rank} to be rank={cfg.rank}: selected modules keep "
            "the A and B of the search"
        )
    if cfg.model.dtype == "float16" and cfg.trainer.precision == "bf16-mixed":
        yield "model.dtype=float16 does not go with trainer.precision=bf16-mixed: use model.dtype=bfloat16 or float32"
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


def show(value: Any) -> str:
    """A value as a message quotes it: one line, and not too long a one."""
    try:
        text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    except ValueError:  # Python does not write whole numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}…"


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
            found.append(f"{prefix}{key}: {show(a)} -> {show(b)}")
    return found


def short_name(path: str | None) -> str:
    """A name for a model of which only ``model.path`` is known, fit for names of folders: the last part of the path."""
    last = re.split(r"[/\\]", str(path or "").rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "hf"


OmegaConf.register_new_resolver("short_name", short_name, replace=True)  # for conf/model/hf.yaml
