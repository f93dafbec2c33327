"""Taking validation rows from the training rows, if the data have no validation file."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffora.tasks.account import Account, Accounts
from diffora.tasks.sources.tables import NUMBER


def row_texts(table: pa.Table) -> pa.ChunkedArray:
    """One text for each row, made of all its texts; rows with equal texts (`plain`) have equal ones."""
    texts = [plain(table.column(name)) for name in table.column_names if name not in ("label", NUMBER)]
    return pc.binary_join_element_wise(*texts, pa.scalar("\x1f", pa.large_string()))


def plain(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """The texts as they are compared: without white space around them, and in one Unicode form (NFC)."""
    return pc.utf8_normalize(pc.utf8_trim_whitespace(texts.cast(pa.large_string())), form="NFC")


def count_repeated(table: pa.Table) -> int:
    """How many rows have the texts of an earlier row."""
    different: int = len(pc.unique(row_texts(table)))
    return int(table.num_rows) - different


def count_contradictions(table: pa.Table) -> int:
    """How many texts have rows with different labels."""
    labels = table.column("label")
    if pa.types.is_list(labels.type):
        labels = pa.array(map(str, labels.to_pylist()), pa.string())
    pairs = pa.table({"text": row_texts(table), "label": labels})
    labels = pairs.group_by("text").aggregate([("label", "count_distinct")])
    found: int = pc.sum(pc.greater(labels.column("label_count_distinct"), 1)).as_py()
    return found


def choose_validation(table: pa.Table, fraction: float, seed: int, by_class: bool) -> np.ndarray:
    """Which rows are for validation: a boolean array with one entry for each row.

    Rows with equal texts stay together. Each class gives about ``fraction`` of its rows, and at least one if it has two
    different texts, so no class is in validation only. Without classes at least two rows are chosen, of three or more.

    Args:
        table: text columns and ``label``.
        seed: another seed draws other rows.
        by_class: whether to draw from each class by itself; otherwise labels do not matter. A row of several classes is
            drawn with those of its rarest class.
    """
    if not by_class:
        fraction = max(fraction, 2 / max(4, table.num_rows))  # one row chooses the epoch, another one reports it
    same_text: dict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(row_texts(table).to_pylist()):
        same_text[text].append(row)
    labels: list[list[int]] = table.column("label").to_pylist()
    if by_class and not pa.types.is_list(table.column("label").type):
        labels = [[label] for label in labels]  # type: ignore[list-item]
    counts = Counter(label for row in labels for label in row) if by_class else Counter()
    strata: dict[int, list[list[int]]] = defaultdict(list)
    for rows in same_text.values():
        rarest = min(labels[rows[0]], key=lambda label: (counts[label], label), default=-1) if by_class else 0
        strata[rarest].append(rows)
    chosen = np.zeros(table.num_rows, dtype=bool)
    generator = np.random.default_rng(seed)
    for _, groups in sorted(strata.items()):
        wanted, taken = max(1, round(fraction * sum(map(len, groups)))), 0
        drawn = [groups[i] for i in generator.permutation(len(groups))]
        left = []  # for training: one text at least
        for rows in drawn[:-1]:
            if taken + len(rows) <= wanted:
                chosen[rows] = True
                taken += len(rows)
            else:
                left.append(rows)
        for rows in sorted([*left, drawn[-1]], key=len)[: len(left)]:
            if taken < (1 if by_class else 2):  # the texts have so many rows that none fitted, or one
                chosen[rows] = True
                taken += len(rows)
    if by_class:  # one text may have several labels, so a class can be left without training rows
        trained = {label for row, out in zip(labels, chosen, strict=True) if not out for label in row}
        for rows in same_text.values():
            if any(label not in trained for row in rows for label in labels[row]):
                chosen[rows] = False
    return chosen


def cut(table: pa.Table, chosen: np.ndarray, settings: Any, accounts: Accounts, how: str) -> tuple[pa.Table, pa.Table]:
    """(training rows, validation rows). Both accounts say how the rows were divided.

    Args:
        chosen: [n] from `choose_validation`.
        settings: of the task, `diffora.tasks.sources.place.PlaceSettings`.
        accounts: of the task.
        how: how the rows were drawn, in words.
    """
    train, validation = table.filter(pa.array(~chosen)), table.filter(pa.array(chosen))
    why = f"task.validation_fraction={settings.validation_fraction:g}, task.split_seed={settings.split_seed}"
    accounts["train"].drop(f"taken for validation, {why}", validation.num_rows)
    accounts["validation"] = Account(validation.num_rows)
    accounts["validation"].notes.append(f"{validation.num_rows:,} of the training rows, {how}: {why}")
    return train, validation
