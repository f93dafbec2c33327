"""A generated task from text to text: a sentence and a request, and the one right answer to it.

The sentences and requests are the first turns of `diffora.tasks.embedded.dialogue`: say it in the other voice, say that
it is not so, who did it, to whom it was done.
"""

import random
from dataclasses import dataclass
from typing import Annotated

import datasets
import pyarrow as pa

from diffora.errors import UserError
from diffora.settings.checks import ROWS, Help, whole
from diffora.tasks.account import Account, note_overlap
from diffora.tasks.base import Rows
from diffora.tasks.embedded.dialogue import converse
from diffora.tasks.embedded.distinct import distinct
from diffora.tasks.pairs.task import PairSettings, PairTask
from diffora.tasks.sources.tables import content_hash, joint_hash, subset

SEED = 0


def splits(train_rows: int, validation_rows: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Training and validation pairs (source, target). No two of them have the same sentence."""

    def one(rng: random.Random) -> tuple[str, tuple[str, str]]:
        asked, answer = (turn["content"] for turn in converse(rng)[:2])
        return asked.split(" . ")[0], (asked, answer)

    sizes = {"train": train_rows, "validation": validation_rows}
    return distinct(sizes, lambda name: f"rewrite-{name}-{seed}", one)


@dataclass(frozen=True, kw_only=True)
class RewriteSettings(PairSettings):
    """The settings of `RewriteTask`."""

    train_rows: Annotated[int, whole(1, ROWS), Help("Training pairs to generate.", "rows")]
    validation_rows: Annotated[int, whole(2, ROWS), Help("Validation pairs to generate.", "rows")]


class RewriteTask(PairTask):
    """Generated pairs: ``task.train_rows`` for training and ``task.validation_rows`` for validation."""

    settings = RewriteSettings

    def load(self) -> Rows:
        tables = self._tables()
        self.accounts |= {name: Account(table.num_rows) for name, table in tables.items()}
        tables["train"] = subset(tables["train"], self.cfg.max_train_rows, self.accounts["train"])
        note_overlap(self.accounts, {name: table.column("source") for name, table in tables.items()})
        self.note_generated(tables["validation"])
        train, validation = (datasets.Dataset(table) for table in tables.values())
        digest = joint_hash(map(content_hash, tables.values()))
        return Rows(train, {"validation": validation}, digest, f"embedded:{self.name}")

    def load_split(self, split: str) -> datasets.Dataset:
        tables = self._tables()
        if split not in tables:
            raise UserError(f"split={split}: task '{self.name}' has the splits {', '.join(tables)}")
        self.accounts[split] = Account(tables[split].num_rows)
        return datasets.Dataset(tables[split])

    def _tables(self) -> dict[str, pa.Table]:
        made = splits(self.cfg.train_rows, self.cfg.validation_rows, SEED)
        return {
            name: pa.table(
                {
                    "source": pa.array([source for source, _ in pairs], pa.string()),
                    "target": pa.array([target for _, target in pairs], pa.string()),
                    "number": pa.array(range(1, len(pairs) + 1), pa.int64()),
                }
            )
            for name, pairs in made.items()
        }
