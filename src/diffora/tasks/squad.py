"""Extractive question answering: SQuAD 1.1 and 2.0, and your own rows in their format.

Question and context go through the model in overlapping windows. Two scores per token say where the answer starts and
ends (Devlin et al. 2019, §4.2, 4.3). "No answer" has a position of its own, the *null position*. It is the [CLS] token
or, for tokenizers without one, an end-of-text token after the context, where a left-to-right model has read everything.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from diffora.backbones.precision import full_precision
from diffora.errors import UserError
from diffora.files import write_text
from diffora.settings.checks import LENGTH, NUMBER, PATH, Help, whole
from diffora.settings.sections import TaskSettings
from diffora.tasks.account import Account, note_overlap
from diffora.tasks.base import Batch, Collate, Outputs, Rows, Split, Task
from diffora.tasks.cache import cached, tokenizer_facts
from diffora.tasks.questions import data, metrics
from diffora.tasks.questions.answers import Answer, best_answers
from diffora.tasks.questions.windows import Frame, Lengths, WindowCollator, write_windows
from diffora.tasks.sources.tables import content_hash, joint_hash, subset

FORMAT_VERSION = 2  # raise it when the content of a cache file changes its meaning


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
    """Find the words of the context that answer a question.

    Settings: ``task.hub`` is the hub dataset. ``task.unanswerable`` says whether a question may have no answer (version
    2.0). ``task.doc_stride`` is the number of tokens by which windows overlap, as in transformers' run_qa.py; in BERT's
    original script the same name means the distance between the starts of windows.

    Only the null position and positions in the context are possible, in training and in evaluation. In version 1.1 the
    null position is the target of windows without the answer, but it is never predicted.
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
        self.metrics = metrics.NAMES_V2 if cfg.unanswerable else metrics.NAMES

    def unit_of(self, metric: str) -> str:
        return "" if metric.endswith("_thresh") else "percent"

    def problems(self) -> Iterator[str]:
        cfg = self.cfg
        if cfg.max_length <= cfg.max_question_length + cfg.doc_stride:
            yield (
                f"task.max_length={cfg.max_length} must be more than task.max_question_length="
                f"{cfg.max_question_length} plus task.doc_stride={cfg.doc_stride}, or windows would not advance"
            )
        if cfg.path is None and (cfg.train_file or cfg.validation_file):
            yield "task.train_file and task.validation_file are files in the folder task.path: give task.path too"
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
                f"rows with several answers, of which training uses the first: {several:,}"
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
        loaded = self.accounts.copy()  # predict=true reads the validation split again: keep its account
        rows = datasets.Dataset(self._read({split: file}, labelled=False)[split])
        self.accounts |= loaded
        return rows

    def _read(self, files: dict[str, str | None], labelled: bool = True) -> dict[str, pa.Table]:
        c = self.cfg
        return data.read(self.name, c.hub, c.path, files, c.unanswerable, labelled, self.accounts)

    def encode(self, rows: datasets.Dataset, processor: Any, training: bool) -> datasets.Dataset:
        """Windows, in the order of their rows. Each row has at least one.

        Returns:
            These columns: input_ids; token_type_ids (only if the tokenizer makes them); start_positions and
            end_positions (only if the rows have answers: those of the first answer, or the null position);
            context_start and context_length (in tokens); null_position; char_start and char_end (the characters of each
            context token; not for training); length; row; example; cut (whether the question is longer than
            task.max_question_length) and lost (whether no window has the whole answer), both set only in the first
            window of a row.
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

        return cached(
            "windows",
            facts,
            lambda file: write_windows(
                file, rows, processor, frame, Lengths(cfg.max_length, cfg.doc_stride, cfg.max_question_length), training
            ),
        )

    def count_encoded(self, account: Account, split: Split) -> None:
        cut, lost = (pc.sum(split.encoded.data.column(name)).as_py() or 0 for name in ("cut", "lost"))
        account.change(f"question cut at task.max_question_length={self.cfg.max_question_length}", cut)
        account.change("no window has the whole answer: the loss takes it for unanswerable", lost)

    def collate(self, processor: Any, training: bool) -> Collate:
        return WindowCollator(processor.pad_token_id, pad_to_multiple_of=self.width_multiple)

    def dummy(self, rows: int, model: Any) -> Batch:
        batch = super().dummy(rows, model)
        context = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        return batch | {"context": context, "null_position": torch.zeros_like(batch["row"])}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in super().inputs(batch).items() if key not in ("context", "null_position")}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean over windows of the cross-entropies of start and end, a scalar."""
        return self._losses(output, batch).mean()

    def _losses(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each window, [n]."""
        possible = batch["context"].scatter(1, batch["null_position"][:, None], True)
        start, end = (
            F.cross_entropy(full_precision(logits).masked_fill(~possible, -torch.inf), batch[target], reduction="none")
            for logits, target in zip((output.start_logits, output.end_logits), self.targets, strict=True)
        )
        return (start + end) / 2

    def outputs(self, output: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """The best spans of each window, and the score of "no answer". A score is start logit plus end logit.

        Returns:
            row: [n]; span_score, span_start and span_end: [n, task.n_best], the best spans of at most
            ``task.max_answer_length`` tokens as positions in the window, with score -inf if there are fewer spans;
            null_score: [n]; loss: [n], only if the batch has targets.
        """
        longest, n_best = self.cfg.max_answer_length, self.cfg.n_best
        start, end = (full_precision(logits.detach()) for logits in (output.start_logits, output.end_logits))
        null = batch["null_position"][:, None]
        null_score = (start.gather(1, null) + end.gather(1, null)).squeeze(1)
        start, end = (logits.masked_fill(~batch["context"], -torch.inf) for logits in (start, end))
        ends = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # [n, width, longest]
        scores = (start[:, :, None] + ends).flatten(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        # The sort is stable, so that the earlier and shorter of two equal spans comes first on every device.
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

        If questions may have no answer, ``exact_match`` and ``f1`` are those at ``task.null_threshold``. ``best_exact``
        and ``best_f1`` are those of the official script, whose thresholds are chosen on these same examples.
        """
        answers = best_answers(outputs, split, self.cfg.n_best)
        everything = split.rows["answers"][:]
        golds = [everything[answer.example] for answer in answers]
        texts = [answer.text for answer in answers]
        if self.cfg.unanswerable:
            odds = [answer.null_odds for answer in answers]
            scores = metrics.evaluate_v2(texts, odds, golds, self.cfg.null_threshold)
        else:
            scores = metrics.evaluate(texts, golds)
        return {"loss": outputs["loss"].mean().item()} | scores

    def predictions(self, outputs: Outputs, split: Split) -> list[dict[str, Any]]:
        ids = split.rows["id"][:]
        return [
            {"row": answer.example, "id": ids[answer.example], "prediction": self._final(answer)}
            for answer in best_answers(outputs, split, self.cfg.n_best)
        ]

    def write_predictions(self, folder: Path, name: str, outputs: Outputs, split: Split) -> list[Path]:
        """Write the files that the official evaluation reads.

        ``<name>_predictions.json`` holds the answer to each id. ``<name>_null_odds.json`` is written if questions may
        have no answer. ``<name>_nbest_predictions.json`` holds the best texts and their probabilities.
        """
        answers = best_answers(outputs, split, self.cfg.n_best)
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

    def _final(self, answer: Answer) -> str:
        """The text to report: "" if "no answer" scores high enough."""
        refuses = self.cfg.unanswerable and answer.null_odds > self.cfg.null_threshold
        return "" if refuses else answer.text
