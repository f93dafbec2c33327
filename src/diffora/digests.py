"""Digests of files and backbones, and what differs between the inputs of two runs."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffora.errors import UserError
from diffora.files import atomic, json_digest, read_json
from diffora.hub import resolve
from diffora.places import default_cache_dir
from diffora.settings.identity import deciding, differences

REMEMBERED_FROM = 64 * 2**20
"""Digests of files of at least this many bytes are remembered until the file changes."""
SAMPLED_FROM = 2 * 2**30
"""The digest of a weight file of at least this many bytes covers its two ends and a sample only."""
SAMPLES, SAMPLE = 256, 2**16
"""A sample is this many blocks of this many bytes, at equal distances."""
ENDS = 2**20
"""Bytes at each end that are always covered: they hold the header of safetensors, and the index of pickled files."""

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers looks for them."""
SMALL = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Other files of a backbone that a result depends on."""
KINDS = ("tokenizer.*.json", "*processor_config.json", "*.model", "*.vocab", "*.jinja", "*.py")
"""Patterns for such files whose names differ from model to model."""


# --- files ---


def of_file(path: Path, tail: int = 0) -> str:
    """sha256 of a file's content without its last ``tail`` bytes, as hexadecimal digits.

    The digest of a large file is remembered in the cache folder until the file's size, times or inode change. No
    program can set the change time back, so only a fault of the disk itself would stay unnoticed.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, tail]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        memory = default_cache_dir() / "digests" / key
        # A file that was just written could be written again within the same tick of the clock.
        remembered = stat.st_size >= REMEMBERED_FROM and time.time() - stat.st_ctime > 2
        if remembered:
            with suppress(OSError, ValueError):
                digest, check = memory.read_text().split()
                if check == _check(key, digest):
                    return digest
        hasher, left = hashlib.sha256(), max(0, stat.st_size - tail)
        while left and (block := file.read(min(left, 2**20))):
            hasher.update(block)
            left -= len(block)
    digest = hasher.hexdigest()
    if remembered:
        with suppress(OSError), atomic(memory) as scratch:  # without it, the digest is computed again
            scratch.write_text(f"{digest} {_check(key, digest)}\n")
    return digest


def _check(key: str, digest: str) -> str:
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()


def _sample(path: Path) -> str:
    """sha256 of a large file's size, its two ends, and blocks at equal distances."""
    size = path.stat().st_size
    hasher = hashlib.sha256(str(size).encode())
    places = [(0, ENDS), *((size * i // SAMPLES, SAMPLE) for i in range(SAMPLES)), (max(0, size - ENDS), ENDS)]
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")  # a safetensors file begins with the length of its header
        if ENDS < header < size and path.suffix == ".safetensors":
            places.append((0, header + 8))
        for place, length in places:
            file.seek(place)
            hasher.update(file.read(length))
    return hasher.hexdigest()


# --- backbones ---


def backbone(path: str) -> dict[str, Any] | None:
    """The identity of the backbone at ``model.path``. For a hub id: of its files in the local cache (no network).

    Returns:
        ``digest``: of all files together; ``how``: what it covers; ``files``: the first digits of each file's digest.
        None if the weights are not on this machine.
    """
    folder = _folder(path)
    weights = [] if folder is None else list(_weights(folder))
    if folder is None or not weights:
        return None
    others = [name for name in SMALL if (folder / name).is_file()]
    others += sorted({file.name for kind in KINDS for file in folder.glob(kind) if file.is_file()} - set(others))
    files = {name: folder / name for name in (*weights, *others)}
    sampled = [name for name, file in files.items() if file.stat().st_size >= SAMPLED_FROM]
    found = {name: (_sample if name in sampled else of_file)(file) for name, file in files.items()}
    how = "sha256 of all files"
    if sampled:
        how = f"sha256 of all files; of {', '.join(sampled)}: of header and sample"
    digest = json_digest(found)
    return {"digest": digest, "how": how, "files": {name: each[:16] for name, each in found.items()}}


def _folder(path: str) -> Path | None:
    name, local = resolve(path)
    if local:
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def _weights(folder: Path) -> Iterator[str]:
    """Names of the weight files that transformers loads from a model's folder, and of their index."""
    given = read_json(folder / "config.json")
    given = given.get("transformers_weights") if isinstance(given, dict) else None
    for name in [given] if isinstance(given, str) else WEIGHTS:
        if not (folder / name).is_file():
            continue
        yield name
        if name.endswith(".index.json"):
            index = read_json(folder / name)
            parts = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(parts, dict):
                raise UserError(f"{folder / name} is not an index of weights: it has no weight_map")
            yield from (part for part in sorted(set(map(str, parts.values()))) if (folder / part).is_file())
        return


# --- what a result was made with ---


def made_with(
    composed: Mapping[str, Any],
    data: str,
    rows: Mapping[str, int],
    backbone: Mapping[str, Any] | None,
    inputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a checkpoint or a search is made with, to compare later with `changes`.

    Args:
        composed: the composed configuration in plain containers.
        data: hash of the data.
        rows: number of rows by split.
        backbone: what `backbone` returned.
        inputs: digests of other files, by the key of their setting.

    Returns:
        Plain containers, equal to what comes back from a JSON file.
    """
    made = {
        "settings": deciding(composed),
        "data": data,
        "rows": dict(rows),
        "backbone": backbone,
        "inputs": dict(inputs or {}),
    }
    plain: dict[str, Any] = json.loads(json.dumps(made))  # as it will be when it comes from a file
    return plain


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each difference between two results of `made_with`. None and missing entries are not compared."""

    def both(key: str) -> tuple[Any, Any] | None:
        a, b = old.get(key), new.get(key)
        return None if a is None or b is None or a == b else (a, b)

    found = differences(*pair) if (pair := both("settings")) else []
    if both("data"):
        rows = differences(*pair) if (pair := both("rows")) else []
        what = f"{', '.join(rows)} rows" if rows else "as many rows, with other content"
        found.append(f"the data changed: {what}")
    if pair := both("backbone"):
        files = {line.partition(":")[0] for line in differences(*(each.get("files", {}) for each in pair))}
        if files:
            found.append(f"the backbone's files changed: {', '.join(sorted(files))}")
        elif pair[0].get("digest") != pair[1].get("digest"):
            found.append("the backbone's files changed")
    if pair := both("inputs"):
        found += [f"the files of {key} changed" for key in pair[0] if key in pair[1] and pair[0][key] != pair[1][key]]
    return found
