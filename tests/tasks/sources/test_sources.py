"""Rows from local files, the hub and the generator; every malformed input with its message."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import REPO

import diffora
from diffora import hub
from diffora.errors import UserError
from diffora.tasks.glue import TASKS
from diffora.tasks.sources import hub as source_hub
from diffora.tasks.sources.load import load_rows, load_split
from diffora.tasks.sources.tables import content_hash

DATA = Path(os.environ.get("DIFFORA_TEST_DATA") or REPO.parent / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no test data at {DATA} (set DIFFORA_TEST_DATA)")

MRPC, COLA, STSB, MNLI = TASKS["mrpc"], TASKS["cola"], TASKS["stsb"], TASKS["mnli"]
ROWS = {
    "sentence1": ['A dog, "big".', "", "2020-01-01", "NA", "Zwölf\nLinien"],
    "sentence2": ["One.", "Two.", "2021-02-03", "null", "7"],
    "label": [0, 1, 1, 0, 1],
    "idx": [0, 1, 2, 3, 4],
}


def write(folder: Path, split: str, columns: dict, extension: str = "parquet") -> Path:
    """Write one split as a file. Values are not checked, so tests can write wrong ones."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.{extension}"
    if extension == "parquet":
        pa.parquet.write_table(pa.table(columns), file)
    elif extension == "csv":
        pa.csv.write_csv(pa.table(columns), file)
    else:
        names = list(columns)
        rows = (dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_both(folder: Path, extension: str = "parquet", **changes) -> Path:
    """Write a good validation split, and a train split with some columns replaced (None removes one)."""
    columns = {name: values for name, values in {**ROWS, **changes}.items() if values is not None}
    write(folder, "train", columns, extension)
    write(folder, "validation", ROWS)
    return folder


def problems(folder: Path, spec=MRPC, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_rows(spec, folder, **options)
    return caught.value.problems


# --- what works ---


@needs_data
@pytest.mark.parametrize(("name", "sizes"), [("mrpc", (3668, 408)), ("cola", (8551, 1043)), ("wnli", (635, 71))])
def test_real_data(name, sizes):
    rows = load_rows(TASKS[name], DATA / name)
    assert (len(rows.train), len(rows.validation["validation"])) == sizes
    raw = pa.parquet.read_table(DATA / name / "train.parquet").to_pylist()
    kept = (*TASKS[name].text_columns, "label")
    assert rows.train.to_list() == [{key: row[key] for key in kept} for row in raw]
    assert rows.source == str(DATA / name)


def test_formats_give_equal_rows_and_hash(tmp_path):
    loaded = {}
    for extension in ("parquet", "jsonl", "csv"):
        folder = tmp_path / extension
        for split in ("train", "validation"):
            write(folder, split, ROWS, extension)
        loaded[extension] = load_rows(MRPC, folder)
    expected = [dict(zip(ROWS, values, strict=True)) for values in zip(*ROWS.values(), strict=True)]
    for row in expected:
        del row["idx"]
    for rows in loaded.values():
        assert rows.train.to_list() == rows.validation["validation"].to_list() == expected
        assert rows.data_hash == loaded["parquet"].data_hash


def test_regression_labels_are_equal_in_all_formats(tmp_path):
    columns = {**ROWS, "label": [0.0, 3.8, 5.0, 2.267, 1.0]}
    hashes = set()
    for extension in ("parquet", "jsonl", "csv"):
        for split in ("train", "validation"):
            write(tmp_path / extension, split, columns, extension)
        rows = load_rows(STSB, tmp_path / extension)
        assert rows.train["label"] == pytest.approx(columns["label"])
        hashes.add(rows.data_hash)
    assert len(hashes) == 1


def test_large_and_dictionary_text_and_float_labels_are_accepted(tmp_path):
    write_both(
        tmp_path,
        sentence1=pa.array(ROWS["sentence1"], pa.large_string()),
        sentence2=pa.array(ROWS["sentence2"]).dictionary_encode(),
        label=pa.array([0.0, 1.0, 1.0, 0.0, 1.0]),
    )
    rows = load_rows(MRPC, tmp_path)
    assert rows.train.to_list() == rows.validation["validation"].to_list()
    assert rows.train.features["label"].dtype == "int64"


def test_hash_sees_every_value_and_column_boundary(tmp_path):
    def hash_of(**changes):
        return load_rows(MRPC, write_both(tmp_path, **changes)).data_hash

    original = hash_of()
    assert hash_of(idx=[9, 9, 9, 9, 9]) == original  # not used, not hashed
    others = [
        hash_of(label=[0, 1, 1, 0, 0]),
        hash_of(sentence2=["One", "Two.", "2021-02-03", "null", "7"]),
        hash_of(sentence2=["One.T", "wo.", "2021-02-03", "null", "7"]),
        hash_of(sentence1=ROWS["sentence2"], sentence2=ROWS["sentence1"]),
    ]
    assert len({original, *others}) == 5


def test_hash_ignores_chunks_and_is_equal_in_another_process(tmp_path):
    write_both(tmp_path)
    here = load_rows(MRPC, tmp_path).data_hash
    pa.parquet.write_table(pa.table(ROWS), tmp_path / "train.parquet", row_group_size=2)
    table = pa.table({name: ROWS[name] for name in ("sentence1", "label")})
    assert content_hash(table) == content_hash(pa.concat_tables([table[:2], table[2:]]))
    code = (
        "import sys; from diffora.tasks.glue import TASKS; from diffora.tasks.sources.load import load_rows;"
        "print(load_rows(TASKS['mrpc'], sys.argv[1]).data_hash)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(diffora.__file__).parents[1])}
    present = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
    assert present.stdout.strip() == here, present.stderr


def test_the_diagnostic_set_is_a_configuration_of_its_own_on_the_hub(tmp_path, monkeypatch):
    calls = []

    def fake(*args):
        calls.append(args)
        columns = {"premise": ["p", "q"], "hypothesis": ["h", "i"], "label": [-1, -1], "idx": [0, 1]}
        return {"test": datasets.Dataset(pa.table(columns))}

    monkeypatch.setattr(source_hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = load_split(MNLI, "ax")
    assert calls == [("nyu-mll/glue", "ax")]
    assert rows.to_list() == [
        {"premise": "p", "hypothesis": "h", "idx": 0},
        {"premise": "q", "hypothesis": "i", "idx": 1},
    ]


def test_mnli_has_two_validation_splits_the_matched_one_first(tmp_path):
    def rows(text):
        return {"premise": [text], "hypothesis": ["h"], "label": [2]}

    write(tmp_path, "train", rows("train"))
    write(tmp_path, "validation_matched", rows("matched"))
    write(tmp_path, "validation_mismatched", rows("mismatched"))
    loaded = load_rows(MNLI, tmp_path)
    premises = {name: split["premise"][0] for name, split in loaded.validation.items()}
    assert list(premises.items()) == [("validation", "matched"), ("validation_mismatched", "mismatched")]


def test_names_of_a_downloaded_hub_folder_work(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, f"{split}-00000-of-00001", ROWS)
    assert len(load_rows(MRPC, tmp_path).train) == 5


def write_shards(folder: Path, split: str, *shards: dict) -> None:
    for i, columns in enumerate(shards):
        write(folder, f"{split}-{i:05}-of-{len(shards):05}", columns)


def part(first: int, last: int, **changes) -> dict:
    return {name: values[first:last] for name, values in ROWS.items()} | changes


def test_shards_are_one_split(tmp_path):
    write_shards(tmp_path / "shards", "train", part(0, 2), part(2, 3), part(3, 5))
    write_shards(tmp_path / "shards", "validation", part(0, 1), part(1, 5))
    rows, whole = load_rows(MRPC, tmp_path / "shards"), load_rows(MRPC, write_both(tmp_path / "whole"))
    assert rows.train.to_list() == whole.train.to_list() and rows.data_hash == whole.data_hash
    write_shards(tmp_path / "many", "train", *[part(0, 1, sentence1=[str(i)]) for i in range(12)])  # 10 comes after 9
    write(tmp_path / "many", "validation", ROWS)
    assert load_rows(MRPC, tmp_path / "many").train["sentence1"] == [str(i) for i in range(12)]


def test_faults_in_a_shard_name_it_and_the_row_within_it(tmp_path):
    write(tmp_path, "validation", ROWS)
    write_shards(tmp_path, "train", part(0, 2), part(2, 4, label=[0, 9]), part(4, 5, sentence1=[None]))
    second, third = problems(tmp_path)
    assert "train-00001-of-00003.parquet, row 2 (data rows, counted from 1), column 'label': 9 is not" in second
    assert "train-00002-of-00003.parquet, row 1 (data rows, counted from 1), column 'sentence1': null" in third


def test_shards_must_be_complete_and_of_one_set(tmp_path):
    write(tmp_path, "validation", ROWS)
    write_shards(tmp_path, "train", *[part(0, 2)] * 4)
    (tmp_path / "train-00001-of-00004.parquet").unlink()
    (tmp_path / "train-00003-of-00004.parquet").unlink()
    [message] = problems(tmp_path)
    assert "'train' are missing: train-00001-of-00004.parquet, train-00003-of-00004.parquet." in message
    write_shards(tmp_path, "train", *[part(0, 2)] * 2)
    assert "more than one file or set of shards for the split 'train'" in problems(tmp_path)[0]
    for file in tmp_path.glob("train-*-of-00004.parquet"):
        file.unlink()
    write(tmp_path, "train", ROWS, "csv")
    assert "train-00001-of-00002.parquet, train.csv; keep one" in problems(tmp_path)[0]


# --- single splits: test sets ---


@pytest.mark.parametrize("extension", ["parquet", "jsonl", "csv"])
def test_a_split_without_labels_keeps_the_numbers_of_its_rows(tmp_path, extension):
    numbers = [3, 0, 4, 1, 2]  # shuffled
    for labels in (None, [-1] * 5):
        columns = {**ROWS, "idx": numbers, "label": labels}
        write(tmp_path, "test", {name: values for name, values in columns.items() if values is not None}, extension)
        rows = load_split(MRPC, "test", tmp_path)
        assert set(rows.column_names) == {"sentence1", "sentence2", "idx"} and rows["idx"] == numbers
        assert rows["sentence1"] == ROWS["sentence1"]
    write(tmp_path, "test", {**ROWS, "idx": numbers}, extension)
    labelled = load_split(MRPC, "test", tmp_path)
    assert labelled["label"] == ROWS["label"] and labelled["idx"] == numbers


def test_a_split_need_not_number_its_rows(tmp_path):
    write(tmp_path, "test", {name: ROWS[name] for name in ("sentence1", "sentence2")})
    assert load_split(MRPC, "test", tmp_path).column_names == ["sentence1", "sentence2"]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 1, 2, 2, 2], "test.parquet: column 'idx': 2 is the number of 3 rows"),
        ([0, 1, -2, 3, 4], "row 3 (data rows, counted from 1), column 'idx': -2 is not the number of a row"),
        ([0, None, 2, 3, 4], "row 2 (data rows, counted from 1), column 'idx': null is not"),
        (["a", "b", "c", "d", "e"], "column 'idx' holds string"),
        ([0.5, 1, 2, 3, 4], "column 'idx' holds double"),
        ([[0], [1], [2], [3], [4]], "column 'idx' holds list"),
        ([None] * 5, "row 1 (data rows, counted from 1), column 'idx': null is not"),
    ],
)
def test_wrong_numbers(tmp_path, numbers, expected):
    write(tmp_path, "test", {**ROWS, "idx": numbers})
    with pytest.raises(UserError) as caught:
        load_split(MRPC, "test", tmp_path)
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]
    assert "which a submission quotes; without this column rows are numbered from 0" in caught.value.problems[0]
    write(tmp_path, "validation", {**ROWS, "idx": numbers})
    assert load_split(MRPC, "validation", tmp_path).column_names == ["sentence1", "sentence2", "label"]
    write_both(tmp_path, idx=numbers)
    assert len(load_rows(MRPC, tmp_path).train) == 5  # nothing asks for them in training


