"""Batches that are cut into micro-batches, and two batches as one."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.errors import UserError
from diffora.tasks.base import Batch, Task


def parts_of(batch: Batch, n_parts: int, task: Task) -> Iterator[tuple[Batch, float]]:
    """Cut a batch into at most ``n_parts`` parts; yields (part, its share in the mean loss of the whole batch).

    If nothing in the batch counts for the loss, all shares are 0.
    """
    n = len(batch["row"])
    size = -(-n // n_parts)
    if size == n:
        yield batch, 1.0
        return
    parts = [{key: value[start : start + size] for key, value in batch.items()} for start in range(0, n, size)]
    weights = [task.weight(part) for part in parts]
    total = sum(weights) or 1.0
    for part, weight in zip(parts, weights, strict=True):
        yield part, weight / total


def joined(first: Batch, second: Batch, task: Task, pad_token_id: int) -> Batch:
    """One batch of the rows of two batches. The narrower one is padded on the right.

    Raises:
        UserError: `Task.padding` has no value for a column.
    """
    padding = {"input_ids": pad_token_id, **task.padding}
    batch = {}
    for name, values in first.items():
        both = [values, second[name]]
        if values.shape[1:] != second[name].shape[1:]:
            if name not in padding:
                raise UserError(
                    f"{type(task).__name__}.padding has no padding value for {name}, so batches of different widths "
                    "cannot be put together; search.update=alternating does not need it"
                )
            shape = torch.tensor([part.shape[1:] for part in both]).amax(0)
            missing = [(shape - torch.tensor(part.shape[1:])).flip(0).tolist() for part in both]  # the last dim first
            both = [
                F.pad(part, [n for width in widths for n in (0, width)], value=padding[name])
                for part, widths in zip(both, missing, strict=True)
            ]
        batch[name] = torch.cat(both)
    return batch


def divide_rows(values: Mapping[str, Any], sizes: list[int]) -> list[dict[str, Tensor]]:
    """A batch, or a model's output, divided by rows; entries that do not have one value per row are left out."""
    cut = {
        name: torch.split(value, sizes)
        for name, value in values.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == sum(sizes)
    }
    return [{name: parts[i] for name, parts in cut.items()} for i in range(len(sizes))]
