"""B17: modules that share a pair still share it after saving, loading, copying and further training."""

import copy
import io
import json
import pickle

import pytest
import torch
from conftest import TYPES, batch_of, logits
from small import small_deberta, small_task
from torch import nn
from torch.utils.data import Dataset

from diffora.adapters.origin import Origin
from diffora.adapters.pairs import retie
from diffora.api import load_adapter
from diffora.backbones.backbone import Backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.methods.lowrank import LowRankAdaptation

MASK = torch.tensor([[True, False, True, False, False, True], [False, False, True, True, False, True]])
RECORD = {"method": "diffora", "task": "mrpc", "seed": 0, "params": {"adapter": 1, "head": 1}, "metrics": {"a": 0.5}}
TIED = [[f"deberta.encoder.layer.{i}.{name}" for i in (0, 1)] for name in (TYPES[1], TYPES[4])]


def origin_of(model: nn.Module) -> Origin:
    return Origin("org/base", small_task(), RECORD, {}, Backbone.of(model, arguments={"num_labels": 2}))


def adapted(seed: int = 0) -> nn.Module:
    """A classifier with shared and own pairs, none of them zero, and its head trained."""
    model = small_deberta()
    torch.manual_seed(seed)
    attach(model, find_grid(model, "encoder.layer.*", TYPES).names, MASK, rank=3, shared_rank=2, alpha=8)
    model.classifier.requires_grad_(True)
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt, std=0.3)
    return model


def assert_tied(model: nn.Module) -> None:
    layers = dict(lowrank_layers(model))
    for first, second in TIED:
        assert layers[first].lora_a is layers[second].lora_a and layers[first].lora_bt is layers[second].lora_bt
    assert len({layer.lora_a for layer in layers.values()}) == len(layers) - len(TIED)


def train(model: nn.Module, steps: int = 2) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.05)
    for seed in range(steps):
        batch = {key: value for key, value in batch_of(6, seed=seed).items() if key != "row"}
        model.train()(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = adapted(seed=1)
    again.load_state_dict(torch.load(file))
    return again


@pytest.mark.parametrize(
    "through",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        saved_and_loaded,
        lambda model: copy.deepcopy(model).to(torch.float64).to(torch.float32),
    ],
    ids=["deepcopy", "pickle", "state_dict", "to"],
)
def test_copies_are_tied_and_remain_tied_in_training(through):
    model = adapted()
    again = through(model)
    assert torch.equal(logits(again), logits(model))
    assert_tied(again)
    train(again)
    assert_tied(again)
    assert (logits(again) - logits(model)).abs().max() > 0.01


class Rows(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[i] for key, value in batch_of(8).items() if key != "row"}


def trainer(model: nn.Module, folder, steps: int):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=4, learning_rate=0.01, use_cpu=True,
        report_to=[], disable_tqdm=True, lr_scheduler_type="constant", seed=0,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows())


def test_the_trainer_of_transformers_saves_and_resumes(tmp_path):
    """B17: ``save_pretrained`` failed with an error about shared tensors."""
    whole = adapted()
    trainer(whole, tmp_path / "whole", 2).train()
    stopped = adapted()
    trainer(stopped, tmp_path / "stopped", 1).train()
    again = adapted(seed=1)
    trainer(again, tmp_path / "stopped", 2).train(resume_from_checkpoint=True)
    assert_tied(again)
    torch.testing.assert_close(logits(again), logits(whole))
    assert (logits(again) - logits(adapted())).abs().max() > 0.01


