"""CSV and JSON lines: valid files of every kind are read without loss, others are refused with row and line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from diffora.errors import UserError
from diffora.tasks.glue import TASKS
from diffora.tasks.sources.lines import BadLine, json_lines
from diffora.tasks.sources.load import load_rows, load_split

MRPC = TASKS["mrpc"]
N = 40
LINES = [f"a {i},b {i},{i % 2},{i}" for i in range(N)]
HEADER = "sentence1,sentence2,label,idx"


def folder_with(folder: Path, content: str | bytes, name: str = "train.csv") -> Path:
    """A folder with a training file, and a validation file of other rows."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    columns = {"sentence1": ["p", "q"], "sentence2": ["r", "s"], "label": [0, 1]}
    pa.parquet.write_table(pa.table(columns), folder / "validation.parquet")
    return folder


def csv_of(changed: dict[int, str], end: str = "\n") -> str:
    """The header and `LINES`, with some rows (counted from 1) replaced."""
    rows = [changed.get(i, line) for i, line in enumerate(LINES, start=1)]
    return "".join(line + end for line in [HEADER, *rows])


def refusal(folder: Path, content: str | bytes, name: str = "train.csv") -> str:
    with pytest.raises(UserError) as caught:
        load_rows(MRPC, folder_with(folder, content, name))
    [message] = caught.value.problems
    assert name in message
    return message


# --- CSV ---


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_a_byte_order_mark_make_no_difference(tmp_path, end, mark):
    rows = load_rows(MRPC, folder_with(tmp_path, mark + csv_of({}, end)[: -len(end)])).train
    assert rows["sentence1"] == [f"a {i}" for i in range(N)] and rows["label"] == [i % 2 for i in range(N)]


@pytest.mark.parametrize(
    ("changed", "line", "column"),
    [
        pytest.param({10: '"a,b,1,9', 30: '"c,d,0,29'}, 31, "sentence1", id="B12: two rows begin with a lone quote"),
        pytest.param({10: '"a,b,1,9'}, 41, "sentence1", id="one row begins with a lone quote"),
        pytest.param({10: '"a,b,1,9', 30: 'c",d,0,29'}, 31, "sentence1", id="the other quote ends a field"),
        pytest.param({10: 'a,"b,1,9', 11: 'd",0,10'}, 12, "sentence2", id="one row swallowed"),
        pytest.param({10: 'a,b,"1,9', 30: '0",29'}, 31, "label", id="in the column of labels"),
        pytest.param({10: '"a ""b,b,1,9', 30: 'c",d,0,29'}, 31, "sentence1", id="with a doubled quote inside"),
    ],
)
def test_a_missing_quote_does_not_lose_rows(tmp_path, changed, line, column):
    message = refusal(tmp_path, csv_of(changed))
    assert f"row 10 (data rows, counted from 1; line 11), column '{column}'" in message
    assert f"line {line}" in message or "over 31 lines to the end of the file" in message
    assert "written twice" in message


def test_texts_of_several_lines_are_read_and_counted(tmp_path):
    poem, address = (
        "Rose, oh pure contradiction,\nto be no one's sleep,\n\nunder so many lids.",
        "12, Street, 5\r\nTown",
    )
    content = csv_of({3: f'"{poem}",b,1,2', 7: f'x,"{address}",0,6', 9: '"say ""hi""","\n",0,8'})
    accounts = {}
    rows = load_rows(MRPC, folder_with(tmp_path, content), accounts=accounts).train
    assert len(rows) == N and rows["sentence1"][2] == poem and rows["sentence2"][6] == address
    assert (rows["sentence1"][8], rows["sentence2"][8]) == ('say "hi"', "\n")
    [note] = accounts["train"].notes
    assert "40 rows from 46 lines: 3 of them have fields of several lines; the longest is row 3 with 4 lines" in note


def test_without_labels_many_lines_like_rows_are_refused(tmp_path):
    """Only the number of fields can show it, so single lines of prose must not count as rows."""
    (tmp_path / "test.csv").write_text('sentence1,sentence2\n"one, two\nthree\nfour, five",b\nc,d\n')
    assert load_split(MRPC, "test", tmp_path)["sentence1"] == ["one, two\nthree\nfour, five", "c"]
    (tmp_path / "test.csv").write_text('sentence1,sentence2\n"a,b\nc,d\ne,f\ng,h\ni",j\nk,l\n')
    with pytest.raises(UserError, match=r"row 1 .*goes on to line 6, but line 2 by itself looks like a row"):
        load_split(MRPC, "test", tmp_path)


def test_blank_lines_are_counted(tmp_path):
    accounts = {}
    content = csv_of({5: LINES[4] + "\n\n  "}) + "\n\n"
    assert len(load_rows(MRPC, folder_with(tmp_path, content), accounts=accounts).train) == N
    assert accounts["train"].notes == ["4 blank lines"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (csv_of({5: '"a "b" c",b,1,4'}), "row 5 (data rows, counted from 1; line 6): after a field's closing quote"),
        (csv_of({5: ' "a, b",b,1,4'}), "row 5 (data rows, counted from 1) has 5 fields, the header has 4"),
        (csv_of({5: '"a\nb",b,1,4,5'}), "row 5 (data rows, counted from 1), which goes from line 6 to line 7, has 5"),
        (f'"{csv_of({})}', "line 1, the header: a quote opens a field here that is never closed, over 41 lines"),
        (csv_of({}).replace(",", ";"), "its fields are separated by semicolons; separate them by commas"),
        (csv_of({}).replace(",", "\t"), "its fields are separated by tabs"),
        ('"sentence1";"sentence2";"label"\n"a";"b";"1"\n', "separated by semicolons"),
        (csv_of({3: "a\0,b,1,2"}), "line 4 holds a NUL byte"),
        (csv_of({3: "é,b,1,2"}).encode("latin-1"), "line 4: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (csv_of({}).encode("utf-16"), "its text is UTF-16; save it as UTF-8"),
        (csv_of({}).encode("utf-16-le"), "line 1 holds a NUL byte"),
        ("\n\n", "the file is empty, not even a header line"),
    ],
)
def test_files_that_are_not_csv_with_commas_in_utf8_are_refused(tmp_path, content, expected):
    assert expected in refusal(tmp_path, content)


