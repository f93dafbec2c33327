"""The GLUE tasks: one table, their metrics as pure functions of logits and labels, and what a run does with them.

Columns and label order are those of the hub dataset `nyu-mll/glue`; metrics are GLUE's own
(Wang et al. 2019), reported as in DiffoRA (arXiv 2502.08905) Table 1.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.errors import UserError
from diffora.files import write_text
from diffora.settings.checks import LENGTH, PATH, ROWS, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks import glue_submission, sources
from diffora.tasks.account import Account
from diffora.tasks.base import Collate, Outputs, Rows, Split, Task, full_precision
from diffora.tasks.tokenise import Collator, tokenise


@dataclass(frozen=True)
class TaskSpec:
    """What distinguishes one task from the others.

    Attributes:
        name: the task's name in `task=<name>`.
        hub_config: its configuration in `nyu-mll/glue`; None for a task that is not on the hub.
        text_columns: one or two columns of text, in the order the tokenizer reads them.
        label_names: class names in label order; empty for regression.
        metrics: what `compute_metrics` returns, in this order.
        main_metric: the one of them that chooses models (higher is better).
        validation_splits: labelled evaluation splits as the source names them, the official one first.
        test_splits: splits whose labels only GLUE's server has, likewise.
    """

    name: str
    hub_config: str | None
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    main_metric: str = "accuracy"
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Width of the head: number of classes, or 1 for regression."""
        return len(self.label_names) or 1


_PAIR = ("sentence1", "sentence2")
_SINGLE = ("sentence",)
_F1 = ("accuracy", "f1")

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "mnli",
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation_splits=("validation_matched", "validation_mismatched"),
            test_splits=("test_matched", "test_mismatched", sources.DIAGNOSTIC),
        ),
        TaskSpec("sst2", "sst2", _SINGLE, ("negative", "positive")),
        TaskSpec("cola", "cola", _SINGLE, ("unacceptable", "acceptable"), ("matthews",), "matthews"),
        TaskSpec("qqp", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _F1),
        TaskSpec("qnli", "qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        TaskSpec("rte", "rte", _PAIR, ("entailment", "not_entailment")),
        TaskSpec("mrpc", "mrpc", _PAIR, ("not_equivalent", "equivalent"), _F1),
        TaskSpec("stsb", "stsb", _PAIR, (), ("pearson", "spearman", "corr"), "corr"),
        TaskSpec("wnli", "wnli", _PAIR, ("not_entailment", "entailment")),
        # Generated (diffora.tasks.embedded.paraphrase), for machines without the hub; columns as MRPC's.
        TaskSpec("paraphrase", None, _PAIR, ("not_equivalent", "equivalent"), _F1, test_splits=()),
    )
}


