"""Encoded splits on disk. Each is one arrow file, named by a hash of everything it depends on and mapped into memory.

The last 32 bytes of a file, after the end of the arrow stream, are a digest of its name and content. The digest is
checked before the file is used. Files are put in place atomically, so several runs can share a cache. A file that
several processes need is written by one of them.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow as pa
from filelock import FileLock, Timeout

from diffora import digests
from diffora.errors import UserError
from diffora.files import atomic, json_digest
from diffora.places import default_cache_dir
from diffora.tasks.sources.faults import READ_ERRORS

log = logging.getLogger(__name__)


SEAL = 32
"""Bytes of the digest at the end of a file."""
PATIENCE = 2.0
"""After so many seconds of waiting for another process, a line says so."""


def cached(
    kind: str,
    facts: dict[str, Any],
    write: Callable[[Path], None],
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Open the cache file for ``facts``. If it is missing or damaged, write it first.

    Args:
        kind: name of the folder in the cache, one per kind of content.
        facts: everything that the content depends on, including the version of the format; JSON-serialisable.
        write: writes an arrow stream (see `arrow_writer`) to the given path.
        cache_dir: default `default_cache_dir()`.

    Raises:
        UserError: the cache cannot be written.
    """
    file = file_of(kind, facts, cache_dir)
    found, _ = _opened(file)
    if found is not None:
        return found
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(file):
            found, fault = _opened(file)
            if found is not None:  # another process has just written it
                return found
            if fault:
                log.warning("damaged cache file %s (%s): writing it again", file, fault)
            with atomic(file) as scratch:
                write(scratch)
                seal(scratch, file)
    except OSError as error:
        raise UserError(
            f"Cannot write the cache file {file}: {error.strerror or error}. "
            "Choose another folder with the environment variable DIFFORA_CACHE."
        ) from error
    return datasets.Dataset.from_file(str(file))


def _opened(file: Path) -> tuple[datasets.Dataset | None, str]:
    """The content of a cache file, or None and what is wrong with the file, if there is one."""
    if not file.exists():
        return None, ""
    try:
        if is_sealed(file):
            return datasets.Dataset.from_file(str(file)), ""
        return None, "its digest does not match its content"
    except READ_ERRORS as error:
        return None, str(error)


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Let one process write a file; the others wait. The processes of a run and the runs of a sweep need the same ones.

    On a file system without locks nobody waits, and the last one who is ready replaces the file.
    """
    lock = FileLock(file.with_suffix(".lock"))
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        log.info("waiting for another process, which writes %s", file)
        lock.acquire()
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def file_of(kind: str, facts: dict[str, Any], cache_dir: str | Path | None = None) -> Path:
    """The place of the cache file for some facts, whether it exists or not."""
    key = json_digest(facts)
    return Path(cache_dir or default_cache_dir()) / kind / f"{key}.arrow"


def seal(scratch: Path, file: Path) -> None:
    """Append the digest to a file that was written at ``scratch`` and will be moved to ``file``."""
    digest = _seal(file, digests.of_file(scratch))
    with open(scratch, "ab") as sink:
        sink.write(digest)


def is_sealed(file: Path) -> bool:
    """Whether a file has the content and the name that it had when it was sealed."""
    with open(file, "rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - SEAL))
        end = stream.read()
    return size >= SEAL and end == _seal(file, digests.of_file(file, tail=SEAL))


def _seal(file: Path, digest: str) -> bytes:
    return hashlib.sha256(f"{file.name} {digest}".encode()).digest()


@contextmanager
def arrow_writer(file: Path, schema: pa.Schema) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that appends rows to the file. It takes one list per column of ``schema``."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def append(columns: dict[str, Any]) -> None:
            arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))

        yield append


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Everything that a tokenizer's token ids depend on, also the version of the library that computes them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # The backend keeps truncation and padding of the last call; they do not belong to its identity.
        content = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
        more = [version("tokenizers"), tokenizer.split_special_tokens]  # the second one: at each call
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), repr(sorted(tokenizer.special_tokens_map.items()))]
        options = {key: value for key, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int | float)}
        more = [version("transformers"), sorted(options.items())]
        with TemporaryDirectory() as folder:  # merges and the like, which no attribute holds
            tokenizer.save_vocabulary(folder)
            more += [digests.of_file(file) for file in sorted(Path(folder).iterdir())]
    return {"tokenizer": content, "inputs": [*tokenizer.model_input_names, tokenizer.truncation_side], "more": more}
