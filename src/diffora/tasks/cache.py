"""Encoded splits on disk: one arrow file each, named by a hash of all that it depends on, mapped into memory."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from diffora.errors import UserError
from diffora.files import atomic

log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """`$DIFFORA_CACHE`, or `~/.cache/diffora`."""
    return Path(os.environ.get("DIFFORA_CACHE") or "~/.cache/diffora").expanduser()


def cached(
    kind: str,
    facts: dict[str, Any],
    write: Callable[[Path], None],
    n_rows: int | None = None,
    cache_dir: str | Path | None = None,
    last_example: int | None = None,
) -> datasets.Dataset:
    """Open the file that belongs to ``facts``; have it written first if it is not there or damaged.

    Args:
        kind: folder in the cache, and what the facts are about.
        facts: JSON-serialisable; everything that the content depends on, the format's version included.
        write: writes an arrow stream (see `arrow_writer`) to the path it is given.
        n_rows: rows that the file must have, where that is known.
        last_example: what ``example`` must be in the last row, where an example makes an unknown number of rows.

    Raises:
        UserError: the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    file = Path(cache_dir or default_cache_dir()) / kind / f"{key}.arrow"
    if file.exists():
        try:
            return _open(file, n_rows, last_example)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            log.warning("discarding the damaged cache file %s (%s)", file, error)
    try:
        with atomic(file) as scratch:
            write(scratch)
    except OSError as error:
        raise UserError(
            f"Cannot write the cache file {file}: {error.strerror or error}. "
            "Choose another folder with the environment variable DIFFORA_CACHE."
        ) from error
    return _open(file, n_rows, last_example)


@contextmanager
def arrow_writer(file: Path, schema: pa.Schema) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that appends rows, given as one list per column of ``schema``."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def append(columns: dict[str, Any]) -> None:
            arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))

        yield append


def _open(file: Path, n_rows: int | None, last_example: int | None) -> datasets.Dataset:
    """A stream that was cut between two chunks reads without an error, so its end is checked."""
    dataset = datasets.Dataset.from_file(str(file))
    if n_rows is not None and len(dataset) != n_rows:
        raise ValueError(f"{len(dataset)} rows where {n_rows} were expected")
    if last_example is not None and dataset["example"][-1] != last_example:
        raise ValueError(f"it does not reach example {last_example}")
    return dataset


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What the token ids that a tokenizer gives depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Calls leave their truncation and padding behind in the backend: not part of its identity.
        content = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), repr(sorted(tokenizer.special_tokens_map.items()))]
    return {"tokenizer": content, "inputs": [*tokenizer.model_input_names, tokenizer.truncation_side]}
