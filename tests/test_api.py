"""diffora as a library: search, select and attach on models and loaders of the user's own."""

import logging
import subprocess
import sys

import lightning as L
import pytest
import torch
from conftest import TYPES, batch_of
from library import CASES, Encoder, Net, assert_same, bert, entropy_loss, pairs, part_frozen, state, texts
from small import small_deberta, small_task
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffora
from diffora.core.attach import attach as core_attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.scoring.bilevel import SearchModule
from diffora.settings.sections import Search
from diffora.standalone.bilevel import Bilevel
from diffora.standalone.settings import SearchSettings


@pytest.fixture(params=CASES)
def case(request):
    make, batches, loss = CASES[request.param]
    torch.manual_seed(0)
    return make(), batches(), loss


@pytest.mark.parametrize("frozen", [False, True])
def test_a_search_finds_a_selection_and_leaves_the_model_as_it_was(case, frozen, caplog):
    model, batches, loss = case
    model = part_frozen(model) if frozen else model
    before = state(model)
    found = diffora.search(model, batches[:3], batches[3:], loss=loss, rounds=2, k=1, gamma_lr=0.1, progress=False)
    assert_same(before, state(model))
    gates = torch.tensor(found.gamma_bar)
    assert torch.allclose(gates.sum(-1), torch.ones(len(gates)))
    assert gates.std() > 0
    assert [len(row) for row in found.selected] == [1] * len(gates)
    assert (found.selector, found.k, found.relaxation) == ("search", 1, "softmax")
    assert found.rho == 1 / len(found.types)
    head = ["classifier.weight", "classifier.bias"] if loss is None else ["head.weight", "head.bias"]
    norm = ["norm.weight", "norm.bias"] if isinstance(model, Net) and not frozen else []  # outside the layers too
    assert found.config["trained"] == norm + head
    if isinstance(model, Encoder):
        wanted = ["encoder.layers.*.self_attn.in_proj_weight", "encoder.layers.*.self_attn.out_proj.weight"]
        assert found.config["left_out"] == wanted and all(name in caplog.text for name in wanted)
    again = diffora.search(model, batches[:3], batches[3:], loss=loss, rounds=2, k=1, gamma_lr=0.1, progress=False)
    assert again == found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_go_to_the_gpu_of_the_model(case):
    model, batches, loss = case
    before, random_state = state(model.cuda()), torch.cuda.get_rng_state()
    found = diffora.search(model, batches[:3], batches[3:], loss=loss, rounds=1, progress=False)
    assert torch.tensor(found.gamma_bar).std() > 0
    diffora.select(model, "gradient", batches, loss=loss)
    diffora.select(model, "activation", batches, loss=loss)
    assert_same(before, state(model))
    assert torch.cuda.get_rng_state().equal(random_state)


@pytest.mark.parametrize("selector", ["gradient", "activation", "random", "function"])
def test_a_selector_leaves_the_model_as_it_was(case, selector):
    model, batches, loss = case

    def last_types(model, grid, batches, loss):
        assert len(batches) == 2 and all(loss(batch).requires_grad for batch in batches)
        return torch.arange(grid.n_types).repeat(grid.n_layers, 1).double()

    before = state(part_frozen(model))
    chosen = last_types if selector == "function" else selector
    found = diffora.select(model, chosen, batches, loss=loss, k=1, n_batches=2)
    assert_same(before, state(model))
    assert [len(row) for row in found.selected] == [1] * len(found.modules)
    assert torch.tensor(found.scores).shape == (len(found.modules), len(found.types))
    assert len({value for row in found.scores for value in row}) > 1
    if selector == "function":
        assert all(row == [found.types[-1]] for row in found.selected)
        assert found.selector.endswith("last_types")


def test_gradient_and_activation_scores_follow_their_formulas():
    torch.manual_seed(0)
    model, batches = Net().eval(), pairs(8, n=2)
    scores = diffora.select(model, "gradient", batches, loss=entropy_loss).scores
    ((entropy_loss(model, batches[0]) + entropy_loss(model, batches[1])) / 2).backward()
    assert scores[1][1] == pytest.approx(model.blocks[1][3].weight.grad.norm().item(), rel=1e-5)
    scores = diffora.select(model, "activation", batches, loss=entropy_loss).scores
    x = model.norm(torch.cat([x for x, _ in batches]))
    wanted = (model.blocks[0][0].weight.abs() * x.square().mean(0).sqrt()).mean()
    assert scores[0][0] == pytest.approx(wanted.item(), rel=1e-5)


