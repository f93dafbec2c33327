"""What the library must leave in a model as it was, and what it must notice in one."""

import copy
from dataclasses import replace

import pytest
import torch
from library import Net, bert, entropy_loss, pairs, texts
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import diffora
from diffora.core.lowrank import lowrank_layers
from diffora.core.norms import keep_statistics, moved_statistics
from diffora.errors import UserError

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def search(model, batches, loss=None, **more):
    settings = {"rounds": 1, "gamma_lr": 0.1, "progress": False} | more
    return diffora.search(model, batches[:3], batches[3:], loss=loss, **settings)


def filled(model):
    """The same model, with adapters that are not zero."""
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt)
    return model


# --- what a module keeps outside its parameters and buffers ---


@pytest.mark.parametrize("what", ["search", "gradient", "within_time"])
def test_positions_that_grow_with_the_longest_row_are_left_as_they_were(what):
    """Dynamic RoPE has the length in an attribute and the frequencies for it in a buffer."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=8, rope_parameters=rope)).eval()
    untouched = copy.deepcopy(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 60, (6, 2, 24))]
    if what == "search":
        search(model, rows)
    elif what == "gradient":
        diffora.select(model, "gradient", rows, progress=False)
    else:
        chosen = diffora.select(model, "random", scope="global", k=1)
        diffora.within_time(model, chosen, rows[0], time_budget=0.9)
    with torch.no_grad():
        assert model(rows[0]["input_ids"]).logits.equal(untouched(rows[0]["input_ids"]).logits)


class Lazy(nn.Module):
    """Fills a buffer and an attribute in its first pass."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 2)
        self.register_buffer("mean", None)

    def forward(self, x):
        if self.mean is None:
            self.mean, self.seen = x.mean(0), True
        for block in self.blocks:
            x = x + block(x - self.mean)
        return self.head(x)


def test_what_a_first_pass_fills_is_empty_again():
    model = Lazy()
    before = set(vars(model))
    search(model, pairs(8), entropy_loss)
    assert model.mean is None and set(vars(model)) == before


def test_odd_tensors_and_scripted_parts_of_a_model_do_not_end_a_search():
    model = Net()
    model.norm = torch.jit.script(nn.Tanh())
    with torch.inference_mode():
        model.cache = torch.ones(3)
    model.sparse = torch.eye(3).to_sparse()
    model.norm.train()
    search(model, pairs(8), entropy_loss)
    assert model.norm.training and model.cache.equal(torch.ones(3))


# --- statistics of norms ---


class Stem(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.norm = norm(8, track_running_stats=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def attached(norm=nn.BatchNorm1d, **more):
    torch.manual_seed(0)
    model = Stem(norm)
    diffora.attach(model, diffora.select(model, "random", k=1), rank=2, **more)
    model.head.requires_grad_(True)
    return filled(model)


def pass_in_training(model):
    shape = (16, 8, 5) if isinstance(model.norm, nn.InstanceNorm1d) else (16, 8)
    (model.train().norm if len(shape) == 3 else model)(torch.randn(*shape) + 3)
    return model.eval()


def copied(model):
    return pass_in_training(copy.deepcopy(model))


def averaged(model):
    mean = AveragedModel(model, use_buffers=True)
    mean.update_parameters(pass_in_training(model))
    return mean.module.eval()


def frozen_by_hand(model):
    torch.manual_seed(0)
    model = Stem().requires_grad_(False)
    diffora.attach(model, diffora.select(model, "random", k=1), rank=2, freeze=False)
    return pass_in_training(filled(model))


@pytest.mark.parametrize("workflow", [pass_in_training, copied, averaged, frozen_by_hand])
def test_statistics_that_moved_in_training_are_saved(workflow, tmp_path):
    model = workflow(attached())
    assert moved_statistics(model) == ["norm"]
    diffora.save_adapter(model, tmp_path, head=["head"])
    torch.manual_seed(0)
    loaded = diffora.load_adapter(Stem(), tmp_path).eval()
    x = torch.randn(5, 8) + 3
    assert loaded(x).equal(model(x))
    assert moved_statistics(loaded) == []
    again = pass_in_training(loaded)  # training goes on
    diffora.save_adapter(again, tmp_path / "again", head=["head"])
    torch.manual_seed(0)
    assert diffora.load_adapter(Stem(), tmp_path / "again").eval()(x).equal(again(x))


def test_the_statistics_of_instance_norms_count_too_and_unmoved_ones_are_not_saved(tmp_path):
    model = attached(nn.InstanceNorm1d)
    assert moved_statistics(model) == []
    keep_statistics(model.train())
    model.norm(torch.randn(16, 8, 5) + 3)
    assert moved_statistics(model) == []
    assert moved_statistics(pass_in_training(model)) == ["norm"]
    assert moved_statistics(attached().half()) == []
    still = attached().eval()
    diffora.save_adapter(still, tmp_path)
    assert "norm" not in (tmp_path / "adapter_config.json").read_text()
    diffora.detach(still)
    assert not any("diffora" in name for module in still.modules() for name in vars(module))


def test_an_encoder_of_torch_with_a_loaded_adapter_runs_in_evaluation(tmp_path):
    def made():
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2).eval()

    model, x, padding = made(), torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    chosen = diffora.select(model, "random", layer="layers.[1]", candidates=["linear1", "linear2"], k=1)
    diffora.save_adapter(filled(diffora.attach(model, chosen, rank=2)), tmp_path)
    loaded = diffora.load_adapter(made(), tmp_path)
    with torch.no_grad():
        found, wanted = (each(x, src_key_padding_mask=padding) for each in (loaded, model))
        assert torch.allclose(found[~padding], wanted[~padding], atol=1e-6)
        assert copy.deepcopy(loaded)(x, src_key_padding_mask=padding)[~padding].equal(found[~padding])


# --- what a search must notice ---


def test_modules_that_the_loss_never_calls_are_not_selected_but_named():
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**shape, add_cross_attention=True))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 60, (6, 2, 8))]
    said = r"the loss does not call transformer\.h\.0\.crossattention\.c_attn \(and \d+ more\) for any batch"
    with pytest.raises(UserError, match=said):
        search(model, rows)
    assert not list(lowrank_layers(model))
    assert search(model, rows, candidates=["attn.c_attn", "mlp.c_fc"]).names()


