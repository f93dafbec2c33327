"""From text to batches: tokenise once into a memory-mapped cache file, pad when a batch is put together."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffora.errors import UserError
from diffora.files import atomic
from diffora.tasks.glue import TaskSpec
from diffora.tasks.sources import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the content of a cache file changes its meaning
ROWS_AT_ONCE = 1000  # bounds memory
PROGRESS_FROM_ROWS = 20_000


def default_cache_dir() -> Path:
    """`$DIFFORA_CACHE`, or `~/.cache/diffora`."""
    return Path(os.environ.get("DIFFORA_CACHE") or "~/.cache/diffora").expanduser()


def tokenise(
    dataset: datasets.Dataset,
    spec: TaskSpec,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Tokenise one split: truncated, not padded.

    The result is an arrow file at `<cache_dir>/tokenised/<key>.arrow`, where the key is a hash of all
    that it depends on; a second call maps that file into memory without touching the tokenizer.

    Args:
        dataset: a split of `sources.Rows`.
        max_length: longest sequence in tokens, special tokens included; of a pair, the longer text is cut.
        cache_dir: default `default_cache_dir()`.

    Returns:
        One row per input row, in order: input_ids (int32 list), token_type_ids (int8 list, only from a
        tokenizer that makes them), labels, length (tokens), row (position in the split).

    Raises:
        UserError: a max_length that leaves no room for text or exceeds what the model can read.
    """
    room = tokenizer.num_special_tokens_to_add(pair=len(spec.text_columns) == 2) + len(spec.text_columns)
    if not room <= max_length <= tokenizer.model_max_length:
        raise UserError(
            f"task.max_length={max_length} must be at least {room} (special tokens and one token of each text) and at "
            f"most {tokenizer.model_max_length} (what this model's tokenizer allows)."
        )
    key = _cache_key(dataset, spec, tokenizer, max_length)
    file = Path(cache_dir or default_cache_dir()) / "tokenised" / f"{key}.arrow"
    if file.exists():
        try:
            return _open(file, len(dataset))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            log.warning("discarding the damaged cache file %s (%s)", file, error)
    try:
        with atomic(file) as scratch:
            _write(scratch, dataset, spec, tokenizer, max_length)
    except OSError as error:
        raise UserError(
            f"Cannot write the token cache {file}: {error.strerror or error}. "
            "Choose another folder with the environment variable DIFFORA_CACHE."
        ) from error
    return _open(file, len(dataset))


def _cache_key(dataset: datasets.Dataset, spec: TaskSpec, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Calls leave their truncation and padding behind in the backend: not part of its identity.
        content = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), repr(sorted(tokenizer.special_tokens_map.items()))]
    facts = {
        "format": FORMAT_VERSION,
        "rows": content_hash(dataset.data.table),
        "tokenizer": content,
        "inputs": [*tokenizer.model_input_names, tokenizer.truncation_side],
        "columns": spec.text_columns,
        "max_length": max_length,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write(
    file: Path, dataset: datasets.Dataset, spec: TaskSpec, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> None:
    types = {"input_ids": pa.list_(pa.int32())}
    if "token_type_ids" in tokenizer.model_input_names:
        types["token_type_ids"] = pa.list_(pa.int8())
    types |= {"labels": pa.float32() if spec.is_regression else pa.int64(), "length": pa.int32(), "row": pa.int32()}
    schema = pa.schema(types)
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
        tqdm(total=len(dataset), desc="tokenise", unit="row", disable=len(dataset) < PROGRESS_FROM_ROWS) as bar,
    ):
        for start in range(0, len(dataset), ROWS_AT_ONCE):
            rows = dataset[start : start + ROWS_AT_ONCE]
            texts = [rows[name] for name in spec.text_columns]
            encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
            columns: dict[str, Any] = dict(encoded)
            # GPT-2's tokenizer adds nothing to an empty text; a row without any token would be masked out entirely.
            columns["input_ids"] = [ids or [tokenizer.eos_token_id] for ids in encoded["input_ids"]]
            columns["labels"] = rows["label"]
            columns["length"] = [len(ids) for ids in columns["input_ids"]]
            columns["row"] = range(start, start + len(rows["label"]))
            arrays = [pa.array(columns[name], type=kind) for name, kind in types.items()]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            bar.update(len(rows["label"]))


def _open(file: Path, n_rows: int) -> datasets.Dataset:
    dataset = datasets.Dataset.from_file(str(file))
    if len(dataset) != n_rows:  # a stream that was cut between two chunks reads without an error
        raise ValueError(f"{len(dataset)} rows where {n_rows} were expected")
    return dataset


class Collator:
    """Put rows together into one batch, padded to its longest row.

    Args:
        pad_token_id: fills `input_ids`.
        pad_to_multiple_of: round the padded length up, e.g. to 8 for tensor cores; 1 does not.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """Collate `dataset[[i, j, …]]`, that is one list per column.

        Returns:
            input_ids, attention_mask and, when given, token_type_ids: long [n, longest]; labels: long [n]
            (float32 [n] for regression) and row: long [n], when given.
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
    filled = np.full(mask.shape, padding, dtype=np.int64)
    filled[mask] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in lists])
    return torch.from_numpy(filled)