def test_padding_does_not_count_for_activation():
    torch.manual_seed(0)
    model, (batch,) = bert().eval(), texts(1)
    longer = {key: torch.cat([value, torch.zeros_like(value)], 1) for key, value in batch.items() if value.ndim == 2}
    longer["labels"] = batch["labels"]
    short, long = (diffora.select(model, "activation", [rows]).scores for rows in (batch, longer))
    assert torch.allclose(torch.tensor(short), torch.tensor(long), rtol=1e-5)
    longer["attention_mask"] = torch.ones_like(longer["attention_mask"])
    assert not torch.allclose(torch.tensor(short), torch.tensor(diffora.select(model, "activation", [longer]).scores))


SETTINGS = {"rounds": 1, "rank": 3, "alpha": 6.0, "lr": 1e-2, "gamma_lr": 0.01, "weight_decay": 0.0}
SETTINGS |= {"clip": None, "train_steps": 1, "relaxation": "softmax"}


@pytest.fixture
def bilevel():
    torch.manual_seed(0)
    model = Net().double()
    grid = find_grid(model)
    layers = core_attach(model, grid.names, torch.ones(3, 2, dtype=torch.bool), 3, None, alpha=6)
    for row in layers:
        for layer in row:
            nn.init.normal_(layer.lora_bt, std=0.2)
    model.double().eval().head.requires_grad_(True)
    return Bilevel(model, layers, list(model.head.parameters()), entropy_loss, SearchSettings(**SETTINGS))


def snapshot(bilevel):
    values = {name: p.detach().clone() for name, p in bilevel.model.named_parameters()}
    return values | {"gamma": bilevel.gamma.detach().clone()}


def changed(bilevel, before):
    return {name for name, value in snapshot(bilevel).items() if not value.equal(before[name])}


def test_each_step_changes_its_own_level_only(bilevel):
    batches = [(x.double(), y) for x, y in pairs(8)]
    before = snapshot(bilevel)
    bilevel.gamma_step(batches[0])
    assert changed(bilevel, before) == {"gamma"}
    assert all(p.grad is None for p in bilevel.model.parameters())
    before = snapshot(bilevel)
    bilevel.weight_step(batches[1])
    wanted = {name for name in before if "lora_" in name} | {"head.weight", "head.bias"}
    assert changed(bilevel, before) == wanted and len(wanted) == 14


def test_the_gradient_of_gamma_is_that_of_the_validation_loss(bilevel):
    """Finite differences in float64."""
    x, y = pairs(8)[0]
    batch = x.double(), y
    _, grad = bilevel.gamma_gradient(batch)
    eps = 1e-6
    with torch.no_grad():
        for i in range(3):
            for j in range(2):
                sides = []
                for shift in (eps, -eps):
                    gamma = bilevel.gamma.clone()
                    gamma[i, j] += shift
                    gates = torch.softmax(gamma, -1)
                    for row, values in zip(bilevel.layers, gates, strict=True):
                        for layer, gate in zip(row, values, strict=True):
                            layer.gate = gate
                    sides.append(entropy_loss(bilevel.model, batch))
                assert grad[i, j].item() == pytest.approx(((sides[0] - sides[1]) / (2 * eps)).item(), abs=1e-9)
    assert grad.abs().max() > 1e-4


def test_a_search_of_a_float64_model_is_in_float64():
    torch.manual_seed(0)
    batches = [(x.double(), y) for x, y in pairs(8)]
    found = diffora.search(Net().double(), batches[:3], batches[3:], loss=entropy_loss, rounds=1, progress=False)
    single = torch.tensor(found.gamma_bar, dtype=torch.float64)
    assert not single.float().double().equal(single)


