"""The bottleneck adapter, f(x) = x + W_up act(W_down x), behind a linear layer (Houlsby et al., 2019)."""

from typing import Any

from torch import Tensor, nn

from diffora.core.linear import features

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class BottleneckLinear(nn.Module):
    """A frozen linear layer whose output h becomes h + W_up act(W_down h), or without the skip W_up act(W_down h).

    With the skip, the adapter starts near the identity: both matrices are drawn from N(0, std^2), biases are 0. At
    std = 0 it is the identity, but then W_down gets no gradient in the first step.

    Args:
        base: the pretrained layer, of any kind that `is_linear` knows; it is called as it is and frozen here.
        size: width of the bottleneck.
        activation: one of `ACTIVATIONS`.
        skip: add h to the output. Without it, nothing of the pretrained layer's output passes by the bottleneck.
        std: of the initial weights. Houlsby et al. truncate the normal at two standard deviations, as here.
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
        """(..., in) -> (..., out), in the precision of the base layer, however precise the adapter is."""
        hidden: Tensor = self.base(x)
        update: Tensor = self.up(self.act(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + update.to(hidden.dtype) if self.skip else update.to(hidden.dtype)

    @property
    def weight(self) -> Tensor:
        """The base layer's: some backbones look at the dtype of their linear layers' weights."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight
