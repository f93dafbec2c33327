"""One low-rank layer as one autograd node. It computes what `diffora.core.lowrank.add_lowrank` computes ([D] eq. 10).

    h = x W^T + b + dropout(x) A^T (s g B^T)

Compared with the plain formula it saves less for the backward pass and does less work:

- It saves x only if A needs a gradient, and A x (rank numbers per token) for the gradients of B and the gate.
- It computes only the gradients that are requested. Masked rows of A and B cost nothing.
- Without dropout it can fold the update into the weight, so that one product does the work of three (`folds`).
- Under autocast it saves x as it came and casts the frozen weight again in the backward pass, instead of saving copies.
- The dropout mask is one byte per element (`diffora.kernels.dropout`).

Shapes, for T tokens (all leading dimensions of x together) and rank r:

    x          (T, in)      weight W    (out, in)     lora_a A      (r, in)     gate g   a scalar
    y, base    (T, out)     bias b      (out,)        lora_bt B^T   (r, out)    scaling s = alpha / r
    hidden     (T, r)       dropout(x) A^T
    scaled_bt  (r, out)     s g B^T
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.kernels.dropout import drop, kept_share, noise_like, threshold_of
from diffora.kernels.inputs import input_to_save, saved_input

FOLD_FROM = 4.0
"""Fold the update into the weight from this many tokens per feature on the weight's other side.

