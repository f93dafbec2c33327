"""Chat and text rows from files: every form gives the same turns, and all faults are named together."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from diffora.errors import UserError
from diffora.tasks.account import Account
from diffora.tasks.chat.conversations import cut_validation, read, read_file, rows_hash
from diffora.tasks.chat.forms import conversation, form_of

TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
FORMS = [
    {"messages": TURNS},
    {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
    {"prompt": "Hi?", "completion": "Yes."},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"instruction": "Hi?", "output": "Yes."},
    {"instruction": "Hi?", "input": "", "output": "Yes.", "text": "something else"},
    {"messages": TURNS, "prompt": "no", "text": "something else"},
]


def jsonl(file: Path, *rows) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return file


@pytest.mark.parametrize("row", FORMS)
def test_every_form_gives_the_same_turns(row):
    assert conversation(row, form_of(row), {}) == TURNS


def test_input_is_placed_below_the_instruction():
    row = {"instruction": "Translate.", "input": "ja", "output": "yes"}
    assert conversation(row, form_of(row), {})[0]["content"] == "Translate.\n\nja"


def test_parquet_and_jsonl_give_equal_rows(tmp_path):
    rows = [FORMS[0], {"messages": [{"role": "system", "content": "Be kind. ☃"}, *TURNS, *TURNS]}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    problems: list[str] = []
    tables = [
        read_file(file, problems, Account())
        for file in (jsonl(tmp_path / "train.jsonl", *rows), tmp_path / "train.parquet")
    ]
    assert problems == []
    assert tables[0].equals(tables[1])
    assert rows_hash(tables[0]) == rows_hash(tables[1])
    assert len(rows_hash(tables[0])) == 64


def test_the_hash_depends_on_the_division_into_turns():
    def of(*rows):
        return rows_hash(read(enumerate(rows, 1), "x", [], Account()))

    one, two = {"prompt": "a", "completion": "b"}, {"prompt": "ab", "completion": ""}
    split = {"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "assistant", "content": "b"}]}
    hashes = [of(one), of(two), of(*split), of({"text": "ab"}), of(one, one)]
    assert len(set(hashes)) == len(hashes)


# row in the file, what the message must say of it
FAULTS = [
    ('{"text": "cut', "is not JSON"),
    ("[1, 2]", "not a JSON object"),
    ({"asked": "a", "answer": "b"}, "are its columns; expected messages, conversations, prompt"),
    ({"messages": []}, "column 'messages': [] has no turns"),
    ({"messages": "hello"}, "column 'messages': 'hello' is not a list of turns"),
    ({"messages": ["hello"]}, "is not a turn such as"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "'narrator' is not a role; known are system, user, human"),
    ({"messages": [{"content": "x"}]}, "null is not a role"),
    ({"messages": [{"role": "user", "content": 7}]}, "7 is not text"),
    ({"messages": [{"role": "user"}]}, "null is not text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "images, sound and the like are not supported"),
    ({"prompt": "a", "completion": 3}, "column 'completion': 3 is not text"),
    ({"text": 3}, "column 'text': 3 is not text"),
    ('{"text": "\\ud800"}', "is not valid Unicode"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_bad_row_is_named_with_file_row_and_column(tmp_path, row, message):
    file = jsonl(tmp_path / "train.jsonl", FORMS[0], "", row, FORMS[2])
    problems: list[str] = []
    read_file(file, problems, Account())
    assert len(problems) == 1
    assert problems[0].startswith(f"{file}, row 2 (data rows, counted from 1)")
    assert message in problems[0]


def test_all_faults_at_once_equal_ones_together(tmp_path):
    file = jsonl(tmp_path / "train.jsonl", *(row for row, _ in FAULTS), *(row for row, _ in FAULTS[:3]))
    problems: list[str] = []
    read_file(file, problems, Account())
    assert len(problems) == len(
        {message for _, message in FAULTS} - {"null is not text", "column 'text': 3 is not text"}
    )
    assert sum("(and 1 more such row)" in problem for problem in problems) >= 3


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    jsonl(tmp_path / "blank.jsonl", {"text": ""}, {"text": " \n"})
    problems: list[str] = []
    for name in ("bad.parquet", "empty.jsonl", "latin.jsonl", "blank.jsonl"):
        read_file(tmp_path / name, problems, Account())
    assert len(problems) == 4
    assert "cannot be read as .parquet" in problems[0]
    assert "no rows" in problems[1]
    assert "row 1" in problems[2] and "is not UTF-8 (byte 0xe9)" in problems[2]
    assert "none of the 2 rows has any text" in problems[3]


def test_empty_texts_are_left_out_and_row_numbers_stay():
    table = read(enumerate([{"text": "a"}, {"text": ""}, {"text": "b"}], 1), "x", [], Account())
    assert table.column("number").to_pylist() == [1, 3]


def test_columns_that_only_other_rows_have_do_not_count(tmp_path):
    rows = [{"text": "plain", "messages": None}, {"text": None, "messages": TURNS}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    table = read_file(tmp_path / "train.parquet", [], Account())
    assert table.column("text").to_pylist() == ["plain", ""]
    assert table.column("messages").to_pylist() == [[], TURNS]


def test_validation_rows_are_the_same_in_every_run():
    table = read(enumerate(({"text": f"t{i}"} for i in range(50)), 1), "x", [], Account())
    train, validation = cut_validation(table, 10)
    parts = [set(part.column("text").to_pylist()) for part in (train, validation)]
    assert len(parts[1]) == 10 and not parts[0] & parts[1] and len(parts[0] | parts[1]) == 50
    assert cut_validation(table, 10)[1].equals(validation)
    assert np.all(np.diff(validation.column("number").to_numpy()) > 0)
    with pytest.raises(UserError, match=r"task\.validation_rows=49 cannot be cut from 50 .* at most 48"):
        cut_validation(table, 49)


def test_rows_without_an_answer_are_named_as_such():
    asked = ({"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(20))
    table = read(enumerate(asked, 1), "x", [], Account())
    with pytest.raises(UserError, match="no training row has a turn of 'assistant', only of 'user': there is nothing"):
        cut_validation(table, 5)


def test_rows_with_equal_prompts_stay_together():
    """Three answers to each of 40 questions, in any order: no validation row has the question of a training row."""
    rows = [{"prompt": f"question {i % 40}", "completion": f"answer {i // 40}"} for i in range(120)]
    table = read(enumerate(rows, 1), "x", [], Account())
    train, validation = cut_validation(table, 31)
    asked = [{turns[0]["content"] for turns in part.column("messages").to_pylist()} for part in (train, validation)]
    assert validation.num_rows == 30 and not asked[0] & asked[1] and len(asked[0] | asked[1]) == 40
    alike = read(enumerate(({"prompt": "the same", "completion": str(i)} for i in range(20)), 1), "x", [], Account())
    with pytest.raises(UserError, match="equal prompts stay together, and there are 1 different prompts"):
        cut_validation(alike, 5)


def test_strange_conversations_are_counted(tmp_path):
    ask, answer = TURNS
    rows = [
        {"messages": TURNS},
        {"messages": [ask, ask, answer]},
        {"messages": [ask, answer, {"role": "system", "content": "Be kind."}]},
        {"messages": [ask, {"role": "assistant", "content": " "}]},
        {"instruction": "Hi?", "output": "", "text": "Hi? Yes."},
        {"instruction": "Hi?", "output": None, "text": "Hi? Yes."},  # read as plain text
    ]
    account = Account()
    read(enumerate(rows, 1), "x", [], account)
    assert account.notes[1:] == [
        "rows in several forms: 4 with messages, 1 with instruction and output, 1 with text",
        "rows in which user and assistant do not take turns: 2",
        "rows with an empty turn of the assistant: 2",
    ]


@pytest.mark.parametrize("role", [["user"], {"a": 1}, 3, True])
def test_a_role_of_any_type_is_named(tmp_path, role):
    problems: list[str] = []
    read([(1, {"messages": [{"role": role, "content": "Hi?"}]})], "x", problems, Account())
    assert len(problems) == 1 and "row 1" in problems[0] and "is not a role" in problems[0]


def test_text_of_parquet_that_is_not_utf8_is_named(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff x"]).buffers())
    pa.parquet.write_table(pa.table({"text": bad}), tmp_path / "train.parquet")
    problems: list[str] = []
    read_file(tmp_path / "train.parquet", problems, Account())
    assert len(problems) == 1 and "row 2 (data rows, counted from 1): byte 0xff is not UTF-8" in problems[0]
