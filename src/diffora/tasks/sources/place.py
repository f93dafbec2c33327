"""Where the rows of people's own data are: in one file, in a folder with a file for each split, or on the hub."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import datasets

from diffora.errors import UserError
from diffora.settings.checks import FRACTION, PATH, SEED, Help
from diffora.settings.sections import TaskSettings
from diffora.tasks.sources.files import OTHER_VALIDATION, check_folder, has_validation, split_files
from diffora.tasks.sources.hub import hub_dataset, no_split

ALL = "all"
"""The split of all rows of a single file."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ADVICE = {
    "xlsx": "save the sheet as CSV UTF-8", "xls": "save the sheet as CSV UTF-8", "ods": "save the sheet as CSV UTF-8",
    "json": "write one JSON object in each line and call it .jsonl", "ndjson": "rename it to .jsonl",
    "gz": "unpack it first (gunzip)", "zip": "unpack it first (unzip)", "bz2": "unpack it first",
    "xz": "unpack it first", "txt": "name it .csv or .tsv if it has columns",
}  # fmt: skip
"""What to do with files of other types."""


@dataclass(frozen=True, kw_only=True)
class PlaceSettings(TaskSettings):
    """Settings of every task that reads people's own rows: where they are, and which of them are for validation."""

    path: Annotated[
        Annotated[str, PATH] | None,
        Help("A file, a folder with one file for each split (train, validation, test), or the id of a hub data set."),
    ] = None
    subset: Annotated[str | None, Help("Subset of a data set on the hub; null: its only one.")] = None
    train_split: Annotated[str, Help("Split of the training rows, in a folder or on the hub.")] = "train"
    validation_split: Annotated[
        str, Help("Split of the validation rows. Without it, they are taken from the training rows.")
    ] = "validation"
    validation_fraction: Annotated[
        float, FRACTION, Help("Share of the training rows to validate on, if there are no validation rows.")
    ] = 0.1
    split_seed: Annotated[int, SEED, Help("Draws these rows; the seed of the run does not matter.")] = 0


class Place:
    """The place of the rows, ``task.path``.

    Args:
        settings: of the task, `PlaceSettings`.
        formats: endings of the files that the task reads, without the dot.

    Attributes:
        is_file: whether the rows are in one file.
        is_hub: whether they are on the hub.
    """

    def __init__(self, settings: Any, formats: Sequence[str]) -> None:
        path = self.path = settings.path or ""
        self.task, self.place, self.subset, self.formats = settings.name, Path(path), settings.subset, tuple(formats)
        self.names = {"train": settings.train_split, "validation": settings.validation_split}
        looks_like_file = self.place.suffix.removeprefix(".") in (*self.formats, *ADVICE)
        self.is_hub = not self.place.exists() and not looks_like_file and HUB_ID.fullmatch(path) is not None
        self.is_file = not self.is_hub and not self.place.is_dir()

    def problems(self) -> Iterator[str]:
        """One message for each setting that does not suit the place."""
        if not self.path:
            yield (
                f"task.path=null: task={self.task} reads your own rows: give a file ({', '.join(self.formats)}), a "
                "folder with train.<type>, or a data set on the hub"
            )
            return
        kind = self.place.suffix.removeprefix(".")
        if self.is_file and kind not in self.formats:
            types = (
                f"a folder, the id of a data set on the hub, or a file of one of the types {', '.join(self.formats)}"
            )
            if not self.place.exists() and kind not in ADVICE:
                yield f"task.path={self.path} does not exist; it must be {types}"
            else:
                lower = "write its ending in lower case" if kind.lower() in self.formats else ""
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
            return has_validation(self.place, self.formats) if name == "validation" else True
        if name in self._on_hub:
            return True
        others = [other for other in self._on_hub if OTHER_VALIDATION.fullmatch(other)]
        if name != "validation":
            raise UserError(no_split(self.path, self.subset, name, self._on_hub))
        if others:
            other = others[0]
            raise UserError(f"{self.path} has no split 'validation', but '{other}': task.validation_split={other}")
        return False

    def default_splits(self, other_data: bool) -> tuple[str, ...]:
        """The splits to evaluate: all rows of another file, otherwise the validation rows."""
        return (ALL,) if other_data and self.is_file else ("validation",)

    def drawn_from_training(self, split: str) -> bool:
        """Whether the rows of a split are taken from the training rows."""
        return split == "validation" and not self.has_validation()

    def of_training(self, split: str) -> bool:
        """Whether the rows of a split are known only after the training rows are divided.

        Raises:
            UserError: a single file has no such split.
        """
        if self.is_file and split not in ("train", "validation", ALL):
            raise UserError(
                f"split={split}: task.path={self.path} is one file; it has the splits all, train, validation"
            )
        return split == "train" or self.drawn_from_training(split)

    def files(self, split: str, problems: list[str]) -> list[Path]:
        """The files of a split; empty, with a message in ``problems``, if there are none.

        Args:
            split: its name here: "train", "validation", or another name at the source.
        """
        if not self.is_file:
            check_folder(self.place, f"{self.names['train']}.{self.formats[0]}")
            return split_files(self.place, self.names.get(split, split), problems, self.formats)
        if not self.place.is_file():
            problems.append(
                f"task.path={self.path} does not exist{'' if self.place.is_absolute() else f' in {Path.cwd()}'}."
            )
            return []
        return [self.place]

    def hub_split(self, split: str, problems: list[str]) -> tuple[str, datasets.Dataset] | None:
        """A split on the hub and its name for messages; None, with a message in ``problems``, if it is not there."""
        name = self.names.get(split, split)
        if name not in self._on_hub:
            problems.append(no_split(self.path, self.subset, name, self._on_hub))
            return None
        return f"{self.path}, {name}", self._on_hub[name]

    @cached_property
    def _on_hub(self) -> Mapping[str, datasets.Dataset]:
        what = f"task.path={self.path}, which is no file or folder here, from the Hugging Face hub"
        advice = "\n  Give a file, a folder or the id of a data set"
        advice += "." if self.subset else "; a data set of several subsets needs task.subset=<name>."
        return hub_dataset(what, self.path, self.subset, advice)
