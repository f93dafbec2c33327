"""``trainer.precision=auto``: bfloat16 where this machine computes in it, float32 elsewhere."""

from copy import deepcopy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffora.backbones.precision import bfloat16_unit
from diffora.errors import UserError
from diffora.loop.predict import accelerator_device
from diffora.methods.base import Method
from diffora.methods.peft_config import ALLOWED_CHANGES
from diffora.trust import class_at

NAME_IT = "name it: bf16-mixed (with model.dtype=bfloat16) or 32-true"


def settled(cfg: DictConfig) -> tuple[DictConfig, str | None]:
    """Replace ``trainer.precision=auto`` by what this machine uses.

    Do it before a configuration is hashed: results of different machines are then different settings.

    Args:
        cfg: a composed configuration, or the sections ``model`` and ``trainer`` of one.

    Returns:
        (the configuration with the chosen ``trainer.precision`` and ``model.dtype``; a text that says what was
        chosen and why, or None if the configuration names a precision)

    Raises:
        UserError: several machines take part, which could choose differently; or the weights are in float16.
    """
    if _value(cfg, "trainer.precision") != "auto":
        return cfg, None
    if "method" in cfg and _value(cfg, "trainer.num_nodes") not in (None, 1):  # an evaluation is one process
        raise UserError(f"trainer.precision=auto: the machines of one run could choose differently; {NAME_IT}")
    if _value(cfg, "model.dtype") == "float16":
        raise UserError(f"trainer.precision=auto does not go with model.dtype=float16: leave that out, or {NAME_IT}")
    cfg = deepcopy(cfg)
    unit, reason = _unit(str(_value(cfg, "trainer.accelerator")))
    if unit is None:
        cfg.trainer.precision = "32-true"
        return cfg, f"32-true, because {reason}"
    cfg.trainer.precision = "bf16-mixed"
    if _changes_pretrained(cfg):
        return cfg, f"bf16-mixed, because {reason}; weights in float32, because the method changes them"
    if _value(cfg, "model.dtype") == "float32":
        cfg.model.dtype = "bfloat16"
    frozen = _value(cfg, "model.dtype")
    return cfg, f"bf16-mixed, because {reason}; frozen weights in {frozen}, adapters and head in float32"


def _unit(accelerator: str) -> tuple[str | None, str]:
    """(what computes in bfloat16, or None; the reason in words)"""
    try:
        device = accelerator_device(accelerator)
    except UserError:  # `check_machine` reports it
        return None, f"this machine has no device for trainer.accelerator={accelerator}"
    unit = bfloat16_unit(device)
    if device.type == "cpu":
        return unit, f"the processor has {unit or 'neither AMX nor AVX512-BF16'}"
    return unit, f"the device {'computes' if unit else 'does not compute'} in bfloat16"


def _changes_pretrained(cfg: DictConfig) -> bool:
    """Whether a method trains pretrained weights, or starts by taking a part out of them, as PiSSA does."""
    if str(_value(cfg, "method.config.init_lora_weights")).startswith(ALLOWED_CHANGES):
        return True
    try:
        kind: Any = class_at(_value(cfg, "method._target_"), Method, "method._target_")
    except UserError:  # there is no method in an evaluation; `check` reports a wrong one
        return False
    return bool(kind.trains_pretrained)


def _value(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
