"""docs/reference/configuration.md is the page that the script makes from the settings classes and conf/."""

import dataclasses
import sys
import typing
from typing import Annotated

import pytest
from conftest import REPO

from diffora.settings.checks import Help, whole
from diffora.settings.read import section_of
from diffora.settings.sections import Settings

sys.path.insert(0, str(REPO / "scripts"))
import reference


@pytest.fixture(scope="module")
def page():
    return reference.page()


def test_the_page_is_up_to_date(page):
    assert reference.PAGE.read_text(encoding="utf-8") == page, "python scripts/reference.py"


def test_the_page_has_every_section_and_every_choice(page):
    hints = typing.get_type_hints(Settings, include_extras=True)
    for field in dataclasses.fields(Settings):
        if section_of(hints[field.name]) is not None:
            assert f"## `{field.name}`" in page
    for group in reference.CHOICES:
        for file in (REPO / "conf" / group).glob("*.yaml"):
            assert f"| `{file.stem}` | " in page and f"| `{file.stem}` |  |\n" not in page, file


@dataclasses.dataclass(frozen=True)
class Own:
    steps: Annotated[int, whole(1), Help("How many.", "steps")] = 3


def test_a_row_has_bounds_default_unit_and_meaning():
    row = reference.table(Own, "method.", {}).splitlines()[-1]
    assert row == "| `method.steps` | a whole number of at least 1, at most 1,000,000,000 | `3` | steps | How many. |"
    written = {"method.steps": {"": "${task.recipe.epochs}", "mine": 5}}
    row = reference.table(Own, "method.", written).splitlines()[-1]
    assert "| from the recipe (`task.recipe.epochs`); `5` (mine) |" in row


def test_a_setting_without_help_is_refused():
    bare = dataclasses.make_dataclass("Bare", [("steps", int)])
    with pytest.raises(ValueError, match=r"method\.steps has no help text"):
        reference.table(bare, "method.", {})