def test_labels_in_only_some_shards_are_refused(tmp_path):
    write_shards(tmp_path, "test", part(0, 2), part(2, 5, label=[-1, -1, -1]))
    with pytest.raises(UserError, match=r"test-00001-of-00002.parquet, row 1 .*-1 marks an unlabelled row"):
        load_split(MRPC, "test", tmp_path)


@pytest.mark.parametrize("labels", [[[0]] * 5, [{"a": 1}] * 5])
def test_a_split_with_invalid_labels_is_refused(tmp_path, labels):
    write(tmp_path, "test", {**ROWS, "label": labels})
    with pytest.raises(UserError, match="column 'label' holds"):
        load_split(MRPC, "test", tmp_path)


def test_max_train_rows_is_a_fixed_random_subset(tmp_path):
    texts = [f"text {i}" for i in range(200)]
    columns = {"sentence1": texts, "sentence2": texts, "label": [i % 2 for i in range(200)]}
    write(tmp_path, "train", columns)
    write(tmp_path, "validation", columns)
    every = load_rows(MRPC, tmp_path, max_train_rows=1000)
    some = load_rows(MRPC, tmp_path, max_train_rows=20)
    again = load_rows(MRPC, tmp_path, max_train_rows=20)
    assert len(every.train) == 200 and every.data_hash == load_rows(MRPC, tmp_path).data_hash
    assert some.train["sentence1"] == again.train["sentence1"] and some.data_hash == again.data_hash
    chosen = [texts.index(text) for text in some.train["sentence1"]]
    assert chosen == sorted(set(chosen)) and len(chosen) == 20 and chosen != list(range(20))
    assert some.data_hash != every.data_hash and len(some.validation["validation"]) == 200
    for wrong in (0, -3):
        assert f"max_train_rows={wrong}" in problems(tmp_path, max_train_rows=wrong)[0]


