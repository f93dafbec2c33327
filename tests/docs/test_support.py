"""The table of docs/reference/support.md is that of its results, and what it says is refused is refused."""

import importlib.util
import json

import pytest
from conftest import REPO
from omegaconf import OmegaConf

from diffora.errors import UserError
from diffora.run.check import check

spec = importlib.util.spec_from_file_location("support", REPO / "scripts" / "support.py")
assert spec is not None and spec.loader is not None
support = importlib.util.module_from_spec(spec)
spec.loader.exec_module(support)
RESULTS = json.loads(support.RESULTS.read_text())


def test_the_table_is_made_of_the_results():
    assert support.table(RESULTS) in support.PAGE.read_text()
    assert RESULTS.keys() <= support.variants().keys()
    cells = [cell for row in RESULTS.values() for cell in row.values()]
    assert cells and not [cell for cell in cells if not (cell == "works" or cell.startswith("refused: "))]


@pytest.mark.parametrize("kind", support.KINDS)
def test_the_refusals_are_those_of_the_code(cfg, kind, monkeypatch):
    monkeypatch.setattr("diffora.run.check.model_problems", lambda *_: ())  # 4 bit needs a package
    trainer = cfg(*support.SMALL, *support.KINDS[kind], "method=lora")
    for name, row in RESULTS.items():
        if kind not in row:
            continue
        whole = BASES.setdefault(name, OmegaConf.to_container(cfg(*support.SMALL, *support.variants()[name])))
        composed = OmegaConf.create(whole)
        composed.trainer, composed.model.quantise = trainer.trainer, trainer.model.quantise
        try:
            check(composed)
            found = "works"
        except UserError as error:
            found = f"refused: {' '.join(error.problems)}"
        if (name, kind) in LATER and found == "works":
            assert row[kind].startswith("refused: "), (name, kind)
        else:
            assert row[kind] == found, (name, kind)


LATER = {("pissa", "4bit")}
"""Refused by PEFT, when the model is there."""
BASES: dict[str, object] = {}
