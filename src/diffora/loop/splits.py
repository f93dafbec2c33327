"""The search's two splits of the training rows, and the two halves of the validation rows.

Windows of one example, and rows with equal inputs, are always in the same part.
"""

import hashlib
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffora.errors import UserError
from diffora.loop import streams
from diffora.tasks.base import Split

Alike = np.ndarray | None


def split_search(
    examples: np.ndarray, seed: int, valid_fraction: float = 0.5, max_rows: int | None = None, alike: Alike = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide the *training* rows into the search's two splits, which [D] eq. 13 needs to be disjoint.

    Args:
        examples: [n] the example that each training row belongs to (`examples_of`). An example is never divided.
        seed: the run's seed.
        valid_fraction: share of the used examples that goes to the search-valid split.
        max_rows: the search uses at most so many training examples, drawn at random; None: all of them.
        alike: [n] the group of equal inputs that each row belongs to (`alike_of`). A group is never divided; so the
            shares are about those that were asked for. None: all inputs differ.

    Returns:
        (search-train, search-valid): sorted, disjoint row numbers, at least one in each.

    Raises:
        UserError: a number is out of range, or there are fewer than two different examples.
    """
    n_examples, n_different = (len(np.unique(rows)) for rows in (examples, examples if alike is None else alike))
    problems = []
    if not 0 < valid_fraction < 1:
        problems.append(f"search valid_fraction={valid_fraction} must lie strictly between 0 and 1.")
    if max_rows is not None and max_rows < 2:
        problems.append(f"search max_rows={max_rows} must be at least 2: each part needs a row.")
    if n_examples < 2:
        problems.append(f"the search needs at least 2 training rows to split, there are {n_examples}.")
    elif n_different < 2:
        problems.append(f"the search needs at least 2 different training rows to split; all {n_examples} are alike.")
    if problems:
        raise UserError(problems)
    used = n_examples if max_rows is None else min(max_rows, n_examples)
    n_valid = min(max(1, round(used * valid_fraction)), used - 1)
    valid, train = _divide(examples, alike, np.random.default_rng([seed, streams.SPLIT]), n_valid, used)
    return train, valid


def _divide(
    examples: np.ndarray, alike: Alike, generator: np.random.Generator, n_first: int, n_used: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of two disjoint parts, which share no example and no input; at least one group of inputs in each.

    Groups are taken in random order; one that is too large for what is left of a part is passed over.

    Args:
        n_first: the most examples of the first part.
        n_used: the most examples of both parts.
    """
    groups = examples if alike is None else alike
    unique, group = np.unique(groups, return_inverse=True)
    first_rows = np.unique(examples, return_index=True)[1]
    order = generator.permutation(len(unique))
    sizes = np.bincount(group[first_rows], minlength=len(unique))[order]  # examples of each group
    in_first = _taken(sizes, n_first)
    rest = np.flatnonzero(~in_first)
    in_second = rest[_taken(sizes[rest], n_used - int(sizes[in_first].sum()))]
    first, second = (np.flatnonzero(np.isin(groups, unique[order[part]])) for part in (in_first, in_second))
    return first, second


def _taken(sizes: np.ndarray, most: int) -> np.ndarray:
    """Which groups are taken, in their order, so that they have at most so many examples; the smallest if none fits."""
    taken, left = np.zeros(len(sizes), dtype=bool), most
    for i, size in enumerate(sizes.tolist()):
        if size <= left:
            taken[i], left = True, left - size
    if not taken.any():
        taken[sizes.argmin()] = True
    return taken


def split_hash(train_idx: np.ndarray, valid_idx: np.ndarray) -> str:
    """sha256 of the two splits of a search. It is stored with the selection that the search made."""
    digest = hashlib.sha256()
    for indices in (train_idx, valid_idx):
        digest.update(f"{len(indices)}:".encode() + np.asarray(indices, dtype="<i8").tobytes())
    return digest.hexdigest()


def held_out_split(examples: np.ndarray, seed: int, alike: Alike = None) -> tuple[np.ndarray, np.ndarray]:
    """Divide a validation split by example into two halves: the first chooses the checkpoint, the second reports it.

    Args:
        examples: [n] the example that each row belongs to (`examples_of`).
        seed: the run's seed.
        alike: [n] the group of equal inputs that each row belongs to (`alike_of`). It is never divided, unless all rows
            are alike.

    Returns:
        (choice, held-out): sorted row numbers. If the number of examples is odd, held-out has one more.

    Raises:
        UserError: there are fewer than two examples.
    """
    n_examples = len(np.unique(examples))
    if n_examples < 2:
        raise UserError(
            f"a validation split of {n_examples} rows cannot be divided into choice and held-out rows; it needs at "
            "least 2."
        )
    if alike is not None and len(np.unique(alike)) < 2:
        alike = None
    return _divide(examples, alike, np.random.default_rng([seed, streams.HELD_OUT]), n_examples // 2, n_examples)


def examples_of(dataset: datasets.Dataset) -> np.ndarray:
    """[n] the example that each row of an encoded split belongs to: the row itself, if each example is one row."""
    if "example" in dataset.column_names:
        examples: np.ndarray = dataset.data.column("example").to_numpy()
        return examples
    return np.arange(len(dataset))


def alike_of(split: Split, keys: pa.Array | None = None) -> np.ndarray:
    """[n] the first example whose inputs equal those of each encoded row; labels do not matter.

    The inputs are the tokens that the model reads, or the image file. Rows of packed conversations are alike if they
    share a prompt (`diffora.tasks.chat.packing`). Rows of a task that has neither tokens nor image files count as
    different.

    Args:
        keys: one text for each source row, which is compared in place of the inputs (`Task.row_keys`).
    """
    names, example = np.unique(examples_of(split.encoded), return_inverse=True)
    if "together" in split.encoded.column_names:
        contents = split.encoded.data.column("together").to_numpy()[np.unique(example, return_index=True)[1]]
    elif keys is None:
        contents = _contents(split, example)
    else:
        contents = pc.dictionary_encode(keys).indices.to_numpy()[names]
    _, first, group = np.unique(contents, return_index=True, return_inverse=True)
    found: np.ndarray = names[first[group]][example]
    return found


def count_shared(
    split: Split, train: Split, keys: tuple[pa.Array | None, pa.Array | None] = (None, None)
) -> tuple[int, int]:
    """(how many examples of a split have the inputs of a training example, how many examples it has).

    Args:
        keys: of the rows of both, in place of their inputs (`Task.row_keys`).
    """
    of_split, of_train = keys
    if of_split is not None and of_train is not None:
        return pc.sum(pc.is_in(of_split, of_train)).as_py() or 0, len(of_split)
    contents, trained = (
        _contents(part, np.unique(examples_of(part.encoded), return_inverse=True)[1]) for part in (split, train)
    )
    return int(np.isin(contents, trained).sum()), len(contents)


def _contents(split: Split, example: np.ndarray) -> np.ndarray:
    """A 64-bit digest of the inputs of each example, from those of its rows.

    Args:
        example: [n] the number of the example that each row belongs to, from 0 without gaps.
    """
    content = np.zeros(int(example.max(initial=-1)) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(content, example, _digests(split))
    return content


def _digests(split: Split) -> np.ndarray:
    """[n] a 64-bit digest of the inputs of each encoded row."""

    def digest(data: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

    if "digest" in split.rows.column_names:  # of image files
        return np.array([digest(str(text).encode()) for text in split.rows["digest"][:]], dtype=np.uint64)
    if "input_ids" not in split.encoded.column_names:
        return np.arange(len(split.encoded), dtype=np.uint64)
    digests: list[int] = []
    for chunk in split.encoded.data.column("input_ids").chunks:
        borders, values = chunk.offsets.to_numpy(), chunk.values
        while pa.types.is_list(values.type):  # a list for each choice
            borders, values = values.offsets.to_numpy()[borders], values.values
        tokens = values.to_numpy()
        digests += [digest(tokens[begin:end].tobytes()) for begin, end in pairwise(borders)]
    return np.array(digests, dtype=np.uint64)
