"""What the frozen layers give for each row, in a file: which tokens, how many bytes, and what the file depends on.

The files stand beside the token cache (`diffora.tasks.cache`). Only real tokens are written, so rows can be put
together in any batches.
"""

import hashlib
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffora.backbones.precision import AUTOCAST
from diffora.core.model import device_of
from diffora.core.prefix import Prefix
from diffora.errors import UserError
from diffora.loop.data import rows_loader
from diffora.loop.parts import Parts
from diffora.tasks.base import Batch
from diffora.tasks.cache import arrow_writer

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the content of a file changes its meaning
TOKENS = 4096
"""Tokens of a batch while states are computed. The same in all runs, so that these compute the same numbers."""
TRIED = 4
"""Rows on which a model is tried before anything is computed."""
MINUTE = 60.0
"""Seconds between two lines about progress."""


@dataclass(frozen=True)
class Width:
    """What the states of a token are.

    Attributes:
        size: how many numbers.
        dtype: their type in the model.
        stored: their type in the file.
        tokens_per_length: tokens of a row for each unit of its column ``length``: 1 for texts; for images, of which
            each has the length 1, all their tokens.
    """

    size: int
    dtype: torch.dtype
    stored: torch.dtype
    tokens_per_length: float

    @property
    def bytes(self) -> int:
        """Bytes of a token in the file."""
        return self.size * self.stored.itemsize


class States:
    """The states of the rows of one split, in a file that is mapped into memory.

    Args:
        file: what `write_states` wrote.
        width: of the states.
    """

    def __init__(self, file: datasets.Dataset, width: Width) -> None:
        self.width, self._values = width, file.data.column("states")
        self._place = np.empty(len(file), dtype=np.int64)
        self._place[file.data.column("row").to_numpy()] = np.arange(len(file))

    def of(self, rows: list[int]) -> tuple[Tensor, list[int]]:
        """(the states of all tokens of some rows, one row after the other; the number of tokens of each row)."""
        parts = [self._values[place].as_buffer() for place in self._place[rows].tolist()]
        lengths = [part.size // self.width.bytes for part in parts]
        content = np.concatenate([np.frombuffer(part, dtype=np.uint8) for part in parts])
        return torch.from_numpy(content).view(self.width.stored).view(-1, self.width.size), lengths


def write_states(file: Path, parts: Parts, prefix: Prefix, width: Width, encoded: datasets.Dataset) -> None:
    """Compute the states of all rows of a split, and write them with the columns ``states`` (bytes) and ``row``."""
    model, task = parts.model, parts.task
    device, began = device_of(model), time.monotonic()
    told, done = began, 0
    groups = list(_groups(encoded, width))
    loader = rows_loader(encoded, groups, parts.data.collate_eval, parts.settings.trainer.num_workers)
    schema = pa.schema({"states": pa.large_binary(), "row": pa.int64()})
    with arrow_writer(file, schema) as append:
        for batch in tqdm(loader, desc="frozen layers", unit="batch", disable=None):
            rows = batch["row"].tolist()
            mask = real_tokens(batch, [real_length(encoded, row, width) for row in rows])
            inputs = task.inputs({key: value.to(device) for key, value in batch.items()})
            states = prefix.output(partial(model, **inputs))
            tokens = states[mask.to(device)].to(width.stored).cpu()
            counts = mask.view(len(rows), -1).sum(1).tolist()
            values = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in tokens.split(counts)]
            append({"states": values, "row": rows})
            done += len(rows)
            if time.monotonic() - told > MINUTE:
                told = time.monotonic()
                left = (told - began) / done * (len(encoded) - done)
                log.info(f"frozen layers: {done:,} of {len(encoded):,} rows, about {left:.0f} s left")