@pytest.mark.parametrize("train_steps", [1, 2])
def test_the_same_batches_give_the_gates_of_a_runs_search(train_steps):
    """`diffora.search` and `SearchModule` on one small DeBERTa, with equal A, batches and settings."""
    task = small_task()
    valid, train = ([batch_of(4, seed=seed) for seed in seeds] for seeds in ((1, 2), (3, 4, 5, 6)))
    train = train[: 2 * train_steps]
    found = diffora.search(
        small_deberta(),
        train,
        valid,
        loss=lambda model, batch: task.loss(model(**task.inputs(batch)), batch),
        rounds=1,
        layer="deberta.encoder.layer.*",
        candidates=TYPES,
        rank=3,
        alpha=6,
        lr=1e-2,
        train_steps=train_steps,
        progress=False,
    )
    model = small_deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    torch.manual_seed(0)
    layers = core_attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), 3, None, alpha=6, freeze=False)
    settings = Search(epochs=1, batch_size=4, rank=3, lr=1e-2, clip=1.0, train_steps=train_steps)
    module = SearchModule(model, layers, TYPES, task, settings, seed=0).train()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    gamma_opt, weight_opt = module.configure_optimizers()
    for i, batch in enumerate(valid):
        group = train[i * train_steps : (i + 1) * train_steps]
        module.gamma_step(gamma_opt, batch, group[0])
        for part in group:
            module.weight_step(weight_opt, part)
    gates = module.gates(module.gamma.detach())
    assert gates.std() > 1e-4
    assert torch.allclose(torch.tensor(found.gamma_bar), gates, rtol=0, atol=1e-7)


def test_peft_puts_its_lora_on_exactly_the_selected_modules(case):
    from peft import get_peft_model

    model, batches, loss = case
    selection = diffora.select(model, "gradient", batches, loss=loss, k=1)
    config = selection.lora_config(rank=3, alpha=6, lora_dropout=0.1)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.1)
    wrapped = get_peft_model(model, config).base_model.model
    assert {name for name, m in wrapped.named_modules() if hasattr(m, "lora_A")} == set(selection.names())
    with pytest.raises(UserError, match=r"rank=0 must be .*\ntarget_modules is set by the selection"):
        selection.lora_config(rank=0, target_modules=["a"])


def test_attach_shares_pairs_among_the_others_and_freezes_the_rest(case):
    model, batches, loss = case
    selection = diffora.select(model, "gradient", batches, loss=loss, k=1)
    assert diffora.attach(model, selection, rank=4, shared_rank=2) is model
    layers = dict(lowrank_layers(model))
    assert layers.keys() == {name for row in selection.modules for name in row}
    chosen = set(selection.names())
    assert all(layer.rank == (4 if name in chosen else 2) for name, layer in layers.items())
    others: dict = {}
    for row in selection.modules:
        for name, kind in zip(row, selection.types, strict=True):
            if name not in chosen:
                others.setdefault(kind, set()).add(id(layers[name].lora_a))
    assert all(len(ids) == 1 for ids in others.values())
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    with pytest.raises(UserError, match="this model has adapters already"):
        diffora.search(model, batches, loss=loss)


def test_one_loader_is_divided_into_disjoint_halves(caplog):
    rows = TensorDataset(torch.arange(21.0).repeat(8, 1).T, torch.zeros(21, dtype=torch.long))
    seen: list = []

    def loss(model, batch):
        layer = model.blocks[0][0]
        seen.append((layer.split == 0, batch[0][:, 0].tolist()))
        return entropy_loss(model, batch)

    def search(seed):
        torch.manual_seed(0)
        seen.clear()
        loader = DataLoader(rows, batch_size=4, shuffle=True)
        return diffora.search(Net(), loader, loss=loss, rounds=2, seed=seed, progress=False)

    with caplog.at_level("INFO"):
        found = search(0)
    valid, train = ({row for is_valid, part in seen if is_valid == flag for row in part} for flag in (True, False))
    assert not valid & train and len(train) == 11 and valid <= set(range(21)) and len(valid) == 10
    assert "divided 21 rows at random: 11 for the weights, 10 for Γ (seed 0)" in caplog.text
    assert found.config["division"] in caplog.text
    assert search(0) == found
    first = list(seen)
    search(1)
    assert seen != first


