"""What all tasks on one text or a pair of texts share: head, encoding, batches and loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.backbones.precision import full_precision
from diffora.tasks.account import Account
from diffora.tasks.base import Batch, Collate, Outputs, Split, Task
from diffora.tasks.classes import ClassResults
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
        head = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
        return head | ({"problem_type": "multi_label_classification"} if self.spec.multilabel else {})

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        self.unknown_id = unknown_token(processor)
        return tokenise(rows, self.spec, processor, self.cfg.max_length, num_proc=self.num_proc)

    def count_encoded(self, account: Account, split: Split) -> None:
        note_unknown(account, split.encoded.data.column("input_ids"), self.unknown_id)
        account.change(
            f"cut at task.max_length={self.cfg.max_length}", pc.sum(split.encoded.data.column("cut")).as_py() or 0
        )

    def collate(self, processor: Any, training: bool) -> Collate:
        collate = Collator(processor.pad_token_id, pad_to_multiple_of=self.width_multiple)
        return SeveralClasses(collate, self.spec.num_labels) if self.spec.multilabel else collate

    def dummy(self, rows: int, model: Any) -> Batch:
        batch = super().dummy(rows, model)
        return batch | ({"labels": torch.zeros(rows, self.spec.num_labels)} if self.spec.multilabel else {})

    @property
    def classifies(self) -> bool:
        return not (self.spec.is_regression or self.spec.multilabel)

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy; for several classes, mean binary cross-entropy over classes; else mean squared error."""
        return self._loss(output.logits, batch["labels"])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.spec.is_regression:
            logits = full_precision(logits).squeeze(-1)
            return F.mse_loss(logits, labels.to(logits.dtype))
        if self.spec.multilabel:
            logits = full_precision(logits)
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(full_precision(logits), labels)

    def class_results(self, outputs: Outputs) -> ClassResults | None:
        if not self.spec.multilabel:
            return super().class_results(outputs)
        return ClassResults.of_sets(self.spec.label_names, has_class(outputs["logits"]), outputs["labels"])

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """For classes: name and number of the predicted class, and the probability of each class by its name.

        If a row can have several classes, names and numbers are lists.
        """
        rows, logits = outputs["row"].tolist(), outputs["logits"].to(torch.float64)
        if self.spec.is_regression:
            return [{"row": row, "prediction": value} for row, value in zip(rows, logits[:, 0].tolist(), strict=True)]
        names = self.spec.label_names
        shares = logits.sigmoid() if self.spec.multilabel else logits.softmax(dim=1)
        best, flags = logits.argmax(dim=1).tolist(), has_class(logits).tolist()
        found = []
        for i, (row, each) in enumerate(zip(rows, shares.tolist(), strict=True)):
            line: dict[str, Any] = {"row": row, "prediction": names[best[i]], "class_number": best[i]}
            if self.spec.multilabel:
                numbers = [k for k, flag in enumerate(flags[i]) if flag]
                line |= {"prediction": [names[k] for k in numbers], "class_number": numbers}
            found.append(line | {"probabilities": dict(zip(names, (round(p, 6) for p in each), strict=True))})
        return found


def has_class(logits: Tensor) -> Tensor:
    """Whether each class is predicted if a row can have several: its probability is 0.5 or more."""
    return logits >= 0


class SeveralClasses:
    """Makes batches whose labels are 0 or 1 for each class, [n, classes], from rows with lists of class numbers.

    Args:
        collate: makes the rest of the batch.
        n_classes: width of the labels.
    """

    def __init__(self, collate: Collate, n_classes: int) -> None:
        self.collate, self.n_classes = collate, n_classes

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Batch:
        batch = self.collate({name: values for name, values in rows.items() if name != "labels"})
        if "labels" in rows:
            batch["labels"] = torch.zeros(len(rows["labels"]), self.n_classes)
            for i, numbers in enumerate(rows["labels"]):
                batch["labels"][i, numbers] = 1
        return batch


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
