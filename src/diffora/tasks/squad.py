"""Extractive question answering: SQuAD 1.1 and 2.0, and rows of one's own in their format.

Question and context go through the model in overlapping windows; two scores a token say where the answer starts and
ends (Devlin et al. 2019, §4.2, 4.3). "No answer" is a position of its own, the *null position*: the [CLS] token or, for
tokenizers without one, an end-of-text token after the context, so that a left-to-right model has read everything there.
"""

import itertools
import json
import unicodedata
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
from tqdm.auto import tqdm

from diffora.errors import UserError
from diffora.files import write_text
from diffora.settings.checks import LENGTH, NUMBER, PATH, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks import squad_data, squad_metrics
from diffora.tasks.account import Account, note_overlap
from diffora.tasks.base import Batch, Collate, Outputs, Rows, Split, Task, full_precision
from diffora.tasks.cache import arrow_writer, cached, tokenizer_facts
from diffora.tasks.sources import content_hash, joint_hash, subset
from diffora.tasks.tokenise import PROGRESS_FROM_ROWS, Collator

FORMAT_VERSION = 2  # raise it when the content of a cache file changes its meaning
ROWS_AT_ONCE = 500  # bounds memory
WINDOWS_AT_ONCE = 2000  # the same, for rows of many windows


@dataclass(frozen=True, kw_only=True)
class SquadSettings(TaskSettings):
    """The settings of `SquadTask`."""

    hub: Annotated[str, Help("Data set on the hub.")]
    path: Annotated[
        Annotated[str, PATH] | None,
        Help("Folder with train and validation as .parquet, .jsonl or SQuAD's own .json; null: the hub."),
    ] = None
    train_file: Annotated[
        Annotated[str, PATH] | None, Help("Name of the training file in that folder; null: a usual one.")
    ] = None
    validation_file: Annotated[
        Annotated[str, PATH] | None, Help("Name of the validation file in that folder; null: a usual one.")
    ] = None
    unanswerable: Annotated[bool, Help("Whether a question may have no answer (SQuAD 2.0).")]
    null_threshold: Annotated[
        Annotated[float, NUMBER] | None,
        Help('"No answer" is predicted if its score exceeds that of the best span by more than this.'),
    ] = None
    max_length: Annotated[int, whole(4, LENGTH), Help("Length of a window.", "tokens")]
    doc_stride: Annotated[int, whole(0, LENGTH), Help("Overlap of two windows.", "tokens")]
    max_question_length: Annotated[int, whole(1, LENGTH), Help("Length at which questions are cut.", "tokens")]
    n_best: Annotated[int, whole(1, 1000), Help("Spans to keep for each window and each question.", "spans")]
    max_answer_length: Annotated[int, whole(1, LENGTH), Help("Longest answer.", "tokens")]


