"""From a text to a text, with an encoder and a decoder (T5, BART and the like): ``task=seq2seq``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import datasets
import pyarrow as pa

from diffora.errors import UserError
from diffora.settings.checks import Help
from diffora.settings.sections import TaskSettings
from diffora.tasks.base import Rows
from diffora.tasks.pairs.read import FORMATS, Columns, Part, read_files, read_hub_split
from diffora.tasks.pairs.task import PairSettings, PairTask
from diffora.tasks.sources.place import Place, PlaceSettings
from diffora.tasks.texts.divide import choose_validation, cut


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSettings(PlaceSettings, PairSettings):
    """The settings of `Seq2SeqTask`."""

    source_column: Annotated[str, Help("Column of the sources.")] = "source"
    target_column: Annotated[str, Help("Column of the targets.")] = "target"


class Seq2SeqTask(PairTask):
    """Pairs of your own, from files or the hub."""

    settings: ClassVar[type[TaskSettings]] = Seq2SeqSettings

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.columns = Columns(cfg.source_column, cfg.target_column)
        self.place = Place(cfg, FORMATS)
        self.test_splits = ("test",) if self.place.has_test else ()

    @property
    def source(self) -> str:
        return str(self.cfg.path)

    def default_splits(self, other_data: bool) -> tuple[str, ...]:
        return self.place.default_splits(other_data)

    def drawn_from_training(self, split: str) -> bool:
        return self.place.drawn_from_training(split)

    def problems(self) -> Iterator[str]:
        c = self.cfg
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
        if self.place.of_training(split):
            rows = self.load()
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
            found = self.place.hub_split(split, problems)
            return read_hub_split(*found, self.columns, labelled, problems) if found else None
        files = self.place.files(split, problems)
        return read_files(files, self.columns, labelled, problems) if files else None

    def _cut(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """(training rows, validation rows); both accounts say how they were divided. Equal sources stay together."""
        pairs = pa.table({"text": table.column("source"), "label": table.column("target")})
        chosen = choose_validation(pairs, self.cfg.validation_fraction, self.cfg.split_seed, by_class=False)
        if not chosen.any():
            raise UserError(
                f"{self.source}: no validation rows can be taken from {table.num_rows} rows, because all have the same "
                "source; add rows, or a validation file"
            )
        return cut(table, chosen, self.cfg, self.accounts, "drawn at random")
