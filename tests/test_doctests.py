"""Examples in docstrings give the printed results. Only modules with examples are imported, which saves time."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import diffora

PACKAGE = Path(diffora.__file__).parent
FILES = sorted(file for file in PACKAGE.rglob("*.py") if ">>> " in file.read_text(encoding="utf-8"))
MODULES = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in FILES]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    module = importlib.import_module(name.removesuffix(".__init__"))
    with torch.random.fork_rng(devices=[]):
        failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert tried > 0 and failed == 0


def test_there_are_examples():
    assert "diffora.theory.gram" in MODULES
