"""Packing: several encoded conversations in one row."""

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from diffora.tasks.cache import arrow_writer, cached
from diffora.tasks.chat.tokens import FORMAT_VERSION, ROWS_AT_ONCE


def pack(encoded: datasets.Dataset, max_length: int, keys: np.ndarray | None = None) -> datasets.Dataset:
    """Pack encoded rows into rows of at most ``max_length`` tokens.

    Texts that belong together share a row if they fit into one. They are the windows of one text, and texts with equal
    keys. If they need several rows, these rows get the same number: as their ``example`` if they hold one text, and in
    the column ``together`` in any case. So a split by these numbers never divides them.

    Args:
        keys: [source rows] numbers, equal for source rows that belong together; None: all differ.
    """
    facts = {"format": FORMAT_VERSION, "encoded": encoded.data.table.schema.names, "max_length": max_length}
    facts["of"] = [Path(file["filename"]).name for file in encoded.cache_files]
    return cached("packed", facts, lambda file: _write_packed(file, encoded, max_length, keys))


def _write_packed(file: Path, encoded: datasets.Dataset, max_length: int, keys: np.ndarray | None) -> None:
    lists, number = pa.list_(pa.int32()), pa.int32()
    schema = {"input_ids": lists, "counted": pa.list_(pa.int8()), "segments": lists}
    schema |= {"length": number, "row": number, "example": number, "begun": number, "cut": number, "joint": number}
    schema["together"] = number
    lengths, examples = (encoded.data.column(name).to_numpy() for name in ("length", "example"))
    groups = examples if keys is None else keys[examples]
    packs = best_fit_of_groups(lengths, groups, max_length)
    texts, together = connected(packs, examples), connected(packs, groups)
    first = np.full(len(packs), len(encoded), dtype=np.int64)  # the first source row of the packs that hold one text
    np.minimum.at(first, texts, [int(examples[members].min()) for members in packs])
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
                columns["example"].append(int(first[texts[start + at]]))
                columns["together"].append(int(together[start + at]))
            append(columns)


def best_fit_of_groups(lengths: np.ndarray, groups: np.ndarray, capacity: int) -> list[np.ndarray]:
    """`best_fit` that keeps groups together: the items of a group share a bin if they fit into one, or else few bins.

    Args:
        groups: [n] the group of each item.
    """
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    units: list[np.ndarray] = []
    for members in np.split(order, ends):
        units += [members] if len(members) == 1 else [members[b] for b in best_fit(lengths[members], capacity)]
    units.sort(key=lambda members: int(members[0]))
    bins = best_fit(np.array([lengths[members].sum() for members in units], dtype=np.int64), capacity)
    return [np.concatenate([units[unit] for unit in members]) for members in bins]


def connected(bins: Sequence[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """[bins] a number for each bin; bins that share a group, or are connected by others that do, have the same.

    Args:
        groups: [n] the group of each item.
    """
    of_item, members = np.repeat(np.arange(len(bins)), [len(b) for b in bins]), np.concatenate(bins)
    group = np.unique(groups[members], return_inverse=True)[1] + len(bins)
    size = int(group.max()) + 1
    links = coo_array((np.ones(len(members), dtype=np.int8), (of_item, group)), shape=(size, size))
    found: np.ndarray = connected_components(links, directed=False)[1][: len(bins)]
    return found


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
