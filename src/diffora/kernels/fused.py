"""The low-rank layers' hot path: one autograd node for all layers that read the same input.

It computes what `diffora.core.lowrank.add_lowrank` computes, with less work around it:

- **Folding.** Without dropout, ``x (W + s B A)^T`` is one product. Folding costs the weight's size, adding the update
  costs the output's size; the backward pass has the same choice for the gradient of x. `folds` chooses each.
- **Peers.** Query, key and value read one x: A x and the gradients of A are one product for all of them, and the
  gradient of x is summed up in place. Under dropout they share one mask.
- **Only what is asked.** x is kept for the gradient of A alone, A x (rank numbers a token) for those of B and the
  gate, and no product is formed for a gradient that nobody wants. Under autocast x is kept as it came, not as a copy
  for each layer, and the frozen weights are cast again in the backward pass instead of being kept twice.
- **Cheap dropout.** See `diffora.kernels.dropout`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.kernels.dropout import drop, kept_share, noise_like, threshold_of
from diffora.kernels.peers import saved_tensor_hooks

FOLD_FROM = 4.0
"""Fold the update into the weight from so many tokens for each feature on the weight's other side.

Measured on CPUs at widths of 384 to 3072 and 256 to 4096 tokens: folding is up to 20 % slower below one token for each
such feature, level at two or three, and 2 to 5 % faster above five.
"""

FULL = (torch.float32, torch.float64)

NARROW = 4
"""Up to this rank, A x is formed as (A x^T)^T on CPUs: rows of a few columns are slow there."""


class Member(NamedTuple):
    """A low-rank layer as its node sees it: h = W x + b + scaling * B (gate * A x).

    Attributes:
        weight, bias: (out, in), (out,) of the frozen layer, where they can be read; or
        base: (..., out), its output, where they cannot.
        lora_a, lora_bt: (rank, in), (rank, out).
        gate: a scalar, or None for 1.
        scaling: alpha / rank.
        rows: gradients for ``rows[0]`` of A and ``rows[1]`` of B^T only; the others are zero. Not with a gate.
    """

    weight: Tensor | None
    bias: Tensor | None
    base: Tensor | None
    lora_a: Tensor
    lora_bt: Tensor
    gate: Tensor | None
    scaling: float
    rows: tuple[Tensor, Tensor] | None = None


N_TENSORS = 6
"""So many of a member's entries are tensors; they come first."""


class _Plan(NamedTuple):
    """What of the members is not a tensor that autograd may ask a gradient of, and how the node goes about it."""

    scalings: list[float]
    rows: list[tuple[Tensor, Tensor] | None]
    threshold: int
    split: int | None
    dtype: torch.dtype
    keep: bool
    lean: bool


