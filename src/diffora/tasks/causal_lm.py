"""Language modelling with a decoder: instructions, chats and plain text; loss and perplexity of the next token.

The loss counts the assistant's turns (or every token), the mean being over tokens, not over rows. Training rows can be
packed: several conversations in one row, each with positions of its own from 0 and without an attention mask, by which
transformers keeps them apart. Validation is not packed, so that each conversation has a loss of its own.
"""

import bisect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffora.errors import UserError
from diffora.settings.checks import LENGTH, PATH, ROWS, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks import conversations
from diffora.tasks.account import Account, note_overlap
from diffora.tasks.base import Batch, Collate, Outputs, Rows, Split, Task, full_precision
from diffora.tasks.cache import arrow_writer, cached, tokenizer_facts
from diffora.tasks.conversations import Turn
from diffora.tasks.sources import check_folder, find_file, first_line, hub_splits, joint_hash, more, subset

FORMAT_VERSION = 2  # raise it when the content of a cache file changes its meaning
ROWS_AT_ONCE = 1000
PROGRESS_FROM_ROWS = 20_000
IGNORED = -100  # torch's mark for a position without a label
LOGITS_AT_ONCE = 1 << 24  # entries of the logits that are in float32 at a time: 64 MiB

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""How a chat is written for a tokenizer without a chat template: headings, and the end token after each answer."""

LIKE_VALIDATION = re.compile(r"(val|valid|validation|dev|eval)[._-].*", re.IGNORECASE)
"""What a file of validation rows is called by others."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
    """Conversations or plain text from the hub or from files, for a decoder with its pretrained language-model head."""

    settings: ClassVar[type[TaskSettings]] = CausalLMSettings
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    trains_head: bool = False
    pretrained_head: ClassVar[bool] = True
    maximise: ClassVar[bool] = False
    padding: ClassVar = {**Task.padding, "labels": IGNORED, "position_ids": 0}  # a 0 begins a sequence of its own
    usage = """
To generate, write the conversation as in training:
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`. To train on, load with `is_trainable=True`. The
modules differ in rank; for servers that want one for all, merge first:
`model.merge_and_unload().save_pretrained(folder)`.
"""
    test_splits = ()  # a test split of conversations is for evaluate.py: it has its answers

    metrics = ("perplexity",)
    main_metric = "perplexity"

    # --- before training ---

    def load(self) -> Rows:
        tables, source = self.tables()
        train, validation = tables["train"], tables.get("validation")
        accounts = self.accounts
        if validation is None:
            train, validation = conversations.cut_validation(train, self.cfg.validation_rows)
            accounts["train"].drop(f"taken for validation, task.validation_rows={len(validation)}", len(validation))
            accounts["validation"] = Account(len(validation))
        train = subset(train, self.cfg.max_train_rows, accounts["train"])
        note_overlap(
            accounts, {"train": conversations.row_keys(train), "validation": conversations.row_keys(validation)}
        )
        return Rows(
            datasets.Dataset(train),
            {"validation": datasets.Dataset(validation)},
            joint_hash(map(conversations.rows_hash, (train, validation))),
            source,
        )

    def tables(self) -> tuple[dict[str, pa.Table], str]:
        """(checked ``train`` rows, and ``validation`` rows where the source has them; the source in words)."""
        c = self.cfg
        if c.path is None:
            names = {"train": c.train_split} | ({"validation": c.validation_split} if c.validation_split else {})
            return self._from_hub(names), c.hub
        folder = self._folder()
        there = any(file.stem.split("-")[0] == "validation" for file in folder.iterdir())
        if not there and (others := sorted(f.name for f in folder.iterdir() if LIKE_VALIDATION.match(f.name))):
            raise UserError(
                f"{folder}: {', '.join(others)} is read by nobody under this name; call it validation.jsonl or "
                f"validation.parquet, or move it elsewhere to have validation rows cut from the training rows"
            )
        return self._from_files(folder, ("train", "validation") if there else ("train",)), c.path

    def load_split(self, split: str) -> datasets.Dataset:
        if split == "validation":
            return self.load().validation["validation"]
        if self.cfg.path is None:
            return datasets.Dataset(self._from_hub({split: split})[split])
        return datasets.Dataset(self._from_files(self._folder(), (split,))[split])

    def _folder(self) -> Path:
        folder = Path(self.cfg.path)
        check_folder(folder, "train and, where there is one, validation as .jsonl or .parquet")
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
            ours: conversations.read(
                enumerate(found[theirs], start=1), f"{c.hub} {theirs}", problems, self._new_account(ours)
            )
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
                tables[split] = conversations.read_file(file, problems, self._new_account(split))
        if problems:
            raise UserError(problems)
        return tables

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        """Token ids, and which of them the loss counts.

        Columns: input_ids and counted (lists; 1 for a label), length, row, example; begun and cut, how many rows of the
        source begin here and how many of them are cut; packed also segments, the lengths of the conversations in a row.
        The first token of a sequence never counts, since nothing precedes it.
        """
        encoded = encode(rows, processor, self.cfg.max_length, self.cfg.train_on)
        if len(encoded) == 0:
            raise UserError(
                f"none of the {len(rows)} rows has anything to learn within task.max_length={self.cfg.max_length}: "
                + ("the assistant says nothing, or beyond it" if self.cfg.train_on == "completion" else "all are empty")
            )
        return pack(encoded, self.cfg.max_length) if training and self.cfg.packing else encoded

    def count_encoded(self, account: Account, split: Split) -> None:
        c, table = self.cfg, split.encoded.data
        begun, cut = (pc.sum(table.column(name)).as_py() or 0 for name in ("begun", "cut"))
        nothing = " (no turn of the assistant)" if c.train_on == "completion" else ""
        account.drop(f"nothing to learn within task.max_length={c.max_length}{nothing}", len(split.rows) - begun)
        account.change(f"cut at task.max_length={c.max_length}", cut)

    def collate(self, processor: Any, training: bool) -> Collate:
        return Collator(processor.pad_token_id or 0, pad_to_multiple_of=8 if torch.cuda.is_available() else 1)

    def labelled(self, split: Split) -> bool:
        """Always: what is said next is the label."""
        return True

    def check(self, model: nn.Module) -> None:
        """Refuse to pack for a model that does not keep packed conversations apart.

        It is asked: what a sequence is given must not depend on the one packed before it.
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
        """Mean over the tokens that count. In a batch of which none counts it is 0."""
        losses, counted = token_losses(output.logits, batch["labels"])
        return losses.sum() / counted.sum().clamp(min=1)

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float((batch["labels"][:, 1:] != IGNORED).sum())

    # --- after a step ---

    def outputs(self, output: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """Sum of losses and number of tokens that count, for each row."""
        with torch.no_grad():
            losses, counted = token_losses(output.logits.detach(), batch["labels"])
        return {"row": batch["row"], "loss": losses.sum(1), "tokens": counted.sum(1)}

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        """Mean loss over the tokens of all given rows, and its exponential."""
        loss = float(outputs["loss"].double().sum() / outputs["tokens"].sum().clamp(min=1))
        return {"loss": loss, "perplexity": _exp(loss)}

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """Loss and perplexity of each example; null where it has no token that counts.

        ``number`` is that of the row at its source, from 1: rows without text are left out.
        """
        examples = torch.from_numpy(split.encoded.data.column("example").to_numpy().astype(np.int64))[outputs["row"]]
        sums = torch.zeros(2, len(split.rows), dtype=torch.double)
        sums[0].index_add_(0, examples, outputs["loss"].double())
        sums[1].index_add_(0, examples, outputs["tokens"].double())
        lines, numbers = [], split.rows["number"][:]
        for row, (loss, tokens) in enumerate(sums.T.tolist()):
            mean = loss / tokens if tokens else None
            perplexity = None if mean is None else _exp(mean)
            line = {"row": row, "number": numbers[row], "tokens": int(tokens), "loss": mean, "perplexity": perplexity}
            lines.append(line)
        return lines


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


# --- from rows to tokens ---


def encode(rows: datasets.Dataset, tokenizer: Any, max_length: int, train_on: str) -> datasets.Dataset:
    """One encoded row for each conversation, cut at ``max_length``; for plain text one for each window of that length.

    Rows without a token that counts are left out.

    Raises:
        UserError: the tokenizer cannot say where its tokens stand, or its template does not suit the conversations.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: it cannot say where its tokens stand in a text"
        )
    if max_length > tokenizer.model_max_length:
        raise UserError(
            f"task.max_length={max_length} is more than the {tokenizer.model_max_length} tokens that this model reads"
        )
    facts = {
        "format": FORMAT_VERSION,
        "rows": conversations.rows_hash(rows.data.table),
        **tokenizer_facts(tokenizer),
        "template": tokenizer.chat_template or PLAIN_TEMPLATE,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "max_length": max_length,
        "train_on": train_on,
    }
    return cached("causal_lm", facts, lambda file: _write(file, rows, tokenizer, max_length, train_on))


