"""The scripts in examples/ run on tiny models and local files, train only what they should, and lower the loss."""

import ast
import json
import re
import runpy
import sys

import datasets
import pytest
import torch
from conftest import REPO

from diffora.core.lowrank import LowRankLinear
from diffora.hub import EMBEDDED

EXAMPLES = REPO / "examples"


def lines_of(name: str) -> int:
    """The lines of code in an example, without docstrings, comments, blank lines and the reading of its arguments."""
    text = (EXAMPLES / f"{name}.py").read_text()
    counted = set()
    for node in ast.parse(text).body:
        source = ast.get_source_segment(text, node) or ""
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) and not re.match(
            r"cli|given =|import argparse", source
        ):
            counted |= set(range(node.lineno, node.end_lineno + 1))
    lines = text.splitlines()
    return sum(bool(lines[i - 1].strip()) and not lines[i - 1].strip().startswith(("#", '"""')) for i in counted)


def run(monkeypatch, tmp_path, name, *arguments):
    """Run an example in this process, in an empty folder; returns its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments), "--output", str(tmp_path / "out")])
    torch.manual_seed(0)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def mrpc(tmp_path_factory):
    """A folder like that of MRPC: a pair is a paraphrase if both sentences are the same."""
    folder = tmp_path_factory.mktemp("mrpc")
    words = ["the cat sat", "a dog ran", "we went home", "it is late"]
    for part, n in (("train", 48), ("validation", 16)):
        rows = [(words[i % 4], words[(i + (i // 4) % 2) % 4]) for i in range(n)]
        columns = {"sentence1": [a for a, _ in rows], "sentence2": [b for _, b in rows]}
        columns |= {"label": [int(a == b) for a, b in rows], "idx": list(range(n))}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{part}.parquet")
    return folder


def trained_in(model, folder):
    """The names of the trainable weights, after a check that all others are those of the pretrained model."""
    now = {key.replace("base_layer.", "").replace(".base.", "."): value for key, value in model.state_dict().items()}
    heads = ("classifier.", "pooler.")  # the checkpoint has no weights for these
    old = {k: v for k, v in type(model).from_pretrained(folder).state_dict().items() if not k.startswith(heads)}
    assert len(old) > 30 and all(torch.equal(value, now[key]) for key, value in old.items())
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_trainer_on_mrpc(monkeypatch, tmp_path, mrpc):
    names = run(monkeypatch, tmp_path, "trainer_mrpc", "--model", EMBEDDED, "--data", mrpc, "--steps", 6)
    model, chosen = names["model"], names["selection"].names()
    assert len(chosen) == 3 * len(names["selection"].modules)
    trained = trained_in(model.base_model.model, EMBEDDED)
    adapted = {name.split(".lora_")[0] for name in trained if "lora_" in name}
    assert adapted == set(chosen) and all(re.search("lora_|classifier|pooler", name) for name in trained)
    scores = names["trainer"].evaluate(names["data"]["train"])
    with model.disable_adapter():
        assert names["trainer"].evaluate(names["data"]["train"])["eval_loss"] > scores["eval_loss"]
    assert 0 < scores["eval_accuracy"] <= 1
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == set(chosen)


def test_trl_sft(monkeypatch, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: pip install 'diffora[examples]'")
    texts = [f"what is {i} plus one?" for i in range(16)]
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "it is one more"}]}
        for text in texts
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    llama = EMBEDDED.parent / "tiny_llama"
    names = run(monkeypatch, tmp_path, "trl_sft", "--model", llama, "--data", tmp_path / "chats.jsonl", "--steps", 6)
    trainer, chosen = names["trainer"], names["selection"].names()
    model = trainer.model
    trained = trained_in(model.base_model.model, llama)
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained} == set(chosen)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        after = model.eval()(**batch).loss
        with model.disable_adapter():
            assert model(**batch).loss > after


def test_a_loop_with_accelerate(monkeypatch, tmp_path, mrpc):
    names = run(monkeypatch, tmp_path, "accelerate_loop", "--model", EMBEDDED, "--data", mrpc, "--epochs", 3)
    model, selection = names["model"], names["selection"]
    trained = trained_in(model, EMBEDDED)
    assert all("lora_" in name or name.startswith("classifier.") for name in trained)
    every = {name for row in selection.modules for name in row}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert set(layers) == every and {n for n, layer in layers.items() if layer.rank == 8} == set(selection.names())
    assert loss_of(model, names) < loss_of(loaded(model, tmp_path / "out", again=False), names)
    assert loss_of(loaded(model, tmp_path / "out"), names) == pytest.approx(loss_of(model, names), rel=1e-5)


def loss_of(model, names):
    """The mean loss of a model over an example's training rows."""
    loader, losses = names["loader"], []
    with torch.no_grad():
        for batch in sorted(loader, key=lambda batch: len(batch["labels"])):
            losses.append(model.eval()(**batch).loss.item() * len(batch["labels"]))
    return sum(losses) / len(names["rows"])


def loaded(model, folder, again=True):
    """The pretrained model with the saved adapter, or with its head only."""
    import diffora

    fresh = type(model).from_pretrained(EMBEDDED, num_labels=2)
    diffora.load_adapter(fresh, folder)
    if not again:
        for module in fresh.modules():
            if isinstance(module, LowRankLinear):
                module.lora_bt.data.zero_()
    return fresh


def test_plain_pytorch(monkeypatch, tmp_path, capsys):
    names = run(monkeypatch, tmp_path, "plain_pytorch", "--epochs", 2)
    net, selection = names["net"], names["selection"]
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, LowRankLinear)}
    assert {name for name, layer in layers.items() if layer.rank == 4} == set(selection.names())
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[1] < losses[0] < 2.2  # ln 10 = 2.3 at the start
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_page_says_how_many_lines_each_example_has():
    page = (REPO / "docs" / "how-to" / "trainers.md").read_text()
    claimed = dict(re.findall(r"^\| `examples/(\w+)\.py` \|.*\| (\d+) \|$", page, re.MULTILINE))
    assert {file.stem for file in EXAMPLES.glob("*.py")} == claimed.keys()
    assert {name: lines_of(name) for name in claimed} == {name: int(lines) for name, lines in claimed.items()}
