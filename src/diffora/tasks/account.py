"""What became of the rows of a split: how many were read, used, left out and changed, and why."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc


@dataclass
class Account:
    """The numbers of rows of one split that were read, left out and changed.

    It is shown on the screen and stored in ``run.json`` under ``data``.

    Attributes:
        read: rows at the source; files, for class folders.
        dropped: number of rows that are left out, by reason.
        changed: number of rows that are used but were cut or changed, by reason.
        notes: other facts to know before trusting a result.
    """

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def used(self) -> int:
        return self.read - sum(self.dropped.values())

    def drop(self, why: str, rows: int) -> None:
        """Count rows that are left out; 0 changes nothing."""
        if rows:
            self.dropped[why] = self.dropped.get(why, 0) + rows

    def change(self, why: str, rows: int) -> None:
        """Count rows that are cut or changed; 0 changes nothing."""
        if rows:
            self.changed[why] = self.changed.get(why, 0) + rows

    def copy(self) -> "Account":
        return Account(self.read, dict(self.dropped), dict(self.changed), list(self.notes))

    def record(self) -> dict[str, Any]:
        """The account as plain values, for ``run.json`` and ``metrics.json``."""
        return {
            "read": self.read,
            "used": self.used,
            "dropped": sum(self.dropped.values()),
            "why": self.dropped,
            "changed": self.changed,
            "notes": self.notes,
        }


Accounts = dict[str, Account]
"""An account for each split, by the split's name."""


def lines(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines for the screen. Each split has one line about rows left out or changed, and one line for each note.

    Args:
        records: `Account.record` of each split, by the split's name.
    """
    for name, record in records.items():
        parts = [f"{count:,} left out ({why})" for why, count in record["why"].items()]
        parts += [f"{count:,} changed ({why})" for why, count in record["changed"].items()]
        if parts:
            yield f"{name}: {record['used']:,} of {record['read']:,} rows used; {'; '.join(parts)}"
        yield from (f"{name}: {note}" for note in record["notes"])


def note_ignored(account: Account, names: list[str]) -> None:
    """Note which columns of a source are not read."""
    names = [name.strip() or "(without a name)" for name in names]
    if names:
        account.notes.append(f"columns ignored: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}")


def note_overlap(accounts: Accounts, keys: Mapping[str, Any]) -> None:
    """Note for each split, except ``train``, how many of its rows are training rows too.

    Args:
        keys: for each split, an arrow array with one key (text or bytes) per row; equal rows have equal keys.
    """
    for name, account in accounts.items():
        if name in keys and name != "train":
            note_shared(account, pc.sum(pc.is_in(keys[name], keys["train"])).as_py() or 0, account.used)


def note_shared(account: Account, found: int, rows: int) -> None:
    """Note how many of a split's rows are training rows too, if there are any."""
    if found:
        account.notes.append(f"{found:,} of {rows:,} rows are training rows too: the score may be too high")
