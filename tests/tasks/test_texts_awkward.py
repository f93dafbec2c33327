"""task=text with the files that people really have: each is read, said or refused, never misread without a word."""

import gzip

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import write
from test_text import problems_of, tickets
from transformers import AutoTokenizer

from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.tasks.base import Split, get_task

HEAD = "text,label\n"


@pytest.fixture
def task(cfg):
    return lambda path, *more: get_task(cfg("task=text", f"task.path={path}", *more).task)


def notes_of(task, split: str = "train") -> str:
    return "\n".join(task.accounts[split].notes)


def lines(*labels: str, start: int = 0) -> str:
    return "".join(f"t{i},{label}\n" for i, label in enumerate(labels, start))


# --- read ---


def test_a_byte_order_mark_and_windows_line_ends(task, tmp_path):
    rows = tickets()
    (tmp_path / "t.csv").write_text(HEAD + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    content = (tmp_path / "t.csv").read_text().replace("\n", "\r\n")
    (tmp_path / "w.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert task(tmp_path / "w.csv").load().data_hash == task(tmp_path / "t.csv").load().data_hash


def test_numbers_and_booleans_as_classes(task, tmp_path):
    (tmp_path / "n.csv").write_text(HEAD + lines(*"1212"))
    assert task(tmp_path / "n.csv").head()["id2label"] == {0: "1", 1: "2"}
    (tmp_path / "b.csv").write_text(HEAD + lines("True", "False") + lines("True", "False", start=2))
    assert task(tmp_path / "b.csv").head()["id2label"] == {0: "False", 1: "True"}
    for kind in ("jsonl", "parquet"):
        file = write(tmp_path / f"b.{kind}", [{"text": f"t{i}", "label": i % 2 == 0} for i in range(4)])
        assert task(file).head()["id2label"] == {0: "false", 1: "true"}


def test_mixed_types_are_one_class_and_noted(task, tmp_path):
    given = task(
        write(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": (1, "1", 2.0, "b")[i % 4]} for i in range(12)])
    )
    given.load()
    assert list(given.spec.label_names) == ["1", "2", "b"]
    assert "column 'label' mixes numbers and texts; 1 and \"1\" are the same class" in notes_of(given)


def test_white_space_and_case_of_labels(task, tmp_path):
    (tmp_path / "t.csv").write_text(HEAD + lines("spam", "spam ", "Spam", "ham", "ham", " ham"))
    given = task(tmp_path / "t.csv")
    given.load()
    assert list(given.spec.label_names) == ["Spam", "ham", "spam"]
    assert given.accounts["train"].changed == {"white space around the label removed": 2}
    assert "classes whose names differ only in case, white space or invisible characters: Spam, spam" in notes_of(given)


@pytest.mark.parametrize("word", ["nan", "None", "NULL", "n/a"])
def test_words_for_a_missing_label_are_noted(task, tmp_path, word):
    (tmp_path / "t.csv").write_text(HEAD + lines("a", "b", word, "a", "b", word))
    given = task(tmp_path / "t.csv")
    given.load()
    assert f"has the class {word}: if this means that there is no label, remove these rows" in notes_of(given)


def test_a_class_with_one_row_stays_in_training(task, tmp_path):
    (tmp_path / "t.csv").write_text(HEAD + lines(*"ababababc"))
    given = task(tmp_path / "t.csv")
    loaded = given.load()
    assert 2 in loaded.train["label"] and 2 not in loaded.validation["validation"]["label"]
    assert notes_of(given, "validation").endswith("no row of these classes: c")


def test_rows_of_both_parts_are_counted(task, tmp_path):
    rows = tickets()
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "validation.csv", [*rows[:3], {"text": "new", "label": "bug"}])
    given = task(tmp_path)
    given.load()
    assert "3 of 4 rows are training rows too: the score may be too high" in notes_of(given, "validation")


def test_long_texts_are_cut_and_counted(task, tmp_path):
    rows = tickets(12)
    for row in rows[:6]:
        row["text"] += " word" * 20_000  # 100,000 characters
    given = task(write(tmp_path / "t.csv", rows), "task.max_length=16")
    loaded, tokenizer = given.load(), AutoTokenizer.from_pretrained(EMBEDDED)
    split = Split(loaded.train, given.encode(loaded.train, tokenizer, training=True))
    account = given.account("train", split)
    n_long = sum(len(text) > 1000 for text in loaded.train["text"])
    assert account.changed["cut at task.max_length=16"] >= n_long > 0 and max(split.encoded["length"]) == 16


def test_a_thousand_classes(task, tmp_path):
    (tmp_path / "t.csv").write_text(HEAD + lines(*(f"c{i % 1000:03}" for i in range(3000))))
    given = task(tmp_path / "t.csv")
    loaded = given.load()
    assert given.head()["num_labels"] == 1000 and len(set(loaded.train["label"])) == 1000


def test_rows_without_labels_and_with_unknown_ones(task, tmp_path):
    given = task(write(tmp_path / "new.csv", [{"text": "a", "extra": "b"}]))
    given.expect(["bug", "other"])
    assert given.load_split("all").column_names == ["text", "number"]
    assert "no labels in column 'label': predictions without metrics" in notes_of(given, "all")
    given = task(write(tmp_path / "odd.csv", [{"text": "a", "label": "bugs"}, {"text": "b", "label": "x"}]))
    given.expect(["bug", "other"])
    with pytest.raises(UserError) as caught:
        given.load_split("all")
    assert "row 1 (data rows, counted from 1), column 'label': \"bugs\" is not a class of the training rows" in str(
        caught.value
    )
    assert "'bug' is meant" in str(caught.value) and "leave out column 'label'" in str(caught.value)


def test_classes_with_very_long_numbers(task, tmp_path):
    (tmp_path / "t.csv").write_text(HEAD + lines("9" * 5000, "12", "9" * 5000, "12"))
    assert task(tmp_path / "t.csv").head()["id2label"] == {0: "12", 1: "9" * 5000}


def test_names_that_differ_by_an_invisible_character_are_noted(task, tmp_path):
    given = task(
        write(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": ("a", "a\u200b", "b")[i % 3]} for i in range(9)])
    )
    given.load()
    assert "differ only in case, white space or invisible characters: a, a\u200b" in notes_of(given)


def test_minus_one_is_a_missing_label_where_classes_have_names(task, tmp_path):
    def file(name: str, labels: list[int]) -> None:
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
        rows = [{"text": f"{name} {i}", "label": label} for i, label in enumerate(labels)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")

    file("train", [0, 1] * 4)
    file("test", [-1] * 3)
    given = task(tmp_path)
    assert "label" not in given.load_split("test").column_names
    file("train", [0, 1, -1, -1])
    assert "row 3 (data rows, counted from 1), column 'label': no label" in problems_of(task(tmp_path))


@pytest.mark.parametrize("name", ["Dev", "evaluation", "development", "validate", "holdout"])
def test_validation_rows_under_another_name_are_not_passed_over(task, tmp_path, name):
    write(tmp_path / "train.csv", tickets())
    write(tmp_path / f"{name}.csv", tickets(6))
    assert f"{name}.csv is not read under this name; call it validation." in problems_of(task(tmp_path))


def test_a_folder_of_files_of_several_types(task, tmp_path):
    write(tmp_path / "train.csv", tickets())
    write(tmp_path / "validation.jsonl", tickets(6))
    (tmp_path / "readme.xlsx").write_text("")
    assert len(task(tmp_path).load().validation["validation"]) == 6
    write(tmp_path / "train.parquet", tickets())
    assert "more than one file for the split 'train': train.csv, train.parquet; keep one" in problems_of(task(tmp_path))


def test_other_names_of_files(task, tmp_path):
    write(tmp_path / "learn.csv", tickets())
    write(tmp_path / "dev.csv", tickets(6))
    given = task(tmp_path, "task.train_split=learn", "task.validation_split=dev")
    assert len(given.load().train) == 30 and len(given.load_split("validation")) == 6
    assert "no file for the split 'held'" in problems_of(
        task(tmp_path, "task.train_split=learn", "task.validation_split=held")
    )


# --- refused ---


@pytest.mark.parametrize(
    ("labels", "more", "words"),
    [
        (["a", "a", "a"], [], "all rows have the same label 'a'"),
        (["", "", ""], [], "column 'label' is empty in all 3 rows"),
        (["1", "2", "3,5"], ["task.kind=regression"], "row 3"),
        (["1", "2", "NaN"], ["task.kind=regression"], '"NaN" is not a number'),
        (["1", "2", "inf"], ["task.kind=regression"], '"inf" is not a number'),
        (["a", "b", "a"], ["task.label_column=Label "], "perhaps task.label_column=label"),
        (["a", "b", "a"], ["task.label_column='labél'"], "perhaps task.label_column=label"),
        (["a", "b", "a"], ["task.label_column=text"], "task.label_column=text is in task.text_columns too"),
    ],
)
def test_labels_that_cannot_be_learned(task, tmp_path, labels, more, words):
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(len(labels))], "label": labels}), tmp_path / "t.parquet")
    with pytest.raises(UserError) as caught:
        task(tmp_path / "t.parquet", *more).load()
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nan_is_a_missing_label(task, tmp_path, kind):
    file = write(tmp_path / f"t.{kind}", [{"text": f"t{i}", "label": (1.0, float("nan"))[i == 2]} for i in range(6)])
    assert "row 3 (data rows, counted from 1), column 'label': no label; every row needs a label" in problems_of(
        task(file)
    )


