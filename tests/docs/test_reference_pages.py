"""The pages of files, terms and troubles say what the program does."""

import re

from conftest import REPO

DOCS = REPO / "docs"
FILES = (DOCS / "reference" / "run-files.md").read_text()
SOURCE = "\n".join(path.read_text() for path in sorted((REPO / "src" / "diffora").rglob("*.py")))


def first_column(page: str) -> list[str]:
    """The code in the first column of all tables of a page."""
    rows = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row)]


def test_every_file_of_a_run_is_on_the_page(finished):
    written = [path.name for path in finished.iterdir()] + [path.name for path in (finished / "adapter").iterdir()]
    named = {name.rstrip("/") for name in first_column(FILES)}
    assert len(written) > 12 and not set(written) - named


def test_every_file_on_the_page_is_one_that_the_program_writes():
    names = [name.rstrip("/") for name in first_column(FILES) if "." in name and "<" not in name]
    assert len(names) > 15
    for name in names:
        assert f'"{name}"' in SOURCE or name == "README.md", name


def test_every_message_on_the_page_of_troubles_is_one_that_the_program_prints():
    said = re.sub(r'"\s+f?"', "", SOURCE)  # texts that go on in the next line
    page = (DOCS / "how-to" / "troubleshooting.md").read_text()
    messages = [code for code in first_column(page) if " " in code]
    assert len(messages) > 8
    for message in messages:
        assert message in said.replace("{what}", "loss"), message
