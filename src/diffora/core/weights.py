"""The weight of an adapted layer, for code that reads it instead of calling the layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from diffora.errors import UserError


class AdaptedWeight(Tensor):
    """A stand-in for the weight of an adapted layer. It computes the values only for operations that need them.

    Some backbones read only the dtype of a linear layer's weight before each call; this costs nothing here. Others
    compute ``F.linear(x, lin.weight)``, and torch's fused kernels for `nn.TransformerEncoderLayer` use the weights of
    its linear layers directly. With the base layer's weight, both would silently leave out the update.

    Args:
        base: the base layer's weight.
        values: returns the whole weight, in the layout and dtype of ``base``. Autograd records it.
    """

    values: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, base: Tensor, values: Callable[[], Tensor]) -> "AdaptedWeight":
        weight: Any = Tensor._make_wrapper_subclass(cls, base.shape, dtype=base.dtype, device=base.device)
        weight.values = values
        found: AdaptedWeight = weight
        return found

    def __init__(self, base: Tensor, values: Callable[[], Tensor]) -> None: ...

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and args and isinstance(args[0], AdaptedWeight):
            raise UserError(f"{name} on the weight of an adapted layer would be lost: change its base.weight")
        if func not in METADATA:
            args, kwargs = tree_map_only(AdaptedWeight, lambda weight: weight.values(), (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} cannot read the weight of an adapted layer")  # never without values


_PROPERTIES: tuple[Any, ...] = (Tensor.dtype, Tensor.device, Tensor.shape, Tensor.ndim, Tensor.is_cuda, Tensor.is_meta)
METADATA = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, *(p.__get__ for p in _PROPERTIES)}
"""Functions that need no values."""
