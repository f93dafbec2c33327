"""Predictions for people's own rows name the row of the file: task=text, tokens and choice."""

import csv
import json

import pytest
from test_choice import rows as choice_rows
from test_choice import write
from test_tokens import rows as word_rows

from diffora.tasks.base import Split, get_task
from diffora.tasks.sources.tables import content_hash


def text_rows() -> list[dict]:
    return [{"text": f"text {i}, in two\nlines", "label": "ab"[i % 2]} for i in range(30)]


CASES = {  # the rows of a file, and what the task makes of one
    "text": (text_rows(), "rows.csv", lambda row: row["text"], "text"),
    "tokens": (word_rows(30), "rows.jsonl", lambda row: row["tokens"], "words"),
    "choice": (choice_rows(30), "rows.jsonl", lambda row: row["context"], "context"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_row_of_a_split_is_found_in_the_file_by_its_number(cfg, tmp_path, monkeypatch, name):
    content, file, made_of, column = CASES[name]
    path = write(tmp_path / file, content)
    task = get_task(cfg(f"task={name}", f"task.path={path}", "task.max_train_rows=20").task)
    in_file = list(csv.DictReader(path.read_text().splitlines(keepends=True))) if path.suffix == ".csv" else content
    rows = task.load()
    validation = rows.validation["validation"]
    assert len(rows.train) == 20 and len(validation) >= 2
    for split in (rows.train, validation, task.load_split("all")):
        assert [made_of(in_file[number - 1]) for number in split["number"][:]] == split[column][:]
    assert not set(rows.train["number"][:]) & set(validation["number"][:])

    monkeypatch.setattr(task, "predictions", lambda *_: [{"row": i, "prediction": 0} for i in range(len(validation))])
    [written] = task.write_predictions(tmp_path, "validation", {}, Split(validation, validation))
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["number"] for line in lines] == validation["number"][:]
    assert list(lines[0]) == ["row", "number", "prediction"]


def test_the_place_of_a_row_does_not_change_the_hash_of_the_data(cfg, tmp_path):
    """Cached encodings are found again, and rows count as equal, wherever they stand in their file."""
    folder = tmp_path / "shards"
    for shard in ("00000-of-00002", "00001-of-00002"):
        write(folder / f"train-{shard}.parquet", text_rows())
    write(folder / "validation.parquet", text_rows())
    twice = get_task(cfg("task=text", f"task.path={folder}").task).load().train
    first, second = twice.data.table.slice(0, 30), twice.data.table.slice(30)
    assert second.column("number").to_pylist() == list(range(31, 61))
    assert content_hash(first) == content_hash(second)
