"""``method.adapter``: a fine-tuning goes on from an adapter, with its modules, ranks, scales, ties and head."""

import json
import shutil

import pytest
import torch
from conftest import TYPES, logits
from finished_run import run_of
from small import small_deberta
from torch import nn

from diffora.adapters.export import save_adapter
from diffora.adapters.fetch import adapter_digest
from diffora.adapters.start import Start
from diffora.backbones.backbone import Backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.run import evaluate
from diffora.run.trained import check_backbone

MASK = torch.tensor([[True, False, True, False, False, True], [False, False, True, True, False, True]])


@pytest.fixture
def saved(tmp_path):
    """A classifier with shared and own pairs and a trained head, and its adapter."""
    model = small_deberta()
    attach(model, find_grid(model, "encoder.layer.*", TYPES).names, MASK, rank=3, shared_rank=2, alpha=5)
    for parameter in dict.fromkeys(p for _, layer in lowrank_layers(model) for p in (layer.lora_a, layer.lora_bt)):
        nn.init.normal_(parameter, std=0.5)
    nn.init.normal_(model.classifier.weight, std=0.5)
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def put(folder, model: nn.Module, dropout: float = 0.0) -> nn.Module:
    start = Start.read(str(folder))
    start.check(model)
    start.put_on(model, dropout)
    return model


