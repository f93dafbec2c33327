"""A cache file is used only if it is undamaged. Otherwise it is written again, with a line in the log."""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pyarrow as pa
import pytest

from diffora.settings.read import model_of
from diffora.tasks import cache
from diffora.tasks.base import get_task
from diffora.tasks.cache import arrow_writer, cached, tokenizer_facts

SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.int64(), "row": pa.int32()})
ROWS = [{"input_ids": list(range(i % 7 + 1)), "labels": i % 2, "row": i} for i in range(600)]


def write(file: Path) -> None:
    with arrow_writer(file, SCHEMA) as append:
        for start in range(0, len(ROWS), 200):
            rows = ROWS[start : start + 200]
            append({name: [row[name] for row in rows] for name in SCHEMA.names})


def use(folder: Path, fact: int = 0) -> list[dict]:
    return cached("kind", {"fact": fact}, write, folder).to_list()


def replace(file: Path, content: bytes) -> None:
    """Not in place: an open file keeps its content."""
    file.unlink()
    file.write_bytes(content)


@pytest.fixture
def file(tmp_path) -> Path:
    assert use(tmp_path) == ROWS
    [found] = (tmp_path / "kind").iterdir()
    return found


def test_a_good_file_is_not_written_again(file, tmp_path):
    def never(_):
        raise AssertionError

    assert cached("kind", {"fact": 0}, never, tmp_path).to_list() == ROWS


def test_one_flipped_bit_anywhere_is_noticed(file, tmp_path, caplog):
    """B11: a token, a label, a list offset, arrow's own headers, the digest itself."""
    content = file.read_bytes()
    rng = random.Random(0)
    places = [*rng.sample(range(len(content)), 60), 0, len(content) - 1, len(content) - 33]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        replace(file, bytes(flipped))
        assert use(tmp_path) == ROWS
        assert file.read_bytes() == content
    assert caplog.text.count("damaged cache file") == len(places)


