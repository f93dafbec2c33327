"""Where a task's rows come from: the Hugging Face hub, a folder of local files, or the embedded generator.

Whatever the source, the rows are checked here, before anything expensive starts, and all
mistakes are reported together.
"""

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from diffora.errors import UserError
from diffora.hub import why_unreachable
from diffora.tasks.glue import STSB_RANGE, TaskSpec

HUB_DATASET = "nyu-mll/glue"
SUBSET_SEED = 0  # `max_train_rows` picks the same rows in every run, whatever the run's own seed
EMBEDDED_SEED = 0


@dataclass(frozen=True)
class Rows:
    """The checked rows of a task: text columns (string) and `label` (int64, float32 for regression), nothing else.

    Attributes:
        train: the training split, after `max_train_rows`.
        validation: evaluation splits by the name their metrics are logged under, the official one first:
            "validation", and for MNLI also "validation_mismatched".
        data_hash: sha256 of all of it; equal content gives an equal hash whatever the file format.
        source: where it came from, in words.
    """

    train: datasets.Dataset
    validation: dict[str, datasets.Dataset]
    data_hash: str
    source: str


def load_rows(
    spec: TaskSpec,
    path: str | Path | None = None,
    max_train_rows: int | None = None,
    train_rows: int = 4000,
    validation_rows: int = 1000,
) -> Rows:
    """Load and check a task's training and validation rows.

    Args:
        spec: the task.
        path: folder with `train` and the validation splits as .parquet, .jsonl or .csv in the hub's
            columns; None loads from the hub (or generates, for the embedded task).
        max_train_rows: use only so many training rows. They are drawn with a fixed seed, so they are
            the same in every run; None uses all.
        train_rows, validation_rows: size of the embedded task; other tasks ignore them.

    Raises:
        UserError: everything that is wrong with the arguments or the data, together.
    """
    if max_train_rows is not None and max_train_rows < 1:
        raise UserError(f"task.max_train_rows={max_train_rows} must be at least 1, or null for all rows.")
    if spec.hub_config is None:
        tables, source = _embedded(spec, path, train_rows, validation_rows)
    elif path is not None:
        tables, source = _local(spec, Path(path)), str(path)
    else:
        tables, source = _hub(spec), f"{HUB_DATASET}/{spec.hub_config}"

    problems: list[str] = []
    checked = {file: _check(spec, table, file, problems) for file, table in tables.items()}
    if problems:
        raise UserError(problems)

    train, *validation = checked.values()
    if max_train_rows is not None and max_train_rows < train.num_rows:
        chosen = np.random.default_rng(SUBSET_SEED).permutation(train.num_rows)[:max_train_rows]
        train = train.take(pa.array(np.sort(chosen)))
    names = ("validation", *spec.validation_splits[1:])
    digest = hashlib.sha256()
    for table in (train, *validation):
        digest.update(bytes.fromhex(content_hash(table)))
    return Rows(
        train=datasets.Dataset(train),
        validation={name: datasets.Dataset(table) for name, table in zip(names, validation, strict=True)},
        data_hash=digest.hexdigest(),
        source=source,
    )


