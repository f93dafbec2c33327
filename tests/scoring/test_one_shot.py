"""One-shot scores recover known worths; training and scoring use the deployed model; nothing else changes."""

import logging
from itertools import chain

import lightning as L
import numpy as np
import pytest
import torch
from conftest import TYPES, batch_of
from small import rows_of, small_task
from stopped_runs import SEARCH, assert_equal_runs, run_of, stop
from torch import nn
from torch.utils.data import DataLoader

from diffora.core.attach import attach, detach
from diffora.core.dam import discretise, discretise_globally
from diffora.core.ensemble import member_seed
from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.loop import streams
from diffora.loop.data import SearchData
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.scoring import one_shot
from diffora.scoring.one_shot import CHUNK, Draws, OneShotData, OneShotModule, scored_rows
from diffora.settings.sections import Search

SETTINGS = {"epochs": 1, "batch_size": 4, "rank": 3, "lr": 1e-2, "clip": None, "masks": 40}


def chooser(grid, k=3, rank=None):
    def choose(scores):
        mask = discretise(scores.masked_fill(~grid.present, float("nan")), k)
        return Selection.from_mask(grid, mask, method="test", rho=0.5, seed=0, rank=rank)

    return choose


class Steps:
    """In place of `SearchData`: batches of training, given by their seeds."""

    num_workers = 0

    def __init__(self, train, make=batch_of):
        self.items = [{"valid": make(4, seed=99), "train": [make(4, seed=t)]} for t in train]

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=None)


@pytest.fixture
def make(deberta):
    def build(dtype=torch.float64, rounds=2, valid=(1, 2), dropout=0.0, deployed=3, kernel="fused", **changes):
        model = deberta(dtype=dtype, dropout=dropout)
        grid = find_grid(model, "encoder.layer.*", TYPES)
        torch.manual_seed(0)
        everything = torch.ones(2, 6, dtype=torch.bool)
        layers = attach(model, grid.names, everything, 3, None, alpha=6, freeze=False, kernel=kernel)
        model.to(dtype)
        settings = Search(**SETTINGS | changes)
        draws = Draws(chooser(grid), (2, 6), 3, deployed, seed=0)
        arguments = model, layers, TYPES, small_task(), settings, 0
        batches = [batch_of(4, seed=v) for v in valid]
        module = OneShotModule(*arguments, draws=draws, rounds=rounds, rows=lambda: batches).to(dtype)
        module.grid = grid
        return module

    return build


def fit(module, data=None, epochs=None, **options):
    precision = {"precision": "64-true"} if module.gamma.dtype == torch.float64 else {}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=module.rounds + module.parts if epochs is None else epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        **precision | options,
    )
    trainer.fit(module, datamodule=OneShotData(data or Steps((3, 4)), module.rounds, module.settings.masks))
    return module


def weights(module):
    return [p.detach().clone() for p in module.weights]


# --- known worths ---


