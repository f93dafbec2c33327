"""Saves a layer's input for the gradient of A. Three things reduce the memory:

- Layers that read the same x (query, key and value) save the same tensor.
- With a split, only the examples that train A are saved, in one copy for all layers that read x.
- After a GELU, nothing is saved where memory matters. The GELU has saved its own input, so it is applied again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_copies: Any = WeakTensorKeyDictionary()
"""For each x that is alive: (its version, number of examples, copy of them)."""


def input_to_save(x: Tensor, split: int | None, recompute_gelu: bool) -> tuple[Tensor, str | None]:
    """What to save so that `saved_input` gives back x, or its first ``split`` entries.

    Args:
        x: the layer's input.
        split: number of leading entries of dim 0 that are needed; None for all.
        recompute_gelu: if x is the output of a GELU, save the input of the GELU instead.

    Returns:
        (tensor to save, kind of GELU to apply to it, or None)
    """
    source: Any = x.grad_fn
    # If x was changed in place, it is no longer what the GELU made. In a checkpoint, saved tensors cannot be read.
    if recompute_gelu and type(source).__name__ == "GeluBackward0" and not x._version and not inside_checkpoint():
        return source._saved_self, source._saved_approximate
    return (x if split is None else first_examples(x, split)), None


def saved_input(saved: Tensor, gelu: str | None, split: int | None = None) -> Tensor:
    """x again, or its first ``split`` entries, from what `input_to_save` returned."""
    return saved if gelu is None else F.gelu(saved[:split], approximate=gelu)


def first_examples(x: Tensor, count: int) -> Tensor:
    """A copy of the first entries of x, the same one for all layers that read x. A view would keep all of x alive."""
    version, size, copy = _copies.get(x, (None, None, None))
    if (version, size) != (x._version, count):
        copy = x[:count].detach().clone()
        _copies[x] = x._version, count, copy
    return copy  # type: ignore[no-any-return]


def _unknown_hooks(ignore_tracing: bool) -> bool:
    return True  # if torch does not say, assume a checkpoint: saving x itself is always right


_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", _unknown_hooks)


def inside_checkpoint() -> bool:
    """Whether tensors saved for the backward pass go through hooks, as they do inside a checkpoint."""
    return bool(_top_hooks(False))
