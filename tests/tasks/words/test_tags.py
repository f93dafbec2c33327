"""Entities and their scores, compared with seqeval on random and degenerate tag sequences."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2, IOBES

from diffora.tasks.words.tags import Tagging, counts, scores

IOB_TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER", "B-A-B", "I-A-B"]
IOBES_TAGS = ["O", *(f"{prefix}-{kind}" for kind in ("LOC", "PER") for prefix in "BIES")]
SCHEMES = {"IOB2": IOB2, "IOBES": IOBES}


def corpus(tags):
    """Pairs of (real, predicted) tags of sentences, empty sentences included."""
    pair = st.tuples(st.sampled_from(tags), st.sampled_from(tags))
    return st.lists(st.lists(pair, max_size=8), min_size=1, max_size=5)


def ours(tags, sentences, strict=None):
    tagging = Tagging.of(tags)
    first = np.array([i == 0 for sentence in sentences for i in range(len(sentence))], dtype=bool)
    found = []
    for side in (0, 1):
        numbers = np.array([tags.index(pair[side]) for sentence in sentences for pair in sentence], dtype=np.int64)
        found.append(tagging.entities(numbers, first, strict))
    return tagging, counts(*found, len(tagging.types))


def compare(tags, sentences, scheme=None):
    tagging, numbers = ours(tags, sentences, scheme)
    gold, predicted = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    how = {"mode": "strict", "scheme": SCHEMES[scheme]} if scheme else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "f1": f1_score(gold, predicted, **how),
            "precision": precision_score(gold, predicted, **how),
            "recall": recall_score(gold, predicted, **how),
        }
        has_entities = numbers.sum() > 0
        report = classification_report(gold, predicted, output_dict=True, **how) if has_entities else {}
    assert scores(numbers.sum(0)) == pytest.approx(expected, abs=1e-12)
    for kind, row in zip(tagging.types, numbers, strict=True):
        if kind in report:
            found = scores(row)
            assert found["f1"] == pytest.approx(report[kind]["f1-score"], abs=1e-12)
            assert found["precision"] == pytest.approx(report[kind]["precision"], abs=1e-12)
            assert found["recall"] == pytest.approx(report[kind]["recall"], abs=1e-12)
            assert row[2] == report[kind]["support"]
        else:
            assert row[1] == row[2] == 0


@settings(max_examples=60, deadline=None)
@given(corpus(IOB_TAGS))
def test_equal_to_seqeval(sentences):
    compare(IOB_TAGS, sentences)


@settings(max_examples=60, deadline=None)
@given(corpus(IOBES_TAGS))
def test_equal_to_seqeval_with_ends_and_singles(sentences):
    compare(IOBES_TAGS, sentences)


@settings(max_examples=40, deadline=None)
@given(corpus(IOB_TAGS).filter(any))
def test_equal_to_seqeval_strict_iob2(sentences):
    compare(IOB_TAGS, sentences, "IOB2")


@settings(max_examples=40, deadline=None)
@given(corpus(IOBES_TAGS).filter(any))
def test_equal_to_seqeval_strict_iobes(sentences):
    compare(IOBES_TAGS, sentences, "IOBES")


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ("O O O", "O O O"),  # no entity at all
        ("B-LOC I-LOC O", "O O O"),  # nothing predicted
        ("O O O", "B-LOC I-PER O"),  # nothing in the data
        ("I-LOC I-LOC O", "B-LOC I-LOC O"),  # I without B
        ("B-LOC I-PER I-PER", "B-LOC I-LOC I-LOC"),  # the type changes inside a run
        ("B-LOC B-LOC", "B-LOC I-LOC"),
        ("B-PER O", "B-LOC O"),  # a type that the reference does not have
    ],
)
def test_degenerate_sequences(gold, predicted):
    compare(IOB_TAGS, [list(zip(gold.split(), predicted.split(), strict=True))])


def test_entities_by_hand():
    tagging = Tagging.of(["O", "B-PER", "I-PER", "I-LOC"])
    tags = np.array([1, 2, 2, 3, 0, 2, 2])
    first = np.array([True, False, False, False, False, False, True])
    found = tagging.entities(tags, first).tolist()
    assert found == [[0, 3, 1], [3, 4, 0], [5, 6, 1], [6, 7, 1]]  # the last two are in different sentences
    assert tagging.entities(tags, first, "IOB2").tolist() == [[0, 3, 1]]


def test_other_names_of_prefixes_and_tags_without_prefix():
    bilou, iobes = Tagging.of(["O", "B-X", "I-X", "L-X", "U-X"]), Tagging.of(["O", "B-X", "I-X", "E-X", "S-X"])
    assert bilou.prefix.tolist() == iobes.prefix.tolist() and bilou.types == ("X",)
    plain = Tagging.of(["O", "PER", "LOC"])
    assert plain.entities(np.array([1, 1, 2, 0, 2]), np.array([True] + 4 * [False])).tolist() == [
        [0, 2, 1],
        [2, 3, 0],
        [4, 5, 0],
    ]
    gold = [["B", "I", "O", "B"]]
    found = Tagging.of(["O", "B", "I"]).entities(np.array([1, 2, 0, 1]), np.array([True] + 3 * [False]))
    assert found.tolist() == [[begin, end + 1, 0] for _, begin, end in get_entities(gold)]


@pytest.mark.parametrize("names", [["O", "B-PER", "PER"], ["O", "PER-B", "PER-I"], ["O", "B_PER", "I_PER"]])
def test_tags_that_seem_to_mean_something_else_are_refused(names):
    with pytest.raises(ValueError, match="prefix"):
        Tagging.of(names)


@pytest.mark.parametrize("names", [["o", "b-per", "i-per"], ["O", "i-LOC", "i-PER"], ["o", "b-x", "e-x", "s-x"]])
def test_prefixes_in_lower_case_are_refused(names):
    with pytest.raises(ValueError, match=f"the tag '{names[1]}' has its prefix in lower case; write tags as O, B-PER"):
        Tagging.of(names)


@pytest.mark.parametrize("names", [["O", "e-mail", "s-bahn"], ["o", "b-per", "url"], ["o", "per", "loc"]])
def test_types_that_only_look_like_lower_case_tags_are_types(names):
    tagging = Tagging.of(names)
    assert tagging.types == tuple(sorted(name for name in names if name != "O"))


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("I-LOC I-LOC O I-PER", ("IO", 0)),
        ("I-LOC B-LOC O I-PER", ("IOB1", 0)),
        ("B-LOC B-LOC O B-PER I-PER", ("IOB2", 0)),
        ("B-LOC B-LOC O I-PER I-PER", ("IOB2", 1)),
    ],
)
def test_schemes(sentence, expected):
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    tags = np.array([names.index(tag) for tag in sentence.split()])
    first = np.arange(len(tags)) == 0
    assert Tagging.of(names).scheme(tags, first) == expected


def test_the_scheme_iobes_and_runs_that_do_not_follow_it():
    tags = np.array([IOBES_TAGS.index(tag) for tag in ("S-LOC", "B-PER", "E-PER", "O", "B-PER", "O")])
    assert Tagging.of(IOBES_TAGS).scheme(tags, np.arange(6) == 0) == ("IOBES", 1)
