"""Which modules are linear, how many features they have, and how to read their weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from diffora.errors import UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies (..., in) by a matrix to (..., out), so that a low-rank update can be added to it.

    These are `nn.Linear` and its subclasses, including quantised ones, and GPT-2's `Conv1D`. `Conv1D` is recognised by
    its class name, its ``nf`` and a weight of (in, nf), because this package does not import transformers. The
    projection inside `nn.MultiheadAttention` does not count: it is never called, only its weight is read.
    """
    return (isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)) or is_conv1d(
        module
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a `Conv1D`: a linear layer that stores its weight transposed."""
    if type(module).__name__ != "Conv1D":  # reading the weight of a module with a spectral norm changes its buffers
        return False
    weight: Any = getattr(module, "weight", None)
    return weight is not None and weight.shape[1:] == (getattr(module, "nf", 0),)


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear module; it may store its weight transposed or quantised."""
    sizes: Any = module.weight.shape if is_conv1d(module) else (module.in_features, module.out_features)
    return int(sizes[0]), int(sizes[1])


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a tensor of torch's own class, or a fake tensor (used to estimate memory).

    Quantised weights have their own class. A weight computed from others (parametrised, pruned) is not a parameter.
    """
    return type(weight) in (nn.Parameter, Tensor) or type(weight).__name__ == "FakeTensor"


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear module as (out, in), a view.

    Raises:
        UserError: it is quantised, and its entries cannot be read or changed.
    """
    weight: Any = getattr(module, "weight", None)
    transposed = is_conv1d(module)
    # Quantised weights are packed, integers or of a class of their own. float8 weights come with a separate scale.
    plain = weight is not None and is_plain(weight) and weight.dtype in FLOATS
    if not plain or tuple(weight.shape if transposed else weight.shape[::-1]) != features(module):
        raise UserError(
            f"the weight of a {type(module).__name__} is quantised and cannot be read or changed: load the backbone "
            "in full precision for this"
        )
    found: Tensor = weight.T if transposed else weight
    return found