class SquadTask(Task):
    """Which words of the context answer the question?

    Settings: ``task.hub`` is the hub dataset, ``task.unanswerable`` says whether a question may have no answer
    (version 2.0). ``task.doc_stride`` is the number of tokens by which windows overlap, as in transformers' run_qa.py
    (BERT's original script calls the distance of their starts so).

    Every position outside the context but the null position is impossible, in training as in evaluation; in version
    1.1 the null position is the target of windows without the answer, and never a prediction.
    """

    settings = SquadSettings
    model_class = "AutoModelForQuestionAnswering"
    peft_type: ClassVar[str | None] = "QUESTION_ANS"
    scores_training = False
    targets = ("start_positions", "end_positions")
    padding: ClassVar = {**Task.padding, "context": 0}
    test_splits = ("validation",)  # the test sets are not public
    main_metric = "f1"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.metrics = squad_metrics.NAMES_V2 if cfg.unanswerable else squad_metrics.NAMES

    def problems(self) -> Iterator[str]:
        cfg = self.cfg
        if cfg.max_length <= cfg.max_question_length + cfg.doc_stride:
            yield (
                f"task.max_length={cfg.max_length} must be more than task.max_question_length="
                f"{cfg.max_question_length} and task.doc_stride={cfg.doc_stride} together: windows would not advance"
            )
        if cfg.path is None and (cfg.train_file or cfg.validation_file):
            yield "task.train_file and task.validation_file are files in the folder task.path, which is not given"
        if cfg.unanswerable and cfg.null_threshold is None:
            yield "task.unanswerable=true needs task.null_threshold: start from task=squad_v2"

    def head(self) -> dict[str, Any]:
        return {"num_labels": 2}

    def load(self) -> Rows:
        tables = self._read({"train": self.cfg.train_file, "validation": self.cfg.validation_file})
        train = subset(tables["train"], self.cfg.max_train_rows, self.accounts["train"])
        validation = tables["validation"]
        if several := pc.sum(pc.greater(pc.list_value_length(train.column("answers")), 1)).as_py():
            self.accounts["train"].notes.append(
                f"rows with several answers, of which the first is trained on: {several:,}"
            )

        def asked(table: pa.Table) -> pa.ChunkedArray:
            texts = [table.column(column).cast(pa.large_string()) for column in ("context", "question")]
            return pc.binary_join_element_wise(*texts, pa.scalar("\x1f", pa.large_string()))

        note_overlap(self.accounts, {"train": asked(train), "validation": asked(validation)})
        return Rows(
            train=datasets.Dataset(train),
            validation={"validation": datasets.Dataset(validation)},
            data_hash=joint_hash([content_hash(train), content_hash(validation)]),
            source=self.cfg.path or self.cfg.hub,
        )

    def load_split(self, split: str) -> datasets.Dataset:
        file = getattr(self.cfg, f"{split}_file", None)
        loaded = self.accounts.copy()  # predict=true reads the validation split once more
        rows = datasets.Dataset(self._read({split: file}, labelled=False)[split])
        self.accounts |= loaded
        return rows

    def _read(self, files: dict[str, str | None], labelled: bool = True) -> dict[str, pa.Table]:
        c = self.cfg
        return squad_data.read(self.name, c.hub, c.path, files, c.unanswerable, labelled, self.accounts)

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        """Windows, in the order of their rows; each row has at least one.

        Returns:
            input_ids, token_type_ids (only from a tokenizer that makes them), start_positions and end_positions (where
            the rows have answers; the first answer's, or the null position), context_start and context_length (in
            tokens), null_position, char_start and char_end (of each context token in the context; not for training),
            length, row, example; cut (whether the question is longer than task.max_question_length) and lost (whether
            no window has the whole answer), both in the first window of a row only.
        """
        cfg = self.cfg
        frame = Frame.of(processor)
        least = frame.size + cfg.max_question_length + cfg.doc_stride + 1
        if not least <= cfg.max_length <= processor.model_max_length:
            raise UserError(
                f"task.max_length={cfg.max_length} must be at least {least} (special tokens, question, overlap of "
                f"windows, one more token) and at most {processor.model_max_length} (what the model's tokenizer takes)."
            )
        facts = {
            "format": FORMAT_VERSION,
            "rows": content_hash(rows.data.table),
            **tokenizer_facts(processor),
            "special": [processor.cls_token_id, processor.eos_token_id],
            "lengths": [cfg.max_length, cfg.doc_stride, cfg.max_question_length],
            "training": training,
        }

        def write(file: Path) -> None:
            self._write(file, rows, processor, frame, training)

        return cached("windows", facts, write)

    def _write(self, file: Path, rows: datasets.Dataset, tokenizer: Any, frame: "Frame", training: bool) -> None:
        has_answers = "answers" in rows.column_names
        types = {"input_ids": pa.list_(pa.int32())}
        if frame.has_types:
            types["token_type_ids"] = pa.list_(pa.int8())
        if has_answers:
            types |= {"start_positions": pa.int32(), "end_positions": pa.int32()}
        types |= dict.fromkeys(("context_start", "context_length", "null_position"), pa.int32())
        if not training:
            types |= {"char_start": pa.list_(pa.int32()), "char_end": pa.list_(pa.int32())}
        types |= dict.fromkeys(("length", "row", "example"), pa.int32()) | {"cut": pa.bool_(), "lost": pa.bool_()}
        columns: dict[str, list[Any]] = {name: [] for name in types}
        n_windows = 0
        with (
            arrow_writer(file, pa.schema(types)) as append,
            tqdm(total=len(rows), desc="tokenise", unit="row", disable=len(rows) < PROGRESS_FROM_ROWS) as bar,
        ):
            context: str | None = None
            for start in range(0, len(rows), ROWS_AT_ONCE):
                some = rows[start : start + ROWS_AT_ONCE]
                # Some questions have a lot of white space in front, as long as the question may be.
                questions = _tokens(tokenizer, [text.lstrip() for text in some["question"]])["input_ids"]
                for i, question in enumerate(questions):
                    if some["context"][i] != context:  # several questions in a row are about one context
                        context = some["context"][i]
                        ids, begin, end = _context(tokenizer, context)
                    answer = None
                    if has_answers and some["answers"][i]:
                        first = some["starts"][i][0]
                        answer = _span(begin, end, first, first + len(some["answers"][i][0]))
                    longest = self.cfg.max_question_length
                    windows = list(frame.windows(question[:longest], ids, self.cfg.max_length, self.cfg.doc_stride))
                    whole = any(window.holds(answer) for window in windows)
                    lost = bool(has_answers and some["answers"][i]) and not whole
                    for window in windows:
                        values = window.columns(answer)
                        kept = slice(window.first, window.first + window.context_length)
                        values |= {"char_start": begin[kept], "char_end": end[kept], "row": n_windows}
                        values |= {"example": start + i, "cut": False, "lost": False}
                        if window.first == 0:
                            values |= {"cut": len(question) > longest, "lost": lost}
                        for name, column in columns.items():
                            column.append(values[name])
                        n_windows += 1
                    if len(columns["row"]) >= WINDOWS_AT_ONCE:  # between rows: the last row is whole or not there
                        append(columns)
                        columns = {name: [] for name in types}
                bar.update(len(questions))
            append(columns)

    def count_encoded(self, account: Account, split: Split) -> None:
        cut, lost = (pc.sum(split.encoded.data.column(name)).as_py() or 0 for name in ("cut", "lost"))
        account.change(f"question cut at task.max_question_length={self.cfg.max_question_length}", cut)
        account.change("no window has the whole answer: taken for unanswerable in the loss", lost)

    def collate(self, processor: Any, training: bool) -> Collate:
        return WindowCollator(processor.pad_token_id, pad_to_multiple_of=8 if torch.cuda.is_available() else 1)

    def dummy(self, rows: int, model: Any) -> Batch:
        batch = super().dummy(rows, model)
        context = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        return batch | {"context": context, "null_position": torch.zeros_like(batch["row"])}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in super().inputs(batch).items() if key not in ("context", "null_position")}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean of the cross-entropies of start and end, over the windows."""
        return self._losses(output, batch).mean()

    def _losses(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """(n,)"""
        possible = batch["context"].scatter(1, batch["null_position"][:, None], True)
        start, end = (
            F.cross_entropy(full_precision(logits).masked_fill(~possible, -torch.inf), batch[target], reduction="none")
            for logits, target in zip((output.start_logits, output.end_logits), self.targets, strict=True)
        )
        return (start + end) / 2

    def outputs(self, output: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """The best spans of each window and the score of "no answer", a score being start plus end logit.

        Returns:
            row (n,); span_score, span_start, span_end (n, task.n_best): the best spans of at most
            ``task.max_answer_length`` tokens, positions in the window, -inf where there are no more; null_score (n,);
            loss (n,) where there are targets.
        """
        longest, n_best = self.cfg.max_answer_length, self.cfg.n_best
        start, end = (full_precision(logits.detach()) for logits in (output.start_logits, output.end_logits))
        null = batch["null_position"][:, None]
        null_score = (start.gather(1, null) + end.gather(1, null)).squeeze(1)
        start, end = (logits.masked_fill(~batch["context"], -torch.inf) for logits in (start, end))
        ends = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # (n, width, longest)
        scores = (start[:, :, None] + ends).flatten(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        # A stable sort: of equal scores the earlier and shorter span comes first, on every device.
        scores, index = scores.sort(dim=1, descending=True, stable=True)
        scores, index = scores[:, :n_best], index[:, :n_best]
        missing = n_best - scores.shape[1]
        kept = {
            "row": batch["row"],
            "span_score": F.pad(scores, (0, missing), value=-torch.inf),
            "span_start": F.pad(index // longest, (0, missing)),
            "span_end": F.pad(index // longest + index % longest, (0, missing)),
            "null_score": null_score.nan_to_num(),
        }
        if self.targets[0] in batch:
            kept["loss"] = self._losses(output, batch).detach()
        return kept

    def score(self, outputs: Outputs, split: Split) -> dict[str, float]:
        """``loss``, ``exact_match`` and ``f1`` in percent, over the examples of the given windows.

        With questions that have no answer, ``exact_match`` and ``f1`` are those at ``task.null_threshold``;
        ``best_exact`` and ``best_f1`` are the official script's, at thresholds that are chosen on these very examples.
        """
        answers = self._answers(outputs, split)
        everything = split.rows["answers"][:]
        golds = [everything[answer.example] for answer in answers]
        texts = [answer.text for answer in answers]
        if self.cfg.unanswerable:
            odds = [answer.null_odds for answer in answers]
            metrics = squad_metrics.evaluate_v2(texts, odds, golds, self.cfg.null_threshold)
        else:
            metrics = squad_metrics.evaluate(texts, golds)
        return {"loss": outputs["loss"].mean().item()} | metrics

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        ids = split.rows["id"][:]
        return [
            {"row": answer.example, "id": ids[answer.example], "prediction": self._final(answer)}
            for answer in self._answers(outputs, split)
        ]

    def write_predictions(self, folder: Path, name: str, outputs: Outputs, split: Split) -> list[Path]:
        """Write what the official evaluation reads.

        That is ``<name>_predictions.json``, the answer to each id, and for questions that may have none
        ``<name>_null_odds.json``; besides, ``<name>_nbest_predictions.json``, the best texts and their probabilities.
        """
        answers = self._answers(outputs, split)
        everything = split.rows["id"][:]
        ids = [everything[answer.example] for answer in answers]
        contents: dict[str, list[Any]] = {"predictions": [self._final(answer) for answer in answers]}
        if self.cfg.unanswerable:
            contents["null_odds"] = [answer.null_odds for answer in answers]
        contents["nbest_predictions"] = [answer.n_best(self.cfg.unanswerable) for answer in answers]
        files = []
        for kind, values in contents.items():
            files.append(folder / f"{name}_{kind}.json")
            write_text(files[-1], json.dumps(dict(zip(ids, values, strict=True)), indent=1, ensure_ascii=False) + "\n")
        return files

    def _final(self, answer: "Answer") -> str:
        refuses = self.cfg.unanswerable and answer.null_odds > self.cfg.null_threshold
        return "" if refuses else answer.text

    def _answers(self, outputs: Outputs, split: Split) -> list["Answer"]:
        """The answers to the examples whose windows are there, in the order of the examples."""
        names = ["example", "context_start", "context_length", "char_start", "char_end"]
        windows = split.encoded.select_columns(names).with_format("arrow")[outputs["row"].tolist()]
        example = windows["example"].to_numpy()
        first = windows["context_start"].to_numpy()[:, None]
        # Tokens of all windows in one line; `offset` is where each window's begin.
        begin, end = (pc.list_flatten(windows[name]).to_numpy() for name in ("char_start", "char_end"))
        offset = np.concatenate([[0], np.cumsum(windows["context_length"].to_numpy())[:-1]])[:, None]
        real = torch.isfinite(outputs["span_score"]).numpy()
        starts, ends = (
            flat[(outputs[name].numpy() - first + offset)[real]].tolist()
            for flat, name in ((begin, "span_start"), (end, "span_end"))
        )
        spans = zip(starts, ends, outputs["span_score"].numpy()[real].tolist(), strict=True)
        count, null = real.sum(axis=1).tolist(), outputs["null_score"].tolist()
        contexts = split.rows["context"][:]
        answers = []
        borders = np.flatnonzero(np.diff(example, prepend=-1, append=-1))
        for low, high in itertools.pairwise(borders.tolist()):
            number = int(example[low])
            best: dict[tuple[int, int], float] = {}  # windows overlap: a span counts where it scores best
            for begins, stops, score in itertools.islice(spans, sum(count[low:high])):
                best[begins, stops] = max(best.get((begins, stops), -np.inf), score)
            ordered = sorted(best, key=lambda span: (-best[span], span))[: self.cfg.n_best]
            texts = [(_cut(contexts[number], *span), best[span]) for span in ordered]
            # As in BERT's script, the window that says "no answer" least counts: all others may lack the answer.
            answers.append(Answer(number, [pair for pair in texts if pair[0]], min(null[low:high])))
        return answers


def _cut(context: str, first: int, stop: int) -> str:
    """The text from ``first`` to ``stop``, without the space that some tokens begin with.

    Accents that are characters of their own belong to the letter before, even if the tokenizer has dropped them.
    """
    while stop < len(context) and unicodedata.category(context[stop]) == "Mn":
        stop += 1
    return context[first:stop].strip()


@dataclass(frozen=True)
class Answer:
    """The spans that answer one example best.

    Attributes:
        example: position in the rows.
        spans: (text from the context, score), best first; none if the context has no token.
        null_score: score of "no answer".
    """

    example: int
    spans: list[tuple[str, float]]
    null_score: float

    @property
    def text(self) -> str:
        """The best span."""
        return self.spans[0][0] if self.spans else ""

    @property
    def null_odds(self) -> float:
        """Score of "no answer" less that of the best span."""
        return self.null_score - self.spans[0][1] if self.spans else 0.0

    def n_best(self, unanswerable: bool) -> list[dict[str, Any]]:
        """The spans as in the official nbest_predictions.json, with "no answer" where that is possible."""
        ranked = [*self.spans, *([("", self.null_score)] if unanswerable or not self.spans else [])]
        ranked.sort(key=lambda span: -span[1])
        weights = np.exp(np.array([score for _, score in ranked]) - ranked[0][1])
        return [
            {"text": text, "score": score, "probability": float(weight)}
            for (text, score), weight in zip(ranked, weights / weights.sum(), strict=True)
        ]


# --- windows ---


@dataclass(frozen=True)
class Window:
    """A window of one example: ``context_length`` tokens of the context from its token ``first`` on."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    context_start: int
    context_length: int
    null_position: int
    first: int

    def holds(self, answer: tuple[int, int] | None) -> bool:
        """Whether the whole answer, given by its first and last token in the context, is in the window."""
        return answer is not None and self.first <= answer[0] and answer[1] < self.first + self.context_length

    def columns(self, answer: tuple[int, int] | None) -> dict[str, Any]:
        """The window as a row; ``answer``: first and last token of it, counted in the context."""
        start = end = self.null_position
        if answer is not None and self.holds(answer):
            start, end = (token - self.first + self.context_start for token in answer)
        return {
            "input_ids": self.input_ids,
            "token_type_ids": self.token_type_ids,
            "start_positions": start,
            "end_positions": end,
            "context_start": self.context_start,
            "context_length": self.context_length,
            "null_position": self.null_position,
            "length": len(self.input_ids),
        }


