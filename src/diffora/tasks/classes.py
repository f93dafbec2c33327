"""Results by class: precision, recall, F1, and which classes are taken for which others."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLUMNS = ("class", "precision", "recall", "f1", "support", "predicted", "confused_with", "confused_rows")
"""The columns of `ClassResults.rows`."""
MOST_CONFUSED = 1000
"""The most classes for which the confusion matrix is kept; it grows with their square, and checkpoints hold it."""


@dataclass(frozen=True)
class ClassResults:
    """How the rows of a split were classified, by class.

    Attributes:
        names: the classes.
        correct: [C] rows of the class for which it was predicted.
        predicted: [C] rows for which the class was predicted.
        support: [C] rows of the class.
        confusion: [C, C] rows of class i for which class j was predicted; None if a row can have several classes, or
            if there are more than `MOST_CONFUSED` classes.
    """

    names: tuple[str, ...]
    correct: Tensor
    predicted: Tensor
    support: Tensor
    confusion: Tensor | None = None

    @classmethod
    def of_classes(cls, names: Sequence[str], predicted: Tensor, labels: Tensor) -> "ClassResults":
        """The results for rows of one class each.

        Args:
            predicted, labels: [n] numbers of classes.
        """
        n, labels, predicted = len(names), labels.long(), predicted.long()
        if n > MOST_CONFUSED:
            correct, *counts = (
                torch.bincount(x, minlength=n) for x in (labels[labels == predicted], predicted, labels)
            )
            return cls(tuple(names), correct, *counts)
        pairs = labels * n + predicted
        confusion = torch.bincount(pairs, minlength=n * n).reshape(n, n)
        return cls(tuple(names), confusion.diagonal().clone(), confusion.sum(0), confusion.sum(1), confusion)

    @classmethod
    def of_sets(cls, names: Sequence[str], predicted: Tensor, labels: Tensor) -> "ClassResults":
        """The results for rows of any number of classes.

        Args:
            predicted, labels: [n, C], 1 or true where a row has the class.
        """
        predicted, labels = predicted.bool(), labels.bool()
        return cls(tuple(names), (predicted & labels).sum(0), predicted.sum(0), labels.sum(0))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each class, with the keys `COLUMNS`. A share of nothing is 0, as in scikit-learn.

        ``confused_with`` is the wrong class that was predicted most often for its rows, ``confused_rows`` how often.
        Both are empty if there is none, or without `confusion`.
        """
        precision = self.correct / self.predicted.clamp(min=1)
        recall = self.correct / self.support.clamp(min=1)
        f1 = 2 * self.correct / (self.predicted + self.support).clamp(min=1)
        shares = [[round(value, 6) for value in values.tolist()] for values in (precision, recall, f1)]
        counts = [self.support.tolist(), self.predicted.tolist()]
        columns = (self.names, *shares, *counts, *self._confused())
        return [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]

    def _confused(self) -> tuple[list[str], list[int | str]]:
        """For each class, the wrong class that was predicted most often for its rows, and how often."""
        if self.confusion is None:
            return [""] * len(self.names), [""] * len(self.names)
        counts, other = self.confusion.clone().fill_diagonal_(0).max(dim=1)
        found = list(zip(counts.tolist(), other.tolist(), strict=True))
        return [self.names[j] if n else "" for n, j in found], [n or "" for n, _ in found]

    def averages(self) -> dict[str, float]:
        """F1 averaged over classes: ``macro_f1`` and ``weighted_f1`` (by rows of the class), as in scikit-learn.

        A class that no row has and that is never predicted does not count.
        """
        # torchmetrics does not count them in its macro F1 either, but under deterministic algorithms it needs rows x
        # classes^2 bytes: many gigabytes for 1,000 classes.
        f1 = 2 * self.correct.double() / (self.predicted + self.support).clamp(min=1)
        present = self.predicted + self.support > 0
        weighted = (f1 * self.support).sum() / self.support.sum().clamp(min=1)
        return {"macro_f1": float(f1[present].mean()), "weighted_f1": float(weighted)}

    def csv(self) -> str:
        """`rows` as the text of a CSV file."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()
