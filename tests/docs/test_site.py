"""docs/conf.py: what it changes in pages and docstrings. `make docs` builds the whole site, with warnings as errors."""

import importlib.util

import pytest
from conftest import REPO

DOCS = REPO / "docs"


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "file", "page", "expected"),
    [
        # a page links to a file of the repository, the site to its copy
        ("[s](../SECURITY.md)", "docs/architecture.md", "architecture.md", "[s](project/security.md)"),
        ("[s](../../SECURITY.md#a)", "docs/start/install.md", "start/install.md", "[s](../project/security.md#a)"),
        # a copy links to pages from its place in the site
        ("[d](docs/equations.md)", "CHANGELOG.md", "project/changelog.md", "[d](../equations.md)"),
        ("[d](../docs/equations.md)", "notebooks/03_theory.ipynb", "tutorials/03_theory.ipynb", "[d](../equations.md)"),
        # all others stay as they are
        ("![p](images/dam.png)", "docs/index.md", "index.md", "![p](images/dam.png)"),
        ("[a](#part) [b](https://a.b/c)", "docs/index.md", "index.md", "[a](#part) [b](https://a.b/c)"),
        ("chosen[-1](weight)", "notebooks/03_theory.ipynb", "tutorials/03_theory.ipynb", "chosen[-1](weight)"),
    ],
)
def test_links_to_files_become_links_within_the_site(conf, text, file, page, expected):
    assert conf.relinked(text, file, page) == expected


def test_pages_that_the_site_copies_are_not_committed(conf):
    ignored = (REPO / ".gitignore").read_text().split()
    for page in conf.OUTSIDE.values():
        assert f"docs/{page}" in ignored or f"docs/{page.rpartition('/')[0]}/*.ipynb" in ignored, page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a * b and |x|", r"a \* b and \|x\|"),
        ("code ``a * b`` and `c|d`", "code ``a * b`` and `c|d`"),
        ("* an item * 2", r"* an item \* 2"),
        ("as in::\n\n    a * b\n\nc * d", "as in::\n\n    a * b\n\nc \\* d"),
        (">>> a * b\n'*'\n\nc * d", ">>> a * b\n'*'\n\nc \\* d"),
    ],
)
def test_mathematics_in_docstrings_is_not_markup(conf, text, expected):
    lines = text.split("\n")
    conf.plain_docstring(None, "function", "f", None, None, lines)
    assert "\n".join(lines) == expected
