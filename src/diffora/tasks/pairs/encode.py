"""From pairs of texts to token ids, in a memory-mapped cache file."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from diffora.tasks.cache import cached, tokenizer_facts
from diffora.tasks.encoding import write_rows
from diffora.tasks.sources.tables import content_hash
from diffora.tasks.tokenise import chunks

FORMAT_VERSION = 1  # raise it when the content of a cache file changes its meaning


def encode(
    rows: datasets.Dataset,
    tokenizer: Any,
    prefix: str,
    longest_source: int,
    longest_target: int,
    num_proc: int = 1,
) -> datasets.Dataset:
    """Tokenise sources and, if the rows have them, targets. Both are cut, not padded, and have the special tokens.

    Args:
        rows: with the columns ``source`` and perhaps ``target``.
        tokenizer: of the model.
        prefix: written before every source.
        longest_source, longest_target: in tokens.
        num_proc: how many processes tokenise.

    Returns:
        input_ids and labels (lists of int32; labels only with targets), source_cut and target_cut (whether they were
        cut), length (of source and target together, to group rows of similar length), row.
    """
    used = [name for name in ("source", "target") if name in rows.column_names]
    facts = {
        "format": FORMAT_VERSION,
        "rows": content_hash(rows.data.table.select(used)),
        **tokenizer_facts(tokenizer),
        "languages": [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
        "prefix": prefix,
        "lengths": [longest_source, longest_target],
    }

    def write(file: Path) -> None:
        _write(file, rows, tokenizer, prefix, longest_source, longest_target, num_proc)

    return cached("pairs", facts, write)


def _write(
    file: Path,
    rows: datasets.Dataset,
    tokenizer: Any,
    prefix: str,
    longest_source: int,
    longest_target: int,
    num_proc: int,
) -> None:
    has_targets = "target" in rows.column_names
    ids, number, flag = pa.list_(pa.int32()), pa.int32(), pa.bool_()
    types = {"input_ids": ids, "source_cut": flag}
    types |= {"labels": ids, "target_cut": flag} if has_targets else {}
    types |= {"length": number, "row": number}
    texts = ("source", "target") if has_targets else ("source",)
    work = partial(
        _encode, tokenizer=tokenizer, prefix=prefix, longest_source=longest_source, longest_target=longest_target
    )
    write_rows(file, types, rows, chunks(rows, texts), work, num_proc)


def _encode(
    part: Mapping[str, list[Any]], start: int, tokenizer: Any, prefix: str, longest_source: int, longest_target: int
) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    sources = [prefix + text for text in part["source"]]
    columns["input_ids"], columns["source_cut"] = _ids(tokenizer, "text", sources, longest_source)
    lengths = np.array([len(row) for row in columns["input_ids"]])
    if "target" in part:
        columns["labels"], columns["target_cut"] = _ids(tokenizer, "text_target", part["target"], longest_target)
        lengths = lengths + [len(row) for row in columns["labels"]]
    columns["length"] = lengths.tolist()
    return columns


def _ids(tokenizer: Any, kind: str, texts: list[str], longest: int) -> tuple[list[list[int]], list[bool]]:
    """(token ids, whether they were cut) of some texts.

    Args:
        kind: ``text`` for sources, ``text_target`` for targets. Tokenizers of translation models differ in these.
    """
    ids = tokenizer(**{kind: texts}, truncation=True, max_length=longest)["input_ids"]
    cut = [len(row) >= longest for row in ids]  # candidates, checked next
    if full := [i for i, may_be in enumerate(cut) if may_be]:
        whole = tokenizer(**{kind: [texts[i] for i in full]}, truncation=False, verbose=False)["input_ids"]
        for i, row in zip(full, whole, strict=True):
            cut[i] = len(row) > longest
    return ids, cut
