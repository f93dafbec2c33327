"""Batches and losses of a user's own loaders."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from diffora.errors import UserError

ACCELERATES = "accelerate.data_loader"
"""The module of accelerate's loaders and samplers."""

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)``: a scalar with a graph."""


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model computes itself: ``model(**batch).loss``.

    Raises:
        UserError: the batch is not a dict, has entries that the model does not take, or the model returns no loss.
    """
    if not isinstance(batch, Mapping):
        raise UserError(
            f"without loss=, batches must be dicts for model(**batch); this one is a {type(batch).__name__}: give "
            "loss=, a function of (model, batch) that returns a scalar"
        )
    accepted = inspect.signature(model.forward).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    if not takes_all and (unknown := [str(key) for key in batch if key not in accepted]):
        raise UserError(
            f"{type(model).__name__} takes {', '.join(accepted)}, and not {', '.join(unknown)}: leave that out of the "
            "batches (dataset.remove_columns), or give loss=, a function of (model, batch)"
        )
    output = model(**batch)
    found: Tensor | None = output.get("loss") if type(output) is dict else getattr(output, "loss", None)
    if found is None:
        raise UserError(
            f"{type(model).__name__} returned a {type(output).__name__} without loss for a batch with "
            f"{', '.join(map(str, batch))}: add labels to the batches, or give loss=, a function of (model, batch) "
            "that returns a scalar"
        )
    return found


def checked(value: Any, what: str) -> Tensor:
    """The loss of a batch, if it is a finite scalar with a graph.

    Args:
        what: names the batch in messages.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, Tensor):
        wrong = f"is a {type(value).__name__}"
    elif value.numel() != 1:
        wrong = f"has the shape {tuple(value.shape)}"
    elif not math.isfinite(value.item()):
        wrong = f"is {value.item()}"
    elif not value.requires_grad:
        wrong = "has no graph (was it detached, or computed without gradients?)"
    else:
        return value.reshape(())
    raise UserError(f"the loss of {what} {wrong}; it must be a finite scalar tensor that can be differentiated")


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device.

    Looks into mappings, lists, tuples and dataclasses, which keep their classes, and calls ``to`` where it is. A
    mapping whose class cannot be called with a dict becomes a dict.
    """
    if callable(getattr(type(batch), "to", None)):  # of the type: a dict may give its entries as attributes
        there = batch.to(device)
        return batch if there is None else there  # some classes move themselves
    if isinstance(batch, Mapping):
        values = {key: moved(value, device) for key, value in batch.items()}
        try:
            return type(batch)(values)  # type: ignore[call-arg]
        except TypeError:
            return values
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        there = copy.copy(batch)
        for each in dataclasses.fields(batch):
            object.__setattr__(there, each.name, moved(getattr(batch, each.name), device))
        return there
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def length_of(loader: Iterable[Any]) -> int | None:
    """The number of batches; None for a loader that does not know it, such as one over an `IterableDataset`."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def loss_problem(loss: Any) -> Iterator[str]:
    """What is wrong with ``loss``, as far as it can be seen without calling it."""
    if loss is not None and not callable(loss):
        yield f"loss={loss!r} must be a function of (model, batch) that returns a scalar, or None for the model's own"


def loader_problem(name: str, loader: Any) -> Iterator[str]:
    """What is wrong with a loader, as far as it can be seen without reading it.

    Args:
        name: of the argument.
    """
    rows = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    if rows or hasattr(loader, "column_names"):
        yield f"{name} is a {type(loader).__name__}, which gives rows: put it into a torch.utils.data.DataLoader"
    elif not isinstance(loader, Iterable) or isinstance(loader, str | bytes):
        yield f"{name} is a {type(loader).__name__}: it must give batches when it is iterated over"


def loader_problems(train: Any, valid: Any, rounds: int) -> Iterator[str]:
    """What is wrong with the two loaders of a search, as far as it can be seen without reading them."""
    yield from loader_problem("train_loader", train)
    if valid is not None:
        yield from loader_problem("valid_loader", valid)
    if isinstance(train, Iterator) and isinstance(rounds, int) and rounds > 1:
        yield (
            f"train_loader is a {type(train).__name__}, which can be read only once, and rounds={rounds} needs several "
            "passes: give a list or a DataLoader"
        )
    same_rows = _reads_all(train) and _reads_all(valid) and train.dataset is valid.dataset
    if (train is valid and train is not None) or same_rows:
        yield (
            "train_loader and valid_loader give the same rows, and the search needs different ones for the weights and "
            "for Γ: give one loader, which is divided, or two parts of the training rows"
        )


def _reads_all(loader: Any) -> bool:
    """Whether a loader surely reads all rows of its dataset."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return True
    if not isinstance(loader, DataLoader) or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        return False
    return len(loader.sampler) == len(loader.dataset)  # type: ignore[arg-type]


