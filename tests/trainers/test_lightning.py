"""`DifforaLightningCallback` in Lightning's `Trainer` and a module that knows nothing of it."""

import contextlib
import copy
import functools
import types

import lightning.pytorch as pl
import pytest
import torch
from data import MAKERS, attached, bert, rows, trained, with_peft
from test_trainer import adalora, by_hand
from torch.utils.data import DataLoader

from diffora.errors import UserError
from diffora.trainers.lightning import DifforaLightningCallback


class Module(pl.LightningModule):
    """A user's own module."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch)
        return self.model(**batch).loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def loader(n=24, seed=0):
    data = rows(n, seed)
    batches = [{key: torch.tensor(value) for key, value in data[i : i + 4].items()} for i in range(0, n, 4)]
    return DataLoader(batches, batch_size=None)


def fit(model, folder, callback, **given):
    """Train a module for some steps; returns (module, trainer)."""
    module, path = Module(model), given.pop("ckpt_path", None)
    checkpoints = pl.callbacks.ModelCheckpoint(folder, filename="{step}", save_on_train_epoch_end=True, save_top_k=-1)
    defaults = {"max_steps": 6, "accelerator": "cpu", "gradient_clip_val": 0.5, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[*([callback] if callback else []), checkpoints], **defaults | quiet | given)
    trainer.fit(module, loader(), loader(8, 1), ckpt_path=path)
    return module, trainer


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("made", MAKERS)
def test_rm_lora_equals_the_formulas_in_float64(made, parts, tmp_path):
    model = MAKERS[made]().double()
    hand = copy.deepcopy(model)
    callback = DifforaLightningCallback(0.05, "half", seed=7)
    module, trainer = fit(model, tmp_path, callback, accumulate_grad_batches=parts, max_steps=5)
    by_hand(hand, module.seen, 7, 0.05, parts, 5)
    for name, value in trained(hand).items():
        assert torch.allclose(value, trained(model)[name], rtol=1e-9, atol=1e-11), name
    assert trainer.logged_metrics["penalty"] > 1
    assert trainer.validate(module, loader(8, 1), verbose=False)[0]["val_loss"] < 5  # without the penalty


@pytest.mark.parametrize("made", ["attach", "adalora"])
def test_a_training_resumes_as_if_it_had_never_stopped(made, tmp_path):
    def make():
        return attached() if made == "attach" else adalora(tfinal=8, total_step=18)

    def callback():
        extras = {"penalty": 0.05, "mask_rank": 1, "mask_target": "update"} if made == "attach" else {}
        return DifforaLightningCallback(**extras)

    whole, _ = fit(make(), tmp_path, callback(), max_steps=18)
    for at in (6, 12):  # before and after the final reduction of ranks
        again, _ = fit(make(), tmp_path / "again", callback(), max_steps=18, ckpt_path=tmp_path / f"step={at}.ckpt")
        for name, value in trained(whole).items():
            assert torch.equal(value, trained(again)[name]), (at, name)
    if made == "attach":
        with pytest.raises(UserError, match=r"penalty=0\.5 was 0\.05"):
            fit(make(), tmp_path, DifforaLightningCallback(0.5), max_steps=18, ckpt_path=tmp_path / "step=6.ckpt")


class Scaled(pl.plugins.MixedPrecision):
    """Float16's scaling of gradients, in float32."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self):
        return contextlib.nullcontext()


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_get_a_scaled_penalty(fused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, fused=fused))
    found = []
    for plugins in ([], [Scaled()]):
        callback = DifforaLightningCallback(0.05, "half")
        module, _ = fit(attached(), tmp_path, callback, plugins=plugins, gradient_clip_val=None)
        found.append(trained(module))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-4, atol=1e-5), name


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(UserError, match="no low-rank adapters"):
        fit(bert(), tmp_path, DifforaLightningCallback(0.1))
    module = Module(with_peft())
    module.automatic_optimization = False
    for strategy, problem in (("FSDPStrategy", "FSDPStrategy does not"), ("SingleDeviceStrategy", "automatic_opt")):
        trainer = types.SimpleNamespace(strategy=type(strategy, (), {})())
        with pytest.raises(UserError, match=problem):
            DifforaLightningCallback(0.1).setup(trainer, module, "fit")
