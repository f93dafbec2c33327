"""Class names are compared with the task's and between splits, and label numbers follow the names."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from diffora.errors import UserError
from diffora.tasks.glue import TASKS
from diffora.tasks.labels import class_names
from diffora.tasks.sources import hub
from diffora.tasks.sources.load import load_rows, load_split

MRPC, MNLI, STSB = TASKS["mrpc"], TASKS["mnli"], TASKS["stsb"]
NAMES, REVERSED = ["not_equivalent", "equivalent"], ["equivalent", "not_equivalent"]
LABELS = [0, 1, 1, 0, 1]


def table(split: str, labels: pa.Array | list, names: list[str] | None = None) -> pa.Table:
    """Rows whose schema has class names, like files of the hub. No two splits share a text."""
    texts = {name: [f"{split} {name} {i}" for i in range(len(labels))] for name in ("sentence1", "sentence2")}
    made = pa.table({**texts, "label": labels})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return made


def write(folder: Path, **splits: pa.Table) -> Path:
    for split, rows in splits.items():
        pa.parquet.write_table(rows, folder / f"{split}.parquet")
    return folder


def flipped(labels: list[int]) -> list[int]:
    return [1 - label for label in labels]


def problems(folder: Path, spec=MRPC) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_rows(spec, folder)
    return caught.value.problems


@pytest.fixture
def good(tmp_path) -> str:
    """The hash of the rows as they should be."""
    (tmp_path / "good").mkdir()
    splits = {split: table(split, LABELS) for split in ("train", "validation")}
    return load_rows(MRPC, write(tmp_path / "good", **splits)).data_hash


@pytest.mark.parametrize("turned", [("validation",), ("train",), ("train", "validation")], ids=" and ".join)
def test_numbers_follow_names(tmp_path, good, turned):
    """B4 and similar cases."""
    splits = {
        split: table(split, flipped(LABELS), REVERSED) if split in turned else table(split, LABELS, NAMES)
        for split in ("train", "validation")
    }
    accounts = {}
    assert load_rows(MRPC, write(tmp_path, **splits), accounts=accounts).data_hash == good
    for split, account in accounts.items():
        where = f"{tmp_path / split}.parquet: 0 is equivalent, 1 is not_equivalent"
        said = {f"label numbers follow the class names of {where}": 5}
        assert account.changed == (said if split in turned else {}) and account.used == 5
    assert load_split(MRPC, "validation", tmp_path)["label"] == LABELS


def test_numbers_follow_the_names_that_the_hub_gives(good, monkeypatch):
    def fake(*_):
        features = datasets.Features(
            sentence1=datasets.Value("string"),
            sentence2=datasets.Value("string"),
            label=datasets.ClassLabel(names=REVERSED),
        )
        rows = {split: table(split, flipped(LABELS)).to_pydict() for split in ("train", "validation")}
        return {split: datasets.Dataset.from_dict(columns, features=features) for split, columns in rows.items()}

    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_rows(MRPC).data_hash == good


def test_each_shard_is_numbered_by_its_own_names(tmp_path):
    write(tmp_path, validation=table("validation", LABELS, NAMES))
    write(tmp_path, **{"train-00000-of-00002": table("a", LABELS, NAMES)})
    write(tmp_path, **{"train-00001-of-00002": table("b", flipped(LABELS), REVERSED)})
    assert load_rows(MRPC, tmp_path).train["label"] == [*LABELS, *LABELS]


def test_three_classes_in_any_order(tmp_path):
    def rows(split, labels, names=None):
        made = table(split, labels, names)
        return made.rename_columns(["premise", "hypothesis", "label"]).replace_schema_metadata(made.schema.metadata)

    names = ["contradiction", "entailment", "neutral"]
    write(
        tmp_path,
        train=rows("t", [0, 1, 2], names),
        validation_matched=rows("m", [2, 1, 0], ["contradiction", "neutral", "entailment"]),
        validation_mismatched=rows("n", pa.array(["neutral", "entailment", "contradiction"])),
    )
    loaded = load_rows(MNLI, tmp_path)
    assert loaded.train["label"] == [2, 0, 1]
    assert [split["label"] for split in loaded.validation.values()] == [[0, 1, 2], [1, 0, 2]]


def test_plain_numbers_next_to_names_in_another_order_are_refused(tmp_path):
    """Nothing says which list the plain numbers refer to."""
    write(tmp_path, train=table("train", flipped(LABELS), REVERSED), validation=table("validation", LABELS))
    [message] = problems(tmp_path)
    assert "validation.parquet: its labels are numbers without names" in message
    assert "train.parquet numbers the classes in another order than the task (0 is equivalent, 1 is not" in message


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Equivalent", "not-equivalent"], "the task's are not_equivalent, equivalent; rename 'Equivalent' if 'equiv"),
        ([*NAMES, "unsure"], "its classes are not_equivalent, equivalent, unsure; the task's are not_equivalent, equ"),
        (["equivalent", "equivalent"], "its classes are equivalent, equivalent: one of these names is there twice"),
        (["LABEL_0", "LABEL_1"], "its classes are LABEL_0, LABEL_1; the task's are not_equivalent, equivalent."),
        (["1", "2"], "its classes are 1, 2; the task's are"),
    ],
)
def test_names_that_are_not_the_tasks_are_refused(tmp_path, names, expected):
    folder = write(tmp_path, train=table("train", LABELS, NAMES), validation=table("validation", LABELS, names))
    [message] = problems(folder)
    assert f"{tmp_path}/validation.parquet: column 'label': " in message and expected in message


def test_numbers_as_names_are_numbers(tmp_path, good):
    splits = {
        "train": table("train", LABELS, ["0", "1"]),
        "validation": table("validation", flipped(LABELS), ["1", "0"]),
    }
    assert load_rows(MRPC, write(tmp_path, **splits)).data_hash == good


def test_a_number_beyond_the_names_is_not_a_label(tmp_path):
    write(tmp_path, train=table("train", [0, 1], ["equivalent"]), validation=table("validation", LABELS, NAMES))
    assert "row 2 (data rows, counted from 1), column 'label': 1 is not one of 0 (equivalent)." in problems(tmp_path)[0]


@pytest.mark.parametrize("kind", ["parquet", "large", "dictionary", "csv", "jsonl"])
def test_labels_may_be_the_tasks_names(tmp_path, good, kind):
    for split in ("train", "validation"):
        rows = table(split, LABELS)
        named = [f" {NAMES[label]} " if kind == "csv" else NAMES[label] for label in LABELS]
        column = pa.array(named, pa.large_string() if kind == "large" else pa.string())
        rows = rows.set_column(2, "label", column.dictionary_encode() if kind == "dictionary" else column)
        if kind == "csv":
            lines = [",".join(row.values()) for row in rows.to_pylist()]
            (tmp_path / f"{split}.csv").write_text("\n".join([",".join(rows.column_names), *lines]))
        elif kind == "jsonl":
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows.to_pylist())))
        else:
            write(tmp_path, **{split: rows})
    assert load_rows(MRPC, tmp_path).data_hash == good


def test_a_categorical_column_of_numbers_counts_by_its_values(tmp_path, good):
    for split in ("train", "validation"):
        write(tmp_path, **{split: table(split, pa.array(LABELS).dictionary_encode())})
    assert load_rows(MRPC, tmp_path).data_hash == good


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            ["equivalent", "1", "equivalent"],
            "row 2 (data rows, counted from 1), column 'label': \"1\" is a number, but the labels of other rows",
        ),
        (
            ["1", "0", "equivalent"],
            "row 3 (data rows, counted from 1), column 'label': \"equivalent\" is not a number, but the",
        ),
        (
            ["equivalent", "Equivalent"],
            "row 2 (data rows, counted from 1), column 'label': \"Equivalent\" is not one of",
        ),
        (["not-equivalent"] * 3, "(and 2 more such rows)"),
        (["not-equivalent"], "'not_equivalent' is meant"),
        (["equivalent", None], "row 2 (data rows, counted from 1), column 'label': null in place of a label"),
        ([True, False], "column 'label' holds bool, expected one of 0 (not_equivalent), 1 (equivalent)"),
        ([b"equivalent"], "column 'label' holds binary"),
    ],
)
def test_wrong_names_and_mixtures_are_refused(tmp_path, labels, expected):
    folder = write(tmp_path, train=table("train", labels), validation=table("validation", LABELS))
    assert expected in problems(folder)[0]


def test_scores_are_not_classes(tmp_path):
    splits = {split: table(split, LABELS, NAMES) for split in ("train", "validation")}
    assert (
        "holds classes (not_equivalent, equivalent), expected a number from 0 to 5"
        in problems(write(tmp_path, **splits), STSB)[0]
    )


@pytest.mark.parametrize(
    "form", [lambda f: f, lambda f: [f], lambda f: {"_type": "List", "feature": f}], ids=["plain", "old", "list"]
)
def test_class_names_of_a_column_in_every_form_that_datasets_writes(form):
    content = {"info": {"features": {"label": form({"names": ["a", "b"], "_type": "ClassLabel"})}}}
    schema = pa.schema({"label": pa.int64()}, metadata={"huggingface": json.dumps(content)})
    assert class_names(schema, "label") == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    ["", "[", "[" * 100_000, "5", '{"info": {"features": []}}', '{"info": {"features": {"label": []}}}', '{"info": 0}'],
)
def test_other_metadata_of_a_file_is_ignored(text):
    schema = pa.schema({"label": pa.int64()}, metadata={"huggingface": text})
    assert class_names(schema, "label") is None


def test_doubtful_data_give_notes(tmp_path):
    """C: a training file with one class, and similar cases."""
    train = table("train", [1, 1, 1]).set_column(1, "sentence2", pa.array(["", "", ""]))
    validation = pa.concat_tables([table("validation", LABELS), train.slice(1)])
    accounts = {}
    load_rows(
        MRPC,
        write(tmp_path, train=train.append_column("Length", pa.array([1, 2, 3])), validation=validation),
        accounts=accounts,
    )
    assert accounts["train"].notes == [
        "columns ignored: Length",
        "column 'sentence2' holds the same text in all rows: \"\"",
        "all 3 rows have the same label: equivalent",
    ]
    assert accounts["validation"].notes == [
        "classes that no training row has: not_equivalent",
        "2 of 7 rows are training rows too: the score may be too high",
    ]


@pytest.mark.parametrize("labels", [NAMES, ["0", "1"]], ids=["names", "numbers"])
def test_class_names_beside_labels_that_are_text(tmp_path, good, labels):
    """Names are used as they are. Numbers written as text are numbered by the file's names, like other numbers."""
    kept = LABELS if labels == NAMES else flipped(LABELS)
    text = table("train", [labels[i] for i in kept], REVERSED)
    validation = table("validation", LABELS, NAMES)
    assert load_rows(MRPC, write(tmp_path, train=text, validation=validation)).data_hash == good
