"""One pass for both levels of the search gives the gradients of two passes, for every kind of backbone and loss."""

import importlib.util
import json
from argparse import Namespace

import lightning as L
import numpy as np
import pytest
import torch
import transformers
from conftest import REPO
from omegaconf import OmegaConf
from small import small_task

from diffora.backbones.backbone import Backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import LowRankLinear
from diffora.errors import UserError
from diffora.loop.samplers import BilevelBatchSampler, LengthGroupedBatchSampler
from diffora.loop.splits import split_search
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.scoring.bilevel import SearchModule
from diffora.settings.sections import Search
from diffora.tasks.base import Task
from diffora.tasks.batches import joined
from diffora.tasks.causal_lm import CausalLMTask
from diffora.tasks.ignored import IGNORED
from diffora.tasks.squad import SquadTask

CHAT = {"name": "chat", "score": "loss"}
SETTINGS = {"epochs": 1, "batch_size": 4, "rank": 3, "lr": 1e-2, "clip": None}
VOCAB, PAD = 60, 1  # not 0, to notice padding with a wrong value
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": PAD,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TABLE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
DEBERTA = (
    BERT | TABLE | {"position_buckets": 8, "type_vocab_size": 0, "norm_rel_ebd": "layer_norm", "pooler_dropout": 0.0}
)
LLAMA = {key: value for key, value in BERT.items() if "dropout" not in key} | {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS = {
    "bert": BERT,
    "roberta": BERT | {"type_vocab_size": 1},
    "deberta-v2": DEBERTA | {"share_att_key": True},
    "deberta-v2, own tables": DEBERTA | {"share_att_key": False},
    "deberta": BERT | TABLE | {"max_relative_positions": 16, "type_vocab_size": 0, "pooler_dropout": 0.0},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": PAD}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": LLAMA,
    "vit": {key: BERT[key] for key in BERT if key.startswith(("hidden", "num", "inter", "att"))}
    | {"image_size": 8, "patch_size": 4},
}
KINDS = {
    "classes": (small_task("mrpc"), "AutoModelForSequenceClassification"),
    "score": (small_task("stsb"), "AutoModelForSequenceClassification"),
    "span": (SquadTask(OmegaConf.create({"name": "squad", "unanswerable": False})), "AutoModelForQuestionAnswering"),
    "tokens": (
        CausalLMTask(OmegaConf.create({**CHAT, "packing": False})),
        "AutoModelForCausalLM",
    ),
    "packed": (
        CausalLMTask(OmegaConf.create({**CHAT, "packing": True})),
        "AutoModelForCausalLM",
    ),
    "images": (Task(OmegaConf.create({"name": "images"})), "AutoModelForImageClassification"),
}
CASES = [
    ("bert", "classes"),
    ("bert", "score"),
    ("roberta", "classes"),
    ("deberta-v2", "classes"),
    ("deberta-v2", "span"),
    ("deberta-v2, own tables", "classes"),
    ("deberta", "classes"),
    ("gpt2", "classes"),
    ("gpt2", "packed"),
    ("llama", "tokens"),
    ("llama", "packed"),
    ("vit", "images"),
]
T5 = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32, "pad_token_id": PAD}


def make(name="deberta-v2", kind="classes", dtype=torch.float64, trainer=None, checkpointing=False, **changes):
    """A search with nonzero B and different gates, so that no gradient is zero."""
    task, model_class = KINDS[kind]
    labels = {"score": 1, "images": 3}.get(kind, 2)
    config = transformers.AutoConfig.for_model(name.split(",")[0], **CONFIGS[name], num_labels=labels, use_cache=False)
    torch.manual_seed(0)
    model = getattr(transformers, model_class).from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # with the usual 0.02, attention is nearly uniform
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    backbone = Backbone.of(model, task.trains_head).freeze()
    if checkpointing:
        backbone.checkpoint_activations()
    grid = find_grid(model)
    layers = attach(
        model, grid.names, torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool), 3, None, alpha=6, freeze=False
    )
    for row in layers:
        for layer in row:
            torch.nn.init.normal_(layer.lora_bt, std=0.2)
    module = SearchModule(model, layers, grid.types, task, Search(**SETTINGS | changes, update="simultaneous"), 0)
    module.to(dtype)
    with torch.no_grad():
        module.gamma.normal_()
    module.trainer = trainer or L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return module.train()


