"""Language modelling with a decoder: instructions, chats and plain text. Loss of the next token, or generated answers.

The loss counts the tokens of the assistant's turns (or every token) and averages over tokens, not over rows. Training
rows can be packed: several conversations share a row. Each has its own positions from 0 and there is no attention mask;
by these positions transformers keeps them apart. Validation rows are not packed, so each conversation has its own loss.

With ``task.score=generation``, the model also writes the last answer of each validation row. A pattern finds the answer
in what it wrote and in the reference, and the metric is the share of rows in which both are the same.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from diffora.backbones.compatibility import longest_input
from diffora.errors import UserError
from diffora.settings.sections import TaskSettings
from diffora.tasks.account import Account, note_overlap
from diffora.tasks.base import Batch, Collate, Outputs, Rows, Split, Task
from diffora.tasks.chat.answers import extract, pattern_problem, same_answer
from diffora.tasks.chat.batches import ChatCollator
from diffora.tasks.chat.conversations import characters, cut_validation, row_keys, rows_hash
from diffora.tasks.chat.dates import DATE, has_clock
from diffora.tasks.chat.held_out import encode_texts, read_texts
from diffora.tasks.chat.loss import token_losses
from diffora.tasks.chat.packing import pack
from diffora.tasks.chat.prompts import reference, reference_problem, shape_problem, with_prompts
from diffora.tasks.chat.settings import CausalLMSettings
from diffora.tasks.chat.source import file_tables, hub_tables
from diffora.tasks.chat.tokens import PLACE, encode, end_of_turn
from diffora.tasks.generation import before_end, evenly, generate, with_others
from diffora.tasks.ignored import IGNORED
from diffora.tasks.sources.files import check_folder, has_validation
from diffora.tasks.sources.tables import content_hash, joint_hash, subset


class CausalLMTask(Task):
    """Train a decoder with its pretrained language-model head on conversations or plain text, from the hub or files."""

    settings: ClassVar[type[TaskSettings]] = CausalLMSettings
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    trains_head: bool = False
    pretrained_head: ClassVar[bool] = True
    maximise: ClassVar[bool] = False
    # Position 0 begins a new sequence.
    padding: ClassVar = {**Task.padding, "labels": IGNORED, "position_ids": 0, "real": 0}
    targets: ClassVar[tuple[str, ...]] = ("labels", "real")
    usage = """
