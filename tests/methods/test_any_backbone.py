"""Every method on backbones unlike BERT: GPT-2, whose weights are transposed, and Llama, which has no biases."""

import pytest
import torch
from conftest import batch_of, logits
from hydra.utils import get_class
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from diffora.adapters.origin import Origin
from diffora.api import load_adapter
from diffora.backbones.backbone import Backbone
from diffora.core.draws import random_scores
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.places import conf_dir
from diffora.settings.identity import plain
from diffora.tasks.base import get_task

METHODS = sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml"))
REFUSED = {("ia3", "gpt2"): "its key: say so with", ("bitfit", "llama"): "trains biases, and this backbone has none"}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    common = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 2}
    if name == "gpt2":
        model: nn.Module = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, **common))
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_key_value_heads=1, **common))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    return Backbone.of(model).freeze().model


@pytest.mark.parametrize("backbone", ["gpt2", "llama"])
@pytest.mark.parametrize("name", METHODS)
def test_trains_and_is_loaded_again(name, backbone, cfg, tmp_path):
    from peft import PeftModel

    composed = cfg(f"method={name}", "task=mrpc", "model=hf", "model.path=some/model")
    method = get_class(composed.method._target_).from_config(composed)
    model, untouched = small(backbone), small(backbone)
    grid = find_grid(model)
    if (name, backbone) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name, backbone]):
            method.check(model, grid)
        return
    method.check(model, grid)

    scores = random_scores(grid.n_layers, grid.n_types, 0) if method.scoring else None
    selection = method.choose(grid, scores, 0)
    torch.manual_seed(0)
    adaptation = method.adapt(model, grid, selection, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    adapted = Backbone.of(model, arguments=get_task(composed.task).head())
    assert {n.split(".")[0] for n in before} >= set(adapted.head) == {"score"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    inputs = [{k: v for k, v in batch_of(6, seed=i).items() if k in ("input_ids", "attention_mask")} for i in range(4)]
    adaptation.prepare(inputs)
    adaptation.begin(4)
    model.train()
    for step, batch in enumerate(inputs):
        adaptation.before_step(step, 0)
        loss = nn.functional.cross_entropy(model(**batch).logits, batch_of(6, seed=step)["labels"])
        penalty = adaptation.penalty()
        (loss if penalty is None else loss + penalty).backward()
        adaptation.after_backward()
        optimizer.step()
        adaptation.after_step(step, 0.02)
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if n in before and not p.equal(before[n])}
    assert len(moved) > (len(before) - 1 if name == "head_only" else 0.5 * len(before))

    task = get_task(composed.task)
    record = {"method": name, "task": "mrpc", "seed": 0, "metrics": {}, "params": adapted.count_parameters()}
    record["selection"] = None if selection is None else {"file": "selection.json"}
    if selection is not None:
        selection.save(tmp_path / "selection.json")
    adaptation.export(tmp_path, Origin("some/model", task, record, plain(composed), adapted))
    if name == "full_ft":
        again = type(model).from_pretrained(tmp_path / "model")
        torch.testing.assert_close(logits(again), logits(model))
        return
    load_adapter(untouched, tmp_path / "adapter")
    torch.testing.assert_close(logits(untouched), logits(model), rtol=1e-4, atol=1e-5)
    if (tmp_path / "adapter" / "adapter_config.json").is_file():
        theirs = PeftModel.from_pretrained(small(backbone), str(tmp_path / "adapter"))
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    if layers := [layer for _, layer in lowrank_layers(model)]:
        expected = logits(model)
        for layer in layers:
            layer.merge()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
