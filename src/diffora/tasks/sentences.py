"""What all tasks on one text or a pair of texts share: head, encoding, batches and loss."""

from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow as pa
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
        self.unknown_id = unknown_token(processor)
        return tokenise(rows, self.spec, processor, self.cfg.max_length)

    def count_encoded(self, account: Account, split: Split) -> None:
        note_unknown(account, split.encoded.data.column("input_ids"), self.unknown_id)
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


def unknown_token(tokenizer: Any) -> int | None:
    """The id of a tokenizer's unknown token; None if it has none of its own."""
    unknown: int | None = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id) else unknown


def note_unknown(account: Account, tokens: pa.ChunkedArray, unknown_id: int | None) -> None:
    """Note if many tokens are unknown.

    Args:
        tokens: token ids, in lists.
        unknown_id: from `unknown_token`.
    """
    if unknown_id is None:
        return
    while pa.types.is_list(tokens.type):
        tokens = pc.list_flatten(tokens)
    share = (pc.sum(pc.equal(tokens, unknown_id)).as_py() or 0) / max(1, len(tokens))
    if share > MANY_UNKNOWN:
        account.notes.append(
            f"{share:.0%} of the tokens are unknown to the model's tokenizer: use a model for this language"
        )
