"""In every family of tasks, all rows that are dropped, cut or changed are counted."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from diffora.errors import UserError
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run
from diffora.settings.read import model_of
from diffora.tasks.account import Account, lines
from diffora.tasks.base import Split, get_task
from diffora.tasks.embedded.paraphrase import splits


def mrpc_files(folder: Path, train: int = 40, validation: int = 12, **columns) -> Path:
    """The embedded pairs in MRPC's columns; further columns are functions of the row number."""
    folder.mkdir(exist_ok=True)
    for name, rows in splits(train_rows=train, validation_rows=validation, seed=0).items():
        more = {column: [value(i) for i in range(len(rows["label"]))] for column, value in columns.items()}
        pa.parquet.write_table(pa.table({**rows, **more}), folder / f"{name}.parquet")
    return folder


def account_of(c, name: str = "train") -> Account:
    """After loading and encoding."""
    task = get_task(c.task)
    rows = task.load()
    split = rows.train if name == "train" else rows.validation[name]
    return task.account(name, Split(split, task.encode(split, task.processor(model_of(c.model)), name == "train")))


def test_lines_and_record():
    account = Account(read=1200, notes=["columns ignored: x"])
    account.drop("hidden files", 200)
    account.drop("hidden files", 10)
    account.drop("no text", 0)
    account.change("cut at task.max_length=8", 3)
    record = account.record()
    assert (record["read"], record["used"], record["dropped"]) == (1200, 990, 210)
    assert record["why"] == {"hidden files": 210} and record["changed"] == {"cut at task.max_length=8": 3}
    assert list(lines({"train": record, "test": Account(read=5).record()})) == [
        "train: 990 of 1,200 rows used; 210 left out (hidden files); 3 changed (cut at task.max_length=8)",
        "train: columns ignored: x",
    ]
    copy = account.copy()
    copy.drop("no text", 1)
    copy.notes.append("more")
    assert account.record() == record


def test_texts(cfg, tmp_path):
    overrides = ["task=mrpc", "model=tiny", f"task.path={mrpc_files(tmp_path / 'data')}", "task.max_train_rows=30"]
    lengths = account_lengths(cfg(*overrides, "task.max_length=64"))
    limit = sorted(lengths)[len(lengths) // 2]
    account = account_of(cfg(*overrides, f"task.max_length={limit}"))
    assert (account.read, account.used) == (40, 30) and account.dropped == {"task.max_train_rows=30": 10}
    assert account.changed == {f"cut at task.max_length={limit}": sum(length > limit for length in lengths)}
    assert account_of(cfg(*overrides, "task.max_length=64"), "validation") == Account(read=12)


def account_lengths(c) -> list[int]:
    task = get_task(c.task)
    return task.encode(task.load().train, task.processor(model_of(c.model)), True)["length"][:]


def test_conversations(cfg, tmp_path):
    def chat(i, answer="yes", **more):
        said = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer, **more}]
        return {"messages": said, "source": "x"}

    rows = [chat(0), chat(1, "long " * 200), chat(2, tool_calls=[{"name": "f"}]), {"text": " "}, chat(0)]
    asks_only = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "train.jsonl").write_text("\n\n".join(map(json.dumps, [*rows, asks_only])))
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, [chat(0), chat(7), chat(8)])))
    chosen = ["task=chat", "model=tiny_llama", f"task.path={tmp_path}", "task.max_length=64"]
    for packing in ("true", "false"):
        account = account_of(cfg(*chosen, f"task.packing={packing}"))
        assert (account.read, account.used) == (6, 4)
        nothing = "nothing to learn within task.max_length=64 (no turn of the assistant)"
        assert account.dropped == {"no text": 1, nothing: 1} and account.changed == {"cut at task.max_length=64": 1}
        assert account.notes == [
            "5 blank lines",
            "columns ignored: source, tool_calls (in messages)",
            "rows in several forms: 5 with messages, 1 with text",
        ]
    validation = account_of(cfg(*chosen), "validation")
    assert "1 of 3 rows are training rows too: the score may be too high" in validation.notes
    (tmp_path / "validation.jsonl").unlink()
    account = account_of(cfg(*chosen, "task.validation_rows=2", "task.max_train_rows=2"))
    assert account.dropped["taken for validation, task.validation_rows=2"] == 2
    assert account.dropped["task.max_train_rows=2"] == 1


