"""What all tasks on one text or a pair of texts share: head, encoding, batches and loss."""

from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.tasks.account import Account
from diffora.tasks.base import Collate, Split, Task, full_precision
from diffora.tasks.spec import TaskSpec
from diffora.tasks.tokenise import Collator, tokenise


class SentenceTask(Task):
    """Classify one text or a pair of texts, or predict a number for them. The settings have ``max_length``.

    Attributes:
        spec: columns, classes and metrics.
    """

    spec: TaskSpec

    def head(self) -> dict[str, Any]:
        if self.spec.is_regression:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.spec.label_names))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        return tokenise(rows, self.spec, processor, self.cfg.max_length)

    def count_encoded(self, account: Account, split: Split) -> None:
        account.change(
            f"cut at task.max_length={self.cfg.max_length}", pc.sum(split.encoded.data.column("cut")).as_py() or 0
        )

    def collate(self, processor: Any, training: bool) -> Collate:
        return Collator(processor.pad_token_id, pad_to_multiple_of=8 if torch.cuda.is_available() else 1)

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy, or mean squared error for regression."""
        return self._loss(output.logits, batch["labels"])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.spec.is_regression:
            logits = full_precision(logits).squeeze(-1)
            return F.mse_loss(logits, labels.to(logits.dtype))
        return F.cross_entropy(full_precision(logits), labels)
