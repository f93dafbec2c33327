"""The checked rows of one split of people's own data."""

from dataclasses import dataclass, field

import pyarrow as pa

from diffora.tasks.account import Account


@dataclass
class Part:
    """The rows of one split.

    Attributes:
        where: its files, for messages.
        table: the checked rows, with the column ``number`` (`diffora.tasks.sources.tables.with_numbers`).
        account: what became of the rows.
    """

    where: str
    table: pa.Table
    account: Account = field(default_factory=Account)
