"""What the generated tasks for language models share: their rows come from a function, not from a file or the hub."""

import datasets
import pyarrow as pa

from diffora.errors import UserError
from diffora.tasks.account import Account
from diffora.tasks.causal_lm import CausalLMTask
from diffora.tasks.chat.conversations import SCHEMA
from diffora.tasks.chat.forms import Turn


class GeneratedTask(CausalLMTask):
    """A task for language models with generated conversations."""

    def made(self) -> dict[str, list[list[Turn]]]:
        """The conversations of each split, by its name. The same in every run."""
        raise NotImplementedError

    def tables(self) -> tuple[dict[str, pa.Table], str]:
        found: dict[str, pa.Table] = {}
        for name, conversations in self.made().items():
            rows = [{"number": i, "messages": turns, "text": ""} for i, turns in enumerate(conversations, start=1)]
            found[name] = pa.Table.from_pylist(rows, schema=SCHEMA)
            self.accounts[name] = Account(len(rows))
        return found, f"embedded:{self.name}"

    def drawn_from_training(self, split: str) -> bool:
        return False

    def load_split(self, split: str) -> datasets.Dataset:
        tables, _ = self.tables()
        if split not in tables:
            raise UserError(f"split={split}: task '{self.name}' has the splits {', '.join(tables)}")
        return datasets.Dataset(tables[split])
