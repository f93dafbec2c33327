"""Export equals the model in memory, with adapters that are not zero."""

import pytest
import torch
from conftest import TYPES, batch_of
from small import small_task
from torch import nn

from diffora.core.grid import find_grid
from diffora.core.lowrank import attach, lowrank_layers
from diffora.errors import UserError
from diffora.export import Origin, load_adapter
from diffora.methods.lowrank import LowRankAdaptation

MASK = torch.tensor([[True, False, True, False, False, True], [False, False, True, True, False, True]])
RECORD = {"method": "diffora", "task": "mrpc", "seed": 0, "params": {"adapter": 1, "head": 1}, "metrics": {"a": 0.5}}


def inputs():
    return {key: value for key, value in batch_of(5).items() if key in ("input_ids", "attention_mask")}


@pytest.fixture
def trained(deberta, tmp_path):
    """A base model saved to disk, and the same model adapted with shared and own pairs, none of them zero."""
    model = deberta()
    model.save_pretrained(tmp_path / "base")
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, MASK, rank=3, shared_rank=2, alpha=8, dropout=0.1)
    for parameter in {p for _, layer in lowrank_layers(model) for p in (layer.lora_a, layer.lora_bt)}:
        nn.init.normal_(parameter, std=0.5)
    for parameter in (*model.classifier.parameters(), *model.pooler.parameters()):
        nn.init.normal_(parameter, std=0.5)
    origin = Origin(str(tmp_path / "base"), small_task(), RECORD, {}, {"num_labels": 2})
    LowRankAdaptation(model).export(tmp_path, origin)
    return model.eval(), tmp_path


def test_peft_loads_the_adapter_with_the_same_logits(trained):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model, folder = trained
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        plain = base.eval()(**inputs()).logits
        loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
        expected = model(**inputs()).logits
        assert (expected - plain).abs().max() > 0.5
        torch.testing.assert_close(loaded(**inputs()).logits, expected, rtol=1e-4, atol=1e-4)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs()).logits, expected, rtol=1e-4, atol=1e-4)


def test_peft_sees_every_module_with_its_own_rank_and_scaling(trained):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model, folder = trained
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, folder / "adapter").base_model.model
    for name, layer in lowrank_layers(model):
        theirs = loaded.get_submodule(name)
        assert theirs.r["default"] == layer.rank and theirs.scaling["default"] == layer.scaling
    adapted = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert sorted(adapted) == sorted(name for name, _ in lowrank_layers(model))


def test_our_loader_restores_the_logits_and_the_sharing(trained, deberta):
    model, folder = trained
    fresh = deberta()
    load_adapter(fresh, folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(**inputs()).logits, model(**inputs()).logits, rtol=1e-5, atol=1e-5)
    layers = dict(lowrank_layers(model))
    tied = {frozenset(a for a in layers if layers[a].lora_a is layers[b].lora_a) for b in layers}
    again = dict(lowrank_layers(fresh))
    assert {frozenset(a for a in again if again[a].lora_a is again[b].lora_a) for b in again} == tied
    assert sorted(len(group) for group in tied) == [1] * 8 + [2] * 2
    (peers,) = {layer.peers for layer in again.values()}
    assert peers is not None  # computed together, as those that were saved


def test_an_adapter_of_another_model_is_refused(trained, deberta):
    _, folder = trained
    with pytest.raises(UserError, match=r"does not fit this model, which has no deberta\.encoder\.layer\.1"):
        load_adapter(deberta(layers=1), folder / "adapter")


def test_a_folder_without_an_adapter_is_refused(tmp_path, deberta):
    with pytest.raises(UserError, match="is not an adapter"):
        load_adapter(deberta(), tmp_path)


def test_the_card_says_how_to_load_it(trained):
    _, folder = trained
    card = (folder / "adapter" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card and "num_labels=2" in card


def test_gates_are_folded_in_and_pruned_directions_left_out(deberta, tmp_path):
    from peft import PeftModel

    model, base = deberta(), deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), rank=3, shared_rank=None, alpha=8)
    for i, (_, layer) in enumerate(lowrank_layers(model)):
        nn.init.normal_(layer.lora_bt, std=0.5)
        layer.gate = nn.Parameter(torch.tensor([0.0, 1.5, -0.5]) if i else torch.zeros(3))
    origin = Origin("base", small_task(), RECORD, {}, {"num_labels": 2})
    LowRankAdaptation(model).export(tmp_path, origin)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ranks = [m.r["default"] for _, m in loaded.named_modules() if hasattr(m, "lora_A")]
    assert ranks == [2] * 11  # one module has no direction left
    again = deberta()
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(**inputs()).logits
        for other in (loaded, again.eval()):
            torch.testing.assert_close(other(**inputs()).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_with_every_gate_closed_still_loads(deberta, tmp_path):
    from peft import PeftModel

    model, base = deberta(), deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), rank=2, shared_rank=None, alpha=8)
    for _, layer in lowrank_layers(model):
        layer.gate = nn.Parameter(torch.zeros(2))
    LowRankAdaptation(model).export(tmp_path, Origin("base", small_task(), RECORD, {}, {"num_labels": 2}))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs()).logits, model.eval()(**inputs()).logits)
