"""What the tasks for people's own rows share: rows from one file, a folder of files or the hub, and their splits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa

from diffora.errors import UserError, first_line
from diffora.settings.checks import LENGTH, Help, whole
from diffora.tasks.account import Account, note_overlap
from diffora.tasks.base import Rows, Task
from diffora.tasks.sources.faults import READ_ERRORS
from diffora.tasks.sources.place import Place, PlaceSettings
from diffora.tasks.sources.records import Records, hub_records, open_records
from diffora.tasks.sources.tables import content_hash, joint_hash, subset, with_numbers
from diffora.tasks.texts.divide import choose_validation, cut


@dataclass(frozen=True, kw_only=True)
class OwnRowsSettings(PlaceSettings):
    """The settings that the tasks for people's own rows share."""

    max_length: Annotated[int, whole(4, LENGTH), Help("Length of the longest input.", "tokens")]


@dataclass
class Part:
    """The rows of one split.

    Attributes:
        table: the checked rows; `OwnRowsTask` adds the column ``number``.
        where: the files, for messages.
        numbers: [n] the number of each row at its source, for messages.
    """

    table: pa.Table
    where: str
    numbers: list[int]


class OwnRowsTask(Task):
    """A task that reads rows from ``task.path``. A subclass checks them, and defines `formats`, `wanted`, `checked`."""

    formats: ClassVar[tuple[str, ...]]
    """Types of files that the task reads, without the dot."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.place = Place(cfg, self.formats)
        self.test_splits = ("test",) if self.place.has_test else ()

    def wanted(self) -> tuple[str, ...]:
        """The columns that every file must have."""
        raise NotImplementedError

    def checked(self, sources: Sequence[Records], labelled: bool, account: Account, problems: list[str]) -> Part | None:
        """Check the rows of a split.

        Args:
            sources: its files, at least one.
            labelled: whether all rows must have labels. Otherwise labels may be missing in all rows.
            account: gets what became of the rows.
            problems: grows by everything that is wrong.

        Returns:
            None if something is wrong.
        """
        raise NotImplementedError

    def learn(self, train: Part, account: Account, problems: list[str]) -> None:
        """Take what the task needs to know from all training rows, such as its classes."""

    def numbered(self, part: Part, account: Account, problems: list[str]) -> pa.Table:
        """The table of a split with labels as the model learns them."""
        return part.table

    def keys(self, table: pa.Table) -> pa.Array:
        """One text for each row; rows with the same input have the same text."""
        raise NotImplementedError

    # --- before training ---

    def default_splits(self, other_data: bool) -> tuple[str, ...]:
        return self.place.default_splits(other_data)

    def drawn_from_training(self, split: str) -> bool:
        return self.place.drawn_from_training(split)

    def problems(self) -> Iterator[str]:
        yield from self.place.problems()

    # --- rows ---

    def load(self) -> Rows:
        tables = self._tables()
        accounts = self.accounts
        if "validation" not in tables:
            tables["train"], tables["validation"] = self._cut(tables["train"])
        tables["train"] = subset(tables["train"], self.cfg.max_train_rows, accounts["train"])
        note_overlap(accounts, {name: self.keys(table) for name, table in tables.items()})
        self.note_rows(tables)
        return Rows(
            datasets.Dataset(tables["train"]),
            {"validation": datasets.Dataset(tables["validation"])},
            joint_hash([*self.facts(), *map(content_hash, tables.values())]),
            str(self.cfg.path),
        )

    def facts(self) -> list[str]:
        """sha256 of what the labels mean, if numbers alone do not say it."""
        return []

    def note_rows(self, tables: dict[str, pa.Table]) -> None:
        """Add notes about the rows that training and validation use to the accounts."""

    def load_split(self, split: str) -> datasets.Dataset:
        """Load "train", "validation", another split of the folder or the hub, or "all" rows of a single file.

        Rows of "train" and "validation" need labels; the rows of other splits need none.
        """
        if self.place.of_training(split):
            rows = self.load()
            return rows.train if split == "train" else rows.validation[split]
        self.before_split()
        problems: list[str] = []
        account = Account()
        part = self._read(split, split == "validation", account, problems)
        table = None if part is None else self.numbered(part, account, problems)
        if problems or table is None:
            raise UserError(problems)
        self.accounts[split] = account
        return datasets.Dataset(table)

    def before_split(self) -> None:
        """Prepare for a split without training rows: a subclass learns its classes, if it does not know them."""

    def _sources(self, split: str, notes: list[str], problems: list[str]) -> list[Records]:
        """The files of a split, or its rows on the hub; empty, with a message in ``problems``, if it cannot be read."""
        if self.place.is_hub:
            of_hub = self.place.hub_split(split, problems)
            return [] if of_hub is None else [hub_records(*of_hub)]
        files, found = self.place.files(split, problems), []
        for file in files:
            try:
                found.append(self.open(file, notes))
            except READ_ERRORS as error:
                problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
        return found if len(found) == len(files) else []

    def open(self, file: Path, notes: list[str]) -> Records:
        """The rows of a file. Raises as `open_records` does."""
        return open_records(file, self.wanted(), notes)

    def _read(self, split: str, labelled: bool, account: Account, problems: list[str]) -> Part | None:
        before = len(problems)
        sources = self._sources(split, account.notes, problems)
        if not sources:
            return None
        try:
            part = self.checked(sources, labelled, account, problems)
        except ValueError as error:  # a line that is not JSON, a text that is not UTF-8
            problems.append(f"{sources[0].where}: {first_line(error)}")
            return None
        if part is None or len(problems) > before:
            return None
        part.table = with_numbers(part.table)
        return part

    def _tables(self) -> dict[str, pa.Table]:
        """The checked training rows and, if there is a split of them, the validation rows. Learns the classes.

        Raises:
            UserError: everything that is wrong with the rows.
        """
        problems: list[str] = []
        splits = ("train", "validation") if self.place.has_validation() else ("train",)
        accounts = {split: Account() for split in splits}
        parts = {split: self._read(split, True, accounts[split], problems) for split in splits}
        train = parts["train"]
        if train is None:
            raise UserError(problems)
        self.learn(train, accounts["train"], problems)
        if problems:
            raise UserError(problems)
        tables = {
            name: self.numbered(part, accounts[name], problems) for name, part in parts.items() if part is not None
        }
        if problems:
            raise UserError(problems)
        self.accounts |= accounts
        return tables

    def _cut(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """(training rows, validation rows); both accounts say how they were divided. Equal inputs stay together."""
        rows = pa.table({"text": self.keys(table), "label": np.zeros(len(table), dtype=np.int64)})
        chosen = choose_validation(rows, self.cfg.validation_fraction, self.cfg.split_seed, by_class=False)
        if not chosen.any():
            raise UserError(
                f"{self.cfg.path}: no validation rows can be taken from {table.num_rows} rows, because all have the "
                "same input; add rows, or a validation file"
            )
        return cut(table, chosen, self.cfg, self.accounts, "drawn at random")
