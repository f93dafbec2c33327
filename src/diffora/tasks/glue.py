"""The GLUE tasks and the generated paraphrase task: a table of them, their metrics, and the task class.

Columns and label order are those of the hub dataset `nyu-mll/glue`. Metrics are GLUE's own (Wang et al. 2019), reported
as in [D] Table 1.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
from torch import Tensor

from diffora.errors import UserError
from diffora.files import write_text
from diffora.settings.checks import LENGTH, PATH, ROWS, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks import glue_submission
from diffora.tasks.account import Account
from diffora.tasks.base import Outputs, Rows, Split
from diffora.tasks.embedded import paraphrase
from diffora.tasks.sentences import SentenceTask
from diffora.tasks.sources import load
from diffora.tasks.spec import TaskSpec

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
            test_splits=("test_matched", "test_mismatched", load.DIAGNOSTIC),
        ),
        TaskSpec("sst2", "sst2", _SINGLE, ("negative", "positive")),
        TaskSpec("cola", "cola", _SINGLE, ("unacceptable", "acceptable"), ("matthews",), "matthews"),
        TaskSpec("qqp", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _F1),
        TaskSpec("qnli", "qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        TaskSpec("rte", "rte", _PAIR, ("entailment", "not_entailment")),
        TaskSpec("mrpc", "mrpc", _PAIR, ("not_equivalent", "equivalent"), _F1),
        TaskSpec("stsb", "stsb", _PAIR, (), ("pearson", "spearman", "corr"), "corr"),
        TaskSpec("wnli", "wnli", _PAIR, ("not_entailment", "entailment")),
        # Generated, for machines that cannot reach the hub. Its columns are those of MRPC.
        TaskSpec(
            "paraphrase",
            None,
            _PAIR,
            ("not_equivalent", "equivalent"),
            _F1,
            test_splits=(),
            generate=paraphrase.splits,
        ),
    )
}


def get_spec(name: str) -> TaskSpec:
    """Look up a task by name.

    Raises:
        UserError: there is no such task. The message names the nearest one and lists all.
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


class GlueTask(SentenceTask):
    """One of the tasks in `TASKS`: classify texts or pairs of texts, or predict a similarity score."""

    settings = GlueSettings

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.spec = get_spec(cfg.name)
        self.metrics, self.main_metric = self.spec.metrics, self.spec.main_metric
        self.test_splits = self.spec.test_splits
        if cfg.path:  # a folder with MNLI does not need the diagnostic set, which is a dataset of its own
            absent = load.DIAGNOSTIC if not any(Path(cfg.path).glob(f"{load.DIAGNOSTIC}[.-]*")) else None
            self.test_splits = tuple(name for name in self.test_splits if name != absent)
        self.validation_splits = self.spec.validation_splits

    def problems(self) -> Iterator[str]:
        for key, given in self._sizes("train_rows", "validation_rows").items():
            if self.spec.generate is None:
                yield f"task.{key}={given}: task={self.name} does not generate its rows; use task.max_train_rows"

    def load(self) -> Rows:
        sizes = self._sizes("train_rows", "validation_rows")
        return load.load_rows(self.spec, self.cfg.path, self.cfg.max_train_rows, **sizes, accounts=self.accounts)

    def load_split(self, split: str) -> datasets.Dataset:
        account = self.accounts[split] = Account()
        sizes = self._sizes("train_rows", "validation_rows")
        return load.load_split(self.spec, split, self.cfg.path, **sizes, account=account)

    def _sizes(self, *keys: str) -> dict[str, int]:
        """The settings that say how many rows to generate, if they are given."""
        return {key: value for key in keys if (value := getattr(self.cfg, key)) is not None}

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        logits, labels = outputs["logits"], outputs["labels"]
        return {"loss": self._loss(logits, labels).item()} | compute_metrics(self.spec, logits, labels)

    def write_predictions(self, folder: Path, name: str, outputs: Outputs, split: Split) -> list[Path]:
        """Write a test split as the table that GLUE's server takes, and as a zip; other splits as ``<name>.jsonl``.

        Raises:
            UserError: a prediction is not finite.
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

    No case gives nan. Constant predictions or labels, and scores that are not finite, give a Matthews, Pearson and
    Spearman correlation of 0. F1 is 0 if nothing is positive.

    Args:
        spec: the task.
        logits: [n, num_labels]; [n, 1] predicted scores for regression.
        labels: [n] class indices, or scores for regression.

    Returns:
        One float in [-1, 1] for each name in `spec.metrics`. F1 is that of class 1, as GLUE defines it.

    Raises:
        ValueError: the shapes do not fit each other or the task.
    """
    if labels.ndim != 1 or len(labels) == 0 or logits.shape != (len(labels), spec.num_labels):
        raise ValueError(
            f"{spec.name}: expected logits [n, {spec.num_labels}] and labels [n] with n >= 1, "
            f"got {list(logits.shape)} and {list(labels.shape)}"
        )
    logits, labels = logits.detach().cpu(), labels.detach().cpu()
    if spec.is_regression:
        return _correlations(logits[:, 0].double(), labels.double())

    from torchmetrics.functional import classification as metric  # imported here: it takes seconds

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
    """Pearson, Spearman and their mean ("Corr" in [D] Table 1)."""
    if not scores.isfinite().all() or _constant(scores) or _constant(labels):
        return {"pearson": 0.0, "spearman": 0.0, "corr": 0.0}

    from torchmetrics.functional import regression as metric  # imported here: it takes seconds

    # Pearson is still nan for almost constant scores.
    pearson = float(metric.pearson_corrcoef(scores, labels).nan_to_num(0.0))
    spearman = float(metric.spearman_corrcoef(scores, labels).nan_to_num(0.0))
    return {"pearson": pearson, "spearman": spearman, "corr": (pearson + spearman) / 2}


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())