def lowrank_linear(
    x: Tensor, members: Sequence[Member], dropout: float = 0.0, split: int | None = None
) -> tuple[Tensor, ...]:
    """The outputs of low-rank layers that read the same x.

    Args:
        x: (..., in).
        members: the layers.
        dropout: rate on the input of every A, to the nearest 1/256 and scaled accordingly; one mask for all members.
        split: how many leading entries of dim 0 of x train A and B; the others train the gates. None: whatever
            requires a gradient.

    Returns:
        (..., out) of each member. Differentiable twice, but for layers with ``rows`` or ``split``.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    threshold = threshold_of(dropout)
    scalings, rows = [], []
    tensors: list[Any] = []
    for m in members:
        tensors += m[:N_TENSORS]
        scalings.append(m.scaling)
        rows.append(m.rows)
    lean = split is not None or members[0].gate is not None
    plan = _Plan(scalings, rows, threshold, split, dtype, torch.is_grad_enabled(), lean)
    if not autocast:
        return _Node.apply(plan, x, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    with torch.autocast(device, enabled=False):
        return _Node.apply(plan, x, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def folds(tokens: int, crossed: int, plan: _Plan) -> bool:
    """Whether the update is folded into the weight.

    Args:
        tokens: rows of x, or of the gradient.
        crossed: features on the other side of the weight: in for the forward pass, out (of all members) for the
            backward pass. Adding the update instead goes over tokens x features on this side.
    """
    # In half precision the update would drown in the rounding of the weight that it is added to.
    return not plan.threshold and plan.dtype in FULL and tokens >= FOLD_FROM * crossed


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        dtype, threshold = plan.dtype, plan.threshold
        flat = _cast(x.reshape(-1, x.shape[-1]), dtype)
        noise = noise_like(flat) if threshold else None
        fold = _readable(tensors) and folds(len(flat), flat.shape[1], plan)
        factors = [_cast(lora_a, dtype) for lora_a in tensors[3::N_TENSORS]]
        hidden = None
        parts: Sequence[Any] = [None] * len(factors)
        if plan.keep or not fold:
            dropped = flat if noise is None else drop(flat, _cast(noise, dtype), threshold)
            hidden = _narrow(dropped, _joint(factors))
            parts = [hidden] if len(factors) == 1 else torch.split(hidden, [len(lora_a) for lora_a in factors], 1)
        outputs, updates = [], []
        for i, (lora_a, part) in enumerate(zip(factors, parts, strict=True)):
            weight, bias, base, _, lora_bt, gate = tensors[N_TENSORS * i : N_TENSORS * i + N_TENSORS]
            update = _scaled(_cast(lora_bt, dtype), gate, plan.scalings[i], threshold)
            if weight is None:
                flat_base = base.reshape(-1, base.shape[-1])
                y = torch.addmm(flat_base, _cast(part, base.dtype), _cast(update, base.dtype))
            elif fold:
                y = F.linear(flat, torch.addmm(weight, update.t(), lora_a), bias)
            else:
                y = F.linear(flat, _cast(weight, dtype), None if bias is None else _cast(bias, dtype))
                torch.addmm(y, part, update, out=y)  # as y.addmm_, which torch's counter of operations does not see
            # A view made in here could not be changed in place, which some backbones do.
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
            updates.append(update)
        if plan.keep:
            ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
            kept, ctx.gelu = None, None
            if True in ctx.needs_input_grad[5::N_TENSORS] and plan.split != 0:  # of any A
                kept, ctx.gelu = _kept(x, plan)
            held = list(tensors)
            held[2::N_TENSORS] = [None] * len(factors)  # a base that was computed is as large as the output
            ctx.save_for_backward(kept, noise, hidden, *updates, *held)
            ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # checkpointing unpacks only once
        if torch.is_grad_enabled():
            return None, *_differentiable(ctx, saved, grads)
        device = saved[2].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return None, *_backward(ctx, saved, grads)
        return None, *_backward(ctx, saved, grads)


def _backward(ctx: Any, saved: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of x and of each member's tensors."""
    plan: _Plan = ctx.plan
    needs, dtype, count = ctx.needs_input_grad[1:], plan.dtype, len(plan.scalings)
    kept, noise, hidden, *rest = saved
    updates, tensors = rest[:count], rest[count:]
    tokens = len(hidden)
    # Tokens of the examples that train A and B; the others train the gate.
    trained = tokens if plan.split is None else tokens // max(1, ctx.shape[0]) * plan.split
    fold = _readable(tensors) and folds(tokens, sum([update.shape[1] for update in updates]), plan)
    result: list[Tensor | None] = [None] * len(needs)
    grad_x: Tensor | None = None
    through: list[Tensor] = []  # gradients of A x, for that of x
    factors: list[Tensor] = []
    into: list[Tensor] = []  # and for those of A
    into_members: list[int] = []
    ranks = [len(lora_a) for lora_a in tensors[3::N_TENSORS]]
    parts = [hidden] if count == 1 else torch.split(hidden, ranks, 1)
    for i, (grad, part, update) in enumerate(zip(grads, parts, updates, strict=True)):
        if grad is None:
            continue
        at = N_TENSORS * i
        weight, _, _, lora_a, lora_bt, gate = tensors[at : at + N_TENSORS]
        _, _, needs_base, needs_a, needs_bt, needs_gate = needs[at + 1 : at + 1 + N_TENSORS]
        rows = plan.rows[i]
        if needs_base:
            result[at + 3] = grad
        grad = _cast(grad.reshape(-1, grad.shape[-1]), dtype)
        whole: Any = None
        if needs[0]:
            if fold:
                matrix: Any = torch.addmm(weight, update.t(), _cast(lora_a, dtype))
            else:
                matrix = None if weight is None else _cast(weight, dtype)
                whole = _narrow(grad, update)
                through.append(whole)
                factors.append(_cast(lora_a, dtype))
            if matrix is not None:
                grad_x = grad.mm(matrix) if grad_x is None else torch.addmm(grad_x, grad, matrix, out=grad_x)
        first = grad if plan.split is None else grad[:trained]
        if needs_a and trained:
            if whole is None:
                own = _narrow(first, update if rows is None else update[rows[0]])
            else:
                own = whole if plan.split is None else whole[:trained]
                own = own if rows is None else own[:, rows[0]]
            into.append(own)
            into_members.append(i)
        needs_bt = needs_bt and trained > 0
        product: Any = None
        if needs_bt or (needs_gate and plan.split is None):
            columns: Any = part if plan.split is None else part[:trained]
            columns = columns if rows is None else columns[:, rows[1]]
            product = columns.t().mm(first)
            if needs_bt:
                result[at + 5] = _placed(_scaled(product, gate, plan.scalings[i], plan.threshold), lora_bt, rows, 1)
        if needs_gate:
            if plan.split is not None:
                product = part[trained:].t().mm(grad[trained:])
            product = _scaled(product, None, plan.scalings[i], plan.threshold)
            result[at + 6] = (product * lora_bt).sum().to(gate.dtype).view_as(gate)
    random = None if noise is None else _cast(noise, dtype)
    if through:
        back, factor = _joint(through, 1), _joint(factors)
        if random is not None:
            back = drop(back.mm(factor), random, plan.threshold)
            grad_x = back if grad_x is None else grad_x.add_(back)
        else:
            grad_x = back.mm(factor) if grad_x is None else torch.addmm(grad_x, back, factor, out=grad_x)
    if into:
        if ctx.gelu is not None:
            kept = F.gelu(kept[: plan.split], approximate=ctx.gelu)  # all of it without a split
        x = _cast(kept.reshape(-1, kept.shape[-1]), dtype)
        if random is not None:
            x = drop(x, random if plan.split is None else random[:trained], plan.threshold)
        product = _joint(into, 1).t().mm(x)
        pieces = [product] if len(into) == 1 else torch.split(product, [own.shape[1] for own in into])
        for i, piece in zip(into_members, pieces, strict=True):
            result[N_TENSORS * i + 4] = _placed(piece, tensors[N_TENSORS * i + 3], plan.rows[i], 0)
    if grad_x is not None:
        result[0] = _cast(grad_x.view(ctx.shape), ctx.dtype)
    return result