def test_fields_may_be_very_long(tmp_path):
    text = "word " * 100_000
    assert load_rows(MRPC, folder_with(tmp_path, csv_of({2: f"{text},b,1,1"}))).train["sentence1"][1] == text


# --- JSON lines ---


def line(**changes) -> str:
    return json.dumps({"sentence1": "a", "sentence2": "b", "label": 1} | changes)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines_in_every_spelling(tmp_path, end, mark):
    accounts = {}
    content = mark + line(sentence1="x") + end + end + line(label=0) + end
    rows = load_rows(MRPC, folder_with(tmp_path, content, "train.jsonl"), accounts=accounts).train
    assert rows["sentence1"] == ["x", "a"] and rows["label"] == [1, 0]
    assert "1 blank line" in accounts["train"].notes


BAD_LINES = [
    (line() + line(), "row 1 (counted from 1) is not JSON (more than one object in the line)"),
    (line() + "\n" + line() + ",\n", "row 2 (counted from 1) is not JSON (more than one object"),
    (json.dumps(json.loads(line()), indent=1), "row 1 (counted from 1) is not JSON"),
    (f"[{line()}, {line()}]", "row 1 (counted from 1) is not a JSON object but an array; write one object in each"),
    (f"[\n{line()},\n{line()}\n]", "row 1 (counted from 1) is not a JSON object but an array"),
    ("[" * 100_000, "row 1 (counted from 1) is not a JSON object but an array"),
    ('{"a":' * 100_000, "row 1 (counted from 1) is nested too deeply"),
    (line()[:-1] + ', "label": 0}', "row 1 (counted from 1) has the key 'label' twice"),
    (line() + "\n" + line(label=True), "row 2 (counted from 1), column 'label': true is not one of 0"),
    (
        line() + "\n" + line(label="equivalent"),
        "row 2 (counted from 1), column 'label': \"equivalent\" is text, but a number in earlier rows",
    ),
    (
        line(label="equivalent") + "\n" + line(),
        "row 2 (counted from 1), column 'label': 1 is a number, but text in earlier rows",
    ),
    (line(label=float("nan")), "row 1 (data rows, counted from 1), column 'label': NaN is not one of 0"),
    (line(label=float("inf")), "row 1 (data rows, counted from 1), column 'label': Infinity is not one of 0"),
    (line(label=2**70), "row 1 (data rows, counted from 1), column 'label': 1.18"),
    (line(label=10**400), "row 1 (data rows, counted from 1), column 'label': Infinity is not one of 0"),
    (line(sentence1="\ud800"), "row 1 (counted from 1), column 'sentence1': '\\ud800' is not valid Unicode"),
    (line().encode() + b'\n{"sentence1": "\xe9"}', "line 2: byte 0xe9 is not UTF-8"),
]


@pytest.mark.parametrize(("content", "expected"), BAD_LINES, ids=[expected for _, expected in BAD_LINES])
def test_lines_that_are_not_one_json_object_are_refused(tmp_path, content, expected):
    assert expected in refusal(tmp_path, content, "train.jsonl")


def test_one_bad_line_does_not_stop_the_others():
    found = dict(json_lines([b'\xef\xbb\xbf{"a": 1}\n', b"\n", b"[1]\n", b'{"a": {"b": 1, "b": 2}}', b'{"a": 2}']))
    assert (found.pop(1), found.pop(5)) == ({"a": 1}, {"a": 2})
    assert {number: type(bad) for number, bad in found.items()} == {3: BadLine, 4: BadLine}
    assert found[4].reason == "has the key 'b' twice"


@pytest.mark.parametrize("second", ["more of it", "more, of it", "9,more"])
def test_a_last_field_of_several_lines_is_read(tmp_path, second):
    """The first line of such a row looks like a row of its own."""
    rows = [f"{i % 2},a {i},b {i}" for i in range(9)]
    rows[4] = f'0,a 4,"b 4\n{second}"'
    content = "\n".join(["label,sentence1,sentence2", *rows])
    assert load_rows(MRPC, folder_with(tmp_path, content)).train["sentence2"][4] == f"b 4\n{second}"
    rows[4:6] = ['0,a 4,"b 4', '1,a 5,b 5"']
    assert "line 7 by itself looks like a row" in refusal(tmp_path, "\n".join(["label,sentence1,sentence2", *rows]))


@pytest.mark.parametrize("other", [[1, "one"], [{"a": 1}, [1]], [True, None, 2.5, "x"]])
def test_columns_that_nothing_reads_may_hold_anything(tmp_path, other):
    rows = [line(sentence1=f"a {i}", note=other[i % len(other)]) for i in range(8)]
    found = load_rows(MRPC, folder_with(tmp_path, "\n".join(rows), "train.jsonl")).train
    assert found["sentence1"] == [f"a {i}" for i in range(8)]


def test_whole_numbers_above_64_bits_get_a_message(tmp_path):
    """The column of mixed types makes the file be read line by line."""
    rows = [{"sentence1": "a", "sentence2": "b", "label": i % 2, "idx": 2**64 - 1, "more": (1, "x")[i]} for i in (0, 1)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    assert "cannot be read as .jsonl" in refusal(tmp_path, content, "train.jsonl")
