"""Rows of images, still encoded as bytes or files, and their digests."""

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffora.errors import UserError
from diffora.files import atomic
from diffora.places import default_cache_dir
from diffora.tasks.cache import SEAL, is_sealed, seal
from diffora.tasks.encoding import cores
from diffora.tasks.images.decode import FORMAT_VERSION, IMAGES_AT_ONCE, progress, read_bytes
from diffora.tasks.images.source import Source

log = logging.getLogger(__name__)


def source_rows(source: Source) -> datasets.Dataset:
    """Rows with ``image`` (bytes or path), ``label`` (if there are labels), ``digest``, ``where`` and ``file``."""
    columns: dict[str, Any] = {"image": source.images}
    if source.labels is not None:
        columns["label"] = source.labels.cast(pa.int64())
    columns["digest"] = pa.array(digests(source), pa.binary())
    columns["where"] = pa.array(source.where, pa.string())
    columns["file"] = pc.struct_field(source.images, "path")
    return datasets.Dataset(pa.table(columns))


def digests(source: Source) -> list[bytes]:
    """sha256 of each encoded image. They are cached and used again as long as the source's files do not change."""
    n = len(source.images)
    known: Path | None = None
    if source.files:
        stats = [identity(file) for file in source.files]
        key = hashlib.sha256(json.dumps([FORMAT_VERSION, n, stats]).encode()).hexdigest()
        known = default_cache_dir() / "images" / f"{key}.sha256"
        if known.is_file():
            if known.stat().st_size == 32 * n + SEAL and is_sealed(known):
                content = known.read_bytes()
                return [content[start : start + 32] for start in range(0, 32 * n, 32)]
            log.warning("damaged cache file %s: writing it again", known)
    found: list[bytes] = []
    chunks = pa.table({"image": source.images}).to_batches(max_chunksize=IMAGES_AT_ONCE)
    with ThreadPoolExecutor(cores()) as pool:
        for chunk in progress(chunks, n, "read images"):
            found += pool.map(_digest, chunk.column(0).to_pylist())
    if known is not None:
        try:
            with atomic(known) as scratch:
                scratch.write_bytes(b"".join(found))
                seal(scratch, known)
        except OSError as error:
            raise UserError(
                f"Cannot write the cache file {known}: {error.strerror or error}. "
                "Choose another folder with the environment variable DIFFORA_CACHE."
            ) from error
    return found


def identity(file: Path) -> tuple[Any, ...]:
    """Facts about a file that change when it is written to or replaced. A change time cannot be set back."""
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def images_hash(rows: datasets.Dataset) -> str:
    """sha256 of the images and labels of rows, in order."""
    columns = rows.select_columns([name for name in ("digest", "label") if name in rows.column_names])[:]
    digest = hashlib.sha256(b"".join(columns["digest"]))
    digest.update(np.asarray(columns.get("label", ()), "<i8").tobytes())
    return digest.hexdigest()


def _digest(image: Mapping[str, Any] | None) -> bytes:
    try:
        return hashlib.sha256(read_bytes(image)).digest()
    except OSError:
        return bytes(32)  # decoding the image will fail too, and report the reason
