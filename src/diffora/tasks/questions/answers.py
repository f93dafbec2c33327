"""From the best spans of windows to the answer of each example."""

import itertools
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from diffora.tasks.base import Outputs, Split


@dataclass(frozen=True)
class Answer:
    """The best answers to one example.

    Attributes:
        example: position of the example in the rows.
        spans: (text from the context, score), the best first; empty if the context has no token.
        null_score: score of "no answer".
    """

    example: int
    spans: list[tuple[str, float]]
    null_score: float

    @property
    def text(self) -> str:
        """The text of the best span; "" if there is none."""
        return self.spans[0][0] if self.spans else ""

    @property
    def null_odds(self) -> float:
        """Score of "no answer" minus score of the best span."""
        return self.null_score - self.spans[0][1] if self.spans else 0.0

    def n_best(self, unanswerable: bool) -> list[dict[str, Any]]:
        """The spans in the form of the official nbest_predictions.json; "no answer" is among them if it is possible."""
        ranked = [*self.spans, *([("", self.null_score)] if unanswerable or not self.spans else [])]
        ranked.sort(key=lambda span: -span[1])
        weights = np.exp(np.array([score for _, score in ranked]) - ranked[0][1])
        return [
            {"text": text, "score": score, "probability": float(weight)}
            for (text, score), weight in zip(ranked, weights / weights.sum(), strict=True)
        ]


def best_answers(outputs: Outputs, split: Split, n_best: int) -> list[Answer]:
    """The answers to all examples whose windows are in ``outputs``, in the order of the examples.

    Args:
        outputs: from `SquadTask.outputs`, on the CPU, in the order of ``row``.
        split: the split that the windows belong to.
        n_best: the most spans of an answer.
    """
    names = ["example", "context_start", "context_length", "char_start", "char_end"]
    windows = split.encoded.select_columns(names).with_format("arrow")[outputs["row"].tolist()]
    example = windows["example"].to_numpy()
    first = windows["context_start"].to_numpy()[:, None]
    # `begin` and `end` hold the context tokens of all windows in one list. Those of a window start at its `offset`.
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
        best: dict[tuple[int, int], float] = {}  # overlapping windows share spans: keep the best score of each
        for begins, stops, score in itertools.islice(spans, sum(count[low:high])):
            best[begins, stops] = max(best.get((begins, stops), -np.inf), score)
        ordered = sorted(best, key=lambda span: (-best[span], span))[:n_best]
        texts = [(span_text(contexts[number], *span), best[span]) for span in ordered]
        # The lowest "no answer" score over the windows counts, as in BERT's script: other windows may lack the answer.
        answers.append(Answer(number, [pair for pair in texts if pair[0]], min(null[low:high])))
    return answers


def span_text(context: str, first: int, stop: int) -> str:
    """The text from ``first`` up to ``stop``, without the space at the beginning of some tokens.

    Combining accents after ``stop`` belong to the last letter, even if the tokenizer has dropped them.
    """
    while stop < len(context) and unicodedata.category(context[stop]) == "Mn":
        stop += 1
    return context[first:stop].strip()
