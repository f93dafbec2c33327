"""The loss of a fine-tuning step: the task's own, or cross-entropy with label smoothing and class weights."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.errors import UserError
from diffora.settings.sections import FineTune
from diffora.tasks.base import Batch, Task


class Criterion:
    """The training loss of a batch, and the number of terms that it averages. Evaluation always uses the task's own.

    With class weights w, the loss is sum w[y] l / sum w[y] over the terms, as in `torch.nn.CrossEntropyLoss`, so the
    weight of a batch is the sum of its w[y]. Parts of a batch then add up exactly.

    Args:
        task: gives loss and weight if nothing else is set.
        smoothing: label smoothing, 0 for none.
        weights: (classes,) of the classes, or None.
    """

    def __init__(self, task: Task, smoothing: float = 0.0, weights: Tensor | None = None) -> None:
        self.task, self.smoothing, self.weights = task, smoothing, weights
        self._placed = weights

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch, a scalar."""
        if not self.smoothing and self.weights is None:
            return self.task.loss(output, batch)
        logits, labels = self.task.class_terms(output, batch)
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        counted = (labels >= 0).to(logits.dtype)
        weights = self._placed
        if weights is not None:
            if (weights.device, weights.dtype) != (logits.device, logits.dtype):
                self._placed = weights = weights.to(logits)
            counted = counted * weights[labels.clamp(min=0)]
        total = F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=self.smoothing)
        terms = counted.sum()
        return total / torch.where(terms > 0, terms, 1.0)  # torch's own mean is NaN if no term counts

    def weight(self, batch: Batch) -> float:
        """The number of terms of a batch on the CPU, each counted with the weight of its class."""
        if self.weights is None:
            return self.task.weight(batch)
        labels = batch["labels"].reshape(-1)
        return self.weights[labels[labels >= 0]].sum().item()


def criterion_of(settings: FineTune, task: Task, train: datasets.Dataset) -> Criterion:
    """The criterion that ``finetune.label_smoothing`` and ``finetune.class_weights`` ask for.

    Args:
        settings: the ``finetune`` section.
        task: with its classes.
        train: the encoded training rows, which ``balanced`` counts.

    Raises:
        UserError: the task has no classes, or the weights do not fit its classes.
    """
    smoothing, asked = settings.label_smoothing, settings.class_weights
    if not smoothing and asked is None:
        return Criterion(task)
    head = task.head()
    names = list(map(str, (head.get("id2label") or {}).values()))
    one_of_many = head.get("problem_type") in (None, "single_label_classification")
    if not (task.classifies and names and one_of_many):
        keys = [f"finetune.label_smoothing={smoothing:g}"] if smoothing else []
        keys += ["finetune.class_weights"] if asked is not None else []
        raise UserError(f"{' and '.join(keys)}: task={task.name} does not choose one of several classes; leave it out")
    if asked is None:
        return Criterion(task, smoothing)
    weights = _weights(asked, names, task, train)
    return Criterion(task, smoothing, torch.tensor(weights, dtype=torch.float64).float())


def _weights(asked: Any, names: list[str], task: Task, train: datasets.Dataset) -> list[float]:
    """One weight for each class, in their order."""
    if asked == "balanced":
        counts = _counts(train, len(names))
        # scikit-learn's rule. A class without a row gets 1: its weight plays no part but in label smoothing.
        present = sum(count > 0 for count in counts)
        return [sum(counts) / (present * count) if count else 1.0 for count in counts]
    listed = f"task={task.name} has the {len(names)} classes {', '.join(names[:20])}{' …' if len(names) > 20 else ''}"
    if isinstance(asked, list):
        if len(asked) != len(names):
            raise UserError(f"finetune.class_weights has {len(asked)} numbers; {listed}")
        return [float(weight) for weight in asked]
    problems = []
    for name in asked:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; {listed}"
            problems.append(f"finetune.class_weights.{name}: there is no such class{hint}")
    if problems:
        raise UserError(problems)
    return [float(asked.get(name, 1.0)) for name in names]


def _counts(train: datasets.Dataset, n_classes: int) -> list[int]:
    """The number of training rows (or tokens that count) of each class."""
    column = train.data.column("labels").combine_chunks()
    while column.type.num_fields:  # lists of labels, one for each token
        column = column.flatten()
    labels = column.to_numpy(zero_copy_only=False)
    return np.bincount(labels[labels >= 0].astype(np.int64), minlength=n_classes).tolist()  # type: ignore[no-any-return]
