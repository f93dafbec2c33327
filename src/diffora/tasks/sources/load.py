"""Loads the rows of a text task from the hub, a folder of files or a generator, and checks them.

Everything is checked here, before anything expensive starts, and all mistakes are reported together.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from diffora.errors import UserError
from diffora.tasks.account import Account, Accounts, note_ignored, note_overlap
from diffora.tasks.base import Rows
from diffora.tasks.sources.check_labels import Numbering, check_label, has_names, is_unlabelled, numbering_of
from diffora.tasks.sources.check_values import check_index, check_text, check_unique
from diffora.tasks.sources.hub import hub_splits, with_features
from diffora.tasks.sources.readers import Piece, Pieces, local_pieces
from diffora.tasks.sources.tables import check_columns, content_hash, joint_hash, subset
from diffora.tasks.spec import TaskSpec

HUB_DATASET = "nyu-mll/glue"
DIAGNOSTIC = "ax"
"""GLUE's diagnostic set. Here it is a test split of MNLI; on the hub it is a configuration with one split, `test`."""
GENERATOR_SEED = 0


def load_rows(
    spec: TaskSpec,
    path: str | Path | None = None,
    max_train_rows: int | None = None,
    train_rows: int = 4000,
    validation_rows: int = 1000,
    accounts: Accounts | None = None,
) -> Rows:
    """Load and check the training and validation rows of a classification or regression task.

    The rows have the task's text columns (string) and ``label`` (int64, or float32 for regression), nothing else.

    Args:
        spec: the task.
        path: folder with the splits as .parquet (one file, or numbered shards as on the hub), .jsonl or .csv, with the
            hub's columns; None loads from the hub, or generates the rows of a generated task.
        max_train_rows: use only so many training rows, drawn with a fixed seed, so that all runs use the same; None
            uses all.
        train_rows, validation_rows: sizes of a generated task; other tasks ignore them.
        accounts: gets what became of the rows of each split, under the names that `Rows` uses.

    Raises:
        UserError: everything that is wrong with the arguments or the data, together.
    """
    if max_train_rows is not None and max_train_rows < 1:
        raise UserError(f"task.max_train_rows={max_train_rows} must be at least 1, or null for all rows.")
    splits = ("train", *spec.validation_splits)
    if spec.generate is not None:
        pieces, source = _generated(spec, path, train_rows, validation_rows), f"embedded:{spec.name}"
    elif path is not None:
        pieces, source = local_pieces(spec, Path(path), splits), str(path)
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
    spec: TaskSpec,
    split: str,
    path: str | Path | None = None,
    train_rows: int = 4000,
    validation_rows: int = 1000,
    account: Account | None = None,
) -> datasets.Dataset:
    """Load and check one split by its name at the source. Its labels may be missing, or -1 as in GLUE's test sets.

    Args:
        train_rows, validation_rows: sizes of a generated task; its validation rows depend on both, because none of them
            is a training row.
        account: gets what became of the rows.

    Returns:
        The text columns; ``label`` if the rows have labels; for GLUE's test sets also ``idx`` (int64) if the source
        numbers its rows. Only submissions use ``idx``.

    Raises:
        UserError: there is no such split, or it has faults.
    """
    if spec.generate is not None:
        pieces = _generated(spec, path, train_rows, validation_rows)
        if split not in pieces or split == "train":
            raise UserError(f"split={split}: task '{spec.name}' has the split {', '.join(spec.validation_splits)}.")
        pieces = {split: pieces[split]}
    elif path is not None:
        pieces = local_pieces(spec, Path(path), (split,))
    else:
        pieces = _hub(spec, (split,))
    accounts = [Account() if account is None else account]
    return datasets.Dataset(_checked(spec, pieces, accounts, labelled=False)[0])


# --- the hub and the generator; `readers.local_pieces` reads files ---


def _generated(spec: TaskSpec, path: object, train_rows: int, validation_rows: int) -> Pieces:
    problems = [
        f"task.{key}={value} must be at least 1."
        for key, value in (("train_rows", train_rows), ("validation_rows", validation_rows))
        if value < 1
    ]
    if path is not None:
        problems.append(f"task.path={path}: task '{spec.name}' is generated and reads no files; leave task.path out.")
    if problems:
        raise UserError(problems)
    assert spec.generate is not None
    generated = spec.generate(train_rows=train_rows, validation_rows=validation_rows, seed=GENERATOR_SEED)
    return {name: {name: Piece(pa.table(generated[name]))} for name in ("train", *spec.validation_splits)}