def test_encodings_are_named(task, tmp_path):
    (tmp_path / "l.csv").write_bytes((HEAD + "caf\xe9,a\nb,b\n").encode("latin-1"))
    assert "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8" in problems_of(task(tmp_path / "l.csv"))
    (tmp_path / "u.csv").write_bytes((HEAD + "a,a\nb,b\n").encode("utf-16"))
    assert "its text is UTF-16; save it as UTF-8" in problems_of(task(tmp_path / "u.csv"))


@pytest.mark.parametrize("name", ["text", "mrpc"])
def test_labels_that_are_not_utf8_are_named(cfg, tmp_path, name):
    """Parquet files of other programs can have them, and arrow does not check."""
    labels = pa.array([b"equivalent", b"caf\xe9", b"caf\xe9", b"x"], pa.binary()).view(pa.string())
    texts = {column: ["a", "b", "c", "d"] for column in ("text", "sentence1", "sentence2")}
    for split in ("train", "validation"):
        pq.write_table(pa.table({**texts, "label": labels}), tmp_path / f"{split}.parquet")
    assert "train.parquet, row 2 (data rows, counted from 1), column 'label' is not valid UTF-8" in problems_of(
        get_task(cfg(f"task={name}", f"task.path={tmp_path}").task)
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("t.xlsx", "save the sheet as CSV UTF-8"),
        ("t.csv.gz", "unpack it first (gunzip)"),
        ("t.json", "one JSON object in each line"),
        ("t.txt", "name it .csv or .tsv"),
        ("T.CSV", "write its ending in lower case"),
    ],
)
def test_other_types_of_files_are_refused_with_advice(task, tmp_path, name, advice):
    (tmp_path / name).write_bytes(gzip.compress(b"text,label\n"))
    with pytest.raises(UserError) as caught:
        task(tmp_path / name)
    assert advice in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["task.subset=x"], "only a data set on the hub has subsets"),
        (["task.train_split=x"], "is one file, which has no splits"),
        (["task.validation_split=x"], "is one file, which has no splits"),
    ],
)
def test_settings_for_other_places(task, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        task(write(tmp_path / "t.csv", tickets()), *more)


def test_no_such_place(task, tmp_path):
    with pytest.raises(
        UserError, match="gone does not exist; it must be a folder, the id of a data set on the hub, or"
    ):
        task(tmp_path / "gone")
