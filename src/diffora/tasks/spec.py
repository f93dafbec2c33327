"""What a text classification or regression task is, as data: columns, classes, metrics and splits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCORE_RANGE = (0.0, 5.0)
"""The scale of similarity scores. STS-B is the only regression task here."""


@dataclass(frozen=True)
class TaskSpec:
    """What distinguishes one text task from the others.

    Attributes:
        name: the task's name in ``task=<name>``.
        hub_config: its configuration in the hub dataset `nyu-mll/glue`; None for a generated task.
        text_columns: one or two columns of text, in the order in which the tokenizer reads them.
        label_names: class names in label order; empty for regression.
        metrics: the metrics of the task, in the order in which they are shown.
        main_metric: the metric that chooses the best model (higher is better).
        validation_splits: labelled evaluation splits as the source names them, the official one first.
        test_splits: splits without public labels, which only GLUE's server can score; the official one first.
        generate: makes the rows of a generated task. It takes ``train_rows``, ``validation_rows`` and ``seed``, and
            returns the columns of each split by the split's name.
        multilabel: whether a row can have any number of classes. Its label is then a list of class numbers.
    """

    name: str
    hub_config: str | None
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    main_metric: str = "accuracy"
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    generate: Callable[..., dict[str, dict[str, list[Any]]]] | None = None
    multilabel: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Width of the head: the number of classes, or 1 for regression."""
        return len(self.label_names) or 1

    @property
    def expected_label(self) -> str:
        """What a label must be, in words, for messages."""
        if self.is_regression:
            return f"a number from {SCORE_RANGE[0]:g} to {SCORE_RANGE[1]:g}"
        return "one of " + ", ".join(f"{i} ({label})" for i, label in enumerate(self.label_names))
