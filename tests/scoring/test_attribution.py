"""Attribution scores are complete and use validation rows only. The training before them is that of LoRA."""

import lightning as L
import pytest
import torch
from conftest import TYPES, batch_of
from lightning.pytorch.plugins.precision import MixedPrecision
from small import small_task
from torch.utils.data import DataLoader

from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.scoring.attribution import AttributionModule
from diffora.scoring.criteria import gate_path
from diffora.settings.sections import Search

SETTINGS = {"epochs": 1, "batch_size": 4, "rank": 3, "lr": 1e-2, "clip": None}


@pytest.fixture
def make(deberta):
    def build(dtype=torch.float64, rounds=2, score_batches=8, dropout=0.0, **changes):
        model = deberta(dtype=dtype, dropout=dropout)
        grid = find_grid(model, "encoder.layer.*", TYPES)
        torch.manual_seed(0)
        layers = attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), 3, None, alpha=6, freeze=False)
        model.to(dtype)
        settings = Search(**SETTINGS | changes)
        arguments = model, layers, TYPES, small_task(), settings, 0
        return AttributionModule(*arguments, rounds=rounds, score_batches=score_batches).to(dtype)

    return build


def fit(module, valid=(1, 2), train=(3, 4), epochs=None, **options):
    """Train and score on items like the loader's. Each batch is given by its seed."""
    items = [{"valid": batch_of(4, seed=v), "train": [batch_of(4, seed=t)]} for v, t in zip(valid, train, strict=True)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=module.rounds + 1 if epochs is None else epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"precision": "64-true"} if module.gamma.dtype == torch.float64 else {}) | options,
    )
    trainer.fit(module, DataLoader(items, batch_size=None))
    return module


def weights(module):
    return [p.detach().clone() for p in module.weights]


def test_the_rule_is_exact_for_polynomials():
    for degree in range(8):
        assert sum(w * t**degree for t, w in gate_path(4)) == pytest.approx(1 / (degree + 1), rel=1e-12)


def test_shares_add_up_to_the_effect_of_all_adapters(make):
    module = fit(make(rounds=4))
    module.model.eval()

    def loss(gate):
        with torch.no_grad():
            gates = torch.full((2, 6), gate).double()
            return sum(module.batch_loss(batch_of(4, seed=v), gates).item() for v in (1, 2)) / 2

    total = loss(0.0) - loss(1.0)
    assert abs(total) > 1e-2
    assert module.scores.sum().item() == pytest.approx(total, rel=1e-2)


def test_a_share_is_the_integral_of_the_gates_derivative(make):
    """Compared, for one module, with a fine trapezoidal rule on finite differences."""
    module = fit(make(rounds=4))
    module.model.eval()
    i, j, n, eps = 1, 4, 64, 1e-5
    slopes = []
    for k in range(n + 1):
        losses = []
        for sign in (1, -1):
            gates = torch.full((2, 6), k / n).double()
            gates[i, j] += sign * eps
            with torch.no_grad():
                losses.append(sum(module.batch_loss(batch_of(4, seed=v), gates).item() for v in (1, 2)) / 2)
        slopes.append((losses[0] - losses[1]) / (2 * eps))
    integral = (sum(slopes) - (slopes[0] + slopes[-1]) / 2) / n
    assert abs(integral) > 1e-4
    assert module.scores[i, j].item() == pytest.approx(-integral, rel=1e-2)


def test_training_uses_train_rows_and_scoring_uses_validation_rows(make):
    base, other_valid, other_train = (
        fit(make(), valid=valid, train=train) for valid, train in (((1, 2), (3, 4)), ((5, 6), (3, 4)), ((1, 2), (5, 6)))
    )
    same = [torch.equal(a, b) for a, b in zip(weights(base), weights(other_valid), strict=True)]
    assert all(same) and not torch.equal(base.scores, other_valid.scores)
    assert not all(torch.equal(a, b) for a, b in zip(weights(base), weights(other_train), strict=True))


def test_scoring_changes_nothing(make):
    trained, scored = fit(make(), epochs=2), fit(make())
    assert not hasattr(trained, "scores") and scored.scores.shape == (2, 6)
    assert all(torch.equal(a, b) for a, b in zip(weights(trained), weights(scored), strict=True))
    assert torch.equal(scored.gamma, torch.ones_like(scored.gamma))
    assert all(p.grad is None for p in scored.parameters())


def test_dropout_is_on_while_training_and_off_while_scoring(make):
    torch.manual_seed(0)
    module = fit(make(dropout=0.3, rounds=1))
    modes = []
    module.model.register_forward_pre_hook(lambda *_: modes.append(module.model.training))
    module._sum.zero_()
    module._terms = 0.0
    first = module.scores
    fit(module, epochs=2)
    assert modes[-8:] == [False] * 8 and any(modes[:-8])
    assert not torch.equal(first, module.scores)  # trained for a round more


def test_a_module_without_effect_has_score_zero_and_score_batches_limits_the_batches(make):
    module = make(rounds=1, score_batches=1)
    torch.nn.init.zeros_(module.layers[0][2].lora_a)
    module.layers[0][2].lora_a.requires_grad_(False)
    module.layers[0][2].lora_bt.requires_grad_(False)
    module.pairs = [p for p in module.pairs if p.requires_grad]
    one = fit(module).scores
    assert one[0, 2] == 0 and (one != 0).sum() == 11
    module = make(rounds=1, score_batches=1)
    torch.testing.assert_close(fit(module).scores, fit(make(rounds=1), valid=(1, 1)).scores)


def test_float16_scores_are_close_to_full_precision(make):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    half = fit(make(torch.float32), plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).scores
    full = fit(make(torch.float32)).scores
    torch.testing.assert_close(half, full, rtol=0.15, atol=0.05 * full.abs().max().item())


@pytest.mark.parametrize("power", [8, 22])
def test_in_float16_scores_do_not_depend_on_the_scale_of_the_loss(make, power):
    """No step follows that a scaler could skip after an overflow, as it is certain with a scale of 2**22."""

    def scores(**options):
        module = fit(make(torch.float32, rounds=0), epochs=0, **options)
        with torch.no_grad():
            for layer in (layer for row in module.layers for layer in row):
                layer.lora_bt.fill_(0.1)
        return fit(module, epochs=1, **options).scores

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
    half = scores(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    torch.testing.assert_close(half, scores(), rtol=0.05, atol=1e-3)
    assert half.abs().max() > 0.01
