"""The precision of weights and of computations."""

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor

from diffora.settings.sections import Model

HALF = (torch.float16, torch.bfloat16)
"""Precisions in which small steps are rounded away, so that nothing is trained in them."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The dtype of computations by ``trainer.precision``. Other precisions compute in the dtype of the weights."""


def dtype_of(settings: Model) -> torch.dtype:
    """The precision of the frozen weights, from the ``model`` section: ``model.dtype``, or float32."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def bfloat16_unit(device: torch.device) -> str | None:
    """What multiplies matrices of bfloat16 on a device, such as ``AMX``; None if nothing does, so that it is slow."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_name(device) if supported else None
    if device.type != "cpu":
        return None
    able = _capabilities()
    return next((name for name, key in CPU_UNITS.items() if able.get(key)), None)


def _capabilities() -> Mapping[str, Any]:
    """What the processor can do, by torch's names."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    private: Any = torch.cpu  # torch 2.10
    return {"amx_bf16": private._is_amx_tile_supported(), "avx512_bf16": private._is_avx512_bf16_supported()}


CPU_UNITS = {"AMX": "amx_bf16", "AVX512-BF16": "avx512_bf16"}
"""Units of processors for bfloat16, the fastest first, and torch's names for them."""


def width_multiple(precision: str, device: torch.device, longest: int | None) -> int:
    """Round the widths of batches up to a multiple of this.

    In bfloat16 on a CPU, oneDNN compiles its products for each shape and keeps them: half a MB for each product and
    width. Rounded widths are few, so that memory stays flat and most products are compiled once. Rounding to more would
    waste time on padding: a batch of CoLA has 11 tokens. GPUs like 8, too.

    Args:
        longest: the most tokens that the model reads (`longest_input`). It is a multiple of the result, so no rounded
            width is more. None: any number.
    """
    rounds = device.type == "cuda" or (device.type == "cpu" and precision in AUTOCAST)
    wanted = 8 if rounds else 1
    return wanted if longest is None else gcd(wanted, longest)


def full_precision(values: Tensor) -> Tensor:
    """The values in float32 if they are float16 or bfloat16; losses and metrics are computed in full precision."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
