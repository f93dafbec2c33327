"""One pass for both levels of the search: the first examples train A and B, the others train the gates.

A module that is applied to the examples themselves only needs to know how many come first (`LowRankLinear.split`).
DeBERTa's projections are also applied to a table of relative positions that all examples share. The table is projected
twice: once for the first examples, once for the others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.lowrank import Layers, LowRankLinear, lowrank_layers, set_split

TABLE_METHODS = ("disentangled_attention_bias", "disentangled_att_bias")
"""Methods of attention modules that project a table shared by all examples: DeBERTa-v2's (and v3's) and DeBERTa's.

Called with (query, key, relative_pos, table, scale); dim 0 of query and key is the examples, or examples times heads.
"""


@dataclass(frozen=True)
class SharedTable:
    """A method of `TABLE_METHODS`, and the low-rank layers that it applies to the table."""

    module: nn.Module
    method: str
    layers: list[LowRankLinear]


def shared_tables(model: nn.Module) -> list[SharedTable]:
    """The places of a model where low-rank layers are applied to a table that all examples share."""
    found = [
        SharedTable(module, method, [layer for _, layer in lowrank_layers(module)])
        for module in model.modules()
        for method in TABLE_METHODS
        if hasattr(module, method)
    ]
    return [table for table in found if table.layers]


@contextmanager
def tables_noted(model: nn.Module) -> Iterator[list[bool]]:
    """Inside this context, the list that it gives has an entry while the model projects a table of `TABLE_METHODS`."""
    inside: list[bool] = []

    def noted(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inside.append(True)
        try:
            return method(*args, **kwargs)
        finally:
            inside.pop()

    places = [(module, name) for module in model.modules() for name in TABLE_METHODS if hasattr(module, name)]
    for module, name in places:
        setattr(module, name, partial(noted, getattr(module, name)))
    try:
        yield inside
    finally:
        for module, name in places:
            delattr(module, name)  # the method of the class is visible again


@contextmanager
def divided(layers: Layers, tables: Sequence[SharedTable], n_train: int, n: int) -> Iterator[None]:
    """Inside this context, the first ``n_train`` examples of a batch train A and B, and the others train the gates.

    Run the backward pass inside too, because it computes checkpointed activations again.

    Args:
        layers: an L x N grid of layers whose gates are set.
        tables: the `shared_tables` of their model.
        n_train: number of leading examples. 0: all train the gates; n: all train A and B.
        n: number of examples in all.
    """
    set_split(layers, n_train)
    for table in tables:
        method = partial(_once_for_each_kind, getattr(table.module, table.method), table.layers, n_train, n)
        setattr(table.module, table.method, method)
    try:
        yield
    finally:
        for table in tables:
            delattr(table.module, table.method)  # the method of the class is visible again
        set_split(layers, None)


def _once_for_each_kind(
    method: Callable[..., Tensor],
    layers: Sequence[LowRankLinear],
    n_train: int,
    n: int,
    query: Tensor,
    key: Tensor,
    *rest: Any,
) -> Tensor:
    """Call a table method for the first examples, then for the others, with `LowRankLinear.split` set for each."""
    each = len(query) // n
    sizes = [each * n_train, each * (n - n_train)]
    biases = []
    # Dim 0 of the table is 1: it counts as one example, which trains A and B in the first call and not in the second.
    for split, queries, keys in zip((1, 0), torch.split(query, sizes), torch.split(key, sizes), strict=True):
        if len(queries):
            set_split([layers], split)
            biases.append(method(queries, keys, *rest))
    set_split([layers], n_train)
    return torch.cat(biases)


def mixed_modules(model: nn.Module, losses: Callable[[], tuple[Tensor, Tensor]], n: int) -> list[str]:
    """Full names of the low-rank layers that mix the two kinds of examples. For them, one pass would be wrong.

    A layer is fine if its input has one entry of dim 0 per example, or belongs to one kind as a whole, and if the loss
    of one kind has no gradient in the entries of the other kind. This costs two backward passes.

    Args:
        losses: runs the model once under `divided` and returns (loss of the first examples, loss of the others).
        n: number of examples of both kinds together.
    """
    found: dict[str, None] = {}
    calls: list[tuple[str, int, Tensor]] = []

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        split, entries = layer.split, len(args[0])
        assert isinstance(split, int)
        if entries == n or split in (0, entries):
            calls.append((name, split, output))
        else:
            found[name] = None

    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in lowrank_layers(model)]
    try:
        train_loss, valid_loss = losses()
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [output for _, _, output in calls]
    if not outputs:
        return list(found)
    from_train, from_valid = (
        torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True) for loss in (train_loss, valid_loss)
    )
    for (name, split, _), train, valid in zip(calls, from_train, from_valid, strict=True):
        strange = (train, slice(split, None)), (valid, slice(split))
        if any(grad is not None and bool(grad[entries].nan_to_num().any()) for grad, entries in strange):
            found[name] = None
    return list(found)
