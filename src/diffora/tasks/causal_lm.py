"""Language modelling with a decoder: instructions, chats and plain text; loss and perplexity of the next token.

The loss counts the tokens of the assistant's turns (or every token) and averages over tokens, not over rows. Training
rows can be packed: several conversations share a row. Each has its own positions from 0 and there is no attention mask;
by these positions transformers keeps them apart. Validation rows are not packed, so each conversation has its own loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from diffora.errors import UserError
from diffora.settings.checks import LENGTH, PATH, ROWS, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks.account import Account, note_overlap
from diffora.tasks.base import Batch, Collate, Outputs, Rows, Split, Task
from diffora.tasks.chat.batches import ChatCollator
from diffora.tasks.chat.conversations import cut_validation, read, read_file, row_keys, rows_hash
from diffora.tasks.chat.loss import token_losses
from diffora.tasks.chat.packing import pack
from diffora.tasks.chat.tokens import encode
from diffora.tasks.ignored import IGNORED
from diffora.tasks.sources.files import check_folder, find_file, has_validation
from diffora.tasks.sources.hub import hub_splits
from diffora.tasks.sources.tables import joint_hash, subset


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(TaskSettings):
    """What every task for a language model has."""

    max_length: Annotated[int, whole(4, LENGTH), Help("Length at which rows are cut.", "tokens")]
    packing: Annotated[
        bool, Help("Put several conversations into one training row, each with attention to itself only.")
    ]
    train_on: Annotated[
        Literal["completion", "all"], Help("Tokens to learn: the assistant's turns (`completion`), or all.")
    ]


@dataclass(frozen=True, kw_only=True)
class CausalLMSettings(LanguageSettings):
    """The settings of `CausalLMTask`."""

    hub: Annotated[str, Help("Data set on the hub.")]
    hub_config: Annotated[str | None, Help("Configuration of that data set, if it has several.")] = None
    train_split: Annotated[str, Help("Name of the training split on the hub.")]
    validation_split: Annotated[
        str | None, Help("Name of the validation split on the hub; null: `validation_rows` of the training rows.")
    ] = None
    path: Annotated[
        Annotated[str, PATH] | None,
        Help("Folder with train and, if there is one, validation as .jsonl or .parquet; null: the hub."),
    ] = None
    validation_rows: Annotated[
        int, whole(2, ROWS), Help("Training rows to validate on if there is no validation split.", "rows")
    ]


class CausalLMTask(Task):
    """Train a decoder with its pretrained language-model head on conversations or plain text, from the hub or files."""

    settings: ClassVar[type[TaskSettings]] = CausalLMSettings
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    trains_head: bool = False
    pretrained_head: ClassVar[bool] = True
    maximise: ClassVar[bool] = False
    padding: ClassVar = {**Task.padding, "labels": IGNORED, "position_ids": 0}  # position 0 begins a new sequence
    usage = """
