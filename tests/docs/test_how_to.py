"""Each how-to page works as printed, outside the repository. The tests write its files and run its commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO
from safetensors.torch import load_file

from diffora.backbones.precision import bfloat16_unit
from diffora.core.selection import Selection

HOW_TO = REPO / "docs" / "how-to"
NOT_RUN = "# not run by the tests"
FILE = re.compile(r"^`([\w./-]+)`\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def files_of(page: str) -> dict[str, str]:
    """The files that a page prints: a line with the path in backticks, then a code block."""
    return dict(FILE.findall((HOW_TO / f"{page}.md").read_text()))


def scripts_of(page: str) -> list[str]:
    """The blocks of commands of a page, without those marked as not run."""
    blocks = COMMANDS.findall((HOW_TO / f"{page}.md").read_text())
    return [block for block in blocks if not block.startswith(NOT_RUN)]


def follow(page: str, folder: Path) -> str:
    """Do what a page says in an empty folder; returns what the commands printed."""
    for name, content in files_of(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    python = Path(sys.executable).parent
    environment = os.environ | {"DIFFORA": str(REPO), "PATH": f"{python}{os.pathsep}{os.environ['PATH']}"}
    printed = ""
    for script in scripts_of(page):
        # A page sets PYTHONPATH=. where it needs it. The entries that the test run needs are kept.
        script = script.replace("PYTHONPATH=. ", "PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} ")
        done = subprocess.run(
            ["bash", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    return printed


def record_of(folder: Path) -> dict:
    """The record of the only finished run below a folder; a dry run has a record too."""
    records = [json.loads(file.read_text()) for file in (folder / "outputs").glob("*/run.json")]
    [record] = [record for record in records if record["status"] == "completed"]
    return record


@pytest.mark.parametrize(
    "page", ["own-data", "entities", "multiple-choice", "own-model", "own-method", "own-task", "own-selector"]
)
def test_a_page_has_commands_and_says_how_much_to_write(page):
    assert scripts_of(page)
    if claim := re.search(r"\*\*What it takes:\*\* (\w+) files?, (\d+) lines", (HOW_TO / f"{page}.md").read_text()):
        counted = {name: text for name, text in files_of(page).items() if not name.endswith((".csv", "make_model.py"))}
        assert {"one": 1, "two": 2}[claim[1]] == len(counted)
        assert int(claim[2]) == sum(bool(line.strip()) for text in counted.values() for line in text.splitlines())
    else:
        assert page in ("own-data", "entities", "multiple-choice")


def test_own_data(tmp_path):
    follow("own-data", tmp_path)
    record = record_of(tmp_path)
    assert record["data"]["train"]["used"] == 9 and record["data"]["validation"]["used"] == 3
    assert record["classes"] == ["billing", "bug", "other"]
    [first, _] = map(json.loads, (tmp_path / "predicted" / "all.jsonl").read_text().splitlines())
    assert first["prediction"] in record["classes"] and list(first["probabilities"]) == record["classes"]
    [folder] = (tmp_path / "outputs").glob("*/confusion.png")
    assert (folder.parent / "classes.csv").is_file()
    [first, _] = map(json.loads, (tmp_path / "praised" / "all.jsonl").read_text().splitlines())
    assert set(first["prediction"]) <= {"fast", "cheap"} and list(first["probabilities"]) == ["cheap", "fast"]


def test_entities(tmp_path):
    follow("entities", tmp_path)
    record = record_of(tmp_path)
    assert record["classes"] == ["O", "B-PERSON", "I-PERSON", "B-PRODUCT", "I-PRODUCT"]
    assert record["data"]["train"]["used"] == 6 and record["data"]["validation"]["used"] == 2
    lines = list(map(json.loads, (tmp_path / "predicted" / "all.jsonl").read_text().splitlines()))
    assert [line["tokens"] for line in lines] == [["Lee", "wants", "a", "desk"], ["The", "lamp", "is", "here"]]
    assert all(len(line["prediction"]) == 4 for line in lines)


def test_multiple_choice(tmp_path):
    follow("multiple-choice", tmp_path)
    record = record_of(tmp_path)
    assert record["data"]["train"]["used"] == 6 and record["data"]["validation"]["used"] == 2
    [line] = map(json.loads, (tmp_path / "predicted" / "all.jsonl").read_text().splitlines())
    assert len(line["probabilities"]) == 3 and line["choice"].startswith("We ")


def test_seq2seq(tmp_path):
    printed = follow("seq2seq", tmp_path)
    assert "24 layers x 16 candidates" in printed and "12 layers x 10 candidates" in printed
    record = record_of(tmp_path)
    assert record["data"]["train"]["used"] == 8 and {len(row) for row in record["selection"]["selected"]} == {3, 5}
    [line] = map(json.loads, (tmp_path / "written" / "all.jsonl").read_text().splitlines())
    assert line["id"] == "x1" and line.keys() == {"row", "number", "id", "prediction"}


def test_answers(tmp_path):
    printed = follow("answers", tmp_path)
    assert "loss on the plain texts, before → after" in printed
    record = record_of(tmp_path)
    assert record["main_metric"] == "exact_match" and record["metrics"]["forgetting/before"] > 0
    lines = list(map(json.loads, (tmp_path / "answered" / "test.jsonl").read_text().splitlines()))
    assert [line["expected"] for line in lines] == ["8", "5", "10"]
    assert all(line["correct"] == (line["answer"] == line["expected"]) for line in lines)


def test_own_model(tmp_path):
    printed = follow("own-model", tmp_path)
    assert "diffora on mine: 3 layers x 6 candidates" in printed
    record = record_of(tmp_path)
    assert record["model"] == "mine"


def test_own_method(tmp_path):
    follow("own-method", tmp_path)
    record = record_of(tmp_path)
    assert record["method"] == "lora_fa"
    # only B is trained, and A is needed at inference too
    assert 0 < record["params"]["adapter"] < record["params"]["inference"]


def test_own_task(tmp_path):
    follow("own-task", tmp_path)
    record = record_of(tmp_path)
    assert "validation/macro_f1" in record["metrics"]


def test_training(tmp_path):
    printed = follow("training", tmp_path)
    assert "done: 12 steps" in printed
    history = record_of(tmp_path)["history"]
    assert [scores["epoch"] for scores in history] == [0.625, 1.25, 1.5]  # of 8 steps each


def test_cpu(tmp_path):
    printed = follow("cpu", tmp_path)
    record = record_of(tmp_path)
    [line] = [line for line in printed.splitlines() if line.startswith("precision: ")]
    assert line == f"precision: {record['precision']}"
    if bfloat16_unit(torch.device("cpu")) == "AVX512-BF16":
        assert line in (HOW_TO / "cpu.md").read_text()


def test_less_time(tmp_path):
    printed = follow("less-time", tmp_path)
    line = next(line for line in printed.splitlines() if line.startswith("time budget: "))
    assert line in (HOW_TO / "less-time.md").read_text()
    record = record_of(tmp_path)
    assert record["step_time"]["lowest_layer"] == 2 and record["step_time"]["selection"]["share"] <= 0.75
    assert record["params"]["adapter"] <= 14_000 and record["time"]["step_s"] > 0
    cached = json.loads((tmp_path / "cached" / "run.json").read_text())
    assert cached["prefix"]["finetune"]["layers"] == 2
    size = f"{cached['prefix']['finetune']['bytes'] / 10**6:.1f} MB"
    assert f"finetune: layers 1 to 2 of 4 are frozen: computed once, {size}" in (HOW_TO / "less-time.md").read_text()


def test_own_selector(tmp_path):
    follow("own-selector", tmp_path)
    assert record_of(tmp_path)["method"] == "diffora"
    [selection] = (tmp_path / "outputs").glob("*/selection.json")
    assert json.loads(selection.read_text())["selector"] == "my_selectors.saliency"


def test_confidence(tmp_path):
    printed = " ".join(follow("confidence", tmp_path).split())
    [file] = (tmp_path / "outputs").glob("*/selection.json")
    selection = Selection.load(file)
    assert selection.ensemble == 5 and selection.certainty in printed
    assert (file.parent / "members.json").is_file()
    words = r"\d+ of 24 (modules decided by an ensemble of 5 .*?), \d+ undecided"
    assert re.search(words, (HOW_TO / "confidence.md").read_text())[1] == re.search(words, selection.certainty)[1]


def test_peft(tmp_path):
    """The scripts train, the fragment names the modules that PEFT wrapped, and the table counts the printed lines."""
    printed = follow("peft", tmp_path)
    selection = Selection.load(tmp_path / "selection.json")
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    chosen = selection.names()
    assert len(chosen) == 12 and adapter["r"] == 8
    names = {
        name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }
    assert {name.removesuffix(".lora_A.weight") for name in names if "lora_A" in name} == set(chosen)
    text = (HOW_TO / "peft.md").read_text()
    fragment = printed[printed.index("# 12 of 24") :]
    assert yaml.safe_load(fragment)["lora_target_modules"] == chosen
    [shown] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert shown.splitlines()[:-2] == fragment.splitlines()[:6]
    counted = []
    for script in ("with_trainer.py", "plain.py"):
        lines = [line for line in files_of("peft")[script].splitlines() if line.strip()]
        counted.append(
            (len(lines), sum(bool(re.search(r"diffora|selection|head\.requires_grad", line)) for line in lines))
        )
    assert counted == [(int(a), int(b)) for a, b in re.findall(r"\| (\d+) \| (\d+) \|", text)]