@pytest.mark.parametrize("progress", [True, False])
def test_a_terminal_shows_progress_and_what_was_divided_unless_told_not_to(progress, capsys, monkeypatch):
    monkeypatch.setattr("diffora.standalone.progress.is_watched", lambda: True)
    # Without progress the lines are log messages, and logging may have been configured by an earlier test.
    monkeypatch.setattr(logging.getLogger("diffora"), "propagate", False)
    diffora.search(Net(), pairs(8), loss=entropy_loss, rounds=2, progress=progress)
    shown = capsys.readouterr().err
    wanted = ("divided 6 batches", "trained with the adapters: norm.weight", "6/6", "round=2/2", "started at 0.500")
    assert [text in shown for text in wanted] == [progress] * 5


def test_a_list_of_batches_is_divided_by_batches():
    found = diffora.search(Net(), pairs(8, n=5), loss=entropy_loss, rounds=1, progress=False)
    assert found.config["division"].startswith("divided 5 batches at random: 3 for the weights, 2 for Γ")


def test_scope_global_selects_as_many_modules_wherever_they_are():
    batches = pairs(8)
    found = diffora.select(Net(), "gradient", batches, loss=entropy_loss, k=1, scope="global")
    assert found.k is None and found.mask().sum() == 3 and found.config["scope"] == "global"
    scores = torch.tensor(found.scores)
    assert scores[found.mask()].min() > scores[~found.mask()].max()


def bad_loss(value):
    return lambda model, batch: value(entropy_loss(model, batch))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"k": 3}, r"k=3 must be a whole number from 1 to 2"),
        ({"k": 0, "rounds": 0, "lr": -1.0}, r"k=0 must .*\nrounds=0 must .*\nlr=-1.0 must"),
        ({"seed": "a"}, r"seed='a' must be a whole number of at least 0, at most 4,294,967,295"),
        ({"rank": 17}, r"^rank=17 must not be above 8, the smaller width of blocks\.0\."),
        ({"scope": "all"}, r"scope='all' must be one of layer, global"),
        ({"relaxation": "hard"}, r"relaxation='hard' must be one of softmax, scaled_softmax, sigmoid"),
        ({"head": "head"}, r"head='head' must be a list of names: head=\['head'\]$"),
        ({"candidates": "0"}, r"candidates='0' must be a list of names: candidates=\['0'\]$"),
        ({"layer": 3}, r"layer=3 must be the name of the layers"),
        ({"head": ["tail"]}, r"head: tail is not a module of this model"),
        (
            {"train_loader": "data", "loss": "ce"},
            r"^loss='ce' must be a function.*\ntrain_loader is a str: it must give",
        ),
        ({"train_loader": []}, r"loader of training batches has no batches"),
        ({"valid_loader": []}, r"loader of validation batches has no batches"),
        (
            {"train_loader": iter(pairs(8)), "rounds": 2},
            r"train_loader is a list_iterator, which can be read only once, and rounds=2",
        ),
        ({"train_loader": iter(pairs(8)), "valid_loader": None}, r"cannot be divided.*give two loaders"),
        ({"train_loader": pairs(8, n=1), "valid_loader": None}, r"1 batches cannot be divided: it needs at least 2"),
        ({"loss": None}, r"without loss=, batches must be dicts for model\(\*\*batch\); this one is a tuple"),
        ({"loss": bad_loss(lambda v: v.detach())}, r"validation batch of step 1 has no graph"),
        ({"loss": bad_loss(lambda v: v * float("nan"))}, r"validation batch of step 1 is nan; it must be a finite"),
        (
            {"loss": bad_loss(lambda v: v + (v - v).sqrt())},
            r"gradient of Γ of .*validation batch of step 1 is not finite",
        ),
        ({"loss": bad_loss(lambda v: v.expand(3))}, r"has the shape \(3,\)"),
        ({"loss": bad_loss(lambda v: v.item())}, r"is a float; it must be a finite scalar"),
        ({"loss": lambda model, batch: model.head.weight.sum()}, r"does not depend on any candidate module"),
    ],
)
def test_a_search_that_cannot_be_made_says_why_and_leaves_the_model(more, message):
    model = part_frozen(Net())
    before = state(model)
    arguments = {"train_loader": pairs(8), "valid_loader": pairs(8), "loss": entropy_loss, "rounds": 1} | more
    with pytest.raises(UserError, match=f"(?s){message}"):
        diffora.search(model, progress=False, **arguments)
    assert_same(before, state(model))