@dataclass(frozen=True)
class Frame:
    """The special tokens before, between and after question and context, in this order whatever side is padded.

    Attributes:
        ids: token ids of the three parts.
        types: their token types.
        text_types: token types of question and context.
        has_types: whether the tokenizer makes token types.
        null: position of the null token among the special ones.
    """

    ids: tuple[list[int], list[int], list[int]]
    types: tuple[list[int], list[int], list[int]]
    text_types: tuple[int, int]
    has_types: bool
    null: int

    @property
    def size(self) -> int:
        return sum(map(len, self.ids))

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """The frame that a tokenizer puts around a pair of texts.

        A tokenizer without [CLS] gets an end-of-text token at the end, and where it puts nothing between two texts, as
        GPT-2's, a line break there.

        Raises:
            UserError: the tokenizer is not a fast one, or has neither [CLS] nor an end-of-text token.
        """
        if not tokenizer.is_fast:
            raise UserError(
                "question answering needs a fast tokenizer, which knows where in a text its tokens stand; "
                f"{type(tokenizer).__name__} is none."
            )
        pair = tokenizer(["a"], ["b"])
        all_ids, owner = pair["input_ids"][0], pair.sequence_ids(0)
        has_types = "token_type_ids" in tokenizer.model_input_names
        all_types = pair["token_type_ids"][0] if has_types else [0] * len(all_ids)
        question, context = (slice(owner.index(i), len(owner) - owner[::-1].index(i)) for i in (0, 1))
        cuts = slice(question.start), slice(question.stop, context.start), slice(context.stop, None)
        before, between, after = ([list(values[cut]) for values in (all_ids, all_types)] for cut in cuts)
        text_types = all_types[question.start], all_types[context.start]
        special = [*before[0], *between[0], *after[0]]
        if tokenizer.cls_token_id in special:
            null = special.index(tokenizer.cls_token_id)
        elif tokenizer.eos_token_id is None:
            raise UserError(
                'question answering needs a [CLS] or an end-of-text token, where "no answer" is read; '
                f"{type(tokenizer).__name__} has neither."
            )
        else:
            if not between[0]:
                line_break = _tokens(tokenizer, ["\n"])["input_ids"][0]
                between = [line_break, [text_types[0]] * len(line_break)]
            after = [[*after[0], tokenizer.eos_token_id], [*after[1], text_types[1]]]
            null = len(before[0]) + len(between[0]) + len(after[0]) - 1
        ids, types = zip(before, between, after, strict=True)
        return cls(ids, types, text_types, has_types, null)

    def windows(self, question: Sequence[int], context: np.ndarray, max_length: int, overlap: int) -> Iterator[Window]:
        """Windows of at most ``max_length`` tokens that cover the context, each the last ``overlap`` tokens again."""
        before, between, _ = map(len, self.ids)
        room = max_length - self.size - len(question)
        first = 0
        while True:
            part = context[first : first + room]
            null = self.null
            if null >= before:
                null += len(question)
            if self.null >= before + between:
                null += len(part)
            types = None
            if self.has_types:
                kinds = self.text_types
                types = _interleave(self.types, [kinds[0]] * len(question), [kinds[1]] * len(part))
            ids = _interleave(self.ids, question, part)
            yield Window(ids, types, before + len(question) + between, len(part), null, first)
            if first + room >= len(context):
                return
            first += room - overlap


