"""Datasets, loaders and Lightning data modules of the two stages.

A loader starts to fetch when the first batch is requested, not when its iterator is made. On a resume, Lightning makes
the iterator before it sets the epoch.
"""

import ctypes
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import datasets
import lightning.pytorch as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from diffora.errors import UserError
from diffora.loop import streams
from diffora.loop.plan import Plan, plan_of
from diffora.loop.samplers import (
    BilevelBatchSampler,
    Drawn,
    EvalBatchSampler,
    LengthGroupedBatchSampler,
    SegmentSampler,
)
from diffora.settings.checks import MOST
from diffora.tasks.base import Collate

log = logging.getLogger(__name__)


def look_up(dataset: datasets.Dataset, rows: Sequence[int]) -> dict[str, Any]:
    """One list for each column of an encoded split; for a training batch also its ``draw``.

    In a worker process, the global random state is seeded from the batch. A task's collate function may draw from it,
    and the result must not depend on which worker runs it or what that worker did before. In the main process the
    random state is not seeded here; checkpoints store it.
    """
    if isinstance(rows, Drawn) and get_worker_info() is not None:
        seeds = np.random.SeedSequence((*rows.draw, *rows)).generate_state(3).tolist()
        torch.manual_seed(seeds[0])
        np.random.seed(seeds[1])
        random.seed(seeds[2])
    found: dict[str, Any] = dataset[rows]
    return found | {"draw": rows.draw} if isinstance(rows, Drawn) else found


class LeakError(AssertionError):
    """A row of one search split would be used as a row of the other. This is always a bug."""


class BilevelDataset(Dataset[Any]):
    """Looks up the rows of a `BilevelBatchSampler` item, and checks that they belong to the right split.

    Args:
        dataset: the encoded training split.
        train_idx, valid_idx: row numbers of the two search splits, disjoint.

    Raises:
        LeakError: a row belongs to the other split, or to both.
    """

    def __init__(self, dataset: datasets.Dataset, train_idx: np.ndarray, valid_idx: np.ndarray) -> None:
        self.dataset = dataset
        self._allowed = {"train": frozenset(map(int, train_idx)), "valid": frozenset(map(int, valid_idx))}
        both = self._allowed["train"] & self._allowed["valid"]
        if both:
            raise LeakError(f"{len(both)} rows are in both search splits, e.g. row {min(both)}")

    def __getitem__(self, item: Mapping[str, list[Any]]) -> dict[str, Any]:
        return {
            "valid": self._rows("valid", item["valid"]),
            "train": [self._rows("train", rows) for rows in item["train"]],
        }

    def _rows(self, split: str, rows: Sequence[int]) -> dict[str, Any]:
        foreign = set(rows) - self._allowed[split]
        if foreign:
            raise LeakError(f"row {min(foreign)} is not in the search-{split} split")
        return look_up(self.dataset, rows)


class TrainingDataset(Dataset[Any]):
    """Looks up the rows of training batches, with their ``draw``."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Any]:
        return look_up(self.dataset, rows)


class BilevelCollator:
    """Collates a `BilevelDataset` item: {"valid": batch, "train": [batch] * T}.

    Args:
        collate: functions for search-train rows (which may be augmented) and for search-valid rows.
    """

    def __init__(self, collate: tuple[Collate, Collate]) -> None:
        self.train, self.valid = collate

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"valid": self.valid(item["valid"]), "train": [self.train(rows) for rows in item["train"]]}


def _lengths(dataset: datasets.Dataset) -> np.ndarray:
    lengths: np.ndarray = dataset.data.column("length").to_numpy()
    return lengths


def _process() -> dict[str, Any]:
    """Rank of this process and number of processes. Call it after the process group has started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return {"rank": torch.distributed.get_rank(), "world_size": torch.distributed.get_world_size()}
    return {"rank": 0, "world_size": 1}


class LateLoader(DataLoader[Any]):
    """A loader that starts to fetch when the first batch is requested; so the epoch can be set after `iter`."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            if "in DataLoader worker process" not in str(error):
                raise
            # The text is the worker's traceback, which ends with the message.
            raise UserError(str(error).rpartition("diffora.errors.UserError: ")[2].strip()) from None


def _return_large_buffers(worker: int) -> None:
    """Have malloc give freed buffers of a megabyte or more back to the system, in a process that loads batches.

    glibc would keep them: with batches of images of 19 MB, a worker grew to 1.4 GB. Other libraries have no `mallopt`.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


M_MMAP_THRESHOLD = -3
"""glibc's number of this option of `mallopt`."""


def _loader(dataset: Any, sampler: Sampler[Any] | Sequence[Any], collate: Any, num_workers: int) -> DataLoader[Any]:
    return LateLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # the sampler yields whole batches
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_return_large_buffers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # without its own generator, each pass would advance the global one
    )


def eval_loader(
    dataset: datasets.Dataset,
    collate: Collate,
    batch_size: int,
    indices: np.ndarray | None = None,
    num_workers: int = 0,
    in_step: bool = False,
) -> DataLoader[Any]:
    """Loader over an encoded split, or over its rows ``indices``. The processes share the rows, each row once.

    With ``in_step``, every process has as many batches, and some rows are repeated for that (`EvalBatchSampler`).
    """
    sampler = EvalBatchSampler(_lengths(dataset), batch_size, indices=indices, in_step=in_step, **_process())
    return _loader(dataset, sampler, collate, num_workers)


