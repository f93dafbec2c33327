"""Batches of encoded pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffora.tasks.base import Batch
from diffora.tasks.ignored import IGNORED


class PairCollator:
    """Makes one batch of encoded pairs. Sources and targets are padded on the right, each to the longest of them.

    Args:
        pad_token_id: padding value of the sources. Targets are padded with `IGNORED`.
        pad_to_multiple_of: round both lengths up to a multiple of this, e.g. 8 for tensor cores.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Batch:
        """Collate ``encoded[[i, j, …]]``.

        Returns:
            input_ids and attention_mask: long [n, longest source]; labels, if the rows have targets: long
            [n, longest target]; generated (whether to generate in a validation) and row: [n].
        """
        ids = self._padded(rows["input_ids"], self.pad_token_id)
        mask = self._padded([np.ones(len(row), dtype=np.int64) for row in rows["input_ids"]], 0)
        batch = {"input_ids": ids, "attention_mask": mask}
        if "labels" in rows:
            batch["labels"] = self._padded(rows["labels"], IGNORED)
        batch["generated"] = torch.tensor(rows["generated"], dtype=torch.bool)
        return batch | {"row": torch.tensor(rows["row"], dtype=torch.long)}

    def _padded(self, lists: Sequence[Any], value: int) -> Tensor:
        longest = max(1, *map(len, lists))
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        filled = np.full((len(lists), width), value, dtype=np.int64)
        for i, row in enumerate(lists):
            filled[i, : len(row)] = row
        return torch.from_numpy(filled)
