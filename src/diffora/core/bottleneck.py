"""The bottleneck adapter, f(h) = h + W_up act(W_down h), after a linear layer (Houlsby et al., 2019)."""

from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.linear import features
from diffora.core.weights import AdaptedWeight
from diffora.errors import UserError

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class BottleneckLinear(nn.Module):
    """A frozen linear layer whose output h becomes h + W_up act(W_down h), or W_up act(W_down h) without the skip.

    With the skip, the adapter starts near the identity: both matrices are drawn from N(0, std^2), and biases are 0.
    With std = 0 it is the identity, but W_down gets no gradient in the first step.

    Args:
        base: the pretrained layer, of any kind that `is_linear` accepts. It is frozen here.
        size: width of the bottleneck.
        activation: one of `ACTIVATIONS`.
        skip: add h to the output. Without it, the pretrained output only passes through the bottleneck.
        std: standard deviation of the initial weights, truncated at two of them as in Houlsby et al.
    """

    def __init__(self, base: nn.Module, size: int, activation: str = "gelu", skip: bool = True, std: float = 0.01):
        super().__init__()
        self.base = base.requires_grad_(False)
        device: Any = base.weight.device
        _, n_out = features(base)
        self.down = nn.Linear(n_out, size, device=device)
        self.up = nn.Linear(size, n_out, device=device)
        self.act = ACTIVATIONS[activation]()
        self.skip = skip
        for linear in (self.down, self.up):
            nn.init.zeros_(linear.bias)
            if std:
                nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the precision of the base layer. The adapter may have another one."""
        hidden: Tensor = self.base(x)
        update: Tensor = self.up(self.act(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + update.to(hidden.dtype) if self.skip else update.to(hidden.dtype)

    @property
    def weight(self) -> Tensor:
        """A stand-in for backbones that only read the dtype of a linear layer's weight.

        Reading the values raises an error, because the bottleneck would be left out. torch's fused kernels for
        `nn.TransformerEncoder` are not used with this weight.
        """
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight if torch.compiler.is_compiling() else AdaptedWeight(weight, _no_weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        bias: Tensor | None = getattr(self.base, "bias", None)
        return bias


def _no_weight() -> Tensor:
    raise UserError(
        "this model reads the weight of a linear layer that has a bottleneck behind it and does not call the layer, "
        "which would leave the bottleneck out: choose other modules"
    )
