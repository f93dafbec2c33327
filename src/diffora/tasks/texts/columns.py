"""What is read of a file of texts with labels."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

Kind = Literal["classification", "multilabel", "regression"]
"""What labels are: one class for each row, any number of classes, or a number."""
LISTS = pa.list_(pa.string())
"""The type of labels of rows that can have several classes."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read.

    Attributes:
        texts: names of the text columns.
        labels: name of the label column, or names of the 0/1 columns.
        kind: what labels are.
        flags: whether the label columns hold 0 or 1 for the class of their name.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    kind: Kind
    flags: bool = False

    @property
    def read_as(self) -> tuple[str, ...]:
        """Names of the text columns after reading: one or two, because a tokenizer reads at most two texts."""
        return ("text", "text2") if len(self.texts) == 2 else ("text",)

    @property
    def keys(self) -> dict[str, str]:
        """The setting that names each column."""
        key = "task.label_columns" if self.flags else "task.label_column"
        return dict.fromkeys(self.labels, key) | dict.fromkeys(self.texts, "task.text_columns")

    @property
    def label(self) -> str:
        """The label columns, for messages."""
        return ", ".join(self.labels)
