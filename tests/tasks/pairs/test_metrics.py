"""ROUGE and exact match, against Google's own tokens and torchmetrics."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text.rouge import rouge_score

from diffora.tasks.pairs.metrics import ROUGE, Words, generation_scores

WORDS = ["the", "Cat", "sat", "on", "the", "mat", "it's", "3.5", "U.S.", "well-known", "-", "dog", "."]


def texts(seed: int, least: int = 0) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)

    def text() -> str:
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(least, 8))) for _ in range(rng.randint(1, 3))]
        return "\n".join(lines)

    return [text() for _ in range(40)], [text() for _ in range(40)]


@pytest.mark.parametrize("seed", range(3))
def test_random_texts_score_as_by_both_other_implementations(seed):
    predictions, targets = texts(seed)
    ours = generation_scores(predictions, targets)
    google = RougeScorer(list(ROUGE))  # with its own tokens
    for name in ROUGE:
        each = [google.score(t, p)[name].fmeasure for p, t in zip(predictions, targets, strict=True)]
        assert ours[name] == pytest.approx(sum(each) / len(each), abs=1e-12) and 0 < ours[name] < 1
    theirs = rouge_score(predictions, targets, rouge_keys=("rouge1", "rouge2", "rougeL"))
    for name in ("rouge1", "rouge2", "rougeL"):
        assert ours[name] == pytest.approx(theirs[f"{name}_fmeasure"].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("", "a cat", {"rouge1": 0, "rougeLsum": 0, "exact_match": 0}),
        ("a cat", "", {"rouge1": 0, "rougeL": 0, "exact_match": 0}),
        ("", "", {"rouge1": 0, "exact_match": 1}),
        ("...", "?", {"rouge1": 0, "exact_match": 0}),
        ("cat", "cat", {"rouge1": 1, "rouge2": 0, "rougeL": 1, "exact_match": 1}),  # one word has no pair of words
        (" a  cat\n", "a cat", {"rouge2": 1, "exact_match": 1}),
        ("A cat", "a cat", {"rouge1": 1, "exact_match": 0}),
        ("für Käse", "für Käse", {"rouge1": 1, "rouge2": 1}),
        ("привет мир", "привет", {"rouge1": 2 / 3}),
        ("fur", "für", {"rouge1": 0}),
        ("f\u00fcr", "fu\u0308r", {"rouge1": 1}),  # one letter, or a letter and a mark
        ("की", "कि", {"rouge1": 0}),  # they differ by a mark
        ("今天天气很好", "今天天气不错", {"rouge1": 4 / 6, "rougeL": 4 / 6}),
        ("a b\nc d", "c d\na b", {"rougeL": 0.5, "rougeLsum": 1}),  # each line is a sentence
    ],
)
def test_degenerate_texts(prediction, target, expected):
    found = generation_scores([prediction], [target])
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_words_of_scripts_without_spaces():
    assert Words().tokenize("2024年のiPhone15を, สวัสดี a_b") == [
        "2024", "年", "の", "iphone15", "を", "ส", "วั", "ส", "ดี", "a", "b",
    ]  # fmt: skip


def test_no_texts_have_no_score():
    assert all(value != value for value in generation_scores([], []).values())


def test_words_keep_the_letters_of_every_alphabet():
    assert Words().tokenize("Für_die 3,5 Каша!") == ["für", "die", "3", "5", "каша"]