@pytest.mark.parametrize("form", ["uniform", "compact"])
def test_the_first_logits_are_those_of_the_adapter_and_ties_are_kept(form, saved, tmp_path):
    model, _ = saved
    save_adapter(model, tmp_path / form, form=form)
    again = put(tmp_path / form, small_deberta(seed=0), dropout=0.1)
    assert torch.equal(logits(again), logits(model))
    layers, loaded = dict(lowrank_layers(model)), dict(lowrank_layers(again))
    for name, layer in loaded.items():
        assert (layer.rank, layer.scaling, layer.dropout) == (layers[name].rank, layers[name].scaling, 0.1)
        assert layer.lora_a.requires_grad and layer.lora_bt.requires_grad
    assert len({id(layer.lora_a) for layer in loaded.values()}) == len({id(layer.lora_a) for layer in layers.values()})
    assert again.classifier.weight.requires_grad and not again.deberta.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_wrote(rslora, tmp_path):
    from peft import LoraConfig, get_peft_model

    patterns = {"rank_pattern": {"key_proj": 4}, "alpha_pattern": {"layer.1.attention.self.query_proj": 10}}
    config = LoraConfig(
        task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=["query_proj", "key_proj"], use_rslora=rslora, **patterns
    )
    theirs = get_peft_model(small_deberta(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.5)
    theirs.save_pretrained(tmp_path)
    ours = small_deberta()
    ours.pooler.requires_grad_(False)  # PEFT saves the classifier only
    torch.testing.assert_close(logits(put(tmp_path, ours)), logits(theirs), rtol=1e-5, atol=1e-5)
    assert {layer.rank for _, layer in lowrank_layers(ours)} == {3, 4}
    assert (
        Start.read(str(tmp_path))
        .selection(find_grid(small_deberta(), "encoder.layer.*", TYPES), method="x", rho=0.5, seed=0)
        .selected
        == [list(TYPES[:2])] * 2
    )


REFUSED = {
    "use_dora": (True, "it is DoRA"),
    "bias": ("all", "it trains biases"),
    "init_lora_weights": ("pissa", "its base model has other weights"),
    "peft_type": ("LOHA", "only LORA can"),
    "r": (0, "must be a number above 0"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_more_than_plain_lora_is_refused(key, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(small_deberta(), LoraConfig(r=2, target_modules=["query_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    value, said = REFUSED[key]
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=said):
        Start.read(str(tmp_path))


def test_a_head_for_other_classes_is_new_and_a_line_says_so(saved, caplog):
    model, folder = saved
    other = small_deberta(seed=0)
    other.classifier = nn.Linear(16, 3)
    before = other.classifier.weight.clone()
    put(folder, other)
    assert torch.equal(other.classifier.weight, before)
    assert "is not used: classifier has another shape in this model" in caplog.text
    caplog.clear()
    frozen = small_deberta(seed=5)
    frozen.requires_grad_(False)
    assert torch.equal(put(folder, frozen).classifier.weight, model.classifier.weight)


def test_a_head_for_the_same_classes_in_another_order_is_new_and_a_line_says_so(saved, tmp_path, caplog):
    model, _ = saved
    names = {0: "a", 1: "b"}
    save_adapter(Backbone.of(model, arguments={"id2label": names}), tmp_path / "named")
    same, other = small_deberta(seed=0), small_deberta(seed=0)
    same.config.id2label, other.config.id2label = names, {0: "b", 1: "a"}
    before = other.classifier.weight.clone()
    assert torch.equal(put(tmp_path / "named", same).classifier.weight, model.classifier.weight)
    assert "is not used" not in caplog.text
    assert torch.equal(put(tmp_path / "named", other).classifier.weight, before)
    assert "is not used: its classes are a, b, and those of this task b, a" in caplog.text


def test_an_adapter_without_the_head_that_is_trained_says_so(saved, tmp_path, caplog):
    model, _ = saved
    model.requires_grad_(False)
    from diffora.adapters.export import pairs_in, save_pairs

    save_pairs(tmp_path / "bare", Backbone.of(model, trains_head=False), *pairs_in(model))
    put(tmp_path / "bare", small_deberta())
    assert "it has none, and this task trains one" in caplog.text


def test_another_model_is_refused(saved):
    _, folder = saved
    with pytest.raises(UserError, match="was trained on 2 layers, and this model has 1"):
        put(folder, small_deberta(layers=1))
    other = small_deberta()
    other.deberta.encoder.layer[0].output.dense = nn.Linear(8, 16)
    with pytest.raises(UserError, match=r"output.dense maps 8 to 16 features"):
        put(folder, other)


def test_the_digest_is_of_the_content(saved, tmp_path):
    _, folder = saved
    digest = adapter_digest(str(folder))
    shutil.copytree(folder, tmp_path / "copy")
    assert adapter_digest(str(tmp_path / "copy")) == digest
    config = tmp_path / "copy" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "moved"}))
    assert adapter_digest(str(tmp_path / "copy")) == digest
    weights = tmp_path / "copy" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert adapter_digest(str(tmp_path / "copy")) != digest


# --- in a run ---


@pytest.mark.parametrize("method", ["rm_lora", "diffora", "random"])
def test_a_run_starts_where_the_other_one_ended(method, finished, tmp_path):
    """With a learning rate of almost 0, the validation metrics are those of the adapter."""
    result = run_of(tmp_path / "run", f"method={method}", f"method.adapter={finished / 'adapter'}", "finetune.lr=1e-12")
    old = json.loads((finished / "run.json").read_text())
    assert result.metrics["validation/loss"] == pytest.approx(old["metrics"]["validation/loss"], abs=1e-5)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["inputs"] == {"method.adapter": adapter_digest(str(finished / "adapter"))}
    assert str(finished) not in json.dumps(record["settings"])
    assert record["params"]["adapter"] == old["params"]["adapter"]
    if method in ("diffora", "random"):
        assert record["selection"]["selected"] == old["selection"]["selected"]


def test_a_run_resumes_only_with_the_same_adapter(finished, tmp_path):
    start, more = tmp_path / "start", ["method=lora", f"method.adapter={tmp_path / 'start'}", "finetune.epochs=2"]
    shutil.copytree(finished / "adapter", start)
    whole = run_of(tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for name in ("run.json", "adapter", "config.yaml"):
        place = tmp_path / "stopped" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    again = run_of(tmp_path / "stopped", *more, "resume=true")
    assert again.metrics["validation/loss"] == whole.metrics["validation/loss"]
    shutil.copytree(tmp_path / "whole", tmp_path / "changed")
    (tmp_path / "changed" / "run.json").unlink()
    save_adapter_of_other_scale(start)
    with pytest.raises(UserError, match=r"the files of method.adapter changed"):
        run_of(tmp_path / "changed", *more, "resume=true")


def save_adapter_of_other_scale(folder) -> None:
    from diffora.adapters.manifest import read_manifest, write_manifest

    manifest = read_manifest(folder)
    for module in manifest["modules"].values():
        module["dropout"] = 0.25
    write_manifest(folder, manifest.pop("files"), manifest)


def test_mistakes_in_the_settings(finished, tmp_path):
    given = {
        f"method=lora method.adapter={tmp_path}": "is not an adapter: it has no diffora.json",
        f"method=lora method.adapter={finished}": "is not an adapter",
        "method=lora method.adapter=a/b/c": "is not a folder, and no hub id",
        f"method=diffora method.adapter={finished / 'adapter'} method.budget=10k": "method.budget does not go with",
        f"method=diffora method.adapter={finished / 'adapter'} method.warm_start=true": "method.warm_start does not go",
        f"method=sora +method.adapter={finished / 'adapter'}": "method=sora has no setting method.adapter",
    }
    for overrides, said in given.items():
        with pytest.raises(UserError, match=said):
            run_of(tmp_path / "run", *overrides.split())
        assert not (tmp_path / "run").exists()


def test_other_pretrained_weights_are_refused(finished, tmp_path):
    from diffora.hub import EMBEDDED

    shutil.copytree(EMBEDDED, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"was trained on another backbone: the backbone's files changed: model.safe"):
        run_of(tmp_path / "run", "method=lora", f"method.adapter={finished / 'adapter'}", f"model.path={tmp_path}/base")


def test_without_the_run_evaluate_compares_the_backbone_with_the_adapters(finished, tmp_path, caplog):
    shutil.copytree(finished / "adapter", tmp_path / "alone")
    request = evaluate.read_request(
        [f"adapter={tmp_path / 'alone'}", "model=tiny", "task=paraphrase", f"output={tmp_path / 'out'}"]
    )
    check_backbone(request.cfg, request.weights, False)
    assert "may not be the backbone" not in caplog.text


def test_a_selection_is_stored_with_the_adapter(finished):
    from diffora.core.selection import Selection

    assert Selection.load(finished / "adapter" / "selection.json") == Selection.load(finished / "selection.json")
