"""Samplers: which rows are in which batch.

The order of rows depends only on (seed, stage, epoch). So a run that resumes at epoch k sees the same batches as a run
that was not interrupted. Global random state is neither read nor advanced.

Each item of a sampler is the list of row numbers of one whole batch, so loaders are made with
``sampler=…, batch_size=None``. Lightning calls `set_epoch` on ``loader.sampler`` at the start of each training epoch
(not on ``loader.batch_sampler``). The Trainer needs ``use_distributed_sampler=False``, because the samplers divide each
batch among the processes themselves.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from diffora.errors import UserError
from diffora.loop import streams
from diffora.loop.plan import Plan


class Drawn(list[int]):
    """Row numbers of a training batch, with the random draw that they come from.

    The draw goes with the rows to the collate function, also in a worker process, because augmentation depends only on
    the draw and the row.

    Args:
        rows: the row numbers.
        draw: (seed, stream, epoch).
        longest: number of tokens in the longest row of the batch, over all processes.
    """

    def __init__(self, rows: Iterable[int], draw: tuple[int, int, int], longest: int) -> None:
        super().__init__(rows)
        self.draw, self.longest = draw, longest

    def __reduce__(self) -> tuple[Any, ...]:
        return Drawn, (list(self), self.draw, self.longest)


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Shuffled batches of rows of similar length, which saves padding.

    Each epoch shuffles the rows, sorts them by length within mega-batches of up to 50 batches, divides them into
    batches, and shuffles the batches. Process `rank` of `world_size` takes every world_size-th row of each batch. The
    parts of all processes together are the batch of a single process. In the last batch, some processes may have a row
    more than others. If it has fewer rows than there are processes, it is left out, because each process needs a row.

    Args:
        lengths: [n] tokens per row of the dataset.
        batch_size: rows per batch of all processes together.
        seed, stream: together with the epoch they determine the order.
        epoch: the first epoch.
        rank, world_size: this process, and the number of processes.
        indices: the rows to draw from; None for all.
        drop_last: leave out the last batch if it is smaller.

    Attributes:
        left_out: number of rows that are not used in an epoch. Each epoch leaves out other ones.

    Raises:
        UserError: the processes cannot share the batch size evenly, or there are too few rows for one batch.
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
        stream: int = streams.FINE_TUNE,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size={batch_size} must be a positive multiple of the {world_size} process(es).")
        self.indices = np.arange(len(lengths)) if indices is None else np.asarray(indices)
        self.lengths = np.asarray(lengths)[self.indices]
        self.batch_size = batch_size
        self.seed, self.stream, self.epoch = seed, stream, epoch
        self.rank, self.world_size = rank, world_size
        n_rows = len(self.indices)
        last = n_rows % batch_size
        self.left_out = last if drop_last or last < world_size else 0
        self._rows_used = n_rows - self.left_out
        if self._rows_used == 0:
            raise UserError(f"{n_rows} rows make no batch of {batch_size} for {world_size} process(es).")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self._rows_used // self.batch_size)

    def __iter__(self) -> Iterator[Drawn]:
        draw = self.seed, self.stream, self.epoch
        rng = np.random.default_rng(draw)
        order = rng.permutation(len(self.indices))[: self._rows_used]
        # Use at least four mega-batches if possible: if all rows were sorted at once, each epoch had the same batches.
        mega = self.batch_size * min(50, max(1, len(order) // (4 * self.batch_size)))
        chunks = [order[start : start + mega] for start in range(0, len(order), mega)]
        order = np.concatenate([chunk[np.argsort(-self.lengths[chunk], kind="stable")] for chunk in chunks])
        for batch in rng.permutation(len(self)):
            positions = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            mine = self.indices[positions[self.rank :: self.world_size]].tolist()
            yield Drawn(mine, draw, int(self.lengths[positions].max()))


class SegmentSampler(Sampler[list[int]]):
    """The batches of one segment of fine-tuning (`diffora.loop.plan`), which Lightning calls an epoch.

    Args:
        batches: all batches of an epoch.
        plan: the segments, in optimiser steps.
        accumulate: batches per optimiser step. The last step of an epoch may have fewer.
    """

    def __init__(self, batches: LengthGroupedBatchSampler, plan: Plan, accumulate: int) -> None:
        self.batches, self.plan, self.accumulate = batches, plan, accumulate
        self.set_epoch(0)

    def set_epoch(self, segment: int) -> None:
        self.segment = self.plan[segment]
        self.batches.set_epoch(self.segment.epoch)

    def _bounds(self) -> tuple[int, int]:
        first, stop = self.segment.first * self.accumulate, self.segment.stop * self.accumulate
        return first, min(stop, len(self.batches))

    def __len__(self) -> int:
        first, stop = self._bounds()
        return stop - first

    def __iter__(self) -> Iterator[Drawn]:
        return islice(iter(self.batches), *self._bounds())


class EvalBatchSampler(Sampler[list[int]]):
    """Each row exactly once over all processes, the longest first, so that memory runs out in the first batch or never.

    Args:
        lengths: [n] tokens per row of the dataset.
        batch_size: rows per batch of all processes together.
        rank, world_size: this process, and the number of processes.
        indices: the rows to evaluate; None for all.
        in_step: give each process as many batches as the others, for models that all processes run together
            (``trainer=fsdp``). A process with fewer batches repeats a row in each missing one; the caller leaves out
            repeated rows.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        indices: np.ndarray | None = None,
        in_step: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} for evaluation must be at least 1.")
        indices = np.arange(len(lengths)) if indices is None else np.asarray(indices)
        order = indices[np.argsort(-np.asarray(lengths)[indices], kind="stable")]
        mine, size = order[rank::world_size], max(1, batch_size // world_size)
        self._batches = [mine[start : start + size].tolist() for start in range(0, len(mine), size)]
        if in_step:
            most = -(-len(order[::world_size]) // size)  # the first process has the most rows
            self._batches += [order[-1:].tolist()] * (most - len(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


class BilevelBatchSampler(Sampler[dict[str, list[Any]]]):
    """Row numbers of one bi-level step: a search-valid batch, then T search-train batches ([D] Algorithm 1).

    Each item is {"valid": rows, "train": [rows] * T}. A round (an epoch of Lightning) is one pass over the search-train
    split. Its last item has fewer than T train batches if T does not divide their number. The search-valid split is
    repeated with its own count of epochs, which is computed from the round alone.

    Args:
        train_sampler, valid_sampler: samplers of the two splits.
        train_steps: T.
        matched: pair each train batch, or the first of T, with a valid batch of about the same length, because
            ``search.update=simultaneous`` pads the two to one width. The valid batches of a round stay the same, in
            another order.
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
        """Search-valid batches without end, from the batch of the search's `step`-th item on."""
        epoch, skip = divmod(step, len(self.valid))
        while True:
            self.valid.set_epoch(epoch)
            yield from list(self.valid)[skip:]
            epoch, skip = epoch + 1, 0
