"""docs/project/reliability.md: every test that its table of cases names exists."""

import re

import pytest
from conftest import REPO

NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", (REPO / "docs" / "project" / "reliability.md").read_text())))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_the_page_names_exists(file, name):
    assert f"\ndef {name}(" in (REPO / "tests" / file).read_text()


def test_the_page_has_every_case():
    page = (REPO / "docs" / "project" / "reliability.md").read_text()
    for case in [*(f"A{i}" for i in range(1, 8)), *(f"B{i}" for i in range(1, 20))]:
        assert page.count(f"\n| {case} |") == 1, case
