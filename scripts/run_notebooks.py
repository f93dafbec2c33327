"""Run the notebooks and keep their outputs, so that they can be read without running them.

    python scripts/run_notebooks.py                                    # all of them, about two minutes
    python scripts/run_notebooks.py notebooks/02_reading_a_dam.ipynb

Warnings are left out, and folders of this machine are replaced: neither is of use to a reader.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def readable(text: Any) -> Any:
    """An output with the temporary folder of a run as `/tmp/run`."""
    temporary = re.escape(tempfile.gettempdir())
    return re.sub(rf"{temporary}/tmp\w+", "/tmp/run", text) if isinstance(text, str) else text


def cleaned(notebook: Any) -> Any:
    """The notebook with what a reader needs: no warnings, no times of execution, no folders of this machine."""
    notebook.nbformat_minor = 5  # since this version, cells have an id
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "text" in output:
                output.text = readable(output.text)
            for kind, content in output.get("data", {}).items():
                output.data[kind] = readable(content)
    nbformat.validate(notebook)
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="*", default=sorted(NOTEBOOKS.glob("*.ipynb")))
    for file in parser.parse_args().notebooks:
        notebook = nbformat.read(file, as_version=4)
        NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
        nbformat.write(cleaned(notebook), file)
        print(f"{file}: {file.stat().st_size // 1024} kB", flush=True)


if __name__ == "__main__":
    main()
