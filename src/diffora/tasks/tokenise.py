"""From text to batches: texts are tokenised once into a memory-mapped cache file, and padded when a batch is made."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from diffora.errors import UserError
from diffora.tasks.cache import cached, tokenizer_facts
from diffora.tasks.encoding import Range, characters_of, ranges_of, write_rows
from diffora.tasks.sources.tables import content_hash
from diffora.tasks.spec import TaskSpec

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2  # raise it when the content of a cache file changes its meaning
ROWS_AT_ONCE = 1000  # bounds memory
LINE_BREAK = "\n"
"""Stands between two texts if the tokenizer puts nothing there."""


def tokenise(
    dataset: datasets.Dataset,
    spec: TaskSpec,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    cache_dir: str | Path | None = None,
    num_proc: int = 1,
) -> datasets.Dataset:
    """Tokenise one split: truncated, not padded.

    If the tokenizer puts nothing between two texts, a line break stands there.

    The result is the arrow file `<cache_dir>/tokenised/<key>.arrow`, where the key is a hash of everything that it
    depends on. A second call maps that file into memory and does not use the tokenizer.

    Args:
        dataset: the checked rows of a split.
        spec: the task.
        max_length: longest sequence in tokens, including special tokens; of a pair, the longer text is cut.
        cache_dir: default `cache.default_cache_dir()`.
        num_proc: how many processes tokenise; the file does not depend on it.

    Returns:
        One row per input row, in order: input_ids (int32 list), token_type_ids (int8 list, only if the tokenizer makes
        them), labels (if the rows have them), length (in tokens), cut (whether the text was cut), row (position in the
        split).

    Raises:
        UserError: max_length leaves no room for text, or is more than the model can read.
    """
    needs_break = len(spec.text_columns) == 2 and joins_texts(tokenizer)
    room = tokenizer.num_special_tokens_to_add(pair=len(spec.text_columns) == 2) + len(spec.text_columns) + needs_break
    if not room <= max_length <= tokenizer.model_max_length:
        raise UserError(
            f"task.max_length={max_length} must be at least {room} (special tokens and one token of each text) and at "
            f"most {tokenizer.model_max_length} (what this model's tokenizer allows)."
        )
    used = [name for name in (*spec.text_columns, "label") if name in dataset.column_names]
    facts = {
        "format": FORMAT_VERSION,
        "rows": content_hash(dataset.data.table.select(used)),
        **tokenizer_facts(tokenizer),
        "columns": spec.text_columns,
        "max_length": max_length,
    }
    if not tokenizer.num_special_tokens_to_add(pair=len(spec.text_columns) == 2):
        facts["empty"] = empty_token(tokenizer)
    if needs_break:
        facts["between"] = LINE_BREAK

    def write(file: Path) -> None:
        _write(file, dataset, spec, tokenizer, max_length, num_proc)

    return cached("tokenised", facts, write, cache_dir)


def _write(
    file: Path,
    dataset: datasets.Dataset,
    spec: TaskSpec,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    num_proc: int,
) -> None:
    types = {"input_ids": pa.list_(pa.int32())}
    if "token_type_ids" in tokenizer.model_input_names:
        types["token_type_ids"] = pa.list_(pa.int8())
    if "label" in dataset.column_names:
        types["labels"] = dataset.data.schema.field("label").type
    types |= {"length": pa.int32(), "cut": pa.bool_(), "row": pa.int32()}
    encode = partial(_encode, text_columns=spec.text_columns, tokenizer=tokenizer, max_length=max_length)
    write_rows(file, types, dataset, chunks(dataset, spec.text_columns), encode, num_proc)


def _encode(
    rows: Mapping[str, list[Any]], start: int, text_columns: Sequence[str], tokenizer: Any, max_length: int
) -> dict[str, Any]:
    texts = [rows[name] for name in text_columns]
    if len(texts) == 2 and joins_texts(tokenizer):
        texts = _with_break(texts[0], texts[1], tokenizer)
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
    columns: dict[str, Any] = dict(encoded)
    # GPT-2's tokenizer gives no token for an empty text. A row without tokens would be masked completely.
    columns["input_ids"] = [ids or [empty_token(tokenizer)] for ids in encoded["input_ids"]]
    if "token_type_ids" in encoded:
        columns["token_type_ids"] = [types or [0] for types in encoded["token_type_ids"]]
    if "label" in rows:
        columns["labels"] = rows["label"]
    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    columns["cut"] = was_cut(encoded, texts, tokenizer, max_length)
    return columns


def joins_texts(tokenizer: Any) -> bool:
    """Whether a tokenizer puts nothing between two texts, as GPT-2's: a pair has no more special tokens than a text."""
    pair, alone = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (True, False))
    return bool(pair == alone)


