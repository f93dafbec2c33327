"""Rows of question answering in every format; every malformed input with its message."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from diffora.errors import UserError
from diffora.tasks.questions.data import read
from diffora.tasks.sources import hub
from diffora.tasks.sources.tables import content_hash

CONTEXT = "Zwölf Füchse 🦊 jumped over 中国 in 1990."


def row(number: int = 0, answer: str | None = "1990", **changes) -> dict:
    """A good row with some columns replaced. The value Ellipsis removes a column."""
    answers = {"text": [], "answer_start": []}
    if answer is not None:
        answers = {"text": [answer], "answer_start": [CONTEXT.index(answer)]}
    good = {"id": f"q{number}", "title": "Foxes", "context": CONTEXT, "question": "When?", "answers": answers}
    return {key: value for key, value in {**good, **changes}.items() if value is not ...}


GOOD = [row(0), row(1, "中国"), row(2, "Füchse 🦊")]


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    if file.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        questions = [
            {"id": row["id"], "question": row["question"], "is_impossible": not row["answers"]["text"]}
            | {
                "answers": [
                    {"text": text, "answer_start": start}
                    for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                ]
            }
            for row in rows
        ]
        article = {"title": "Foxes", "paragraphs": [{"context": CONTEXT, "qas": questions}]}
        file.write_text(json.dumps({"version": "1.1", "data": [article]}), encoding="utf-8")
    return file


def load(folder: Path | None, unanswerable: bool = False, labelled: bool = True, accounts=None, **files: str | None):
    names, path = files or {"train": None}, None if folder is None else str(folder)
    return read("squad", "rajpurkar/squad", path, names, unanswerable, labelled, accounts)


def problems(folder: Path, rows: list[dict], unanswerable: bool = False, name: str = "train.jsonl") -> list[str]:
    file = write(folder, name, rows)
    with pytest.raises(UserError) as caught:
        load(folder, unanswerable)
    return [text.removeprefix(f"{file}, ").removeprefix(f"{file}: ") for text in caught.value.problems]


# --- what works ---


@pytest.mark.parametrize("name", ["train.parquet", "train-00000-of-00001.parquet", "train.jsonl", "train.json"])
def test_formats_give_equal_rows(tmp_path, name):
    write(tmp_path, name, GOOD)
    table = load(tmp_path)["train"]
    assert table.to_pylist() == [
        {
            "id": row["id"],
            "context": CONTEXT,
            "question": "When?",
            "answers": row["answers"]["text"],
            "starts": row["answers"]["answer_start"],
        }
        for row in GOOD
    ]
    assert content_hash(table) == content_hash(pa.Table.from_pylist(table.to_pylist(), table.schema))


def test_hash_sees_every_answer(tmp_path):
    """Also if an answer moves to the next row and the order of all answers stays the same."""

    def table(answers):
        return pa.table({"answers": pa.array(answers, pa.list_(pa.string())), "id": ["x"] * len(answers)})

    tables = [[["a", "b"], []], [["a"], ["b"]], [["ab"], []], [["a", "b"], ["c"]], [[], ["a", "b"]]]
    assert len({content_hash(table(answers)) for answers in tables}) == len(tables)


@pytest.mark.parametrize(
    ("split", "unanswerable", "name"),
    [
        ("train", False, "train-v1.1.json"),
        ("train", True, "train-v2.0.json"),
        ("validation", False, "dev-v1.1.json"),
        ("validation", True, "dev-v2.0.json"),
        ("validation", True, "dev.json"),
    ],
)
def test_official_names(tmp_path, split, unanswerable, name):
    for other in ("train-v1.1.json", "train-v2.0.json"):  # both versions may lie in one folder
        write(tmp_path, other, GOOD)
    write(tmp_path, name, GOOD[:2])
    assert load(tmp_path, unanswerable, **{split: None})[split].num_rows == 2


def test_named_files(tmp_path):
    write(tmp_path, "my_questions.jsonl", GOOD)
    assert load(tmp_path, train="my_questions.jsonl")["train"].num_rows == 3
    with pytest.raises(UserError, match=r"no file for the split 'train'; looked for other\.jsonl; found my_questions"):
        load(tmp_path, train="other.jsonl")


def test_many_rows_cross_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("diffora.tasks.questions.data.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("diffora.tasks.questions.check.ROWS_AT_ONCE", 7)
    rows = [row(i, "中国" if i % 3 else None) for i in range(30)]
    for name in ("train.parquet", "train.jsonl"):
        write(tmp_path / name, name, rows)
        table = load(tmp_path / name, True)["train"]
        assert table["id"].to_pylist() == [f"q{i}" for i in range(30)]
        assert table["answers"].to_pylist() == [["中国"] if i % 3 else [] for i in range(30)]


def test_no_answer_is_an_empty_list(tmp_path):
    write(tmp_path, "train.json", [row(0), row(1, None)])
    assert load(tmp_path, True)["train"]["answers"].to_pylist() == [["1990"], []]


def test_rows_without_answers_are_unlabelled(tmp_path):
    write(tmp_path, "test.jsonl", [row(0, answers=...), row(1, answers=...)])
    assert load(tmp_path, labelled=False, test=None)["test"].column_names == ["id", "context", "question"]
    write(tmp_path, "empty.jsonl", [row(0, None), row(1, None)])
    assert "answers" not in load(tmp_path, labelled=False, empty=None)["empty"].column_names
    assert (
        "answers" in load(tmp_path, True, labelled=False, empty=None)["empty"].column_names
    )  # means "no answer" there


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_small_shifts_are_corrected_and_counted(tmp_path, shift):
    moved = {"text": ["中国"], "answer_start": [CONTEXT.index("中国") + shift]}
    write(tmp_path, "train.jsonl", [row(0), row(1, answers=moved)])
    accounts = {}
    assert load(tmp_path, accounts=accounts)["train"]["starts"].to_pylist()[1] == [CONTEXT.index("中国")]
    what = "answer_start is off by a character or two and was corrected, first in row 2"
    assert accounts["train"].changed == {what: 1}


def test_real_data(real_data):
    rows = load(real_data / "squad", train="train_5k.parquet", validation="validation_1k.parquet")
    assert (rows["train"].num_rows, rows["validation"].num_rows) == (5000, 1000)
    raw = pa.parquet.read_table(real_data / "squad" / "train_5k.parquet").to_pylist()
    assert rows["train"]["starts"].to_pylist() == [row["answers"]["answer_start"] for row in raw]
    second = load(real_data / "squad_v2", True, validation="validation_1k.parquet")["validation"]
    assert sum(map(bool, second["answers"].to_pylist())) == 485


# --- the hub ---


def test_hub(monkeypatch):
    calls = []

    def fake(name, config):
        calls.append((name, config))
        return {split: datasets.Dataset.from_list(GOOD) for split in ("train", "validation")}

    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    tables = load(None, train=None, validation=None)
    assert calls == [("rajpurkar/squad", None)] and tables["validation"]["id"].to_pylist() == ["q0", "q1", "q2"]
    with pytest.raises(UserError, match=r"rajpurkar/squad has no split 'test'; it has train, validation\."):
        load(None, test=None)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(hub, "why_unreachable", lambda: "offline mode is on")
    with pytest.raises(UserError) as caught:
        load(None, train=None, validation=None)
    assert "'squad'" in str(caught.value) and "(rajpurkar/squad): offline mode is on" in str(caught.value)
    assert "task.path=<folder with train and validation as .parquet, .jsonl or SQuAD's own .json>" in str(caught.value)


# --- faults ---


PAIR = "is not {text: [...], answer_start: [...]}."
START = "holds an answer_start that is not a whole number of at least 0."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": None}, "null in place of a text."),
        ({"question": 7}, "7 is not text."),
        ({"question": " "}, '" " is empty.'),
        ({"context": ""}, '"" is empty.'),
        ({"id": "q0"}, '"q0" is the id of an earlier row too (row 1).'),
        ({"answers": None}, f"null {PAIR}"),
        ({"answers": {"text": ["1990"]}}, f'{{"text": ["1990"]}} {PAIR}'),
        (
            {"answers": {"text": ["1990", "中国"], "answer_start": [30]}},
            '{"text": ["1990", "中国"], "answer_start": [30]} has 2 texts and 1 starts.',
        ),
        ({"answers": {"text": ["1990"], "answer_start": [-1]}}, f"[-1] {START}"),
        ({"answers": {"text": ["1990"], "answer_start": [34.5]}}, f"[34.5] {START}"),
        ({"answers": {"text": ["1990"], "answer_start": [True]}}, f"[true] {START}"),
        (
            {"answers": {"text": [""], "answer_start": [0]}},
            '[""] holds an answer that is not text; write an empty list if there is no answer.',
        ),
        (
            {"answers": {"text": ["1990"], "answer_start": [6]}},
            "\"1990\" is not at answer_start 6, where 'Füch' is; it is at 33.",
        ),
        (
            {"answers": {"text": ["1991"], "answer_start": [99999]}},
            "\"1991\" is not at answer_start 99999, where '' is; it is nowhere in the context.",
        ),
        (
            {"answers": {"text": [], "answer_start": []}},
            "[] means a question without an answer, which task=squad_v2 takes.",
        ),
    ],
)
def test_faults_name_the_row(tmp_path, changes, message):
    (column,) = changes
    where = f"row 2 (data rows, counted from 1), column '{column}': "
    assert problems(tmp_path, [row(0), row(1, **changes), row(2)]) == [where + message]


def test_an_answer_to_an_impossible_question_is_a_contradiction(tmp_path):
    [message] = problems(tmp_path, [row(0), row(1) | {"is_impossible": True}], unanswerable=True)
    assert "row 2 (data rows, counted from 1), column 'answers'" in message and "is_impossible says" in message


def test_all_faults_are_named_together_with_their_number(tmp_path):
    rows = [row(0, None), row(1, context=None), row(2, None), row(3, question=""), row(3)]
    found = problems(tmp_path, rows)
    assert len(found) == 4
    assert "row 1 " in next(text for text in found if "without an answer" in text)
    assert next(text for text in found if "without an answer" in text).endswith("(and 1 more such row).")


def test_faults_of_both_splits(tmp_path):
    write(tmp_path, "train.jsonl", [row(0, context=None)])
    write(tmp_path, "dev.json", [])
    with pytest.raises(UserError) as caught:
        load(tmp_path, train=None, validation=None)
    assert [text.split(":")[0].split(",")[0] for text in caught.value.problems] == [
        str(tmp_path / "train.jsonl"),
        str(tmp_path / "dev.json"),
    ]
    assert caught.value.problems[1].endswith("no rows.")


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_missing_and_renamed_columns(tmp_path, name):
    rows = [row(0, answers=..., Context=CONTEXT, context=...)]
    assert problems(tmp_path, rows, name=name) == [
        "no column 'context'; it has id, title, question, Context; rename 'Context' if that is it.",
        "no column 'answers'; it has id, title, question, Context.",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", '{"id": "1"\n', "cannot be read as .jsonl: line 1 is not JSON"),
        (
            "train.jsonl",
            "[1]\n",
            "cannot be read as .jsonl: line 1 is not a JSON object but an array; "
            "write one object in each line, without [ ] and commas around: [1]",
        ),
        (
            "train.json",
            "[]",
            "cannot be read as .json: not SQuAD's format, which is an object with a list of articles as 'data'",
        ),
        ("train.json", '{"data": [{}]}', "article 1 does not follow SQuAD's format: it lacks 'paragraphs'"),
        ("train.json", "{", "cannot be read as .json: Expecting property name"),
        ("train.parquet", "PAR", "cannot be read as .parquet"),
        ("train.jsonl", "", "no rows."),
        ("train.jsonl", "\xff\xfe", "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(str(tmp_path / name)) and message in caught.value.problems[0]


def test_missing_files_duplicate_files_missing_folders_and_other_formats(tmp_path):
    with pytest.raises(
        UserError, match=r"does not exist; give the folder that holds train as \.parquet, \.jsonl or SQ"
    ):
        load(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"looked for train\.parquet, train-00000-of-00001\.parquet, train\.jsonl, train\.json"
    ):
        load(tmp_path)
    write(tmp_path, "train.jsonl", GOOD)
    write(tmp_path, "train.json", GOOD)
    with pytest.raises(
        UserError, match=r"more than one file for the split 'train': train\.jsonl, train\.json; keep one"
    ):
        load(tmp_path)
    (tmp_path / "train.csv").touch()
    with pytest.raises(UserError, match=r"files of question answering are \.parquet"):
        load(tmp_path, train="train.csv")


def test_a_duplicate_key_does_not_lose_questions(tmp_path):
    file = write(tmp_path, "train.json", GOOD)
    file.write_text(file.read_text(encoding="utf-8")[:-1] + ', "data": []}', encoding="utf-8")
    with pytest.raises(UserError, match="has the key 'data' twice"):
        load(tmp_path)


@pytest.mark.parametrize(
    "data", [[[1]], [{"paragraphs": None}], [{"paragraphs": [{"context": "x", "qas": {"id": 1}}]}]]
)
def test_articles_of_another_shape_are_named(tmp_path, data):
    (tmp_path / "train.json").write_text(json.dumps({"data": data}))
    with pytest.raises(UserError, match="article 1 does not follow SQuAD's format: an object with paragraphs"):
        load(tmp_path)


def test_answers_that_only_later_rows_have_are_read(tmp_path):
    write(tmp_path, "test.jsonl", [row(0, answers=...), row(1), row(2)])
    with pytest.raises(UserError, match=r"row 2 .*, while the first row has no answers \(and 1 more such row\)"):
        load(tmp_path, labelled=False, test=None)


def test_columns_that_only_later_rows_have_are_named(tmp_path):
    write(tmp_path, "train.jsonl", [row(0), row(1, topic="x")])
    accounts = {}
    load(tmp_path, accounts=accounts)
    assert accounts["train"].notes == ["columns ignored: topic"]


@pytest.mark.parametrize("column", ["id", "context", "question"])
def test_half_a_surrogate_pair_is_named(tmp_path, column):
    found = problems(tmp_path, [row(0), row(1, **{column: "1990 \ud800"})])
    assert f"row 2 (data rows, counted from 1), column '{column}'" in found[0] and "is not valid Unicode" in found[0]
    "".join(found).encode()  # can be shown


def test_text_of_parquet_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path, "train.parquet", GOOD[:2])
    table = pa.parquet.read_table(tmp_path / "train.parquet")
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff x"]).buffers())
    pa.parquet.write_table(
        table.set_column(table.column_names.index("question"), "question", bad), tmp_path / "train.parquet"
    )
    with pytest.raises(UserError, match=r"row 2 .*: byte 0xff is not UTF-8"):
        load(tmp_path)


def test_a_shard_beside_a_file_is_refused(tmp_path):
    write(tmp_path, "train.parquet", GOOD)
    write(tmp_path, "train-00001-of-00002.parquet", GOOD)
    with pytest.raises(UserError, match="more than one file for the split 'train'"):
        load(tmp_path)