def get_spec(name: str) -> TaskSpec:
    """Look a task up by name.

    Raises:
        UserError: no such task; names the nearest one and lists all.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(str(name).lower().replace("-", ""), TASKS, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"task.name={name} is not a known task; {hint}Known tasks: {', '.join(TASKS)}.")


@dataclass(frozen=True, kw_only=True)
class GlueSettings(TaskSettings):
    """The settings of `GlueTask`."""

    path: Annotated[
        Annotated[str, PATH] | None,
        Help("Folder with the splits as .parquet, .jsonl or .csv in the hub's columns; null: the hub, or generated."),
    ] = None
    max_length: Annotated[int, whole(4, LENGTH), Help("Length at which inputs are cut.", "tokens")]
    train_rows: Annotated[
        Annotated[int, whole(1, ROWS)] | None, Help("Training rows to generate, for `task=paraphrase`.", "rows")
    ] = None
    validation_rows: Annotated[
        Annotated[int, whole(2, ROWS)] | None, Help("Validation rows to generate, for `task=paraphrase`.", "rows")
    ] = None


class GlueTask(Task):
    """One of the tasks in `TASKS`: texts or pairs of texts, classes or a similarity score."""

    settings = GlueSettings

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.spec = get_spec(cfg.name)
        self.metrics, self.main_metric = self.spec.metrics, self.spec.main_metric
        self.test_splits = self.spec.test_splits
        if path := cfg.path:  # a folder of MNLI need not have the diagnostic set, a data set of its own
            absent = sources.DIAGNOSTIC if not any(Path(path).glob(f"{sources.DIAGNOSTIC}[.-]*")) else None
            self.test_splits = tuple(name for name in self.test_splits if name != absent)
        self.validation_splits = self.spec.validation_splits

    @property
    def embedded(self) -> bool:
        """Whether the rows are generated rather than read."""
        return self.spec.hub_config is None

    def _sizes(self, *keys: str) -> dict[str, int]:
        """Those of these settings that are given."""
        return {key: value for key in keys if (value := getattr(self.cfg, key)) is not None}

    def problems(self) -> Iterator[str]:
        for key in ("train_rows", "validation_rows"):
            given = getattr(self.cfg, key)
            if given is not None and not self.embedded:
                yield f"task.{key}={given}: task={self.name} does not generate its rows; use task.max_train_rows"

    def head(self) -> dict[str, Any]:
        if self.spec.is_regression:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.spec.label_names))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def load(self) -> Rows:
        c = self.cfg
        sizes = self._sizes("train_rows", "validation_rows")
        return sources.load_rows(self.spec, c.path, c.max_train_rows, **sizes, accounts=self.accounts)

    def load_split(self, split: str) -> datasets.Dataset:
        sizes = self._sizes("validation_rows")
        account = self.accounts[split] = Account()
        return sources.load_split(self.spec, split, self.cfg.path, **sizes, account=account)

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

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        logits, labels = outputs["logits"], outputs["labels"]
        return {"loss": self._loss(logits, labels).item()} | compute_metrics(self.spec, logits, labels)

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        logits, rows = outputs["logits"], outputs["row"].tolist()
        if self.spec.is_regression:
            return [{"row": row, "prediction": value} for row, value in zip(rows, logits[:, 0].tolist(), strict=True)]
        classes = logits.argmax(dim=1).tolist()
        names = [self.spec.label_names[i] for i in classes]
        return [{"row": row, "prediction": name, "label": i} for row, name, i in zip(rows, names, classes, strict=True)]

    def write_predictions(self, folder: Path, name: str, outputs: Outputs, split: Split) -> list[Path]:
        """A test split as the table that GLUE's server takes, and zipped; other splits as ``<name>.jsonl``.

        Raises:
            UserError: a prediction that is no number.
        """
        test_set = glue_submission.TEST_SETS.get((self.name, name))
        if test_set is None:
            return super().write_predictions(folder, name, outputs, split)
        if not outputs["logits"].isfinite().all():
            raise UserError(f"{name}: some predictions are not finite, so there is nothing to submit")
        rows = split.rows.select(outputs["row"].tolist())
        numbers = rows["idx"] if "idx" in rows.column_names else outputs["row"].tolist()
        text = glue_submission.table(test_set, numbers, outputs["logits"])
        write_text(folder / test_set.file, text)
        return [folder / test_set.file, glue_submission.pack(folder)]


def compute_metrics(spec: TaskSpec, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The task's metrics over one whole evaluation split.

    Degenerate cases are defined instead of nan: constant predictions or labels (and scores that are not
    finite) give a Matthews, Pearson and Spearman correlation of 0, and F1 is 0 when nothing is positive.

    Args:
        spec: the task.
        logits: [n, num_labels]; for regression [n, 1], the predicted score.
        labels: [n], class indices or scores.

    Returns:
        One float in [-1, 1] for each name in `spec.metrics`; F1 is that of class 1 (GLUE's convention).

    Raises:
        ValueError: shapes that do not fit each other or the task.
    """
    if labels.ndim != 1 or len(labels) == 0 or logits.shape != (len(labels), spec.num_labels):
        raise ValueError(
            f"{spec.name}: expected logits [n, {spec.num_labels}] and labels [n] with n >= 1, "
            f"got {list(logits.shape)} and {list(labels.shape)}"
        )
    logits, labels = logits.detach().cpu(), labels.detach().cpu()
    if spec.is_regression:
        return _correlations(logits[:, 0].double(), labels.double())

    from torchmetrics.functional import classification as metric  # imported late: it takes seconds

    predictions, labels = logits.argmax(dim=1), labels.long()
    if spec.metrics == ("matthews",):
        # torchmetrics gives 1 or -1 for one-class data; GLUE's scorer (scikit-learn) gives 0.
        degenerate = _constant(predictions) or _constant(labels)
        return {"matthews": 0.0 if degenerate else float(metric.binary_matthews_corrcoef(predictions, labels))}
    values = {"accuracy": float(metric.multiclass_accuracy(predictions, labels, spec.num_labels, average="micro"))}
    if "f1" in spec.metrics:
        values["f1"] = float(metric.binary_f1_score(predictions, labels))
    return values


def _correlations(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Pearson, Spearman and their mean ("Corr" in DiffoRA's Table 1)."""
    if not scores.isfinite().all() or _constant(scores) or _constant(labels):
        return {"pearson": 0.0, "spearman": 0.0, "corr": 0.0}

    from torchmetrics.functional import regression as metric  # imported late: it takes seconds

    # Almost constant scores still give Pearson nan.
    pearson = float(metric.pearson_corrcoef(scores, labels).nan_to_num(0.0))
    spearman = float(metric.spearman_corrcoef(scores, labels).nan_to_num(0.0))
    return {"pearson": pearson, "spearman": spearman, "corr": (pearson + spearman) / 2}


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())
