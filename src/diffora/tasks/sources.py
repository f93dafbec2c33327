"""Where a task's rows come from: the Hugging Face hub, a folder of local files, or the embedded generator.

Whatever the source, the rows are checked here, before anything expensive starts, and all
mistakes are reported together.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from diffora.errors import UserError
from diffora.hub import why_unreachable
from diffora.tasks.base import Rows

if TYPE_CHECKING:
    from diffora.tasks.glue import TaskSpec

STSB_RANGE = (0.0, 5.0)  # the scale of STS-B's similarity scores, the only regression task here
HUB_DATASET = "nyu-mll/glue"
DIAGNOSTIC = "ax"  # the split of MNLI's YAML that is a configuration of its own on the hub, of one split, `test`
SUBSET_SEED = 0  # `max_train_rows` picks the same rows in every run, whatever the run's own seed
EMBEDDED_SEED = 0

Pieces = dict[str, dict[str, pa.Table]]
"""Raw tables: for each split its files, under the names that they have in messages."""


def load_rows(
    spec: "TaskSpec",
    path: str | Path | None = None,
    max_train_rows: int | None = None,
    train_rows: int = 4000,
    validation_rows: int = 1000,
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
    checked = _checked(spec, pieces)

    train, *validation = checked
    train = subset(train, max_train_rows)
    names = ("validation", *spec.validation_splits[1:])
    return Rows(
        train=datasets.Dataset(train),
        validation={name: datasets.Dataset(table) for name, table in zip(names, validation, strict=True)},
        data_hash=joint_hash(map(content_hash, (train, *validation))),
        source=source,
    )


def load_split(
    spec: "TaskSpec", split: str, path: str | Path | None = None, validation_rows: int = 1000
) -> datasets.Dataset:
    """Load and check one split by its name at the source; its labels may be missing (or -1, as in GLUE's test sets).

    Returns:
        The text columns, ``label`` where the rows have labels, and ``idx`` (int64) where the source numbers its rows.

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
    return datasets.Dataset(_checked(spec, pieces, labelled=False)[0])


def _checked(spec: "TaskSpec", pieces: Pieces, labelled: bool = True) -> list[pa.Table]:
    """One checked table for each split; without ``labelled``, labels may be missing and row numbers are kept."""
    problems: list[str] = []
    checked = []
    for tables in pieces.values():
        columns = [*spec.text_columns, "label"]
        if not labelled and all(_unlabelled(table) for table in tables.values()):
            columns.remove("label")
        if not labelled and all("idx" in table.column_names for table in tables.values()):
            columns.append("idx")
        before = len(problems)
        parts = [_check(spec, table, columns, file, problems) for file, table in tables.items()]
        if len(problems) == before:
            checked.append(pa.concat_tables(parts))
            if "idx" in columns:
                _check_unique(checked[-1].column("idx"), ", ".join(tables), problems)
    if problems:
        raise UserError(problems)
    return checked


def subset(table: pa.Table, max_rows: int | None) -> pa.Table:
    """At most ``max_rows`` rows in their order, the same in every run; None for all."""
    if max_rows is None or max_rows >= table.num_rows:
        return table
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

    from diffora.tasks import paraphrase

    generated = paraphrase.splits(train_rows=train_rows, validation_rows=validation_rows, seed=EMBEDDED_SEED)
    pieces = {name: {name: pa.table(generated[name])} for name in ("train", *spec.validation_splits)}
    return pieces, f"embedded:{spec.name}"


def _hub(spec: "TaskSpec", splits: Sequence[str]) -> Pieces:
    files = f"<folder with train and {' and '.join(spec.validation_splits)} as .parquet, .jsonl or .csv>"
    if list(splits) == [DIAGNOSTIC]:
        found = hub_splits(spec.name, HUB_DATASET, DIAGNOSTIC, ["test"], files)
    else:
        found = hub_splits(spec.name, HUB_DATASET, spec.hub_config, splits, files)
    return {name: {name: split.data.table} for name, split in found.items()}


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
                pieces[split][str(file)] = _READERS[file.suffix](file, spec)
            except (pa.ArrowException, OSError, ValueError) as error:
                problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
    if problems:
        raise UserError(problems)
    return pieces


def split_files(folder: Path, split: str, problems: list[str]) -> list[Path]:
    """The files of a split: one, or the numbered parquet shards in which the hub stores it; else a problem."""
    shard = re.compile(rf"{re.escape(split)}-(\d{{5}})-of-(\d{{5}})\.parquet")
    shards = {entry.name: match for entry in folder.iterdir() if (match := shard.fullmatch(entry.name))}
    totals = sorted({int(match[2]) for match in shards.values()})
    if not totals:
        names = [f"{split}.parquet", f"{split}-00000-of-00001.parquet", f"{split}.jsonl", f"{split}.csv"]
        file = find_file(folder, split, names, problems)
        return [file] if file else []
    others = [name for name in (f"{split}.parquet", f"{split}.jsonl", f"{split}.csv") if (folder / name).is_file()]
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
    if len(found) == 1:
        return folder / found[0]
    if found:
        problems.append(f"{folder}: more than one file for the split '{split}': {', '.join(found)}; keep one.")
    else:
        there = ", ".join(present[:10]) + (", …" if len(present) > 10 else "") if present else "nothing"
        problems.append(f"{folder}: no file for the split '{split}'; looked for {', '.join(names)}; found {there}.")
    return None


def _read_parquet(file: Path, spec: "TaskSpec") -> pa.Table:
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


def _read_csv(file: Path, spec: "TaskSpec") -> pa.Table:
    ragged: list[pa.csv.InvalidRow] = []

    def collect(row: pa.csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    if file.stat().st_size == 0:
        raise ValueError("the file is empty, not even a header line")
    table = pa.csv.read_csv(
        file,
        read_options=pa.csv.ReadOptions(use_threads=False),  # threads would lose the row number
        parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=collect),
        # Everything as text: an empty field is an empty text, and labels are parsed where rows can be named.
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys((*spec.text_columns, "label"), pa.string()), strings_can_be_null=False
        ),
    )
    if ragged:
        row = ragged[0]
        raise ValueError(
            f"row {row.number - 1} (data rows, counted from 1) has {row.actual_columns} fields, the header "
            f"has {row.expected_columns}{more(len(ragged))}"
        )
    return table