def test_embedded_task():
    rows = load_rows(TASKS["paraphrase"], train_rows=40, validation_rows=10)
    again = load_rows(TASKS["paraphrase"], train_rows=40, validation_rows=10)
    assert (len(rows.train), len(rows.validation["validation"])) == (40, 10)
    assert rows.data_hash == again.data_hash and rows.source == "embedded:paraphrase"
    assert set(rows.train.column_names) == {"sentence1", "sentence2", "label"}
    with pytest.raises(UserError) as caught:
        load_rows(TASKS["paraphrase"], path="data", train_rows=0, validation_rows=-1)
    assert [text.split(" ")[0] for text in caught.value.problems] == [
        "task.train_rows=0",
        "task.validation_rows=-1",
        "task.path=data:",
    ]


# --- what does not ---


def test_folder_missing_or_a_file(tmp_path):
    [message] = problems(tmp_path / "nowhere")
    assert "nowhere does not exist" in message and "train, validation" in message
    file = write(tmp_path, "train", ROWS)
    assert "is a file, not a folder" in problems(file)[0]


def test_missing_split_files_are_named(tmp_path):
    (tmp_path / "train.tsv").touch()
    train, validation = problems(tmp_path)
    assert "'train'" in train and "train.parquet" in train and "train.jsonl" in train and "train.csv" in train
    assert "found train.tsv" in train and "'validation'" in validation
    (tmp_path / "train.tsv").unlink()
    assert "found nothing" in problems(tmp_path)[0]
    write(tmp_path, "train", ROWS, "csv")
    write(tmp_path, "train", ROWS, "jsonl")
    assert "more than one file" in problems(tmp_path)[0]


