"""The Python code of docs/start/library.md and docs/how-to/adapters.md works. Its run is shortened for the test."""

import re

import hydra
import pytest
import torch
from conftest import REPO
from matplotlib import pyplot
from transformers import AutoModelForSequenceClassification

from diffora.core.lowrank import lowrank_layers
from diffora.core.selection import Selection
from diffora.hub import EMBEDDED

LIBRARY = (REPO / "docs" / "start" / "library.md").read_text()
ADAPTERS = (REPO / "docs" / "how-to" / "adapters.md").read_text()


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_first_block_of_the_page_is_the_readmes():
    """tests/e2e/test_readme.py runs it."""
    assert blocks(LIBRARY)[0] in (REPO / "README.md").read_text()


def test_a_plain_model_gets_its_adapters():
    [block] = [block for block in blocks(LIBRARY) if "nn.Module" in block]
    given: dict = {}
    exec(block, given)
    model, chosen = given["model"], given["selection"].names()
    layers = dict(lowrank_layers(model))
    assert len(layers) == 6 and len(chosen) == 3
    assert {name for name, layer in layers.items() if layer.rank == 4} == set(chosen)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    pairs = len({layer.lora_a for layer in layers.values()})  # a shared pair has one name
    assert sum("lora_a" in name for name in trained) == sum("lora_bt" in name for name in trained) == pairs
    assert {name for name in trained if "lora_" not in name} == {"head.weight", "head.bias"}
    assert model(torch.randn(5, 16)).shape == (5, 2)


def test_the_result_of_a_search_is_printed_drawn_and_saved(tmp_path, monkeypatch, capsys):
    [block] = [block for block in blocks(LIBRARY) if "selection.plot()" in block]
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend("agg")
    selection = Selection("m", ["q", "v"], [["0.q", "0.v"]], [["q"]], 0.5, 0, selector="search", gamma_bar=[[0.7, 0.3]])
    exec(block, {"selection": selection})
    pyplot.close("all")
    assert capsys.readouterr().out == "1 of 2 modules, selected by search\nlayer 1: q\n"
    assert (tmp_path / "dam.png").read_bytes().startswith(b"\x89PNG")
    assert Selection.load("selection.json") == selection


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names that the block about a whole run defines, such as ``result``."""
    [block] = [block for block in blocks(LIBRARY) if "run(cfg" in block]
    folder = tmp_path_factory.mktemp("library")
    short = ["task.train_rows=64", "task.validation_rows=32", "search.epochs=1", "finetune.epochs=1"]
    patch = pytest.MonkeyPatch()
    compose = hydra.compose
    patch.setattr(hydra, "compose", lambda name, given: compose(name, [*given, *short, "finetune.warmup_steps=0"]))
    patch.chdir(folder)
    torch.set_num_threads(1)
    found: dict = {}
    exec(block, found)
    yield found
    patch.undo()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 7, 2]])).logits


def test_a_whole_run_and_its_adapter(names):
    """The three ways to load an adapter that the pages show give the outputs of the run."""
    result = names["result"]
    assert result.record["status"] == "completed" and result.selection is not None
    expected = logits(result.model.eval())

    def fresh():
        return AutoModelForSequenceClassification.from_pretrained(EMBEDDED, num_labels=2, dtype="float32").eval()

    place = str(result.folder / "adapter")
    [load] = [block for block in blocks(LIBRARY) if "load_adapter" in block]
    given = {"model": fresh()}
    exec(load.replace("outputs/…/adapter", place), given)
    assert torch.allclose(logits(given["model"]), expected, atol=1e-5)

    peft, ours, tie, _ = blocks(ADAPTERS)
    given = {"base": fresh()}
    exec(ours.replace("outputs/…/adapter", place), given)
    assert torch.allclose(logits(given["base"]), expected, atol=1e-5)

    peft = peft.replace("microsoft/deberta-v3-base", str(EMBEDDED)).replace("outputs/…/adapter", place)
    given = {}
    exec(peft, given)
    assert torch.allclose(logits(given["model"]), expected, atol=1e-5)
    separate = len({id(p) for p in given["model"].parameters()})
    exec(tie.replace("outputs/…/adapter", place), given)
    assert len({id(p) for p in given["model"].parameters()}) < separate  # shared pairs are tied again
    assert torch.allclose(logits(given["model"]), expected, atol=1e-5)