def batch_for(kind, n, width, seed):
    """Rows of different lengths, padded like those of the task's collator. The longest has length ``width``."""
    g = torch.Generator().manual_seed(seed)
    row = torch.arange(n)
    if kind == "images":
        pixels = torch.randn(n, 3, 8, 8, generator=g, dtype=torch.float64)
        return {"pixel_values": pixels, "labels": torch.randint(0, 3, (n,), generator=g), "row": row}
    lengths = torch.randint(3, width + 1, (n,), generator=g)
    lengths[0] = width
    present = torch.arange(width) < lengths[:, None]
    ids = torch.randint(3, VOCAB, (n, width), generator=g).masked_fill(~present, PAD)
    batch = {"input_ids": ids, "row": row}
    if kind == "packed":  # two conversations in each row, and the padding as a third one
        second, third = (lengths // 2)[:, None], lengths[:, None]
        at = torch.arange(width).expand(n, -1)
        batch["position_ids"] = torch.where(at < second, at, torch.where(at < third, at - second, at - third))
    else:
        batch["attention_mask"] = present.long()
    if kind in ("tokens", "packed"):
        counted = present & (torch.rand(n, width, generator=g) < 0.7)
        return batch | {"labels": ids.masked_fill(~counted, IGNORED)}
    if kind == "span":
        context = present & (torch.arange(width) > 0)
        where = {name: torch.ones(n, dtype=torch.long) for name in ("start_positions", "end_positions")}
        return batch | {"context": context, "null_position": torch.zeros(n, dtype=torch.long)} | where
    labels = torch.rand(n, generator=g) * 5 if kind == "score" else torch.randint(0, 2, (n,), generator=g)
    return batch | {"labels": labels}


def in_two_passes(module, valid, train):
    """((train loss, valid loss), gradients) at one point, computed by the two passes of the alternation."""
    weights, gamma = module.weights, module.gamma
    train_loss, of_weights = module.gradients(
        train, lambda loss: torch.autograd.grad(loss, weights, allow_unused=True), gamma.detach()
    )
    valid_loss, of_gamma = module.gradients(valid, lambda loss: torch.autograd.grad(loss, [gamma]), gamma)
    return (train_loss, valid_loss), [*of_weights, *of_gamma]


def assert_equal(found, expected):
    (losses, grads), (expected_losses, expected_grads) = found, expected
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=0)
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-10 * b.abs().max() + 1e-14, (a - b).abs().max() / b.abs().max()
    # at most one other gradient is zero: that of a bias that the softmax over spans cancels
    assert sum(float(g.abs().max()) > 1e-6 for g in expected_grads if g is not None) >= len(expected_grads) - 1


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_pass_gives_the_gradients_of_two(name, kind):
    module = make(name, kind)
    valid, train = batch_for(kind, 5, 9, seed=1), batch_for(kind, 4, 12, seed=2)
    module.check_rows_are_apart(valid, train)
    assert_equal(module.joint_gradients(valid, train), in_two_passes(module, valid, train))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("deberta-v2", "classes"), ("llama", "packed")])
def test_one_pass_gives_the_gradients_of_two_in_parts_and_with_checkpointing(name, kind, checkpointing):
    module, whole = make(name, kind, accumulate=3, checkpointing=checkpointing), make(name, kind)
    for n_valid, n_train in ((7, 7), (2, 7), (7, 1)):  # also where the halves are not cut into equally many parts
        valid, train = batch_for(kind, n_valid, 12, seed=1), batch_for(kind, n_train, 9, seed=2)
        assert_equal(module.joint_gradients(valid, train), in_two_passes(whole, valid, train))