@pytest.mark.parametrize("cause", ["detached", "frozen"])
def test_a_head_that_is_frozen_is_warned_about(cause, caplog):
    model = bert()
    if cause == "detached":
        diffora.attach(model, diffora.select(model, "random", k=1), rank=2)
        with pytest.raises(UserError, match=r"diffora\.detach\(model\).*let the head require gradients again"):
            search(model, texts())
        diffora.detach(model)
    else:
        model.requires_grad_(False)
    assert search(model, texts()).config["trained"] == []
    assert "no head is trained with the adapters: if this model has one, name it (head=[…])" in caplog.text


def test_a_language_model_has_no_new_head_to_warn_about(caplog):
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).requires_grad_(False)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 60, (6, 2, 8))]
    search(model, rows)
    assert "no head is trained" not in caplog.text


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((torch.randn(8), 1) for _ in range(16))


def test_two_loaders_over_one_stream_are_refused():
    rows = Stream()
    with pytest.raises(UserError, match="give the same rows"):
        diffora.search(Net(), DataLoader(rows, 4), DataLoader(rows, 4), loss=entropy_loss, rounds=1)
    diffora.search(Net(), DataLoader(rows, 4), DataLoader(Stream(), 4), loss=entropy_loss, rounds=1, progress=False)


def test_a_batch_that_moves_itself_is_kept():
    class Batch:
        def __init__(self, x, y):
            self.x, self.y = x, y

        def to(self, device):
            self.x, self.y = self.x.to(device), self.y.to(device)

    batches = [Batch(x, y) for x, y in pairs(8)]
    search(Net(), batches, lambda model, batch: entropy_loss(model, (batch.x, batch.y)))


