"""Splits, samplers and loaders.

The order of rows is a pure function of (seed, stage, epoch): a run that resumes at epoch k sees the
batches that the uninterrupted run saw, and global random state is neither read nor advanced.

Every sampler here yields whole batches, so loaders are made with `sampler=…, batch_size=None`. That is
also where Lightning looks for `set_epoch`: it calls it at the start of each training epoch on
`loader.sampler`, not on `loader.batch_sampler`. The Trainer needs `use_distributed_sampler=False`: the
samplers divide each batch among the processes themselves.

A loader begins to fetch when the first batch is asked for, not when its iterator is made: on a resume Lightning makes
the iterator before it knows the epoch.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import datasets
import lightning.pytorch as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from diffora.errors import UserError
from diffora.tasks.base import Collate

# Independent random streams of one seed, so that no two uses of it are correlated.
_SPLIT, _HELD_OUT, _FINE_TUNE, _SEARCH_TRAIN, _SEARCH_VALID = range(5)


# --- splits ---


def split_search(
    examples: np.ndarray, seed: int, valid_fraction: float = 0.5, fraction: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the search's two splits from the *training* rows (DiffoRA eq. 13 needs them disjoint).

    Args:
        examples: [n] the example that each training row belongs to (`examples_of`); examples are never cut.
        seed: the run's seed.
        valid_fraction: share of the examples used that goes to the search-valid split.
        fraction: random share of the training examples that the search uses at all.

    Returns:
        (search-train, search-valid): sorted, disjoint row numbers, at least one each.

    Raises:
        UserError: a fraction out of range, or fewer than two examples.
    """
    unique = np.unique(examples)
    n_rows = len(unique)
    problems = []
    if not 0 < valid_fraction < 1:
        problems.append(f"search valid_fraction={valid_fraction} must lie strictly between 0 and 1.")
    if not 0 < fraction <= 1:
        problems.append(f"search fraction={fraction} must lie in (0, 1].")
    if n_rows < 2:
        problems.append(f"the search needs at least 2 training rows to split, there are {n_rows}.")
    if problems:
        raise UserError(problems)
    used = max(2, round(n_rows * fraction))
    n_valid = min(max(1, round(used * valid_fraction)), used - 1)
    order = np.random.default_rng([seed, _SPLIT]).permutation(n_rows)[:used]
    train, valid = (np.flatnonzero(np.isin(examples, unique[part])) for part in (order[n_valid:], order[:n_valid]))
    return train, valid


def split_hash(train_idx: np.ndarray, valid_idx: np.ndarray) -> str:
    """sha256 that identifies a pair of index sets, kept with the selection that was searched on them."""
    digest = hashlib.sha256()
    for indices in (train_idx, valid_idx):
        digest.update(f"{len(indices)}:".encode() + np.asarray(indices, dtype="<i8").tobytes())
    return digest.hexdigest()


