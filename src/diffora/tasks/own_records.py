"""What the tasks share whose own rows hold lists, and are read and checked one by one."""

from collections.abc import Sequence
from pathlib import Path

from diffora.errors import first_line
from diffora.tasks.account import Account
from diffora.tasks.own_rows import OwnRowsTask
from diffora.tasks.sources.faults import READ_ERRORS
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.records import Records, hub_records, open_records
from diffora.tasks.sources.tables import with_numbers


class OwnRecordsTask(OwnRowsTask):
    """A task that reads rows one by one. A subclass defines `wanted` and `checked`."""

    def wanted(self) -> tuple[str, ...]:
        """The columns that every file must have."""
        raise NotImplementedError

    def checked(self, sources: Sequence[Records], labelled: bool, account: Account, problems: list[str]) -> Part | None:
        """Check the rows of a split.

        Args:
            sources: its files, at least one.
            labelled: whether all rows must have labels. Otherwise labels may be missing in all rows.
            account: gets what became of the rows; the part has it.
            problems: grows by everything that is wrong.

        Returns:
            None if something is wrong.
        """
        raise NotImplementedError

    def open(self, file: Path, notes: list[str]) -> Records:
        """The rows of a file. Raises as `open_records` does."""
        return open_records(file, self.wanted(), notes)

    def read(self, split: str, labelled: bool, problems: list[str]) -> Part | None:
        before, account = len(problems), Account()
        sources = self._sources(split, account.notes, problems)
        if not sources:
            return None
        try:
            part = self.checked(sources, labelled, account, problems)
        except ValueError as error:  # a line that is not JSON, a text that is not UTF-8
            problems.append(f"{sources[0].where}: {first_line(error)}")
            return None
        if part is None or len(problems) > before:
            return None
        part.table = with_numbers(part.table)
        return part

    def _sources(self, split: str, notes: list[str], problems: list[str]) -> list[Records]:
        """The files of a split, or its rows on the hub; empty, with a message in ``problems``, if it cannot be read."""
        if self.place.is_hub:
            of_hub = self.place.hub_split(split, problems)
            return [] if of_hub is None else [hub_records(*of_hub)]
        files, found = self.place.files(split, problems), []
        for file in files:
            try:
                found.append(self.open(file, notes))
            except READ_ERRORS as error:
                problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
        return found if len(found) == len(files) else []