def test_save_pretrained_writes_the_whole_state(tmp_path):
    from safetensors.torch import load_file

    model, again = adapted(), adapted(seed=1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing, strange = again.load_state_dict(tensors, strict=False)
    assert not strange and len(missing) == 2 * len(TIED)  # the second names of shared matrices
    assert torch.equal(logits(again), logits(model))


def test_an_adapted_output_that_is_the_embedding_too_is_saved(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)).eval()
    ids = torch.arange(6).reshape(1, 6)
    embedded = model.transformer.wte(ids).clone()
    attach(model, [["lm_head"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4)
    nn.init.normal_(model.lm_head.lora_bt)
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    model.lm_head.merge()
    torch.testing.assert_close(model(ids).logits, expected)
    assert torch.equal(model.transformer.wte(ids), embedded)  # merged into the output, not into the embedding


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model, the folder of its backbone, and that of its adapter."""
    folder = tmp_path_factory.mktemp("tied")
    small_deberta().save_pretrained(folder / "base")
    model = adapted()
    origin = origin_of(model)
    LowRankAdaptation(model).export(folder, origin)
    return model, folder / "base", folder / "adapter"


def with_peft(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    return PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32), adapter, is_trainable=True
    )


def untied(model: nn.Module) -> list[tuple[str, str]]:
    """The entries of `TIED` whose two modules have different A or B in PEFT's model."""
    modules = dict(model.base_model.model.named_modules())
    weights = lambda name: [getattr(modules[name], m)["default"].weight for m in ("lora_A", "lora_B")]  # noqa: E731
    return [(a, b) for a, b in TIED if not all(map(torch.equal, weights(a), weights(b)))]


def test_our_loader_ties_and_training_keeps_the_tie(exported):
    model, _, adapter = exported
    again = small_deberta()
    load_adapter(again, adapter)
    assert_tied(again)
    train(again)
    assert_tied(again)
    assert (logits(again) - logits(model)).abs().max() > 0.01


def test_plain_peft_unties_and_retie_ties_again(exported, tmp_path):
    model, base, adapter = exported
    plain, tied = with_peft(base, adapter), with_peft(base, adapter)
    retie(tied, adapter)
    torch.testing.assert_close(logits(tied), logits(model), rtol=1e-4, atol=1e-5)
    train(plain)
    train(tied)
    assert len(untied(plain)) == len(TIED) and untied(tied) == []
    tied.save_pretrained(tmp_path)
    again = with_peft(base, tmp_path)
    assert torch.equal(logits(again), logits(tied)) and untied(again) == []
    with pytest.raises(UserError, match=r"lora_A of .* differ already: load .* again"):
        retie(plain, adapter)
    retie(with_peft(base, adapter), adapter)  # and nothing is left of the refusal


def test_the_trainer_keeps_the_ties_that_retie_made(exported, tmp_path):
    _, base, adapter = exported
    model = with_peft(base, adapter)
    retie(model, adapter)
    trainer(model, tmp_path, 1).train()
    again = with_peft(base, adapter)
    retie(again, adapter)
    trainer(again, tmp_path, 2).train(resume_from_checkpoint=True)
    assert untied(again) == [] and (logits(again) - logits(model)).abs().max() > 1e-3


def test_retie_names_what_is_missing(exported, tmp_path):
    model, _, adapter = exported
    with pytest.raises(UserError, match=r"not a PeftModel with the adapter default at deberta\.encoder\.layer\.0\."):
        retie(small_deberta(), adapter)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no manifest\.json, which says which modules share"):
        retie(model, tmp_path)


def test_the_card_says_that_plain_peft_unties(exported):
    _, base, adapter = exported
    text = (adapter / "README.md").read_text()
    assert "4 modules share 2 pairs" in text and "drift apart when training goes on" in text
    first, second = (block.partition("```")[0] for block in text.split("```python\n")[1:])
    code = first.partition("model = ")[0] + second
    names: dict = {}
    exec(code.replace("path/to/this/folder", str(adapter)).replace("org/base", str(base)), names)
    assert untied(names["model"]) == []


def test_the_card_mentions_sharing_only_if_there_is_sharing(tmp_path):
    model = small_deberta()
    attach(model, find_grid(model, "encoder.layer.*", TYPES).names, MASK, rank=3, shared_rank=None, alpha=8)
    LowRankAdaptation(model).export(tmp_path, origin_of(model))
    assert "share" not in (tmp_path / "adapter" / "README.md").read_text()
    assert json.loads((tmp_path / "adapter" / "manifest.json").read_text())["shared"] == []
