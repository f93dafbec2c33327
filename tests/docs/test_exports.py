"""The commands of docs/how-to/adapters.md and serving.md that export and publish a run are understood."""

import re
import shlex

import pytest
from conftest import REPO

from diffora.run import export, push

PAGES = [(REPO / "docs" / "how-to" / f"{name}.md").read_text() for name in ("adapters", "serving")]
LINES = sorted({line.strip(" `") for page in PAGES for line in re.findall(r"diffora (?:export|push) [^`\n]+", page)})


def test_the_pages_have_both_commands():
    assert {line.split()[1] for line in LINES} == {"export", "push"} and len(LINES) >= 3


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_understood(line, finished, tmp_path):
    words = shlex.split(line.replace("outputs/…", str(finished)).replace("<run>", str(finished)))
    words = [word.replace("to=", f"to={tmp_path}/") for word in words]
    read = {"export": export.read_request, "push": push.read_request}[words[1]]
    request = read(words[2:])
    assert (request.run if words[1] == "export" else request.export.run) == finished
    assert words[1] == "export" or (request.name, request.private) == ("owner/name", True)


def test_every_form_is_on_the_page():
    assert all(f"`{form}`" in PAGES[0] for form in export.FORMS)
