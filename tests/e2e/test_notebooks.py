"""The notebooks run, and their files have the outputs of a run."""

import re

import nbformat
import pytest
from conftest import REPO
from nbclient import NotebookClient

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
QUICK = ("03_theory",)  # the others train, which takes up to half a minute each
HOW = "python scripts/run_notebooks.py makes the outputs"


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in NOTEBOOKS],
)
def test_notebooks_run_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_the_outputs_of_one_run(path):
    """The site and GitHub then show the outputs. A cell that was changed after the run has lost its number."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), HOW
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) > 2 and not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"], HOW


def test_outputs_are_small_and_have_no_folders_of_a_machine():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_500_000
    for path in NOTEBOOKS:
        assert not re.search(r"/(home|root|Users|work)/|site-packages|/tmp/tmp", path.read_text()), path


def test_imports_of_the_notebooks_exist():
    """A quick check, because the notebooks that train run only in the slow tests."""
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for statement in re.findall(r"^from diffora[\w.]* import (?:[^(\n]+|\([^)]*\))", cell.source, re.MULTILINE):
                exec(statement, {})