Measured on CPUs at widths of 384 to 3072 and 256 to 4096 tokens. Below one token per feature folding is up to 20 %
slower, at two or three it makes no difference, and above five it is 2 to 5 % faster.
"""

FULL = (torch.float32, torch.float64)

NARROW = 4
"""Up to this rank, A x is computed as (A x^T)^T on CPUs in full precision, where rows of a few columns are slow."""


class Settings(NamedTuple):
    """Non-tensor settings of one call.

    Attributes:
        scaling: alpha / rank, over the share of elements that dropout keeps.
        threshold: random bytes below it drop an element; 0 for no dropout.
        rows: rows of A and of B^T that get a gradient, or None for all.
        split: number of leading examples that train A and B; the others train the gate. None: all train everything.
        dtype: of the products: the dtype of x, or autocast's.
        training: whether a backward pass may follow.
    """

    scaling: float
    threshold: int
    rows: tuple[Tensor, Tensor] | None
    split: int | None
    dtype: torch.dtype
    training: bool


class Tensors(NamedTuple):
    """The tensor arguments of the node, in their order. The gradients come back in the same order."""

    x: Any
    weight: Any
    bias: Any
    base: Any
    lora_a: Any
    lora_bt: Any
    gate: Any


class Saved(NamedTuple):
    """What the forward pass saves for the backward pass."""

    x: Any
    noise: Any
    hidden: Any
    scaled_bt: Any
    weight: Any
    lora_a: Any
    lora_bt: Any
    gate: Any


def lowrank_linear(
    x: Tensor,
    lora_a: Tensor,
    lora_bt: Tensor,
    scaling: float,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    rows: tuple[Tensor, Tensor] | None = None,
    split: int | None = None,
) -> Tensor:
    """The output of a low-rank layer.

    Args:
        x: (..., in).
        lora_a, lora_bt: A, (rank, in), and B transposed, (rank, out).
        scaling: alpha / rank.
        weight, bias: (out, in), (out,) of the frozen layer; they get no gradient.
        base: (..., out), the frozen layer's output, in place of a weight that cannot be read.
        gate: a scalar, or None for 1.
        dropout: rate on the input of A, rounded to the nearest 1/256 and scaled accordingly.
        rows: compute gradients for ``rows[0]`` of A and ``rows[1]`` of B^T only; the others are zero ([R] Algorithm 1).
            Not together with a gate.
        split: number of leading entries of dim 0 of x that train A and B; the others train the gate. None: all entries
            train everything that requires a gradient.

    Returns:
        (..., out). It can be differentiated twice, unless ``rows`` or ``split`` is given.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    threshold = threshold_of(dropout)
    settings = Settings(scaling / kept_share(threshold), threshold, rows, split, dtype, torch.is_grad_enabled())
    tensors = x, weight, bias, base, lora_a, lora_bt, gate
    if not autocast:
        return LowRankNode.apply(settings, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    with torch.autocast(device, enabled=False):  # the node casts by itself
        return LowRankNode.apply(settings, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def folds(tokens: int, crossed: int, settings: Settings) -> bool:
    """Whether to fold the update into the weight.

    Folding takes r x in x out operations for any number of tokens. Adding the update takes r x tokens x out in the
    forward pass, and r x tokens x in in the backward pass. So tokens / ``crossed`` decides.

    Args:
        tokens: T.
        crossed: features on the other side of the weight: in for the forward pass, out for the backward pass.
    """
    # Not in half precision, where the rounding of the weight would swallow the update.
    return not settings.threshold and settings.dtype in FULL and tokens >= FOLD_FROM * crossed


class LowRankNode(torch.autograd.Function):
    """The autograd node; see the head of this file. Call `lowrank_linear`."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Any) -> Tensor:
        x, weight, bias, base, lora_a, lora_bt, gate = tensors
        dtype = settings.dtype
        flat, a = cast(flatten(x), dtype), cast(lora_a, dtype)
        scaled_bt = scaled(cast(lora_bt, dtype), gate, settings)
        noise = noise_like(flat) if settings.threshold else None
        fold = weight is not None and folds(len(flat), flat.shape[1], settings)
        hidden: Any = None
        if settings.training or not fold:
            hidden = narrow_linear(dropped(flat, noise, settings), a)
        if fold:
            y = F.linear(flat, torch.addmm(weight, scaled_bt.t(), a), bias)
        elif weight is not None:
            y = hidden.mm(scaled_bt) if bias is None else torch.addmm(cast(bias, dtype), hidden, scaled_bt)
            torch.addmm(y, flat, cast(weight, dtype).t(), out=y)  # torch counts no operations of y.addmm_
        else:
            y = torch.addmm(flatten(base), cast(hidden, base.dtype), cast(scaled_bt, base.dtype))
        if settings.training:
            keep, ctx.gelu = None, None
            if Tensors(*ctx.needs_input_grad[1:]).lora_a and settings.split != 0:
                # In the search, which has gates, memory matters more than the time to apply a GELU again.
                recompute = gate is not None or settings.split is not None
                keep, ctx.gelu = input_to_save(x, settings.split, recompute)
            ctx.settings, ctx.shape, ctx.dtype = settings, x.shape, x.dtype
            ctx.save_for_backward(*Saved(keep, noise, hidden, scaled_bt, weight, lora_a, lora_bt, gate))
        # Some backbones change the output in place. A view that is made in here could not be changed.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        saved = Saved(*ctx.saved_tensors)  # once: checkpointing unpacks only once
        if torch.is_grad_enabled():
            return None, *differentiable_gradients(ctx, saved, grad_y)
        device = grad_y.device.type
        if not torch.is_autocast_enabled(device):
            return None, *gradients(ctx, saved, grad_y)
        with torch.autocast(device, enabled=False):
            return None, *gradients(ctx, saved, grad_y)


def gradients(ctx: Any, saved: Saved, grad_y: Tensor) -> Tensors:
    """The gradients that are requested; the others are None."""
    settings: Settings = ctx.settings
    needs = Tensors(*ctx.needs_input_grad[1:])
    grad = cast(flatten(grad_y), settings.dtype)
    trained = trained_tokens(len(grad), ctx.shape[0], settings)
    grad_x = grad_hidden = grad_a = None
    if needs.x:
        flat_grad_x, grad_hidden = gradient_of_x(saved, grad, settings)
        grad_x = cast(flat_grad_x.view(ctx.shape), ctx.dtype)
    if needs.lora_a and trained:
        x = cast(flatten(saved_input(saved.x, ctx.gelu, settings.split)), settings.dtype)
        grad_a = gradient_of_a(saved, x, grad[:trained], grad_hidden, settings)
    grad_bt, grad_gate = gradients_of_bt_and_gate(saved, grad, trained, needs, settings)
    return Tensors(grad_x, None, None, grad_y if needs.base else None, grad_a, grad_bt, grad_gate)


def gradient_of_x(saved: Saved, grad: Tensor, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """(gradient of x, (T, in); gradient of hidden, (T, r), or None where the update was folded into the weight)."""
    weight, scaled_bt = saved.weight, saved.scaled_bt
    a = cast(saved.lora_a, settings.dtype)
    if weight is not None and folds(len(grad), grad.shape[1], settings):
        return grad.mm(torch.addmm(weight, scaled_bt.t(), a)), None
    grad_hidden = narrow_linear(grad, scaled_bt)
    grad_x = dropped(grad_hidden.mm(a), saved.noise, settings)
    if weight is not None:  # if not, the gradient of x through the frozen layer comes through base
        torch.addmm(grad_x, grad, cast(weight, settings.dtype), out=grad_x)
    return grad_x, grad_hidden


def gradient_of_a(saved: Saved, x: Tensor, grad: Tensor, grad_hidden: Tensor | None, settings: Settings) -> Tensor:
    """The gradient of A, (r, in).

    Args:
        x, grad: of the tokens that train A.
        grad_hidden: of all tokens, where `gradient_of_x` has computed it.
    """
    rows = None if settings.rows is None else settings.rows[0]
    if grad_hidden is None:
        grad_hidden = narrow_linear(grad, saved.scaled_bt if rows is None else saved.scaled_bt[rows])
    else:
        grad_hidden = grad_hidden[: len(grad)]
        grad_hidden = grad_hidden if rows is None else grad_hidden[:, rows]
    noise = None if saved.noise is None else saved.noise[: len(grad)]
    return whole_gradient(grad_hidden.t().mm(dropped(x, noise, settings)), saved.lora_a, rows)


def gradients_of_bt_and_gate(
    saved: Saved, grad: Tensor, trained: int, needs: Tensors, settings: Settings
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of B^T, (r, out); gradient of the gate), both from hidden^T grad, (r, out)."""
    grad_bt = grad_gate = product = None
    if needs.lora_bt and trained:
        rows = None if settings.rows is None else settings.rows[1]
        hidden = saved.hidden[:trained]
        product = (hidden if rows is None else hidden[:, rows]).t().mm(grad[:trained])
        grad_bt = whole_gradient(scaled(product, saved.gate, settings), saved.lora_bt, rows)
    if needs.gate:
        if settings.split is not None:  # the other tokens train the gate
            product = saved.hidden[trained:].t().mm(grad[trained:])
        elif product is None:
            product = saved.hidden.t().mm(grad)
        inner = (scaled(product, None, settings) * saved.lora_bt).sum()
        grad_gate = inner.to(saved.gate.dtype).view_as(saved.gate)
    return grad_bt, grad_gate


def differentiable_gradients(ctx: Any, saved: Saved, grad_y: Tensor) -> Tensors:
    """The same gradients by the plain formula, as a graph of their own, for derivatives of higher order."""
    settings: Settings = ctx.settings
    needs = Tensors(*ctx.needs_input_grad[1:])
    if saved.x is None or settings.split is not None or settings.rows is not None:
        raise RuntimeError("low-rank layers with masks, a split or no gradient of A cannot be differentiated twice")
    x = saved_input(saved.x, ctx.gelu)
    inputs = Tensors(x, None, None, None, saved.lora_a, saved.lora_bt, saved.gate)
    # Views, because x may have been computed from the same A, whose gradient through x is not of this node.
    inputs = Tensors(*(t.view_as(t) if t is not None and need else t for t, need in zip(inputs, needs, strict=True)))
    x = inputs.x.to(settings.dtype)
    kept = x if saved.noise is None else torch.where(saved.noise.view_as(x) >= settings.threshold, x, 0)
    scaled_bt = scaled(inputs.lora_bt.to(settings.dtype), inputs.gate, settings)
    y = F.linear(kept, inputs.lora_a.to(settings.dtype)) @ scaled_bt
    if saved.weight is not None:
        y = y + F.linear(x, saved.weight.to(settings.dtype))
    wanted = [name for name, t in inputs._asdict().items() if t is not None and getattr(needs, name)]
    found = torch.autograd.grad(
        y.to(grad_y.dtype), [getattr(inputs, name) for name in wanted], grad_y, create_graph=True, allow_unused=True
    )
    none = Tensors(None, None, None, grad_y if needs.base else None, None, None, None)
    return none._replace(**dict(zip(wanted, found, strict=True)))


def trained_tokens(tokens: int, examples: int, settings: Settings) -> int:
    """How many leading tokens train A and B: those of the first ``split`` examples."""
    return tokens if settings.split is None else tokens // max(1, examples) * settings.split


def dropped(x: Tensor, noise: Tensor | None, settings: Settings) -> Tensor:
    """x with the dropped elements set to 0. `Settings.scaling` includes the factor for what is kept."""
    return x if noise is None else drop(x, cast(noise, x.dtype), settings.threshold)


def whole_gradient(part: Tensor, matrix: Tensor, rows: Tensor | None) -> Tensor:
    """The gradient of a matrix from that of its trained rows: zero in the others."""
    part = cast(part, matrix.dtype)
    return part if rows is None else torch.zeros_like(matrix).index_copy_(0, rows, part)


def scaled(x: Tensor, gate: Tensor | None, settings: Settings) -> Tensor:
    """x times scaling times gate."""
    if gate is not None:
        return x * (gate * settings.scaling).to(x.dtype)
    return x if settings.scaling == 1 else x * settings.scaling


def narrow_linear(x: Tensor, factor: Tensor) -> Tensor:
    """x factor^T, (T, r), for a factor of few rows."""
    if len(factor) <= NARROW and x.device.type == "cpu" and x.dtype in FULL:
        return factor.mm(x.t()).t()
    return F.linear(x, factor)


def flatten(x: Tensor) -> Tensor:
    """(..., d) as (T, d)."""
    return x.reshape(-1, x.shape[-1])


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype. If x has it already, torch is not called."""
    return x if x.dtype == dtype else x.to(dtype)
