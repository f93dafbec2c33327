"""Packing: several encoded conversations in one row."""

import bisect
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from diffora.tasks.cache import arrow_writer, cached
from diffora.tasks.chat.tokens import FORMAT_VERSION, ROWS_AT_ONCE


def pack(encoded: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Pack encoded rows into rows of at most ``max_length`` tokens.

    A long text has several full windows and a last, shorter one. All its windows get as ``example`` the number of the
    row that holds the last one, so that a split by example never divides a text.
    """
    facts = {"format": FORMAT_VERSION, "encoded": encoded.data.table.schema.names, "max_length": max_length}
    facts["of"] = [Path(file["filename"]).name for file in encoded.cache_files]
    return cached("packed", facts, lambda file: _write_packed(file, encoded, max_length))


def _write_packed(file: Path, encoded: datasets.Dataset, max_length: int) -> None:
    lists, number = pa.list_(pa.int32()), pa.int32()
    schema = {"input_ids": lists, "counted": pa.list_(pa.int8()), "segments": lists}
    schema |= {"length": number, "row": number, "example": number, "begun": number, "cut": number, "joint": number}
    lengths, examples = (encoded.data.column(name).to_numpy() for name in ("length", "example"))
    packs = best_fit(lengths, max_length)
    home: dict[int, int] = {}
    for members in packs:  # the last window of a text comes after its full windows, so it decides
        home |= dict.fromkeys(examples[members].tolist(), int(examples[members].min()))
    with arrow_writer(file, pa.schema(schema)) as append:
        for start in range(0, len(packs), ROWS_AT_ONCE):
            part = packs[start : start + ROWS_AT_ONCE]
            rows = encoded[np.concatenate(part)]
            ends = np.cumsum([len(members) for members in part])
            columns: dict[str, list[Any]] = {name: [] for name in schema}
            for at, members in enumerate(part):
                own = slice(ends[at] - len(members), ends[at])
                columns["input_ids"].append(np.concatenate(rows["input_ids"][own]))
                columns["counted"].append(np.concatenate(rows["counted"][own]))
                columns["segments"].append(rows["length"][own])
                columns["length"].append(sum(rows["length"][own]))
                columns["row"].append(start + at)
                columns["begun"].append(sum(rows["begun"][own]))
                columns["cut"].append(sum(rows["cut"][own]))
                columns["joint"].append(sum(rows["joint"][own]))
                columns["example"].append(home[int(examples[members[0]])])
            append(columns)


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Pack items into bins by best-fit decreasing: the longest item first, each into the fullest bin that has room.

    Args:
        lengths: [n] sizes of the items, at most ``capacity`` each.

    Returns:
        For each bin the positions of its items, in the order in which they were added.
    """
    bins: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of `with_space`, sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[item])
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            chosen, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[at]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        bins[chosen].append(item)
        left = space - size
        if left not in with_space:
            with_space[left] = []
            bisect.insort(spaces, left)
        with_space[left].append(chosen)
    return [np.array(members) for members in bins]
