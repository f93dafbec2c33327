"""Tables of conversations and plain texts, read from rows in any of the forms in `diffora.tasks.chat.forms`."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from diffora.errors import UserError, first_line
from diffora.tasks.account import Account, note_ignored
from diffora.tasks.chat.forms import Fault, Turn, conversation, form_of
from diffora.tasks.messages import more
from diffora.tasks.sources.faults import READ_ERRORS
from diffora.tasks.sources.lines import BadLine, json_lines
from diffora.tasks.sources.tables import SUBSET_SEED, content_hash, joint_hash, row_dicts

SCHEMA = pa.schema(
    {
        "number": pa.int64(),  # row number at the source, from 1
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),  # empty for plain text
        "text": pa.string(),  # empty for a conversation
    }
)
ROWS_AT_ONCE = 1000  # bounds memory


def read(rows: Iterable[tuple[int, Any]], source: str, problems: list[str], account: Account) -> pa.Table:
    """Check rows and bring them into the form of `SCHEMA`. Rows without text are left out.

    Args:
        rows: pairs of row number (from 1) and row; a row may be a `Fault`.
        source: file or split, for messages.
        problems: grows by one message for each kind of fault, about the first row that has it.
        account: gets what became of the rows.
    """
    found = _Findings()
    batches: list[pa.RecordBatch] = []
    waiting: list[dict[str, Any]] = []
    for number, row in rows:
        account.read += 1
        said = found.converted(number, row)
        if said is None:
            continue
        if not said:
            account.drop("no text", 1)
        elif isinstance(said, list):
            waiting.append({"number": number, "messages": said, "text": ""})
        else:
            waiting.append({"number": number, "messages": [], "text": said})
        if len(waiting) == ROWS_AT_ONCE:
            batches.append(pa.RecordBatch.from_pylist(waiting, schema=SCHEMA))
            waiting = []
    found.note(account)
    problems += found.messages(source)
    if not found.faults and not batches and not waiting:
        nothing = "no rows." if account.read == 0 else f"none of the {account.read} rows has any text."
        problems.append(f"{source}: {nothing}")
    return pa.Table.from_batches([*batches, pa.RecordBatch.from_pylist(waiting, schema=SCHEMA)], schema=SCHEMA)


@dataclass
class _Findings:
    """What was found in the rows of one source.

    Attributes:
        faults: (row, value, number of rows) for each kind of fault, with the first row that has it.
        forms: number of rows of each form.
        oddities: number of rows that are strange but not wrong, by what is strange.
        ignored: names of columns that are not read (a dict without values, to keep their order).
    """

    faults: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    forms: Counter[str] = field(default_factory=Counter)
    oddities: Counter[str] = field(default_factory=Counter)
    ignored: dict[str, None] = field(default_factory=dict)

    def converted(self, number: int, row: Any) -> list[Turn] | str | None:
        """The turns of a row, or its plain text; None if the row is faulty."""
        try:
            if isinstance(row, Fault):
                raise row
            form = form_of(row)
            said = conversation(row, form, self.ignored)
        except Fault as fault:
            self.faults.setdefault((fault.column, fault.reason), [number, fault.value, 0])[2] += 1
            return None
        self.forms[" and ".join(form[:2])] += 1
        if isinstance(said, list):
            self.oddities.update(_oddities(said))
        return said

    def note(self, account: Account) -> None:
        """Add notes to an account."""
        note_ignored(account, list(self.ignored))
        if len(self.forms) > 1:
            shown = ", ".join(f"{count:,} with {form}" for form, count in self.forms.items())
            account.notes.append(f"rows in several forms: {shown}")
        account.notes += [f"{what}: {count:,}" for what, count in self.oddities.items()]

    def messages(self, source: str) -> Iterator[str]:
        """One message for each kind of fault."""
        for (column, reason), (number, value, count) in self.faults.items():
            where = f"{source}, row {number} (data rows, counted from 1)" + (f", column '{column}'" if column else "")
            yield f"{where}: {_shown(value)} {reason}{more(count)}."


def _oddities(turns: list[Turn]) -> Iterator[str]:
    """What is strange about a conversation, although it is not wrong."""
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
        yield "rows with an empty turn of the assistant"
    roles = [turn["role"] for turn in turns]
    if any(first == second for first, second in itertools.pairwise(roles)) or "system" in roles[1:]:
        yield "rows in which user and assistant do not take turns"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(value[:60] + "…" if len(value) > 60 else value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text[:60] + ("…" if len(text) > 60 else "")


def read_file(file: Path, problems: list[str], account: Account) -> pa.Table:
    """`read` for a .parquet or .jsonl file."""
    try:
        rows = _lines(file, account.notes) if file.suffix == ".jsonl" else _records(file)
        return read(rows, str(file), problems, account)
    except READ_ERRORS as error:
        problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
        return SCHEMA.empty_table()


def _lines(file: Path, notes: list[str]) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, (_, row) in enumerate(json_lines(lines, notes), start=1):
            yield number, Fault("", row.shown, row.reason) if isinstance(row, BadLine) else row


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            for row in row_dicts(batch, number):
                number += 1
                yield number, row


def cut_validation(table: pa.Table, rows: int) -> tuple[pa.Table, pa.Table]:
    """Divide the rows of a source without a validation split into (training, validation) rows, the same in every run.

    Rows with equal prompts (`row_keys` without the last turn) stay together, so there may be fewer validation rows.

    Raises:
        UserError: no row has something to learn, there are too few rows, or too few different prompts.
    """
    roles = pc.unique(pc.struct_field(table.column("messages").combine_chunks().flatten(), "role")).to_pylist()
    if "assistant" not in roles and not pc.any(pc.not_equal(table.column("text"), "")).as_py():
        said = f", only of {', '.join(map(repr, roles))}" if roles else ""
        raise UserError(f"no training row has a turn of 'assistant'{said}: there is nothing to learn")
    if table.num_rows < rows + 2:
        raise UserError(
            f"task.validation_rows={rows} cannot be cut from {table.num_rows} training rows: "
            f"it must be at most {max(0, table.num_rows - 2)}"
        )
    prompts = pc.dictionary_encode(row_keys(table, last_turn=False)).indices.to_numpy()
    sizes = np.bincount(prompts)
    chosen, left = np.zeros(len(sizes), dtype=bool), rows
    for prompt in np.random.default_rng([SUBSET_SEED, 1]).permutation(len(sizes)):
        if sizes[prompt] <= left:
            chosen[prompt] = True
            left -= sizes[prompt]
        if left == 0:
            break
    validation = chosen[prompts]
    if validation.sum() < min(rows, 2):
        raise UserError(
            f"task.validation_rows={rows} cannot be cut from {table.num_rows} training rows, because rows with equal "
            f"prompts stay together, and there are {len(sizes)} different prompts: set more rows, or give a validation "
            "file"
        )
    return table.filter(pa.array(~validation)), table.filter(pa.array(validation))


def characters(table: pa.Table) -> np.ndarray:
    """The characters of each row of a table of `SCHEMA`: of its text, or of its turns with a space between them."""
    messages = table.column("messages").combine_chunks()
    lengths = pc.utf8_length(pc.struct_field(messages.flatten(), "content")).to_numpy(zero_copy_only=False)
    turns = pc.list_value_length(messages).to_numpy(zero_copy_only=False)
    totals = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.cumsum(turns)
    text = pc.utf8_length(table.column("text")).to_numpy()
    found: np.ndarray = totals[ends] - totals[ends - turns] + np.maximum(turns - 1, 0) + text
    return found


def row_keys(table: pa.Table, last_turn: bool = True) -> pa.Array:
    """A text for each row of a table of `SCHEMA`; rows with equal content have equal texts.

    Args:
        last_turn: whether what the last turn says counts; without it, rows with equal prompts have equal texts. It
            counts if it is the only one.
    """
    messages = table.column("messages").combine_chunks()
    turns = messages.flatten()
    mark, end = (pa.scalar(sign, pa.large_string()) for sign in "\x1f\x1e")
    said = [pc.struct_field(turns, name).cast(pa.large_string()) for name in ("role", "content")]
    ends = np.concatenate([[0], np.cumsum(pc.list_value_length(messages).to_numpy(zero_copy_only=False))])
    if not last_turn:
        is_last = np.zeros(len(turns), dtype=bool)
        is_last[np.unique(ends[1:][np.diff(ends) > 1]) - 1] = True
        said[1] = pc.if_else(pa.array(is_last), pa.scalar("", pa.large_string()), said[1])
    lists = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pc.binary_join_element_wise(*said, mark))
    text = table.column("text").combine_chunks().cast(pa.large_string())
    return pc.binary_join_element_wise(pc.binary_join(lists, end), text, mark)


def rows_hash(table: pa.Table) -> str:
    """sha256 of the content of a table of `SCHEMA`; row numbers do not change it."""
    turns = pc.list_flatten(table.column("messages"))
    said = {name: pc.struct_field(turns, name) for name in ("role", "content")}
    turn_counts = pc.list_value_length(table.column("messages"))
    rows = pa.table({"turns": turn_counts, "text": table.column("text")})
    return joint_hash(map(content_hash, (rows, pa.table(said))))