@pytest.mark.parametrize("name", ["bert", "deberta-v2"])
def test_neither_half_uses_the_others_rows(name):
    """The weights' gradients do not depend on validation rows, and Gamma's gradients not on training rows."""
    module = make(name)

    def grads(valid_seed, train_seed):
        valid, train = batch_for("classes", 4, 9, seed=valid_seed), batch_for("classes", 4, 9, seed=train_seed)
        *of_weights, of_gamma = module.joint_gradients(valid, train)[1]
        return torch.cat([g.flatten() for g in of_weights if g is not None]), of_gamma

    (weights, gamma), other_valid, other_train = grads(1, 2), grads(3, 2), grads(1, 4)
    torch.testing.assert_close(other_valid[0], weights, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(other_train[1], gamma, rtol=1e-10, atol=1e-14)
    assert (other_valid[1] - gamma).norm() > 1e-3 * gamma.norm()
    assert (other_train[0] - weights).norm() > 1e-3 * weights.norm()


def test_a_joint_step_equals_both_steps_from_the_same_point(monkeypatch):
    """With plain SGD of rate 1, and clipping of the weights' gradient only."""
    module = make(clip=0.01)
    valid, train = batch_for("classes", 4, 9, seed=1), batch_for("classes", 4, 12, seed=2)
    _, (*of_weights, of_gamma) = in_two_passes(module, valid, train)
    before = [p.detach().clone() for p in [*module.weights, module.gamma]]
    state = torch.get_rng_state()
    module.joint_step(torch.optim.SGD([module.gamma], lr=1.0), torch.optim.SGD(module.weights, lr=1.0), valid, train)
    assert torch.equal(torch.get_rng_state(), state)  # the checks before the step must not use random numbers
    *moved, gamma_moved = (old - new for old, new in zip(before, [*module.weights, module.gamma], strict=True))
    torch.testing.assert_close(gamma_moved.detach(), of_gamma, rtol=1e-9, atol=1e-12)
    norm = torch.cat([g.flatten() for g in of_weights if g is not None]).norm()
    assert norm > 0.02
    for change, grad in zip(moved, of_weights, strict=True):
        expected = torch.zeros_like(change) if grad is None else grad * (0.01 / (norm + 1e-6))
        torch.testing.assert_close(change.detach(), expected, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for p in module.parameters())
    assert all(layer.split is None for row in module.layers for layer in row)
    assert "disentangled_attention_bias" not in vars(module.model.deberta.encoder.layer[0].attention.self)


def test_a_pass_of_the_alternation_saves_nothing_for_the_other_level(monkeypatch):
    """In a Gamma step, the low-rank layers do not save the inputs of A. A weight step needs all of these inputs."""
    module, batch = make("bert"), batch_for("classes", 4, 12, seed=0)
    inputs, saved = [], []  # alive to the end, so that no address is used twice
    real = LowRankLinear._fused

    def watched(self, x):
        inputs.append(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            return real(self, x)

    monkeypatch.setattr(LowRankLinear, "_fused", watched)
    kept = {}
    for name in ("gamma", "weight"):
        inputs.clear(), saved.clear()
        optimizer = torch.optim.SGD([module.gamma] if name == "gamma" else module.weights, lr=0.0)
        module.gamma_step(optimizer, batch, batch) if name == "gamma" else module.weight_step(optimizer, batch)
        read, held = ({t.data_ptr() for t in tensors} for tensors in (inputs, saved))
        kept[name] = len(read & held), len(read)
        assert held
    assert kept == {"gamma": (0, 8), "weight": (8, 8)}  # q, k, v share one; two layers


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_under_autocast_one_pass_gives_the_gradients_of_two_up_to_rounding(precision):
    module = make("deberta-v2", dtype=torch.float32)
    valid, train = batch_for("classes", 8, 12, seed=1), batch_for("classes", 8, 12, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = module.joint_gradients(valid, train)
        _, expected = in_two_passes(module, valid, train)
    assert sum(a is not None for a in found) > len(module.pairs)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or a.dtype == torch.float32
        assert a is None or torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_that_mixes_rows_is_refused_before_the_first_step(compiled):
    module = make("bert")
    if compiled:  # its backward pass is then one node, as with trainer.compile=true; this needs no C++ compiler
        module.model.forward = torch.compile(module.model.forward, dynamic=True, backend="aot_eager")
    module.model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda m, a, y: y + y.mean(0))
    before = [p.detach().clone() for p in module.parameters()]
    gamma_opt, weight_opt = module.configure_optimizers()
    with pytest.raises(
        UserError, match=r"BertForSequenceClassification does not keep the rows .* search\.update=alternating"
    ):
        module.joint_step(gamma_opt, weight_opt, *(batch_for("classes", 4, 9, seed=i) for i in (1, 2)))
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


def test_a_module_whose_input_has_no_batch_dimension_is_refused():
    """The input is a table that all rows share, and the module was not told about it."""
    module = make("deberta-v2")
    module._tables = []
    with pytest.raises(UserError, match=r"layer\.0\.attention\.self\.query_proj, .*key_proj"):
        module.check_rows_are_apart(*(batch_for("classes", 4, 9, seed=i) for i in (1, 2)))


def test_batches_are_joined_with_each_columns_padding_value():
    task, _ = KINDS["packed"]
    a, b = batch_for("packed", 2, 5, seed=0), batch_for("packed", 3, 8, seed=1)
    for first, second in ((a, b), (b, a)):
        batch = joined(first, second, task, PAD)
        for name in first:
            narrow, wide = first[name], second[name]
            assert torch.equal(
                batch[name][: len(narrow)][(...,) + (slice(narrow.shape[-1]),) * (narrow.ndim - 1)], narrow
            )
            assert torch.equal(batch[name][len(narrow) :][(...,) + (slice(wide.shape[-1]),) * (wide.ndim - 1)], wide)
    batch = joined(a, b, task, PAD)
    padding = {"input_ids": PAD, "labels": IGNORED, "position_ids": 0}
    assert all((batch[name][:2, 5:] == value).all() for name, value in padding.items())
    a, b = (part | {"strange": part["labels"]} for part in (a, b))
    with pytest.raises(UserError, match=r"CausalLMTask\.padding has no padding value for strange"):
        joined(a, b, task, PAD)


def test_batches_that_share_a_pass_are_about_equally_long():
    lengths = np.random.default_rng(0).integers(4, 60, size=400)
    split = split_search(np.arange(400), seed=0, valid_fraction=0.4)

    def items(matched, rank=0, world_size=1, round_=1):
        train, valid = (
            LengthGroupedBatchSampler(lengths, 8, 0, rank=rank, world_size=world_size, indices=rows, stream=stream)
            for stream, rows in enumerate(split)
        )
        sampler = BilevelBatchSampler(train, valid, 2, matched)
        sampler.set_epoch(round_)
        return list(sampler)

    def width(item):
        return max(lengths[rows].max() for rows in (item["valid"], item["train"][0]))

    plain, matched = items(False), items(True)
    assert [item["train"] for item in plain] == [item["train"] for item in matched]
    assert sorted(item["valid"] for item in plain) == sorted(item["valid"] for item in matched)
    needed = sum(lengths[rows].max() for item in plain for rows in (item["valid"], item["train"][0]))
    assert needed <= 2 * sum(map(width, matched)) < 1.1 * needed < 2 * sum(map(width, plain))
    parts = [items(True, rank, 2) for rank in range(2)]
    for whole, *divided in zip(matched, *parts, strict=True):  # the processes pair the same batches
        assert sorted(whole["valid"]) == sorted(row for part in divided for row in part["valid"])


def test_the_second_order_is_refused(cfg):
    with pytest.raises(UserError, match=r"search\.order=2 does not go with search\.update=simultaneous"):
        check(cfg("experiment=quickstart", "search.order=2", "search.update=simultaneous"))
    with pytest.raises(UserError, match=r"search\.update='both' must be one of alternating, simultaneous"):
        check(cfg("experiment=quickstart", "search.update=both"))


def test_a_whole_run_and_one_that_is_killed_between_rounds(cfg, quick, tmp_path, monkeypatch):
    overrides = [
        *quick,
        "search.update=simultaneous",
        "search.train_steps=2",
        "finetune.epochs=1",
        "search.batch_size=8",
    ]
    whole = run(cfg(*overrides), tmp_path / "whole")
    assert whole.record["status"] == "completed" and len(whole.record["history"]) == 1
    assert torch.tensor(whole.selection.gamma_bar).std() > 1e-4

    alternating = run(cfg(*overrides, "search.update=alternating"), tmp_path / "alternating")
    assert alternating.selection.gamma_bar != whole.selection.gamma_bar

    class Killed(Exception):
        pass

    def step(self, *args):
        if self.current_epoch == 1:
            raise Killed
        return original(self, *args)

    original = SearchModule.joint_step
    with monkeypatch.context() as patch:
        patch.setattr(SearchModule, "joint_step", step)
        with pytest.raises(Killed):
            run(cfg(*overrides), tmp_path / "killed")
    again = run(cfg(*overrides, "resume=true"), tmp_path / "killed")
    assert again.selection.gamma_bar == whole.selection.gamma_bar
    assert again.record["history"] == whole.record["history"]
    trajectories = [json.loads((tmp_path / name / "trajectory.json").read_text()) for name in ("whole", "killed")]
    assert trajectories[0] == trajectories[1]


def test_the_script_that_compares_both_updates(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("compare_updates", REPO / "scripts/compare_updates.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    a, b = [["q", "k"], ["v", "o"]], [["q", "v"], ["v", "o"]]
    assert script.jaccard(a, a) == 1.0 and script.jaccard(a, b) == 3 / 5
    assert script.chance([["q"], ["k"]], 2) == pytest.approx(0.25 * 1 + 0.5 * (1 / 3), abs=0.02)  # 2, 1 or 0 in common

    sizes = ["task.train_rows=48", "task.validation_rows=16", "search.epochs=1", "search.batch_size=8"]
    given = Namespace(seeds=[0, 1], finetune=False, output=tmp_path, overrides=["experiment=quickstart", *sizes])
    script.main(given)
    written = json.loads((tmp_path / "compare_updates.json").read_text())
    assert [(run["update"], run["seed"]) for run in written["runs"]] == [
        *((update, 0) for update in script.UPDATES),
        *((update, 1) for update in reversed(script.UPDATES)),
    ]
    found = written["comparison"]
    assert len(found["between_updates"]["jaccard"]["values"]) == 2
    assert len(found["between_seeds_simultaneous"]["correlation"]["values"]) == 1
    assert found["search_s"]["alternating"]["mean"] > 0 and found["chance"] == pytest.approx(0.34, abs=0.01)

    monkeypatch.setattr(script, "one_run", None)  # a second call has nothing to do
    script.main(given)
    assert json.loads((tmp_path / "compare_updates.json").read_text()) == written
