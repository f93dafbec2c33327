"""The interface of a task: rows, batches, a head, a loss, predictions and metrics.

Each family of tasks (`glue`, `squad`, `vision`, `causal_lm`) is one subclass, named by ``task._target_`` in the YAML.
Search, training and evaluation use only this interface. The defaults are those of classification.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import datasets
import pyarrow as pa
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from diffora.backbones.precision import full_precision
from diffora.backbones.processors import ProcessorKind, load_processor
from diffora.backbones.request import ModelRequest
from diffora.errors import UserError
from diffora.files import write_text
from diffora.settings.read import Reading, known_part, read_group
from diffora.settings.sections import Model, TaskSettings
from diffora.tasks.account import Account, Accounts
from diffora.tasks.classes import ClassResults
from diffora.tasks.messages import some
from diffora.trust import class_at

Batch = dict[str, Tensor]
Outputs = dict[str, Tensor]
"""What predictions and metrics need of a model's output: tensors of one entry per row; ``row`` is its position."""


class Collate(Protocol):
    """Makes one batch of ``encoded[[i, j, …]]``, that is of one list per column."""

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Batch: ...


@dataclass(frozen=True)
class Rows:
    """The checked rows of a task, as they came from their source.

    Attributes:
        train: the training split, after ``task.max_train_rows``.
        validation: labelled evaluation splits by the name under which their metrics are logged; the official one
            ("validation") comes first.
        data_hash: sha256 of all rows. It depends on their content, not on the file format.
        source: where the rows came from, in words.
    """

    train: datasets.Dataset
    validation: dict[str, datasets.Dataset]
    data_hash: str
    source: str


@dataclass(frozen=True)
class Split:
    """One split, before and after encoding.

    Attributes:
        rows: the checked rows, as in `Rows`.
        encoded: what batches are made of. It has the columns ``row`` (position in ``encoded``) and ``length`` (to group
            rows of similar length). If one row can become several or none, it also has ``example`` (position in
            ``rows``).
    """

    rows: datasets.Dataset
    encoded: datasets.Dataset


