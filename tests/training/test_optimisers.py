"""The optimiser and the schedule of fine-tuning, and LoRA+."""

import math

import pytest
import torch
import transformers
from lightning.pytorch.plugins.precision import MixedPrecision
from test_finetune import fit, module_of
from torch import nn
from torch.optim import lr_scheduler

from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.run.check import check
from diffora.settings.sections import FineTune
from diffora.training.optimisers import make_optimiser, make_schedule, parameter_groups


def settings(**changes):
    return FineTune(
        **{"epochs": 1, "batch_size": 8, "lr": 1e-2, "warmup_steps": 3, "early_stop": None, "clip": None} | changes
    )


def parameters():
    return [(name, nn.Parameter(torch.ones(2, 2, dtype=torch.float64))) for name in ("x.lora_a", "x.lora_bt", "head.w")]


def rates(of, steps=10):
    """The learning rate of each step."""
    named = parameters()
    optimiser = make_optimiser(named, of)
    schedule, found = make_schedule(optimiser, of, steps), []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return found


def test_the_default_is_adamw_with_linear_warm_up_and_decay():
    optimiser = make_optimiser(parameters(), settings(weight_decay=0.1))
    assert type(optimiser) is torch.optim.AdamW
    assert {key: optimiser.defaults[key] for key in ("lr", "weight_decay", "fused", "betas")} == {
        "lr": 1e-2, "weight_decay": 0.1, "fused": True, "betas": (0.9, 0.999)
    }  # fmt: skip
    assert rates(settings()) == pytest.approx([1e-2 * min((s + 1) / 3, (10 - s) / 7) for s in range(10)])


def test_schedules_know_warm_up_and_steps_of_the_run():
    cosine = [s / 3 if s < 3 else 0.5 * (1 + math.cos(math.pi * (s - 3) / 7)) for s in range(10)]
    assert rates(settings(scheduler="cosine")) == pytest.approx([1e-2 * f for f in cosine])
    assert rates(settings(scheduler="constant")) == pytest.approx([1e-2 * min(1, s / 3) for s in range(10)])
    optimiser = torch.optim.SGD([p for _, p in parameters()], lr=1e-2)
    for path, expected in {
        "torch.optim.lr_scheduler.OneCycleLR": lambda: lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=10),
        "torch.optim.lr_scheduler.CosineAnnealingLR": lambda: lr_scheduler.CosineAnnealingLR(optimiser, T_max=10),
        "transformers.get_polynomial_decay_schedule_with_warmup": lambda: (
            transformers.get_polynomial_decay_schedule_with_warmup(optimiser, 3, 10)
        ),
    }.items():
        schedule, theirs = expected(), []
        for _ in range(10):
            theirs.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        optimiser.param_groups[0] |= {"lr": 1e-2, "initial_lr": 1e-2}
        assert rates(settings(optimizer="sgd", scheduler=path)) == pytest.approx(theirs)


def test_arguments_of_a_class_reach_it():
    given = {"_target_": "torch.optim.SGD", "momentum": 0.9, "nesterov": True}
    optimiser = make_optimiser(parameters(), settings(optimizer=given, weight_decay=0.1))
    assert type(optimiser) is torch.optim.SGD
    assert [optimiser.defaults[k] for k in ("lr", "momentum", "nesterov", "weight_decay")] == [1e-2, 0.9, True, 0.1]
    fused = {"_target_": "torch.optim.AdamW", "betas": [0.8, 0.9], "foreach": True}
    assert make_optimiser(parameters(), settings(optimizer=fused)).defaults["fused"] is None


# --- LoRA+ ---


def test_with_lora_plus_a_step_of_b_is_larger_by_the_ratio():
    named = dict(parameters())
    optimiser = make_optimiser(named.items(), settings(optimizer="sgd", lora_plus_ratio=16.0))
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimiser.step()
    for name, parameter in named.items():
        step = 1e-2 * 0.5 * (16 if "lora_bt" in name else 1)
        assert torch.equal(parameter, torch.full_like(parameter, 1 - step)), name


def test_schedules_keep_the_ratio():
    for scheduler in ("linear", "cosine", "torch.optim.lr_scheduler.OneCycleLR"):
        optimiser = make_optimiser(parameters(), settings(lora_plus_ratio=4.0, scheduler=scheduler))
        schedule = make_schedule(optimiser, settings(scheduler=scheduler), 10)
        for _ in range(8):
            optimiser.step()
            schedule.step()
            ours, of_b = (group["lr"] for group in optimiser.param_groups)
            assert of_b == pytest.approx(4 * ours) and ours > 0


