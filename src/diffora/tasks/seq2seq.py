"""From a text to a text, with an encoder and a decoder (T5, BART and the like): ``task=seq2seq``."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from diffora.tasks.sources.files import has_validation, split_files
from diffora.tasks.sources.hub import hub_dataset, no_split
from diffora.tasks.texts.divide import choose_validation

ALL = "all"
"""The split of all rows of a single file."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z0-9][\w-]*")


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSettings(PairSettings):
    """The settings of `Seq2SeqTask`."""

    path: Annotated[
        Annotated[str, PATH] | None,
        Help("A .csv, .tsv, .jsonl or .parquet file, a folder with such files (train, validation, test), or a hub id."),
    ] = None
    subset: Annotated[str | None, Help("Subset of a data set on the hub, if it has several.")] = None
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
        self.place = Path(cfg.path or "")
        self.is_hub = not self.place.exists() and is_hub_id(cfg.path or "")
        has_test = self.place.is_dir() and any(self.place.glob("test[.-]*"))
        self.test_splits = ("test",) if has_test else ()

    @property
    def source(self) -> str:
        return str(self.cfg.path)

    def default_splits(self, other_data: bool) -> tuple[str, ...]:
        """All rows of another file; otherwise the validation rows."""
        return (ALL,) if other_data and self.place.is_file() else self.validation_splits

    def problems(self) -> Iterator[str]:
        c = self.cfg
        if c.path is None:
            yield f"task.path=null: task={self.name} reads your own rows: a file, a folder with train.csv, or a hub id"
        elif not self.is_hub and not self.place.is_dir() and self.place.suffix.removeprefix(".") not in FORMATS:
            yield (
                f"task.path={self.place} must be a folder, a file of one of the types {', '.join(FORMATS)}, or a hub id"
            )
        if c.source_column == c.target_column:
            yield f"task.source_column={c.source_column} is task.target_column too; they must be two columns"

    # --- rows ---

    def load(self) -> Rows:
        parts = self._parts(("train", "validation"))
        self.accounts |= {name: part.account for name, part in parts.items()}
        tables = {name: part.table for name, part in parts.items()}
        if "validation" not in tables:
            tables["train"], tables["validation"] = self._cut(tables["train"])
        return self.divided(tables)

    def load_split(self, split: str) -> datasets.Dataset:
        """Load "train", "validation", another split of the source, or "all" rows of a single file.

        Rows of "train" and "validation" need targets; the rows of other splits need none.
        """
        if self.place.is_file() and split not in ("train", "validation", ALL):
            raise UserError(
                f"split={split}: task.path={self.place} is one file; it has the splits all, train, validation"
            )
        if split in ("train", "validation"):
            rows = self.load()
            self.accounts["validation"].notes[:] = []
            return rows.train if split == "train" else rows.validation[split]
        part = self._parts((split,))[split]
        if "target" not in part.table.column_names:
            part.account.notes.append(f"no targets in column '{self.columns.target}': predictions without metrics")
        self.accounts[split] = part.account
        return datasets.Dataset(part.table)

    def _parts(self, splits: Sequence[str]) -> dict[str, Part]:
        """The checked rows of some splits by name; a source without "validation" does not give it.

        Raises:
            UserError: everything that is wrong with the rows.
        """
        problems: list[str] = []
        found = (self._from_hub if self.is_hub else self._from_files)(splits, problems)
        if problems:
            raise UserError(problems)
        return found

    def _from_files(self, splits: Sequence[str], problems: list[str]) -> dict[str, Part]:
        if not self.place.exists():
            problems.append(f"task.path={self.place} does not exist.")
            return {}
        if self.place.is_file():
            files = {name: [self.place] for name in splits if name != "validation"}
        else:
            there = "validation" in splits and has_validation(self.place, FORMATS)
            names = [name for name in splits if name != "validation" or there]
            files = {name: split_files(self.place, name, problems, FORMATS) for name in names}
        labelled = {"train", "validation"}
        parts = {name: read_files(f, self.columns, name in labelled, problems) for name, f in files.items() if f}
        return {name: part for name, part in parts.items() if part is not None}

    def _from_hub(self, splits: Sequence[str], problems: list[str]) -> dict[str, Part]:
        c = self.cfg
        advice = "\n  Or use files that you have: task.path=<file, or folder with train.csv>"
        there = hub_dataset(f"task.path={c.path} from the Hugging Face hub", c.path, c.subset, advice)
        parts: dict[str, Part] = {}
        for name in splits:
            if name in there:
                labelled = name in ("train", "validation")
                part = read_hub_split(there[name], f"{c.path} {name}", self.columns, labelled, problems)
                parts |= {} if part is None else {name: part}
            elif name != "validation":
                problems.append(no_split(c.path, c.subset, name, there))
        return parts

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


def is_hub_id(path: str) -> bool:
    """Whether a path has the form of an id on the hub: ``owner/name`` or ``name``, without a file's ending."""
    return bool(HUB_ID.fullmatch(path)) and Path(path).suffix.removeprefix(".") not in FORMATS
