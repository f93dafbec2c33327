"""Pages of the documentation that code, configurations and other pages mention exist."""

import re

from conftest import REPO

FOLDERS = ("benchmarks", "conf", "docs", "notebooks", "scripts", "src", "tests")
KINDS = (".py", ".yaml", ".toml", ".md", ".ipynb", ".jinja")


def test_mentioned_pages_exist():
    files = [file for folder in FOLDERS for file in (REPO / folder).rglob("*")]
    files = [file for file in files if "_build" not in file.parts and file.suffix in KINDS]
    files += [file for file in REPO.iterdir() if file.is_file() and (file.suffix in KINDS or file.name == "Makefile")]
    lost = {
        f"{file.relative_to(REPO)}: {page}"
        for file in files
        for page in re.findall(r"(?<![\w/])docs/[\w/-]+\.(?:md|json|png|yaml)", file.read_text())
        if not (REPO / page).exists()
    }
    assert len(files) > 300
    assert not lost, "\n".join(sorted(lost))