def changes_the_head(model, grid, batches, loss):
    model.head.weight.data.add_(1)
    return torch.rand(grid.n_layers, grid.n_types)


@pytest.mark.parametrize(
    ("selector", "more", "message"),
    [
        ("search", {}, r"selector='search' trains adapters: call diffora\.search"),
        ("one_shot", {}, r"selector='one_shot' trains adapters, .*: diffora select method\.selector=one_shot"),
        (
            "best",
            {"k": 9},
            r"k=9 must be .*\nselector='best' must be gradient, activation, .* alternate, or a function",
        ),
        ("gradient", {"loader": None}, r"selector=gradient needs a loader"),
        ("gradient", {"loader": []}, r"the loader has no batches"),
        ("gradient", {"loader": 5, "loss": 3}, r"^loader is a int: it must give batches .*\nloss=3 must be a function"),
        ("gradient", {"loss": bad_loss(lambda v: v * float("inf"))}, r"the loss of batch 1 is inf"),
        ("gradient", {"n_batches": 0}, r"n_batches=0 must be"),
        ("random", {"seed": -1}, r"seed=-1 must be a whole number of at least 0"),
        ("activation", {"loss": lambda model, batch: model.head.weight.sum()}, r"does not call blocks\.0\.0"),
        (changes_the_head, {}, r"selector=test_api.changes_the_head must leave the model.*changed head\.weight"),
        (lambda model, grid, batches, loss: 3, {}, r"must return a tensor of 3 x 2 finite numbers.*returned a int"),
        (lambda model: 3, {}, r"must be a function of \(model, grid, batches, loss\); it takes \(model\)"),
    ],
)
def test_a_selector_that_cannot_be_used_says_why(selector, more, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        diffora.select(Net(), selector, **{"loader": pairs(8), "loss": entropy_loss} | more)


def test_a_model_without_repeated_layers_is_refused():
    for call in (lambda m: diffora.search(m, pairs(8), loss=entropy_loss), lambda m: diffora.select(m, "random")):
        with pytest.raises(UserError, match="no numbered layers with linear modules: give their place as layer"):
            call(nn.Linear(8, 2))


def test_what_is_no_model_or_selection_is_refused():
    with pytest.raises(UserError, match="model is a str"):
        diffora.search("bert", pairs(8))
    with pytest.raises(UserError, match="selection is a str"):
        diffora.attach(bert(), "file.json", rank=2)


def test_a_rank_above_the_width_of_a_module_is_refused_before_the_model_changes():
    model = Net()
    before = state(model)
    with pytest.raises(UserError, match=r"(?s)^rank=999 must not be above \d+, .*shared_rank=999 must not be above"):
        diffora.attach(model, diffora.select(model, "random", k=1), rank=999, shared_rank=999)
    assert_same(before, state(model))


def test_a_model_with_pefts_adapters_is_refused():
    from peft import get_peft_model

    model = bert()
    wrapped = get_peft_model(model, diffora.select(model, "random", k=1).lora_config(rank=2))
    with pytest.raises(UserError, match=r"has adapters already, such as .*unload\(\)"):
        diffora.search(wrapped, texts())


def test_importing_diffora_imports_nothing_large_and_the_search_no_lightning():
    code = """
import sys
import diffora
assert not {"torch", "lightning", "transformers", "peft"} & sys.modules.keys()
assert set(diffora.__all__) <= set(dir(diffora))
diffora.search, diffora.select, diffora.attach, diffora.find_grid, diffora.Selection, diffora.UserError
assert not {"lightning", "hydra", "datasets", "peft", "omegaconf"} & sys.modules.keys(), sys.modules.keys()
diffora.load_adapter
assert callable(diffora.search)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        diffora.serach  # noqa: B018