def _differentiable(ctx: Any, saved: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same gradients by the plain formula, as a graph of their own, for derivatives of higher order."""
    plan: _Plan = ctx.plan
    needs = ctx.needs_input_grad[1:]
    kept, noise, _, *rest = saved
    if kept is None or plan.split is not None or any(plan.rows):
        raise RuntimeError("low-rank layers with masks, a split or no gradient of A cannot be differentiated twice")
    dtype, threshold = plan.dtype, plan.threshold
    if ctx.gelu is not None:
        kept = F.gelu(kept, approximate=ctx.gelu)
    # By the tensors as this node reads them: x may have been computed from the same A, which gets that share later.
    inputs = [kept, *rest[len(plan.scalings) :]]
    wanted = [i for i, need in enumerate(needs) if need and inputs[i] is not None]
    for i in wanted:
        inputs[i] = inputs[i].view_as(inputs[i])
    x = inputs[0].to(dtype)
    dropped = x if noise is None else torch.where(noise.view_as(x) >= threshold, x, 0)
    result: list[Tensor | None] = [None] * len(inputs)
    outputs, given = [], []
    for i, grad in enumerate(grads):
        if grad is None:
            continue
        at = N_TENSORS * i
        weight, _, _, lora_a, lora_bt, gate = inputs[at + 1 : at + 1 + N_TENSORS]
        if needs[at + 3]:
            result[at + 3] = grad  # of base
        update = _scaled(lora_bt.to(dtype), gate, plan.scalings[i], threshold)
        y = F.linear(dropped, lora_a.to(dtype)) @ update
        outputs.append((y if weight is None else y + F.linear(x, weight.to(dtype))).to(grad.dtype))
        given.append(grad)
    found = torch.autograd.grad(outputs, [inputs[i] for i in wanted], given, create_graph=True, allow_unused=True)
    for i, grad in zip(wanted, found, strict=True):
        result[i] = grad
    return result


def _kept(x: Tensor, plan: _Plan) -> tuple[Tensor, str | None]:
    """What to keep for the gradient of A, and the kind of GELU that makes x of it, or None.

    In the search (``lean``) nothing is added to what a GELU before the layer keeps itself: it is applied again.
    """
    source: Any = x.grad_fn
    # Inside a checkpoint what is saved cannot be looked at; a changed x is no longer what GELU made.
    if plan.lean and type(source).__name__ == "GeluBackward0" and not x._version and saved_tensor_hooks() is None:
        return source._saved_self, source._saved_approximate
    # A view of a part would keep all of x alive.
    return (x if plan.split is None else x[: plan.split].clone()), None


def _readable(tensors: Sequence[Any]) -> bool:
    return all(weight is not None for weight in tensors[::N_TENSORS])


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _scaled(x: Tensor, gate: Tensor | None, scaling: float, threshold: int) -> Tensor:
    """x times gate times scaling, over the share of elements that dropout keeps."""
    scaling /= kept_share(threshold)
    if gate is not None:
        return x * (gate * scaling).to(x.dtype)
    return x if scaling == 1 else x * scaling


def _narrow(x: Tensor, factor: Tensor) -> Tensor:
    """x factor^T, (tokens, rank), for a factor of few rows."""
    if len(factor) <= NARROW and x.device.type == "cpu":
        return factor.mm(x.t()).t()
    return F.linear(x, factor)


def _joint(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _placed(part: Tensor, like: Tensor, rows: tuple[Tensor, Tensor] | None, which: int) -> Tensor:
    """The gradient ``part`` of some rows, or of all, as a gradient of the whole."""
    part = _cast(part, like.dtype)
    return part if rows is None else torch.zeros_like(like).index_copy_(0, rows[which], part)
