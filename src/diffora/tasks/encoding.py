"""From rows to the arrow file of a cache, in one process or several. The file is the same, whatever their number."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffora.errors import UserError, reason

log = logging.getLogger(__name__)

PROGRESS_FROM_ROWS = 20_000
CHARACTERS_AT_ONCE = 1_000_000  # bounds memory for long rows: tokenizers use about 50 bytes a character, then truncate

Range = tuple[int, int]
"""First row, and the row after the last one."""
Encode = Callable[[dict[str, list[Any]], int], Mapping[str, Sequence[Any]]]
"""Encodes some rows. It gets one list for each column, and the position of the first row; it returns one list for each
column of the file except ``row``. A row may give several encoded rows or none."""


def write_rows(
    file: Path,
    types: Mapping[str, pa.DataType],
    rows: datasets.Dataset,
    ranges: Iterable[Range],
    encode: Encode,
    num_proc: int = 1,
) -> None:
    """Encode rows and write them to an arrow file, in order. ``row`` counts the encoded rows.

    Args:
        types: the columns of the file, ``row`` among them.
        ranges: rows to encode at once. Two ranges for each process are in memory.
        encode: a function that can be pickled, such as a `functools.partial` of one in a module.
        num_proc: how many processes encode.

    Raises:
        Faults: the messages of every `UserError` that ``encode`` raised.
        UserError: a process was killed.
    """
    schema = pa.schema(types)
    pieces = _Pieces(rows, encode, schema)
    ranges = list(ranges)
    faults: list[str] = []
    n_written = 0
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
        tqdm(total=len(rows), desc="tokenise", unit="row", disable=len(rows) < PROGRESS_FROM_ROWS) as bar,
    ):
        for (start, end), found in zip(ranges, pieces.of(ranges, num_proc), strict=True):
            if isinstance(found, list):
                faults += found
            elif not faults:  # otherwise only look for more faults
                n = len(next(iter(found.values())))
                found["row"] = pa.array(range(n_written, n_written + n), schema.field("row").type)
                writer.write_batch(pa.record_batch([found[name] for name in schema.names], schema=schema))
                n_written += n
            bar.update(end - start)
    if faults:
        raise Faults(faults)


class Faults(UserError):
    """What `Encode` raised for the ranges of a split, all together."""


class _Pieces:
    """Encoded ranges of rows: arrow arrays by column, or the messages of the `UserError` that `Encode` raised."""

    def __init__(self, rows: datasets.Dataset, encode: Encode, schema: pa.Schema) -> None:
        self.rows, self.encode, self.schema = rows, encode, schema

    def __getitem__(self, place: Range) -> dict[str, pa.Array] | list[str]:
        start, end = place
        try:
            columns = self.encode(self.rows[start:end], start)
        except UserError as error:
            return error.problems  # an exception would arrive without its list
        return {field.name: pa.array(columns[field.name], field.type) for field in self.schema if field.name != "row"}

    def of(self, ranges: Sequence[Range], num_proc: int) -> Iterator[dict[str, pa.Array] | list[str]]:
        """The ranges in order, each encoded by one of ``num_proc`` processes."""
        num_proc = min(num_proc, len(ranges))
        if num_proc <= 1:
            yield from (self[place] for place in ranges)
            return
        loader: DataLoader[Any] = DataLoader(
            self,  # type: ignore[arg-type]
            sampler=ranges,
            batch_size=None,
            num_workers=num_proc,
            collate_fn=_as_it_is,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # without its own, it would advance the global generator
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):  # of `encode` itself, in a worker
                raise
            raise UserError(
                f"trainer.num_proc={num_proc}: a process that encodes rows was killed, perhaps because memory ran out; "
                "try fewer processes"
            ) from error
        except OSError as error:
            if error.errno is None:  # of `encode` itself
                raise
            raise UserError(f"trainer.num_proc={num_proc}: {reason(error)}; try fewer processes") from error


def _as_it_is(piece: Any) -> Any:
    return piece


def _one_thread(worker: int) -> None:
    """A tokenizer of Rust would start a thread for each core in every process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def ranges_of(characters: np.ndarray, most_rows: int) -> Iterator[Range]:
    """Ranges of rows to encode at once: at most ``most_rows`` and, of more than one row, `CHARACTERS_AT_ONCE`.

    Args:
        characters: [n] the characters of each row.
    """
    upto = np.cumsum(characters, dtype=np.int64)  # characters of all rows up to each
    start = before = 0
    while start < len(upto):
        fitting = int(np.searchsorted(upto, before + CHARACTERS_AT_ONCE, side="right"))
        end = min(max(fitting, start + 1), start + most_rows)
        yield start, end
        start, before = end, int(upto[end - 1])


def characters_of(column: pa.ChunkedArray) -> np.ndarray:
    """[n] the characters of each row: those of a text, or of all texts of a list."""
    if not pa.types.is_list(column.type):
        lengths: np.ndarray = pc.utf8_length(column).to_numpy()
        return lengths
    upto = np.append(0, np.cumsum(pc.utf8_length(pc.list_flatten(column)).to_numpy(), dtype=np.int64))
    return np.diff(upto[np.append(0, np.cumsum(pc.list_value_length(column).to_numpy(), dtype=np.int64))])


def processes(wanted: int) -> int:
    """``trainer.num_proc``, or the number of cores if that is smaller."""
    if wanted > (most := cores()):
        log.warning(f"trainer.num_proc={wanted}: this process may use {most} cores, so {most} processes encode")
    return min(wanted, most)


def cores() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
