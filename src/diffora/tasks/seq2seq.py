"""From a text to a text, with an encoder and a decoder (T5, BART and the like): ``task=seq2seq``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pyarrow as pa

from diffora.settings.checks import Help
from diffora.settings.sections import TaskSettings
from diffora.tasks.own_rows import OwnRowsTask
from diffora.tasks.pairs.read import FORMATS, Columns, read_split
from diffora.tasks.pairs.task import PairSettings, PairTask
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.place import PlaceSettings
from diffora.tasks.texts.divide import plain


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSettings(PlaceSettings, PairSettings):
    """The settings of `Seq2SeqTask`."""

    source_column: Annotated[str, Help("Column of the sources.")] = "source"
    target_column: Annotated[str, Help("Column of the targets.")] = "target"


class Seq2SeqTask(OwnRowsTask, PairTask):
    """Pairs of your own, from files or the hub."""

    settings: ClassVar[type[TaskSettings]] = Seq2SeqSettings
    formats = FORMATS
    why_undivided = "all have the same source"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.columns = Columns(cfg.source_column, cfg.target_column)

    def problems(self) -> Iterator[str]:
        c = self.cfg
        yield from super().problems()
        if c.source_column == c.target_column:
            yield f"task.source_column={c.source_column} is task.target_column too; they must be two columns"

    # --- rows ---

    def read(self, split: str, labelled: bool, problems: list[str]) -> Part | None:
        return read_split(self.place, split, self.columns, labelled, problems)

    def keys(self, table: pa.Table) -> pa.Array:
        return plain(table.column("source"))

    def numbered(self, split: str, part: Part, problems: list[str]) -> pa.Table:
        if "target" not in part.table.column_names:
            part.account.notes.append(f"no targets in column '{self.columns.target}': predictions without metrics")
        return part.table

    def note_rows(self, tables: dict[str, pa.Table]) -> None:
        self.note_generated(tables["validation"])