def _hub(spec: TaskSpec, splits: Sequence[str]) -> Pieces:
    files = f"<folder with train and {' and '.join(spec.validation_splits)} as .parquet, .jsonl or .csv>"
    if list(splits) == [DIAGNOSTIC]:
        found = {DIAGNOSTIC: hub_splits(spec.name, HUB_DATASET, DIAGNOSTIC, ["test"], files)["test"]}
    else:
        found = hub_splits(spec.name, HUB_DATASET, spec.hub_config, splits, files)
    return {name: {name: Piece(with_features(split))} for name, split in found.items()}


# --- checks ---


def _checked(spec: TaskSpec, pieces: Pieces, accounts: Sequence[Account], labelled: bool = True) -> list[pa.Table]:
    """One checked table for each split.

    Args:
        accounts: one for each split, in the same order.
        labelled: whether all rows must have labels. Otherwise labels may be missing, and the row numbers of test sets
            are kept.

    Raises:
        UserError: every fault in the rows.
    """
    problems: list[str] = []
    numberings: dict[str, Numbering | None] = {}
    checked = []
    for (split, files), account in zip(pieces.items(), accounts, strict=True):
        table = _checked_split(spec, split, files, labelled, numberings, problems, account)
        if table is not None:
            checked.append(table)
    if problems:
        raise UserError(problems)
    _refuse_mixed_numberings(spec, pieces, numberings)
    return checked


def _checked_split(
    spec: TaskSpec,
    split: str,
    files: dict[str, Piece],
    labelled: bool,
    numberings: dict[str, Numbering | None],
    problems: list[str],
    account: Account,
) -> pa.Table | None:
    """The rows of all files of a split in one table; None, and messages in ``problems``, if they have faults.

    Args:
        numberings: gets, for each file whose labels are read, how it numbers the classes.
        account: gets what became of the rows.
    """
    before = len(problems)
    tables = {file: piece.table for file, piece in files.items()}
    columns = [*spec.text_columns, "label"]
    if not labelled and all(is_unlabelled(table) for table in tables.values()):
        columns.remove("label")
    if split in spec.test_splits and all("idx" in table.column_names for table in tables.values()):
        columns.append("idx")
    if "label" in columns:
        numberings |= {file: numbering_of(spec, table, file, problems) for file, table in tables.items()}
    parts = [_check_table(spec, table, columns, file, numberings.get(file), problems) for file, table in tables.items()]
    if len(problems) > before:
        return None
    whole = pa.concat_tables(parts)
    if "idx" in columns:
        check_unique(whole.column("idx"), ", ".join(tables), problems)
    account.read = whole.num_rows
    for file, table in tables.items():
        if (found := numberings.get(file)) and found.moves:
            account.change(f"label numbers follow the class names of {file}: {found}", table.num_rows)
    account.notes += [note for piece in files.values() for note in piece.notes]
    present = dict.fromkeys(name for table in tables.values() for name in table.column_names)
    note_ignored(account, [name for name in present if name not in (*spec.text_columns, "label", "idx")])
    return whole


def _check_table(
    spec: TaskSpec,
    table: pa.Table,
    wanted: Sequence[str],
    file: str,
    numbering: Numbering | None,
    problems: list[str],
) -> pa.Table:
    """The wanted columns of one file, checked; meaningless if ``problems`` grew."""
    before = len(problems)
    if table.num_rows == 0:
        problems.append(f"{file}: no rows.")
        return table
    check_columns(table.column_names, wanted, file, problems)
    if len(problems) > before:
        return table
    columns = {name: check_text(table.column(name), file, name, problems) for name in spec.text_columns}
    if "label" in wanted:
        columns["label"] = check_label(spec, table.column("label"), file, numbering, problems)
    if "idx" in wanted:
        columns["idx"] = check_index(table.column("idx"), file, problems)
    return table if len(problems) > before else pa.table(columns)


def _refuse_mixed_numberings(spec: TaskSpec, pieces: Pieces, numberings: dict[str, Numbering | None]) -> None:
    """Raise a UserError if one file has bare class numbers and another file numbers the classes in its own order."""
    moved = [file for file, found in numberings.items() if found and found.moves]
    tables = {file: piece.table for files in pieces.values() for file, piece in files.items()}
    plain = [file for file, found in numberings.items() if found is None and not has_names(spec, tables[file])]
    if moved and plain:
        raise UserError(
            f"{plain[0]}: its labels are numbers without names, but {moved[0]} numbers the classes in another order "
            f"than the task ({numberings[moved[0]]}); write the labels as names, so that both mean the same."
        )


def _note_oddities(spec: TaskSpec, tables: dict[str, pa.Table], accounts: Accounts) -> None:
    """Note what is no fault of the rows but makes a result doubtful."""
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
