"""Cross-entropy of the next token, with little memory."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.backbones.precision import full_precision
from diffora.tasks.ignored import IGNORED

LOGITS_AT_ONCE = 1 << 24
"""How many logits are converted to float32 at a time; they take 64 MiB."""


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next token.

    Args:
        logits: [n, length, vocabulary], in any precision.
        labels: [n, length], the token at the same position (not shifted), or `IGNORED`.

    Returns:
        (losses in float32 or better, 0 if there is no label; which tokens count), both [n, length]. Each entry is at
        the position before its token.
    """
    return aligned_losses(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED))


def aligned_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses` for labels that are already at the position that predicts them, as a decoder's targets are."""
    losses: Tensor = _TokenLoss.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return losses.view_as(labels), labels != IGNORED


class _TokenLoss(torch.autograd.Function):
    """`F.cross_entropy(full_precision(logits), labels, reduction="none")` without a float32 copy of all logits.

    With a vocabulary of 128,000, such copies are most of the memory of a step. Here only a few rows are converted at a
    time, and the gradient is computed in the precision of the logits. The second derivative needs a full-size copy.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        parts = [
            F.cross_entropy(full_precision(logits[part]), labels[part], reduction="none", ignore_index=IGNORED)
            for part in _slices(logits)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        grad = (grad * (labels != IGNORED)).unsqueeze(1)
        targets = labels.clamp(min=0).unsqueeze(1)
        if torch.is_grad_enabled():  # create_graph=True
            probabilities = full_precision(logits).softmax(1)
            return ((probabilities - torch.zeros_like(probabilities).scatter(1, targets, 1.0)) * grad).to(
                logits.dtype
            ), None
        result = torch.empty_like(logits)
        for part in _slices(logits):
            probabilities = full_precision(logits[part]).softmax(1)
            probabilities.scatter_add_(1, targets[part], torch.full_like(grad[part], -1.0))
            result[part] = probabilities.mul_(grad[part])
        return result, None


def _slices(logits: Tensor) -> Iterator[slice]:
    """Slices of rows that hold about `LOGITS_AT_ONCE` entries each."""
    rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