def some(loader: Iterable[Any], name: str) -> Iterator[Any]:
    """The batches of one pass over a loader.

    Raises:
        UserError: there are none.
    """
    empty = True
    for batch in loader:
        empty = False
        yield batch
    if empty:
        raise UserError(
            f"{name} has no batches: it must give at least one each time it is iterated over (a generator can be read "
            "only once; with drop_last=True, rows that are fewer than a batch are dropped)"
        )


def endless(loader: Iterable[Any], name: str) -> Iterator[Any]:
    """The batches of a loader, pass after pass."""
    while True:
        yield from some(loader, name)


def in_groups(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` batches; the last one may have fewer."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def rows_of(batch: Any, what: str) -> Iterator[Any]:
    """The rows of a batch, each as a batch of one row: a dict or a sequence of tensors of equal length, or one tensor.

    Args:
        what: names the batch in messages.

    Raises:
        UserError: the batch is something else.
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
    known = isinstance(values, list | tuple) and not hasattr(values, "_fields") and len(values) > 0
    if not known or not all(isinstance(value, Tensor) and value.dim() for value in values):
        raise UserError(
            f"selector=fisher divides batches into rows, and {what} is not a dict or tuple of tensors: give batches of "
            "tensors, with the rows in their first dimension"
        )
    if len(sizes := {len(value) for value in values}) != 1:
        raise UserError(
            f"selector=fisher divides batches into rows, and the tensors of {what} have {sorted(sizes)} rows: the "
            "first dimension of each tensor must be the row"
        )
    for i in range(sizes.pop()):
        if isinstance(batch, Mapping):
            yield {key: value[i : i + 1] for key, value in batch.items()}
        elif isinstance(batch, Tensor):
            yield batch[i : i + 1]
        else:
            yield type(batch)(value[i : i + 1] for value in batch)


def divided_loader(loader: Iterable[Any], seed: int) -> tuple[Iterable[Any], Iterable[Any], str]:
    """Divide one loader into two disjoint halves at random: for the weights, and for Γ.

    The rows of a `DataLoader` are divided. Of a list or tuple of batches, the batches are divided.

    Returns:
        (for training, for validation, a sentence that says what was divided).

    Raises:
        UserError: the loader cannot be divided, or there are fewer than two rows or batches.
    """
    items, unit = (loader.dataset, "rows") if isinstance(loader, DataLoader) else (loader, "batches")
    rows = _row_sampling(loader)
    known = isinstance(loader, Sequence) or (
        rows is not None
        and (type(loader).__iter__ is DataLoader.__iter__ or type(loader).__module__ == ACCELERATES)
        and not isinstance(loader.dataset, IterableDataset)  # type: ignore[attr-defined]
        and (type(rows.sampler) in (RandomSampler, SequentialSampler) or _is_accelerates(rows.sampler))
        and len(rows.sampler) == len(items)  # type: ignore[arg-type]
        and not getattr(rows.sampler, "replacement", False)
    )
    if not known:
        raise UserError(
            f"a {type(loader).__name__} of this kind cannot be divided into rows for the weights and rows for Γ: give "
            "two loaders, search(model, train_loader, valid_loader). Only a DataLoader with batch_size= and no sampler "
            "of its own, and a list of batches, are divided"
        )
    n = len(items)  # type: ignore[arg-type]
    if n < 2:
        raise UserError(f"a loader with {n} {unit} cannot be divided: it needs at least 2")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    halves = sorted(order[n // 2 :]), sorted(order[: n // 2])
    train, valid = (_part(loader, half) for half in halves)
    said = f"divided {n} {unit} at random: {len(halves[0])} for the weights, {len(halves[1])} for Γ (seed {seed})"
    return train, valid, said


def _row_sampling(loader: Any) -> BatchSampler | None:
    """How a DataLoader forms batches of rows; None if it does this in a way of its own.

    A loader that accelerate prepared, such as that of transformers' `Trainer`, has this inside its own sampler.
    """
    sampler: Any = loader.batch_sampler if isinstance(loader, DataLoader) else None
    sampler = sampler.batch_sampler if _is_accelerates(sampler) else sampler
    return sampler if type(sampler) is BatchSampler else None


def _is_accelerates(sampler: Any) -> bool:
    return type(sampler).__module__ == ACCELERATES


def _part(loader: Any, places: list[int]) -> Iterable[Any]:
    """The rows of a DataLoader, or the batches of a sequence, at some places."""
    if (rows := _row_sampling(loader)) is None:
        return [loader[i] for i in places]
    return DataLoader(
        Subset(loader.dataset, places),
        batch_size=rows.batch_size,
        shuffle=isinstance(rows.sampler, RandomSampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=rows.drop_last and len(places) >= rows.batch_size,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
