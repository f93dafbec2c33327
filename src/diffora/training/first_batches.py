"""The first batches of the fine-tuning stage, for methods that look at data before they train."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
from torch import Tensor

from diffora.loop.samplers import LengthGroupedBatchSampler
from diffora.tasks.base import Collate, Task


@dataclass(frozen=True)
class FirstBatches:
    """The first training batches of the run, as inputs of the model. They are the same in every process.

    A batch is made only when it is used, because most methods use none.

    Attributes:
        train: the encoded training split.
        task: the task.
        collate: makes batches, without augmentation.
        batch_size: rows per batch.
        seed: the run's seed.
        most: the most batches.
    """

    train: datasets.Dataset
    task: Task
    collate: Collate
    batch_size: int
    seed: int
    most: int = 32

    def __len__(self) -> int:
        return min(self.most, len(self._sampler()))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in itertools.islice(self._sampler(), self.most):
            yield self.task.inputs(self.collate(self.train[rows]))

    def _sampler(self) -> LengthGroupedBatchSampler:
        return LengthGroupedBatchSampler(np.asarray(self.train["length"]), self.batch_size, self.seed)
