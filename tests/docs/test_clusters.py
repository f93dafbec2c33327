"""docs/how-to/clusters.md: its commands for processes on one machine, and its code for another trainer."""

import json
import re

import pytest
from test_how_to import HOW_TO, follow
from transformers import AutoModelForCausalLM

from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.hub import EMBEDDED


@pytest.mark.slow
def test_the_commands(tmp_path):
    printed = follow("clusters", tmp_path)
    assert "leaves out 1 of 33 rows" in printed
    records = {name: json.loads((tmp_path / "runs" / name / "run.json").read_text()) for name in ("ddp", "fsdp")}
    assert records["fsdp"]["metrics"] == pytest.approx(records["ddp"]["metrics"], rel=0.1)
    machines = json.loads((tmp_path / "runs" / "machines" / "run.json").read_text())
    assert machines["status"] == "completed" and machines["selection"]["file"] == "selection.json"


def test_a_selection_goes_to_another_trainer(tmp_path, monkeypatch):
    [block] = re.findall(r"```python\n(.*?)```", (HOW_TO / "clusters.md").read_text(), re.DOTALL)
    path = EMBEDDED.parent / "tiny_llama"
    grid = find_grid(AutoModelForCausalLM.from_pretrained(path))
    chosen = [[grid.types[0]] for _ in grid.layers]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "search").mkdir(parents=True)
    selection = Selection("m", list(grid.types), [list(row) for row in grid.names], chosen, 0.5, 0, selector="search")
    selection.save(tmp_path / "runs" / "search" / "selection.json")
    given = {"path": path}
    exec(block, given)
    adapted = {name.split(".lora_A")[0] for name, _ in given["model"].named_parameters() if ".lora_A." in name}
    assert adapted == {f"base_model.model.{row[0]}" for row in grid.names}
