"""Attention for training in bfloat16 on a CPU.

There torch's `scaled_dot_product_attention` computes in float32 if attention has dropout, with casts of all its inputs
and outputs. Without dropout it runs many small products, each of which oneDNN compiles for each width. Three operations
on whole batches are quicker: in bfloat16, with softmax's sums in float32, as torch's softmax has them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffora.kernels.dropout import cheap_dropout

NAME = "diffora_bfloat16"
WIDEST = 256
"""Without dropout, torch's attention is used above this width: it saves less memory."""


def use_bfloat16_attention(model: nn.Module) -> None:
    """Let a transformers model that calls `scaled_dot_product_attention` call `attention`. Other models do not change.

    Call it for training in bfloat16 on a CPU. Exported configurations do not name it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface  # takes seconds
    from transformers.masking_utils import sdpa_mask

    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as an attention function of transformers.

    It is computed here for training in bfloat16 on a CPU, and by transformers in every other case.

    Args:
        module: the layer's attention.
        query, key, value: (rows, heads, tokens, features).
        attention_mask: True where a query may see a key, or a number that is added to the scores; in a shape that can
            be broadcast to (rows, heads, tokens, tokens). None: all are seen.
        dropout: rate on the attention weights.
        scaling: of the scores; None: 1 / sqrt(features).
        is_causal: whether a query sees earlier keys only, where there is no mask; None: as the module says.
        others: more arguments of transformers.

    Returns:
        ((rows, tokens, heads, features), None)
    """
    if is_causal is None:
        is_causal = attention_mask is None and getattr(module, "is_causal", True)
    special = is_causal or any(other is not None and other is not False for other in others.values())
    if special or not _suits(query, key, dropout):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return found
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(-1, -2)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    if dropout:
        weights = cheap_dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _suits(query: Tensor, key: Tensor, dropout: float) -> bool:
    return (
        query.dtype == key.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[1] == key.shape[1]
        # With dropout also in frozen layers below the lowest adapter, where torch's attention takes four times as long.
        and (dropout > 0 or (query.requires_grad and key.shape[2] <= WIDEST))
    )
