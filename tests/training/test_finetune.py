import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TYPES, batch_of
from small import rows_of, small_task
from torch.utils.data import DataLoader

from diffora.core.grid import find_grid
from diffora.core.lowrank import attach, lowrank_layers
from diffora.methods.lowrank import LowRankAdaptation
from diffora.tasks.base import Split
from diffora.training.finetune import FineTuneModule, FineTuneSettings


def accuracy(logits, labels):
    return {"accuracy": (logits.argmax(-1) == labels).float().mean().item()}


def module_of(deberta, dropout=0.0, adaptation=None, **changes):
    model = deberta(dropout=dropout)
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), 2, None, alpha=4, dropout=dropout)
    adaptation = (adaptation or LowRankAdaptation)(model)
    settings = FineTuneSettings(**{"lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 4, "early_stop": None} | changes)
    halves = np.arange(0, 24, 2), np.arange(1, 24, 2)
    split = Split(rows_of(24), rows_of(24))
    return FineTuneModule(adaptation, small_task(), split, {"validation": split}, halves, settings, seed=0)


def fit(module, epochs=2, **extra):
    train = [batch_of(8, seed=i) for i in range(5)]
    rows = batch_of(24, seed=99)
    order = torch.randperm(24)  # rows arrive in any order
    valid = [{key: value[part] for key, value in rows.items()} for part in order.split(7)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **extra,
    )
    trainer.fit(module, DataLoader(train, batch_size=None), DataLoader(valid, batch_size=None))
    return rows


def test_history_scores_the_split_and_its_halves_whatever_the_order_of_rows(deberta):
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


def history(*pairs):
    return [
        {"epoch": i + 1.0, "train/loss": 1.0, "validation/accuracy": v, "validation/loss": 1.0, "choice/accuracy": c,
         "held_out/accuracy": h}
        for i, (v, c, h) in enumerate(pairs)
    ]  # fmt: skip


def test_held_out_is_scored_where_the_choice_half_chose(deberta):
    module = module_of(deberta)
    module.history = history((0.5, 0.5, 0.5), (0.9, 0.85, 0.95), (0.85, 0.9, 0.8))
    results = module.results()
    assert results["validation/accuracy"] == 0.9 and results["best_epoch"] == 2
    assert results["held_out/accuracy"] == 0.8 and results["held_out/epoch"] == 3  # and not the best it ever had
    assert results["last/accuracy"] == 0.85


def test_the_first_of_equal_epochs_is_the_best(deberta):
    module = module_of(deberta)
    module.history = history((0.7, 0, 0), (0.8, 0, 0), (0.8, 0, 0))
    assert module.best_epoch == 1


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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
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
    fit(module, epochs=1, gradient_clip_val=0.01, precision=precision)
    assert len(norms) == 5 and min(before for before, _ in norms) > 0.02
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
    from diffora.training.checkpoint import NonFiniteLoss

    module = module_of(deberta, lr=1e30)
    with pytest.raises(NonFiniteLoss, match="epoch 1"):
        fit(module)


def test_checkpoints_hold_trainable_weights_only(deberta):
    module = module_of(deberta)
    fit(module, epochs=1)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert not any(".base." in name or "embeddings" in name for name in checkpoint["state_dict"])


class Noted(LowRankAdaptation):
    """Notes every call of the training loop, and adds a constant to the loss."""

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


def test_a_methods_hooks_are_called_once_a_step(deberta):
    module = module_of(deberta, adaptation=Noted)
    fit(module, epochs=2, accumulate_grad_batches=2)
    # 5 batches an epoch, two to a step: 3 steps an epoch
    assert module.adaptation.calls[0] == ("begin", 6)
    names = [call[0] for call in module.adaptation.calls[1:]]
    assert names == (["before", "backward", "backward", "after"] * 2 + ["before", "backward", "after"]) * 2
    assert [call[1:] for call in module.adaptation.calls if call[0] == "before"] == [(s, s // 3) for s in range(6)]
    rates = [call[1:] for call in module.adaptation.calls if call[0] == "after"]
    factors = [0.25, 0.5, 0.75, 1.0, 1.0, 0.5]  # four steps of warm-up, then down over two
    assert [step for step, _ in rates] == list(range(6))
    assert [rate for _, rate in rates] == pytest.approx([1e-3 * f for f in factors])


def test_what_a_method_adds_to_the_loss_is_not_reported_as_loss(deberta):
    module, plain = module_of(deberta, adaptation=Noted), module_of(deberta)
    fit(module)
    fit(plain)
    assert module.history == plain.history
    assert max(scores["validation/loss"] for scores in module.history) < 10


def test_training_metric_gap_and_measures_of_each_epoch(deberta):
    module = module_of(deberta, lr=0.0)  # nothing moves: the training metric is that of the model as it is
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
    assert scores["generalisation_gap"] == pytest.approx(expected - scores["validation/accuracy"])
    deltas = [layer.delta().detach().double() for _, layer in lowrank_layers(module.model)]
    assert scores["update/rank"] == 2
    losses = [(d @ d.T - torch.eye(len(d), dtype=d.dtype)).square().sum().item() for d in deltas]
    assert scores["update/orthogonality_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert module.results()["update/rank"] == 2 and "generalisation_gap" in module.results()
