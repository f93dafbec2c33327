"""How Sphinx makes the documentation: `make docs` writes docs/_build/html. It needs no network."""

import os
import re
import shutil
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
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
linkcheck_timeout = 20

# --- pages that stand elsewhere in the repository ---

ROOT = HERE.parent
OUTSIDE = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "src/diffora/assets/tiny_llama/README.md": "results/tiny_llama.md",
    "src/diffora/assets/tiny_sums/README.md": "results/tiny_sums.md",
} | {f"notebooks/{file.name}": f"tutorials/{file.name}" for file in sorted((ROOT / "notebooks").glob("*.ipynb"))}
"""File in the repository: page of the site. Pages link to the file, so that the link works on GitHub too."""


def relinked(text: str, file: str, page: str) -> str:
    """The Markdown of a file of the repository, with the links that it needs as a page of the site."""

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        if not target or ":" in target:
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(file), target))
        if not (ROOT / path).exists():  # code of a notebook can look like a link
            return match[0]
        there = OUTSIDE.get(path, path.removeprefix("docs/"))
        return f"]({os.path.relpath(there, os.path.dirname(page) or '.')}{'#' if anchor else ''}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def copy_outside_pages() -> None:
    """Copy the files of `OUTSIDE` to where the site has them, if they changed."""
    for file, page in OUTSIDE.items():
        if (ROOT / file).exists():
            text, copy = relinked((ROOT / file).read_text(), file, page), HERE / page
            if not copy.exists() or copy.read_text() != text:
                copy.write_text(text)


def relink_page(app: Any, page: str, source: list[str]) -> None:
    """Sphinx has read a page: turn its links to files outside docs/ into links within the site."""
    if f"{page}.md" not in OUTSIDE.values() and (HERE / f"{page}.md").exists():
        source[0] = relinked(source[0], f"docs/{page}.md", f"{page}.md")


# --- docstrings ---


def plain_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape the characters of docstrings that are mathematics to us and mark-up to Sphinx; not in code."""
    block: int | None = None  # the indentation of the line that a literal block follows
    doctest = False
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        doctest = line.lstrip().startswith(">>>") or (doctest and bool(line.strip()))
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is not None or doctest:
            continue
        begin = indent + 2 * line.lstrip().startswith("* ")  # behind the mark of a list
        parts = re.split(r"(``.*?``|`[^`]*`)", line[begin:])
        parts[::2] = [re.sub(r"(?<!\\)([*|]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        lines[i] = line[:begin] + "".join(parts)
        if line.rstrip().endswith("::"):
            block = indent


def setup(app: Any) -> None:
    """Register what this site adds to Sphinx."""
    shutil.rmtree(HERE / "reference" / "api", ignore_errors=True)  # pages of modules that are gone
    copy_outside_pages()
    app.connect("source-read", relink_page)
    app.connect("autodoc-process-docstring", plain_docstring)