@pytest.mark.parametrize(
    ("extension", "content", "expected"),
    [
        ("parquet", b"PAR1 no, this is not one", "cannot be read as .parquet"),
        ("parquet", b"", "cannot be read as .parquet"),
        ("csv", b"", "the file is empty"),
        (
            "csv",
            b"sentence1,sentence2,label\na,b,1\na,b\nc\n",
            r"row 2 \(.*has 2 fields, the header has 3 \(and 1 more",
        ),
        ("csv", b"sentence1,sentence2,label\n\xff\xfe,b,1\n", "cannot be read as .csv: line 2: byte 0xff is not UTF-8"),
        ("csv", b"sentence1,sentence2,label\n", r"train\.csv: no rows"),
        ("jsonl", b"", r"train\.jsonl: no rows"),
        ("jsonl", b'{"sentence1": "a", "sentence2": "b", "label": 1}\n{"sent', "row 2 .* is not JSON"),
        ("jsonl", b"[1]\n", "row 1 .* is not a JSON object"),
        (
            "jsonl",
            b'{"sentence1": "a", "sentence2": "b", "label": 1}\n{"sentence1": 5, "sentence2": "b", "label": 1}\n',
            "row 2 .*'sentence1': 5 is not text",
        ),
        (
            "jsonl",
            b'{"sentence1": "a", "sentence2": "b", "label": "yes"}\n',
            "row 1 .*'label': \"yes\" is not one of 0 ",
        ),
    ],
)
def test_unreadable_files(tmp_path, extension, content, expected):
    write(tmp_path, "validation", ROWS)
    (tmp_path / f"train.{extension}").write_bytes(content)
    [message] = problems(tmp_path)
    assert re.search(expected, message), message
    assert f"train.{extension}" in message


