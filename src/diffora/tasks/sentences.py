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

MANY_UNKNOWN = 0.1
"""From this share of unknown tokens on, a line says so: the model cannot tell such texts apart."""


class SentenceTask(Task):
    """Classify one text or a pair of texts, or predict a number for them. The settings have ``max_length``.

    Attributes:
        spec: columns, classes and metrics.
    """

    spec: TaskSpec
    unknown_id: int | None = None
    """The id of the tokenizer's unknown token, after `encode`; None if it has none of its own."""

    def head(self) -> dict[str, Any]:
        if self.spec.is_regression:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.spec.label_names))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        if processor.unk_token_id not in (processor.eos_token_id, processor.pad_token_id):
            self.unknown_id = processor.unk_token_id
        return tokenise(rows, self.spec, processor, self.cfg.max_length)

    def count_encoded(self, account: Account, split: Split) -> None:
        if self.unknown_id is not None:
            tokens = pc.list_flatten(split.encoded.data.column("input_ids"))
            share = (pc.sum(pc.equal(tokens, self.unknown_id)).as_py() or 0) / max(1, len(tokens))
            if share > MANY_UNKNOWN:
                account.notes.append(
                    f"{share:.0%} of the tokens are unknown to the model's tokenizer: use a model for this language"
                )
        account.change(
            f"cut at task.max_length={self.cfg.max_length}", pc.sum(split.encoded.data.column("cut")).as_py() or 0
        )

    def collate(self, processor: Any, training: bool) -> Collate:
        return Collator(processor.pad_token_id, pad_to_multiple_of=8 if torch.cuda.is_available() else 1)

    @property
    def classifies(self) -> bool:
        return not self.spec.is_regression

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy, or mean squared error for regression."""
        return self._loss(output.logits, batch["labels"])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.spec.is_regression:
            logits = full_precision(logits).squeeze(-1)
            return F.mse_loss(logits, labels.to(logits.dtype))
        return F.cross_entropy(full_precision(logits), labels)