def test_questions(cfg, tmp_path):
    context = "the tall baker thanked the king at night . " * 12
    answer = context[:300].strip()
    rows = [
        {"id": "a", "context": context, "question": "who ?", "answers": {"text": ["baker"], "answer_start": [9]}},
        {"id": "b", "context": context, "question": "who " * 9, "answers": {"text": ["king"], "answer_start": [27]}},
        {"id": "c", "context": context, "question": "what ?", "answers": {"text": [answer], "answer_start": [0]}},
        {
            "id": "d",
            "context": context,
            "question": "whom ?",
            "answers": {"text": ["king"] * 2, "answer_start": [27] * 2},
        },
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row | {"topic": 1, "title": "t"}) for row in rows))
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    limits = ["task.max_length=40", "task.doc_stride=8", "task.max_question_length=6"]
    account = account_of(cfg("task=squad", "model=tiny", f"task.path={tmp_path}", *limits))
    assert (account.read, account.used) == (4, 4)
    assert account.changed == {
        "question cut at task.max_question_length=6": 1,
        "no window has the whole answer: the loss takes it for unanswerable": 1,
    }
    assert account.notes == ["columns ignored: topic", "rows with several answers, of which training uses the first: 1"]


@pytest.mark.parametrize(
    ("task", "model"), [("paraphrase", "tiny"), ("digits", "tiny_vit"), ("dialogue", "tiny_llama")]
)
def test_all_rows_of_embedded_tasks_are_used(cfg, task, model):
    sizes = ["task.validation_rows=20"] + (["task.train_rows=30"] if task != "digits" else [])
    c = cfg(f"task={task}", f"model={model}", *sizes)
    for name in ("train", "validation"):
        account = account_of(c, name)
        assert account == Account(read=account.used) and account.read >= 20


def test_other_splits_that_were_loaded_before_keep_their_accounts(cfg, tmp_path):
    mrpc_files(tmp_path / "mrpc")
    (tmp_path / "mrpc" / "train.parquet").rename(tmp_path / "mrpc" / "test.parquet")
    mrpc_files(tmp_path / "mrpc")
    (tmp_path / "chat").mkdir()
    for split, n in (("train", 8), ("validation", 3), ("test", 40)):
        rows = ({"prompt": f"{split} {i}", "completion": "yes"} for i in range(n))
        (tmp_path / "chat" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for overrides in (["task=mrpc", "model=tiny"], ["task=chat", "model=tiny_llama"]):
        task = get_task(cfg(*overrides, f"task.path={tmp_path / overrides[0].removeprefix('task=')}").task)
        task.load_split("test")
        rows = task.load()
        sizes = {"train": len(rows.train), "validation": len(rows.validation["validation"]), "test": 40}
        assert {name: account.read for name, account in task.accounts.items()} == sizes


# --- in a run ---


@pytest.fixture
def short(cfg, tmp_path):
    """Overrides of a run on files that takes seconds."""
    overrides = ["experiment=quickstart", "task=mrpc", "task.max_length=64", f"task.path={tmp_path / 'data'}"]
    return [*overrides, "search.epochs=1", "finetune.epochs=1", "finetune.warmup_steps=1", "logger=csv"]


def test_run_json_and_evaluation_count_rows(cfg, short, tmp_path, caplog):
    """C: idx is repeated text. This does not matter if nothing is submitted."""
    mrpc_files(tmp_path / "data", idx=lambda i: "same", extra=lambda i: i)
    result = run(cfg(*short, "task.max_train_rows=32", "search.max_rows=16"), tmp_path / "run")
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert {name: (entry["read"], entry["used"], entry["dropped"]) for name, entry in data.items()} == {
        "train": (40, 32, 8),
        "validation": (12, 12, 0),
        "search": (32, 16, 16),
    }
    assert data["train"]["why"] == {"task.max_train_rows=32": 8} and data["search"]["why"] == {"search.max_rows=16": 16}
    assert data == result.record["data"]
    for line in ("train: 32 of 40 rows used; 8 left out", "search: 16 of 32", "validation: columns ignored: extra"):
        assert line in caplog.text and line in (tmp_path / "run" / "run.log").read_text()
    found = evaluate(read_request([f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]))
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["data"] == {"validation": data["validation"]} and written["metrics"] == found
    with pytest.raises(UserError, match="no file for the split '2024'"):
        evaluate(read_request([f"run={tmp_path / 'run'}", "split=2024", f"output={tmp_path / 'o2'}"]))


@pytest.mark.parametrize("method", ["diffora", "lora"])
def test_a_validation_split_of_one_row_is_refused_before_anything_is_searched(cfg, short, tmp_path, method):
    """C: a validation split of one row."""
    folder = mrpc_files(tmp_path / "data", validation=1)
    overrides = [o for o in short if not o.startswith("search.") or method == "diffora"]
    with pytest.raises(UserError, match=f"{folder}: a validation split of 1 usable row is too small: one half of it"):
        run(cfg(*overrides, f"method={method}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
