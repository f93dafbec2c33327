"""Exact match and F1 of SQuAD as pure functions. They equal the official evaluation scripts to the last digit.

Sources: Rajpurkar et al. 2016 (evaluate-v1.1.py) and 2018 (evaluate-v2.0.py). All metrics are in percent, as in these
scripts and in the papers.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

NAMES = ("exact_match", "f1")
_EXTRA = ("HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1")
NAMES_V2 = (*NAMES, *_EXTRA, "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only, as in the official scripts


def normalise(text: str) -> str:
    """The text in lower case, without punctuation and English articles, with single spaces between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if the normalised texts are equal, else 0."""
    return float(normalise(prediction) == normalise(gold))


def f1(prediction: str, gold: str, empty_agree: bool) -> float:
    """Harmonic mean of precision and recall over the words of the normalised texts.

    Args:
        empty_agree: whether two texts without words agree. They do in version 2.0, where they mean "no answer", and do
            not in version 1.1.
    """
    predicted, wanted = normalise(prediction).split(), normalise(gold).split()
    if empty_agree and not (predicted and wanted):
        return float(predicted == wanted)
    same = sum((Counter(predicted) & Counter(wanted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def evaluate(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """``exact_match`` and ``f1`` of SQuAD 1.1: for each example the best value over its gold answers, then the mean.

    Args:
        predictions: one text per example.
        golds: the gold answers of each example, at least one.
    """
    exact = [max(exact_match(text, gold) for gold in answers) for text, answers in zip(predictions, golds, strict=True)]
    overlap = [max(f1(text, gold, False) for gold in answers) for text, answers in zip(predictions, golds, strict=True)]
    return {"exact_match": _percent(exact), "f1": _percent(overlap)}


def evaluate_v2(
    predictions: Sequence[str], null_odds: Sequence[float], golds: Sequence[Sequence[str]], threshold: float
) -> dict[str, float]:
    """The metrics of SQuAD 2.0, where a question may have no answer.

    Args:
        predictions: the best span of each example, even if "no answer" scores higher.
        null_odds: the score of "no answer" minus the score of that span.
        golds: the gold answers of each example; none if the question has no answer.
        threshold: null odds above it mean "no answer".

    Returns:
        ``exact_match`` and ``f1`` at ``threshold``. The same over examples with an answer (``HasAns_…``) and without
        (``NoAns_…``), if there are such examples. ``best_exact`` and ``best_f1`` at the threshold that is best on these
        same examples (``best_…_thresh``).
    """
    wanted = [[gold for gold in answers if normalise(gold)] or [""] for answers in golds]
    exact = [max(exact_match(text, gold) for gold in some) for text, some in zip(predictions, wanted, strict=True)]
    overlap = [max(f1(text, gold, True) for gold in some) for text, some in zip(predictions, wanted, strict=True)]
    answerable = [bool(answers) for answers in golds]
    refused = [odds > threshold for odds in null_odds]

    metrics: dict[str, float] = {}
    best: dict[str, float] = {}
    for name, key, scores in (("exact_match", "exact", exact), ("f1", "f1", overlap)):
        final = [float(not has) if no else score for score, has, no in zip(scores, answerable, refused, strict=True)]
        metrics[name] = _percent(final)
        for part, kept in (("HasAns", True), ("NoAns", False)):
            if some := [score for score, has in zip(final, answerable, strict=True) if has is kept]:
                best[f"{part}_{key}"] = _percent(some)
        best[f"best_{key}"], best[f"best_{key}_thresh"] = _best(predictions, null_odds, scores, answerable)
    return metrics | best


def _best(
    predictions: Sequence[str], null_odds: Sequence[float], scores: Sequence[float], answerable: Sequence[bool]
) -> tuple[float, float]:
    """(best mean, its threshold). Start with "no answer" for all, then answer one more at a time, the surest first."""
    current = best = float(answerable.count(False))
    threshold = 0.0
    for i in sorted(range(len(scores)), key=lambda i: null_odds[i]):
        if answerable[i]:
            current += scores[i]
        elif predictions[i]:
            current -= 1
        if current > best:
            best, threshold = current, null_odds[i]
    return 100.0 * best / len(scores), threshold


def _percent(scores: Sequence[float]) -> float:
    return 100.0 * sum(scores) / len(scores)
