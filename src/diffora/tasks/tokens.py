"""Named entities, or any other tag for each word: ``task=tokens``.

The model classifies tokens; the first token of a word stands for the word. Scores count whole entities
(`diffora.tasks.words.tags`). Sentences that are longer than ``task.max_length`` are read in overlapping windows, so no
word is lost.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.backbones.precision import full_precision
from diffora.errors import UserError
from diffora.settings.checks import LENGTH, TEXT, TEXTS, Check, Help, whole
from diffora.tasks.account import Account
from diffora.tasks.base import Batch, Collate, Outputs, Split, Task
from diffora.tasks.cache import cached, tokenizer_facts
from diffora.tasks.classes import ClassResults
from diffora.tasks.ignored import IGNORED
from diffora.tasks.messages import some
from diffora.tasks.own_records import OwnRecordsTask
from diffora.tasks.own_rows import OwnRowsSettings
from diffora.tasks.sentences import note_unknown, unknown_token
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.records import Records
from diffora.tasks.sources.tables import content_hash
from diffora.tasks.words.conll import read_conll
from diffora.tasks.words.read import WordsPart, check_words, tag_numbers
from diffora.tasks.words.tags import OUTSIDE, STRICT, Tagging, counts, scores
from diffora.tasks.words.windows import NO_WORD, Frame, WordsCollator, write_windows

FORMAT_VERSION = 1  # raise it when the content of a cache file changes its meaning
COLUMN = Check(lambda v: TEXT.fits(v) or whole(1, 1000).fits(v), "the name of a column, or its number in a CoNLL file")
TAGS = Check(lambda v: TEXTS.fits(v) and len(v) > 1 and len(set(v)) == len(v), "a list of tags, each once")


@dataclass(frozen=True, kw_only=True)
class TokensSettings(OwnRowsSettings):
    """The settings of `TokensTask`."""

    tokens_column: Annotated[
        str | int, COLUMN, Help("Column of the lists of words; in a CoNLL file a number from 1, otherwise the first.")
    ] = "tokens"
    tags_column: Annotated[
        str | int, COLUMN, Help("Column of the lists of tags; in a CoNLL file a number from 1, otherwise the last.")
    ] = "ner_tags"
    tags: Annotated[
        Annotated[list[str], TAGS] | None,
        Help("All tags, in the order of their numbers; null: those of the data set's features or training rows."),
    ] = None
    strict: Annotated[
        bool, Help("Count only well-formed entities, in the schemes IOB2 and IOBES; false: as CoNLL's own script.")
    ] = False
    doc_stride: Annotated[
        int,
        whole(0, LENGTH),
        Help("Overlap of two windows of a sentence longer than `max_length`, at most half of a window.", "tokens"),
    ] = 32


class TokensTask(OwnRecordsTask):
    """Tag each word of a sentence. F1 over entities chooses the best epoch.

    The tags are those of ``task.tags``, of the data set's features, or of the training rows.
    """

    settings = TokensSettings
    model_class = "AutoModelForTokenClassification"
    peft_type: ClassVar[str | None] = "TOKEN_CLS"
    formats = ("conll", "txt", "jsonl", "parquet")
    padding: ClassVar = {**Task.padding, "labels": IGNORED, "tags": IGNORED, "starts": NO_WORD}
    metrics = ("f1", "precision", "recall", "accuracy")
    main_metric = "f1"
    classifies = True
    unknown_id: int | None = None

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.columns = str(cfg.tokens_column), str(cfg.tags_column)
        self.tagging: Tagging | None = None
        """What the tags mean; None until rows are loaded, or until `expect` gives the tags."""
        self._named: list[str] | None = None  # the tags in the features of the source
        self._tags_from = "settings" if cfg.tags else "rows"  # who gave the tags, for messages

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.columns[0] == self.columns[1]:
            yield f"task.tags_column={self.columns[1]} is task.tokens_column too"
        if self.cfg.tags is not None:
            try:
                self._set_tags(self.cfg.tags)
            except ValueError as error:
                yield f"task.tags: {error}"

    def head(self) -> dict[str, Any]:
        names = dict(enumerate(self._tags().names))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def _tags(self) -> Tagging:
        if self.tagging is None:
            self.load()
        assert self.tagging is not None
        return self.tagging

    def _set_tags(self, names: Sequence[str]) -> None:
        self.tagging = Tagging.of(names)

    def expect(self, classes: Sequence[str]) -> None:
        """Number the tags of all splits as the trained model does."""
        self._tags_from = "run"
        try:
            self._set_tags(classes)
        except ValueError as error:
            raise UserError(f"the run was trained on other classes than tags of words: {error}") from error

    # --- rows ---

    def wanted(self) -> tuple[str, ...]:
        return self.columns

    def open(self, file: Path, notes: list[str]) -> Records:
        if file.suffix not in (".conll", ".txt"):
            return super().open(file, notes)
        numbers = [int(name) if name.isdigit() else None for name in self.columns]
        return read_conll(file, (self.columns[0], numbers[0]), (self.columns[1], numbers[1]), notes)

    def checked(self, sources: Sequence[Records], labelled: bool, account: Account, problems: list[str]) -> Part | None:
        names = self.tagging.names if self.tagging else None
        if names is None:
            found = [found for source in sources if (found := source.class_names(self.columns[1]))]
            self._named = found[0] if found else self._named
            names = self.cfg.tags
        return check_words(sources, self.columns, names, labelled, account, problems)

    def learn(self, train: Part, problems: list[str]) -> None:
        if self.tagging is None:
            present = pc.unique(pc.list_flatten(train.table.column("tags"))).to_pylist()
            self._tags_from = "features" if self._named else "rows"
            try:
                self._set_tags(self._named or sorted(present, key=_order))
            except ValueError as error:
                problems.append(f"{train.where}: column '{self.columns[1]}': {error}.")
                return
        if self._tags().types == () or len(self._tags().names) < 2:
            problems.append(
                f"{train.where}: column '{self.columns[1]}': all words have the same tag; there is nothing to learn."
            )

    def numbered(self, split: str, part: Part, problems: list[str]) -> pa.Table:
        assert isinstance(part, WordsPart)
        if "tags" not in part.table.column_names:
            part.account.notes.append(f"no tags in column '{self.columns[1]}': predictions without metrics")
            return part.table
        whose = {
            "run": "the run",
            "settings": "task.tags",
            "features": "the data set's features",
            "rows": "the training rows; task.tags=[…] names more tags",
        }[self._tags_from]
        return tag_numbers(part, self._tags().names, whose, self.columns[1], problems)

    def before_split(self) -> None:
        self._tags()

    def keys(self, table: pa.Table) -> pa.Array:
        return pc.binary_join(table.column("words"), "\x1f").cast(pa.large_string())

    def facts(self) -> list[str]:
        return [hashlib.sha256(json.dumps(self._tags().names).encode()).hexdigest()]

    def note_rows(self, tables: dict[str, pa.Table]) -> None:
        """Note the scheme of the tags, and tags that are missing in training."""
        tagging, schemes = self._tags(), {}
        for name, table in tables.items():
            tags, first = _flat(table.column("tags"))
            scheme, strange = tagging.scheme(tags, first)
            n = len(tagging.entities(tags, first))
            schemes[name] = scheme
            notes = self.accounts[name].notes
            kinds = len(tagging.types)
            notes.append(
                f"{n:,} entities of {kinds} type{'s' if kinds > 1 else ''} in {len(tags):,} words; {scheme} tags"
            )
            if n == 0 and name == "validation":
                notes.append(
                    "no entity, so F1 is 0 after every epoch and does not find the best one: validate on more rows "
                    "(task.validation_fraction=), on others (task.split_seed=), or on a file with entities"
                )
            if strange:
                notes.append(
                    f"{strange:,} entities are not well-formed in {scheme}, e.g. they begin with I or do not end"
                )
            if name == "train" and OUTSIDE not in tagging.names and scheme == "IO":
                notes.append("no tag is O: if these are not entities, accuracy is the metric to read")
        present = set(pc.unique(pc.list_flatten(tables["train"].column("tags"))).to_pylist())
        if missing := [name for i, name in enumerate(tagging.names) if i not in present]:
            self.accounts["train"].notes.append(f"no word has these tags: {some(missing)}")
        if self.cfg.strict and schemes["train"] not in STRICT:
            raise UserError(
                f"task.strict=true is for the schemes {' and '.join(STRICT)}; the training rows have "
                f"{schemes['train']} tags"
            )

    # --- encoding ---

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        """Windows, in the order of their rows. A row without words has none.

        Returns:
            These columns: input_ids; token_type_ids (only if the tokenizer makes them); starts (for each word whose tag
            is predicted in this window, its first token, or -1 if it has none); labels (the tags of these words, if the
            rows have tags); length; row; example; silent (words without a token); several (whether it is the first of
            several windows of a row); cut (whether its last word has more tokens than fit).
        """
        frame, cfg = Frame.of(processor), self.cfg
        self.unknown_id = unknown_token(processor)
        room = cfg.max_length - frame.size
        if room < 1 or cfg.max_length > processor.model_max_length:
            raise UserError(
                f"task.max_length={cfg.max_length} must be at least {frame.size + 1} (special tokens and one more) and "
                f"at most {processor.model_max_length} (what the model's tokenizer takes)."
            )
        overlap = min(cfg.doc_stride, room // 2)
        facts = {
            "format": FORMAT_VERSION,
            "rows": content_hash(rows.data.table),
            **tokenizer_facts(processor),
            "lengths": [cfg.max_length, overlap],
        } | ({} if frame.size else {"empty": frame.empty})
        found = cached(
            "words",
            facts,
            lambda file: write_windows(file, rows, processor, frame, cfg.max_length, overlap, self.num_proc),
        )
        if not len(found):
            raise UserError(f"task.path={cfg.path}: none of the {len(rows)} rows has any words")
        return found

    def count_encoded(self, account: Account, split: Split) -> None:
        table = split.encoded.data
        empty = len(split.rows) - pc.count_distinct(table.column("example")).as_py()
        if "labels" in table.column_names:
            account.drop("no words", empty)
        elif empty:  # a prediction has a line for each row
            account.notes.append(f"{empty:,} rows have no words: nothing is predicted for them")
        silent, several, cut = (pc.sum(table.column(name)).as_py() or 0 for name in ("silent", "several", "cut"))
        if several:
            account.notes.append(
                f"{several:,} rows are longer than task.max_length={self.cfg.max_length} tokens: read in windows, no "
                "word is left out"
            )
        if silent:
            outside = self._tags().names[self._tags().outside]
            account.notes.append(f"{silent:,} words have no token in this tokenizer: their predicted tag is {outside}")
        account.change("a word has more tokens than a window; the word is cut", cut)
        note_unknown(account, table.column("input_ids"), self.unknown_id)

    def collate(self, processor: Any, training: bool) -> Collate:
        return WordsCollator(processor.pad_token_id, pad_to_multiple_of=self.width_multiple)

    def dummy(self, rows: int, model: Any) -> Batch:
        batch = super().dummy(rows, model)
        nothing = torch.zeros_like(batch["input_ids"])
        return batch | {"labels": nothing, "tags": nothing, "starts": nothing, "example": batch["row"]}

    # --- in a step ---

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in super().inputs(batch).items() if key not in ("starts", "tags", "example")}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy over words; 0 if no word of the batch has a token."""
        return self._losses(output, batch).sum() / (batch["labels"] != IGNORED).sum().clamp(min=1)

    def _losses(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each token, [n, width]; 0 where it stands for no word."""
        logits = full_precision(output.logits)
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none")

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float((batch["labels"] != IGNORED).sum())

    # --- after a step ---

    def outputs(self, output: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """Predicted tags of the words of each window, and their loss.

        Returns:
            row, example: [n]; predicted: [n, task.max_length] tag numbers, -1 after the last word; if the batch has
            tags, also tags, in the same form, loss: [n] summed over words, and terms: [n], the number of these words.
        """
        starts, best = batch["starts"], output.logits.detach().argmax(dim=-1)
        predicted = best.gather(1, starts.clamp(min=0)).masked_fill(starts < 0, self._tags().outside)
        padding = starts == NO_WORD
        kept = {
            "row": batch["row"],
            "example": batch["example"],
            "predicted": self._wide(predicted.masked_fill(padding, -1)),
        }
        if "labels" in batch:
            kept["tags"] = self._wide(batch["tags"].masked_fill(padding, -1))
            kept["loss"] = self._losses(output, batch).detach().sum(1)
            kept["terms"] = (batch["labels"] != IGNORED).sum(1)
        return kept

    def _wide(self, tags: Tensor) -> Tensor:
        return F.pad(tags, (0, self.cfg.max_length - tags.shape[1]), value=-1).to(torch.int16)

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        """``loss`` per word; precision, recall and F1 of entities; accuracy of words."""
        predicted, first = _words(outputs, "predicted")
        tags, _ = _words(outputs, "tags")
        loss = float(outputs["loss"].double().sum() / outputs["terms"].sum().clamp(min=1))
        found = scores(self._counts(predicted, tags, first).sum(axis=0))
        return {"loss": loss, **found, "accuracy": float((predicted == tags).mean()) if len(tags) else 0.0}

    def _counts(self, predicted: np.ndarray, tags: np.ndarray, first: np.ndarray) -> np.ndarray:
        tagging = self._tags()
        gold, found = (tagging.entities(part, first, self._strict()) for part in (tags, predicted))
        return counts(gold, found, len(tagging.types))

    def class_results(self, outputs: Outputs) -> ClassResults | None:
        """Results by type of entity."""
        if "tags" not in outputs:
            return None
        predicted, first = _words(outputs, "predicted")
        numbers = self._counts(predicted, _words(outputs, "tags")[0], first)
        return ClassResults(self._tags().types, *torch.from_numpy(numbers.T.copy()))

    def _strict(self) -> str | None:
        """The scheme whose well-formed entities count; None if all count."""
        if not self.cfg.strict:
            return None
        return "IOBES" if np.isin(self._tags().prefix, ("E", "S")).any() else "IOB2"

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        """Words, their tags, and the entities: type, text, first word and the word after the last one."""
        tagging, rows = self._tags(), split.rows["words"][:]
        lines: list[dict[str, Any]] = [
            {"row": row, "tokens": words, "prediction": [], "entities": []} for row, words in enumerate(rows)
        ]
        predicted, first = _words(outputs, "predicted")
        examples = outputs["example"].numpy().repeat((outputs["predicted"] >= 0).sum(1).numpy())
        for row, tag in zip(examples.tolist(), predicted.tolist(), strict=True):
            lines[row]["prediction"].append(tagging.names[tag])
        begins = np.flatnonzero(first)
        for begin, end, kind in tagging.entities(predicted, first, self._strict()).tolist():
            row = int(examples[begin])
            offset = int(begins[np.searchsorted(begins, begin, side="right") - 1])
            span = begin - offset, end - offset
            text = " ".join(rows[row][slice(*span)])
            lines[row]["entities"].append({"type": tagging.types[kind], "text": text, "start": span[0], "end": span[1]})
        return lines


def _order(tag: str) -> tuple[Any, ...]:
    """The sort key of a tag: O first, then by type, and B before I."""
    prefix, _, kind = tag.rpartition("-")
    return tag != OUTSIDE, kind, "BIMESLUW".find(prefix), tag


def _flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """All entries of a column of lists, and whether each is the first of its list."""
    values = pc.list_flatten(lists).to_numpy()
    lengths = pc.list_value_length(lists).to_numpy()
    first = np.zeros(len(values), dtype=bool)
    first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return values, first


def _words(outputs: Outputs, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The tags of all words in their order, and whether each word is the first of its row."""
    present = outputs["predicted"] >= 0
    tags = outputs[name][present].numpy().astype(np.int64)
    examples = outputs["example"].numpy().repeat(present.sum(1).numpy())
    return tags, np.append(True, examples[1:] != examples[:-1])[: len(tags)]
