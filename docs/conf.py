"""How Sphinx makes the documentation: `make docs` writes docs/_build/html. It needs no network."""

import re
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

project = "diffora"
author = "the authors of diffora"
release = version = installed("diffora")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
templates_path = ["_templates"]

# Pages are Markdown. Headings down to the third level can be linked to, as on GitHub.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are kept with their outputs

# Reference pages are made from the docstrings. A name in single backticks is a link where Sphinx knows the name.
default_role = "py:obj"
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"diffora {release}"
html_theme_options = {"navigation_with_keys": True}
linkcheck_timeout = 20

# --- what the pages are made of besides the files here ---


def copy_notebooks() -> None:
    """Copy the tutorials to docs/tutorials; a notebook's links to ../docs become links within the site."""
    for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        copy = HERE / "tutorials" / notebook.name
        text = notebook.read_text().replace("](../docs/", "](../")
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)


def plain_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape the characters of docstrings that are mathematics to us and mark-up to Sphinx."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``|`[^`]*`)", line)
        parts[::2] = [re.sub(r"(?<!\\)([*|]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        bullet = re.match(r"(\s*)\\\*( )", line)
        lines[i] = "".join(parts)
        if bullet:
            lines[i] = lines[i].replace("\\* ", "* ", 1)


def setup(app: Any) -> None:
    copy_notebooks()
    app.connect("autodoc-process-docstring", plain_docstring)
