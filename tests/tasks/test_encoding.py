"""Several processes encode what one does, byte for byte, in bounded memory, and leave nothing behind when killed."""

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from diffora.errors import UserError
from diffora.settings.read import model_of
from diffora.tasks import encoding, tokenise
from diffora.tasks.base import get_task
from diffora.tasks.cache import cached
from diffora.tasks.chat import tokens as chat
from diffora.tasks.choices import encode as choices
from diffora.tasks.encoding import Faults, processes, write_rows
from diffora.tasks.words import windows

TYPES = {"ids": pa.list_(pa.int32()), "row": pa.int32(), "of": pa.int32()}
ROWS = datasets.Dataset(pa.table({"n": list(range(40))}))
RANGES = [(start, min(start + 7, 40)) for start in range(0, 40, 7)]


def repeated(rows, start, fails=()):
    """Each row n gives n % 3 encoded rows."""
    if faulty := [f"row {n}" for n in rows["n"] if n in fails]:
        raise UserError(faulty)
    of = [start + i for i, n in enumerate(rows["n"]) for _ in range(n % 3)]
    return {"of": of, "ids": [[n] * n for n in of]}


def content(path: Path, num_proc: int, encode=repeated) -> bytes:
    write_rows(path, TYPES, ROWS, RANGES, encode, num_proc)
    return path.read_bytes()


def test_the_file_does_not_depend_on_the_number_of_processes(tmp_path):
    one = content(tmp_path / "one", 1)
    found = datasets.Dataset.from_file(str(tmp_path / "one"))
    assert found["row"][:] == list(range(len(found))) and found["of"][:] == [n for n in range(40) for _ in range(n % 3)]
    assert [content(tmp_path / str(n), n) for n in (2, 3, 9)] == [one] * 3


@pytest.mark.parametrize("num_proc", [1, 2])
def test_all_faults_are_reported_together(tmp_path, num_proc):
    with pytest.raises(Faults) as caught:
        content(tmp_path / "file", num_proc, partial(repeated, fails=(3, 5, 38)))
    assert caught.value.problems == ["row 3", "row 5", "row 38"]


def dies(rows, start):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"trainer\.num_proc=2: a process that encodes rows was killed"):
        content(tmp_path / "file", 2, dies)


def test_a_process_that_cannot_be_started_is_explained(tmp_path, monkeypatch):
    def fork():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UserError, match=r"trainer\.num_proc=2: Cannot allocate memory; try fewer processes"):
        cached("kind", {}, lambda file: content(file, 2), tmp_path)


def raises(rows, start):
    raise RuntimeError("the tokenizer cannot do this")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_exception_in_a_process_is_not_taken_for_its_death(tmp_path, num_proc):
    with pytest.raises(RuntimeError, match="the tokenizer cannot do this"):
        content(tmp_path / "file", num_proc, raises)


def test_no_more_processes_than_cores(monkeypatch, caplog):
    monkeypatch.setattr(encoding, "cores", lambda: 3)
    assert [processes(n) for n in (1, 3)] == [1, 3] and not caplog.text
    assert processes(8) == 3 and "trainer.num_proc=8: this process may use 3 cores" in caplog.text


def test_global_random_numbers_do_not_move(tmp_path):
    import torch

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    content(tmp_path / "file", 2)
    assert torch.rand(3).equal(expected)


N = range(9)
TALK = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes " * (i % 5 + 1)}] for i in N]
KINDS = {
    "task=text model=tiny task.max_length=16": {
        "text": ["some words " * (i % 4 + 1) for i in N],
        "label": ["ab"[i % 2] for i in N],
    },
    "task=seq2seq model=tiny_t5": {"source": ["x y " * (i + 1) for i in N], "target": ["z"] * 9},
    "task=tokens model=tiny task.max_length=9 task.doc_stride=1 task.tags_column=tags": {
        "tokens": [["a", "b", "c"] * (i + 1) for i in N],
        "tags": [["O", "B-X", "O"] * (i + 1) for i in N],
    },
    "task=choice model=tiny task.max_length=16": {
        "context": ["q"] * 9,
        "choices": [["one", "two " * (i + 1)] for i in N],
        "label": [i % 2 for i in N],
    },
    "task=chat model=tiny_llama task.validation_rows=2 task.max_length=32": {"messages": TALK},
}


