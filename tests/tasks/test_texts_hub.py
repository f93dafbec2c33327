"""task=text with a data set of the hub, through `datasets` itself and a hub on this machine."""

import json
import os
import subprocess
import sys
import threading

import pytest
from conftest import REPO
from dataset_hub import dataset_hub
from tables import write
from test_text import tickets

LOAD = """
import json, sys
from hydra import compose, initialize_config_dir
from diffora.errors import UserError
from diffora.places import conf_dir
from diffora.tasks.base import get_task
for words in json.loads(sys.argv[1]):
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            task = get_task(compose("config", ["task=text", *words]).task)
        rows = task.load()
        sizes = [len(rows.train), len(rows.validation["validation"]), len(task.load_split("test"))]
        print(json.dumps([list(task.spec.label_names), sizes, rows.data_hash, task.accounts["train"].notes]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
CASES = {
    "whole": ["task.path=me/tickets"],
    "validation": ["task.path=me/tickets", "task.validation_split=test"],
    "no validation": ["task.path=me/tickets", "task.validation_split=dev"],
    "dev": ["task.path=me/dev"],
    "dev named": ["task.path=me/dev", "task.validation_split=dev"],
    "subset": ["task.path=me/subsets", "task.subset=b"],
    "no subset": ["task.path=me/subsets"],
    "code": ["task.path=me/code"],
    "absent": ["task.path=me/absent"],
    "column": ["task.path=me/tickets", "task.label_column=topics"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What each case loads, or its message."""
    folder = tmp_path_factory.mktemp("hub")
    root, home = folder / "data", folder / "home"
    write(root / "me" / "tickets" / "train.csv", tickets())
    write(root / "me" / "tickets" / "test.csv", tickets(6))
    write(root / "me" / "dev" / "train.parquet", tickets())
    write(root / "me" / "dev" / "dev.parquet", tickets(9))
    for name in "ab":
        write(
            root / "me" / "subsets" / f"{name}.jsonl", [row | {"label": f"{name}{row['label']}"} for row in tickets()]
        )
        write(root / "me" / "subsets" / f"{name}_test.jsonl", [{"text": "x"}])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}.jsonl}}\n"
        f"  - {{split: test, path: {name}_test.jsonl}}\n"
        for name in "ab"
    )
    (root / "me" / "subsets" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    dev = "---\nconfigs:\n- config_name: x\n  data_files:\n" + "".join(
        f"  - {{split: {name}, path: {name}.parquet}}\n" for name in ("train", "dev")
    )
    (root / "me" / "dev" / "README.md").write_text(f"{dev}---\n")
    (root / "me" / "code").mkdir()
    (root / "me" / "code" / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Code: ...\n")
    with dataset_hub(root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        own |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", LOAD, json.dumps(list(CASES.values()))]
        done = subprocess.run(command, cwd=REPO, env=os.environ | own, capture_output=True, text=True, timeout=300)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert not (folder / "ran").exists()  # no code of a data set is run
    lines = [line for line in done.stdout.splitlines() if line.startswith(("[", '"'))]
    return dict(zip(CASES, map(json.loads, lines), strict=True))


def test_rows_of_the_hub_are_those_of_equal_files(found, cfg, tmp_path):
    from diffora.tasks.base import get_task

    classes, sizes, data_hash, _ = found["whole"]
    assert classes == ["billing", "bug", "other"] and sizes == [27, 3, 6]
    same = get_task(cfg("task=text", f"task.path={write(tmp_path / 't.csv', tickets())}").task).load()
    assert data_hash == same.data_hash


def test_splits_and_subsets(found):
    assert found["validation"][1] == [30, 6, 6]
    assert found["no validation"] == "me/tickets has no split 'dev'; it has train, test."
    assert found["dev"] == "me/dev has no split 'validation', but 'dev': task.validation_split=dev"
    assert "has no split 'test'; it has train, dev" in found["dev named"]
    assert found["subset"][0] == ["bbilling", "bbug", "bother"]
    assert "task.subset=<name>" in found["no subset"] and "one of its subsets ['a', 'b']" in found["no subset"]


def test_mistakes(found):
    assert "Cannot load task.path=me/code" in found["code"]
    assert "me/absent" in found["absent"] and "no file or folder here" in found["absent"]
    assert "me/tickets, train: no column 'topics' (task.label_column); it has text, label" in found["column"]
