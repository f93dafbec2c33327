"""People's own texts with labels, from one file, a folder of files or the hub: ``task=text``."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from diffora.settings.checks import CHARACTERS, LENGTH, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks.base import Outputs, Split
from diffora.tasks.glue import compute_metrics
from diffora.tasks.labels import alike
from diffora.tasks.messages import some
from diffora.tasks.own_rows import OwnRowsTask
from diffora.tasks.sentences import SentenceTask, has_class
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.place import PlaceSettings
from diffora.tasks.spec import TaskSpec
from diffora.tasks.texts import several
from diffora.tasks.texts.columns import Columns, Kind
from diffora.tasks.texts.divide import choose_validation, count_contradictions, count_repeated, row_texts
from diffora.tasks.texts.formats import FORMATS
from diffora.tasks.texts.read import read_split
from diffora.tasks.texts.targets import class_numbers, find_classes, scores

METRICS: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "weighted_f1"),
    "multilabel": ("micro_f1", "macro_f1", "weighted_f1", "subset_accuracy"),
    "regression": ("pearson", "spearman", "mse"),
}
"""The metrics of each kind of label; the first one chooses the best epoch."""
AVERAGES: tuple[Literal["micro", "macro", "weighted"], ...] = ("micro", "macro", "weighted")


@dataclass(frozen=True, kw_only=True)
class TextSettings(PlaceSettings):
    """The settings of `TextTask`."""

    kind: Annotated[Kind, Help("Whether a row has one class, any number of classes, or a number.")] = "classification"
    text_columns: Annotated[
        list[str] | str, Help("Columns of text: one, or two that are read as a pair; more are joined into one text.")
    ]
    label_column: Annotated[str, Help("Column of the labels.")] = "label"
    label_columns: Annotated[
        list[str] | None, Help("For `kind=multilabel`: columns that hold 0 or 1 for the class of their name.")
    ] = None
    label_separator: Annotated[
        Annotated[str, CHARACTERS] | None,
        Help("For `kind=multilabel`: what separates the classes in a text; null: found in the rows."),
    ] = None
    max_length: Annotated[int, whole(4, LENGTH), Help("Length at which inputs are cut.", "tokens")]


class TextTask(OwnRowsTask, SentenceTask):
    """Classify your own texts, or predict a number for them.

    The classes are the labels of the training rows. Without a validation split, validation rows are taken from the
    training rows (`choose_validation`).
    """

    settings: ClassVar[type[TaskSettings]] = TextSettings
    formats = FORMATS
    why_undivided = "no class has two different texts"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.numeric, self.several = cfg.kind == "regression", cfg.kind == "multilabel"
        texts = [cfg.text_columns] if isinstance(cfg.text_columns, str) else cfg.text_columns
        labels = tuple(cfg.label_columns or (cfg.label_column,))
        self.columns = Columns(tuple(texts), labels, cfg.kind, flags=bool(cfg.label_columns))
        self.metrics = METRICS[cfg.kind]
        self.main_metric = self.metrics[0]
        self.spec = TaskSpec(
            cfg.name, None, self.columns.read_as, (), self.metrics, self.main_metric, multilabel=self.several
        )
        """For classification, its class names are missing until rows are loaded, or until `expect` gives them."""
        self._classes_of = "the training rows"  # who has the classes, for messages

    def unit_of(self, metric: str) -> str:
        return "" if metric == "mse" else "fraction"

    def higher_is_better(self, metric: str) -> bool:
        return metric != "mse"

    def problems(self) -> Iterator[str]:
        names, cfg = self.columns.texts, self.cfg
        yield from super().problems()
        if not names:
            yield "task.text_columns=[] must name at least one column"
        for key, columns in (("text_columns", names), ("label_columns", cfg.label_columns or ())):
            if len(set(columns)) < len(columns):
                yield f"task.{key}={list(columns)} names a column twice"
        for label in self.columns.labels:
            if label in names:
                key = "label_columns" if self.columns.flags else "label_column"
                yield f"task.{key}={label} is in task.text_columns too; a label is not a text"
        for key in ("label_columns", "label_separator"):
            if not self.several and getattr(cfg, key) is not None:
                yield f"task.{key}={getattr(cfg, key)} is for task.kind=multilabel, not task.kind={cfg.kind}"
        if cfg.label_columns is not None and len(cfg.label_columns) < 2:
            yield f"task.label_columns={cfg.label_columns} must name at least two columns"
        if cfg.label_columns and cfg.label_separator is not None:
            yield f"task.label_separator={cfg.label_separator}: the columns of task.label_columns hold 0 or 1"

    def head(self) -> dict[str, Any]:
        if not self.numeric and not self.spec.label_names:
            self.load()
        return super().head()

    def expect(self, classes: Sequence[str]) -> None:
        """Number the classes of all splits as the trained model does."""
        if not self.numeric:
            self.spec = dataclasses.replace(self.spec, label_names=tuple(classes))

    # --- rows ---

    def read(self, split: str, labelled: bool, problems: list[str]) -> Part | None:
        """The checked rows of a split, with the classes of each row as a list if a row can have several."""
        part = read_split(self.place, split, self.columns, labelled, problems)
        if not self.several or part is None or "label" not in part.table.column_names:
            return part
        if pa.types.is_list(part.table.column("label").type):
            return part
        before, sign = len(problems), self.cfg.label_separator
        if sign is None:
            sign = several.find_separator(part, self.columns.label, self.spec.label_names, problems)
        if len(problems) > before:
            return None
        several.note_separator(part, self.columns.label, sign)
        return several.separated(part, sign)

    def keys(self, table: pa.Table) -> pa.Array:
        return row_texts(table)

    def learn(self, train: Part, problems: list[str]) -> None:
        if self.numeric:
            return
        self._classes_of = train.where
        if not self.spec.label_names:
            found = find_classes(train, self.columns.label, problems)
            classes = self.columns.labels if self.columns.flags else found
            self.spec = dataclasses.replace(self.spec, label_names=tuple(classes))
        if twins := alike(self.spec.label_names):
            train.account.notes.append(
                f"classes whose names differ only in case, white space or invisible characters: {some(twins)}"
            )

    def numbered(self, split: str, part: Part, problems: list[str]) -> pa.Table:
        if "label" not in part.table.column_names:
            part.account.notes.append(f"no labels in column '{self.columns.label}': predictions without metrics")
            return part.table
        before = len(problems)
        table = self._with_targets(part, "the run" if split == "train" else self._classes_of, problems)
        if len(problems) > before and split not in ("train", "validation"):
            problems.append(f"  For predictions without metrics, leave out column '{self.columns.label}'.")
        if split == "train" and len(problems) == before:
            self._check_training(table, part, problems)
        return table

    def _with_targets(self, part: Part, whose: str, problems: list[str]) -> pa.Table:
        if self.numeric:
            return scores(part, self.columns.label, problems)
        number = several.class_lists if self.several else class_numbers
        return number(part, list(self.spec.label_names), whose, self.columns.label, problems)

    def _check_training(self, table: pa.Table, part: Part, problems: list[str]) -> None:
        if not self.numeric:
            if contradictions := count_contradictions(table):
                part.account.notes.append(f"{contradictions:,} texts have rows with different labels")
        elif len(pc.unique(table.column("label"))) == 1:
            problems.append(f"{part.where}: column '{self.columns.label}': all rows have the same number.")

    def before_split(self) -> None:
        if not self.numeric and not self.spec.label_names:
            self.load()  # the training rows have the classes

    def facts(self) -> list[str]:
        return [hashlib.sha256(json.dumps(self.spec.label_names).encode()).hexdigest()]

    def draw(self, table: pa.Table) -> tuple[np.ndarray, str]:
        chosen = choose_validation(table, self.cfg.validation_fraction, self.cfg.split_seed, by_class=not self.numeric)
        how = "at random" if self.numeric else "from each class"
        return chosen, how + (" (a row of several classes counts for its rarest one)" if self.several else "")

    def divided(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        parts = super().divided(table)
        if repeated := count_repeated(table):
            self.accounts["train"].notes.append(
                f"{repeated:,} rows have the text of an earlier row; equal texts are never divided between the parts"
            )
        return parts

    def note_rows(self, tables: dict[str, pa.Table]) -> None:
        if not self.numeric:
            self._note_classes(tables)

    def _note_classes(self, tables: dict[str, pa.Table]) -> None:
        """Note classes that are missing in the rows used for training or validation."""
        for name, table in tables.items():
            labels = table.column("label")
            present = set(pc.unique(pc.list_flatten(labels) if self.several else labels).to_pylist())
            if missing := [label for i, label in enumerate(self.spec.label_names) if i not in present]:
                self.accounts[name].notes.append(f"no row of these classes: {some(missing)}")

    # --- after a step ---

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        logits, labels = outputs["logits"], outputs["labels"]
        found = {"loss": self._loss(logits, labels).item()}
        if self.several:
            return found | several_f1(logits, labels)
        found |= compute_metrics(self.spec, logits, labels)
        if self.numeric:
            return {name: found.get(name, found["loss"]) for name in ("loss", *self.metrics)}
        results = self.class_results(outputs)
        return found | (results.averages() if results else {})


def several_f1(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics of rows that can have several classes; a class is predicted at a probability of 0.5 or more.

    F1 is 0 for a class that no row has and none is predicted to have, as in scikit-learn.

    Args:
        logits: [n, classes].
        labels: [n, classes], 1 where the row has the class.
    """
    from torchmetrics.functional.classification import multilabel_exact_match, multilabel_f1_score

    predicted, wanted, n = has_class(logits).long(), labels.long(), labels.shape[1]
    found = {f"{name}_f1": multilabel_f1_score(predicted, wanted, n, average=name) for name in AVERAGES}
    found["subset_accuracy"] = multilabel_exact_match(predicted, wanted, n)
    return {name: float(value) for name, value in found.items()}
