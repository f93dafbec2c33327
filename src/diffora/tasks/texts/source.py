"""Where the rows of texts with labels are: in one file, in a folder with a file for each split, or on the hub."""

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import datasets

from diffora.errors import UserError
from diffora.tasks.account import Account
from diffora.tasks.sources.files import check_folder, has_validation, split_files
from diffora.tasks.sources.hub import hub_dataset, no_split, with_features
from diffora.tasks.texts.columns import Columns, Part
from diffora.tasks.texts.formats import FORMATS, with_labels_as_text
from diffora.tasks.texts.read import part_of, read_part

ALL = "all"
"""The split of all rows of a single file."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
OTHER_VALIDATION = re.compile(r"(val|valid|dev|eval)(elopment|uation)?", re.IGNORECASE)
"""Names that hub data sets give to rows for validation."""
ADVICE = {
    "xlsx": "save the sheet as CSV UTF-8", "xls": "save the sheet as CSV UTF-8", "ods": "save the sheet as CSV UTF-8",
    "json": "write one JSON object in each line and call it .jsonl", "ndjson": "rename it to .jsonl",
    "gz": "unpack it first (gunzip)", "zip": "unpack it first (unzip)", "bz2": "unpack it first",
    "xz": "unpack it first", "txt": "name it .csv or .tsv if it has columns",
}  # fmt: skip
"""What to do with files of other types."""


class Source:
    """The place of the rows, ``task.path``.

    Args:
        path: a file, a folder, or the id of a data set on the hub.
        subset: the configuration of a data set on the hub; None for its only one.
        train, validation: the names of these splits in a folder or on the hub.

    Attributes:
        is_file: whether the rows are in one file.
        is_hub: whether they are on the hub.
    """

    def __init__(self, path: str, subset: str | None, train: str, validation: str) -> None:
        self.path, self.place, self.subset = path, Path(path), subset
        self.names = {"train": train, "validation": validation}
        looks_like_file = self.place.suffix.removeprefix(".") in (*FORMATS, *ADVICE)
        self.is_hub = not self.place.exists() and not looks_like_file and HUB_ID.fullmatch(path) is not None
        self.is_file = not self.is_hub and not self.place.is_dir()

    def problems(self) -> Iterator[str]:
        """One message for each setting that does not suit the place."""
        kind = self.place.suffix.removeprefix(".")
        if self.is_file and kind not in FORMATS:
            types = f"a folder, the id of a data set on the hub, or a file of one of the types {', '.join(FORMATS)}"
            if not self.place.exists() and kind not in ADVICE:
                yield f"task.path={self.path} does not exist; it must be {types}"
            else:
                lower = "write its ending in lower case" if kind.lower() in FORMATS else ""
                advice = ADVICE.get(kind.lower(), lower)
                yield f"task.path={self.path} must be {types}{f'; {advice}' if advice else ''}"
        if self.subset is not None and not self.is_hub:
            yield f"task.subset={self.subset}: only a data set on the hub has subsets; task.path={self.path} is not one"
        for name, own in self.names.items():
            if self.is_file and own != name:
                yield f"task.{name}_split={own}: task.path={self.path} is one file, which has no splits"

    @property
    def has_test(self) -> bool:
        """Whether there is a split "test"; on the hub it is not known before the data are loaded."""
        return self.is_hub or (self.place.is_dir() and any(self.place.glob("test[.-]*")))

    def has_validation(self) -> bool:
        """Whether there is a validation split; otherwise validation rows are taken from the training rows.

        Raises:
            UserError: the split that the user names is missing, or validation rows have another usual name.
        """
        name = self.names["validation"]
        if self.is_file:
            return False
        if not self.is_hub:
            return has_validation(self.place, FORMATS) if name == "validation" else True
        if name in self._on_hub:
            return True
        others = [other for other in self._on_hub if OTHER_VALIDATION.fullmatch(other)]
        if name != "validation":
            raise UserError(no_split(self.path, self.subset, name, self._on_hub))
        if others:
            there = others[0]
            raise UserError(f"{self.path} has no split 'validation', but '{there}': task.validation_split={there}")
        return False

    def read(self, split: str, columns: Columns, labelled: bool, problems: list[str]) -> Part | None:
        """The checked rows of a split; None, and messages in ``problems``, if something is wrong.

        Args:
            split: its name here: "train", "validation", or another name at the source.
            columns: what is read.
            labelled: whether every row must have a label. Otherwise no row needs one.
        """
        name = self.names.get(split, split)
        if self.is_hub:
            if name not in self._on_hub:
                problems.append(no_split(self.path, self.subset, name, self._on_hub))
                return None
            where = f"{self.path}, {name}"
            try:
                table = with_labels_as_text(with_features(self._on_hub[name]), columns)
            except ValueError as error:
                problems.append(f"{where}: {error}")
                return None
            return part_of({where: table}, columns, labelled, Account(), problems)
        if self.is_file:
            files = [self.place]
            if not self.place.is_file():
                problems.append(f"task.path={self.path} does not exist.")
                return None
        else:
            check_folder(self.place, f"{self.names['train']}.csv")
            files = split_files(self.place, name, problems, FORMATS)
        return read_part(files, columns, labelled, problems) if files else None

    @cached_property
    def _on_hub(self) -> Mapping[str, datasets.Dataset]:
        what = f"task.path={self.path}, which is no file or folder here, from the Hugging Face hub"
        advice = "\n  Give a file, a folder or the id of a data set"
        advice += "." if self.subset else "; a data set of several subsets needs task.subset=<name>."
        return hub_dataset(what, self.path, self.subset, advice)
