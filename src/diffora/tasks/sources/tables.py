"""Arrow tables of rows from any source: hashes, subsets, columns and rows as Python values."""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffora.settings.quotes import typed
from diffora.tasks.account import Account
from diffora.tasks.messages import some

NUMBER = "number"
"""The column of the row's number at its source, counted from 1 over all files of the split."""
SUBSET_SEED = 0
"""Seed of every choice of rows that must be the same in all runs. It does not depend on the seed of a run."""


def subset(table: pa.Table, max_rows: int | None, account: Account, key: str = "task.max_train_rows") -> pa.Table:
    """At most ``max_rows`` rows in their order, the same rows in every run; None keeps all of them.

    Args:
        account: counts the rows that are left out.
        key: the setting that says how many.
    """
    chosen = subset_rows(table.num_rows, max_rows, account, key)
    return table if chosen is None else table.take(pa.array(chosen))


def subset_rows(
    n_rows: int, max_rows: int | None, account: Account, key: str = "task.max_train_rows"
) -> np.ndarray | None:
    """The sorted positions of the rows that `subset` keeps; None if it keeps all."""
    if max_rows is None or max_rows >= n_rows:
        return None
    account.drop(f"{key}={max_rows}", n_rows - max_rows)
    return np.sort(np.random.default_rng(SUBSET_SEED).permutation(n_rows)[:max_rows])


def joint_hash(hashes: Iterable[str]) -> str:
    """sha256 of several sha256 in order. Moving a row from one split to the next changes it."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, hashes))).hexdigest()


def with_numbers(table: pa.Table) -> pa.Table:
    """A table of all rows of a split, with the column `NUMBER`, so that predictions say which row they are for."""
    return table.append_column(NUMBER, pa.array(range(1, table.num_rows + 1), pa.int64()))


def content_hash(table: pa.Table) -> str:
    """sha256 of a checked table's content. Process, file format, chunking and library versions do not change it.

    Nor does the column `NUMBER`, which only says where a row stood.
    """
    digest = hashlib.sha256()
    for name in table.column_names:
        if name == NUMBER:
            continue
        column = table.column(name)
        digest.update(f"{name}:{len(column)}:".encode())
        while pa.types.is_list(column.type):
            digest.update(pc.list_value_length(column).to_numpy().astype("<i4").tobytes())
            column = pc.list_flatten(column)
        if not pa.types.is_string(column.type):
            digest.update(np.ascontiguousarray(column.to_numpy()).tobytes())
            continue
        digest.update(pc.binary_length(column).to_numpy().astype("<i4").tobytes())
        for chunk in column.chunks:
            _, offsets, values = chunk.buffers()
            if values is not None:  # None if the chunk has only empty texts
                ends = np.frombuffer(offsets, dtype=np.int32)
                digest.update(memoryview(values)[ends[chunk.offset] : ends[chunk.offset + len(chunk)]])
    return digest.hexdigest()


def check_columns(
    names: Sequence[str], wanted: Iterable[str], file: str, problems: list[str], keys: Mapping[str, str] | None = None
) -> None:
    """Append a problem for each wanted column that is missing or there twice.

    The message about a missing column names the existing column that may be meant.

    Args:
        names: the columns that are there.
        keys: the setting that chooses a column, by the column's name; the message names it. Without one, the column
            has to be renamed.
    """
    for name in wanted:
        count, key = names.count(name), (keys or {}).get(name, "")
        if count > 1:
            problems.append(f"{file}: {count} columns are called '{name}'; keep one.")
        elif count == 0:
            by_lower = {column.lower(): column for column in reversed(names)}
            near = difflib.get_close_matches(name.lower(), by_lower, n=1)
            shown = by_lower[near[0]] if near else ""
            of_key = ",".join(shown if other == name else other for other, own in (keys or {}).items() if own == key)
            chosen = f"{key}=[{of_key}]" if key.endswith("columns") else typed(key, shown)
            advice = f"perhaps {chosen}" if key else f"rename '{shown}' if that is it"
            setting = f" ({key})" if key else ""
            problems.append(
                f"{file}: no column '{name}'{setting}; it has {some(names)}{f'; {advice}' if near else ''}."
            )


def row_dicts(batch: pa.RecordBatch, before: int) -> list[dict[str, Any]]:
    """The rows of a batch as dictionaries.

    Args:
        before: the number of rows in earlier batches, for the row number in the message.

    Raises:
        ValueError: some text is not UTF-8; the message names the row and the byte.
    """
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise ValueError(
                    f"row {before + i + 1} (data rows, counted from 1): byte 0x{byte:02x} is not UTF-8"
                ) from None
        raise
    return rows