def test_a_and_b_are_in_float32_whatever_torchs_default_is():
    model = Net()
    torch.set_default_dtype(torch.float64)
    try:
        diffora.attach(model, diffora.select(model, "random", k=1), rank=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {layer.lora_a.dtype for _, layer in lowrank_layers(model)} == {torch.float32}


# --- adapters for PEFT ---


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.temperature = nn.Linear(8, 2), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.fc(x) / self.temperature


def with_head():
    torch.manual_seed(0)
    model = Net()
    model.norm, model.head = nn.Identity(), Head()
    return model.eval()


def test_a_head_with_parameters_inside_and_of_its_own_is_saved_once(tmp_path):
    model = with_head()
    selection = search(model, pairs(8), entropy_loss)
    with pytest.warns(UserWarning, match="the search trained head too, which PEFT leaves frozen"):
        selection.lora_config(rank=2)
    diffora.attach(model, selection, rank=2)
    model.head.requires_grad_(True)
    nn.init.normal_(filled(model).head.temperature)
    diffora.save_adapter(model, tmp_path)
    x = torch.randn(5, 8)
    assert torch.allclose(PeftModel.from_pretrained(with_head(), tmp_path).eval()(x), model(x), atol=1e-6)


def test_a_parameter_of_the_model_itself_is_named_too():
    model = Net()
    model.temperature = nn.Parameter(torch.ones(()))
    found = search(model, pairs(8), lambda net, batch: entropy_loss(net, batch) / net.temperature)
    with pytest.warns(UserWarning, match="the search trained temperature too, which PEFT leaves frozen"):
        found.lora_config(rank=2, modules_to_save=["head", "norm"])


def test_distilberts_two_heads_are_no_reason_for_a_warning(recwarn, caplog, tmp_path):
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    )
    selection = search(model, texts())
    config = selection.lora_config(rank=2, task_type="SEQ_CLS")
    assert not [w for w in recwarn if "leaves frozen" in str(w.message)]
    peft = get_peft_model(copy.deepcopy(model), config)
    assert all(p.requires_grad for n, p in peft.named_parameters() if "pre_classifier.modules_to_save" in n)
    diffora.attach(model, selection, rank=2)
    model.pre_classifier.requires_grad_(True)
    diffora.save_adapter(model, tmp_path)
    assert "goes by the ends of names" not in caplog.text


def test_the_names_of_peft_get_the_names_to_give():
    selection = diffora.select(Net(), "random", k=1)
    with pytest.raises(UserError) as refused:
        selection.lora_config(r=8, lora_alpha=32)
    assert {"r=: give rank=", "lora_alpha=: give alpha="} <= set(refused.value.problems)


def test_a_head_of_the_task_that_peft_would_confuse_with_a_candidate_is_refused():
    model = Net()
    model.blocks = nn.ModuleList(nn.ModuleDict({"attn_score": nn.Linear(8, 8)}) for _ in range(2))
    selection = diffora.select(model, "random", k=1)
    with pytest.raises(UserError, match=r"task_type=SEQ_CLS: .* would train blocks\.0\.attn_score whole, too"):
        selection.lora_config(rank=2, task_type="SEQ_CLS")


def test_adapting_the_head_is_refused_before_training():
    model, said = bert(), "classifier is part of the head, which is trained whole"
    candidates = ["classifier", "bert.encoder.layer.0.output.dense"]
    with pytest.raises(UserError, match=said):
        diffora.select(model, "random", layer=".", candidates=candidates, k=1)
    whole = nn.ModuleDict(dict(model.named_children()))  # the same names in a model that transformers does not know
    selection = diffora.select(whole, "random", layer=".", candidates=candidates, k=1)
    selection = replace(selection, selected=[["bert.encoder.layer.0.output.dense"]])
    with pytest.raises(UserError, match=said):
        diffora.attach(model, selection, rank=2, shared_rank=1)
    assert not list(lowrank_layers(model))
    diffora.attach(model, selection, rank=2)


# --- other uses of the layers ---


def test_a_traced_model_computes_the_same_and_can_be_saved(tmp_path):
    model = filled(diffora.attach(Net(), diffora.select(Net(), "random", k=1), rank=2)).eval()
    x = torch.randn(5, 8)
    torch.jit.trace(model, x).save(tmp_path / "model.pt")
    assert torch.allclose(torch.jit.load(tmp_path / "model.pt")(x), model(x), atol=1e-6)


def test_the_updates_of_a_plain_module_are_merged():
    model = filled(diffora.attach(Net(), diffora.select(Net(), "random", k=1), rank=2)).eval()
    x = torch.randn(5, 8)
    wanted = model(x)
    diffora.merge_updates(model)
    assert not list(lowrank_layers(model)) and torch.allclose(model(x), wanted, atol=1e-5)
    assert not any("diffora" in name for module in model.modules() for name in vars(module))


class Named(Net):
    def forward(self, x):
        for block in self.blocks:
            x = x + block[3](input=block[0](input=x).relu())
        return self.head(x)


def test_candidates_may_be_called_with_their_input_by_name():
    torch.manual_seed(0)
    found = search(Named(), pairs(8), entropy_loss)
    assert any(gate != found.gamma_bar[0][0] for row in found.gamma_bar for gate in row)
    scores = diffora.select(Named(), "activation", pairs(8), loss=entropy_loss, progress=False).scores
    assert all(score > 0 for row in scores for score in row)
