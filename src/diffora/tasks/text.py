"""People's own texts with labels, from one file or a folder of files: ``task=text``."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from diffora.errors import UserError
from diffora.settings.checks import FRACTION, LENGTH, PATH, SEED, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks.account import Account, note_overlap
from diffora.tasks.base import Outputs, Rows, Split
from diffora.tasks.glue import compute_metrics
from diffora.tasks.labels import alike
from diffora.tasks.messages import some
from diffora.tasks.sentences import SentenceTask
from diffora.tasks.sources.files import check_folder, has_validation, split_files
from diffora.tasks.sources.tables import content_hash, joint_hash, subset
from diffora.tasks.spec import TaskSpec
from diffora.tasks.texts.divide import choose_validation, count_contradictions, count_repeated, row_texts
from diffora.tasks.texts.read import FORMATS, Columns, Part, read_part
from diffora.tasks.texts.targets import class_numbers, find_classes, scores

ALL = "all"
"""The split of all rows of a single file."""


@dataclass(frozen=True, kw_only=True)
class TextSettings(TaskSettings):
    """The settings of `TextTask`."""

    path: Annotated[
        Annotated[str, PATH] | None,
        Help("A .csv, .tsv, .jsonl or .parquet file, or a folder with such files: train, validation, test."),
    ] = None
    kind: Annotated[Literal["classification", "regression"], Help("Whether labels are classes or numbers.")] = (
        "classification"
    )
    text_columns: Annotated[
        list[str] | str, Help("Columns of text: one, or two that are read as a pair; more are joined into one text.")
    ]
    label_column: Annotated[str, Help("Column of the labels.")] = "label"
    validation_fraction: Annotated[
        float, FRACTION, Help("Share of the training rows to validate on, if there is no validation file.")
    ] = 0.1
    split_seed: Annotated[int, SEED, Help("Draws these rows; the seed of the run does not matter.")] = 0
    max_length: Annotated[int, whole(4, LENGTH), Help("Length at which inputs are cut.", "tokens")]


class TextTask(SentenceTask):
    """Classify your own texts, or predict a number for them.

    The classes are the labels of the training rows. Without a validation file, validation rows are taken from the
    training rows (`choose_validation`).
    """

    settings: ClassVar[type[TaskSettings]] = TextSettings

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.numeric = cfg.kind == "regression"
        texts = [cfg.text_columns] if isinstance(cfg.text_columns, str) else cfg.text_columns
        self.columns = Columns(tuple(texts), cfg.label_column, self.numeric)
        self.metrics = ("pearson", "spearman", "mse") if self.numeric else ("accuracy", "macro_f1", "weighted_f1")
        self.main_metric = self.metrics[0]
        self.spec = TaskSpec(cfg.name, None, self.columns.read_as, (), self.metrics, self.main_metric)
        """For classification, its class names are missing until rows are loaded, or until `expect` gives them."""
        self.place = Path(cfg.path or "")
        has_test = self.place.is_dir() and any(self.place.glob("test[.-]*"))
        self.test_splits = ("test",) if has_test else ()

    def unit_of(self, metric: str) -> str:
        return "" if metric == "mse" else "fraction"

    def higher_is_better(self, metric: str) -> bool:
        return metric != "mse"

    def default_splits(self, other_data: bool) -> tuple[str, ...]:
        """All rows of another file; otherwise the validation rows."""
        return (ALL,) if other_data and not self.place.is_dir() else self.validation_splits

    def problems(self) -> Iterator[str]:
        names = self.columns.texts
        if self.cfg.path is None:
            yield f"task.path=null: task={self.name} reads your own rows: give a file, or a folder with train.csv"
        elif not self.place.is_dir() and self.place.suffix.removeprefix(".") not in FORMATS:
            yield f"task.path={self.place} must be a folder or a file of one of the types {', '.join(FORMATS)}"
        if not names:
            yield "task.text_columns=[] must name at least one column"
        if len(set(names)) < len(names):
            yield f"task.text_columns={list(names)} names a column twice"
        if self.cfg.label_column in names:
            yield f"task.label_column={self.cfg.label_column} is in task.text_columns too; a label is not a text"

    def head(self) -> dict[str, Any]:
        if not self.numeric and not self.spec.label_names:
            self.load()
        return super().head()

    def expect(self, classes: Sequence[str]) -> None:
        """Number the classes of all splits as the trained model does."""
        if not self.numeric:
            self.spec = dataclasses.replace(self.spec, label_names=tuple(classes))

    # --- rows ---

    def load(self) -> Rows:
        tables = self._tables()
        accounts = self.accounts
        if not self.numeric and (several := count_contradictions(tables["train"])):
            accounts["train"].notes.append(f"{several:,} texts have rows with different labels")
        if "validation" not in tables:
            tables["train"], tables["validation"] = self._cut(tables["train"])
        tables["train"] = subset(tables["train"], self.cfg.max_train_rows, accounts["train"])
        note_overlap(accounts, {name: row_texts(table) for name, table in tables.items()})
        if not self.numeric:
            self._note_classes(tables)
        names = hashlib.sha256(json.dumps(self.spec.label_names).encode()).hexdigest()
        return Rows(
            datasets.Dataset(tables["train"]),
            {"validation": datasets.Dataset(tables["validation"])},
            joint_hash([names, *map(content_hash, tables.values())]),
            str(self.cfg.path),
        )

    def load_split(self, split: str) -> datasets.Dataset:
        """Load "train", "validation", another file of the folder, or "all" rows of a single file.

        Rows of "train" and "validation" need labels; the rows of other splits need none.
        """
        single = not self.place.is_dir()
        if single and split not in ("train", "validation", ALL):
            raise UserError(
                f"split={split}: task.path={self.place} is one file; it has the splits all, train, validation"
            )
        if split == "train" or (split == "validation" and self._is_cut()):
            rows = self.load()
            return rows.train if split == "train" else rows.validation[split]
        if not self.numeric and not self.spec.label_names:
            self.load()  # the training rows have the classes
        problems: list[str] = []
        part = self._read(ALL if single else split, split == "validation", problems)
        if part is not None and "label" in part.table.column_names:
            table = self._with_targets(part, "the training rows", problems)
        if problems or part is None:
            raise UserError(problems)
        if "label" not in part.table.column_names:
            part.account.notes.append(f"no labels in column '{self.columns.label}': predictions without metrics")
            table = part.table
        self.accounts[split] = part.account
        return datasets.Dataset(table)

    def _is_cut(self) -> bool:
        """Whether validation rows are taken from the training rows."""
        return not self.place.is_dir() or not has_validation(self.place, FORMATS)

    def _read(self, split: str, labelled: bool, problems: list[str]) -> Part | None:
        if not self.place.is_dir():
            if not self.place.is_file():
                problems.append(f"task.path={self.place} does not exist.")
                return None
            files = [self.place]
        else:
            files = split_files(self.place, split, problems, FORMATS)
        return read_part(files, self.columns, labelled, problems) if files else None

    def _tables(self) -> dict[str, pa.Table]:
        """The checked training rows and, if there is a file of them, the validation rows. Learns the classes.

        Raises:
            UserError: everything that is wrong with the rows.
        """
        problems: list[str] = []
        if self.place.is_dir():
            check_folder(self.place, "train.csv")
        splits = ("train",) if self._is_cut() else ("train", "validation")
        parts = {split: self._read(split, True, problems) for split in splits}
        train = parts["train"]
        if train is None:
            raise UserError(problems)
        if not self.numeric:
            if not self.spec.label_names:
                classes = find_classes(train, self.columns.label, problems)
                self.spec = dataclasses.replace(self.spec, label_names=tuple(classes))
            if twins := alike(self.spec.label_names):
                train.account.notes.append(f"classes whose names differ only in case or white space: {some(twins)}")
        tables = {
            name: self._with_targets(part, "the run" if name == "train" else train.where, problems)
            for name, part in parts.items()
            if part is not None
        }
        if self.numeric and not problems and len(pc.unique(tables["train"].column("label"))) == 1:
            problems.append(f"{train.where}: column '{self.columns.label}': all rows have the same number.")
        if problems:
            raise UserError(problems)
        self.accounts |= {name: part.account for name, part in parts.items() if part is not None}
        return tables

    def _with_targets(self, part: Part, whose: str, problems: list[str]) -> pa.Table:
        if self.numeric:
            return scores(part, self.columns.label, problems)
        return class_numbers(part, list(self.spec.label_names), whose, self.columns.label, problems)

    def _cut(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """(training rows, validation rows); both accounts say how they were divided."""
        fraction, seed = self.cfg.validation_fraction, self.cfg.split_seed
        chosen = choose_validation(table, fraction, seed, by_class=not self.numeric)
        if not chosen.any():
            raise UserError(
                f"{self.place}: no validation rows can be taken from {table.num_rows} rows, because no class has two "
                "different texts; add rows, or a validation file"
            )
        train, validation = table.filter(pa.array(~chosen)), table.filter(pa.array(chosen))
        why = f"task.validation_fraction={fraction:g}, task.split_seed={seed}"
        self.accounts["train"].drop(f"taken for validation, {why}", validation.num_rows)
        self.accounts["validation"] = Account(validation.num_rows)
        where = "drawn from each class" if not self.numeric else "drawn at random"
        self.accounts["validation"].notes.append(f"{validation.num_rows:,} of the training rows, {where}: {why}")
        if repeated := count_repeated(table):
            self.accounts["train"].notes.append(
                f"{repeated:,} rows have the text of an earlier row; equal texts are never divided between the parts"
            )
        return train, validation

    def _note_classes(self, tables: dict[str, pa.Table]) -> None:
        """Note classes that are missing in the rows used for training or validation."""
        for name, table in tables.items():
            there = set(pc.unique(table.column("label")).to_pylist())
            if missing := [label for i, label in enumerate(self.spec.label_names) if i not in there]:
                self.accounts[name].notes.append(f"no row of these classes: {some(missing)}")

    # --- after a step ---

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        logits, labels = outputs["logits"], outputs["labels"]
        found = {"loss": self._loss(logits, labels).item()} | compute_metrics(self.spec, logits, labels)
        if self.numeric:
            return {name: found.get(name, found["loss"]) for name in ("loss", *self.metrics)}

        from torchmetrics.functional.classification import multiclass_f1_score  # imported here: it takes seconds

        predicted, n = logits.argmax(dim=1), self.spec.num_labels
        return found | {
            f"{average}_f1": float(multiclass_f1_score(predicted, labels.long(), n, average))
            for average in ("macro", "weighted")
        }

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """For classes: name and number of the predicted class, and the probability of each class by its name."""
        rows, logits = outputs["row"].tolist(), outputs["logits"].to(torch.float64)
        if self.numeric:
            return [{"row": row, "prediction": value} for row, value in zip(rows, logits[:, 0].tolist(), strict=True)]
        names, found = self.spec.label_names, []
        for row, shares in zip(rows, logits.softmax(dim=1).numpy(), strict=True):
            best = int(np.argmax(shares))
            each = {name: round(float(share), 6) for name, share in zip(names, shares, strict=True)}
            found.append({"row": row, "prediction": names[best], "label": best, "probabilities": each})
        return found
