import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import datasets
import ddp_finetune
import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TYPES, batch_of
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from small import rows_of, small_task
from torch.utils.data import DataLoader

from diffora.backbones.backbone import Backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.loop.plan import plan_of
from diffora.loop.splits import held_out_split
from diffora.loop.stage import NonFiniteLoss, Stage, rng_state
from diffora.methods.base import Adaptation
from diffora.methods.lowrank import LowRankAdaptation
from diffora.settings.sections import FineTune
from diffora.tasks.base import Split
from diffora.training.finetune import FineTuneModule, _each_row_once
from diffora.training.stage import _module
from diffora.training.updates import measures


def accuracy(logits, labels):
    return {"accuracy": (logits.argmax(-1) == labels).float().mean().item()}


def module_of(deberta, dropout=0.0, adaptation=None, **changes):
    model = deberta(dropout=dropout)
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), 2, None, alpha=4, dropout=dropout, freeze=False)
    adaptation = (adaptation or LowRankAdaptation)(model)
    settings = FineTune(**{"epochs": 4, "batch_size": 8, "lr": 1e-3, "warmup_steps": 4, "early_stop": None} | changes)
    halves = np.arange(0, 24, 2), np.arange(1, 24, 2)
    split = Split(rows_of(24), rows_of(24))
    validation = {"validation": split}
    return FineTuneModule(adaptation, small_task(), split, validation, halves, settings, 0, lambda: plan_of(5, 2))


def fit(module, epochs=2, sizes=(8,) * 5, **extra):
    train = [batch_of(n, seed=i) | {"row": torch.arange(8 * i, 8 * i + n)} for i, n in enumerate(sizes)]
    module.make_plan = lambda: plan_of(-(-5 // extra.get("accumulate_grad_batches", 1)), epochs)
    rows = batch_of(24, seed=99)
    order = torch.randperm(24)  # rows arrive in any order
    valid = [{key: value[part] for key, value in rows.items()} for part in order.split(7)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"logger": False} | extra),
    )
    trainer.fit(module, DataLoader(train, batch_size=None), DataLoader(valid, batch_size=None))
    return rows


def test_history_scores_the_split_and_its_halves_for_any_order_of_rows(deberta):
    module = module_of(deberta)
    rows = fit(module)
    module.eval()
    with torch.no_grad():
        logits = module.model(**module.task.inputs(rows)).logits
    last = module.history[-1]
    assert last["validation/accuracy"] == pytest.approx(accuracy(logits, rows["labels"])["accuracy"])
    for part, indices in zip(("choice", "held_out"), module.halves, strict=True):
        assert last[f"{part}/accuracy"] == pytest.approx(accuracy(logits[indices], rows["labels"][indices])["accuracy"])
    assert last["validation/loss"] == pytest.approx(F.cross_entropy(logits, rows["labels"]).item(), rel=1e-5)