def _read_jsonl(file: Path, spec: "TaskSpec") -> pa.Table:
    if file.stat().st_size == 0:
        return pa.table({name: pa.array([], pa.string()) for name in (*spec.text_columns, "label")})
    # Types are given, or arrow would take texts that look like dates for dates.
    schema = pa.schema([*((name, pa.string()) for name in spec.text_columns), ("label", pa.float64())])
    try:
        table = pa.json.read_json(
            file,
            read_options=pa.json.ReadOptions(block_size=16 << 20),  # a row must fit into one block
            parse_options=pa.json.ParseOptions(explicit_schema=schema),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(_first_json_fault(file, spec) or str(error)) from error
    # Arrow adds the columns of an explicit schema even when no row has them.
    absent = [name for name in schema.names if table.column(name).null_count == table.num_rows]
    return table.drop_columns([name for name in absent if not _key_occurs(file, name)])


def _first_json_fault(file: Path, spec: "TaskSpec") -> str | None:
    """Arrow's messages do not name the row, so read again, slowly, up to the first fault."""
    wanted: dict[str, type | tuple[type, ...]] = dict.fromkeys(spec.text_columns, str)
    wanted["label"] = (int, float)
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"row {number} (counted from 1)"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return f"{where} is not JSON: {error}"
            if not isinstance(row, dict):
                return f"{where} is not a JSON object: {line.strip()[:60]}"
            for column, kind in wanted.items():
                value = row.get(column)
                if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                    expected = "text" if kind is str else "a number"
                    return f"{where}, column '{column}': {json.dumps(value)[:60]} is not {expected}"
    return None


def _key_occurs(file: Path, key: str) -> bool:
    with file.open(encoding="utf-8") as lines:
        return any(key in json.loads(line) for line in lines if line.strip())


_READERS: dict[str, Callable[[Path, "TaskSpec"], pa.Table]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


# --- checks: vectorised; each appends to `problems` and names file, row (first data row is 1), column and value ---


def _check(spec: "TaskSpec", table: pa.Table, wanted: Sequence[str], file: str, problems: list[str]) -> pa.Table:
    before = len(problems)
    if table.num_rows == 0:
        problems.append(f"{file}: no rows.")
        return table
    check_columns(table.column_names, wanted, file, problems)
    if len(problems) > before:
        return table
    columns = {name: _check_text(table.column(name), file, name, problems) for name in spec.text_columns}
    if "label" in wanted:
        columns["label"] = _check_label(spec, table.column("label"), file, problems)
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
    if "label" not in table.column_names:
        return True
    try:
        values = pc.unique(table.column("label").cast(pa.string())).drop_null().to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False  # not even labels, as the check of the column will say
    return all(value.strip() in ("-1", "-1.0", "") for value in values)


def _check_text(column: pa.ChunkedArray, file: str, name: str, problems: list[str]) -> pa.ChunkedArray:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
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


def _check_label(spec: "TaskSpec", column: pa.ChunkedArray, file: str, problems: list[str]) -> pa.ChunkedArray:
    kind = column.type
    if spec.is_regression:
        low, high = STSB_RANGE
        expected = f"a number from {low:g} to {high:g}"
    else:
        low, high = 0, spec.num_labels - 1
        expected = "one of " + ", ".join(f"{i} ({label})" for i, label in enumerate(spec.label_names))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):  # CSV, or names in place of numbers
        is_number = pc.match_substring_regex(column, r"^\s*[-+]?\d+(\.\d*)?([eE][-+]?\d+)?\s*$")
        if _report(problems, file, "label", column, pc.invert(is_number), f"is not {expected}"):
            return column
        column = pc.utf8_trim_whitespace(column)
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
    return column if found else number.cast(pa.float32() if spec.is_regression else pa.int64(), safe=False)


def _check_index(column: pa.ChunkedArray, file: str, problems: list[str]) -> pa.ChunkedArray:
    """The numbers under which a source knows its rows, and which submissions quote."""
    try:
        number = column.cast(pa.int64())
    except pa.ArrowInvalid:
        problems.append(f"{file}: column 'idx' holds {column.type}, expected the whole number of each row.")
        return column
    wrong = pc.less(number, 0)
    return column if _report(problems, file, "idx", number, wrong, "is not the number of a row") else number


def _check_unique(numbers: pa.ChunkedArray, files: str, problems: list[str]) -> None:
    counts = pc.value_counts(numbers)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        number, count = twice[0]["values"], twice[0]["counts"]
        problems.append(f"{files}: column 'idx': {number} is the number of {count} rows, it must be that of one.")


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


def more(count: int) -> str:
    return f" (and {count - 1} more such row{'s' if count > 2 else ''})" if count > 1 else ""


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
