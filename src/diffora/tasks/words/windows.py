"""From words to rows of tokens: which token stands for which word, and windows for long sentences.

The tokenizer reads the words as one text, with a space between them. So a model sees in training what it sees later in
``pipeline("token-classification")``, and byte-level tokenizers (RoBERTa, GPT-2) need no ``add_prefix_space``. Tokens
are assigned to words by their place in the text; a tokenizer that does not know places (a slow one) reads word by word.
A word is represented by the first token that has one of its characters; a token of a space alone is never that token.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from diffora.tasks.base import Batch
from diffora.tasks.encoding import characters_of, ranges_of, write_rows
from diffora.tasks.ignored import IGNORED
from diffora.tasks.tokenise import Collator, empty_token

ROWS_AT_ONCE = 1000  # bounds memory
NO_TOKEN = -1
"""In ``starts``, the place of a word for which the tokenizer has no token."""
NO_WORD = -2
"""In ``starts``, padding."""


@dataclass(frozen=True)
class Sentence:
    """A sentence as tokens.

    Attributes:
        ids: [n] token ids, without special tokens.
        starts: [words] the first token of each word; `NO_TOKEN` for a word without one.
    """

    ids: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around a text.

    Attributes:
        before, after: their ids.
        type_id: the token type of a text; None if the tokenizer makes no token types.
        empty: what stands for a text without tokens, if there are no special tokens.
    """

    before: list[int]
    after: list[int]
    type_id: int | None
    empty: int

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        text = "one two three four"
        whole = tokenizer(text)
        ids, inner = list(whole["input_ids"]), list(tokenizer(text, add_special_tokens=False)["input_ids"])
        at = next(i for i in range(len(ids)) if ids[i : i + len(inner)] == inner)
        types = list(whole["token_type_ids"]) if "token_type_ids" in tokenizer.model_input_names else None
        return cls(ids[:at], ids[at + len(inner) :], None if types is None else types[at], empty_token(tokenizer))


