"""The reference pages name every choice of the configuration."""

import pytest
from conftest import REPO

PAGES = {
    "method": ("commands", "methods"),
    "task": ("commands", "tasks"),
    "model": ("commands",),
    "trainer": ("commands",),
    "logger": ("commands",),
    "debug": ("commands",),
}


@pytest.mark.parametrize(("group", "page"), [(group, page) for group, pages in PAGES.items() for page in pages])
def test_a_page_names_every_choice(group, page):
    text = (REPO / "docs" / "reference" / f"{page}.md").read_text()
    names = sorted(file.stem for file in (REPO / "conf" / group).glob("*.yaml"))
    assert names and [name for name in names if f"`{name}`" not in text] == []


def test_every_how_to_page_is_in_the_contents():
    contents = (REPO / "docs" / "index.md").read_text()
    pages = sorted((REPO / "docs").glob("how-to/*.md")) + sorted((REPO / "docs").glob("start/*.md"))
    assert pages and [page.stem for page in pages if f"{page.parent.name}/{page.stem}\n" not in contents] == []
