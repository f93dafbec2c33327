import dataclasses

import pytest
import torch
from small import small_task

from diffora.backbones.backbone import Backbone
from diffora.backbones.load import load_backbone
from diffora.errors import UserError
from diffora.hub import resolve
from diffora.settings.sections import Model

REQUEST = small_task().model_request()


def bert(folder, pooler: bool):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    return Model(name="b", path=str(folder))


def trained(model):
    return {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_the_head_of_a_deberta_is_pooler_and_classifier(deberta):
    assert trained(deberta()) == {"pooler.dense", "classifier"}


def test_a_pretrained_pooler_is_backbone_and_a_fresh_one_is_head(tmp_path):
    pretrained = load_backbone(bert(tmp_path / "with", True), REQUEST)
    assert trained(pretrained.model) == {"classifier"} == set(pretrained.head) == set(pretrained.fresh)
    fresh = load_backbone(bert(tmp_path / "without", False), REQUEST)
    assert trained(fresh.model) == {"classifier", "bert.pooler.dense"} == set(fresh.fresh)
    assert fresh.head == ("classifier", "bert.pooler") and fresh.untrained == ()
    untrained = load_backbone(bert(tmp_path / "without", False), dataclasses.replace(REQUEST, trains_head=False))
    assert untrained.head == () and untrained.untrained == ("bert.pooler.dense", "classifier")
    assert trained(untrained.model) == set()


def test_weights_are_float32_for_any_dtype_of_the_file(tmp_path):
    cfg = bert(tmp_path, True)
    from transformers import BertModel

    BertModel.from_pretrained(tmp_path).half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_backbone(cfg, REQUEST).model.parameters()} == {torch.float32}


def test_counts_count_shared_parameters_once(deberta):
    from conftest import TYPES

    from diffora.core.attach import attach
    from diffora.core.grid import find_grid

    model = deberta()
    backbone = Backbone.of(model)
    before, size = backbone.count_parameters(), backbone.n_parameters
    assert size + before["head"] == sum(p.numel() for p in model.parameters())
    assert before["adapter"] == 0 and before["trainable"] == before["head"]
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, torch.zeros(2, 6, dtype=torch.bool), 2, 1, alpha=1, freeze=False)
    after = backbone.count_parameters()
    assert after["adapter"] == 4 * 32 + 2 * 48
    assert after["head"] == before["head"] and after["trainable"] == after["adapter"] + after["head"]


@pytest.mark.parametrize("path", ["./nothing", "/no/such", "a/b/c", "~/nothing-there"])
def test_a_path_that_is_not_a_folder_is_refused(path):
    with pytest.raises(UserError, match="is not a folder"):
        resolve(path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(UserError, match="is not JSON"):
        load_backbone(Model(name="x", path=str(tmp_path)), REQUEST)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2}')
    with pytest.raises(UserError, match="has no weights"):
        load_backbone(Model(name="x", path=str(tmp_path)), REQUEST)
