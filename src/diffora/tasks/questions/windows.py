"""Overlapping windows: how question and context become rows of at most ``max_length`` tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from diffora.errors import UserError
from diffora.tasks.base import Batch
from diffora.tasks.cache import arrow_writer
from diffora.tasks.encoding import PROGRESS_FROM_ROWS
from diffora.tasks.tokenise import Collator

ROWS_AT_ONCE = 500  # bounds memory
WINDOWS_AT_ONCE = 2000  # bounds memory, if rows have many windows


@dataclass(frozen=True)
class Lengths:
    """Limits, in tokens.

    Attributes:
        window: the most tokens in a window, including special tokens.
        overlap: tokens that a window shares with the one before.
        question: the most tokens of a question; the rest is cut off.
    """

    window: int
    overlap: int
    question: int


@dataclass(frozen=True)
class Context:
    """A tokenised context.

    Attributes:
        ids: token ids.
        begin, end: for each token, the characters where it begins and ends.
    """

    ids: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> "Context":
        found = _tokens(tokenizer, [text], offsets=True)
        begin, end = np.array(found["offset_mapping"][0], dtype=np.int32).reshape(-1, 2).T
        return cls(np.array(found["input_ids"][0], dtype=np.int32), begin, end)

    def span(self, first: int, stop: int) -> tuple[int, int] | None:
        """First and last token that hold any of the characters ``first`` up to ``stop``; None if no token does."""
        tokens = np.flatnonzero((self.begin < stop) & (self.end > first))
        return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None


@dataclass(frozen=True)
class Window:
    """A window of one example.

    Attributes:
        input_ids, token_type_ids: the tokens; types only if the tokenizer makes them.
        context_start: position in the window of its first context token.
        context_length: number of context tokens in the window.
        null_position: position in the window of "no answer".
        first: position in the context of the window's first context token.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    context_start: int
    context_length: int
    null_position: int
    first: int

    def holds(self, answer: tuple[int, int] | None) -> bool:
        """Whether the whole answer is in the window.

        Args:
            answer: its first and last token, counted in the context.
        """
        return answer is not None and self.first <= answer[0] and answer[1] < self.first + self.context_length

    def columns(self, answer: tuple[int, int] | None) -> dict[str, Any]:
        """The window as a row. Its targets are the answer, or the null position if the window does not hold it.

        Args:
            answer: its first and last token, counted in the context.
        """
        start = end = self.null_position
        if answer is not None and self.holds(answer):
            start, end = (token - self.first + self.context_start for token in answer)
        return {
            "input_ids": self.input_ids,
            "token_type_ids": self.token_type_ids,
            "start_positions": start,
            "end_positions": end,
            "context_start": self.context_start,
            "context_length": self.context_length,
            "null_position": self.null_position,
            "length": len(self.input_ids),
        }


@dataclass(frozen=True)
class Frame:
    """The special tokens before, between and after question and context.

    Question and context are always in this order, also if the tokenizer pads on the left.

    Attributes:
        ids: token ids of the three parts.
        types: their token types.
        text_types: token types of question and context.
        has_types: whether the tokenizer makes token types.
        null: position of the null token among all special tokens.
    """

    ids: tuple[list[int], list[int], list[int]]
    types: tuple[list[int], list[int], list[int]]
    text_types: tuple[int, int]
    has_types: bool
    null: int

    @property
    def size(self) -> int:
        return sum(map(len, self.ids))

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """The special tokens that a tokenizer adds to a pair of texts.

        For a tokenizer without [CLS], an end-of-text token is added at the end. If it puts nothing between two texts,
        as GPT-2's, a line break is added there.

        Raises:
            UserError: the tokenizer is not a fast one, or has neither [CLS] nor an end-of-text token.
        """
        if not tokenizer.is_fast:
            raise UserError(
                "question answering needs a fast tokenizer, which knows the place of each token in the text; "
                f"{type(tokenizer).__name__} is not fast."
            )
        pair = tokenizer(["a"], ["b"])
        all_ids, owner = pair["input_ids"][0], pair.sequence_ids(0)
        has_types = "token_type_ids" in tokenizer.model_input_names
        all_types = pair["token_type_ids"][0] if has_types else [0] * len(all_ids)
        question, context = (slice(owner.index(i), len(owner) - owner[::-1].index(i)) for i in (0, 1))
        cuts = slice(question.start), slice(question.stop, context.start), slice(context.stop, None)
        before, between, after = ([list(values[cut]) for values in (all_ids, all_types)] for cut in cuts)
        text_types = all_types[question.start], all_types[context.start]
        special = [*before[0], *between[0], *after[0]]
        if tokenizer.cls_token_id in special:
            null = special.index(tokenizer.cls_token_id)
        elif tokenizer.eos_token_id is None:
            raise UserError(
                'question answering needs a [CLS] or an end-of-text token for "no answer"; '
                f"{type(tokenizer).__name__} has neither."
            )
        else:
            if not between[0]:
                line_break = _tokens(tokenizer, ["\n"])["input_ids"][0]
                between = [line_break, [text_types[0]] * len(line_break)]
            after = [[*after[0], tokenizer.eos_token_id], [*after[1], text_types[1]]]
            null = len(before[0]) + len(between[0]) + len(after[0]) - 1
        ids, types = zip(before, between, after, strict=True)
        return cls(ids, types, text_types, has_types, null)

    def windows(self, question: Sequence[int], context: np.ndarray, max_length: int, overlap: int) -> Iterator[Window]:
        """Windows of at most ``max_length`` tokens that cover the context; neighbours share ``overlap`` tokens."""
        before, between, _ = map(len, self.ids)
        room = max_length - self.size - len(question)
        first = 0
        while True:
            part = context[first : first + room]
            null = self.null
            if null >= before:
                null += len(question)
            if self.null >= before + between:
                null += len(part)
            types = None
            if self.has_types:
                kinds = self.text_types
                types = _interleave(self.types, [kinds[0]] * len(question), [kinds[1]] * len(part))
            ids = _interleave(self.ids, question, part)
            yield Window(ids, types, before + len(question) + between, len(part), null, first)
            if first + room >= len(context):
                return
            first += room - overlap


