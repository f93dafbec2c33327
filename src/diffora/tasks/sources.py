"""Where a task's rows come from: the Hugging Face hub, a folder of local files, or the embedded generator.

Whatever the source, the rows are checked here, before anything expensive starts, and all
mistakes are reported together.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet

from diffora.errors import UserError
from diffora.hub import why_unreachable
from diffora.tasks.account import Account, Accounts, note_ignored, note_overlap
from diffora.tasks.base import Rows
from diffora.tasks.labels import class_names, in_order, known_classes
from diffora.tasks.lines import BadLine, json_lines, note_blank, read_csv, utf8

if TYPE_CHECKING:
    from diffora.tasks.glue import TaskSpec

STSB_RANGE = (0.0, 5.0)  # the scale of STS-B's similarity scores, the only regression task here
HUB_DATASET = "nyu-mll/glue"
DIAGNOSTIC = "ax"  # the split of MNLI's YAML that is a configuration of its own on the hub, of one split, `test`
SUBSET_SEED = 0  # `max_train_rows` picks the same rows in every run, whatever the run's own seed
EMBEDDED_SEED = 0
NUMBER = r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?"
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_WHY_IDX = "which a submission quotes; without this column rows are numbered from 0"


@dataclass(frozen=True)
class Piece:
    """A raw table, and what there is to say of how it was read."""

    table: pa.Table
    notes: tuple[str, ...] = ()


Pieces = dict[str, dict[str, Piece]]
"""For each split its files, under the names that they have in messages."""


def load_rows(
    spec: "TaskSpec",
    path: str | Path | None = None,
    max_train_rows: int | None = None,
    train_rows: int = 4000,
    validation_rows: int = 1000,
    accounts: Accounts | None = None,
) -> Rows:
    """Load and check the training and validation rows of a classification or regression task.

    The rows have the task's text columns (string) and ``label`` (int64, float32 for regression), nothing else.

    Args:
        spec: the task.
        path: folder with `train` and the validation splits as .parquet (one file, or numbered shards as the hub
            has them), .jsonl or .csv in the hub's columns; None loads from the hub (or generates, for the embedded
            task).
        max_train_rows: use only so many training rows. They are drawn with a fixed seed, so they are
            the same in every run; None uses all.
        train_rows, validation_rows: size of the embedded task; other tasks ignore them.
        accounts: gets what became of the rows of each split, by the names that `Rows` has for them.

    Raises:
        UserError: everything that is wrong with the arguments or the data, together.
    """
    if max_train_rows is not None and max_train_rows < 1:
        raise UserError(f"task.max_train_rows={max_train_rows} must be at least 1, or null for all rows.")
    splits = ("train", *spec.validation_splits)
    if spec.hub_config is None:
        pieces, source = _embedded(spec, path, train_rows, validation_rows)
    elif path is not None:
        pieces, source = _local(spec, Path(path), splits), str(path)
    else:
        pieces, source = _hub(spec, splits), f"{HUB_DATASET}/{spec.hub_config}"
    names = ("train", "validation", *spec.validation_splits[1:])
    accounts = {} if accounts is None else accounts
    accounts |= {name: Account() for name in names}
    tables = dict(zip(names, _checked(spec, pieces, [accounts[name] for name in names]), strict=True))
    tables["train"] = subset(tables["train"], max_train_rows, accounts["train"])
    _note_oddities(spec, tables, accounts)
    validation = {name: table for name, table in tables.items() if name != "train"}
    return Rows(
        train=datasets.Dataset(tables["train"]),
        validation={name: datasets.Dataset(table) for name, table in validation.items()},
        data_hash=joint_hash(map(content_hash, tables.values())),
        source=source,
    )


def load_split(
    spec: "TaskSpec",
    split: str,
    path: str | Path | None = None,
    validation_rows: int = 1000,
    account: Account | None = None,
) -> datasets.Dataset:
    """Load and check one split by its name at the source; its labels may be missing (or -1, as in GLUE's test sets).

    Args:
        account: gets what became of the rows.

    Returns:
        The text columns, ``label`` where the rows have labels, and, of GLUE's test sets, ``idx`` (int64) where the
        source numbers its rows: a submission quotes these numbers, nothing else reads them.

    Raises:
        UserError: there is no such split, or it has faults.
    """
    if spec.hub_config is None:
        pieces, _ = _embedded(spec, path, 1, validation_rows)
        if split not in pieces or split == "train":
            raise UserError(f"split={split}: task '{spec.name}' has the split {', '.join(spec.validation_splits)}.")
        pieces = {split: pieces[split]}
    elif path is not None:
        pieces = _local(spec, Path(path), (split,))
    else:
        pieces = _hub(spec, (split,))
    accounts = [Account() if account is None else account]
    return datasets.Dataset(_checked(spec, pieces, accounts, labelled=False)[0])


def _checked(spec: "TaskSpec", pieces: Pieces, accounts: list[Account], labelled: bool = True) -> list[pa.Table]:
    """One checked table for each split.

    Without ``labelled``, labels may be missing, and the row numbers of test sets are kept.
    """
    problems: list[str] = []
    checked = []
    numberings: dict[str, Numbering | None] = {}
    for (split, pieces_of_split), account in zip(pieces.items(), accounts, strict=True):
        tables = {file: piece.table for file, piece in pieces_of_split.items()}
        columns = [*spec.text_columns, "label"]
        if not labelled and all(_unlabelled(table) for table in tables.values()):
            columns.remove("label")
        if split in spec.test_splits and all("idx" in table.column_names for table in tables.values()):
            columns.append("idx")
        before = len(problems)
        if "label" in columns:
            numberings |= {file: _numbering(spec, table, file, problems) for file, table in tables.items()}
        parts = [_check(spec, table, columns, file, numberings.get(file), problems) for file, table in tables.items()]
        if len(problems) == before:
            checked.append(pa.concat_tables(parts))
            if "idx" in columns:
                _check_unique(checked[-1].column("idx"), ", ".join(tables), problems)
            account.read = checked[-1].num_rows
            for file, table in tables.items():
                if (found := numberings.get(file)) and found.moves:
                    account.change(f"label numbers follow the class names of {file}: {found}", table.num_rows)
            account.notes += [note for piece in pieces_of_split.values() for note in piece.notes]
            there = dict.fromkeys(name for table in tables.values() for name in table.column_names)
            note_ignored(account, [name for name in there if name not in (*spec.text_columns, "label", "idx")])
    if problems:
        raise UserError(problems)
    moved = [file for file, found in numberings.items() if found and found.moves]
    everything = {file: piece.table for files in pieces.values() for file, piece in files.items()}
    plain = [file for file, found in numberings.items() if found is None and not _by_name(spec, everything[file])]
    if moved and plain:
        raise UserError(
            f"{plain[0]}: its labels are numbers without names, while {moved[0]} numbers the classes in another order "
            f"than the task ({numberings[moved[0]]}); write the labels as names, so that both mean the same."
        )
    return checked


def _note_oddities(spec: "TaskSpec", tables: dict[str, pa.Table], accounts: Accounts) -> None:
    """Say what makes a result doubtful, though nothing about the rows is wrong."""
    for name, table in tables.items():
        for column in spec.text_columns:
            texts = table.column(column)
            if len(texts) > 1 and pc.all(pc.equal(texts, texts[0])).as_py():
                shown = json.dumps(texts[0].as_py(), ensure_ascii=False)[:60]
                accounts[name].notes.append(f"column '{column}' holds the same text in all rows: {shown}")
    labels = {name: pc.unique(table.column("label")).to_pylist() for name, table in tables.items()}
    shown_as = spec.label_names or None
    for name, values in labels.items():
        if len(values) == 1 and tables[name].num_rows > 1:
            only = shown_as[values[0]] if shown_as else values[0]
            accounts[name].notes.append(f"all {tables[name].num_rows:,} rows have the same label: {only}")
        if shown_as and (strange := sorted(set(values) - set(labels["train"]))):
            names = ", ".join(shown_as[i] for i in strange)
            accounts[name].notes.append(f"classes that no training row has: {names}")

    def texts_of(name: str) -> pa.ChunkedArray:
        texts = [tables[name].column(column).cast(pa.large_string()) for column in spec.text_columns]
        return pc.binary_join_element_wise(*texts, pa.scalar("\x1f", pa.large_string()))

    note_overlap(accounts, {name: texts_of(name) for name in tables})


def subset(table: pa.Table, max_rows: int | None, account: Account) -> pa.Table:
    """At most ``max_rows`` rows in their order, the same in every run; None for all."""
    if max_rows is None or max_rows >= table.num_rows:
        return table
    account.drop(f"task.max_train_rows={max_rows}", table.num_rows - max_rows)
    chosen = np.random.default_rng(SUBSET_SEED).permutation(table.num_rows)[:max_rows]
    return table.take(pa.array(np.sort(chosen)))


def joint_hash(hashes: Iterable[str]) -> str:
    """sha256 of several sha256, in order: where one split ends and the next begins makes a difference."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, hashes))).hexdigest()


def content_hash(table: pa.Table) -> str:
    """sha256 of a checked table's content: independent of process, file format, chunking and library version."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name)
        digest.update(f"{name}:{len(column)}:".encode())
        while pa.types.is_list(column.type):
            digest.update(pc.list_value_length(column).to_numpy().astype("<i4").tobytes())
            column = pc.list_flatten(column)
        if not pa.types.is_string(column.type):
            digest.update(np.ascontiguousarray(column.to_numpy()).tobytes())
            continue
        digest.update(pc.binary_length(column).to_numpy().astype("<i4").tobytes())
        for chunk in column.chunks:
            _, offsets, values = chunk.buffers()
            if values is not None:  # None: a chunk of empty texts only
                ends = np.frombuffer(offsets, dtype=np.int32)
                digest.update(memoryview(values)[ends[chunk.offset] : ends[chunk.offset + len(chunk)]])
    return digest.hexdigest()


# --- the three sources ---


def _embedded(spec: "TaskSpec", path: object, train_rows: int, validation_rows: int) -> tuple[Pieces, str]:
    problems = [
        f"task.{key}={value} must be at least 1."
        for key, value in (("train_rows", train_rows), ("validation_rows", validation_rows))
        if value < 1
    ]
    if path is not None:
        problems.append(f"task.path={path}: task '{spec.name}' is generated and reads no files; leave task.path out.")
    if problems:
        raise UserError(problems)

    from diffora.tasks.embedded import paraphrase

    generated = paraphrase.splits(train_rows=train_rows, validation_rows=validation_rows, seed=EMBEDDED_SEED)
    pieces = {name: {name: Piece(pa.table(generated[name]))} for name in ("train", *spec.validation_splits)}
    return pieces, f"embedded:{spec.name}"


def _hub(spec: "TaskSpec", splits: Sequence[str]) -> Pieces:
    files = f"<folder with train and {' and '.join(spec.validation_splits)} as .parquet, .jsonl or .csv>"
    if list(splits) == [DIAGNOSTIC]:
        found = {DIAGNOSTIC: hub_splits(spec.name, HUB_DATASET, DIAGNOSTIC, ["test"], files)["test"]}
    else:
        found = hub_splits(spec.name, HUB_DATASET, spec.hub_config, splits, files)
    return {name: {name: Piece(_with_features(split))} for name, split in found.items()}


def _with_features(split: datasets.Dataset) -> pa.Table:
    """A split's table whose schema names the classes, as a parquet file of the hub does."""
    return split.data.table.replace_schema_metadata(split.features.arrow_schema.metadata)


def hub_splits(
    task: str, dataset: str, config: str | None, splits: Sequence[str], files: str
) -> dict[str, datasets.Dataset]:
    """Splits of a hub dataset, from the hub or from what an earlier run has cached of it.

    Args:
        task: the task's name, for the message.
        files: what ``task.path`` could be given instead, for the message.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    was_offline = datasets.config.HF_HUB_OFFLINE
    unreachable = why_unreachable()
    try:
        # An unreachable hub costs half a minute or more of retries; with offline mode on, `load_dataset`
        # goes straight to what an earlier run has cached.
        datasets.config.HF_HUB_OFFLINE = unreachable is not None
        found = datasets.load_dataset(dataset, config)
    except Exception as error:  # connection, proxy, hub and disk errors have no common base class
        reason = f"{unreachable}, and nothing in the local cache" if unreachable else first_line(error)
        raise UserError(
            f"Cannot load task '{task}' from the Hugging Face hub ({dataset}{f', {config}' if config else ''}): "
            f"{reason}.\n"
            f"  Either use files you have: task.path={files}\n"
            f"  or try the task that needs no download: python train.py experiment=quickstart"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    if missing := [name for name in splits if name not in found]:
        where = f"{dataset}/{config}" if config else dataset
        raise UserError(f"{where} has no split {missing[0]!r}; it has {', '.join(found)}.")
    return {name: found[name] for name in splits}


def _local(spec: "TaskSpec", folder: Path, splits: Sequence[str]) -> Pieces:
    check_folder(folder, f"{', '.join(splits)} as .parquet, .jsonl or .csv")
    problems: list[str] = []
    pieces: Pieces = {}
    for split in splits:
        pieces[split] = {}
        for file in split_files(folder, split, problems):
            try:
                notes: list[str] = []
                table = _READERS[file.suffix](file, spec, notes)
                pieces[split][str(file)] = Piece(table, tuple(notes))
            except (pa.ArrowException, OSError, ValueError) as error:
                problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
    if problems:
        raise UserError(problems)
    return pieces


def split_files(
    folder: Path, split: str, problems: list[str], formats: Sequence[str] = ("parquet", "jsonl", "csv")
) -> list[Path]:
    """The files of a split: one, or the numbered parquet shards in which the hub stores it; else a problem."""
    shard = re.compile(rf"{re.escape(split)}-(\d{{5}})-of-(\d{{5}})\.parquet")
    shards = {entry.name: match for entry in folder.iterdir() if (match := shard.fullmatch(entry.name))}
    totals = sorted({int(match[2]) for match in shards.values()})
    if not totals:
        names = [f"{split}.{kind}" for kind in formats]
        names.insert(1, f"{split}-00000-of-00001.parquet")
        file = find_file(folder, split, names, problems)
        return [file] if file else []
    others = [name for name in (f"{split}.{kind}" for kind in formats) if (folder / name).is_file()]
    if len(totals) > 1 or others:
        there = ", ".join([*sorted(shards), *others])
        problems.append(f"{folder}: more than one file or set of shards for the split '{split}': {there}; keep one.")
        return []
    names = [f"{split}-{i:05}-of-{totals[0]:05}.parquet" for i in range(totals[0])]
    if missing := [name for name in names if name not in shards]:
        problems.append(f"{folder}: shards of the split '{split}' are missing: {', '.join(missing)}.")
    return [folder / name for name in names if name in shards]


def check_folder(folder: Path, content: str) -> None:
    """Refuse a ``task.path`` that is no folder; ``content`` says what should be in it."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"task.path={folder} {what}; give the folder that holds {content}.")


def find_file(folder: Path, split: str, names: Sequence[str], problems: list[str]) -> Path | None:
    """The one file of ``names`` that is there; none or several are a problem."""
    present = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in names if name in present]
    shards = [name for name in present if re.fullmatch(rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}\.parquet", name)]
    if found:
        found += [name for name in shards if name not in found]
    if len(found) == 1:
        return folder / found[0]
    if found:
        problems.append(f"{folder}: more than one file for the split '{split}': {', '.join(found)}; keep one.")
    else:
        there = ", ".join(present[:10]) + (", …" if len(present) > 10 else "") if present else "nothing"
        problems.append(f"{folder}: no file for the split '{split}'; looked for {', '.join(names)}; found {there}.")
    return None


def _read_parquet(file: Path, spec: "TaskSpec", notes: list[str]) -> pa.Table:
    with pa.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
        try:
            return parquet.read()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(_first_parquet_fault(parquet) or first_line(error)) from error


def _first_parquet_fault(parquet: pa.parquet.ParquetFile) -> str | None:
    """Arrow's messages do not say where a file is damaged, so read again, piece by piece, up to the first fault."""
    first = 1
    for group in range(parquet.num_row_groups):
        last = first + parquet.metadata.row_group(group).num_rows - 1
        for name in parquet.schema_arrow.names:
            try:
                parquet.read_row_group(group, [name])
            except (pa.ArrowException, OSError) as error:
                where = f"rows {first} to {last} (data rows, counted from 1), column '{name}'"
                return f"{where}: damaged, {first_line(error)}"
        first = last + 1
    return None


def _read_csv(file: Path, spec: "TaskSpec", notes: list[str]) -> pa.Table:
    def is_record(row: dict[str, str]) -> bool | None:
        """Whether fields are those of a row, judged by those that are not text; None where all are."""
        told = [_is_label(spec, row["label"])] if "label" in row else []
        told += [row["idx"].strip().isdigit()] if "idx" in row else []
        return all(told) if told else None

    # Everything as text: an empty field is an empty text, and labels are parsed where rows can be named.
    header, rows = read_csv(utf8(file), spec.text_columns, is_record, notes)
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], names=header)