def held_out_split(examples: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Halve a validation split by example: (choice, held-out) row numbers, sorted.

    The first half chooses the checkpoint, the second one reports it; an odd example goes to the second.

    Args:
        examples: [n] the example that each row belongs to (`examples_of`).
    """
    unique = np.unique(examples)
    n_rows = len(unique)
    if n_rows < 2:
        raise UserError(f"a validation split of {n_rows} rows cannot be halved into choice and held-out rows.")
    order = np.random.default_rng([seed, _HELD_OUT]).permutation(n_rows)
    half = order[: n_rows // 2], order[n_rows // 2 :]
    choice, held_out = (np.flatnonzero(np.isin(examples, unique[part])) for part in half)
    return choice, held_out


def examples_of(dataset: datasets.Dataset) -> np.ndarray:
    """[n] the example that each row of an encoded split belongs to: itself, unless an example makes several rows."""
    if "example" in dataset.column_names:
        examples: np.ndarray = dataset.data.column("example").to_numpy()
        return examples
    return np.arange(len(dataset))


# --- samplers: each item is the list of row numbers of one batch ---


class Drawn(list[int]):
    """Row numbers of a training batch, and what they were drawn from.

    It travels with the rows to the collate function, in whatever process: augmentation depends on it and the row alone.

    Args:
        rows: the row numbers.
        draw: (seed, stream, epoch).
        longest: tokens of the longest row of the batch, over all processes.
    """

    def __init__(self, rows: Iterable[int], draw: tuple[int, int, int], longest: int) -> None:
        super().__init__(rows)
        self.draw, self.longest = draw, longest

    def __reduce__(self) -> tuple[Any, ...]:
        return Drawn, (list(self), self.draw, self.longest)


def look_up(dataset: datasets.Dataset, rows: Sequence[int]) -> dict[str, Any]:
    """One list for each column of an encoded split, and the ``draw`` of a training batch.

    A worker's global random state becomes a function of the batch: a task's collate function may draw from it, and
    what a worker did before, or which worker it is, must not matter. That of the run itself is in its checkpoints.
    """
    if isinstance(rows, Drawn) and get_worker_info() is not None:
        seeds = np.random.SeedSequence((*rows.draw, *rows)).generate_state(3).tolist()
        torch.manual_seed(seeds[0])
        np.random.seed(seeds[1])
        random.seed(seeds[2])
    found: dict[str, Any] = dataset[rows]
    return found | {"draw": rows.draw} if isinstance(rows, Drawn) else found


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Shuffled batches of rows of similar length, which saves padding.

    Each epoch: shuffle, sort by length inside mega-batches of up to 50 batches, cut into batches,
    shuffle the batches. Process `rank` of `world_size` takes every world_size-th row of each batch, so
    the processes' parts together are the batch of a single process, up to the rows (fewer than
    world_size, last batch of an epoch only) that cannot be divided evenly and are left out.

    Args:
        lengths: [n] tokens per row of the dataset.
        batch_size: rows per batch of all processes together.
        seed, stream: with the epoch, the only source of the order.
        indices: the rows to draw from; None for all.
        drop_last: leave the smaller last batch out.

    Raises:
        UserError: a batch size the processes cannot share evenly, or no batch at all.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        indices: np.ndarray | None = None,
        drop_last: bool = False,
        stream: int = _FINE_TUNE,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size={batch_size} must be a positive multiple of the {world_size} process(es).")
        self.indices = np.arange(len(lengths)) if indices is None else np.asarray(indices)
        self.lengths = np.asarray(lengths)[self.indices]
        self.batch_size = batch_size
        self.seed, self.stream, self.epoch = seed, stream, epoch
        self.rank, self.world_size = rank, world_size
        n_rows = len(self.indices)
        self._rows_used = n_rows - n_rows % (batch_size if drop_last else world_size)
        if self._rows_used == 0:
            raise UserError(f"{n_rows} rows make no batch of {batch_size} for {world_size} process(es).")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self._rows_used // self.batch_size)

    def __iter__(self) -> Iterator[Drawn]:
        draw = self.seed, self.stream, self.epoch
        rng = np.random.default_rng(draw)
        # Which rows are left out (if any) changes with the epoch.
        order = rng.permutation(len(self.indices))[: self._rows_used]
        # At least four mega-batches where possible: sorting everything would fix the batches' composition.
        mega = self.batch_size * min(50, max(1, len(order) // (4 * self.batch_size)))
        chunks = [order[start : start + mega] for start in range(0, len(order), mega)]
        order = np.concatenate([chunk[np.argsort(-self.lengths[chunk], kind="stable")] for chunk in chunks])
        for batch in rng.permutation(len(self)):
            positions = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            mine = self.indices[positions[self.rank :: self.world_size]].tolist()
            yield Drawn(mine, draw, int(self.lengths[positions].max()))


class EvalBatchSampler(Sampler[list[int]]):
    """Every row exactly once over all processes, longest first (so that memory runs out at once or never).

    Args:
        lengths: [n] tokens per row of the dataset.
        batch_size: rows per batch of all processes together.
        indices: the rows to evaluate; None for all.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        indices: np.ndarray | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} for evaluation must be at least 1.")
        indices = np.arange(len(lengths)) if indices is None else np.asarray(indices)
        order = indices[np.argsort(-np.asarray(lengths)[indices], kind="stable")]
        self._mine = order[rank::world_size]
        self._size = max(1, batch_size // world_size)

    def __len__(self) -> int:
        return -(-len(self._mine) // self._size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self._mine), self._size):
            yield self._mine[start : start + self._size].tolist()


class BilevelBatchSampler(Sampler[dict[str, list[Any]]]):
    """Row numbers of one bi-level step: a search-valid batch, then T search-train batches (DiffoRA Algorithm 1).

    Each item is {"valid": rows, "train": [rows] * T}. A round (Lightning's epoch) is one pass over the
    search-train split; its last item has fewer than T train batches when T does not divide their number.
    The search-valid split is cycled through on its own count of epochs, computed from the round alone.

    Args:
        matched: give each train batch, or the first of T, a valid batch of about its length: the two are padded to one
            width (``search.update=simultaneous``). The valid batches of a round are the same, in another order.
    """

    def __init__(
        self,
        train_sampler: LengthGroupedBatchSampler,
        valid_sampler: LengthGroupedBatchSampler,
        train_steps: int = 1,
        matched: bool = False,
    ) -> None:
        if train_steps < 1:
            raise UserError(f"train_steps={train_steps} per Γ step must be at least 1.")
        self.train, self.valid, self.train_steps = train_sampler, valid_sampler, train_steps
        self.matched = matched
        self.round = train_sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        self.round = epoch

    def __len__(self) -> int:
        return -(-len(self.train) // self.train_steps)

    def __iter__(self) -> Iterator[dict[str, list[Any]]]:
        self.train.set_epoch(self.round)
        batches = list(self.train)
        train = [batches[start : start + self.train_steps] for start in range(0, len(batches), self.train_steps)]
        valid = list(islice(self._valid_from(self.round * len(self)), len(self)))
        if self.matched:
            places, order = (
                np.argsort([batch.longest for batch in part], kind="stable") for part in ([t[0] for t in train], valid)
            )
            for place, batch in zip(places, [valid[at] for at in order], strict=True):
                valid[place] = batch
        for valid_batch, train_batches in zip(valid, train, strict=True):
            yield {"valid": valid_batch, "train": train_batches}

    def _valid_from(self, step: int) -> Iterator[Drawn]:
        """Search-valid batches from the one that belongs to the search's `step`-th item onwards, without end."""
        epoch, skip = divmod(step, len(self.valid))
        while True:
            self.valid.set_epoch(epoch)
            yield from list(self.valid)[skip:]
            epoch, skip = epoch + 1, 0


# --- data and loaders ---


class LeakError(AssertionError):
    """A row of one search split was about to be used as a row of the other."""


class BilevelDataset(Dataset[Any]):
    """Looks up a `BilevelBatchSampler` item, and refuses rows that are not of the split they are asked for.

    Args:
        dataset: the tokenised training split.
        train_idx, valid_idx: the two search splits, disjoint.
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
        strangers = set(rows) - self._allowed[split]
        if strangers:
            raise LeakError(f"row {min(strangers)} is not in the search-{split} split")
        return look_up(self.dataset, rows)


class TrainingDataset(Dataset[Any]):
    """Looks up the rows of training batches, and passes their ``draw`` on."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Any]:
        return look_up(self.dataset, rows)


class BilevelCollator:
    """Collates a `BilevelDataset` item: {"valid": batch, "train": [batch] * T}.

    Args:
        collate: for search-train rows (which may be augmented) and for search-valid rows.
    """

    def __init__(self, collate: tuple[Collate, Collate]) -> None:
        self.train, self.valid = collate

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"valid": self.valid(item["valid"]), "train": [self.train(rows) for rows in item["train"]]}


def _lengths(dataset: datasets.Dataset) -> np.ndarray:
    lengths: np.ndarray = dataset.data.column("length").to_numpy()
    return lengths


def _process() -> dict[str, Any]:
    """This process's place among those of a distributed run; call it after the process group has started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return {"rank": torch.distributed.get_rank(), "world_size": torch.distributed.get_world_size()}
    return {"rank": 0, "world_size": 1}


class LateLoader(DataLoader[Any]):
    """Begins to fetch when the first batch is asked for, so that the epoch may be set after the iterator is made."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def _loader(dataset: Any, sampler: Sampler[Any], collate: Any, num_workers: int) -> DataLoader[Any]:
    return LateLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # the sampler yields whole batches
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, or each pass over the loader would advance the global one
    )


def eval_loader(
    dataset: datasets.Dataset,
    collate: Collate,
    batch_size: int,
    indices: np.ndarray | None = None,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Loader over a tokenised split (or the rows `indices` of it), each row once; batches carry `row`."""
    sampler = EvalBatchSampler(_lengths(dataset), batch_size, indices=indices, **_process())
    return _loader(dataset, sampler, collate, num_workers)


def whole_loader(dataset: datasets.Dataset, collate: Collate, batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    """Loader over a split that gives all of it to the process that asks, whatever others there are."""
    return _loader(dataset, EvalBatchSampler(_lengths(dataset), batch_size), collate, num_workers)


class SearchData(L.LightningDataModule):
    """Loader of the search stage: items {"valid": batch, "train": [batch] * T}, one epoch is one round.

    Args:
        train: the encoded training split of the task.
        collate: for search-train rows and for search-valid rows.
        split: (search-train, search-valid) row numbers, from `split_search`.
        batch_size: rows per batch of all processes together, for both splits.
        train_steps: T, train batches per Γ step.
        matched: pair batches of similar length, see `BilevelBatchSampler`.
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
    ) -> None:
        super().__init__()
        self.train, self.collate, self.split, self.matched = train, collate, split, matched
        self.batch_size, self.seed, self.train_steps, self.num_workers = batch_size, seed, train_steps, num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        train, valid = (
            LengthGroupedBatchSampler(
                _lengths(self.train),
                self.batch_size,
                self.seed,
                indices=indices,
                # A small batch would weigh as much as a full one; but a split of less than a batch is all there is.
                drop_last=len(indices) >= self.batch_size,
                stream=stream,
                **_process(),
            )
            for indices, stream in zip(self.split, (_SEARCH_TRAIN, _SEARCH_VALID), strict=True)
        )
        dataset = BilevelDataset(self.train, *self.split)
        sampler = BilevelBatchSampler(train, valid, self.train_steps, self.matched)
        return _loader(dataset, sampler, BilevelCollator(self.collate), self.num_workers)


class FineTuneData(L.LightningDataModule):
    """Loaders of the fine-tuning stage.

    Args:
        train: the encoded training split.
        validation: encoded evaluation splits by name; the Trainer numbers them in this order.
        collate: for training rows and for evaluation.
        batch_size: training rows per batch of all processes together.
        eval_batch_size: the same for evaluation.
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
    ) -> None:
        super().__init__()
        self.train, self.validation, self.collate = train, validation, collate
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = LengthGroupedBatchSampler(_lengths(self.train), self.batch_size, self.seed, **_process())
        return _loader(TrainingDataset(self.train), sampler, self.collate[0], self.num_workers)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [
            eval_loader(split, self.collate[1], self.eval_batch_size, num_workers=self.num_workers)
            for split in self.validation.values()
        ]