To generate, write the conversation as in training:
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`. To continue training, load with
`is_trainable=True`. The modules have different ranks; for servers that need the same rank everywhere, merge first:
`model.merge_and_unload().save_pretrained(folder)`.
"""
    test_splits = ()  # a test split of conversations has its answers, so it is for evaluate.py

    metrics = ("perplexity",)
    main_metric = "perplexity"

    def unit_of(self, metric: str) -> str:
        return "perplexity"

    # --- before training ---

    def load(self) -> Rows:
        tables, source = self.tables()
        train, validation = tables["train"], tables.get("validation")
        accounts = self.accounts
        if validation is None:
            train, validation = cut_validation(train, self.cfg.validation_rows)
            accounts["train"].drop(f"taken for validation, task.validation_rows={len(validation)}", len(validation))
            accounts["validation"] = Account(len(validation))
        train = subset(train, self.cfg.max_train_rows, accounts["train"])
        note_overlap(accounts, {"train": row_keys(train), "validation": row_keys(validation)})
        return Rows(
            datasets.Dataset(train),
            {"validation": datasets.Dataset(validation)},
            joint_hash(map(rows_hash, (train, validation))),
            source,
        )

    def tables(self) -> tuple[dict[str, pa.Table], str]:
        """(checked tables "train" and, if the source has it, "validation"; the source in words)."""
        c = self.cfg
        if c.path is None:
            names = {"train": c.train_split} | ({"validation": c.validation_split} if c.validation_split else {})
            return self._from_hub(names), c.hub
        folder = self._folder()
        there = has_validation(folder, ("jsonl", "parquet"))
        return self._from_files(folder, ("train", "validation") if there else ("train",)), c.path

    def load_split(self, split: str) -> datasets.Dataset:
        if split == "validation":
            return self.load().validation["validation"]
        if self.cfg.path is None:
            return datasets.Dataset(self._from_hub({split: split})[split])
        return datasets.Dataset(self._from_files(self._folder(), (split,))[split])

    def _folder(self) -> Path:
        folder = Path(self.cfg.path)
        check_folder(folder, "train and, if there is one, validation as .jsonl or .parquet")
        return folder

    def _new_account(self, split: str) -> Account:
        self.accounts[split] = Account()
        return self.accounts[split]

    def _from_hub(self, names: dict[str, str]) -> dict[str, pa.Table]:
        c = self.cfg
        files = "<folder with train and validation as .jsonl or .parquet>"
        found = hub_splits(c.name, c.hub, c.hub_config, list(names.values()), files)
        problems: list[str] = []
        tables = {
            ours: read(enumerate(found[theirs], start=1), f"{c.hub} {theirs}", problems, self._new_account(ours))
            for ours, theirs in names.items()
        }
        if problems:
            raise UserError(problems)
        return tables

    def _from_files(self, folder: Path, splits: Sequence[str]) -> dict[str, pa.Table]:
        problems: list[str] = []
        tables: dict[str, pa.Table] = {}
        for split in splits:
            names = [f"{split}.jsonl", f"{split}.parquet", f"{split}-00000-of-00001.parquet"]
            if (file := find_file(folder, split, names, problems)) is not None:
                tables[split] = read_file(file, problems, self._new_account(split))
        if problems:
            raise UserError(problems)
        return tables

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        """Token ids, and which of them the loss counts.

        Columns: input_ids and counted (lists; 1 for a token that counts), length, row, example; begun and cut (how many
        source rows begin here, and how many of them are cut). Packed rows also have segments, the lengths of the
        conversations in the row. The first token of a sequence never counts, because nothing precedes it.
        """
        encoded = encode(rows, processor, self.cfg.max_length, self.cfg.train_on, self.num_proc)
        if len(encoded) == 0:
            raise UserError(
                f"none of the {len(rows)} rows has anything to learn within task.max_length={self.cfg.max_length}: "
                + (
                    "no turn of the assistant begins within it"
                    if self.cfg.train_on == "completion"
                    else "all are empty"
                )
            )
        return pack(encoded, self.cfg.max_length) if training and self.cfg.packing else encoded

    def count_encoded(self, account: Account, split: Split) -> None:
        c, table = self.cfg, split.encoded.data
        begun, cut = (pc.sum(table.column(name)).as_py() or 0 for name in ("begun", "cut"))
        nothing = " (no turn of the assistant)" if c.train_on == "completion" else ""
        account.drop(f"nothing to learn within task.max_length={c.max_length}{nothing}", len(split.rows) - begun)
        account.change(f"cut at task.max_length={c.max_length}", cut)

    def collate(self, processor: Any, training: bool) -> Collate:
        return ChatCollator(processor.pad_token_id or 0, pad_to_multiple_of=8 if torch.cuda.is_available() else 1)

    def labelled(self, split: Split) -> bool:
        """Always true: the next token is the label."""
        return True

    def check(self, model: nn.Module) -> None:
        """Raise a UserError if packing is on and the model does not keep packed conversations apart.

        The test runs the model: the logits of a sequence must not depend on the sequence packed before it.
        """
        if not self.cfg.packing:
            return
        ids = torch.tensor([[1, 2, 3, 4, 9, 10, 11, 12], [5, 6, 7, 8, 9, 10, 11, 12]])
        positions = torch.arange(4).repeat(2, 2)
        device = next(model.parameters()).device
        was_training = model.training
        with torch.no_grad():
            logits = model.eval()(input_ids=ids.to(device), position_ids=positions.to(device)).logits[:, 4:].float()
        model.train(was_training)
        if not torch.allclose(logits[0], logits[1], rtol=0, atol=1e-3 * float(logits.std())):
            raise UserError(
                f"task.packing=true: {type(model).__name__} lets packed conversations see each other; "
                "use task.packing=false"
            )

    def dummy(self, rows: int, model: Any) -> Batch:
        shape = rows, int(self.cfg.max_length)
        positions = {"position_ids": torch.arange(shape[1]).expand(shape)}
        mask = {"attention_mask": torch.ones(shape, dtype=torch.long)}
        ids = torch.zeros(shape, dtype=torch.long)
        return {"input_ids": ids, "labels": ids, "row": torch.arange(rows)} | (positions if self.cfg.packing else mask)

    # --- in a step ---

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean over the tokens that count; 0 if no token of the batch counts."""
        losses, counted = token_losses(output.logits, batch["labels"])
        return losses.sum() / counted.sum().clamp(min=1)

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float((batch["labels"][:, 1:] != IGNORED).sum())

    # --- after a step ---

    def outputs(self, output: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """Sum of losses and number of tokens that count, [n] each."""
        with torch.no_grad():
            losses, counted = token_losses(output.logits.detach(), batch["labels"])
        return {"row": batch["row"], "loss": losses.sum(1), "tokens": counted.sum(1)}

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        """Mean loss over the tokens of all given rows, and its exponential."""
        loss = float(outputs["loss"].double().sum() / outputs["tokens"].sum().clamp(min=1))
        return {"loss": loss, "perplexity": exponential(loss)}

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """Loss and perplexity of each example; null if no token of it counts.

        ``number`` is the row number at the source, from 1, which differs from ``row`` if rows were left out.
        """
        examples = torch.from_numpy(split.encoded.data.column("example").to_numpy().astype(np.int64))[outputs["row"]]
        sums = torch.zeros(2, len(split.rows), dtype=torch.double)
        sums[0].index_add_(0, examples, outputs["loss"].double())
        sums[1].index_add_(0, examples, outputs["tokens"].double())
        lines, numbers = [], split.rows["number"][:]
        for row, (loss, tokens) in enumerate(sums.T.tolist()):
            mean = loss / tokens if tokens else None
            perplexity = None if mean is None else exponential(mean)
            line = {"row": row, "number": numbers[row], "tokens": int(tokens), "loss": mean, "perplexity": perplexity}
            lines.append(line)
        return lines


def exponential(loss: float) -> float:
    """The perplexity of a mean loss; infinite where it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
