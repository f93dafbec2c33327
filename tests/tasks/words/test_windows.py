"""Words as tokens: the first token of each word, windows, and batches."""

import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import tokenizers.normalizers
import torch
import transformers
from families import tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st

from diffora.tasks.words.windows import (
    IGNORED,
    NO_TOKEN,
    NO_WORD,
    Frame,
    Sentence,
    WordsCollator,
    tokenise_words,
    windows,
)

WORDS = [
    "Anna",
    "Müller-Lüdenscheid",
    "lives",
    "in",
    "東京",
    ",",
    "the",
    "U.S.",
    "don't",
    "...",
    "(x)",
    "ﬁne",
    "🙂",
    "market",
]


def sentences(n: int = 40) -> list[list[str]]:
    generator = random.Random(0)
    return [generator.choices(WORDS, k=generator.randint(1, 9)) for _ in range(n)]


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "mpnet", "t5", "llama"])
def test_the_first_token_of_each_word_as_the_tokenizer_itself_says(name):
    """Words given one by one, with a space before each: the same tokens as those of the joined text."""
    tokenizer = tokenizer_for(name)
    with_space = tokenizer_for(name)
    with_space.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    rows = sentences()
    found = tokenise_words(tokenizer, [["x", *words] for words in rows])
    own = with_space([["x", *words] for words in rows], is_split_into_words=True, add_special_tokens=False)
    first = tokenizer("x", add_special_tokens=False)["input_ids"]
    first_own = with_space("x", add_special_tokens=False)["input_ids"]
    for i, sentence in enumerate(found):
        owners, tokens = own.word_ids(i), own.tokens(i)
        starts = [owners.index(word) for word in range(1, len(rows[i]) + 1)]
        starts = [start + (tokens[start] == "Ġ") for start in starts]  # a space alone does not stand for a word
        assert sentence.ids[len(first) :].tolist() == own["input_ids"][i][len(first_own) :]
        assert (sentence.starts[1:] - len(first)).tolist() == [start - len(first_own) for start in starts]


def test_words_without_tokens_and_tokens_without_words():
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)  # it removes control characters and accents
    tokenizer = tokenizer_for("bert")
    tokenizer.backend_tokenizer.normalizer = normalizer
    [found] = tokenise_words(tokenizer, [["the", "\u200b", "", "in", "\u0301"]])
    assert (found.starts == NO_TOKEN).tolist() == [False, True, True, False, True]
    texts = [tokenizer.decode([found.ids[start]]).strip() for start in found.starts if start != NO_TOKEN]
    assert all(word.startswith(text) and text for word, text in zip(("the", "in"), texts, strict=True))
    empty, blank = tokenise_words(tokenizer, [[], [""]])
    assert len(empty.ids) == len(empty.starts) == len(blank.ids) == 0 and blank.starts.tolist() == [NO_TOKEN]


@pytest.fixture
def slow(tmp_path: Path):
    """A tokenizer in Python, without offsets, and the fast one of the same vocabulary."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "farm", "##er", "told", "was", "##s", "in", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    from transformers.models.bert_japanese.tokenization_bert_japanese import BertJapaneseTokenizer

    slow = BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), word_tokenizer_type="basic")
    fast = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    return slow, fast


def test_slow_and_fast_tokenizers_agree(slow):
    slow, fast = slow
    assert not slow.is_fast and fast.is_fast
    rows = [["the", "farmer", "told", "."], ["farmers", "was", "xyz", "in"], []]
    for one, other in zip(tokenise_words(slow, rows), tokenise_words(fast, rows), strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.starts.tolist() == other.starts.tolist()
    assert (Frame.of(slow).before, Frame.of(slow).after) == (Frame.of(fast).before, Frame.of(fast).after) == ([2], [3])


# --- windows ---

GAPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(GAPS, st.integers(1, 12), st.data())
def test_each_word_belongs_to_one_window_that_has_its_first_token(gaps, room, data):
    """``gaps`` has for each word its number of tokens, and of tokens of no word before it."""
    overlap = data.draw(st.integers(0, room - 1))
    starts, n = [], 0
    for tokens, before in gaps:
        n += before
        starts.append(n if tokens else NO_TOKEN)
        n += tokens
    found = windows(Sentence(np.arange(n), np.array(starts)), room, overlap)
    assert [word for window in found for word in range(window.first, window.stop)] == list(range(len(gaps)))
    for window in found:
        assert 0 <= window.end - window.begin <= room and window.stop - window.first <= room
        assert all(
            window.begin <= starts[word] < window.end
            for word in range(window.first, window.stop)
            if starts[word] >= 0 and gaps[word][1] < room
        )
    ends = [window.end for window in found]
    assert ends == sorted(ends) and [w.begin for w in found] == sorted(w.begin for w in found)
    if n <= room and len(gaps) <= room:
        assert len(found) == 1


def test_shared_words_go_to_the_window_where_they_are_farther_from_the_edge():
    sentence = Sentence(np.arange(12), np.arange(12))
    found = windows(sentence, room=8, overlap=4)
    assert [(w.begin, w.end) for w in found] == [(0, 8), (4, 12)]
    assert [(w.first, w.stop) for w in found] == [(0, 6), (6, 12)]


def test_batches():
    rows = {
        "input_ids": [[5, 6, 7, 8], [5, 9]],
        "starts": [[1, NO_TOKEN, 2], [0]],
        "labels": [[3, 1, 2], [4]],
        "example": [0, 3],
        "row": [0, 1],
        "length": [4, 2],
    }
    batch = WordsCollator(pad_token_id=0)(rows)
    assert batch["labels"].tolist() == [[IGNORED, 3, 2, IGNORED], [4, IGNORED, IGNORED, IGNORED]]
    assert batch["starts"].tolist() == [[1, NO_TOKEN, 2], [0, NO_WORD, NO_WORD]]
    assert batch["tags"].tolist() == [[3, 1, 2], [4, IGNORED, IGNORED]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]] and batch["attention_mask"].sum() == 6
    del rows["labels"]
    assert torch.equal(WordsCollator(0)(rows)["starts"], batch["starts"])
