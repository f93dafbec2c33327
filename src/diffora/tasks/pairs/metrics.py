"""Metrics of generated text: ROUGE and exact match."""

import re
import unicodedata
from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
UNSPACED = re.compile(r"CJK|HIRAGANA|KATAKANA|THAI|LAO|KHMER|MYANMAR")
"""Beginnings of the Unicode names of characters whose scripts put no space between words."""


class Words:
    """Splits a text into lower-case words of letters, their marks, and digits, of any alphabet.

    For English this is what Google's ROUGE does. That one drops every letter outside a to z, so that "für" becomes two
    words, and a Russian text none. In scripts without spaces, every letter with its marks is a word. The ways to write
    one letter in Unicode are the same (NFC).
    """

    def tokenize(self, text: str) -> list[str]:
        found: list[str] = []
        before = False  # whether the last letter was a word by itself
        for letter in unicodedata.normalize("NFC", text.lower()):
            kind = unicodedata.category(letter)[0]
            if kind == "M":  # belongs to the letter before it
                found.append(letter)
                continue
            alone = UNSPACED.match(unicodedata.name(letter, "")) is not None
            if alone or before:
                found.append(" ")
            found.append(letter if kind in "LN" else " ")
            before = alone
        return "".join(found).split()


def generation_scores(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Means over all pairs, each in [0, 1]; NaN without pairs.

    - ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum``: F measures of Lin (2004), by Google's ``rouge_score``, without
      stemming. ``rougeLsum`` takes each line as a sentence; for texts of one line it equals ``rougeL``. An empty
      prediction scores 0.
    - ``exact_match``: whether the texts are equal, apart from white space at both ends and its amount in between. Case
      and punctuation count.
    """
    from rouge_score.rouge_scorer import RougeScorer  # imported here: with nltk it takes seconds

    if not predictions:
        return dict.fromkeys((*ROUGE, "exact_match"), float("nan"))
    scorer = RougeScorer(list(ROUGE), tokenizer=Words())
    sums = dict.fromkeys((*ROUGE, "exact_match"), 0.0)
    for prediction, target in zip(predictions, targets, strict=True):
        found = scorer.score(target, prediction)
        for name in ROUGE:
            sums[name] += found[name].fmeasure
        sums["exact_match"] += " ".join(prediction.split()) == " ".join(target.split())
    return {name: total / len(predictions) for name, total in sums.items()}
