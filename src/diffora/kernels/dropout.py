"""Dropout that is cheap on CPUs, where drawing one float per element can cost more than the product of a layer.

The mask is one random byte per element. An element is dropped where its byte is below a threshold, in the forward and
in the backward pass. Rates are rounded to the nearest 1/256 (0.1 becomes 0.1016), and kept elements are scaled by the
rounded rate. If a rate rounds to 0 or 1, `cheap_dropout` uses torch's dropout, and the low-rank layers drop nothing or
all but 1/256.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def threshold_of(rate: float) -> int:
    """The threshold for a rate, 0 to 255: elements whose byte is below it are dropped."""
    return min(255, round(256 * rate))


def kept_share(threshold: int) -> float:
    """The share of elements that are kept."""
    return 1 - threshold / 256


def noise_like(x: Tensor) -> Tensor:
    """A random byte for each element of x, in the shape of x."""
    if x.device.type not in ("cpu", "cuda"):  # only these are known to draw and reinterpret 64-bit words
        return torch.randint(256, x.shape, dtype=torch.uint8, device=x.device)
    size = x.numel()
    words = torch.empty(-(-size // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return words.view(torch.uint8)[:size].view(x.shape)


def drop(x: Tensor, noise: Tensor, threshold: int) -> Tensor:
    """x where ``noise`` (bytes in the dtype of x) is at least the threshold, else 0. The result is not scaled."""
    dropped: Tensor = torch.ops.aten.threshold_backward(x, noise, threshold - 1)
    return dropped


def cheap_dropout(x: Tensor, rate: float) -> Tensor:
    """`F.dropout` in training, cheaper on a CPU.

    On other devices, when compiled, and at rates that round to 0 or 1, it is `F.dropout` itself.
    """
    if x.device.type != "cpu" or not x.is_floating_point() or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    if not 0 < round(256 * rate) < 256:
        return F.dropout(x, rate)
    dropped: Tensor = _Dropout.apply(x, threshold_of(rate))  # type: ignore[no-untyped-call]
    return dropped


class CheapDropout(nn.Dropout):
    """`nn.Dropout`, computed by `cheap_dropout` unless it works in place."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return super().forward(x) if self.inplace else cheap_dropout(x, self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int) -> Tensor:
        noise = noise_like(x)
        ctx.save_for_backward(noise)
        ctx.threshold = threshold
        return drop(x, noise.to(x.dtype), threshold).div_(kept_share(threshold))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (noise,) = ctx.saved_tensors
        return drop(grad, noise.to(grad.dtype), ctx.threshold) / kept_share(ctx.threshold), None


def use_cheap_dropout(model: nn.Module) -> None:
    """Replace every `nn.Dropout` of a model by `CheapDropout`, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, CheapDropout(module.p, module.inplace).train(module.training))