def test_truncated_parquet(tmp_path):
    write_both(tmp_path)
    file = tmp_path / "train.parquet"
    whole = file.read_bytes()
    for size in (8, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:size])
        assert "train.parquet cannot be read" in problems(tmp_path)[0]


@pytest.mark.parametrize("checksums", [False, True])
def test_a_damaged_page_is_named_by_column_and_rows(tmp_path, checksums):
    """The second column of the second row group, compressed and not. Without compression only a checksum can tell."""
    n = 300
    table = pa.table({"sentence1": ["a"] * n, "sentence2": [f"b {i * 7919}" for i in range(n)], "label": [0] * n})
    file = tmp_path / "train-00001-of-00002.parquet"
    write(tmp_path, "validation", ROWS)
    write(tmp_path, "train-00000-of-00002", ROWS)
    codec = "none" if checksums else "snappy"
    options = {"use_dictionary": False, "write_page_checksum": checksums, "compression": codec}
    pa.parquet.write_table(table, file, row_group_size=100, **options)
    with pa.parquet.ParquetFile(file) as parquet:
        chunk = parquet.metadata.row_group(1).column(1)
        middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content = bytearray(file.read_bytes())
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    file.write_bytes(content)
    [message] = problems(tmp_path)
    assert (
        f"{file} cannot be read as .parquet: rows 101 to 200 (data rows, counted from 1), column 'sentence2'" in message
    )


def test_random_damage_to_a_parquet_file_is_never_a_traceback(tmp_path):
    """The result is an error with its message, or rows that pass every check."""
    n, rng = 300, np.random.default_rng(0)
    texts = [f"text {i}" for i in range(n)]
    write(tmp_path, "validation", ROWS)
    table = pa.table({"sentence1": texts, "sentence2": texts, "label": rng.integers(0, 2, n)})
    file, refused, passed = tmp_path / "train.parquet", 0, 0
    pa.parquet.write_table(table, file, row_group_size=100, compression="none", use_dictionary=False)
    good = file.read_bytes()
    for _ in range(60):
        content = bytearray(good)
        at = int(rng.integers(4, len(good) - 16))
        content[at : at + 8] = rng.bytes(8)
        file.write_bytes(content)
        try:
            rows = load_rows(MRPC, tmp_path).train
        except UserError as error:
            refused += all("train.parquet" in problem for problem in error.problems)
        else:
            passed += set(rows["label"]) <= {0, 1} and all(isinstance(text, str) for text in rows["sentence1"])
    assert refused > 20 and refused + passed == 60


@pytest.mark.parametrize("extension", ["parquet", "jsonl", "csv"])
def test_missing_column_with_near_miss(tmp_path, extension):
    write_both(tmp_path, extension, sentence2=None, Sentence_2=ROWS["sentence2"])
    [message] = problems(tmp_path)
    assert (
        "no column 'sentence2'; it has" in message and "; rename 'Sentence_2' if" in message and "label, idx" in message
    )


def test_all_problems_are_collected(tmp_path):
    write(tmp_path, "train", {"text": ["a"], "labels": [1]})
    write(tmp_path, "validation", {**ROWS, "sentence1": [None] * 5, "label": [0, 1, 7, 0, 8]})
    found = problems(tmp_path)
    assert len(found) == 5
    assert "rename 'labels'" in found[2]
    assert "row 1 " in found[3] and "'sentence1'" in found[3] and "null" in found[3] and "4 more" in found[3]
    assert "row 3 " in found[4] and ": 7 is not one of 0 (not_equivalent), 1 (equivalent) (and 1 more" in found[4]


def test_duplicate_columns(tmp_path):
    write(tmp_path, "validation", ROWS)
    (tmp_path / "train.csv").write_text("sentence1,sentence2,label,label\na,b,1,0\n")
    assert "2 columns are called 'label'" in problems(tmp_path)[0]
    (tmp_path / "train.csv").rename(tmp_path / "test.csv")
    with pytest.raises(UserError, match="2 columns are called 'label'"):
        load_split(MRPC, "test", tmp_path)