@pytest.mark.parametrize("name", ["m.lora_B.default.weight", "m.lora_embedding_B.default", "model.m.lora_bt"])
def test_every_b_has_the_larger_rate(name):
    named = [(name, nn.Parameter(torch.ones(1))), ("m.lora_A.default.weight", nn.Parameter(torch.ones(1)))]
    others, of_b = parameter_groups(named, settings(lora_plus_ratio=2.0))
    assert of_b["params"] == [named[0][1]] and others["params"] == [named[1][1]]


def test_lora_plus_in_training_moves_b_further(deberta):
    moved = {}
    for ratio in (None, 16.0):
        module = module_of(deberta, optimizer="sgd", lora_plus_ratio=ratio, warmup_steps=0, scheduler="constant")
        layers = [layer for _, layer in lowrank_layers(module.model)]
        before = [layer.lora_bt.detach().clone() for layer in layers]
        fit(module, epochs=1)
        moved[ratio] = sum((l.lora_bt - b).norm().item() for l, b in zip(layers, before, strict=True))  # noqa: E741
    assert 12 < moved[16.0] / moved[None] < 20


def test_lora_plus_is_refused_for_a_method_without_b():
    with pytest.raises(UserError, match="lora_plus_ratio=2: this method trains no B"):
        parameter_groups([("head.weight", nn.Parameter(torch.ones(1)))], settings(lora_plus_ratio=2.0))


# --- in the training loop ---


def test_an_optimiser_that_does_not_unscale_by_itself_works_in_float16(deberta):
    module, seen = module_of(deberta, optimizer="sgd", warmup_steps=0), []
    clip = module.configure_gradient_clipping

    def watched(*args, **kwargs):
        seen.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm().item())
        clip(*args, **kwargs)

    module.configure_gradient_clipping = watched
    fit(module, epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    assert len(seen) == 5 and all(0.02 < norm < 100 for norm in seen)  # the loss scale of 65536 is taken out once


# --- mistakes ---


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finetune.optimizer=adam", "must be one of adamw, sgd, adafactor, or the dotted path of a class; did"),
        ("finetune.optimizer=torch.optim.SDG", "torch.optim has no SDG; did you mean torch.optim.SGD?"),
        ("finetune.optimizer=torch.nn.Linear", "torch.nn.Linear is not a torch.optim.Optimizer"),
        ("finetune.optimizer={_target_: torch.optim.SGD, momentom: 1}", "momentom; did you mean momentum?"),
        ("finetune.optimizer={_target_: torch.optim.SGD, momentum: -1}", "Invalid momentum value: -1"),
        ("finetune.optimizer={_target_: torch.optim.SGD, lr: 1}", "finetune.optimizer.lr: give it as finetune.lr"),
        ("finetune.optimizer={momentum: 1}", "must be a name, or {_target_: module.Class, <its arguments>}"),
        ("finetune.optimizer=torch.optim.LBFGS", "LBFGS cannot take a step here"),
        ("finetune.optimizer=torch.optim.SparseAdam", "SparseAdam cannot take a step here"),
        ("finetune.scheduler=cosin", "must be one of linear, cosine, constant"),
        ("finetune.scheduler=torch.optim.lr_scheduler.StepLR", "needs step_size"),
        ("finetune.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "waits for a metric"),
        ("finetune.scheduler=torch.nn.Linear", "needs out_features"),
        ("finetune.scheduler={_target_: transformers.get_cosine_schedule_with_warmup, num_warmup_steps: 1}",
         "give it as finetune.warmup_steps"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_message(cfg, override, words):
    with pytest.raises(UserError) as error:
        check(cfg("experiment=quickstart", "method=lora", override))
    assert len(error.value.problems) == 1 and words in error.value.problems[0]


def test_warm_up_steps_that_a_schedule_has_not_are_refused_unless_they_are_the_recipes(cfg):
    one_cycle = "finetune.scheduler=torch.optim.lr_scheduler.OneCycleLR"
    check(cfg("experiment=quickstart", "method=lora", one_cycle))
    with pytest.raises(UserError, match="scheduler has no warm-up steps"):
        check(cfg("experiment=quickstart", "method=lora", one_cycle, "finetune.warmup_steps=3"))


def test_an_optimiser_with_a_state_that_no_checkpoint_can_hold_is_refused(cfg, tmp_path, monkeypatch):
    code = "import torch\nclass Odd(torch.optim.SGD):\n    def state_dict(self):\n        return {'f': lambda: 0}\n"
    (tmp_path / "odd_optimiser.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="Odd has a state that cannot be put into a checkpoint"):
        check(cfg("experiment=quickstart", "method=lora", "finetune.optimizer=odd_optimiser.Odd"))
