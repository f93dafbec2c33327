"""The low-rank linear layer, h = W x + b + s B (g * A x) ([D] eq. 10). Every low-rank method trains this layer.

The gate g is applied on the rank side. The values are those of eq. 10, ``gamma * B A x``, but autograd then saves only
r numbers per token for the gradient of the gate, not d.

B is stored transposed, r x out and contiguous. With out x r and a small r, the two products of the backward pass would
be many times slower on CPUs than those for A. Exports transpose it back.

``W x + b`` is the output of the pretrained layer, which may store its weight transposed, in half precision or
quantised. The update is computed in the precision of x, or of autocast, from A and B in float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffora.core.linear import FLOATS, features, is_conv1d, is_plain, weight_of
from diffora.core.masking import train_rows
from diffora.core.weights import AdaptedWeight
from diffora.errors import UserError
from diffora.kernels.fused import lowrank_linear

KERNELS = ("auto", "fused", "plain")


def add_lowrank(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_bt: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[D] eq. 10 in plain operations: ``base + scaling * B (gate * A dropout(x))`` with ``base = W x + b``.

    This is the reference. The fused node (`diffora.kernels.fused`) computes the same with less work and memory.

    Args:
        base: (..., out), the frozen layer's output.
        x: (..., in).
        lora_a: A, (rank, in).
        lora_bt: B transposed, (rank, out).
        scaling: alpha / rank.
        gate: scalar (an entry of the relaxed DAM), (rank,) (SoRA), (rank, rank) (FLoRA's core), or None for 1.
        dropout: rate on the input of A; 0 outside training.

    Returns:
        (..., out), in the precision of ``base``.
    """
    x = F.dropout(x, dropout) if dropout else x
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast:  # which casts by itself, and a shared pair only once
        lora_a, lora_bt = lora_a.to(x.dtype), lora_bt.to(x.dtype)
    hidden = F.linear(x, lora_a)
    if gate is None:
        hidden = hidden * scaling
    elif gate.ndim == 2:
        hidden = F.linear(hidden, (gate * scaling).to(hidden.dtype))
    else:
        hidden = (hidden * (gate * scaling)).to(hidden.dtype)
    return base + (hidden @ lora_bt).to(base.dtype)


class LowRankLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update.

    Args:
        base: the pretrained layer, of any kind that `is_linear` accepts. It is frozen here.
        lora_a: A, (rank, in). Several layers may share the same parameter (weight sharing, [D] section 4.3).
        lora_bt: B transposed, (rank, out); may be shared too.
        alpha: the update is scaled by alpha / rank.
        dropout: rate on the input of A while training.
        kernel: ``fused``, the autograd node of `diffora.kernels.fused`; ``plain``, PyTorch operations (`add_lowrank`);
            ``auto``, the faster of the two: ``plain`` on a GPU in fine-tuning without masks and gates, else ``fused``.
            All compute the same up to rounding and the drawing of dropout masks. torch.compile always gets ``plain``.

    Attributes:
        scaling: what the update is multiplied by, alpha / rank unless the caller sets another number.
        gate: an entry of the relaxed DAM, set from outside before each forward pass; or a trained parameter, (rank,)
            for SoRA's gates, (rank, rank) for FLoRA's core; or None.
        rows: the rows of A and of B^T that get a gradient in this step, or None for all ([R] Algorithm 1).
        weight_was_read: whether the model has computed with `weight` instead of calling the layer.
        split: number of leading examples (entries of dim 0 of x) that train A and B^T; the other examples train the
            gate, which must be a scalar. 0 trains the gate only. None trains everything that requires a gradient.
    """

    gate: Tensor | None
    rows: tuple[Tensor, Tensor] | None
    split: int | None

    # For transformers' `save_pretrained`: it saves one copy of a tensor that has several of these names. A and B may be
    # shared, and the base layer's weight may be an embedding too.
    _tied_weights_keys: ClassVar = {key: key for key in ("lora_a", "lora_bt", "base.weight", "base.bias")}

    def __init__(
        self,
        base: nn.Module,
        lora_a: nn.Parameter,
        lora_bt: nn.Parameter,
        alpha: float,
        dropout: float = 0.0,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        rank = lora_a.shape[0]
        n_in, n_out = features(base)
        expected = (rank, n_in), (rank, n_out)
        if (tuple(lora_a.shape), tuple(lora_bt.shape)) != expected:
            raise ValueError(f"A and B^T are {tuple(lora_a.shape)}, {tuple(lora_bt.shape)}; {base} needs {expected}")
        self.base = base.requires_grad_(False)
        self.lora_a = lora_a
        self.lora_bt = lora_bt
        self.rank = rank
        self.scaling = alpha / rank
        self.dropout = dropout
        self.kernel = kernel
        self.gate = None
        self.rows = None
        self.split = None
        self.merged = False
        self.weight_was_read = False
        self.training = base.training  # a model in eval mode stays in eval mode: no dropout
        self._transposed = is_conv1d(base)

    def forward(self, input: Tensor) -> Tensor:  # models may call linear(input=x)
        """(..., in) -> (..., out)."""
        x = input
        if self.merged:
            merged: Tensor = self.base(x)
            return merged
        # With a gate, masked entries of A and B would take part in the gate's gradient.
        assert self.gate is None or self.rows is None, "masks cannot be combined with a gate"
        if self._wants_plain(x):
            return self._plain(x)
        return self._fused(x)

    def _wants_plain(self, x: Tensor) -> bool:
        if self.kernel == "plain" or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return True
        # The node has no rules for torch.func (vmap, jvp), and gives A and B no gradient for a batch without tokens.
        if torch._C._are_functorch_transforms_active() or not x.numel():
            return True
        # On a fast GPU a small step takes as long as Python needs to start its operations, and a node in Python needs
        # longer than PyTorch's own: 18 to 20 % of a step on an H100. In the search it is not slower.
        return self.kernel == "auto" and x.is_cuda and self.gate is None and self.rows is None and self.split is None

    def _fused(self, x: Tensor) -> Tensor:
        lora_a, lora_bt = self._pair()
        gate = self.gate
        if gate is not None and gate.ndim:  # the node takes scalar gates; fold a vector or a matrix into B
            lora_bt, gate = gate_times(gate, lora_bt), None
        weight = bias = output = None
        if self.readable:
            frozen = self._modules["base"]._parameters  # type: ignore[union-attr]
            weight, bias = frozen["weight"], frozen["bias"]
            weight = weight.t() if self._transposed and weight is not None else weight
        else:
            output = self._base_output(x)
        return lowrank_linear(
            x,
            lora_a,
            lora_bt,
            self.scaling,
            weight=weight,
            bias=bias,
            base=output,
            gate=gate,
            dropout=self.dropout if self.training else 0.0,
            rows=self.rows,
            split=self.split,
        )

    def _plain(self, x: Tensor) -> Tensor:
        base, gate, split = self._base_output(x), self.gate, self.split
        lora_a, lora_bt = self._pair()
        if self.rows is not None:
            lora_a, lora_bt = train_rows(lora_a, self.rows[0]), train_rows(lora_bt, self.rows[1])
        dropout = self.dropout if self.training else 0.0
        if split is None:
            return add_lowrank(base, x, lora_a, lora_bt, self.scaling, gate, dropout)
        fixed_gate = None if gate is None else gate.detach()
        fixed_a, fixed_bt = lora_a.detach(), lora_bt.detach()
        first = add_lowrank(base[:split], x[:split], lora_a, lora_bt, self.scaling, fixed_gate, dropout)
        others = add_lowrank(base[split:], x[split:], fixed_a, fixed_bt, self.scaling, gate, dropout)
        return torch.cat([first, others])

    def _base_output(self, x: Tensor) -> Tensor:
        output: Any = self.base(x)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # sizes are not numbers there
            return output  # type: ignore[no-any-return]
        if not isinstance(output, Tensor) or output.shape != (*x.shape[:-1], self.lora_bt.shape[1]):
            raise UserError(
                f"a {type(self.base).__name__} gives something else than a linear layer does, a tensor (..., out) for "
                "(..., in): leave it out of the candidates"
            )
        return output

    def _pair(self) -> tuple[Any, Any]:
        own = self._parameters  # reading an attribute of a module takes as long as a small product
        lora_a, lora_bt = own.get("lora_a"), own.get("lora_bt")
        if lora_a is None or lora_bt is None:  # a replica, shard or parametrisation stores them elsewhere
            return self.lora_a, self.lora_bt
        return lora_a, lora_bt

    @property
    def readable(self) -> bool:
        """Whether the base layer only multiplies by a frozen weight that can be read.

        If not (quantised, pruned, hooks or accelerate's own ``forward``, trained weights), the layer is called and its
        output is used.
        """
        base: Any = self._modules["base"]
        own = base._parameters
        weight, bias = own.get("weight"), own.get("bias")
        return (
            (type(base) is nn.Linear or self._transposed)
            and "forward" not in base.__dict__
            and is_plain(weight)
            and weight.dtype in FLOATS
            and not weight.requires_grad
            and "bias" in own
            and (bias is None or not bias.requires_grad)
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not (base._backward_hooks or base._backward_pre_hooks)
        )

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise UserError(
                "a merged low-rank layer cannot be saved: its update would be added once more after loading; call "
                "unmerge() first"
            )
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise UserError(
                "a merged low-rank layer cannot load a state: its base weight would be replaced by one without the "
                "update; call unmerge() first"
            )
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """W + Delta W in the base layer's layout, for code that reads the weight instead of calling the layer.

        Values are computed when an operation needs them (`AdaptedWeight`), and gradients reach A and B. Dropout on the
        input of A is not applied. A quantised weight is returned without Delta W, because nothing can be added to it.
        """
        weight: Any = self.base.weight
        if self.merged or not (is_plain(weight) and weight.dtype in FLOATS):
            found: Tensor = weight
            return found
        return self._whole_weight() if torch.compiler.is_compiling() else AdaptedWeight(weight, self._whole_weight)

    def _whole_weight(self) -> Tensor:
        if self.rows is not None or self.split:
            raise UserError(
                "this model reads the weight of an adapted linear layer instead of calling the layer, so that gradient "
                "masks and a search that trains both levels in one pass cannot be applied to it"
            )
        weight: Any = self.base.weight
        if self.split == 0 and self.gate is not None:  # all examples train the gate only
            delta = gate_times(self.gate, self.lora_bt.detach()).T @ (self.lora_a.detach() * self.scaling)
        else:
            delta = self.delta()
        self.weight_was_read = True
        whole: Tensor = weight + (delta.T if self._transposed else delta).to(weight.dtype)
        return whole

    @property
    def in_features(self) -> int:
        return self.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_bt.shape[1]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        bias: Tensor | None = getattr(self.base, "bias", None)
        return bias

    def plain_pair(self) -> tuple[Tensor, Tensor]:
        """(A, B^T) of the same update with the gate folded into B, so that Delta W = s B A.

        Directions whose trained gate is zero are left out. The rank may therefore be smaller, down to 0.
        """
        if self.gate is None:
            return self.lora_a, self.lora_bt
        if isinstance(self.gate, nn.Parameter) and self.gate.ndim == 1:
            open_ = self.gate != 0
            return self.lora_a[open_], self.gate[open_].reshape(-1, 1) * self.lora_bt[open_]
        return self.lora_a, gate_times(self.gate, self.lora_bt)

    def delta(self) -> Tensor:
        """Delta W = s B diag(gate) A, or s B gate A, (out, in), in the parameters' dtype."""
        lora_a, lora_bt = self.plain_pair()
        return lora_bt.T @ (lora_a * self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Add Delta W to the base weight. A second call changes nothing.

        The base layer gets a new weight, because the old one may belong to another module too (tied embeddings).

        Raises:
            UserError: the base weight is quantised, or computed from others (pruned, parametrised).
        """
        if not self.merged:
            self._add_to_base(self.delta())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract Delta W again. The weight is restored up to rounding, if A and B have not changed since `merge`."""
        if self.merged:
            self._add_to_base(-self.delta())
            self.merged = False

    def check_mergeable(self, name: str = "this linear layer") -> None:
        """Raise a UserError if the base weight cannot be changed, because it is computed from other tensors."""
        if "weight" not in self.base._parameters:
            raise UserError(f"the weight of {name} is computed from other tensors and cannot be changed")

    def _add_to_base(self, delta: Tensor) -> None:
        weight = weight_of(self.base)
        self.check_mergeable()
        new = (weight + delta).to(weight.dtype)
        self.base.weight = nn.Parameter(new.T.contiguous() if self._transposed else new, requires_grad=False)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout}"


def gate_times(gate: Tensor, lora_bt: Tensor) -> Tensor:
    """B^T with the gate folded in: ``diag(gate) B^T`` for a scalar or (rank,) gate, ``gate^T B^T`` for (rank, rank)."""
    return gate.T @ lora_bt if gate.ndim == 2 else gate.reshape(-1, 1) * lora_bt


Layers = Sequence[Sequence["LowRankLinear | None"]]
"""An L x N grid of low-rank layers, None where a layer of the model has no module of that type."""


def set_gates(layers: Layers, gates: Tensor | None) -> None:
    """Set the gate of each layer of an L x N grid to its entry of ``gates``, (L, N), or remove the gates (None).

    A model may be on several devices: a gate is moved to the device of its layer.
    """
    rows = [[None] * len(row) for row in layers] if gates is None else [row.unbind() for row in gates]
    for row, values in zip(layers, rows, strict=True):
        for layer, gate in zip(row, values, strict=True):
            if layer is not None:
                layer.gate = gate if gate is None else gate.to(layer.lora_a.device)


def set_split(layers: Iterable[Iterable[LowRankLinear | None]], split: int | None) -> None:
    """Set how many leading examples train A and B in each layer of an L x N grid (`LowRankLinear.split`)."""
    for row in layers:
        for layer in row:
            if layer is not None:
                layer.split = split


def set_kernel(model: nn.Module, kernel: str) -> None:
    """Set the kernel of all low-rank layers of a model, one of `KERNELS` (see `LowRankLinear`)."""
    if kernel not in KERNELS:
        raise UserError(f"kernel={kernel!r} must be one of {', '.join(KERNELS)}")
    for _, layer in lowrank_layers(model):
        layer.kernel = kernel


def lowrank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """(full name, layer) for each low-rank layer of a model."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module