def test_best_state_is_the_best_epochs_weights(deberta):
    module = module_of(deberta, lr=0.05)
    states = []

    class Keep(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            states.append(pl_module.trainable_state())

    fit(module, epochs=6, callbacks=[Keep()])
    scores = [scores["validation/accuracy"] for scores in module.history]
    assert len(set(scores)) > 1
    best = scores.index(max(scores))
    assert module.best_epoch == best
    assert all(torch.equal(module.best_state[n], states[best][n]) for n in states[best])
    module.load_trainable(module.best_state)
    assert all(torch.equal(module.trainable_state()[n], states[best][n]) for n in states[best])


def test_training_scores_count_each_row_once_if_an_evaluation_comes_after_several_epochs(deberta, monkeypatch):
    module, scored = module_of(deberta), []
    score = module.task.score

    def noted(outputs, split):
        scored.append(outputs["row"].tolist())
        return score(outputs, split)

    module.task.score = noted
    monkeypatch.setattr("test_finetune.plan_of", partial(plan_of, every=10))
    fit(module, epochs=4)
    assert len(module.history) == 2 and [rows for rows in scored if len(rows) > 24] == [list(range(40))] * 2


def history(*pairs):
    return [
        {"epoch": i + 1.0, "train/loss": 1.0, "validation/accuracy": v, "validation/loss": 1.0, "choice/accuracy": c,
         "held_out/accuracy": h}
        for i, (v, c, h) in enumerate(pairs)
    ]  # fmt: skip


def test_held_out_is_scored_at_the_epoch_that_the_other_half_chose(deberta):
    module = module_of(deberta)
    module.history = history((0.5, 0.5, 0.5), (0.9, 0.85, 0.95), (0.85, 0.9, 0.8))
    results = module.results()
    assert results["validation/accuracy"] == 0.9 and results["best_epoch"] == 2
    assert results["held_out/accuracy"] == 0.8 and results["held_out/epoch"] == 3  # and not at its own best epoch
    assert results["last/accuracy"] == 0.85


def test_the_first_of_equal_epochs_is_the_best(deberta):
    module = module_of(deberta)
    module.history = history((0.7, 0, 0), (0.8, 0, 0), (0.8, 0, 0))
    assert module.best_epoch == 1


def test_an_epoch_without_a_finite_metric_is_not_the_best(deberta):
    module = module_of(deberta)
    module.history = history((math.nan, math.nan, 0), (0.6, 0.6, 0.1), (0.5, math.nan, 0))
    assert module.best_epoch == module.held_out_epoch == 1


def test_early_stop_counts_epochs_without_a_new_best(deberta):
    module = module_of(deberta, early_stop=2)
    for values, stalled in (((0.5,), False), ((0.5, 0.5), False), ((0.5, 0.5, 0.5), True), ((0.5, 0.4, 0.6), False)):
        module.history = history(*((v, 0, 0) for v in values))
        assert module.stalled is stalled


def test_early_stop_ends_the_run(deberta):
    module = module_of(deberta, early_stop=2, lr=1e-12)  # nothing moves, so nothing improves
    fit(module, epochs=9)
    assert len(module.history) == 3


def test_rate_warms_up_and_decays_to_zero(deberta):
    module, rates = module_of(deberta, warmup_steps=4), []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(module, epochs=4, callbacks=[Keep()])
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:] == pytest.approx([1e-3 * (20 - s) / 16 for s in range(4, 20)])