def _interleave(parts: Sequence[Sequence[int]], question: Sequence[int], context: Any) -> np.ndarray:
    """Special tokens, question and context in their order."""
    before, between, after = parts
    return np.concatenate([before, question, between, context, after]).astype(np.int32)


def _tokens(tokenizer: Any, texts: Sequence[str], offsets: bool = False) -> dict[str, Any]:
    """Token ids of texts without special tokens; with ``offsets`` also the place of each token in its text."""
    found: dict[str, Any] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,  # it would warn of long texts, which windows take care of
    )
    return found


def write_windows(
    file: Path, rows: datasets.Dataset, tokenizer: Any, frame: Frame, lengths: Lengths, training: bool
) -> None:
    """Write the windows of all rows to an arrow file; `SquadTask.encode` lists its columns."""
    has_answers = "answers" in rows.column_names
    types = _types(frame.has_types, has_answers, training)
    columns: dict[str, list[Any]] = {name: [] for name in types}
    n_windows = 0
    with (
        arrow_writer(file, pa.schema(types)) as append,
        tqdm(total=len(rows), desc="tokenise", unit="row", disable=len(rows) < PROGRESS_FROM_ROWS) as bar,
    ):
        text: str | None = None
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            # Some questions begin with more white space than a question may have tokens.
            questions = _tokens(tokenizer, [question.lstrip() for question in chunk["question"]])["input_ids"]
            for i, question in enumerate(questions):
                if chunk["context"][i] != text:  # neighbouring questions often share a context
                    text = chunk["context"][i]
                    context = Context.of(tokenizer, text)
                answer = None
                if has_answers and chunk["answers"][i]:
                    answer = chunk["starts"][i][0], len(chunk["answers"][i][0])
                for values in _windows_of_row(question, context, answer, frame, lengths):
                    values |= {"row": n_windows, "example": start + i}
                    for name, column in columns.items():
                        column.append(values[name])
                    n_windows += 1
                if len(columns["row"]) >= WINDOWS_AT_ONCE:  # only between rows: no row may be half written
                    append(columns)
                    columns = {name: [] for name in types}
            bar.update(len(questions))
        append(columns)


def _types(has_types: bool, has_answers: bool, training: bool) -> dict[str, pa.DataType]:
    """Arrow types of the columns of encoded windows."""
    types: dict[str, pa.DataType] = {"input_ids": pa.list_(pa.int32())}
    if has_types:
        types["token_type_ids"] = pa.list_(pa.int8())
    if has_answers:
        types |= {"start_positions": pa.int32(), "end_positions": pa.int32()}
    types |= dict.fromkeys(("context_start", "context_length", "null_position"), pa.int32())
    if not training:
        types |= {"char_start": pa.list_(pa.int32()), "char_end": pa.list_(pa.int32())}
    return types | dict.fromkeys(("length", "row", "example"), pa.int32()) | {"cut": pa.bool_(), "lost": pa.bool_()}


def _windows_of_row(
    question: list[int], context: Context, answer: tuple[int, int] | None, frame: Frame, lengths: Lengths
) -> Iterator[dict[str, Any]]:
    """The columns of each window of one question, except ``row`` and ``example``.

    Args:
        answer: the character where it starts, and its number of characters.
    """
    span = None if answer is None else context.span(answer[0], answer[0] + answer[1])
    windows = list(frame.windows(question[: lengths.question], context.ids, lengths.window, lengths.overlap))
    lost = answer is not None and not any(window.holds(span) for window in windows)
    for window in windows:
        kept = slice(window.first, window.first + window.context_length)
        is_first = window.first == 0
        yield window.columns(span) | {
            "char_start": context.begin[kept],
            "char_end": context.end[kept],
            "cut": is_first and len(question) > lengths.question,
            "lost": is_first and lost,
        }


class WindowCollator:
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
            the inputs of the model: long [n, width]; context: bool [n, width], true for tokens of the context;
            null_position and, if the rows have them, start_positions and end_positions: long [n].
        """
        batch = self.pad(rows)
        first, count = (torch.tensor(rows[name])[:, None] for name in ("context_start", "context_length"))
        position = torch.arange(batch["input_ids"].shape[1])
        batch["context"] = (position >= first) & (position < first + count)
        names = ("null_position", "start_positions", "end_positions")
        return batch | {name: torch.tensor(rows[name]) for name in names if name in rows}
