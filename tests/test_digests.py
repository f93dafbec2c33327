"""Digests depend on everything that can change a result, and on nothing else."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffora import digests
from diffora.errors import UserError
from diffora.hub import EMBEDDED


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EMBEDDED, tmp_path / "model")


def flip(file, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_the_same_files_elsewhere_have_the_same_digest(folder):
    ours = digests.backbone(str(folder))
    assert ours == digests.backbone("embedded") and ours["how"] == "sha256 of all files"
    assert ours["files"].keys() == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert digests.backbone("embedded:tiny_vit")["files"].keys() >= {"model.safetensors", "preprocessor_config.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_one_flipped_bit_in_a_relevant_file_changes_the_digest(folder, name):
    before = digests.backbone(str(folder))
    flip(folder / name, -20) if name.endswith("safetensors") else (folder / name).write_text('{"other": 1}')
    after = digests.backbone(str(folder))
    assert after["digest"] != before["digest"]
    assert digests.changes({"backbone": before}, {"backbone": after}) == [f"the backbone's files changed: {name}"]


def test_added_and_removed_files_change_the_digest_unless_nothing_reads_them(folder):
    before = digests.backbone(str(folder))
    (folder / "README.md").write_text("other words")
    torch.save({}, folder / "pytorch_model.bin")  # the safetensors file is used instead
    torch.save({}, folder / "optimizer.pt")
    assert digests.backbone(str(folder)) == before
    (folder / "tokenizer_config.json").unlink()
    changed = digests.changes({"backbone": before}, {"backbone": digests.backbone(str(folder))})
    assert changed == ["the backbone's files changed: tokenizer_config.json"]


def test_settings_of_generation_count(tmp_path):
    folder = shutil.copytree(EMBEDDED.parent / "tiny_sums", tmp_path / "model")
    before = digests.backbone(str(folder))
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    changed = digests.changes({"backbone": before}, {"backbone": digests.backbone(str(folder))})
    assert changed == ["the backbone's files changed: generation_config.json"]


def test_pickled_weights_and_parts_of_weights_count(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert digests.backbone(str(folder)) is None  # no weights
    torch.save(tensors, folder / "pytorch_model.bin")
    pickled = digests.backbone(str(folder))
    flip(folder / "pytorch_model.bin", 5000)
    assert digests.backbone(str(folder))["digest"] != pickled["digest"]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i::2])
        save_file(part, folder / name)
    index = {"weight_map": {key: names[i % 2] for i, key in enumerate(tensors)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = digests.backbone(str(folder))
    assert {*names, "model.safetensors.index.json"} < parts["files"].keys()
    assert "pytorch_model.bin" not in parts["files"]
    flip(folder / names[1], -1)
    changed = digests.changes({"backbone": parts}, {"backbone": digests.backbone(str(folder))})
    assert changed == [f"the backbone's files changed: {names[1]}"]
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="not an index of weights"):
        digests.backbone(str(folder))


def test_large_files_are_sampled_and_the_record_says_so(folder, monkeypatch):
    monkeypatch.setattr(digests, "SAMPLED_FROM", 100_000)
    monkeypatch.setattr(digests, "ENDS", 2000)
    monkeypatch.setattr(digests, "SAMPLES", 16)
    monkeypatch.setattr(digests, "SAMPLE", 512)
    file = folder / "model.safetensors"
    seen, size, before = 0, file.stat().st_size, digests.backbone(str(folder))
    assert before["how"] == "sha256 of all files; of model.safetensors: of header and sample"
    assert before["digest"] != digests.backbone("embedded:tiny_vit")["digest"]
    header = int.from_bytes(file.read_bytes()[:8], "little")
    for place in (10, header // 2, header - 1, size - 1, size // 2, size * 5 // 16 + 511):
        flip(file, place)
        seen += digests.backbone(str(folder))["digest"] != before["digest"]
        flip(file, place)
    assert seen == 6 and digests.backbone(str(folder)) == before
    os.truncate(file, size - 1)
    assert digests.backbone(str(folder))["digest"] != before["digest"]


def test_a_remembered_digest_is_that_of_the_content(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 10)
    file = tmp_path / "file"
    file.write_bytes(bytes(5000))
    first = digests.of_file(file)
    assert not (tmp_path / "cache" / "digests").exists()  # too fresh: it may change within a tick of the clock
    later = digests.time.time() + 10
    monkeypatch.setattr(digests.time, "time", lambda: later)
    assert digests.of_file(file) == first
    [memory] = (tmp_path / "cache" / "digests").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(digests.hashlib, "sha256", _counting(digests.hashlib.sha256, calls := []))
        assert digests.of_file(file) == first
    assert max(calls) < 1000  # the file itself was not read
    for damaged in (b"", b"\xff\xfe", memory.read_bytes().replace(b"a", b"b"), b"0" * 64 + b" " + b"1" * 64):
        memory.write_bytes(damaged)
        assert digests.of_file(file) == first
    assert digests.of_file(file, tail=8) != first
    stat = file.stat()
    with open(file, "r+b") as stream:
        stream.write(b"x")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digests.of_file(file) != first
    monkeypatch.setenv("DIFFORA_CACHE", "/proc/nowhere")  # where nothing can be remembered
    assert digests.of_file(file) != first


def _counting(make, calls):
    class Hasher:
        def __init__(self, data=b""):
            self.inner = make()
            self.update(data)

        def update(self, data):
            calls.append(len(data))
            self.inner.update(data)

        def digest(self):
            return self.inner.digest()

        def hexdigest(self):
            return self.inner.hexdigest()

    return Hasher


def test_a_hub_model_is_found_in_the_local_cache(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert digests.backbone("someone/model") is None
    repo = tmp_path / "models--someone--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123")
    (repo / "blobs").mkdir()
    (repo / "snapshots" / "0123").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, repo / "blobs" / name)
        (repo / "snapshots" / "0123" / name).symlink_to(repo / "blobs" / name)
    assert digests.backbone("someone/model") == digests.backbone("embedded")


def test_changes_are_named_and_missing_digests_are_not_compared():
    old = {"settings": {"lr": 1, "task": {"path": None}}, "data": "a", "rows": {"train": 3}, "backbone": None}
    assert digests.changes(old, json.loads(json.dumps(old))) == [] == digests.changes({}, old)
    new = {"settings": {"lr": 2, "task": {"path": "x"}}, "data": "b", "rows": {"train": 4}, "backbone": {"digest": "x"}}
    assert digests.changes(old, new) == [
        "lr: 1 -> 2",
        "task.path: null -> 'x'",
        "the data changed: train: 3 -> 4 rows",
    ]
    a, b = ({"backbone": {"digest": text}} for text in "ab")
    assert digests.changes(a, b) == ["the backbone's files changed"]
