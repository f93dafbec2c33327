"""One pass over two kinds of examples: the first ones' loss trains A and B, the others' loss the gates.

For a module that is applied to the examples themselves it is enough to say how many are of the first kind
(`LowRankLinear.split`). DeBERTa's projections are also applied to a table of relative positions that all examples
share; there the table goes through them once for each kind.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.lowrank import LowRankLinear, lowrank_layers, set_split

Layers = Sequence[Sequence[LowRankLinear]]

TABLE_METHODS = ("disentangled_attention_bias", "disentangled_att_bias")
"""Methods of attention modules that project a table shared by all examples: DeBERTa-v2's (and v3's) and DeBERTa's.

Called with (query, key, relative_pos, table, scale); dim 0 of query and key is the examples, or examples times heads.
"""


@dataclass(frozen=True)
class Table:
    """A table method, and the low-rank layers that it applies to the table."""

    module: nn.Module
    method: str
    layers: list[LowRankLinear]


def shared_tables(model: nn.Module) -> list[Table]:
    """Where in a model low-rank layers are applied to a table that all examples share."""
    found = [
        Table(module, method, [layer for _, layer in lowrank_layers(module)])
        for module in model.modules()
        for method in TABLE_METHODS
        if hasattr(module, method)
    ]
    return [table for table in found if table.layers]


@contextmanager
def divided(layers: Layers, tables: Sequence[Table], n_train: int, n: int) -> Iterator[None]:
    """While it lasts, batches are ``n_train`` examples that train A and B, then those that train the gates.

    The backward pass belongs inside, since checkpointed activations are computed anew there.

    Args:
        layers: an L x N grid; their gates are set.
        tables: of the model that holds them.
        n_train, n: leading examples, and examples in all. With ``n_train=0`` or ``n`` all are of one kind.
    """
    set_split(layers, n_train)
    for table in tables:
        method = partial(_once_for_each_kind, getattr(table.module, table.method), table.layers, n_train, n)
        setattr(table.module, table.method, method)
    try:
        yield
    finally:
        for table in tables:
            delattr(table.module, table.method)  # what the class has shows again
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
    """A table method, for the two kinds of examples one after the other, with the layers told whose turn it is."""
    each = len(query) // n
    sizes = [each * n_train, each * (n - n_train)]
    biases = []
    # The table's dim 0 is 1: one "example" that trains A and B, then one that does not.
    for split, queries, keys in zip((1, 0), torch.split(query, sizes), torch.split(key, sizes), strict=True):
        if len(queries):
            set_split([layers], split)
            biases.append(method(queries, keys, *rest))
    set_split([layers], n_train)
    return torch.cat(biases)


def mixed_modules(model: nn.Module, losses: Callable[[], tuple[Tensor, Tensor]], n: int) -> list[str]:
    """Full names of the low-rank layers in which the two kinds of examples cannot be kept apart.

    A layer is all right if its input has one entry of dim 0 for each example, or is of one kind as a whole, and if
    nothing of one kind's loss comes back to the other kind's entries. It costs two backward passes.

    Args:
        losses: runs the model once under `divided` and gives (loss of the first kind, of the other).
        n: examples of both kinds together.
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
