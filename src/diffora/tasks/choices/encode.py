"""From rows of choices to batches: each choice is a sequence, and a row is all of its sequences."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from diffora.tasks.base import Batch
from diffora.tasks.encoding import characters_of, ranges_of, write_rows
from diffora.tasks.tokenise import Collator, was_cut

ROWS_AT_ONCE = 250  # bounds memory


def write_choices(file: Path, rows: datasets.Dataset, tokenizer: Any, max_length: int, num_proc: int) -> None:
    """Write the tokens of all rows to an arrow file; `ChoiceTask.encode` lists its columns."""
    lists = pa.list_(pa.list_(pa.int32()))
    types: dict[str, pa.DataType] = {"input_ids": lists}
    types |= {"token_type_ids": lists} if "token_type_ids" in tokenizer.model_input_names else {}
    types |= {"labels": pa.int64()} if "label" in rows.column_names else {}
    types |= {"length": pa.int32(), "cut": pa.bool_(), "row": pa.int32()}
    context, start, choices = (rows.data.column(name) for name in ("context", "start", "choices"))
    shared = characters_of(context) + characters_of(start)  # are in the sequence of every choice
    characters = shared * pc.list_value_length(choices).to_numpy() + characters_of(choices)
    ranges = ranges_of(characters, ROWS_AT_ONCE)
    work = partial(_encode, names=list(types), tokenizer=tokenizer, max_length=max_length)
    write_rows(file, types, rows, ranges, work, num_proc)


def _encode(
    chunk: Mapping[str, list[Any]], start: int, names: Sequence[str], tokenizer: Any, max_length: int
) -> dict[str, Any]:
    contexts, endings, bounds = _texts(chunk)
    encoded = tokenizer(contexts, endings, truncation=True, max_length=max_length, padding=False)
    cut = was_cut(encoded, [contexts, endings], tokenizer, max_length)
    parts = [slice(*pair) for pair in pairwise(bounds)]
    columns: dict[str, Any] = {name: [encoded[name][part] for part in parts] for name in names if name in encoded}
    columns["labels"] = chunk.get("label")
    columns["length"] = [max(map(len, sequences)) for sequences in columns["input_ids"]]
    columns["cut"] = [any(cut[part]) for part in parts]
    return columns


def _texts(rows: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[str], list[int]]:
    """The two texts of each sequence of some rows, and where the sequences of each row begin and end."""
    contexts: list[str] = []
    endings: list[str] = []
    bounds = [0]
    for context, start, choices in zip(rows["context"], rows["start"], rows["choices"], strict=True):
        contexts += [context] * len(choices)
        endings += [f"{start} {choice}".strip() for choice in choices]
        bounds.append(len(endings))
    return contexts, endings, bounds


class ChoiceCollator:
    """Makes one batch of rows, padded to the row with most choices and to the longest sequence.

    Args:
        pad_token_id: padding value of ``input_ids``.
        pad_to_multiple_of: round the padded length up to a multiple of this.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad = Collator(pad_token_id, pad_to_multiple_of)
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Batch:
        """Collate ``encoded[[i, j, …]]``.

        Returns:
            input_ids, attention_mask and, if the rows have them, token_type_ids: long [n, choices, width]; n_choices
            (of each row), row and, if the rows have them, labels: long [n].
        """
        counts = np.array([len(sequences) for sequences in rows["input_ids"]])
        present = torch.from_numpy(np.arange(counts.max()) < counts[:, None])
        names = [name for name in ("input_ids", "token_type_ids") if name in rows]
        flat = self.pad({name: [ids for sequences in rows[name] for ids in sequences] for name in names})
        batch = {}
        for name, values in flat.items():
            padding = self.pad_token_id if name == "input_ids" else 0
            batch[name] = torch.full((*present.shape, values.shape[1]), padding)
            batch[name][present] = values
        batch["n_choices"] = torch.from_numpy(counts)
        return batch | {name: torch.tensor(rows[name]) for name in ("labels", "row") if name in rows}
