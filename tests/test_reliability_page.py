"""docs/project/reliability.md: every test that its table of cases names exists."""

import re

import pytest
from conftest import REPO

NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", (REPO / "docs" / "project" / "reliability.md").read_text())))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_the_page_names_exists(file, name):
    if (REPO / "tests" / file).is_file() and f"\ndef {name}(" in (REPO / "tests" / file).read_text():
        return
    files = sorted((REPO / "tests").rglob("test_*.py"))
    elsewhere = [str(path.relative_to(REPO / "tests")) for path in files if f"\ndef {name}(" in path.read_text()]
    pytest.fail(
        f"{file} has no {name}; " + (f"it is in {', '.join(elsewhere)}" if elsewhere else "nor has another file")
    )


def test_the_page_has_every_case():
    page = (REPO / "docs" / "project" / "reliability.md").read_text()
    for case in [*(f"A{i}" for i in range(1, 8)), *(f"B{i}" for i in range(1, 20))]:
        assert page.count(f"\n| {case} |") == 1, case
