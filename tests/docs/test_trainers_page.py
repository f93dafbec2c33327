"""The Python code of docs/how-to/trainers.md works, on small models and with few steps."""

import re

import datasets
import lightning.pytorch as pl
import pytest
import torch
from conftest import REPO
from families import random_model
from transformers import AutoModelForCausalLM, TrainingArguments

import diffora
from diffora.core.lowrank import LowRankLinear
from diffora.hub import EMBEDDED

PAGE = (REPO / "docs" / "how-to" / "trainers.md").read_text()


def block(heading: str) -> str:
    """The Python code of a section."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the page takes as given."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 400, (16, 8), generator=generator).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": [0, 1] * 8})
    arguments = TrainingArguments(
        "run", max_steps=10, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    model = random_model("bert", "AutoModelForSequenceClassification", num_labels=2)
    batches = [{"input_ids": torch.tensor(ids[i : i + 4]), "labels": torch.tensor([0, 1, 0, 1])} for i in (0, 4, 8, 12)]
    return {"diffora": diffora, "model": model, "rows": rows, "arguments": arguments, "loader": batches, "epoch": 0}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def test_trainer(names, tmp_path):
    exec(block("transformers' Trainer"), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "penalty" not in names["trainer"].evaluate() and names["trainer"].state.global_step == 10


def test_shared_pairs(names, tmp_path):
    selection = diffora.select(names["model"], "random", names["loader"], k=2)
    exec(block("Shared pairs"), names | {"selection": selection, "Trainer": __import__("transformers").Trainer})
    model = names["model"]
    expected = logits(model)
    fresh = random_model("bert", "AutoModelForSequenceClassification", num_labels=2)
    diffora.load_adapter(fresh, tmp_path / "shared")
    assert torch.allclose(logits(fresh), expected, atol=1e-5)
    ties = [[layer.lora_a for layer in each.modules() if isinstance(layer, LowRankLinear)] for each in (model, fresh)]
    assert len(set(ties[0])) == len(set(ties[1])) < len(ties[0]) == len(ties[1])


def test_adalora(names):
    selection = diffora.select(names["model"], "random", names["loader"], k=2)
    exec(block("AdaLoRA"), names | {"selection": selection, "Trainer": __import__("transformers").Trainer})
    values = [p for name, p in names["model"].named_parameters() if "lora_E" in name]
    assert sum(int(p.count_nonzero()) for p in values) == 3 * len(values) == 3 * 4


def test_trl(names):
    pytest.importorskip("trl", reason="trl is not installed: pip install 'diffora[examples]'")
    names["model"] = AutoModelForCausalLM.from_pretrained(EMBEDDED.parent / "tiny_llama")
    texts = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "no"}] for i in range(8)]
    names["chats"] = datasets.Dataset.from_dict({"messages": texts})
    exec(block("TRL"), names)
    assert names["trainer"].state.global_step == 4 and names["trainer"].callback_handler.callbacks[-2]._penalty > 0


class Module(pl.LightningModule):
    """A user's own module."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def adapted(names):
    selection = diffora.select(names["model"], "random", names["loader"], k=2)
    return diffora.attach(names["model"], selection, rank=4, shared_rank=2)


def test_lightning(names):
    names["module"] = Module(adapted(names))
    names["loader"] = torch.utils.data.DataLoader(names["loader"], batch_size=None)
    exec(block("Lightning"), names)
    assert names["trainer"].global_step == 4 and names["trainer"].logged_metrics["penalty"] > 0


def test_a_loop_of_your_own(names):
    model = adapted(names)
    names["optimizer"] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = [layer.lora_a.detach().clone() for layer in model.modules() if isinstance(layer, LowRankLinear)]
    exec(block("A loop of your own"), names | {"lr": 1e-2})
    layers = [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]
    assert all(layer.rows is None and (layer.lora_a != old).any() for layer, old in zip(layers, before, strict=True))
