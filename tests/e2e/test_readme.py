"""Every command and snippet of the README and of the configurations' heads is executed or at least composed."""

import importlib.util
import re
import shlex

import pytest
import torch
from conftest import REPO
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from diffora.core.lowrank import lowrank_layers
from diffora.run.check import check

README = (REPO / "README.md").read_text()
DOCS = [page for page in sorted((REPO / "docs").rglob("*.md")) if "_build" not in page.parts]
PAGES = [REPO / "README.md", *DOCS, *sorted((REPO / "conf").rglob("*.yaml"))]
COMMANDS = sorted(
    {
        re.split(r"\s{2,}|\s#|`", match[1])[0].strip()
        for page in PAGES
        for match in re.finditer(r"python train\.py (?!-sc)(.*)", page.read_text())
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_compose(cfg, line, tmp_path, monkeypatch):
    """Paths in the commands are examples, so they are replaced by folders that exist."""
    if "hparams_search=" in line and importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        pytest.skip("needs the extra optuna")
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    for split in ("train", "validation"):
        (tmp_path / split / "a").mkdir(parents=True)
    find_spec = importlib.util.find_spec  # optional packages count as installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes" or find_spec(name))
    words = [w for w in shlex.split(line.rstrip("\\")) if ("=" in w or w.startswith("~")) and "…" not in w]
    # ++ changes only those runs of a sweep that have the key (tests/run/test_sweep.py). The launchers may be missing.
    words = [
        w for w in words if not w.startswith(("--", "hydra.", "++", "hydra/launcher=submitit", "hydra/launcher=ray"))
    ]
    words = [w for w in words if not w.startswith("method.selection=")]
    words = [re.sub(r"^((?:task|model)\.path)=.*", rf"\1={tmp_path}", w) for w in words]
    if any(w.startswith("scale=") for w in words):
        words.append("cell.experiment=x")  # as a sweep gives it to its runs
    parser = OverridesParser.create()
    choices = [
        [f"{o.key_or_group}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line]
        for o in parser.parse_overrides(words)
    ]
    # Each value once, because all combinations take minutes. tests/settings/test_recipes.py tests all tasks.
    counts = [len(values) for values in choices if not values[0].startswith(("task=", "seed="))]
    for i in range(max(counts, default=1)):
        composed = cfg(*(values[i % len(values)] for values in choices))
        assert isinstance(composed, DictConfig)
        check(composed)


def test_there_are_commands():
    assert len(COMMANDS) > 10


@pytest.fixture
def small(monkeypatch):
    """A small model of the same architecture replaces the one from the hub."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **shape))
    assert all(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda path, num_labels: model)
    return model


def check_only_adapters_and_head_train(model):
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"classifier.weight", "classifier.bias"}
    assert len(trained) == 2 + 2 * len({layer.lora_a for _, layer in lowrank_layers(model)})
    model(torch.tensor([[1, 2]]), labels=torch.tensor([1])).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_library_snippet_runs_as_printed_and_freezes_the_backbone(small):
    """B16."""
    batches = [{"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 1])}] * 4
    names: dict = {"loader": batches}
    exec(re.search(r"```python\n(import diffora\n.*?)```", README, re.DOTALL)[1], names)
    assert [len(row) for row in names["selection"].selected] == [3, 3]
    assert names["selection"].config["trained"] == ["classifier.weight", "classifier.bias"]
    check_only_adapters_and_head_train(small)


def test_the_snippet_of_the_mathematics_runs_as_printed(small):
    page = (REPO / "docs" / "start" / "library.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(import torch\nfrom diffora.*?)```", page, re.DOTALL)[1], names)
    assert names["selected"].sum(-1).tolist() == [1, 1]
    check_only_adapters_and_head_train(small)


def test_pages_that_are_linked_exist():
    """Links in files that are not pages of the site. Sphinx checks the links of the site."""
    for page in sorted(REPO.glob("*.md")):
        for link in re.findall(r"\]\(((?!http)[^)#\s]+)[)#]", page.read_text()):
            assert (REPO / link).exists(), (page.name, link)


def test_make_targets_of_the_readme_exist():
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_counts_methods_and_tasks():
    [(methods, tasks)] = re.findall(r"(\d+) methods, (\d+) tasks", README)
    counted = [len(list((REPO / "conf" / group).glob("*.yaml"))) for group in ("method", "task")]
    assert [int(methods), int(tasks)] == counted


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130