To generate, write the conversation as in training:
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`. To continue training, load with
`is_trainable=True`. The modules have different ranks; for servers that need the same rank everywhere, merge first:
`model.merge_and_unload().save_pretrained(folder)`.
"""
    test_splits: tuple[str, ...] = ()

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.generates = cfg.score == "generation"
        self.metrics = ("exact_match", "perplexity") if self.generates else ("perplexity",)
        self.main_metric = self.metrics[0]
        self.maximise = self.generates  # type: ignore[misc]
        self._tokenizer: Any = None
        self._texts: list[str] = []
        self._ends: tuple[int | None, ...] = ()
        self._dated = False  # whether the chat template asks for the date
        path = getattr(cfg, "path", None)
        has_test = getattr(cfg, "test_split", None) if path is None else any(Path(path).expanduser().glob("test[.-]*"))
        self.test_splits = ("test",) if has_test else ()

    def unit_of(self, metric: str) -> str:
        return "perplexity" if metric == "perplexity" else "fraction"

    def higher_is_better(self, metric: str) -> bool:
        return metric != "perplexity"

    # --- before training ---

    def problems(self) -> Iterator[str]:
        c = self.cfg
        if c.prompt is not None and c.prompt.count(PLACE) != 1:
            yield f"task.prompt={c.prompt!r} must have {PLACE} in it once, where the user's text stands"
        if c.generation.answer is not None and (problem := pattern_problem(c.generation.answer)) is not None:
            yield f"task.generation.answer={c.generation.answer!r} {problem}"
        if getattr(c, "validation_hub", None) is not None and c.path is None and c.validation_split is None:
            yield f"task.validation_hub={c.validation_hub} needs task.validation_split, the name of its split"

    def load(self) -> Rows:
        train, validation, source = self._divided()
        self._texts = self.read_texts()
        hashes = [*map(rows_hash, (train, validation))]
        if self._texts:
            hashes.append(content_hash(pa.table({"text": self._texts})))
        rows = {"validation": datasets.Dataset(validation)}
        return Rows(datasets.Dataset(train), rows, joint_hash(hashes), source)

    def _divided(self) -> tuple[pa.Table, pa.Table, str]:
        """(training rows, validation rows, the source in words)."""
        tables, source = self.tables()
        train, validation = tables["train"], tables.get("validation")
        accounts = self.accounts
        if validation is None:
            wanted = self.cfg.validation_rows
            train, validation = cut_validation(train, wanted)
            accounts["train"].drop(f"taken for validation, task.validation_rows={wanted}", len(validation))
            accounts["validation"] = Account(len(validation))
            if len(validation) < wanted:
                accounts["validation"].notes.append(
                    f"{len(validation)} rows instead of task.validation_rows={wanted}: equal prompts stay together"
                )
        self.check_rows({f"{source} train": train}, {f"{source} validation": validation})
        train = subset(train, self.cfg.max_train_rows, accounts["train"])
        parts = {"train": train, "validation": validation}
        note_overlap(accounts, {name: row_keys(table, last_turn=False) for name, table in parts.items()})
        return train, validation, source

    def read_texts(self) -> list[str]:
        """The texts whose loss shows what the model forgets; none if the settings name none."""
        return read_texts(self.cfg.forgetting)

    def check_rows(self, train: Mapping[str, pa.Table], evaluated: Mapping[str, pa.Table]) -> None:
        """Check that rows suit ``task.prompt``, and that rows to evaluate have answers if these are compared.

        Args:
            train: tables of training rows, by their source.
            evaluated: tables of other rows, by their source.

        Raises:
            UserError: names the first row of each fault.
        """
        c = self.cfg
        found = [shape_problem(table, source, c.prompt) for source, table in {**train, **evaluated}.items()]
        if self.generates:
            found += [reference_problem(table, source, c.generation.answer) for source, table in evaluated.items()]
        if problems := [problem for problem in found if problem is not None]:
            raise UserError(problems)

    def tables(self) -> tuple[dict[str, pa.Table], str]:
        """(checked tables "train" and, if the source has it, "validation"; the source in words)."""
        c = self.cfg
        if c.path is None:
            names = {"train": c.train_split} | ({"validation": c.validation_split} if c.validation_split else {})
            tables, source = hub_tables(c, names, self.accounts), c.hub
        else:
            folder = self._folder()
            own = has_validation(folder, ("jsonl", "parquet"))
            splits = ("train", "validation") if own else ("train",)
            tables, source = file_tables(folder, splits, self.accounts), c.path
        if c.max_characters is not None:
            tables["train"] = self._short(tables["train"])
        if "validation" in tables:
            tables["validation"] = self._fewer(tables["validation"])
        return tables, source

    def _short(self, train: pa.Table) -> pa.Table:
        """The training rows of at most ``task.max_characters``."""
        most, lengths = self.cfg.max_characters, characters(train)
        short = lengths <= most
        if len(short) and not short.any():
            raise UserError(
                f"task.max_characters={most} leaves out all {len(short):,} training rows: the shortest has "
                f"{lengths.min():,} characters"
            )
        self.accounts["train"].drop(f"more than task.max_characters={most}", int((~short).sum()))
        return train.filter(pa.array(short))

    def _fewer(self, validation: pa.Table) -> pa.Table:
        """At most ``task.max_validation_rows`` of the validation split."""
        key = "task.max_validation_rows"
        return subset(validation, self.cfg.max_validation_rows, self.accounts["validation"], key)

    def drawn_from_training(self, split: str) -> bool:
        c = self.cfg
        if split != "validation" or c.path is None:
            return split == "validation" and c.validation_split is None
        return not has_validation(self._folder(), ("jsonl", "parquet"))

    def load_split(self, split: str) -> datasets.Dataset:
        """Load "train" (the rows that a run trains on), "validation", or another split of the folder or the hub."""
        if split == "train" or self.drawn_from_training(split):
            train, validation, _ = self._divided()
            return datasets.Dataset(train if split == "train" else validation)
        c = self.cfg
        if c.path is None:
            name = {"validation": c.validation_split, "test": c.test_split}.get(split) or split
            table, source = hub_tables(c, {split: name}, self.accounts)[split], c.validation_hub or c.hub
        else:
            table, source = file_tables(self._folder(), (split,), self.accounts)[split], c.path
        if split == "validation":
            table = self._fewer(table)
        source = f"{source} {split}"
        self.check_rows({}, {source: table})
        return datasets.Dataset(table)

    def _folder(self) -> Path:
        folder = Path(self.cfg.path)
        check_folder(folder, "train and, if there is one, validation as .jsonl or .parquet")
        return folder

    def row_keys(self, rows: datasets.Dataset) -> pa.Array:
        return row_keys(rows.data.table, last_turn=False)

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        """Token ids, and which of them the loss counts.

        Columns: input_ids and counted (lists; 1 for a token that counts), length, row, example; begun and cut (how many
        source rows begin here, and how many of them are cut). Packed rows also have segments, the lengths of the
        conversations in the row. The first token of a sequence never counts, because nothing precedes it.
        """
        c = self.cfg
        self._dated = c.prompt is None and has_clock(processor)
        encoded = encode(rows, processor, c.max_length, c.train_on, self.num_proc, c.prompt)
        if len(encoded) == 0:
            raise UserError(
                f"none of the {len(rows)} rows has anything to learn within task.max_length={self.cfg.max_length}: "
                + (
                    "no turn of the assistant begins within it"
                    if self.cfg.train_on == "completion"
                    else "all are empty"
                )
            )
        if training:
            # Equal prompts go into one row, or into rows that belong together: a search has them in one of its parts.
            keys = pc.dictionary_encode(self.row_keys(rows)).indices.to_numpy()
            return pack(encoded, c.max_length, keys) if c.packing else encoded
        if self.generates:
            chosen = evenly(len(encoded), c.generation.rows)
            return with_prompts(encoded, rows, processor, c.prompt, c.max_length, chosen)
        return encoded

    def count_encoded(self, account: Account, split: Split) -> None:
        c, table = self.cfg, split.encoded.data
        begun, cut = (pc.sum(table.column(name)).as_py() or 0 for name in ("begun", "cut"))
        nothing = " (no turn of the assistant)" if c.train_on == "completion" else ""
        account.drop(f"nothing to learn within task.max_length={c.max_length}{nothing}", len(split.rows) - begun)
        account.change(f"cut at task.max_length={c.max_length}", cut)
        if self._dated:
            account.notes.append(
                f"the chat template writes today's date; here it is always {DATE:%d %b %Y}, in training and generation"
            )
        joint = pc.sum(table.column("joint")).as_py() or 0
        if joint and "prompt_differs" not in table.column_names:
            account.notes.append(
                f"in {joint:,} of {len(split.rows):,} rows, the end of the prompt and the start of the answer are one "
                "token, which counts; a model that is asked later reads other tokens. End task.prompt without a space, "
                "or with a new line"
            )
        if "prompt_cut" in table.column_names:
            account.change(f"prompt cut at task.max_length={c.max_length}", pc.sum(table.column("prompt_cut")).as_py())
            if n := pc.sum(table.column("prompt_differs")).as_py():
                account.notes.append(
                    f"{n:,} of {len(table):,} prompts have other tokens than in training, because their end and the "
                    "start of the answer are one token; end task.prompt without a space, or with a new line"
                )
            if (n := pc.sum(table.column("generated")).as_py()) < len(table):
                account.notes.append(f"after training, answers are generated for {n:,} of {len(table):,} rows")

    def collate(self, processor: Any, training: bool) -> Collate:
        self._tokenizer = processor  # decodes what was generated
        self._ends = processor.eos_token_id, end_of_turn(processor, self.cfg.prompt)
        return ChatCollator(processor.pad_token_id or 0, pad_to_multiple_of=self.width_multiple)

    def labelled(self, split: Split) -> bool:
        """Always true: the next token is the label."""
        return True

    def check(self, model: nn.Module) -> None:
        """Raise a UserError if the model does not suit packing, or cannot read a prompt and its generated answer.

        Packing is tested by running the model: the logits of a sequence must not depend on the one packed before it.
        """
        c, most = self.cfg, longest_input(model)
        if self.generates and most is not None and c.max_length + c.generation.max_new_tokens > most:
            raise UserError(
                f"task.max_length={c.max_length} and task.generation.max_new_tokens={c.generation.max_new_tokens} are "
                f"together more than the {most} tokens that this backbone reads"
            )
        if not c.packing:
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
        positions = {"position_ids": torch.arange(shape[1]).expand(shape), "real": torch.ones(shape, dtype=torch.long)}
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

    def evaluate(self, model: nn.Module, batch: Batch, final: bool) -> Outputs:
        """`outputs`; for rows with a prompt also ``generated`` [n] and ``text`` [n, max_new_tokens], padded token ids.

        A final evaluation generates for all rows, a validation while training for those that `encode` chose.
        """
        found = self.outputs(model(**self.inputs(batch)), batch)
        if "prompt_ids" not in batch:
            return found
        chosen = torch.ones_like(batch["generated"]) if final else batch["generated"]
        most, pad = self.cfg.generation.max_new_tokens, self._tokenizer.pad_token_id or 0
        text = torch.full((len(chosen), most), pad, dtype=torch.long, device=chosen.device)
        wanted = with_others(model, chosen)
        if wanted.any():
            prompts = {"input_ids": batch["prompt_ids"][wanted], "attention_mask": batch["prompt_mask"][wanted]}
            text[wanted] = generate(model, prompts, most, pad, self._ends)
        return found | {"generated": chosen, "text": text}

    @property
    def single_pass(self) -> bool:
        return not self.generates

    def texts_split(self) -> Split | None:
        if not self._texts:
            return None
        rows = datasets.Dataset.from_dict({"text": self._texts})
        return Split(rows, encode_texts(self._texts, self._tokenizer, self.cfg.forgetting.max_length))

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        """Mean loss over the tokens of all given rows, and its exponential; share of right generated answers."""
        loss = float(outputs["loss"].double().sum() / outputs["tokens"].sum().clamp(min=1))
        found = {"loss": loss, "perplexity": exponential(loss)}
        if "text" in outputs:
            right = [line["correct"] for line in self._answers(outputs, split) if line["generated"]]
            found["exact_match"] = sum(right) / len(right) if right else math.nan
        return found

    def _answers(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """For each row of the outputs the generated text, its answer, the expected one, and whether they are equal."""
        pattern = self.cfg.generation.answer
        tokens = [before_end(text, self._ends) for text in outputs["text"].tolist()]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        examples = split.encoded.data.column("example").to_numpy()[outputs["row"].numpy()]
        messages = split.rows.data.column("messages")
        found = []
        for example, text, generated in zip(examples.tolist(), texts, outputs["generated"].tolist(), strict=True):
            answer, expected = extract(text, pattern), extract(reference(messages[example].as_py()), pattern)
            line = {"example": example, "generated": generated, "prediction": text.strip()}
            found.append(line | {"answer": answer, "expected": expected, "correct": same_answer(answer, expected)})
        return found

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """Loss and perplexity of each example, null if no token of it counts; and its generated answer, if any.

        ``number`` is the row number at the source, from 1, which differs from ``row`` if rows were left out.
        """
        examples = torch.from_numpy(split.encoded.data.column("example").to_numpy().astype(np.int64))[outputs["row"]]
        sums = torch.zeros(2, len(split.rows), dtype=torch.double)
        sums[0].index_add_(0, examples, outputs["loss"].double())
        sums[1].index_add_(0, examples, outputs["tokens"].double())
        answers = {line["example"]: line for line in self._answers(outputs, split)} if "text" in outputs else {}
        lines, numbers = [], split.rows["number"][:]
        for row, (loss, tokens) in enumerate(sums.T.tolist()):
            mean = loss / tokens if tokens else None
            perplexity = None if mean is None else exponential(mean)
            line = {"row": row, "number": numbers[row], "tokens": int(tokens), "loss": mean, "perplexity": perplexity}
            said = answers.get(row, {})
            lines.append(line | {key: said[key] for key in ("prediction", "answer", "expected", "correct") if said})
        return lines


def exponential(loss: float) -> float:
    """The perplexity of a mean loss; infinite where it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