def whole_loader(dataset: datasets.Dataset, collate: Collate, batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    """Loader that gives this process all rows of a split, even if there are other processes."""
    return _loader(dataset, EvalBatchSampler(_lengths(dataset), batch_size), collate, num_workers)


def rows_loader(
    dataset: datasets.Dataset, batches: Sequence[list[int]], collate: Collate, num_workers: int = 0
) -> DataLoader[Any]:
    """Loader of given batches, each by its row numbers."""
    return _loader(dataset, batches, collate, num_workers)


class SearchData(L.LightningDataModule):
    """Loader of the search stage. Its items are {"valid": batch, "train": [batch] * T}; one epoch is one round.

    Args:
        train: the encoded training split of the task.
        collate: functions for search-train rows and for search-valid rows.
        split: (search-train, search-valid) row numbers, from `split_search`.
        batch_size: rows per batch of all processes together, for both splits.
        train_steps: T, train batches per Γ step.
        matched: pair batches of similar length, see `BilevelBatchSampler`.
        whole: every process gets all rows of a batch, not its share.
    """

    def __init__(
        self,
        train: datasets.Dataset,
        collate: tuple[Collate, Collate],
        split: tuple[np.ndarray, np.ndarray],
        batch_size: int,
        seed: int,
        train_steps: int = 1,
        num_workers: int = 0,
        matched: bool = False,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.train, self.collate, self.split, self.matched, self.whole = train, collate, split, matched, whole
        self.batch_size, self.seed, self.train_steps, self.num_workers = batch_size, seed, train_steps, num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        train, valid = (
            LengthGroupedBatchSampler(
                _lengths(self.train),
                self.batch_size,
                self.seed,
                indices=indices,
                # A smaller last batch would weigh as much as a full one. Keep it only if it is the only batch.
                drop_last=len(indices) >= self.batch_size,
                stream=stream,
                **({} if self.whole else _process()),
            )
            for indices, stream in zip(self.split, (streams.SEARCH_TRAIN, streams.SEARCH_VALID), strict=True)
        )
        dataset = BilevelDataset(self.train, *self.split)
        sampler = BilevelBatchSampler(train, valid, self.train_steps, self.matched)
        return _loader(dataset, sampler, BilevelCollator(self.collate), self.num_workers)


class FineTuneData(L.LightningDataModule):
    """Loaders of the fine-tuning stage. They are made once, and the training loader has the length of its segment.

    The Trainer asks for the loaders before each segment (``reload_dataloaders_every_n_epochs=1``), to see this length.

    Args:
        train: the encoded training split.
        validation: encoded evaluation splits by name; the Trainer numbers their loaders in this order.
        collate: functions for training rows and for evaluation.
        batch_size: training rows per batch of all processes together.
        eval_batch_size: rows per batch in evaluation, of all processes together.
        accumulate: batches per optimiser step.
        plan_for: gives the plan of the stage for its steps per epoch; by default, epochs without end.
    """

    def __init__(
        self,
        train: datasets.Dataset,
        validation: Mapping[str, datasets.Dataset],
        collate: tuple[Collate, Collate],
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        num_workers: int = 0,
        accumulate: int = 1,
        plan_for: Callable[[int], Plan] = lambda steps_per_epoch: plan_of(steps_per_epoch, MOST),
    ) -> None:
        super().__init__()
        self.train, self.validation, self.collate = train, validation, collate
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.num_workers, self.accumulate, self.plan_for = num_workers, accumulate, plan_for

    @cached_property
    def sampler(self) -> SegmentSampler:
        """The training batches. It needs the number of processes, so it is made after they have met."""
        batches = LengthGroupedBatchSampler(_lengths(self.train), self.batch_size, self.seed, **_process())
        if batches.left_out:
            log.warning(
                f"fine-tune: each epoch leaves out {batches.left_out} of {len(self.train)} rows, other ones each time: "
                f"they make a last batch that {batches.world_size} processes cannot share"
            )
        return SegmentSampler(batches, self.plan_for(-(-len(batches) // self.accumulate)), self.accumulate)

    @property
    def plan(self) -> Plan:
        """The segments of the stage."""
        return self.sampler.plan

    @cached_property
    def _train_loader(self) -> DataLoader[Any]:
        return _loader(TrainingDataset(self.train), self.sampler, self.collate[0], self.num_workers)

    def train_dataloader(self) -> DataLoader[Any]:
        if self.trainer is not None:  # as Lightning will do, but only after it has asked for the length
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            self.sampler.set_epoch(progress.processed)
        return self._train_loader

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._eval_loaders

    @cached_property
    def _eval_loaders(self) -> list[DataLoader[Any]]:
        return [
            eval_loader(split, self.collate[1], self.eval_batch_size, num_workers=self.num_workers, in_step=True)
            for split in self.validation.values()
        ]