def _is_label(spec: "TaskSpec", value: str) -> bool:
    value = value.strip()
    if value == "-1":  # in test sets
        return True
    if spec.is_regression:
        return bool(re.fullmatch(NUMBER, value)) and STSB_RANGE[0] <= float(value) <= STSB_RANGE[1]
    return value in spec.label_names or value in map(str, range(spec.num_labels))


def _read_jsonl(file: Path, spec: "TaskSpec", notes: list[str]) -> pa.Table:
    content = utf8(file).encode()
    lines = content.splitlines()
    full = sum(1 for line in lines if line.strip())
    if full == 0:
        return pa.table({name: pa.array([], pa.string()) for name in (*spec.text_columns, "label")})
    table = _parse_jsonl(content, spec, pa.float64())
    if table is None:
        table = _parse_jsonl(content, spec, pa.string())  # names of classes
    if table is None or table.num_rows != full:
        if fault := _first_json_fault(lines, spec):
            raise ValueError(fault)
        table = _slow_jsonl(lines, spec)  # it is another column that arrow does not read, one of several types
    note_blank(notes, len(lines) - full)
    # Arrow adds the columns of an explicit schema even when no row has them.
    empty = [name for name in (*spec.text_columns, "label") if table.column(name).null_count == table.num_rows]
    if empty:
        keys = {key for _, row in json_lines(lines) if isinstance(row, dict) for key in row}
        table = table.drop_columns([name for name in empty if name not in keys])
    return table