def _write(file: Path, rows: datasets.Dataset, tokenizer: Any, max_length: int, train_on: str) -> None:
    lists, number = pa.list_(pa.int32()), pa.int32()
    schema = {"input_ids": lists, "counted": pa.list_(pa.int8()), "length": number, "row": number, "example": number}
    schema |= {"begun": number, "cut": number}
    faults: list[str] = []
    done = 0
    with (
        arrow_writer(file, pa.schema(schema)) as append,
        tqdm(total=len(rows), desc="tokenise", unit="row", disable=len(rows) < PROGRESS_FROM_ROWS) as bar,
    ):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            columns: dict[str, list[Any]] = {name: [] for name in schema}
            for i, (turns, text, number_) in enumerate(
                zip(part["messages"], part["text"], part["number"], strict=True)
            ):
                try:
                    ids, counted = _chat(turns, tokenizer, train_on) if turns else _text(text, tokenizer)
                except Exception as error:  # a template is a program: it may fail in any way
                    faults.append(f"row {number_}: {first_line(error)}")
                    continue
                # What follows the first window of a conversation has lost its beginning; plain text goes on anywhere.
                ends = len(ids) if not turns else min(len(ids), max_length)
                kept = len(columns["length"])
                for at in range(0, ends, max_length):
                    window = counted[at : at + max_length].copy()
                    window[0] = 0
                    if window.any():
                        columns["input_ids"].append(ids[at : at + max_length])
                        columns["counted"].append(window)
                        columns["length"].append(len(window))
                        columns["example"].append(start + i)
                        columns["begun"].append(int(len(columns["begun"]) == kept))
                        columns["cut"].append(int(ends < len(ids)))
            columns["row"] = list(range(done, done + len(columns["length"])))
            done += len(columns["length"])
            append(columns)
            bar.update(len(part["text"]))
    if faults:
        raise UserError(
            f"the chat template of this model's tokenizer cannot be used for {faults[0]}{more(len(faults))}. Try other "
            "data, another model, or task.train_on=all"
        )