DAMAGE = {
    "the last 3,000 bytes zeroed": lambda content: content[:-3000] + bytes(3000),
    "cut": lambda content: content[:-5000],
    "only a digest": lambda content: content[-32:],
    "shorter than a digest": lambda content: content[:10],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"x",
    "without a digest, as it was before": lambda content: content[:-32],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_cache_file_is_replaced(file, tmp_path, how, caplog):
    """B11"""
    content = file.read_bytes()
    replace(file, DAMAGE[how](content))
    assert use(tmp_path) == ROWS and file.read_bytes() == content
    assert str(file) in caplog.text and "its digest does not match its content" in caplog.text


def test_an_undamaged_file_of_other_facts_is_not_used(file, tmp_path, caplog):
    use(tmp_path, fact=1)
    other = next(f for f in file.parent.iterdir() if f != file)
    with arrow_writer(tmp_path / "few", SCHEMA) as append:
        append({name: [ROWS[0][name]] for name in SCHEMA.names})
    for content in (other.read_bytes(), (tmp_path / "few").read_bytes()):
        replace(file, content)
        assert use(tmp_path) == ROWS
    assert caplog.text.count("damaged cache file") == 2


def test_a_link_that_leads_nowhere_is_replaced(file, tmp_path):
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    assert use(tmp_path) == ROWS and not file.is_symlink()


def test_a_large_file_is_read_again_only_after_it_changed(file, tmp_path, monkeypatch):
    """A change that keeps size and modification time is noticed too."""
    from diffora import digests

    monkeypatch.setattr(digests, "REMEMBERED_FROM", 1000)
    later = digests.time.time() + 10
    monkeypatch.setattr(digests.time, "time", lambda: later)  # the file is no longer fresh
    assert use(tmp_path) == ROWS
    assert (tmp_path / "cache" / "digests").is_dir()
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[1500] ^= 1
    with open(file, "r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert use(tmp_path) == ROWS


def test_tokenizers_that_cut_texts_in_other_ways_have_other_facts(tmp_path):
    """Also where vocabulary and special tokens are equal."""
    from families import tokenizer_for
    from transformers import CTRLTokenizer

    (tmp_path / "vocab.json").write_text(
        json.dumps({"<unk>": 0, "a@@": 1, "bc": 2, "abc": 3, "b": 4, "c": 5, "b@@": 6})
    )
    made = []
    for merges in ("a b\nab c</w>\n", "b c</w>\na b\n"):
        (tmp_path / "merges.txt").write_text(f"#version\n{merges}")
        made.append(CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    assert made[0].tokenize("abc") != made[1].tokenize("abc")
    assert tokenizer_facts(made[0]) != tokenizer_facts(made[1])
    (tmp_path / "merges.txt").unlink()
    ours, theirs = tokenizer_for("bert"), tokenizer_for("bert")
    assert tokenizer_facts(ours) == tokenizer_facts(theirs)
    theirs.split_special_tokens = True
    assert ours("</s>")["input_ids"] != theirs("</s>")["input_ids"] and tokenizer_facts(ours) != tokenizer_facts(theirs)


def test_another_version_of_the_tokenizing_library_gives_other_facts(monkeypatch):
    from families import tokenizer_for

    tokenizer = tokenizer_for("bert")
    before = tokenizer_facts(tokenizer)
    monkeypatch.setattr("diffora.tasks.cache.version", lambda name: f"{name} of tomorrow")
    assert tokenizer_facts(tokenizer) != before


def slow_use(folder: Path) -> list[dict]:
    def slowly(file: Path) -> None:
        (folder / f"written-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(0.5)
        write(file)

    return cached("kind", {"fact": 0}, slowly, folder).to_list()


def test_one_of_several_processes_writes(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        found = pool.map(slow_use, [tmp_path] * 12, chunksize=1)
    assert all(rows == ROWS for rows in found)
    assert [file.suffix for file in (tmp_path / "kind").iterdir()] == [".arrow"]
    assert len(list(tmp_path.glob("written-*"))) == 1


def test_a_line_says_whom_a_process_waits_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    caplog.set_level("INFO")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        other = pool.apply_async(slow_use, [tmp_path])
        while not list(tmp_path.glob("written-*")):
            time.sleep(0.01)
        assert use(tmp_path) == ROWS == other.get()
    [file] = (tmp_path / "kind").iterdir()
    assert f"waiting for another process, which writes {file}" in caplog.text


def test_a_writer_that_fails_leaves_nothing_and_the_next_one_writes(tmp_path):
    def fails(file: Path) -> None:
        raise ValueError("a fault in the rows")

    with pytest.raises(ValueError, match="a fault in the rows"):
        cached("kind", {"fact": 0}, fails, tmp_path)
    assert list((tmp_path / "kind").iterdir()) == []
    assert use(tmp_path) == ROWS


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(self, timeout=None):
        raise NotImplementedError

    monkeypatch.setattr(cache.FileLock, "acquire", unsupported)
    assert use(tmp_path) == ROWS == use(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=paraphrase", "model=tiny", "task.train_rows=64", "task.validation_rows=32"],
        ["task=dialogue", "model=tiny_llama", "task.packing=true", "task.train_rows=64", "task.validation_rows=32"],
        ["task=digits", "model=tiny_vit"],
    ],
    ids=["tokens", "packed conversations", "images"],
)
def test_every_kind_of_cache_file_is_checked(cfg, overrides, tmp_path, caplog):
    composed = cfg("method=lora", *overrides)
    task = get_task(composed.task)
    rows = task.load().train
    processor = task.processor(model_of(composed.model))

    def encoded() -> list[dict]:
        return task.encode(rows, processor, training=True).to_list()

    expected = encoded()
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.parent.name != "parquet"]
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        replace(file, bytes(content))
    assert encoded() == expected
    assert caplog.text.count("damaged cache file") == len(files)


def test_digests_of_images_are_checked(tmp_path, caplog):
    """A flipped bit in a digest would give the same images another data hash."""
    from PIL import Image

    from diffora.tasks.images.folders import read_folder
    from diffora.tasks.images.rows import digests

    for i in range(4):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "images" / "a" / f"{i}.bmp")
    source = read_folder(tmp_path / "images", ["a"], True, [])
    expected = digests(source)
    [file] = (tmp_path / "cache" / "images").iterdir()
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    replace(file, bytes(content))
    assert digests(source) == expected and "damaged cache file" in caplog.text
    # another image of the same size and time
    image = tmp_path / "images" / "a" / "0.bmp"
    stat = image.stat()
    Image.new("RGB", (4, 4), (99, 0, 0)).save(image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digests(source)[0] != expected[0] and digests(source)[1:] == expected[1:]