def _with_break(first: Sequence[str], second: Sequence[str], tokenizer: Any) -> list[list[str]]:
    """Both texts of each row with a line break between them, at the end of a text that is not cut."""
    if tokenizer.truncation_side == "left":
        return [[f"{text}{LINE_BREAK}" for text in first], list(second)]
    return [list(first), [f"{LINE_BREAK}{text}" for text in second]]


def empty_token(tokenizer: Any) -> int:
    """The id of the token that stands for a text without tokens, if there are no special tokens around it."""
    known = (tokenizer.eos_token_id, tokenizer.unk_token_id)
    found: int = next((i for i in known if i is not None), tokenizer.pad_token_id)
    return found


def was_cut(encoded: Any, texts: Sequence[list[str]], tokenizer: Any, max_length: int) -> list[bool]:
    """Which of the encoded texts are longer than ``max_length`` tokens."""
    cut = [len(ids) == max_length for ids in encoded["input_ids"]]  # candidates, checked below
    full = [i for i, may_be in enumerate(cut) if may_be]
    if full and encoded.encodings is None:  # only a fast tokenizer keeps what it cut off
        whole = tokenizer(*([column[i] for i in full] for column in texts), truncation=False, verbose=False)
        longer = [len(ids) > max_length for ids in whole["input_ids"]]
    else:
        longer = [bool(encoded.encodings[i].overflowing) for i in full]
    for i, is_longer in zip(full, longer, strict=True):
        cut[i] = is_longer
    return cut


def chunks(dataset: datasets.Dataset, text_columns: Sequence[str]) -> Iterator[Range]:
    """Ranges of rows to tokenise at once."""
    characters = [characters_of(dataset.data.column(name)) for name in text_columns]
    return ranges_of(np.stack(characters).sum(axis=0, dtype=np.int64), ROWS_AT_ONCE)


class Collator:
    """Makes one batch of rows, padded on the right to its longest row.

    Args:
        pad_token_id: padding value of `input_ids`.
        pad_to_multiple_of: round the padded length up to a multiple of this, e.g. 8 for tensor cores.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """Collate `dataset[[i, j, …]]`, that is one list per column.

        Returns:
            input_ids and attention_mask: long [n, longest]. If the rows have them, also token_type_ids: long
            [n, longest]; labels: long [n] (float32 for regression); row: long [n].
        """
        lengths = np.array([len(ids) for ids in rows["input_ids"]])
        longest = max(1, int(lengths.max()))
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        mask = np.arange(width) < lengths[:, None]
        batch = {
            "input_ids": _fill(mask, rows["input_ids"], self.pad_token_id),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }
        if "token_type_ids" in rows:
            batch["token_type_ids"] = _fill(mask, rows["token_type_ids"], 0)
        return batch | {name: torch.tensor(rows[name]) for name in ("labels", "row") if name in rows}


def _fill(mask: np.ndarray, lists: Sequence[Sequence[int]], padding: int) -> Tensor:
    """The lists as rows of a long tensor of the mask's shape, with the padding value where the mask is False."""
    filled = np.full(mask.shape, padding, dtype=np.int64)
    filled[mask] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in lists])
    return torch.from_numpy(filled)
