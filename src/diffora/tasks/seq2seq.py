"""From a text to a text, with an encoder and a decoder (T5, BART and the like): ``task=seq2seq``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import datasets
import pyarrow as pa

from diffora.errors import UserError
from diffora.settings.checks import FRACTION, PATH, SEED, Help
from diffora.settings.sections import TaskSettings
from diffora.tasks.account import Account
from diffora.tasks.base import Rows
from diffora.tasks.pairs.read import FORMATS, Columns, Part, read_files, read_hub_split
from diffora.tasks.pairs.task import PairSettings, PairTask
from diffora.tasks.sources.place import ALL, Place
from diffora.tasks.texts.divide import choose_validation


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSettings(PairSettings):
    """The settings of `Seq2SeqTask`."""

    path: Annotated[
        Annotated[str, PATH] | None,
        Help(
            "A .csv, .tsv, .jsonl or .parquet file, a folder with such files (train, validation, test), or the id of a "
            "data set on the hub."
        ),
    ] = None
    subset: Annotated[str | None, Help("Subset of a data set on the hub; null: its only one.")] = None
    train_split: Annotated[str, Help("Split of the training rows, in a folder or on the hub.")] = "train"
    validation_split: Annotated[
        str, Help("Split of the validation rows. Without it, they are taken from the training rows.")
    ] = "validation"
    source_column: Annotated[str, Help("Column of the sources.")] = "source"
    target_column: Annotated[str, Help("Column of the targets.")] = "target"
    validation_fraction: Annotated[
        float, FRACTION, Help("Share of the training rows to validate on, if there is no validation file.")
    ] = 0.1
    split_seed: Annotated[int, SEED, Help("Draws these rows; the seed of the run does not matter.")] = 0


class Seq2SeqTask(PairTask):
    """Pairs of your own, from files or the hub."""

    settings: ClassVar[type[TaskSettings]] = Seq2SeqSettings

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.columns = Columns(cfg.source_column, cfg.target_column)
        self.place = Place(cfg.path or "", cfg.subset, cfg.train_split, cfg.validation_split, FORMATS)
        self.test_splits = ("test",) if self.place.has_test else ()

    @property
    def source(self) -> str:
        return str(self.cfg.path)

    def default_splits(self, other_data: bool) -> tuple[str, ...]:
        """All rows of another file; otherwise the validation rows."""
        return (ALL,) if other_data and self.place.is_file else self.validation_splits

    def problems(self) -> Iterator[str]:
        c = self.cfg
        if c.path is None:
            yield f"task.path=null: task={self.name} reads your own rows: give a file, or a folder with train.csv"
        else:
            yield from self.place.problems()
        if c.source_column == c.target_column:
            yield f"task.source_column={c.source_column} is task.target_column too; they must be two columns"

    # --- rows ---

    def load(self) -> Rows:
        problems: list[str] = []
        splits = ("train", "validation") if self.place.has_validation() else ("train",)
        parts = {split: self._read(split, problems) for split in splits}
        if problems:
            raise UserError(problems)
        found = {split: part for split, part in parts.items() if part is not None}
        self.accounts |= {split: part.account for split, part in found.items()}
        tables = {split: part.table for split, part in found.items()}
        if "validation" not in tables:
            tables["train"], tables["validation"] = self._cut(tables["train"])
        return self.divided(tables)

    def load_split(self, split: str) -> datasets.Dataset:
        """Load "train", "validation", another split of the source, or "all" rows of a single file.

        Rows of "train" and "validation" need targets; the rows of other splits need none.
        """
        if self.place.is_file and split not in ("train", "validation", ALL):
            raise UserError(
                f"split={split}: task.path={self.cfg.path} is one file; it has the splits all, train, validation"
            )
        if split == "train" or (split == "validation" and not self.place.has_validation()):
            rows = self.load()
            self.accounts["validation"].notes[:] = []
            return rows.train if split == "train" else rows.validation[split]
        problems: list[str] = []
        part = self._read(split, problems)
        if part is None:
            raise UserError(problems)
        if "target" not in part.table.column_names:
            part.account.notes.append(f"no targets in column '{self.columns.target}': predictions without metrics")
        self.accounts[split] = part.account
        return datasets.Dataset(part.table)

    def _read(self, split: str, problems: list[str]) -> Part | None:
        """The checked rows of a split; None, and messages in ``problems``, if something is wrong."""
        labelled = split in ("train", "validation")
        if self.place.is_hub:
            there = self.place.hub_split(split, problems)
            return read_hub_split(*there, self.columns, labelled, problems) if there else None
        files = self.place.files(split, problems)
        return read_files(files, self.columns, labelled, problems) if files else None

    def _cut(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """(training rows, validation rows); both accounts say how they were divided. Equal sources stay together."""
        fraction, seed = self.cfg.validation_fraction, self.cfg.split_seed
        pairs = pa.table({"text": table.column("source"), "label": table.column("target")})
        chosen = choose_validation(pairs, fraction, seed, by_class=False)
        if not chosen.any():
            raise UserError(
                f"{self.source}: no validation rows can be taken from {table.num_rows} rows, because all have the same "
                "source; add rows, or a validation file"
            )
        train, validation = table.filter(pa.array(~chosen)), table.filter(pa.array(chosen))
        why = f"task.validation_fraction={fraction:g}, task.split_seed={seed}"
        self.accounts["train"].drop(f"taken for validation, {why}", validation.num_rows)
        self.accounts["validation"] = Account(validation.num_rows)
        return train, validation
