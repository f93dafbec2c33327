"""Every command and snippet of the README and of the configurations' heads is executed or at least composed."""

import re
import shlex

import pytest
import torch
from conftest import REPO
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from diffora.experiment import check

README = (REPO / "README.md").read_text()
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "conf").rglob("*.yaml"))]
COMMANDS = sorted(
    {
        re.split(r"\s{2,}|\s#|`", match[1])[0].strip()
        for page in PAGES
        for match in re.finditer(r"python train\.py (.*)", page.read_text())
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_compose(cfg, line, tmp_path, monkeypatch):
    """Paths stand for the reader's own: replaced by folders that are there."""
    (tmp_path / "config.json").write_text("{}")
    words = [w for w in shlex.split(line.rstrip("\\")) if ("=" in w or w.startswith("~")) and "…" not in w]
    words = [w for w in words if not w.startswith(("--", "hydra."))]
    words = [w for w in words if not w.startswith(("method.selection=", "task.path=", "model.path="))]
    parser = OverridesParser.create()
    jobs: list[list[str]] = [[]]
    for override in parser.parse_overrides(words):
        if override.is_sweep_override():
            jobs = [[*job, f"{override.key_or_group}={v}"] for job in jobs for v in override.sweep_string_iterator()]
        else:
            jobs = [[*job, override.input_line] for job in jobs]
    for job in jobs:
        composed = cfg(*job)
        assert isinstance(composed, DictConfig)
        check(composed)


def test_there_are_commands():
    assert len(COMMANDS) > 10


def test_library_snippet_runs(deberta):
    snippet = re.search(r"```python\n(import torch\nfrom diffora.*?)```", README, re.DOTALL)[1]
    snippet = snippet.replace("attention.self.query", "attention.self.query_proj").replace(
        "attention.self.value", "attention.self.value_proj"
    )
    names = {"model": deberta()}
    exec(snippet, names)
    assert names["selected"].sum(-1).tolist() == [1, 1]
    assert torch.is_tensor(names["selected"]) and any("lora_a" in n for n, _ in names["model"].named_parameters())


def test_pages_that_are_linked_exist():
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (REPO / link).exists(), link


def test_make_targets_of_the_readme_exist():
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
