"""Splits by example: the search's two splits of the training rows, and the two halves of the validation rows."""

import hashlib

import datasets
import numpy as np

from diffora.errors import UserError
from diffora.loop import streams


def split_search(
    examples: np.ndarray, seed: int, valid_fraction: float = 0.5, max_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide the *training* rows into the search's two splits, which [D] eq. 13 needs to be disjoint.

    Args:
        examples: [n] the example that each training row belongs to (`examples_of`). An example is never divided.
        seed: the run's seed.
        valid_fraction: share of the used examples that goes to the search-valid split.
        max_rows: the search uses at most so many training examples, drawn at random; None: all of them.

    Returns:
        (search-train, search-valid): sorted, disjoint row numbers, at least one in each.

    Raises:
        UserError: a number is out of range, or there are fewer than two examples.
    """
    unique = np.unique(examples)
    n_rows = len(unique)
    problems = []
    if not 0 < valid_fraction < 1:
        problems.append(f"search valid_fraction={valid_fraction} must lie strictly between 0 and 1.")
    if max_rows is not None and max_rows < 2:
        problems.append(f"search max_rows={max_rows} must be at least 2: each part needs a row.")
    if n_rows < 2:
        problems.append(f"the search needs at least 2 training rows to split, there are {n_rows}.")
    if problems:
        raise UserError(problems)
    used = n_rows if max_rows is None else min(max_rows, n_rows)
    n_valid = min(max(1, round(used * valid_fraction)), used - 1)
    order = np.random.default_rng([seed, streams.SPLIT]).permutation(n_rows)[:used]
    train, valid = (np.flatnonzero(np.isin(examples, unique[part])) for part in (order[n_valid:], order[:n_valid]))
    return train, valid


def split_hash(train_idx: np.ndarray, valid_idx: np.ndarray) -> str:
    """sha256 of the two splits of a search. It is stored with the selection that the search made."""
    digest = hashlib.sha256()
    for indices in (train_idx, valid_idx):
        digest.update(f"{len(indices)}:".encode() + np.asarray(indices, dtype="<i8").tobytes())
    return digest.hexdigest()


def held_out_split(examples: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide a validation split by example into two halves: the first chooses the checkpoint, the second reports it.

    Args:
        examples: [n] the example that each row belongs to (`examples_of`).
        seed: the run's seed.

    Returns:
        (choice, held-out): sorted row numbers. If the number of examples is odd, held-out has one more.

    Raises:
        UserError: there are fewer than two examples.
    """
    unique = np.unique(examples)
    n_rows = len(unique)
    if n_rows < 2:
        raise UserError(
            f"a validation split of {n_rows} rows cannot be divided into choice and held-out rows; it needs at least 2."
        )
    order = np.random.default_rng([seed, streams.HELD_OUT]).permutation(n_rows)
    half = order[: n_rows // 2], order[n_rows // 2 :]
    choice, held_out = (np.flatnonzero(np.isin(examples, unique[part])) for part in half)
    return choice, held_out


def examples_of(dataset: datasets.Dataset) -> np.ndarray:
    """[n] the example that each row of an encoded split belongs to: the row itself, if each example is one row."""
    if "example" in dataset.column_names:
        examples: np.ndarray = dataset.data.column("example").to_numpy()
        return examples
    return np.arange(len(dataset))