def _groups(encoded: datasets.Dataset, width: Width) -> Iterator[list[int]]:
    """Row numbers of batches of at most `TOKENS` tokens, the longest rows first."""
    lengths = encoded.data.column("length").to_numpy()
    order = np.argsort(-lengths, kind="stable").tolist()
    first = 0
    while first < len(order):
        n = max(1, int(TOKENS // (lengths[order[first]] * width.tokens_per_length)))
        yield order[first : first + n]
        first += n


# --- tokens ---


def width_of(parts: Parts, prefix: Prefix) -> Width:
    """What the states of a token are, seen on one row. Run it in the precision of the run."""
    encoded = parts.data.train.encoded
    row = tried_rows(encoded)[-1]
    batch = batch_of(parts, encoded, [row], device_of(parts.model))
    states = prefix.output(lambda: parts.model(**parts.task.inputs(batch)))
    half = AUTOCAST.get(parts.settings.trainer.precision) is torch.bfloat16  # float16 could overflow
    stored = torch.bfloat16 if half else states.dtype
    text, length = "input_ids" in encoded.column_names, int(encoded.data.column("length")[row].as_py())
    return Width(states.shape[-1], states.dtype, stored, 1.0 if text else states.shape[:2].numel() / length)


def real_tokens(batch: Batch, lengths: list[int]) -> Tensor:
    """Which tokens of a batch are real: boolean (sequences, tokens).

    Args:
        lengths: the number of real tokens of each row, for inputs without an attention mask, padded on the right.
    """
    if (mask := batch.get("attention_mask")) is not None:
        return mask.reshape(-1, mask.shape[-1]).bool()
    width = batch["input_ids"].shape[-1] if "input_ids" in batch else max(lengths)
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def real_length(encoded: datasets.Dataset, row: int, width: Width) -> int:
    """The number of tokens of a row that is one sequence."""
    return round(int(encoded.data.column("length")[row].as_py()) * width.tokens_per_length)


def n_tokens(encoded: datasets.Dataset, width: Width) -> int:
    """The number of real tokens in a split."""
    if "input_ids" not in encoded.column_names:
        return round(int(pc.sum(encoded.data.column("length")).as_py()) * width.tokens_per_length)
    column = encoded.data.column("input_ids")
    while column.type.num_fields:  # lists of lists, for several sequences in a row
        column = pc.list_flatten(column)
    return len(column)


def tried_rows(encoded: datasets.Dataset) -> list[int]:
    """A few rows of different lengths, none of them among the longest."""
    order = np.argsort(encoded.data.column("length").to_numpy(), kind="stable")
    return sorted({int(order[i * len(order) // (TRIED + 1)]) for i in range(TRIED)})


def batch_of(parts: Parts, encoded: datasets.Dataset, rows: list[int], device: torch.device) -> Batch:
    """A batch of some rows of a split."""
    return {key: value.to(device) for key, value in parts.data.collate_eval(encoded[rows]).items()}


def computed(parts: Parts, prefix: Prefix, width: Width, encoded: datasets.Dataset, rows: list[int]) -> Tensor:
    """The states of all tokens of some rows, one row after the other, computed in one batch.

    Raises:
        UserError: the model has another number of states than there are tokens.
    """
    batch = batch_of(parts, encoded, rows, device_of(parts.model))
    mask = real_tokens(batch, [real_length(encoded, row, width) for row in rows])
    states = prefix.output(lambda: parts.model(**parts.task.inputs(batch)))
    if states.shape[:2] != mask.shape:
        name = type(parts.model).__name__
        raise UserError(f"{name} has hidden states of {tuple(states.shape)} for {tuple(mask.shape)} tokens")
    return states[mask.to(states.device)]


# --- what a file depends on ---


def facts_of(parts: Parts, prefix: Prefix, above: list[nn.Module], width: Width) -> dict[str, Any]:
    """What the states of every split depend on: weights, configuration, precision and versions.

    Args:
        above: the layers above the prefix, whose weights do not matter.
    """
    import transformers  # only runs with a cached prefix need its version here

    model: Any = parts.model
    others = {id(value) for layer in above for value in itertools.chain(layer.parameters(), layer.buffers())}
    weights = hashlib.sha256()
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if id(value) not in others and not value.requires_grad:
            weights.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode() + _bytes(value))
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    return {
        "format": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": repr(sorted(config.items())),
        "weights": weights.hexdigest(),
        "layers": len(prefix.layers),
        "width": [width.size, str(width.dtype), str(width.stored)],
        "precision": parts.settings.trainer.precision,
        "device": device_of(model).type,
        "versions": [torch.__version__, transformers.__version__],
    }


def facts_of_rows(parts: Parts, encoded: datasets.Dataset) -> dict[str, str]:
    """What else the states of a split depend on: its encoded rows, and how these become inputs of the model."""
    sink = _Digest()
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), encoded.data.table.schema) as writer:
        writer.write_table(encoded.data.table)
    inputs = hashlib.sha256()
    for row in tried_rows(encoded):
        given = parts.task.inputs(batch_of(parts, encoded, [row], torch.device("cpu")))
        for name in sorted(given):
            inputs.update(name.encode() + _bytes(given[name]))
    return {"rows": sink.sha256.hexdigest(), "inputs": inputs.hexdigest()}


class _Digest:
    """A file to write to, of which only the digest is kept."""

    closed = False

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return len(content)

    def flush(self) -> None:
        """There is nothing to flush."""


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
