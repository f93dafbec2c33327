"""Multiple choice, as in SWAG, HellaSwag, COPA and RACE: ``task=choice``.

Each choice is read together with the context and gets one score. A row is all of its choices: the loss compares them,
so they are never divided between batches, micro-batches or splits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.backbones.precision import full_precision
from diffora.errors import UserError
from diffora.settings.checks import TEXTS, Check, Help, whole
from diffora.tasks.account import Account
from diffora.tasks.base import Batch, Collate, Outputs, Split
from diffora.tasks.cache import cached, tokenizer_facts
from diffora.tasks.choices.encode import ChoiceCollator, write_choices
from diffora.tasks.choices.read import Columns, check_choices
from diffora.tasks.own_records import OwnRecordsTask
from diffora.tasks.own_rows import OwnRowsSettings
from diffora.tasks.sentences import note_unknown, unknown_token
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.records import Records
from diffora.tasks.sources.tables import content_hash

FORMAT_VERSION = 1  # raise it when the content of a cache file changes its meaning
USUAL_CHOICES = 4
"""Choices of a row, to estimate memory before rows are loaded."""
COLUMNS = Check(lambda v: TEXTS.fits(v) and len(v) > 1 and len(set(v)) == len(v), "a list of columns, each once")


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings(OwnRowsSettings):
    """The settings of `ChoiceTask`."""

    context_columns: Annotated[list[str] | str, Help("Columns of the context; several are joined.")]
    start_column: Annotated[
        str | None, Help("Column whose text begins every choice, such as a question, or `sent2` in SWAG.")
    ] = None
    choices_column: Annotated[str | None, Help("Column of the lists of choices.")] = "choices"
    choice_columns: Annotated[
        Annotated[list[str], COLUMNS] | None, Help("Columns of the choices, one for each, in place of a list.")
    ] = None
    label_column: Annotated[str, Help("Column of the right choice: its number, its letter or its text.")] = "label"
    label_kind: Annotated[
        Literal[None, "number", "letter", "text"], Help("How the right choice is written; null: found in the rows.")
    ] = None
    first_label: Annotated[int, whole(0, 1), Help("The number of the first choice, if labels are numbers.")] = 0


class ChoiceTask(OwnRecordsTask):
    """Find the right one of several choices. Rows may have different numbers of choices."""

    settings = ChoiceSettings
    model_class = "AutoModelForMultipleChoice"
    peft_type: ClassVar[str | None] = None
    formats = ("csv", "tsv", "jsonl", "parquet")
    metrics = ("accuracy",)
    main_metric = "accuracy"
    unknown_id: int | None = None

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        contexts = [cfg.context_columns] if isinstance(cfg.context_columns, str) else cfg.context_columns
        listed = cfg.choice_columns is None
        choices = [cfg.choices_column] if listed else cfg.choice_columns
        self.columns = Columns(
            tuple(contexts),
            cfg.start_column,
            tuple(filter(None, choices)),
            listed,
            cfg.label_column,
            cfg.label_kind,
            cfg.first_label,
        )
        self.most_choices = USUAL_CHOICES if listed else len(choices)
        """The most choices of a row, in all splits that are loaded."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.columns.choices:
            yield "task.choices_column=null needs task.choice_columns=[…], with a column for each choice"
        if not self.columns.context:
            yield "task.context_columns=[] must name at least one column"
        names = [*self.columns.inputs, self.columns.label]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield f"the column '{name}' is named twice in task.context_columns, start_column, choices and label_column"

    # --- rows ---

    def wanted(self) -> tuple[str, ...]:
        return self.columns.inputs

    def checked(self, sources: Sequence[Records], labelled: bool, account: Account, problems: list[str]) -> Part | None:
        return check_choices(sources, self.columns, labelled, account, problems)

    def numbered(self, split: str, part: Part, problems: list[str]) -> pa.Table:
        self.most_choices = max(self.most_choices, pc.max(pc.list_value_length(part.table.column("choices"))).as_py())
        if "label" not in part.table.column_names:
            part.account.notes.append(f"no labels in column '{self.columns.label}': predictions without metrics")
        return part.table

    def keys(self, table: pa.Table) -> pa.Array:
        choices = pc.binary_join(table.column("choices"), "\x1f")
        texts = [part.cast(pa.large_string()) for part in (table.column("context"), table.column("start"), choices)]
        return pc.binary_join_element_wise(*texts, pa.scalar("\x1e", pa.large_string()))

    def note_rows(self, tables: dict[str, pa.Table]) -> None:
        for name, table in tables.items():
            labels = pc.unique(table.column("label")).to_pylist()
            if len(labels) == 1 and len(table) > 1:
                self.accounts[name].notes.append(
                    f"the right choice has the same place in all rows: label {labels[0]}, counted from 0"
                )

    # --- encoding ---

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        """The sequences of each row. Of context and choice, the longer one is cut.

        Returns:
            These columns: input_ids, and token_type_ids if the tokenizer makes them (a list for each choice); labels
            (if the rows have them); length (of the longest sequence); cut (whether a sequence was cut); row.
        """
        room = processor.num_special_tokens_to_add(pair=True) + 2
        if not room <= self.cfg.max_length <= processor.model_max_length:
            raise UserError(
                f"task.max_length={self.cfg.max_length} must be at least {room} (special tokens and one token of each "
                f"text) and at most {processor.model_max_length} (what the model's tokenizer takes)."
            )
        self.unknown_id = unknown_token(processor)
        facts = {
            "format": FORMAT_VERSION,
            "rows": content_hash(rows.data.table),
            **tokenizer_facts(processor),
            "max_length": self.cfg.max_length,
        }
        return cached(
            "choices", facts, lambda file: write_choices(file, rows, processor, self.cfg.max_length, self.num_proc)
        )

    def count_encoded(self, account: Account, split: Split) -> None:
        table = split.encoded.data
        note_unknown(account, table.column("input_ids"), self.unknown_id)
        account.change(f"cut at task.max_length={self.cfg.max_length}", pc.sum(table.column("cut")).as_py() or 0)

    def collate(self, processor: Any, training: bool) -> Collate:
        return ChoiceCollator(processor.pad_token_id, pad_to_multiple_of=self.width_multiple)

    def dummy(self, rows: int, model: Any) -> Batch:
        batch = super().dummy(rows, model)
        shape = rows, self.most_choices, self.cfg.max_length
        wide = {name: batch[name][:, None].expand(shape).contiguous() for name in ("input_ids", "attention_mask")}
        return batch | wide | {"n_choices": torch.full((rows,), self.most_choices)}

    # --- in a step ---

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {key: value for key, value in super().inputs(batch).items() if key != "n_choices"}
        mask = found["attention_mask"]
        # A choice that a row does not have: attention to no token at all would give NaN.
        return found | {"attention_mask": torch.cat([torch.ones_like(mask[..., :1]), mask[..., 1:]], dim=-1)}

    def sequences(self, batch: Mapping[str, Tensor]) -> int:
        return batch["input_ids"].shape[1]

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean over rows of the cross-entropy of the right choice among the choices of its row."""
        return F.cross_entropy(_scores(output, batch), batch["labels"])

    # --- after a step ---

    def outputs(self, output: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """logits: [n, most choices of all rows], -inf for choices that a row does not have."""
        scores = _scores(output, batch).detach()
        scores = F.pad(scores, (0, self.most_choices - scores.shape[1]), value=-torch.inf)
        kept = {"row": batch["row"], "logits": scores}
        return kept | ({"labels": batch["labels"]} if "labels" in batch else {})

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        logits, labels = outputs["logits"], outputs["labels"]
        right = logits.argmax(dim=1) == labels
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": right.double().mean().item()}

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """Number and text of the chosen one, and the probability of each choice."""
        choices, lines = split.rows["choices"][:], []
        for row, shares in zip(outputs["row"].tolist(), outputs["logits"].double().softmax(dim=1), strict=True):
            own = shares[: len(choices[row])]
            best = int(own.argmax())
            probabilities = [round(share, 6) for share in own.tolist()]
            line = {"row": row, "prediction": best + self.columns.first, "choice": choices[row][best]}
            lines.append(line | {"probabilities": probabilities})
        return lines


def _scores(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The score of each choice, [n, choices]; -inf for choices that a row does not have."""
    logits = full_precision(output.logits)
    missing = torch.arange(logits.shape[1], device=logits.device) >= batch["n_choices"][:, None]
    return logits.masked_fill(missing, -torch.inf)