def _parse_jsonl(content: bytes, spec: "TaskSpec", label: pa.DataType) -> pa.Table | None:
    """The rows, or None where something in them is not as it should be; arrow does not say in which row."""
    # Types are given, or arrow would take texts that look like dates for dates.
    schema = pa.schema([*((name, pa.string()) for name in spec.text_columns), ("label", label)])
    try:
        return pa.json.read_json(
            pa.BufferReader(content),
            read_options=pa.json.ReadOptions(block_size=16 << 20),  # a row must fit into one block
            parse_options=pa.json.ParseOptions(explicit_schema=schema),
        )
    except pa.ArrowInvalid:
        return None


def _slow_jsonl(lines: list[bytes], spec: "TaskSpec") -> pa.Table:
    """The rows of lines without a fault; columns that nothing reads are empty."""
    rows = [row for _, row in json_lines(lines)]
    used = (*spec.text_columns, "label", "idx")
    columns = {name: [row.get(name) if name in used else None for row in rows] for row in rows for name in row}
    if "idx" in columns and len({type(value) for value in columns["idx"]}) > 1:
        columns["idx"] = list(map(str, columns["idx"]))
    return pa.table({name: pa.array(values) for name, values in columns.items()})


def _first_json_fault(lines: list[bytes], spec: "TaskSpec") -> str | None:
    """Read again, slowly, up to the first fault."""
    texts = dict.fromkeys(spec.text_columns, str)
    labels: type | None = None
    for number, row in json_lines(lines):
        where = f"row {number} (counted from 1)"
        if isinstance(row, BadLine):
            return f"{where} {row}"
        for column in texts:
            value = row.get(column)
            if value is not None and not isinstance(value, str):
                return f"{where}, column '{column}': {json.dumps(value)[:60]} is not text"
            try:
                (value or "").encode()
            except UnicodeEncodeError:
                return f"{where}, column '{column}': {ascii(value)[:60]} is not valid Unicode"
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, int | float | str | None):
            return f"{where}, column 'label': {json.dumps(label)[:60]} is not {_expected(spec)}"
        if label is not None:
            kind = str if isinstance(label, str) else float
            if labels not in (None, kind):
                which = "text, in rows before it is a number" if kind is str else "a number, in rows before it is text"
                return f"{where}, column 'label': {json.dumps(label)[:60]} is {which}"
            labels = kind
    return None