@pytest.mark.parametrize("overrides", KINDS)
def test_every_task_encodes_the_same_with_two_processes(overrides, cfg, tmp_path, monkeypatch):
    for module in (tokenise, windows, choices, chat):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    (tmp_path / "rows").mkdir()
    file = tmp_path / "rows" / "train.jsonl"
    datasets.Dataset(pa.table(KINDS[overrides])).to_json(file)
    found = []
    for num_proc in (1, 2):
        monkeypatch.setenv("DIFFORA_CACHE", str(tmp_path / str(num_proc)))
        composed = cfg(*overrides.split(), f"task.path={file.parent if 'chat' in overrides else file}")
        task = get_task(composed.task)
        task.num_proc = num_proc
        encoded = task.encode(task.load().train, task.processor(model_of(composed.model)), training=False)
        found.append(encoded.to_list())
        files = sorted((tmp_path / str(num_proc)).rglob("*.arrow"))
        found.append([(file.name, file.read_bytes()) for file in files if file.parent.name != "json"])
    assert found[0] == found[2] and len(found[0]) > 4 and found[1] == found[3]


def test_long_rows_are_encoded_a_few_at_a_time(cfg, tmp_path, monkeypatch):
    """Also where a row is a list of texts; the file does not depend on it."""
    monkeypatch.setattr(encoding, "CHARACTERS_AT_ONCE", 40)
    sizes, write = [], encoding.write_rows

    def spy(file, types, rows, ranges, *more):
        ranges = list(ranges)
        sizes.append([end - start for start, end in ranges])
        return write(file, types, rows, ranges, *more)

    for name, module in (("tokens", windows), ("choice", choices)):
        monkeypatch.setattr(module, "write_rows", spy)
        overrides = next(each for each in KINDS if each.startswith(f"task={name} "))
        file = tmp_path / f"{name}.jsonl"
        datasets.Dataset(pa.table(KINDS[overrides])).to_json(file)
        composed = cfg(*overrides.split(), f"task.path={file}")
        task = get_task(composed.task)
        rows = task.load_split("all")
        task.encode(rows, task.processor(model_of(composed.model)), training=False)
    words, choice = sizes
    assert words == [4, 2, 1, 1, 1]  # of 3, 6, 9 … letters
    assert choice == [3, 1, 1, 1, 1, 1, 1]  # of 8, 12, 16 … characters, the context counted with each choice
    assert list(encoding.ranges_of(encoding.characters_of(pa.chunked_array([pa.array([], pa.string())])), 5)) == []


SLOW = """
import signal, sys, time
from pathlib import Path
import datasets, pyarrow as pa
from diffora.tasks.cache import cached
from diffora.tasks.encoding import write_rows

def encode(rows, start):
    if start >= 20:
        time.sleep(1)
    return {"n": rows["n"]}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore the signal
    rows = datasets.Dataset(pa.table({"n": list(range(100))}))
    ranges = [(start, start + 10) for start in range(0, 100, 10)]
    types = {"n": pa.int64(), "row": pa.int32()}
    cached("kind", {}, lambda file: write_rows(file, types, rows, ranges, encode, 2), sys.argv[1])
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_half_way_leaves_no_file_and_no_process(tmp_path, how):
    script, cache = tmp_path / "slow.py", tmp_path / "cache"
    script.write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, str(script), str(cache)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.time() + 60
    while len(pids := children.read_text().split()) < 2 and time.time() < until:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(how)
    process.wait(timeout=30)
    assert len(pids) == 2 and not list(cache.rglob("*.arrow"))
    alive = pids
    while alive and time.time() < until:  # workers look for their parent every few seconds
        alive = [
            pid for pid in alive if Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
        ]
        time.sleep(0.2)
    assert not alive