class Parallel(nn.Module):
    """A grid of 3 x 4 linear modules with separate inputs and outputs; their frozen weights are 0."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({t: nn.Linear(4, 4) for t in "abcd"}) for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(()))  # of the head
        for layer in self.layers:
            for module in layer.values():
                nn.init.zeros_(module.weight).requires_grad_(False)
                nn.init.zeros_(module.bias).requires_grad_(False)

    def forward(self, x):  # (rows, 12, 4)
        modules = [module for layer in self.layers for module in layer.values()]
        return torch.stack([module(x[:, i]) for i, module in enumerate(modules)], 1) + self.bias


class Worth:
    """A task whose loss is a sum over modules. Without its adapter, a module adds what `of` says; with it, about 0."""

    factors = torch.tensor([[4.0, 1.0, 2.0, 3.0], [0.5, 2.5, 0.1, 1.5], [3.5, 0.0, 4.5, 2.2]])
    targets = torch.randn(12, 4, 1, generator=torch.Generator().manual_seed(5))

    def inputs(self, batch):
        return {"x": batch["x"]}

    def weight(self, batch):
        return float(len(batch["row"]))

    def loss(self, output, batch):
        return self.parts(output, batch["x"]).sum()

    def parts(self, output, x):
        """The part of each of the 12 modules in the mean loss of the rows."""
        wanted = x.mean(-1, keepdim=True) * 2 * (self.targets / self.targets.norm(dim=1, keepdim=True)).squeeze(-1)
        return (output - wanted).square().sum(-1).mean(0) * self.factors.flatten()

    def of(self, batch):
        """L x N, what each module is worth on these rows."""
        return self.parts(torch.zeros_like(batch["x"]), batch["x"]).view(3, 4)


def rows(n, seed):
    x = torch.randn(n, 12, 4, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "row": torch.arange(n)}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_it_recovers_the_order_of_modules_whose_worths_are_known_and_add_up(scope):
    torch.manual_seed(0)
    model = Parallel()
    grid = find_grid(model, "layers.*", ["a", "b", "c", "d"])
    layers = attach(model, grid.names, torch.ones(3, 4, dtype=torch.bool), 2, None, alpha=2, freeze=False)

    def choose(scores):
        mask = discretise(scores, 2) if scope == "layer" else discretise_globally(scores, 6)
        return Selection.from_mask(grid, mask, method="test", rho=0.5, seed=0)

    settings = Search(epochs=4, batch_size=16, rank=2, lr=0.05, clip=None, masks=80)
    draws = Draws(choose, (3, 4), 2, 2, seed=0)
    task, valid = Worth(), [rows(64, seed) for seed in (101, 102)]
    module = OneShotModule(model, layers, "abcd", task, settings, 0, draws=draws, rounds=4, rows=lambda: valid)
    fit(module, Steps(range(60), lambda n, seed: rows(16, seed)))
    found = module.fitted()
    effects = torch.from_numpy(found.effects).view(3, 4).float()
    worth = torch.stack([task.of(batch) for batch in valid]).mean(0)
    # With scope=layer each layer has two modules in every selection, so which layer is better cannot be seen.
    worth = worth - (worth.mean(-1, keepdim=True) if scope == "layer" else worth.mean())
    assert found.r2 > 0.95
    torch.testing.assert_close(effects, worth, rtol=0.05, atol=0.05)
    assert torch.equal(discretise(effects, 2), discretise(worth, 2))


# --- gates ---


@pytest.mark.parametrize("kernel", ["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_with_gate_zero_adds_exactly_nothing_and_gets_exactly_no_gradient(make, kernel, dtype):
    module = make(dtype, kernel=kernel)
    for row in module.layers:
        for layer in row:
            nn.init.normal_(layer.lora_bt, std=0.5)
    gates = module.draws.gates(1)
    off = [
        x for row, values in zip(module.layers, gates, strict=True) for x, g in zip(row, values, strict=True) if not g
    ]
    on = [x for row in module.layers for x in row if x not in off]
    batch = batch_of(4)
    loss = module.batch_loss(batch, gates)
    zero = torch.autograd.grad(loss, [p for x in off for p in (x.lora_a, x.lora_bt)], retain_graph=True)
    some = torch.autograd.grad(loss, [p for x in on for p in (x.lora_a, x.lora_bt)])
    assert len(off) == 6 and all(not g.any() for g in zero) and all(g.any() for g in some)
    for layer in off:  # whatever is in a module that is off
        nn.init.normal_(layer.lora_a, std=9.0)
    assert torch.equal(module.batch_loss(batch, gates), loss)


def test_a_step_moves_the_head_and_the_selected_modules_only(make):
    """Also after steps of other modules: neither momentum nor weight decay moves what is off."""
    module = make(weight_decay=0.5, masks=10)
    fit(module, epochs=1)
    optimizer = module.optimizers(use_pl_optimizer=False)[1]
    moved = set()
    for number in range(6):
        gates, before = module.draws.gates(5, number), weights(module)
        module.selection_step(optimizer, batch_of(4, seed=number), gates)
        changed = {i for i, (a, b) in enumerate(zip(before, weights(module), strict=True)) if not torch.equal(a, b)}
        on = {i for i, gate in enumerate(gates.flatten().tolist()) if gate}
        pairs = 2 * len(gates.flatten())
        assert {i // 2 for i in changed if i < pairs} == on
        assert {i for i in changed if i >= pairs} == set(range(pairs, len(before)))
        moved |= on
    assert moved == set(range(12))


def test_draws_are_random_selections_of_the_methods_size(make):
    draws = make().draws
    drawn = torch.stack([draws.gates(7, i) for i in range(400)])
    assert torch.equal(drawn[3], draws.gates(7, 3)) and not torch.equal(drawn[3], drawn[4])
    assert set(drawn.flatten().tolist()) == {0.0, 1.0} and (drawn.sum(-1) == 3).all()
    assert (drawn.mean(0) - 0.5).abs().max() < 4 * 0.5 / 20  # each module as often as the others
    other = Draws(draws.choose, draws.shape, 3, 3, seed=1)
    assert not torch.equal(other.gates(7, 3), drawn[3])


@pytest.mark.parametrize(("deployed", "chosen"), [(3, None), (6, None), (3, 2)])
def test_the_score_of_a_selection_is_the_loss_of_the_deployed_model(make, deployed, chosen):
    """With its own alpha / rank, and no module where none is selected, as fine-tuning would make it."""
    module = make(deployed=deployed)
    for row in module.layers:
        for layer in row:
            nn.init.normal_(layer.lora_bt, std=0.5)
    module.draws = Draws(chooser(module.grid, rank=chosen), (2, 6), 3, deployed, seed=0)
    gates = module.draws.gates(1)
    module.model.eval()
    total, terms = module.score(gates).tolist()

    model, old = module.model, list(chain(*module.layers))
    detach(model)
    alpha = 3 * 6 / (chosen or deployed)  # an adapter of rank 3 then has the scale 6 / the deployed rank
    new = attach(model, module.grid.names, gates > 0, 3, None, alpha, freeze=False)
    for layer, trained in zip(chain(*new), old, strict=True):
        if layer is not None:
            layer.lora_a, layer.lora_bt = trained.lora_a, trained.lora_bt
    batches = [batch_of(4, seed=1), batch_of(4, seed=2)]
    with torch.no_grad():
        losses = [module.task.loss(model(**module.task.inputs(b)), b).item() for b in batches]
    assert terms == 8 and total == pytest.approx(4 * sum(losses), rel=1e-6)


# --- the stage ---


def test_scores_come_from_validation_rows_and_weights_from_training_rows(make):
    base, other_valid = fit(make()), fit(make(valid=(5, 6)))
    other_train = fit(make(), Steps((5, 6)))
    assert all(torch.equal(a, b) for a, b in zip(weights(base), weights(other_valid), strict=True))
    assert base.losses != other_valid.losses and len(base.losses) == 40
    assert not all(torch.equal(a, b) for a, b in zip(weights(base), weights(other_train), strict=True))
    assert fit(make()).losses == base.losses  # and nothing else


def test_scoring_changes_nothing_and_is_without_dropout(make):
    torch.manual_seed(0)
    trained, scored = fit(make(dropout=0.3), epochs=2), fit(make(dropout=0.3))
    assert trained.losses == [] and len(scored.losses) == 40
    assert all(torch.equal(a, b) for a, b in zip(weights(trained), weights(scored), strict=True))
    assert all(p.grad is None for p in scored.parameters()) and not scored.model.training
    total, terms = scored.score(scored.draws.gates(streams.ONE_SHOT_SCORE, 33))
    assert scored.losses[33] == (total / terms).item()


def test_bfloat16_scores_are_close_to_full_precision(make):
    half, full = fit(make(torch.float32), precision="bf16-mixed"), fit(make(torch.float32))
    assert half.losses != full.losses
    np.testing.assert_allclose(half.losses, full.losses, rtol=0.02)


def test_float16_takes_steps_with_a_loss_scale(make):
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    half = fit(make(torch.float32), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    np.testing.assert_allclose(half.losses, fit(make(torch.float32)).losses, rtol=0.02)


def test_a_loss_that_is_not_finite_is_an_error(make):
    module = make(rounds=1)
    module._batches  # noqa: B018
    module.task.loss = lambda output, batch: output.logits.sum() * (float("nan") if not module._trains else 1.0)
    with pytest.raises(RuntimeError, match="not finite in epoch 2"):
        fit(module)


def test_a_grid_with_missing_modules_has_no_score_there(make):
    module = make()
    present = torch.ones(2, 6, dtype=torch.bool)
    present[1, 2] = False
    module.layers = [
        [x if t else None for x, t in zip(*r, strict=True)] for r in zip(module.layers, present, strict=True)
    ]
    drawn = torch.stack([module.draws.gates(streams.ONE_SHOT_SCORE, n) for n in range(40)]) > 0
    module.losses = (drawn[:, 0, 1].double() * -2.0 + 5).tolist()
    effects = module.fitted().effects
    assert len(effects) == 11 and effects.argmax() == 1
    assert effects[1] - np.delete(effects[:6], 1).max() == pytest.approx(2, rel=0.01)


def test_rows_to_score_are_search_valid_rows_and_the_batches_of_training_are_not():
    split = np.arange(0, 48, 2), np.arange(1, 48, 2)
    few, all_ = scored_rows(split[1], 16, 0), scored_rows(split[1], 999, 0)
    assert len(set(few)) == 16 and set(few) <= set(split[1]) and np.array_equal(all_, split[1])
    assert not np.array_equal(few, scored_rows(split[1], 16, 1))
    data = SearchData(rows_of(), (lambda rows: rows, lambda rows: rows), split, batch_size=8, seed=0)
    used = {row for item in data.train_dataloader() for rows in item["train"] for row in rows["row"]}
    assert used == set(split[0])


# --- runs ---

RUN = [*SEARCH, "method.selector=one_shot", f"search.masks={CHUNK + 8}", "method.score_batches=2"]


@pytest.mark.parametrize(("epoch", "batch"), [(1, 1), (3, 2)], ids=["in training", "in scoring"])
def test_a_resumed_run_gives_the_same_result(tmp_path, epoch, batch):
    whole = run_of(*RUN, folder=tmp_path / "whole")
    stop(*RUN, folder=tmp_path / "part", module=OneShotModule, epoch=epoch, batch=batch)
    resumed = run_of(*RUN, "resume=true", folder=tmp_path / "part")
    assert resumed.selection == whole.selection
    assert_equal_runs(resumed, whole)


def test_a_run_scores_on_rows_for_gamma_keeps_its_facts_and_leaves_the_model_as_it_was(
    tmp_path, cfg, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    given, splits, data_of = [], [], one_shot.search_data
    monkeypatch.setattr(one_shot, "scored_rows", lambda valid, *more: given.append(valid) or scored_rows(valid, *more))
    monkeypatch.setattr(one_shot, "search_data", lambda c, *more: splits.append(c.split) or data_of(c, *more))
    small = [*RUN, "search.masks=12", "search.lr=1e-9"]
    result = run(cfg(*small), tmp_path / "run")
    (scored,), ((train, valid),) = given, splits
    assert np.array_equal(scored, valid) and len(set(scored)) == 24 and not set(scored) & set(train)
    selection = Selection.load(tmp_path / "run/selection.json")
    facts = selection.facts
    assert selection == result.selection and result.record["selection"]["facts"] == facts
    assert (facts["masks"], facts["rows"], selection.selector, selection.k) == (12, 16, "one_shot", 3)
    assert torch.equal(discretise(torch.tensor(selection.scores), 3), selection.mask())
    assert result.record["time"]["search_s"] > 0
    assert "12 random selections scored on 16 rows" in caplog.text
    again = run(cfg(*RUN, f"method.selection={tmp_path / 'run/selection.json'}"), tmp_path / "again")
    assert again.record["history"] == result.record["history"]


def test_warm_start_takes_the_trained_pairs(tmp_path, cfg):
    small = [*RUN, "search.masks=10", "method.warm_start=true", "search_only=true"]
    result = run(cfg(*small), tmp_path / "run")
    assert (result.folder / "selection.safetensors").stat().st_size > 0


@pytest.mark.slow
def test_the_facts_of_an_ensemble_are_means_over_its_members(tmp_path, cfg):
    small = [*RUN, "search.epochs=1", "search.masks=10", "search_only=true"]
    seeds = [0, member_seed(0, 1)]
    single = [run(cfg(*small, f"seed={seed}"), tmp_path / f"{seed}").selection.facts for seed in seeds]
    facts = run(cfg(*small, "search.ensemble=2"), tmp_path / "both").selection.facts
    assert single[0] != single[1]
    assert facts == {name: pytest.approx((single[0][name] + single[1][name]) / 2, rel=1e-6) for name in single[0]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["rho=1.0"], "rho=1.0 allows only one"),
        (["rho=0.1"], "rho=0.1 allows only one"),
        (["method.scope=global", "method.budget=9M"], "method.budget=9M allows only one"),
    ],
)
def test_a_size_with_only_one_selection_is_refused_before_any_training(given, words, tmp_path, cfg):
    with pytest.raises(UserError, match=words):
        run(cfg(*RUN, *given), tmp_path / "run")
    assert not (tmp_path / "run/selection.json").exists()


def test_too_few_selections_are_refused(cfg):
    with pytest.raises(UserError, match=r"search\.masks=5 must be"):
        check(cfg(*RUN, "search.masks=5"))
