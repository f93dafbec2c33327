"""The rows of texts with labels, in one file, in a folder with a file for each split, or on the hub."""

from typing import Any

from diffora.tasks.account import Account
from diffora.tasks.sources.hub import with_features
from diffora.tasks.sources.place import Place
from diffora.tasks.texts.columns import Columns, Part
from diffora.tasks.texts.formats import FORMATS, with_labels_as_text
from diffora.tasks.texts.read import part_of, read_part


class Source(Place):
    """The place of rows of texts, ``task.path``.

    Args:
        settings: as in `Place`.
    """

    def __init__(self, settings: Any) -> None:
        super().__init__(settings, FORMATS)

    def read(self, split: str, columns: Columns, labelled: bool, problems: list[str]) -> Part | None:
        """The checked rows of a split; None, and messages in ``problems``, if something is wrong.

        Args:
            split: its name here: "train", "validation", or another name at the source.
            columns: what is read.
            labelled: whether every row must have a label. Otherwise no row needs one.
        """
        if not self.is_hub:
            files = self.files(split, problems)
            return read_part(files, columns, labelled, problems) if files else None
        found = self.hub_split(split, problems)
        if found is None:
            return None
        where, rows = found
        try:
            table = with_labels_as_text(with_features(rows), columns)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            return None
        return part_of({where: table}, columns, labelled, Account(), problems)