def float16():
    """The plugin that Lightning makes for 16-mixed on a GPU. On a CPU it would silently use bfloat16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_gradients_are_clipped(deberta, precision):
    module, norms = module_of(deberta), []
    clip = module.configure_gradient_clipping

    def norm():
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm().item()

    def watched(*args, **kwargs):
        before = norm()
        clip(*args, **kwargs)
        norms.append((before, norm()))

    module.configure_gradient_clipping = watched
    how = {"plugins": [float16()]} if precision == "16-mixed" else {"precision": precision}
    fit(module, epochs=1, gradient_clip_val=0.01, **how)
    assert module.trainer.precision == precision
    assert len(norms) == 5 and all(0.02 < before < 100 for before, _ in norms)
    assert max(after for _, after in norms) <= 0.01 * 1.001


def test_dropout_is_on_in_training_and_off_in_evaluation(deberta):
    """A model from `from_pretrained` is in eval mode, and Lightning leaves modes alone."""
    module = module_of(deberta, dropout=0.3)
    module.eval()
    modes = {"train": set(), "eval": set()}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            modes["train"] |= {m.training for m in pl_module.modules()}

        def on_validation_batch_start(self, trainer, pl_module, *args):
            modes["eval"] |= {m.training for m in pl_module.modules()}

    fit(module, callbacks=[Look()])
    assert modes == {"train": {True}, "eval": {False}}


def test_a_loss_that_is_not_finite_stops_the_run(deberta):
    module = module_of(deberta, lr=1e30)
    with pytest.raises(NonFiniteLoss, match="epoch 1"):
        fit(module)


def test_weights_that_are_not_finite_after_the_last_step_stop_the_run(deberta):
    """The training losses do not show it, and predictions from NaN would count as class 0."""
    module = module_of(deberta, warmup_steps=0)

    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                with torch.no_grad():
                    next(p for p in pl_module.parameters() if p.requires_grad).fill_(torch.nan)

    with pytest.raises(NonFiniteLoss, match="the validation loss is not finite in epoch 1"):
        fit(module, callbacks=[Spoil()])
    assert not module.history


def test_checkpoints_hold_trainable_weights_only(deberta):
    module = module_of(deberta)
    fit(module, epochs=1)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert not any(".base." in name or "embeddings" in name for name in checkpoint["state_dict"])


class Noted(LowRankAdaptation):
    """Records all calls of the training loop, and adds a constant to the loss."""

    def __init__(self, model):
        super().__init__(model)
        self.calls = []

    def begin(self, total_steps):
        self.calls.append(("begin", total_steps))

    def before_step(self, step, epoch):
        self.calls.append(("before", step, epoch))

    def penalty(self):
        return torch.tensor(100.0)

    def after_backward(self):
        self.calls.append(("backward",))

    def after_step(self, step, lr):
        gradients = [p.grad for p in self.model.parameters() if p.requires_grad]
        assert all(g is not None for g in gradients)
        self.calls.append(("after", step, lr))


def test_a_methods_hooks_are_called_once_per_step(deberta):
    module = module_of(deberta, adaptation=Noted)
    fit(module, epochs=2, accumulate_grad_batches=2)
    # 5 batches an epoch, two to a step: 3 steps an epoch
    assert module.adaptation.calls[0] == ("begin", 6)
    names = [call[0] for call in module.adaptation.calls[1:]]
    assert names == ["before", "backward", "after"] * 6
    assert [call[1:] for call in module.adaptation.calls if call[0] == "before"] == [(s, s // 3) for s in range(6)]
    rates = [call[1:] for call in module.adaptation.calls if call[0] == "after"]
    factors = [0.25, 0.5, 0.75, 1.0, 1.0, 0.5]  # four steps of warm-up, then down over two
    assert [step for step, _ in rates] == list(range(6))
    assert [rate for _, rate in rates] == pytest.approx([1e-3 * f for f in factors])


def test_what_a_method_adds_to_the_loss_is_not_reported_as_loss(deberta):
    module, plain = module_of(deberta, adaptation=Noted), module_of(deberta)
    fit(module)
    fit(plain)
    for ours, theirs in zip(module.history, plain.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)  # validation rows come in another order, which rounds otherwise
    assert max(scores["validation/loss"] for scores in module.history) < 10


@pytest.mark.parametrize("maximise", [True, False])
def test_training_metric_gap_and_measures_of_each_epoch(deberta, maximise):
    module = module_of(deberta, lr=0.0)  # nothing moves: the training metric is that of the model as it is
    module.task.maximise = maximise
    with torch.no_grad():
        for _, layer in lowrank_layers(module.model):
            layer.lora_bt.normal_(std=0.1)
    fit(module, epochs=1)
    batches = [batch_of(8, seed=i) for i in range(5)]
    with torch.no_grad():
        logits = torch.cat([module.model(**module.task.inputs(batch)).logits for batch in batches])
    expected = accuracy(logits, torch.cat([batch["labels"] for batch in batches]))["accuracy"]
    scores = module.history[0]
    assert scores["train/accuracy"] == pytest.approx(expected)
    gap = expected - scores["validation/accuracy"]
    assert gap and scores["generalisation_gap"] == pytest.approx(gap if maximise else -gap)
    deltas = [layer.delta().detach().double() for _, layer in lowrank_layers(module.model)]
    assert scores["update/rank"] == 2
    losses = [(d @ d.T - torch.eye(len(d), dtype=d.dtype)).square().sum().item() for d in deltas]
    assert scores["update/orthogonality_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    spectra = [np.linalg.svd(d.numpy(), compute_uv=False)[:2] for d in deltas]
    ranks, medians = zip(*[((s**2).sum() / s[0] ** 2, np.median(s / s[0])) for s in spectra], strict=True)
    assert scores["update/stable_rank"] == pytest.approx(np.mean(ranks), rel=1e-5)
    assert scores["update/median_sigma"] == pytest.approx(np.mean(medians), rel=1e-4)
    assert module.results()["update/rank"] == 2 and "generalisation_gap" in module.results()


def test_the_orthogonality_loss_of_an_update_that_is_not_square_is_that_of_its_outputs():
    lora_a, lora_bt = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)

    class Wide(Adaptation):
        def pairs(self):
            yield "wide", lora_a, lora_bt, 0.5

    update = 0.5 * lora_bt.T @ lora_a  # (out, in) = (4, 7)
    expected = (update @ update.T - torch.eye(4, dtype=torch.float64)).square().sum()
    found = measures(Wide(torch.nn.Linear(7, 4)))
    assert found["update/orthogonality_loss"] == pytest.approx(expected.item()) and found["update/rank"] == 2


def test_the_training_loss_of_an_epoch_is_the_mean_over_its_steps(deberta):
    module, sizes = module_of(deberta, lr=0.0), (8, 8, 8, 8, 2)
    fit(module, epochs=1, sizes=sizes)
    batches = [batch_of(n, seed=i) for i, n in enumerate(sizes)]
    with torch.no_grad():
        losses = [F.cross_entropy(module.model(**module.task.inputs(b)).logits, b["labels"]).item() for b in batches]
    assert module.history[0]["train/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert abs(np.mean(losses) - np.average(losses, weights=sizes)) > 1e-3


def test_of_a_repeated_row_training_keeps_the_last_output_and_evaluation_the_first():
    outputs = {"row": torch.tensor([0, 0, 1, 2, 2]), "seen": torch.arange(5)}
    assert _each_row_once(outputs, last=True)["seen"].tolist() == [1, 2, 4]
    assert _each_row_once(outputs)["seen"].tolist() == [0, 2, 3]


@pytest.mark.parametrize("cut", [[2, 4], [1, 4], [3, 4]])
def test_parts_of_a_batch_are_weighted_by_their_tokens(cut):
    """In the four rows of each batch, 8, 1, 5 and 0 tokens count, so all parts have different weights."""
    torch.set_num_threads(1)
    whole = [ddp_finetune.batch(i) for i in range(3)]
    parts = [ddp_finetune.some(b, slice(start, end)) for b in whole for start, end in zip([0, *cut], cut, strict=False)]
    at_once = ddp_finetune.gradients(whole)
    torch.testing.assert_close(ddp_finetune.gradients(parts, accumulate_grad_batches=2), at_once, rtol=1e-9, atol=1e-12)


def test_a_part_without_counted_tokens_has_no_effect():
    torch.set_num_threads(1)
    whole = [ddp_finetune.batch(i) for i in range(3)]
    parts = [ddp_finetune.some(b, rows) for b in whole for rows in (slice(3, 4), slice(0, 3))]
    found, at_once = ddp_finetune.gradients(parts, accumulate_grad_batches=2), ddp_finetune.gradients(whole)
    torch.testing.assert_close(found, at_once, rtol=1e-9, atol=1e-12)


def test_the_last_step_of_an_epoch_with_fewer_parts_is_also_a_mean():
    torch.set_num_threads(1)
    whole = [ddp_finetune.batch(i) for i in range(2)]
    parts = [ddp_finetune.some(whole[0], rows) for rows in (slice(0, 2), slice(2, 4))] + [whole[1]]
    found, at_once = ddp_finetune.gradients(parts, accumulate_grad_batches=2), ddp_finetune.gradients(whole)
    torch.testing.assert_close(found, at_once, rtol=1e-9, atol=1e-12)


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    """Under DDP, and with the frozen weights divided between the two (FSDP).

    Their rows have 8 + 5 and 1 + 0 tokens. The mean is over all tokens, with and without division into parts.
    """
    torch.set_num_threads(1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [*launch, ddp_finetune.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    one = ddp_finetune.gradients([ddp_finetune.batch(i) for i in range(ddp_finetune.STEPS)])
    for name in ("strategy-1", "strategy-2", "fsdp-1", "fsdp-2"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert torch.equal(first, second)
        torch.testing.assert_close(first, one, rtol=1e-9, atol=1e-12)


def test_a_float16_step_whose_gradients_overflow_is_skipped(deberta):
    module, steps = module_of(deberta, warmup_steps=0), []
    clip, overflow = module.configure_gradient_clipping, 2

    def spoil(*args, **kwargs):
        norm = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
        assert norm < 100 or len(steps) == overflow  # the scale is in the thousands, and taken out
        steps.append((module.trainer.precision_plugin.scaler.get_scale(), module.trainable_state()))
        clip(*args, **kwargs)

    class Spoil(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if len(steps) == overflow:
                next(p for p in pl_module.parameters() if p.grad is not None).grad[0] = torch.inf

    module.configure_gradient_clipping = spoil
    fit(module, epochs=1, plugins=[float16()], gradient_clip_val=1.0, callbacks=[Spoil()])
    assert module.optimizers().param_groups[0]["fused"]
    scales, states = zip(*steps, strict=True)
    moved = [any(not torch.equal(before[n], after[n]) for n in before) for before, after in itertools.pairwise(states)]
    assert moved == [True, True, False, True]
    assert scales[3] == scales[2] / 2


def test_every_seed_and_process_has_dropout_masks_of_its_own(deberta, monkeypatch):
    drawn = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
        module = module_of(deberta)
        module.seed = seed
        monkeypatch.setattr(FineTuneModule, "global_rank", rank)
        module.on_fit_start()
        drawn.append(torch.rand(3))
    assert len(torch.cat(drawn).unique()) == 12


def test_a_process_that_resumes_gets_its_own_random_state_back(deberta, monkeypatch):
    states, expected = [], []
    for seed in (7, 8):
        torch.manual_seed(seed)
        states.append(rng_state())
        expected.append(torch.rand(3))
    for rank in (0, 1):
        monkeypatch.setattr(FineTuneModule, "global_rank", rank)
        module = module_of(deberta)
        module._rng = states
        Stage.on_train_epoch_start(module)
        assert torch.equal(torch.rand(3), expected[rank])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_halves_of_a_run_are_those_of_its_seed_and_divide_no_equal_inputs(deberta, seed):
    rows = datasets.concatenate_datasets([rows_of(12)] * 2)  # row i and row i + 12 are alike
    split, other = Split(rows, rows), module_of(deberta)
    data = SimpleNamespace(train=split, validation={"validation": split}, official=split)
    settings = SimpleNamespace(finetune=other.settings, seed=seed)
    parts = SimpleNamespace(settings=settings, task=other.task, data=data)
    choice, held_out = _module(parts, other.adaptation, None, 0).halves
    assert set(choice % 12).isdisjoint(held_out % 12) and len(choice) == len(held_out) == 12
    expected = held_out_split(np.arange(24), seed, np.tile(np.arange(12), 2))
    assert choice.tolist() == expected[0].tolist()


def test_a_step_takes_the_time_between_the_ends_of_batches_times_the_batches_of_a_step(deberta, monkeypatch):
    """Batch 0 starts loaders and kernels, so it does not count. A clock in which batch n ends at n^2."""
    module, now = module_of(deberta, accumulate=2), itertools.count()
    assert module.step_seconds is None
    monkeypatch.setattr("diffora.training.clock.time", SimpleNamespace(perf_counter=lambda: next(now) ** 2))
    fit(module, epochs=2, accumulate_grad_batches=2)  # five batches in each epoch
    of_batches = [1, 3, 5, 7, 11, 13, 15, 17]  # without 4 to 5, in which the model is evaluated
    assert module.step_seconds == pytest.approx(2 * sum(of_batches) / len(of_batches))
    again = module_of(deberta, accumulate=2)
    again.load_state(module.state())
    assert again.step_seconds == module.step_seconds


def test_losses_are_read_only_in_the_steps_that_are_logged(deberta, monkeypatch):
    class Notes(CSVLogger):
        def log_metrics(self, metrics, step=None):
            rows.append((step, metrics))

        def save(self):
            pass

    rows: list = []
    module, losses, looked = module_of(deberta), [], []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            total, terms = pl_module._losses[-1].tolist()
            losses.append(total / terms)

    log_dict = module.log_dict
    module.log_dict = lambda values, **how: looked.append(values) or log_dict(values, **how)
    fit(module, epochs=2, callbacks=[Look()], logger=Notes("."), log_every_n_steps=3)
    logged = [(step, metrics) for step, metrics in rows if "train/step_loss" in metrics]
    assert [step for step, _ in logged] == [2, 5, 8]  # of ten
    assert [metrics["train/step_loss"] for _, metrics in logged] == pytest.approx([losses[i] for i in (2, 5, 8)])
    assert all(metrics["lr"] > 0 for _, metrics in logged)
    assert len(looked) == 3 + 2  # and once an epoch


def test_losses_on_a_gpu_are_checked_every_25_steps(deberta, monkeypatch):
    module = module_of(deberta)
    monkeypatch.setattr(FineTuneModule, "device", torch.device("meta"))  # any that is no CPU
    module.trainer, module.plan = (
        SimpleNamespace(current_epoch=0, is_last_batch=False, should_stop=False),
        plan_of(50, 1),
    )
    for step in range(50):
        module.watch(torch.tensor(torch.nan if step == 30 else 1.0))
        if step == 49:
            with pytest.raises(NonFiniteLoss):
                module.on_train_batch_end(None, None, step)
        else:
            module.on_train_batch_end(None, None, step)


@pytest.mark.parametrize("lowest", ["attention.self.query_proj", "output.dense"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_is_saved_or_differentiated_below_the_lowest_adapted_module(deberta, checkpointed, lowest):
    """Only the upper of two layers has adapters, so embeddings and lower layer run as in evaluation."""
    model = deberta()
    if checkpointed:
        Backbone.of(model).checkpoint_activations()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    adapted = torch.tensor([[TYPES.index(name) >= TYPES.index(lowest) for name in TYPES]])
    attach(model, grid.names[1:], adapted, 2, None, alpha=4, freeze=False)
    graphs, kept, inside, calls = {}, WeakKeyDictionary(), ["loss"], Counter()

    def enter(module, args, name):
        inside.append(name)
        calls[name] += 1

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(enter, name=name))
        module.register_forward_hook(lambda module, args, output: (inside.pop(), None)[1])

    def look(module, args, output, name):
        output = output[0] if isinstance(output, tuple) else output
        graphs[name] = output.requires_grad

    for name in ("deberta.embeddings", "deberta.encoder.layer.0", "deberta.encoder.layer.1"):
        model.get_submodule(name).register_forward_hook(partial(look, name=name))

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            kept[self] = inside[-1]

    model.train()
    batch = batch_of(4)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda saved: saved.tensor):
        loss = small_task().loss(model(**small_task().inputs(batch)), batch)
    assert graphs == {"deberta.embeddings": False, "deberta.encoder.layer.0": False, "deberta.encoder.layer.1": True}
    names = set(kept.values())
    assert not [name for name in names if "embeddings" in name or "layer.0" in name]
    if lowest == "output.dense":
        assert not [name for name in names if "layer.1.attention" in name or "layer.1.intermediate" in name]
    assert "deberta.encoder.layer.1" in names if checkpointed else any("layer.1" in name for name in names)
    loss.backward()
    attention = [calls[f"deberta.encoder.layer.{i}.attention"] for i in (0, 1)]  # computed again with its layer
    assert attention == [1, 2 if checkpointed else 1]
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_the_optimiser_and_checkpoints_have_trained_weights_only(deberta, tmp_path):
    module = module_of(deberta)
    fit(module, epochs=1)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained < sum(p.numel() for p in module.parameters()) / 3
    module.trainer.save_checkpoint(tmp_path / "all.ckpt")
    checkpoint = torch.load(tmp_path / "all.ckpt", weights_only=True)
    tensors = {"optimiser": [], "weights": list(checkpoint["state_dict"].values())}
    for state in checkpoint["optimizer_states"][0]["state"].values():
        tensors["optimiser"] += [state["exp_avg"], state["exp_avg_sq"]]
    assert sum(t.numel() for t in tensors["weights"]) == trained
    assert sum(t.numel() for t in tensors["optimiser"]) == 2 * trained
    rng = sum(t.numel() for t in checkpoint["diffora"]["rng"][0].values() if isinstance(t, torch.Tensor))
    best = sum(t.untyped_storage().nbytes() for t in checkpoint["diffora"]["state"]["best_state"].values())
    assert best == 4 * trained and rng < 10_000
