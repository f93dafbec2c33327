"""The precision of weights and of computations."""

from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)
"""Precisions in which small steps are rounded away, so that nothing is trained in them."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The dtype of computations by ``trainer.precision``. Other precisions compute in the dtype of the weights."""


def dtype_of(settings: Any) -> torch.dtype:
    """The precision of the frozen weights, from the ``model`` section: ``model.dtype``, or float32."""
    dtype: torch.dtype = getattr(torch, getattr(settings, "dtype", None) or "float32")
    return dtype
