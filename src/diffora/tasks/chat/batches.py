"""Batches of encoded conversations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffora.tasks.base import Batch
from diffora.tasks.chat.prompts import left_padded
from diffora.tasks.ignored import IGNORED


class ChatCollator:
    """Makes one batch of encoded rows, padded on the right to the longest.

    Packed rows get positions instead of an attention mask, and their padding is one more sequence.

    Args:
        pad_token_id: padding value of ``input_ids``.
        pad_to_multiple_of: round the padded length up to a multiple of this, e.g. 8 for tensor cores.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Batch:
        """Collate ``encoded[[i, j, …]]``.

        Returns:
            input_ids and labels (`IGNORED` for tokens that do not count): long [n, longest]; row: long [n];
            position_ids and real (0 for padding) for packed rows, otherwise attention_mask: long [n, longest]. Rows
            with prompts also have prompt_ids and prompt_mask, long [n, longest prompt], padded on the left, and
            generated: bool [n].
        """
        n, longest = len(rows["row"]), max(rows["length"])
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = np.full((n, width), self.pad_token_id, dtype=np.int64)
        labels = np.full((n, width), IGNORED, dtype=np.int64)
        positions = np.tile(np.arange(width), (n, 1))
        for i, length in enumerate(rows["length"]):
            ids[i, :length] = rows["input_ids"][i]
            labels[i, :length] = np.where(np.asarray(rows["counted"][i], dtype=bool), ids[i, :length], IGNORED)
            if "segments" in rows:
                sizes = [*rows["segments"][i], width - length]
                positions[i] = np.concatenate([np.arange(size) for size in sizes])
        batch = {"input_ids": ids, "labels": labels, "row": np.asarray(rows["row"], dtype=np.int64)}
        real = (np.arange(width) < np.asarray(rows["length"])[:, None]).astype(np.int64)
        batch |= {"position_ids": positions, "real": real} if "segments" in rows else {"attention_mask": real}
        found = {name: torch.from_numpy(value) for name, value in batch.items()}
        if "prompt_ids" in rows:
            found["prompt_ids"], found["prompt_mask"] = left_padded(rows["prompt_ids"], self.pad_token_id)
            found["generated"] = torch.tensor(rows["generated"], dtype=torch.bool)
        return found