def _interleave(parts: Sequence[Sequence[int]], question: Sequence[int], context: Any) -> np.ndarray:
    before, between, after = parts
    return np.concatenate([before, question, between, context, after]).astype(np.int32)


def _tokens(tokenizer: Any, texts: Sequence[str], offsets: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,  # about lengths: windows take care of those
    )
    return found


def _context(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids of a context, and the characters where each begins and ends."""
    found = _tokens(tokenizer, [text], offsets=True)
    begin, end = np.array(found["offset_mapping"][0], dtype=np.int32).reshape(-1, 2).T
    return np.array(found["input_ids"][0], dtype=np.int32), begin, end


def _span(begin: np.ndarray, end: np.ndarray, first: int, stop: int) -> tuple[int, int] | None:
    """First and last token that have any of the characters from ``first`` to ``stop``."""
    tokens = np.flatnonzero((begin < stop) & (end > first))
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None


class WindowCollator:
    """Puts windows together into one batch, padded on the right.

    Args:
        pad_token_id: fills ``input_ids``.
        pad_to_multiple_of: round the padded length up.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad = Collator(pad_token_id, pad_to_multiple_of)

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Batch:
        """The inputs; ``context`` (n, width): bool, the tokens of the context; null_position and targets (n,)."""
        batch = self.pad(rows)
        first, count = (torch.tensor(rows[name])[:, None] for name in ("context_start", "context_length"))
        position = torch.arange(batch["input_ids"].shape[1])
        batch["context"] = (position >= first) & (position < first + count)
        names = ("null_position", "start_positions", "end_positions")
        return batch | {name: torch.tensor(rows[name]) for name in names if name in rows}
