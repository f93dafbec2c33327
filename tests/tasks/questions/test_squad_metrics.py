"""Exact match and F1 equal torchmetrics; the metrics with unanswerable questions equal their definition."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import squad as reference

from diffora.tasks.questions.metrics import NAMES, NAMES_V2, evaluate, evaluate_v2, normalise

HARD = [
    "the cat", "The  Cat.", "a an the", "", " ", "“cat”", "cat's", "cats", "10,000", "10000", "$10", "24\u201310",
    "24-10", "naïve", "nai\u0308ve", "İstanbul", "straße", "STRASSE", "中国", "cat cat dog", "dog cat", "an_apple",
    "theatre", "A.", "\u00a0the\tcat\n", "the\u200bcat", "🐈 cat", "U.S.", "us", "…",
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(HARD), st.text(max_size=20), st.lists(st.sampled_from(HARD), max_size=4).map(" ".join)
)


def torchmetrics(prediction: str, golds: list[str]) -> tuple[float, float]:
    target = {"answers": {"text": golds, "answer_start": [0] * len(golds)}, "id": "1"}
    scores = reference([{"prediction_text": prediction, "id": "1"}], [target])
    return float(scores["exact_match"]), float(scores["f1"])


def agrees(prediction: str, golds: list[str]) -> None:
    exact, f1 = torchmetrics(prediction, golds)
    ours = evaluate([prediction], [golds])
    assert ours["exact_match"] == exact
    if normalise(prediction):  # for texts without words, torchmetrics follows the script of version 2.0; see below
        assert ours["f1"] == pytest.approx(f1, abs=1e-4)
    # Version 2.0 ignores gold answers without words and torchmetrics does not, so compare only if all have words.
    if all(map(normalise, golds)):
        second = evaluate_v2([prediction], [0.0], [golds], 0.0)
        assert (second["exact_match"], second["f1"]) == (exact, pytest.approx(f1, abs=1e-4))


def test_equals_torchmetrics_on_hard_texts():
    for prediction in HARD:
        for gold in HARD:
            agrees(prediction, [gold])


@given(texts, st.lists(texts, min_size=1, max_size=3))
@settings(deadline=None, max_examples=200)
def test_equals_torchmetrics(prediction, golds):
    agrees(prediction, golds)


def test_texts_without_words():
    # The script of 1.1 finds no common word. The script of 2.0 reads both as "no answer".
    assert evaluate(["the"], [["a"]]) == {"exact_match": 100.0, "f1": 0.0}
    second = evaluate_v2(["the"], [0.0], [["a"]], 0.0)
    assert (second["exact_match"], second["f1"]) == (100.0, 100.0)


def test_a_worked_example():
    golds = [["in 1990", "1990"], ["the red fox"], [], []]
    metrics = evaluate_v2(["1990", "fox", "wrong", "also wrong"], [-2.0, 1.0, 3.0, -1.0], golds, 0.0)
    assert metrics == {
        "exact_match": 50.0,  # the first, and the third, which is refused
        "f1": 50.0,
        "HasAns_exact": 50.0,
        "HasAns_f1": 50.0,  # the second is refused, or it would have 2/3
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "best_exact": 75.0,  # answer the first only
        "best_exact_thresh": -2.0,
        "best_f1": 75.0,  # the second would add 2/3, but the fourth comes first
        "best_f1_thresh": -2.0,
    }
    assert tuple(sorted(metrics)) == tuple(sorted(NAMES_V2))


def random_case(rng: random.Random) -> tuple[list[str], list[float], list[list[str]]]:
    words = [
        "red",
        "fox",
        "over",
        "jumps",
        "1990",
    ]  # the official search for a threshold miscounts texts of articles only
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 3))) for _ in range(rng.randint(2, 15))]
    odds = rng.sample([i / 7 for i in range(-50, 50)], len(texts))
    golds = [[" ".join(rng.choices(words, k=2)) for _ in range(rng.choice([0, 1, 3]))] for _ in texts]
    return texts, odds, golds


@pytest.mark.parametrize("seed", range(30))
def test_best_threshold_is_the_best_of_all(seed):
    texts, odds, golds = random_case(random.Random(seed))
    metrics = evaluate_v2(texts, odds, golds, 0.0)
    for name, key in (("exact_match", "best_exact"), ("f1", "best_f1")):
        each = [evaluate_v2(texts, odds, golds, threshold)[name] for threshold in (-1e9, *odds)]
        assert metrics[key] == pytest.approx(max(each))
        reached = evaluate_v2(texts, odds, golds, metrics[f"{key}_thresh"])[name]
        # If refusing everything is best, the official script always gives the threshold 0.0.
        assert reached == pytest.approx(max(each)) or (metrics[f"{key}_thresh"] == 0.0 and max(each) == each[0])


@pytest.mark.parametrize("seed", range(10))
def test_parts_add_up_and_threshold_refuses(seed):
    texts, odds, golds = random_case(random.Random(seed))
    share = sum(map(bool, golds)) / len(golds)
    metrics = evaluate_v2(texts, odds, golds, 0.3)
    for key in ("exact", "f1"):
        parts = share * metrics.get(f"HasAns_{key}", 0) + (1 - share) * metrics.get(f"NoAns_{key}", 0)
        assert metrics["exact_match" if key == "exact" else "f1"] == pytest.approx(parts)
    nothing = evaluate_v2(texts, odds, golds, -1e9)
    assert nothing["exact_match"] == nothing["f1"] == pytest.approx(100 * (1 - share))


def test_without_unanswerable_questions_both_versions_agree():
    texts, odds, golds = random_case(random.Random(1))
    golds = [some or ["red fox"] for some in golds]
    second = evaluate_v2(texts, odds, golds, 1e9)
    assert {name: second[name] for name in NAMES} == evaluate(texts, golds)
    assert not any(name.startswith("NoAns") for name in second)
