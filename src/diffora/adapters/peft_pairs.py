"""Reads a LoRA adapter that PEFT wrote, as the pairs of this package."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffora.adapters.manifest import CONFIG, WEIGHTS
from diffora.adapters.pairs import COMPACT, PREFIX, StoredPairs, read_tensors
from diffora.errors import UserError
from diffora.files import read_json
from diffora.trust import check_peft_adapter

MORE = {
    "use_dora": "it is DoRA",
    "lora_bias": "it has biases of B",
    "layer_replication": "it repeats layers of the backbone",
    "target_parameters": "it adapts parameters outside linear modules",
    "trainable_token_indices": "it trains token embeddings",
    "alora_invocation_tokens": "it is active for some tokens only",
}
"""Options of PEFT's LoRA whose update is more than s B A."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the pretrained weights. The adapter alone does not say what they were before."""


def read_peft_pairs(folder: Path) -> StoredPairs:
    """The pairs and the modules saved whole of a plain LoRA adapter.

    Raises:
        UserError: it is not plain LoRA, or its files contradict each other.
    """
    from peft.utils.other import get_pattern_key  # takes seconds

    check_peft_adapter(folder)
    config, tensors = read_json(folder / CONFIG), read_tensors(folder / WEIGHTS)
    if problems := [f"{folder / CONFIG}: {problem}" for problem in _problems(config)]:
        raise UserError(problems)
    ending = ".lora_A.weight"
    names = [key.removeprefix(PREFIX).removesuffix(ending) for key in tensors if key.endswith(ending)]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    modules = {}
    for name in names:
        rank = int(ranks.get(get_pattern_key(list(ranks), name), config["r"]))
        alpha = float(alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]))
        modules[name] = rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), 0.0
    lora = {f"{PREFIX}{name}.lora_{matrix}.weight" for name in names for matrix in "AB"}
    whole = [key.removeprefix(PREFIX) for key in tensors if key not in lora]
    heads = list(dict.fromkeys(_head_of(key, config.get("modules_to_save") or [], folder) for key in whole))
    found = StoredPairs(modules, [], heads, tensors, {}, COMPACT)
    if not modules:
        raise UserError(f"{folder / WEIGHTS} has no low-rank pairs")
    if problems := [f"{folder}: {problem}" for problem in found.problems()]:
        raise UserError(problems)
    return found


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Why an adapter is not plain LoRA."""
    if (kind := str(config.get("peft_type")).upper()) != "LORA":
        yield f"peft_type={kind} cannot be trained on as LoRA layers: only LORA can"
        return
    for key, why in MORE.items():
        if config.get(key):
            yield f"{key} is set: {why}, and only plain LoRA can be trained on"
    if config.get("bias", "none") != "none":
        yield f"bias={config['bias']}: it trains biases, and only plain LoRA can be trained on"
    if str(config.get("init_lora_weights", "")).startswith(CHANGES_BASE):
        yield (
            f"init_lora_weights={config['init_lora_weights']}: its base model has other weights than the pretrained "
            "ones; convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            yield f"{key}={config.get(key)!r} must be a number above 0"
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_positive, pattern.values())):
            yield f"{key}={pattern!r:.100} must be numbers above 0 by names of modules"
        elif broken := [name for name in pattern if not _is_pattern(name)]:
            yield f"{key}: {broken[0]!r} is no regular expression"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _head_of(key: str, saved: list[str], folder: Path) -> str:
    """The full name of the module, saved whole, that a tensor belongs to; PEFT's names may be the ends of names."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        name = ".".join(parts[:count])
        if any(f".{name}".endswith(f".{end}") for end in saved):
            return name
    raise UserError(f"{folder / WEIGHTS} has {key}, which is neither A or B nor part of modules_to_save")