def content_hash(table: pa.Table) -> str:
    """sha256 of a checked table's content: independent of process, file format, chunking and library version."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name)
        digest.update(f"{name}:{len(column)}:".encode())
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


# --- the three sources: each returns one raw table per split, train first, keyed by its name in messages ---


def _embedded(spec: TaskSpec, path: object, train_rows: int, validation_rows: int) -> tuple[dict[str, pa.Table], str]:
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
    tables = {name: pa.table(generated[name]) for name in ("train", *spec.validation_splits)}
    return tables, f"embedded:{spec.name}"


def _hub(spec: TaskSpec) -> dict[str, pa.Table]:
    was_offline = datasets.config.HF_HUB_OFFLINE
    unreachable = why_unreachable()
    try:
        # An unreachable hub costs half a minute or more of retries; with offline mode on, `load_dataset`
        # goes straight to what an earlier run has cached.
        datasets.config.HF_HUB_OFFLINE = unreachable is not None
        splits = datasets.load_dataset(HUB_DATASET, spec.hub_config)
    except Exception as error:  # connection, proxy, hub and disk errors have no common base class
        reason = f"{unreachable}, and nothing in the local cache" if unreachable else _first_line(error)
        raise UserError(
            f"Cannot load task '{spec.name}' from the Hugging Face hub ({HUB_DATASET}, {spec.hub_config}): {reason}.\n"
            f"  Either use files you have: task.path=<folder with train and {' and '.join(spec.validation_splits)} "
            f"as .parquet, .jsonl or .csv>\n"
            f"  or try the task that needs no download: python train.py experiment=quickstart"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return {name: splits[name].data.table for name in ("train", *spec.validation_splits)}


def _local(spec: TaskSpec, folder: Path) -> dict[str, pa.Table]:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"task.path={folder} {what}; give the folder that holds "
            f"{', '.join(('train', *spec.validation_splits))} as .parquet, .jsonl or .csv."
        )
    problems: list[str] = []
    tables: dict[str, pa.Table] = {}
    present = sorted(entry.name for entry in folder.iterdir())
    for split in ("train", *spec.validation_splits):
        # The second name is the one under which the hub stores the split, so a downloaded folder works as it is.
        names = [f"{split}.parquet", f"{split}-00000-of-00001.parquet", f"{split}.jsonl", f"{split}.csv"]
        found = [name for name in names if name in present]
        if not found:
            there = ", ".join(present[:10]) + (", …" if len(present) > 10 else "") if present else "nothing"
            problems.append(f"{folder}: no file for the split '{split}'; looked for {', '.join(names)}; found {there}.")
        elif len(found) > 1:
            problems.append(f"{folder}: more than one file for the split '{split}': {', '.join(found)}; keep one.")
        else:
            file = folder / found[0]
            try:
                tables[str(file)] = _READERS[file.suffix](file, spec)
            except (pa.ArrowException, OSError, ValueError) as error:
                problems.append(f"{file} cannot be read as {file.suffix}: {_first_line(error)}")
    if problems:
        raise UserError(problems)
    return tables


def _read_parquet(file: Path, spec: TaskSpec) -> pa.Table:
    return pa.parquet.read_table(file)


def _read_csv(file: Path, spec: TaskSpec) -> pa.Table:
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
            f"has {row.expected_columns}{_more(len(ragged))}"
        )
    return table


def _read_jsonl(file: Path, spec: TaskSpec) -> pa.Table:
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


def _first_json_fault(file: Path, spec: TaskSpec) -> str | None:
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


_READERS: dict[str, Callable[[Path, TaskSpec], pa.Table]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


# --- checks: vectorised; each appends to `problems` and names file, row (first data row is 1), column and value ---


def _check(spec: TaskSpec, table: pa.Table, file: str, problems: list[str]) -> pa.Table:
    """The table reduced to text columns and label in canonical types; meaningless when it added to `problems`."""
    before = len(problems)
    if table.num_rows == 0:
        problems.append(f"{file}: no rows.")
        return table
    for name in (*spec.text_columns, "label"):
        count = table.column_names.count(name)
        if count > 1:
            problems.append(f"{file}: {count} columns are called '{name}'; keep one.")
        elif count == 0:
            by_lower = {column.lower(): column for column in reversed(table.column_names)}
            near = difflib.get_close_matches(name, by_lower, n=1)
            hint = f"; rename '{by_lower[near[0]]}' if that is it" if near else ""
            problems.append(f"{file}: no column '{name}'{hint}; the file has {', '.join(table.column_names)}.")
    if len(problems) > before:
        return table
    columns = {name: _check_text(table.column(name), file, name, problems) for name in spec.text_columns}
    columns["label"] = _check_label(spec, table.column("label"), file, problems)
    return table if len(problems) > before else pa.table(columns)


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
    except pa.ArrowInvalid:
        problems.append(f"{file}: column '{name}' is not valid UTF-8.")
        return column
    return text


def _check_label(spec: TaskSpec, column: pa.ChunkedArray, file: str, problems: list[str]) -> pa.ChunkedArray:
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

    number = column.cast(pa.float64())
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
        problems.append(f"{where}: {value} {what}{_more(count)}.")
    return bool(count)


def _more(count: int) -> str:
    return f" (and {count - 1} more such row{'s' if count > 2 else ''})" if count > 1 else ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