def test_text_of_wrong_type_or_null(tmp_path):
    [message] = problems(write_both(tmp_path, sentence1=[1, 2, 3, 4, 5]))
    assert "column 'sentence1' holds int64, expected text" in message
    for extension in ("parquet", "jsonl"):
        [message] = problems(write_both(tmp_path / extension, extension, sentence1=["a", "b", None, "d", "e"]))
        assert f"train.{extension}, row 3 " in message and "'sentence1': null in place of a text" in message
        assert "more" not in message


def test_text_that_is_not_utf8(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    write(tmp_path, "train", {"sentence1": bad, "sentence2": ["b"], "label": [1]})
    write(tmp_path, "validation", ROWS)
    assert (
        "train.parquet, row 1 (data rows, counted from 1), column 'sentence1' is not valid UTF-8"
        in problems(tmp_path)[0]
    )


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 2, 1, 0], "row 3 (data rows, counted from 1), column 'label': 2 is not one of 0 (not_equivalent)"),
        (
            [0, None, 1, None, None],
            "row 2 (data rows, counted from 1), column 'label': null in place of a label, expected one of 0",
        ),
        ([0.0, 0.5, 1.0, 1.0, 1.0], "row 2 (data rows, counted from 1), column 'label': 0.5 is not one of"),
        ([0.0, 1.0, 1.0, float("nan"), 1.0], "row 4 (data rows, counted from 1), column 'label': NaN is not one of"),
        ([0, 1, -1, -1, 0], "column 'label': -1 marks an unlabelled row"),
        ([0, 1, 2**60, 1, 0], "row 3 (data rows, counted from 1), column 'label': 1152921504606846976 is not one of"),
        ([-2, 1, 0, 1, 0], "row 1 (data rows, counted from 1), column 'label': -2 is not one of"),
        (
            ["0", "1", "equivalent", "0", "1"],
            "row 3 (data rows, counted from 1), column 'label': \"equivalent\" is not",
        ),
        ([True, False, True, True, True], "column 'label' holds bool, expected one of"),
        ([[0], [1], [1], [0], [1]], "column 'label' holds list"),
    ],
)
def test_wrong_labels(tmp_path, labels, expected):
    [message] = problems(write_both(tmp_path, label=labels))
    assert expected in message and "train.parquet" in message


@pytest.mark.parametrize("value", ["", "yes", "1.5", "-1", "2", "nan", "1 2"])
def test_wrong_labels_in_csv_name_the_row(tmp_path, value):
    write(tmp_path, "validation", ROWS)
    (tmp_path / "train.csv").write_text(f"sentence1,sentence2,label\na,b,1\nc,d,{value}\n")
    [message] = problems(tmp_path)
    assert f"train.csv, row 2 (data rows, counted from 1), column 'label': {json.dumps(value)} " in message
    assert ("unlabelled" in message) == (value == "-1")


def test_stsb_range(tmp_path):
    labels = [0.0, 5.0, 5.1, -1.0, 2.5]
    unlabelled, outside = problems(write_both(tmp_path, label=labels), STSB)[:2]
    assert "row 4 " in unlabelled and "unlabelled" in unlabelled
    assert "row 3 " in outside and "5.1 is not a number from 0 to 5" in outside


# --- the hub ---


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_unreachable_hub_fails_quickly_and_says_what_to_do(no_cache, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_rows(MNLI)
    assert time.monotonic() - start < hub.PROBE_SECONDS + 2
    message = str(caught.value)
    assert "'mnli'" in message and "http://127.0.0.1:9 does not answer" in message
    assert "task.path=<folder with train and validation_matched and validation_mismatched" in message
    assert "experiment=quickstart" in message
    assert datasets.config.HF_HUB_OFFLINE is False  # left as it was


def test_offline_mode_does_not_use_the_network(no_cache, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked the network in offline mode"))
    with pytest.raises(UserError, match="offline mode is on"):
        load_rows(MRPC)
    assert datasets.config.HF_HUB_OFFLINE is True


def test_hub_rows_are_those_of_equal_local_files(tmp_path, monkeypatch):
    calls = []

    def fake(*args):
        calls.append(args)
        return {name: datasets.Dataset(pa.table(ROWS)) for name in ("train", "validation", "test")}

    monkeypatch.setattr(source_hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = load_rows(MRPC)
    assert calls == [("nyu-mll/glue", "mrpc")] and rows.source == "nyu-mll/glue/mrpc"
    assert rows.data_hash == load_rows(MRPC, write_both(tmp_path)).data_hash