def tokenise_words(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[Sentence]:
    """The sentences as tokens."""
    if not tokenizer.is_fast:
        known: dict[tuple[str, bool], tuple[list[int], int]] = {}
        return [_word_by_word(tokenizer, words, known) for words in rows]
    found = tokenizer(
        [" ".join(words) for words in rows],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,  # it would warn of long texts, which windows take care of
    )
    sentences = []
    for words, ids, places in zip(rows, found["input_ids"], found["offset_mapping"], strict=True):
        lengths = np.array([len(word) for word in words], dtype=np.int64)
        ends = np.cumsum(lengths + 1) - 1
        begin, end = np.array(places, dtype=np.int64).reshape(-1, 2).T
        word = np.searchsorted(ends, begin, side="right")  # the first word that ends behind the token's begin
        inside = word < len(words)
        inside[inside] &= (ends - lengths)[word[inside]] < end[inside]
        starts = np.full(len(words), NO_TOKEN)
        tokens = np.flatnonzero(inside & (begin < end))[::-1]
        starts[word[tokens]] = tokens  # the last assignment, that of the first token, stays
        sentences.append(Sentence(np.array(ids, dtype=np.int64), starts))
    return sentences


def _word_by_word(
    tokenizer: Any, words: Sequence[str], known: dict[tuple[str, bool], tuple[list[int], int]]
) -> Sentence:
    """A sentence as tokens, for a tokenizer that does not know the places of tokens.

    Args:
        known: tokens of earlier words, and which of them is the first that is not a space; it grows.
    """
    ids: list[int] = []
    starts = []
    for at, word in enumerate(words):
        key = word, at > 0
        if key not in known:
            found = list(tokenizer(f" {word}" if at else word, add_special_tokens=False)["input_ids"])
            texts = tokenizer.convert_ids_to_tokens(found)
            known[key] = found, next((i for i, text in enumerate(texts) if text.strip(" ▁Ġ")), NO_TOKEN)
        found, first = known[key]
        starts.append(NO_TOKEN if first == NO_TOKEN else len(ids) + first)
        ids += found
    return Sentence(np.array(ids, dtype=np.int64), np.array(starts, dtype=np.int64))


@dataclass(frozen=True)
class Window:
    """A part of a sentence.

    Attributes:
        begin, end: its tokens.
        first, stop: the words whose tags are predicted here; each word belongs to one window.
    """

    begin: int
    end: int
    first: int
    stop: int


def windows(sentence: Sentence, room: int, overlap: int) -> list[Window]:
    """Windows that cover a sentence. They begin and end between words.

    Of the words that two windows share, each takes the half that is farther from its edge.

    Args:
        room: the most tokens, and the most words, in a window. A longer word is cut.
        overlap: the most tokens that neighbours share.
    """
    n = len(sentence.starts)
    begins = np.append(sentence.starts, len(sentence.ids))
    for word in range(n - 1, -1, -1):  # a word without tokens begins where the next one does
        if begins[word] == NO_TOKEN:
            begins[word] = begins[word + 1]
    begins[0] = 0  # tokens before the first word, such as a space

    def stop_of(first: int) -> int:
        fits = int(np.searchsorted(begins, begins[first] + room, side="right")) - 1
        return min(max(fits, first + 1), first + room, n)

    spans = [(0, stop_of(0))]
    while spans[-1][1] < n:
        first, stop = spans[-1]
        after = max(first + 1, int(np.searchsorted(begins, begins[stop] - overlap)))
        while stop_of(after) <= stop:
            after += 1
        spans.append((after, stop_of(after)))
    cuts = [0, *(after + (stop - after) // 2 for (_, stop), (after, _) in itertools.pairwise(spans)), n]
    return [
        Window(int(begins[first]), min(int(begins[stop]), int(begins[first]) + room), cuts[i], cuts[i + 1])
        for i, (first, stop) in enumerate(spans)
    ]


def write_windows(
    file: Path,
    rows: datasets.Dataset,
    tokenizer: Any,
    frame: Frame,
    max_length: int,
    overlap: int,
    num_proc: int,
) -> None:
    """Write the windows of all rows to an arrow file; `TokensTask.encode` lists its columns."""
    types: dict[str, pa.DataType] = {"input_ids": pa.list_(pa.int32()), "starts": pa.list_(pa.int32())}
    types |= {"token_type_ids": pa.list_(pa.int8())} if frame.type_id is not None else {}
    types |= {"labels": pa.list_(pa.int64())} if "tags" in rows.column_names else {}
    types |= dict.fromkeys(("length", "row", "example", "silent"), pa.int32())
    types |= dict.fromkeys(("several", "cut"), pa.bool_())
    ranges = ranges_of(characters_of(rows.data.column("words")), ROWS_AT_ONCE)
    work = partial(
        _encode, names=list(types), tokenizer=tokenizer, frame=frame, room=max_length - frame.size, overlap=overlap
    )
    write_rows(file, types, rows, ranges, work, num_proc)


def _encode(
    chunk: Mapping[str, list[Any]],
    start: int,
    names: Sequence[str],
    tokenizer: Any,
    frame: Frame,
    room: int,
    overlap: int,
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in names if name != "row"}
    for i, sentence in enumerate(tokenise_words(tokenizer, chunk["words"])):
        tags = chunk["tags"][i] if "tags" in chunk else None
        for values in _windows_of_row(sentence, tags, frame, room, overlap):
            values["example"] = start + i
            for name, column in columns.items():
                column.append(values[name])
    return columns


def _windows_of_row(
    sentence: Sentence, tags: list[int] | None, frame: Frame, room: int, overlap: int
) -> Iterator[dict[str, Any]]:
    """The columns of each window of one row, except ``row`` and ``example``; none for a row without words."""
    if not len(sentence.starts):
        return
    found = windows(sentence, room, overlap)
    for number, window in enumerate(found):
        part = sentence.ids[window.begin : window.end].tolist()
        ids = [*frame.before, *part, *frame.after] or [frame.empty]
        starts = sentence.starts[window.first : window.stop]
        placed = np.where(starts == NO_TOKEN, NO_TOKEN, starts - window.begin + len(frame.before))
        last = sentence.starts[: window.stop].max(initial=0)
        yield {
            "input_ids": ids,
            "token_type_ids": None if frame.type_id is None else [frame.type_id] * len(ids),
            "starts": placed.tolist(),
            "labels": None if tags is None else tags[window.first : window.stop],
            "length": len(ids),
            "silent": int((starts == NO_TOKEN).sum()),
            "several": number == 0 and len(found) > 1,
            "cut": bool(len(part) == room and _is_cut(sentence, window, int(last))),
        }


def _is_cut(sentence: Sentence, window: Window, last: int) -> bool:
    """Whether the last word of a window has more tokens than fit; ``last`` is its first token."""
    later = sentence.starts[sentence.starts > last]
    end_of_word = int(later[0]) if len(later) else len(sentence.ids)
    return last >= window.begin and end_of_word > window.end


class WordsCollator:
    """Makes one batch of windows, padded on the right.

    Args:
        pad_token_id: padding value of ``input_ids``.
        pad_to_multiple_of: round the padded length up to a multiple of this.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad = Collator(pad_token_id, pad_to_multiple_of)

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Batch:
        """Collate ``encoded[[i, j, …]]``.

        Returns:
            the inputs of the model: long [n, width]; example: long [n]; starts: long [n, words], for each word of the
            window its token, `NO_TOKEN` or `NO_WORD`. If the rows have tags, also tags: long [n, words], padded with
            `IGNORED`, and labels: long [n, width], the tag at the token of each word, elsewhere `IGNORED`.
        """
        batch = self.pad({name: values for name, values in rows.items() if name != "labels"})
        batch["example"] = torch.tensor(rows["example"])
        starts = batch["starts"] = _padded(rows["starts"], NO_WORD)
        if "labels" in rows:
            tags = batch["tags"] = _padded(rows["labels"], IGNORED)
            labels = torch.full_like(batch["input_ids"], IGNORED)
            row, word = (starts >= 0).nonzero(as_tuple=True)
            labels[row, starts[row, word]] = tags[row, word]
            batch["labels"] = labels
        return batch


def _padded(lists: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    filled = torch.full((len(lists), max(map(len, lists))), padding)
    for row, values in enumerate(lists):
        filled[row, : len(values)] = torch.tensor(values)
    return filled