def _text(text: str, tokenizer: Any) -> tuple[list[int], np.ndarray]:
    """Token ids of plain text with the tokenizer's special tokens and the end token, all of which count."""
    ids = list(tokenizer(text).input_ids)
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return ids, np.ones(len(ids), dtype=np.int8)


def _chat(turns: list[Turn], tokenizer: Any, train_on: str) -> tuple[list[int], np.ndarray]:
    """Token ids of a conversation, written by the tokenizer's template, and which of them count."""
    template = tokenizer.chat_template
    if train_on == "completion" and isinstance(template, str) and GENERATION.search(template):
        # The template itself says which text is the assistant's.
        out = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), np.array(out["assistant_masks"], dtype=np.int8)
    text = render(turns, tokenizer)
    # A template writes the special tokens itself; in front of the plain one the tokenizer puts its own.
    out = tokenizer(text, add_special_tokens=template is None, return_offsets_mapping=True)
    ids, offsets = list(out["input_ids"]), np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    if train_on == "all":
        return ids, np.ones(len(ids), dtype=np.int8)
    counted = np.zeros(len(ids), dtype=np.int8)
    for first, end in spans(turns, text, tokenizer):
        counted[(offsets[:, 0] >= first) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])] = 1
    return ids, counted


def render(turns: list[Turn], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    """A conversation as text, by the tokenizer's chat template or by `PLAIN_TEMPLATE`."""
    text: str = tokenizer.apply_chat_template(
        turns,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,
    )
    return text


def spans(turns: list[Turn], text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where in the rendered ``text`` the assistant speaks: from behind the prompt for an answer to the answer's end.

    The end token belongs to the answer, white space behind it does not. Found by rendering the conversation up to each
    turn: what that gives must be the beginning of the whole.

    Raises:
        ValueError: it is not, since the template writes a turn in another way once others follow.
    """
    found = []
    marks = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = render(turns[:i], tokenizer, add_generation_prompt=True) if i else ""
        upto = text if i + 1 == len(turns) else render(turns[: i + 1], tokenizer)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise ValueError(
                f"turn {i + 1} is written differently when other turns follow it or it is asked for, so that it cannot "
                "be told from the rest"
            )
        end = upto.rstrip()
        found.append((len(before), len(end) if end.endswith(marks) and len(end) > len(before) else len(upto)))
    return found


# --- packing ---


def pack(encoded: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Put encoded rows together into rows of at most ``max_length`` tokens.

    A long text is several full windows and a rest; all of it gets the number of the row in which the rest is, as
    ``example``, so that no example is in two parts of a split.
    """
    facts = {"format": FORMAT_VERSION, "encoded": encoded.data.table.schema.names, "max_length": max_length}
    facts["of"] = [Path(file["filename"]).name for file in encoded.cache_files]
    return cached("packed", facts, lambda file: _write_packed(file, encoded, max_length))


def _write_packed(file: Path, encoded: datasets.Dataset, max_length: int) -> None:
    lists, number = pa.list_(pa.int32()), pa.int32()
    schema = {"input_ids": lists, "counted": pa.list_(pa.int8()), "segments": lists}
    schema |= {"length": number, "row": number, "example": number, "begun": number, "cut": number}
    lengths, examples = (encoded.data.column(name).to_numpy() for name in ("length", "example"))
    packs = best_fit(lengths, max_length)
    home: dict[int, int] = {}
    for members in packs:  # the longest first: full windows are there before the rest of their text, which decides
        home |= dict.fromkeys(examples[members].tolist(), int(examples[members].min()))
    with arrow_writer(file, pa.schema(schema)) as append:
        for start in range(0, len(packs), ROWS_AT_ONCE):
            part = packs[start : start + ROWS_AT_ONCE]
            rows = encoded[np.concatenate(part)]
            ends = np.cumsum([len(members) for members in part])
            columns: dict[str, list[Any]] = {name: [] for name in schema}
            for at, members in enumerate(part):
                own = slice(ends[at] - len(members), ends[at])
                columns["input_ids"].append(np.concatenate(rows["input_ids"][own]))
                columns["counted"].append(np.concatenate(rows["counted"][own]))
                columns["segments"].append(rows["length"][own])
                columns["length"].append(sum(rows["length"][own]))
                columns["row"].append(start + at)
                columns["begun"].append(sum(rows["begun"][own]))
                columns["cut"].append(sum(rows["cut"][own]))
                columns["example"].append(home[int(examples[members[0]])])
            append(columns)


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best-fit decreasing: each item, the longest first, goes where the least space is left behind.

    Args:
        lengths: [n], at most ``capacity`` each.

    Returns:
        The items of each bin, in the order in which they were put there.
    """
    bins: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of `with_space`, sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[item])
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            chosen, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[at]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        bins[chosen].append(item)
        left = space - size
        if left not in with_space:
            with_space[left] = []
            bisect.insort(spaces, left)
        with_space[left].append(chosen)
    return [np.array(members) for members in bins]


# --- batches ---


class Collator:
    """Puts encoded rows together, padded on the right to the longest.

    Packed rows get positions and no attention mask; their padding is one more sequence of its own.

    Args:
        pad_token_id: fills ``input_ids``.
        pad_to_multiple_of: round the padded length up, e.g. to 8 for tensor cores; 1 does not.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Batch:
        """Collate ``encoded[[i, j, …]]``.

        Returns:
            input_ids and labels (`IGNORED` where no label is): long [n, longest]; row: long [n]; and position_ids, or
            attention_mask: long [n, longest].
        """
        n, longest = len(rows["row"]), max(rows["length"])
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = np.full((n, width), self.pad_token_id, dtype=np.int64)
        labels = np.full((n, width), IGNORED, dtype=np.int64)
        positions = np.tile(np.arange(width), (n, 1))
        for i, length in enumerate(rows["length"]):
            ids[i, :length] = rows["input_ids"][i]
            labels[i, :length] = np.where(np.asarray(rows["counted"][i], dtype=bool), ids[i, :length], IGNORED)
            if "segments" in rows:
                sizes = [*rows["segments"][i], width - length]
                positions[i] = np.concatenate([np.arange(size) for size in sizes])
        batch = {"input_ids": ids, "labels": labels, "row": np.asarray(rows["row"], dtype=np.int64)}
        if "segments" in rows:
            batch["position_ids"] = positions
        else:
            batch["attention_mask"] = (positions < np.asarray(rows["length"])[:, None]).astype(np.int64)
        return {name: torch.from_numpy(value) for name, value in batch.items()}


# --- loss ---


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next token.

    Args:
        logits: (n, length, vocabulary), in any precision.
        labels: (n, length), `IGNORED` where there is none; those of the same positions, not shifted.

    Returns:
        (losses in float32 or better, 0 where there is no label; which tokens count), both (n, length); each stands at
        the position before its token.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses: Tensor = _TokenLoss.apply(logits.reshape(-1, logits.shape[-1]), following.reshape(-1))
    return losses.view_as(labels), following != IGNORED


class _TokenLoss(torch.autograd.Function):
    """`F.cross_entropy(full_precision(logits), labels, reduction="none")` without copies of the logits in float32.

    With a vocabulary of 128,000 these copies are most of the memory of a step. Only a few rows are converted at a time,
    and the gradient is made in the logits' own precision. Differentiable twice, at full size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        parts = [
            F.cross_entropy(full_precision(logits[part]), labels[part], reduction="none", ignore_index=IGNORED)
            for part in _parts(logits)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        grad = (grad * (labels != IGNORED)).unsqueeze(1)
        targets = labels.clamp(min=0).unsqueeze(1)
        if torch.is_grad_enabled():  # create_graph=True
            probabilities = full_precision(logits).softmax(1)
            return ((probabilities - torch.zeros_like(probabilities).scatter(1, targets, 1.0)) * grad).to(
                logits.dtype
            ), None
        result = torch.empty_like(logits)
        for part in _parts(logits):
            probabilities = full_precision(logits[part]).softmax(1)
            probabilities.scatter_add_(1, targets[part], torch.full_like(grad[part], -1.0))
            result[part] = probabilities.mul_(grad[part])
        return result, None


def _parts(logits: Tensor) -> Iterator[slice]:
    rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
