"""Options of the search beside [D]'s: a warm-up of the weights, read-outs, gates of mean 1, and an early end."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import TYPES, batch_of
from library import Net, entropy_loss, pairs
from small import small_task
from stopped_runs import SEARCH, run_of, stop
from torch.utils.data import DataLoader

import diffora
from diffora.core.attach import attach
from diffora.core.dam import relax
from diffora.core.grid import find_grid
from diffora.core.lowrank import set_gates
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.run.check import check
from diffora.scoring.bilevel import SearchModule
from diffora.settings.sections import Search

STEPS = 6
ROUNDS = 2


def build(deberta, dtype=torch.float32, **changes):
    model = deberta(dtype=dtype, dropout=0.0)
    grid = find_grid(model, "encoder.layer.*", TYPES)
    layers = attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), 3, None, alpha=6, freeze=False)
    torch.manual_seed(0)
    for row in layers:
        for layer in row:  # not zero, or the first gradients would be 0
            torch.nn.init.normal_(layer.lora_bt, std=0.2)
    model.to(dtype)
    settings = Search(**{"epochs": ROUNDS, "batch_size": 4, "rank": 3, "lr": 1e-2, "clip": None} | changes)
    return SearchModule(model, layers, TYPES, small_task(), settings, seed=0).to(dtype).train()


def batches():
    return [{"valid": batch_of(4, seed=i), "train": [batch_of(4, seed=100 + i)]} for i in range(STEPS)]


def fit(module, callbacks=()):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=ROUNDS, enable_model_summary=False, callbacks=list(callbacks), **quiet
    )
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    return trainer


class Watch(L.Callback):
    """Γ and one B after each step; before each step, minus the gradient by the gates, from the layers alone."""

    def __init__(self, gradients=False):
        self.gamma, self.weights, self.gradients, self.found = [], [], gradients, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.gradients:
            gates = relax(module.gamma.detach(), module.settings.relaxation).requires_grad_()
            set_gates(module.layers, gates)
            valid = batch["valid"]
            loss = module.task.loss(module.model(**module.task.inputs(valid)), valid)
            self.found.append(-torch.autograd.grad(loss, gates)[0])

    def on_train_batch_end(self, trainer, module, *_):
        self.gamma.append(module.gamma.detach().clone())
        self.weights.append(module.layers[0][0].lora_bt.detach().clone())


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_gamma_does_not_move_in_the_warm_up_and_the_weights_do(deberta, update):
    watch = Watch()
    trainer = fit(build(deberta, update=update, head_warmup=7), [watch])
    assert all(torch.equal(gamma, torch.zeros(2, 6)) for gamma in watch.gamma[:7])
    moved = [a for a, b in zip(watch.gamma[6:], watch.gamma[7:], strict=False) if not torch.equal(a, b)]
    assert len(moved) == ROUNDS * STEPS - 7
    assert all(not torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False))
    assert "search/valid_loss" in trainer.callback_metrics  # of the steps after the warm-up
    share = Watch()
    fit(build(deberta, update=update, head_warmup=7 / 12), [share])
    assert torch.equal(share.gamma[-1], watch.gamma[-1])


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
@pytest.mark.parametrize("warmup", [None, 3])
def test_early_gradients_are_those_of_the_gates_and_change_no_step(deberta, update, warmup):
    watch, plain = Watch(gradients=True), Watch()
    changes = {"update": update, "head_warmup": warmup, "accumulate": 2}
    module = build(deberta, torch.float64, readout="early_gradient", **changes)
    fit(module, [watch])
    first = warmup or 0
    third = (ROUNDS * STEPS - first) // 3
    expected = torch.stack(watch.found[first : first + third]).sum(0)
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(module.current_scores(), expected, rtol=1e-6, atol=1e-9)
    fit(build(deberta, torch.float64, **changes), [plain])
    assert torch.equal(plain.gamma[-1], watch.gamma[-1]) and torch.equal(plain.weights[-1], watch.weights[-1])


def test_a_checkpoint_holds_the_gradients_that_were_read(deberta):
    """Those of the first third of the steps; a search that is resumed after it reads no more."""
    module, again = (build(deberta, readout="early_gradient") for _ in range(2))
    fit(module)
    again.load_state(module.state())
    assert again.current_scores().abs().min() > 0 and torch.equal(again.current_scores(), module.current_scores())


def test_gradients_through_gates_of_mean_one_are_exact_in_both_orders(deberta):
    module = build(deberta, torch.float64, relaxation="scaled_softmax", order=2, lr=0.5)
    module.trainer = SimpleNamespace(world_size=1)
    with torch.no_grad():
        module.gamma.normal_()
    torch.testing.assert_close(module.gates(module.gamma).mean(-1), torch.ones(2).double())
    train, valid = batch_of(4, seed=1), batch_of(4, seed=2)
    weights = list(module.weights)

    def loss_at(step):
        before = [p.detach().clone() for p in weights]
        if step:
            grads = torch.autograd.grad(module.batch_loss(train, module.gamma.detach()), weights, allow_unused=True)
        with torch.no_grad():
            for p, grad in zip(weights, grads if step else [None] * len(weights), strict=True):
                if grad is not None:
                    p -= step * grad
            loss = module.batch_loss(valid, module.gamma).item()
            for p, old in zip(weights, before, strict=True):
                p.copy_(old)
        return loss

    def numeric(step, eps=1e-6):
        found = torch.zeros(12).double()
        flat = module.gamma.data.view(-1)
        for i in range(12):
            keep = flat[i].item()
            flat[i] = keep + eps
            up = loss_at(step)
            flat[i] = keep - eps
            found[i] = (up - loss_at(step)) / (2 * eps)
            flat[i] = keep
        return found.view(2, 6)

    (first,) = torch.autograd.grad(module.batch_loss(valid, module.gamma), [module.gamma])
    torch.testing.assert_close(first, numeric(0.0), rtol=1e-4, atol=1e-8)
    _, (second,) = module.unrolled_gradient(valid, train)
    torch.testing.assert_close(second, numeric(0.5), rtol=1e-4, atol=1e-8)
    assert (first - second).norm() > 0.05 * second.norm()


PATIENT = [*SEARCH, "search_only=true", "search.epochs=4", "search.patience=2", "search.head_warmup=2"]
PATIENT += ["search.gamma_lr=0.05"]


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patient") / "run"
    run_of(*PATIENT, folder=folder)
    return folder


def test_a_patient_search_ends_when_the_selection_has_not_changed(patient, tmp_path):
    whole = tmp_path / "whole"
    run_of(*PATIENT, "search.patience=null", folder=whole)
    long, short = (json.loads((folder / "trajectory.json").read_text()) for folder in (whole, patient))
    n = len(short["rounds"])
    assert short["rounds"] == long["rounds"][:n] and short["gamma_bar"] == long["gamma_bar"][:n]
    # A round has three steps, fewer than ten, so there is a check after each step from the end of the warm-up on.
    masks = [torch.tensor(gates).topk(3).indices.sort().values for gates in long["gamma_bar"]]
    ends = [i for i in range(5, len(masks)) if all(torch.equal(masks[j], masks[i]) for j in (i - 1, i - 2))]
    assert ends[0] == n - 1 < len(masks) - 1
    selection = Selection.load(patient / "selection.json")
    assert selection.rounds == short["rounds"][-1] < 4 == Selection.load(whole / "selection.json").rounds
    assert f"stopped after {selection.rounds:.3g} of 4 rounds" in (patient / "run.log").read_text()


def test_a_patient_search_that_was_stopped_goes_on_as_if_it_never_was(patient, tmp_path):
    folder = tmp_path / "run"
    stop(*PATIENT, folder=folder, module=SearchModule, epoch=1, batch=1)
    run_of(*PATIENT, "resume=true", folder=folder)
    for name in ("trajectory.json", "selection.json"):
        assert (folder / name).read_text() == (patient / name).read_text()


def test_a_finished_patient_search_is_not_continued(patient, tmp_path):
    """The run stops after the search has ended early, but before its files are written."""
    folder = tmp_path / "run"

    def crash(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffora.run.select._save", crash)
        with pytest.raises(KeyboardInterrupt):
            run_of(*PATIENT, folder=folder)
    run_of(*PATIENT, "resume=true", folder=folder)
    assert (folder / "trajectory.json").read_text() == (patient / "trajectory.json").read_text()


def test_a_run_says_what_its_modules_were_scored_by(cfg, tmp_path):
    folder = tmp_path / "run"
    run_of(*SEARCH, "search.readout=early_gradient", "search_only=true", folder=folder)
    found = Selection.load(folder / "selection.json")
    assert (found.readout, found.gamma_bar, found.rounds) == ("early_gradient", None, 2)
    scores = torch.tensor(found.scores)
    assert torch.equal(scores.topk(3).indices.sort().values, found.mask().nonzero()[:, 1].view(4, 3))
    figure = found.plot().figure
    assert "early gradient" in figure.axes[1].get_ylabel()
    with pytest.raises(UserError, match=r"search\.order=2 does not go with search\.readout=early_gradient"):
        check(cfg(*SEARCH, "search.readout=early_gradient", "search.order=2"))


def test_a_warm_up_that_leaves_no_step_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"search\.head_warmup=6 must be below 6, the steps of the search"):
        run_of(*SEARCH, "search.head_warmup=6", folder=tmp_path / "run")


def test_the_library_reads_early_gradients_and_stops_early():
    batches = pairs(8, n=24)
    found = {}
    for readout in ("gamma", "early_gradient"):
        model, settings = Net(), {"rounds": 4, "k": 1, "patience": 5, "head_warmup": 0.1, "readout": readout}
        found[readout] = diffora.search(
            model, batches[:12], batches[12:], loss=entropy_loss, progress=False, **settings
        )
    assert 0.4 + 0.5 < found["gamma"].rounds < 4 and found["early_gradient"].scores is not None
    assert found["gamma"].gamma_bar is not None and found["early_gradient"].gamma_bar is None
    assert found["early_gradient"].rounds >= 0.4 + 3.6 / 3  # all gradients are read


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"readout": "x"}, r"readout='x' must be one of gamma, early_gradient"),
        ({"patience": 0}, r"patience=0 must be a whole number of at least 1, or None"),
        ({"head_warmup": 2.5}, r"head_warmup=2.5 must be a number of steps, a share of all steps between 0 and 1"),
        ({"head_warmup": 6}, r"head_warmup=6 must be below 6, the steps of the search"),
        ({"readout": "early_gradient", "rounds": 1}, r"early_gradient needs more than 3 steps, and the search has 3"),
    ],
)
def test_the_library_refuses_what_cannot_be(arguments, problem):
    with pytest.raises(UserError, match=problem):
        diffora.search(
            Net(), pairs(8)[:3], pairs(8)[3:], loss=entropy_loss, progress=False, **{"rounds": 2} | arguments
        )


class WithoutLength:
    def __iter__(self):
        return iter(pairs(8)[:3])


def test_a_loader_without_a_length_allows_only_a_number_of_warm_up_steps():
    arguments = {"loss": entropy_loss, "rounds": 2, "k": 1, "progress": False}
    with pytest.raises(UserError, match="patience=2 needs a train_loader that has a length"):
        diffora.search(Net(), WithoutLength(), pairs(8)[3:], patience=2, **arguments)
    with pytest.raises(UserError, match="head_warmup=6 must be below 6"):
        diffora.search(Net(), WithoutLength(), pairs(8)[3:], head_warmup=6, **arguments)
    found = diffora.search(Net(), WithoutLength(), pairs(8)[3:], head_warmup=5, **arguments)
    assert torch.tensor(found.gamma_bar).std() > 0