_READERS: dict[str, Callable[[Path, "TaskSpec", list[str]], pa.Table]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


# --- checks: vectorised; each appends to `problems` and names file, row (first data row is 1), column and value ---


def _check(
    spec: "TaskSpec",
    table: pa.Table,
    wanted: Sequence[str],
    file: str,
    numbering: "Numbering | None",
    problems: list[str],
) -> pa.Table:
    before = len(problems)
    if table.num_rows == 0:
        problems.append(f"{file}: no rows.")
        return table
    check_columns(table.column_names, wanted, file, problems)
    if len(problems) > before:
        return table
    columns = {name: _check_text(table.column(name), file, name, problems) for name in spec.text_columns}
    if "label" in wanted:
        columns["label"] = _check_label(spec, table.column("label"), file, numbering, problems)
    if "idx" in wanted:
        columns["idx"] = _check_index(table.column("idx"), file, problems)
    return table if len(problems) > before else pa.table(columns)


def check_columns(names: Sequence[str], wanted: Sequence[str], file: str, problems: list[str]) -> None:
    """Each wanted column must be there once; a missing one is named with the one that may be meant."""
    for name in wanted:
        count = names.count(name)
        if count > 1:
            problems.append(f"{file}: {count} columns are called '{name}'; keep one.")
        elif count == 0:
            by_lower = {column.lower(): column for column in reversed(names)}
            near = difflib.get_close_matches(name, by_lower, n=1)
            hint = f"; rename '{by_lower[near[0]]}' if that is it" if near else ""
            problems.append(f"{file}: no column '{name}'{hint}; the file has {', '.join(names)}.")


def _unlabelled(table: pa.Table) -> bool:
    """Whether a table has no labels at all: no such column, or nothing or GLUE's -1 in every row."""
    if table.column_names.count("label") != 1:
        return "label" not in table.column_names
    try:
        values = pc.unique(table.column("label").cast(pa.string())).drop_null().to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False  # not even labels, as the check of the column will say
    return all(value.strip() in ("-1", "-1.0", "") for value in values)


def _check_text(column: pa.ChunkedArray, file: str, name: str, problems: list[str]) -> pa.ChunkedArray:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(test(kind) for test in (*_TEXT, pa.types.is_null)):
        problems.append(f"{file}: column '{name}' holds {column.type}, expected text (string).")
        return column
    _report(
        problems,
        file,
        name,
        column,
        pc.is_null(column),
        "in place of a text; an empty text is written as an empty string",
    )
    try:
        text = column.cast(pa.string())
        text.validate(full=True)  # parquet readers do not check the encoding, tokenizers need it
    except pa.ArrowInvalid as error:
        rows = enumerate(column.cast(pa.binary()), start=1)
        row = next((row for row, value in rows if not _is_utf8(value.as_py())), None)
        problems.append(
            f"{file}, column '{name}': {first_line(error)}."
            if row is None
            else f"{file}, row {row} (data rows, counted from 1), column '{name}' is not valid UTF-8."
        )
        return column
    return text


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass(frozen=True)
class Numbering:
    """How a file numbers its classes.

    Attributes:
        names: in the file's order.
        places: the task's number for each of them.
    """

    names: tuple[str, ...]
    places: tuple[int, ...]

    @property
    def moves(self) -> bool:
        return self.places != tuple(range(len(self.places)))

    def __str__(self) -> str:
        return ", ".join(f"{i} is {name}" for i, name in enumerate(self.names))


def _numbering(spec: "TaskSpec", table: pa.Table, file: str, problems: list[str]) -> Numbering | None:
    """How a file numbers the classes; None where it does not say, or its labels are names themselves."""
    if "label" not in table.column_names or (names := class_names(table.schema, "label")) is None:
        return None
    if table.column_names.count("label") == 1 and table.num_rows and _by_name(spec, table):
        return None
    where = f"{file}: column 'label'"
    if spec.is_regression:
        problems.append(f"{where} holds classes ({', '.join(names[:10])}), expected {_expected(spec)}.")
        return None
    places = in_order(names, spec.label_names, f"{where}: its classes are", "the task's are", problems, or_numbers=True)
    return None if places is None else Numbering(tuple(names), tuple(places))


def _by_name(spec: "TaskSpec", table: pa.Table) -> bool:
    """Whether the checked labels of a file are names, and not numbers."""
    return str(table.column("label")[0].as_py()).strip() in spec.label_names


def _expected(spec: "TaskSpec") -> str:
    """What a label must be, in words."""
    if spec.is_regression:
        return f"a number from {STSB_RANGE[0]:g} to {STSB_RANGE[1]:g}"
    return "one of " + ", ".join(f"{i} ({label})" for i, label in enumerate(spec.label_names))


def _check_label(
    spec: "TaskSpec", column: pa.ChunkedArray, file: str, numbering: Numbering | None, problems: list[str]
) -> pa.ChunkedArray:
    """The labels in the task's numbers, whatever the file has: numbers, numbers of its own names, or names."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, expected = column.type, _expected(spec)
    low, high = STSB_RANGE if spec.is_regression else (0, spec.num_labels - 1)
    if numbering is not None:
        high = len(numbering.names) - 1
        expected = "one of " + ", ".join(f"{i} ({label})" for i, label in enumerate(numbering.names))
    if any(test(kind) for test in _TEXT):  # CSV, or names in place of numbers
        column = pc.utf8_trim_whitespace(column.cast(pa.string()))
        is_number = pc.match_substring_regex(column, f"^{NUMBER}$")
        if spec.label_names and pc.any(known := pc.is_in(column, pa.array(spec.label_names))).as_py():
            return _check_names(spec, column, known, is_number, file, problems)
        near = _nearest(spec, column, is_number)
        if _report(problems, file, "label", column, pc.invert(is_number), f"is not {expected}{near}"):
            return column
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        problems.append(f"{file}: column 'label' holds {kind}, expected {expected}.")
        return column

    number = column.cast(pa.float64(), safe=False)  # a label of 2^60 is to be refused, not to fail here
    if _report(problems, file, "label", column, pc.is_null(number), f"in place of a label, expected {expected}"):
        return column
    unlabelled = pc.equal(number, -1.0)
    hint = "marks an unlabelled row (GLUE's test sets have no public labels); only labelled rows can be used"
    outside = pc.or_(pc.or_(pc.less(number, low), pc.greater(number, high)), pc.is_nan(number))
    if not spec.is_regression:
        outside = pc.or_(outside, pc.not_equal(number, pc.floor(number)))
    found = _report(problems, file, "label", column, unlabelled, hint)
    found |= _report(problems, file, "label", column, pc.and_not(outside, unlabelled), f"is not {expected}")
    if found:
        return column
    number = number.cast(pa.float32() if spec.is_regression else pa.int64(), safe=False)
    if numbering is not None and numbering.moves:
        number = pa.chunked_array([pa.array(numbering.places, pa.int64()).take(number.combine_chunks())])
    return number


def _check_names(
    spec: "TaskSpec",
    column: pa.ChunkedArray,
    known: pa.ChunkedArray,
    is_number: pa.ChunkedArray,
    file: str,
    problems: list[str],
) -> pa.ChunkedArray:
    """The task's numbers for labels that are names."""
    if _report(problems, file, "label", column, pc.is_null(column), f"in place of a label, expected {_expected(spec)}"):
        return column
    if is_number[0].as_py():
        mixed, what = pc.invert(is_number), "is not a number, as the labels of the rows before it"
    else:
        mixed, what = is_number, "is a number, the labels of other rows are names"
    strange = pc.invert(pc.or_(known, is_number))
    found = _report(problems, file, "label", column, mixed, what)
    if not is_number[0].as_py():
        near = _nearest(spec, column, pc.or_(known, is_number))
        found |= _report(problems, file, "label", column, strange, f"is not {_expected(spec)}{near}")
    return column if found else pc.index_in(column, pa.array(spec.label_names)).cast(pa.int64())


def _nearest(spec: "TaskSpec", column: pa.ChunkedArray, right: pa.ChunkedArray) -> str:
    """Which name may be meant by the first text that is no label, to be put behind a message."""
    row = pc.index(pc.fill_null(right, True), False).as_py()
    near = known_classes(column[row].as_py(), spec.label_names) if row >= 0 else None
    return f"; perhaps {near} is meant" if near else ""


def _check_index(column: pa.ChunkedArray, file: str, problems: list[str]) -> pa.ChunkedArray:
    """The numbers under which a source knows its rows, and which submissions quote."""
    try:
        number = column.cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        problems.append(f"{file}: column 'idx' holds {column.type}, not the whole number of each row, {_WHY_IDX}.")
        return column
    wrong = pc.less(number, 0)
    what = f"is not the number of a row, {_WHY_IDX}"
    return column if _report(problems, file, "idx", number, wrong, what) else number


def _check_unique(numbers: pa.ChunkedArray, files: str, problems: list[str]) -> None:
    counts = pc.value_counts(numbers)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        number, count = twice[0]["values"], twice[0]["counts"]
        problems.append(f"{files}: column 'idx': {number} is the number of {count} rows, {_WHY_IDX}.")


def _report(
    problems: list[str], file: str, name: str, values: pa.ChunkedArray, bad: pa.ChunkedArray, what: str
) -> bool:
    """Append one problem for the first row where `bad` is true or null; True when there is any."""
    bad = pc.fill_null(bad, True)
    count = pc.sum(bad).as_py()
    if count:
        row = pc.index(bad, True).as_py()
        value = json.dumps(values[row].as_py(), ensure_ascii=False)[:80]
        where = f"{file}, row {row + 1} (data rows, counted from 1), column '{name}'"
        problems.append(f"{where}: {value} {what}{more(count)}.")
    return bool(count)


def to_rows(batch: pa.RecordBatch, before: int) -> list[dict[str, Any]]:
    """The rows of a batch, of which ``before`` stand in front.

    Raises:
        ValueError: text that is not UTF-8, with its row.
    """
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise ValueError(
                    f"row {before + i + 1} (data rows, counted from 1): byte 0x{byte:02x} is not UTF-8"
                ) from None
        raise
    return rows


def more(count: int) -> str:
    """How many rows have the same problem, besides the one that a message shows; empty for one."""
    return f" (and {count - 1} more such row{'s' if count > 2 else ''})" if count > 1 else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
