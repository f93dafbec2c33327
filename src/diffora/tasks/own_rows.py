"""What the tasks for people's own rows share: one file, a folder of files or the hub, and the splits of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa

from diffora.errors import UserError
from diffora.settings.checks import LENGTH, Help, whole
from diffora.tasks.account import note_overlap
from diffora.tasks.base import Rows, Task
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.place import Place, PlaceSettings
from diffora.tasks.sources.tables import content_hash, joint_hash, subset
from diffora.tasks.texts.divide import choose_validation, cut


@dataclass(frozen=True, kw_only=True)
class OwnRowsSettings(PlaceSettings):
    """The settings that most tasks for people's own rows share."""

    max_length: Annotated[int, whole(4, LENGTH), Help("Length of the longest input.", "tokens")]


class OwnRowsTask(Task):
    """A task that reads rows from ``task.path``. A subclass defines `formats`, `read` and `keys`."""

    formats: ClassVar[tuple[str, ...]]
    """Types of files that the task reads, without the dot."""
    why_undivided: ClassVar[str] = "all have the same input"
    """Why no validation rows can be taken from the training rows, for the message if there are none."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.place = Place(cfg, self.formats)
        self.test_splits = ("test",) if self.place.has_test else ()

    @property
    def source(self) -> str:
        """Where the rows come from, in words."""
        return str(self.cfg.path)

    # --- what a subclass defines ---

    def read(self, split: str, labelled: bool, problems: list[str]) -> Part | None:
        """The checked rows of a split.

        Args:
            split: "train", "validation", or another name at the source.
            labelled: whether all rows must have labels. Otherwise labels may be missing in all rows.
            problems: grows by everything that is wrong.

        Returns:
            None if something is wrong.
        """
        raise NotImplementedError

    def keys(self, table: pa.Table) -> pa.Array:
        """One text for each row; rows with the same input have the same text."""
        raise NotImplementedError

    def learn(self, train: Part, problems: list[str]) -> None:
        """Take what the task needs to know from all training rows, such as its classes."""

    def numbered(self, split: str, part: Part, problems: list[str]) -> pa.Table:
        """The table of a split with labels as the model learns them."""
        return part.table

    def facts(self) -> list[str]:
        """sha256 of what the labels mean, if numbers alone do not say it."""
        return []

    def note_rows(self, tables: dict[str, pa.Table]) -> None:
        """Add notes about the rows that training and validation use to the accounts."""

    def before_split(self) -> None:
        """Prepare for a split without training rows: a subclass learns its classes, if it does not know them."""

    def draw(self, table: pa.Table) -> tuple[np.ndarray, str]:
        """(which training rows are for validation, booleans; how they were drawn). Equal inputs stay together."""
        rows = pa.table({"text": self.keys(table), "label": np.zeros(len(table), dtype=np.int64)})
        return choose_validation(rows, self.cfg.validation_fraction, self.cfg.split_seed, by_class=False), "at random"

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
        if "validation" not in tables:
            tables["train"], tables["validation"] = self.divided(tables["train"])
        tables["train"] = subset(tables["train"], self.cfg.max_train_rows, self.accounts["train"])
        note_overlap(self.accounts, {name: self.keys(table) for name, table in tables.items()})
        self.note_rows(tables)
        return Rows(
            datasets.Dataset(tables["train"]),
            {"validation": datasets.Dataset(tables["validation"])},
            joint_hash([*self.facts(), *map(content_hash, tables.values())]),
            self.source,
        )

    def load_split(self, split: str) -> datasets.Dataset:
        """Load "train", "validation", another split of the folder or the hub, or "all" rows of a single file.

        Rows of "train" and "validation" need labels; the rows of other splits need none.
        """
        if self.place.of_training(split):
            rows = self.load()
            return rows.train if split == "train" else rows.validation[split]
        self.before_split()
        problems: list[str] = []
        part = self.read(split, split == "validation", problems)
        table = None if part is None else self.numbered(split, part, problems)
        if problems or part is None or table is None:
            raise UserError(problems)
        self.accounts[split] = part.account
        return datasets.Dataset(table)

    def divided(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """(training rows, validation rows); both accounts say how they were divided."""
        chosen, how = self.draw(table)
        if not chosen.any():
            raise UserError(
                f"{self.source}: no validation rows can be taken from {table.num_rows} rows, because "
                f"{self.why_undivided}; add rows, or a validation file"
            )
        return cut(table, chosen, self.cfg, self.accounts, f"drawn {how}")

    def _tables(self) -> dict[str, pa.Table]:
        """The checked training rows and, if there is a split of them, the validation rows. Learns the classes.

        Raises:
            UserError: everything that is wrong with the rows.
        """
        problems: list[str] = []
        splits = ("train", "validation") if self.place.has_validation() else ("train",)
        parts = {split: self.read(split, True, problems) for split in splits}
        train = parts["train"]
        if train is None:
            raise UserError(problems)
        self.learn(train, problems)
        if problems:
            raise UserError(problems)
        found = {split: part for split, part in parts.items() if part is not None}
        tables = {split: self.numbered(split, part, problems) for split, part in found.items()}
        if problems:
            raise UserError(problems)
        self.accounts |= {split: part.account for split, part in found.items()}
        return tables