class Task:
    """One task of a run, made from the ``task`` section of the configuration before anything is loaded.

    Args:
        cfg: the ``task`` section, an instance of ``settings``.

    Attributes:
        name: the task's name in ``task=<name>``.
        num_proc: how many processes `encode` may use (``trainer.num_proc``).
        accounts: for each split, by its name, what `load` or `load_split` did with its rows.
        metrics: the metrics that `score` returns besides ``loss``, in the order in which they are shown.
        main_metric: the metric that chooses the best model.
        width_multiple: `collate` should round padded widths up to a multiple of this.
    """

    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    """The transformers class of the backbone with its head."""
    processor_kind: ClassVar[ProcessorKind] = "tokenizer"
    """What makes the model's inputs."""
    peft_type: ClassVar[str | None] = "SEQ_CLS"
    """PEFT's name for this kind of task."""
    trains_head: bool = True
    """Whether every method trains the modules outside the backbone."""
    pretrained_head: ClassVar[bool] = False
    """Whether to use the checkpoint's own head, as for a language model; otherwise the head is new."""
    maximise: ClassVar[bool] = True
    """Whether a higher main metric is better."""
    scores_training: ClassVar[bool] = True
    """Whether to score predictions on training batches too, for the generalisation gap."""
    targets: ClassVar[tuple[str, ...]] = ("labels",)
    """Columns of a batch that the model does not get."""
    padding: ClassVar[Mapping[str, int]] = {"attention_mask": 0, "token_type_ids": 0}
    """Padding values of the columns that are as wide as ``input_ids``."""
    usage: ClassVar[str] = ""
    """Text that the model card adds to the instructions for loading the adapter."""
    validation_splits: tuple[str, ...] = ("validation",)
    """Labelled evaluation splits as the source names them, the official one first."""
    test_splits: tuple[str, ...] = ("test",)
    """Splits for which ``predict=true`` writes predictions, as the source names them."""
    settings: ClassVar[type[TaskSettings]] = TaskSettings
    """The keys of ``task.*`` for this task: a subclass of `TaskSettings`, described as in `diffora.settings.checks`."""
    required: ClassVar[tuple[str, ...]] = ("load", "encode", "collate", "score")
    """Methods that every subclass must define."""

    name: str
    metrics: tuple[str, ...]
    main_metric: str

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.name = cfg.name
        self.width_multiple = 1
        self.num_proc = 1
        self.accounts: Accounts = {}

    def unit_of(self, metric: str) -> str:
        """Unit of one of `metrics`, for reports: ``fraction`` (of 1), ``percent``, ``perplexity``; empty for none."""
        return "fraction"

    def higher_is_better(self, metric: str) -> bool:
        """Whether a higher value of one of `metrics` is better."""
        return self.maximise

    def default_splits(self, other_data: bool) -> tuple[str, ...]:
        """The splits that ``diffora evaluate`` uses if the command names none.

        Args:
            other_data: whether the command gives ``task.path``.
        """
        return self.validation_splits

    def drawn_from_training(self, split: str) -> bool:
        """Whether the rows of a split, other than "train", are taken from the training rows."""
        return False

    # --- before training ---

    def problems(self) -> Iterator[str]:
        """One message for each impossible setting. It loads nothing."""
        return iter(())

    def head(self) -> dict[str, Any]:
        """Entries of the transformers configuration that the head needs, e.g. ``num_labels``."""
        return {}

    def load(self) -> Rows:
        """Load and check training and validation rows.

        Raises:
            UserError: everything that is wrong with the data, together.
        """
        raise NotImplementedError

    def load_split(self, split: str) -> datasets.Dataset:
        """Load and check one split by its name at the source, e.g. ``test``. Its rows may lack labels.

        Raises:
            UserError: there is no such split, it has faults, or the class of a user's own task does not define this.
        """
        raise UserError(f"{type(self).__name__} does not define load_split, which evaluating and predicting need")

    def model_request(self) -> ModelRequest:
        """What `diffora.backbones.load.load_backbone` needs to know about the task."""
        return ModelRequest(
            self.name,
            self.model_class,
            self.head(),
            self.trains_head,
            self.pretrained_head,
            getattr(self.cfg, "max_length", None),
        )

    def processor(self, model: Model) -> Any:
        """What `encode` and `collate` need of the backbone: its tokenizer, or how it wants its images.

        Args:
            model: the ``model`` section of the settings.
        """
        return load_processor(model, self.processor_kind)

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        """Encode rows as `Split.encoded`. The result is cached on disk and mapped into memory.

        Args:
            training: whether the rows are for training; some tasks encode those differently.

        Raises:
            UserError: the settings do not suit the model.
        """
        raise NotImplementedError

    def collate(self, processor: Any, training: bool) -> Collate:
        """The function that makes batches of encoded rows."""
        raise NotImplementedError

    def account(self, name: str, split: Split) -> Account:
        """What became of the rows of a split, from its source to its encoded form.

        Args:
            name: the name under which the split was loaded: "train", a name in `Rows.validation`, or the argument of
                `load_split`.
        """
        account = self.accounts[name].copy() if name in self.accounts else Account(len(split.rows))
        self.count_encoded(account, split)
        return account

    def count_encoded(self, account: Account, split: Split) -> None:
        """Add to an account how many rows `encode` left out or cut."""

    def expect(self, classes: Sequence[str]) -> None:
        """Prepare for a model that was trained on these classes, in this order. Call it before loading anything.

        Raises:
            UserError: the task has other classes.
        """
        names = self.head().get("id2label")
        # Models of others write the same classes with other capitals, such as POSITIVE.
        if names and [name.casefold() for name in names.values()] != [name.casefold() for name in classes]:
            raise UserError(
                f"the run was trained on the classes {some(classes)}, in this order; task={self.name} has "
                f"{some(list(names.values()))}"
            )

    def row_keys(self, rows: datasets.Dataset) -> pa.Array | None:
        """One text for each row of a split; rows with equal inputs have equal texts. None: compare encoded inputs."""
        return None

    def check(self, model: Any) -> None:
        """Raise a UserError if the backbone does not suit the task's settings."""

    def labelled(self, split: Split) -> bool:
        """Whether a split can be scored."""
        return set(self.targets) <= set(split.encoded.column_names)

    def dummy(self, rows: int, model: Any) -> Batch:
        """A batch of the largest size, without real content, to measure the memory of a step."""
        if model.main_input_name == "pixel_values":
            size = model.config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            inputs = {"pixel_values": torch.zeros(rows, model.config.num_channels, height, width)}
        else:
            ids = torch.ones(rows, self.cfg.max_length, dtype=torch.long)
            inputs = {"input_ids": ids, "attention_mask": ids}
        return inputs | {name: torch.zeros(rows, dtype=torch.long) for name in ("row", *self.targets)}

    # --- in a step ---

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a batch that the model is called with."""
        return {key: value for key, value in batch.items() if key not in ("row", *self.targets)}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of a batch, a scalar."""
        return F.cross_entropy(*self.class_terms(output, batch))

    def class_terms(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(logits (..., classes), labels (...)): if the task `classifies`, `loss` is their mean cross-entropy.

        A label of -100 does not count. Fine-tuning uses them for label smoothing and class weights.
        """
        return full_precision(output.logits), batch["labels"]

    @property
    def classifies(self) -> bool:
        """Whether `loss` is the mean cross-entropy of `class_terms`."""
        return type(self).loss is Task.loss

    def sequences(self, batch: Mapping[str, Tensor]) -> int:
        """How many sequences the model reads for each row of a batch."""
        return 1

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        """The number of terms that `loss` averages, to weigh the parts of a batch."""
        return float(len(batch["row"]))

    # --- after a step ---

    def outputs(self, output: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """What predictions and metrics need, without gradients. It must be small and equally wide in all batches."""
        kept = {"row": batch["row"], "logits": full_precision(output.logits.detach())}
        return kept | {name: batch[name] for name in self.targets if name in batch}

    def evaluate(self, model: nn.Module, batch: Batch, final: bool) -> Outputs:
        """`outputs` of a batch in an evaluation, for a task that needs more than one pass, such as to generate text.

        Args:
            model: in evaluation mode.
            batch: on the model's device.
            final: for predictions and `evaluate.py`; otherwise it is a validation while training.
        """
        return self.outputs(model(**self.inputs(batch)), batch)

    @property
    def single_pass(self) -> bool:
        """Whether `evaluate` is one forward pass over the `inputs` of a batch, and generates nothing."""
        return type(self).evaluate is Task.evaluate

    def texts_split(self) -> Split | None:
        """Plain texts whose loss is measured before and after fine-tuning, to see what a model forgets; None: no texts.

        Call it after `load` and `collate`.
        """
        return None

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        """``loss`` and the task's metrics over all or some rows of a split.

        Args:
            outputs: on the CPU, in the order of ``row``.
            split: the split that the rows belong to.
        """
        raise NotImplementedError

    def class_results(self, outputs: Outputs) -> ClassResults | None:
        """Results by class over the rows of a split, as in `score`; None if the task has no classes."""
        names = self.head().get("id2label")
        logits, labels = outputs.get("logits"), outputs.get("labels")
        if not names or logits is None or labels is None or logits.shape != (len(labels), len(names)):
            return None
        return ClassResults.of_classes(list(names.values()), logits.argmax(dim=1), labels)

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """One JSON object for each example of a split; it has ``row`` and ``prediction``.

        Raises:
            UserError: the class of a user's own task does not define this.
        """
        raise UserError(f"{type(self).__name__} does not define predictions, which evaluating and predicting need")

    def write_predictions(self, folder: Path, name: str, outputs: Outputs, split: Split) -> list[Path]:
        """Write the predictions for a split to ``folder``, by default ``<name>.jsonl``; returns the files.

        If the rows have a column ``number``, it is added after ``row``: the row's number in its file, from 1.
        """
        found = self.predictions(outputs, split)
        if "number" in split.rows.column_names:
            numbers = split.rows["number"][:]
            found = [{"row": line["row"], "number": numbers[line["row"]]} | line for line in found]
        lines = (json.dumps(row, ensure_ascii=False) for row in found)
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
        return [folder / f"{name}.jsonl"]


def get_task(cfg: DictConfig) -> Task:
    """The task that a ``task`` section describes, of this run or an earlier one. Keys that the task lacks are ignored.

    Raises:
        UserError: ``_target_`` names no usable class, or some settings are impossible; all of them are listed.
    """
    reading = Reading.of(cfg, "task.")
    task = read_task(reading.values, reading.found, ignore_unknown=True)
    if task is None:
        raise UserError(list(reading.own_mistakes().values()))
    return task


def read_task(section: Mapping[str, Any], found: dict[str, str], ignore_unknown: bool = False) -> Task | None:
    """Make a task from the ``task`` section in plain containers.

    Args:
        section: the section.
        found: gets a message for each mistake, by its key.
        ignore_unknown: accept keys that the task does not have.

    Returns:
        None if there are mistakes.

    Raises:
        UserError: ``_target_`` names no usable class.
    """
    kind = class_at(section.get("_target_"), Task, "task._target_")
    given = {name: value for name, value in section.items() if name != "_target_"}
    if ignore_unknown:
        given = known_part(kind.settings, given)
    settings: Any = read_group(kind.settings, given, "task.", found)
    if settings is None:
        return None
    if path := getattr(settings, "path", None):  # the shell does not expand a ~ after =
        settings = dataclasses.replace(settings, path=str(Path(path).expanduser()))
    task: Task = kind(settings)
    if problems := list(task.problems()):
        found |= {text: text for text in problems}
        return None
    return task
