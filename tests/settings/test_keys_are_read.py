"""The steps of a method on a small model read all its fields. Reading a field to check it does not count."""

import dataclasses

import pytest
import torch
from conftest import TYPES, batch_of
from test_config import GROUPS

from diffora.core.grid import find_grid
from diffora.methods import lowrank


def method_of(cfg):
    from hydra.utils import get_class

    return get_class(cfg.method._target_).from_config(cfg)


OWN = [name for name in GROUPS["method"] if name not in ("dora", "eva", "ia3", "peft", "pissa", "rslora", "vera")]


@pytest.mark.parametrize("name", OWN)
def test_every_field_of_a_method_is_read(cfg, deberta, monkeypatch, name):
    """B19: every field is read in steps on a small model. Reading it to check it does not count."""
    method = method_of(cfg(f"method={name}", "task=mrpc", *(["rank=2"] if name not in NO_RANK else [])))
    asked: set[tuple[str, str]] = set()
    parts = [method, *(v for v in vars(method).values() if dataclasses.is_dataclass(v))]

    def watch(kind):
        plain = kind.__getattribute__

        def ask(instance, field):
            asked.add((type(instance).__name__, field))
            return plain(instance, field)

        monkeypatch.setattr(kind, "__getattribute__", ask, raising=False)

    for kind in {*map(type, parts)}:
        watch(kind)
    for part in parts:  # with every part at work
        if isinstance(part, lowrank.Mask):
            object.__setattr__(part, "rank", 1)
            object.__setattr__(part, "start", 1)
            object.__setattr__(part, "head", True)
        elif isinstance(part, lowrank.Regulariser):
            object.__setattr__(part, "weight", 0.1)
    model = deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES, {"attention_output": TYPES[3], "ffn_output": TYPES[5]})
    asked.clear()

    method.check(model, grid)
    scores = torch.rand(grid.n_layers, grid.n_types) if method.scoring else None
    adaptation = method.adapt(model, grid, method.choose(grid, scores, 0), 0)
    adaptation.begin(4)
    for step in range(2):
        adaptation.before_step(step, 0)
        batch = batch_of(4)
        loss = model(**{key: value for key, value in batch.items() if key != "row"}).loss
        penalty = adaptation.penalty()
        (loss if penalty is None else loss + penalty).backward()
        adaptation.after_backward()
        adaptation.after_step(step, 1e-3)
    fields = {(type(part).__name__, field.name) for part in parts for field in dataclasses.fields(part)}
    # The run itself reads the number of batches to score, whether to start from searched A and B, and the time budget.
    # A draw reads method.keep only with method.like.
    elsewhere = {"score_batches", "warm_start", "time_budget", "time_from", "keep"}
    assert {field for _, field in fields - asked} <= elsewhere


NO_RANK = ("bitfit", "full_ft", "head_only", "houlsby", "pfeiffer", "share_only", "adalora")
