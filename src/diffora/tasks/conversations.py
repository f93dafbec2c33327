"""Instruction, chat and plain-text rows in the forms they come in, read and checked row by row into one form.

=======================================  ========================================================================
a row has                                and means
=======================================  ========================================================================
``messages``                             turns ``{"role": …, "content": …}``
``conversations``                        turns ``{"from": …, "value": …}`` (ShareGPT); ``human`` and ``gpt`` speak
``prompt``, ``completion``               a user's and an assistant's text, or two lists of turns
``instruction``, ``input``, ``output``   the same with an optional input below the instruction (Alpaca)
``text``                                 plain text, no turns
=======================================  ========================================================================

The first of these that a row has is taken, so that further columns do no harm.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from diffora.errors import UserError
from diffora.tasks.account import Account, note_ignored
from diffora.tasks.lines import BadLine, json_lines
from diffora.tasks.sources import SUBSET_SEED, content_hash, first_line, joint_hash, more, to_rows

Turn = dict[str, str]

SPEAKERS = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output", "input"), ("text",))
_TURN = ("role", "from", "content", "value")
FORMS = "messages, conversations, prompt and completion, instruction and output, or text"
SCHEMA = pa.schema(
    {
        "number": pa.int64(),  # of the row at its source, from 1
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),  # none for plain text
        "text": pa.string(),  # empty for a conversation
    }
)
ROWS_AT_ONCE = 1000
FILES = (".parquet", ".jsonl")


class Fault(ValueError):
    """What is wrong with one row: its column, the offending value and the reason."""

    def __init__(self, column: str, value: Any, reason: str) -> None:
        super().__init__(reason)
        self.column, self.value, self.reason = column, value, reason


def read(rows: Iterable[tuple[int, Any]], source: str, problems: list[str], account: Account) -> pa.Table:
    """Check rows and bring them into the form of `SCHEMA`. Rows of empty text are left out.

    Args:
        rows: pairs of row number (from 1) and row; a row may be a `Fault`.
        source: file or split, for messages.
        problems: grows by one message for each kind of fault, with the first row that has it.
        account: gets what became of the rows.
    """
    ignored: dict[str, None] = {}
    faults: dict[tuple[str, str], list[Any]] = {}
    batches: list[pa.RecordBatch] = []
    waiting: list[dict[str, Any]] = []
    total = 0
    forms: Counter[str] = Counter()
    odd: Counter[str] = Counter()
    for number, row in rows:
        total += 1
        try:
            if isinstance(row, Fault):
                raise row
            form = form_of(row)
            found = conversation(row, form, ignored)
        except Fault as fault:
            faults.setdefault((fault.column, fault.reason), [number, fault.value, 0])[2] += 1
            continue
        forms[" and ".join(form[:2])] += 1
        if isinstance(found, list):
            for what in _oddities(found):
                odd[what] += 1
            waiting.append({"number": number, "messages": found, "text": ""})
        elif found:
            waiting.append({"number": number, "messages": [], "text": found})
        else:
            account.drop("no text", 1)
        if len(waiting) == ROWS_AT_ONCE:
            batches.append(pa.RecordBatch.from_pylist(waiting, schema=SCHEMA))
            waiting = []
    account.read = total
    note_ignored(account, list(ignored))
    if len(forms) > 1:
        shown = ", ".join(f"{count:,} with {form}" for form, count in forms.items())
        account.notes.append(f"rows in several forms: {shown}")
    account.notes += [f"{what}: {count:,}" for what, count in odd.items()]
    for (column, reason), (number, value, count) in faults.items():
        where = f"{source}, row {number} (data rows, counted from 1)" + (f", column '{column}'" if column else "")
        problems.append(f"{where}: {_show(value)} {reason}{more(count)}.")
    if not faults and not batches and not waiting:
        problems.append(f"{source}: " + ("no rows." if total == 0 else f"none of the {total} rows has any text."))
    return pa.Table.from_batches([*batches, pa.RecordBatch.from_pylist(waiting, schema=SCHEMA)], schema=SCHEMA)


def read_file(file: Path, problems: list[str], account: Account) -> pa.Table:
    """`read` for a .parquet or .jsonl file."""
    try:
        rows = _lines(file, account.notes) if file.suffix == ".jsonl" else _records(file)
        return read(rows, str(file), problems, account)
    except (pa.ArrowException, OSError, ValueError) as error:
        problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
        return SCHEMA.empty_table()


def _lines(file: Path, notes: list[str]) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, row in json_lines(lines, notes):
            yield number, Fault("", row.shown, row.reason) if isinstance(row, BadLine) else row


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            for row in to_rows(batch, number):
                number += 1
                yield number, row


def _oddities(turns: list[Turn]) -> Iterator[str]:
    """What is strange about a conversation, though nothing about it is wrong."""
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
        yield "rows with an empty turn of the assistant"
    roles = [turn["role"] for turn in turns]
    if any(first == second for first, second in itertools.pairwise(roles)) or "system" in roles[1:]:
        yield "rows in which user and assistant do not take turns"


def form_of(row: Any) -> tuple[str, ...]:
    """Which columns of a row are read.

    Raises:
        Fault: it has none of the known forms.
    """
    if not isinstance(row, Mapping):
        raise Fault("", row, "is not an object with columns")
    there = {key for key, value in row.items() if value is not None}  # others are columns that only other rows have
    form = next((form for form in _FORMS if there.issuperset(form[:2])), None)
    if form is None:
        raise Fault("", sorted(there), f"are its columns; expected {FORMS}")
    return form


def conversation(row: Mapping[str, Any], form: tuple[str, ...], ignored: dict[str, None]) -> list[Turn] | str:
    """The turns of a row, or its plain text.

    Args:
        form: of the row, see `form_of`.
        ignored: gets the names of columns, and of parts of turns, that are not read though there is something in them.

    Raises:
        Fault: something in it is not as it should be.
    """
    row = {key: value for key, value in row.items() if value is not None}
    ignored.update(dict.fromkeys(name for name in row if name not in form))
    if form[0] in ("messages", "conversations"):
        return _turns(row[form[0]], form[0], ignored)
    if form[0] == "prompt":
        said = _said(row["prompt"], "prompt", "user", ignored)
        return [*said, *_said(row["completion"], "completion", "assistant", ignored)]
    if form[0] == "instruction":
        asked = _text(row["instruction"], "instruction")
        if added := _text(row.get("input", ""), "input"):
            asked = f"{asked}\n\n{added}"
        return [_turn("user", asked), _turn("assistant", _text(row["output"], "output"))]
    text = _text(row["text"], "text")
    return text if text.strip() else ""


def _turns(value: Any, column: str, ignored: dict[str, None]) -> list[Turn]:
    if not isinstance(value, list | np.ndarray):
        raise Fault(column, value, "is not a list of turns")
    if not len(value):
        raise Fault(column, [], "has no turns")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise Fault(column, turn, 'is not a turn such as {"role": "user", "content": "…"}')
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in SPEAKERS:
            raise Fault(column, role, f"is not a role; known are {', '.join(SPEAKERS)}")
        turns.append(_turn(SPEAKERS[role], _text(content, column)))
        ignored.update(dict.fromkeys(f"{key} (in {column})" for key, part in turn.items() if key not in _TURN and part))
    return turns


def _said(value: Any, column: str, role: str, ignored: dict[str, None]) -> list[Turn]:
    return _turns(value, column, ignored) if isinstance(value, list) else [_turn(role, _text(value, column))]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _text(value: Any, column: str) -> str:
    if isinstance(value, list):
        raise Fault(
            column, value, "are the parts of a content; images, sound and the like are not supported: give text"
        )
    if not isinstance(value, str):
        raise Fault(column, value, "is not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        raise Fault(column, ascii(value), "is not valid Unicode") from None
    return value


def _show(value: Any) -> str:
    if isinstance(value, str):
        return repr(value[:60] + "…" if len(value) > 60 else value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text[:60] + ("…" if len(text) > 60 else "")


def cut_validation(table: pa.Table, rows: int) -> tuple[pa.Table, pa.Table]:
    """(training, validation) rows of a source that has no validation split: the same ones in every run.

    Raises:
        UserError: there are too few rows.
    """
    if table.num_rows < rows + 2:
        raise UserError(
            f"task.validation_rows={rows} cannot be cut from {table.num_rows} training rows: "
            f"it must be at most {max(0, table.num_rows - 2)}"
        )
    order = np.random.default_rng([SUBSET_SEED, 1]).permutation(table.num_rows)
    chosen, rest = np.sort(order[:rows]), np.sort(order[rows:])
    return table.take(pa.array(rest)), table.take(pa.array(chosen))


def row_keys(table: pa.Table) -> pa.ChunkedArray:
    """A text for each row of a table of `SCHEMA` that is equal where all that is said is equal."""
    messages = table.column("messages").combine_chunks()
    turns = messages.flatten()
    mark, end = (pa.scalar(sign, pa.large_string()) for sign in "\x1f\x1e")
    said = [pc.struct_field(turns, name).cast(pa.large_string()) for name in ("role", "content")]
    ends = np.concatenate([[0], np.cumsum(pc.list_value_length(messages).to_numpy(zero_copy_only=False))])
    lists = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pc.binary_join_element_wise(*said, mark))
    text = table.column("text").combine_chunks().cast(pa.large_string())
    return pc.binary_join_element_wise(pc.binary_join(lists, end), text, mark)


def rows_hash(table: pa.Table) -> str:
    """sha256 of what is said in a table of `SCHEMA`, wherever its rows stood at their source."""
    turns = pc.list_flatten(table.column("messages"))
    said = {name: pc.struct_field(turns, name) for name in ("role", "content")}
    turn_counts = pc.list_value_length(table.column("messages"))
    rows = pa.table({"turns": turn_counts, "text": table.column("text")})
    return joint_hash(map(content_hash, (rows, pa.table(said))))
