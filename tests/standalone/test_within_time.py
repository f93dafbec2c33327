"""`diffora.within_time`: a selection of the upper layers within a share of the step time, for a user's model."""

import pytest
import torch
from library import CASES, assert_same, state
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import diffora
from diffora.core.attach import attach
from diffora.core.choose import choose
from diffora.core.counts import above
from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.errors import UserError


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_selection_within_time_has_the_best_modules_of_the_upper_layers(name, scope):
    make, batches, loss = CASES[name]
    torch.manual_seed(0)
    model, batch = make(), batches()[0]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state(model)
    everything = diffora.select(model, "random", k=1, scope=scope, seed=3)
    top = len(everything.modules) - 1
    found = diffora.within_time(model, everything, batch, 0.9, loss=loss)
    assert_same(before, state(model))
    assert all(parameter.grad.eq(1).all() for parameter in model.parameters())
    lowest = found.lowest_layer
    assert 0 < lowest <= top and found.scores == everything.scores
    if scope == "layer":
        assert found.selected[lowest:] == everything.selected[lowest:] and not any(found.selected[:lowest])
    else:
        left = [value for row in found.scores[lowest:] for value in row if value is not None]
        worst = sorted(left, reverse=True)[: len(everything.names())][-1]
        values = zip(found.scores, found.mask().tolist(), strict=True)
        chosen = {v for row, flags in values for v, flag in zip(row, flags, strict=True) if flag}
        assert chosen == {value for value in left if value >= worst}


def test_the_share_is_that_of_torchs_counter():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)))
    batch = torch.randn(5, 8)
    found = diffora.select(model, "random", layer="*", k=1)
    loss = lambda net, rows: net(rows).pow(2).mean()  # noqa: E731
    within = diffora.within_time(model, found, batch, 0.75, loss=loss, rank=2)
    counts = []
    for lowest in (0, within.lowest_layer):
        attach(model, above(found.modules, lowest), torch.ones(4, 2, dtype=torch.bool), 2, None, 1.0)
        with FlopCounterMode(display=False) as counter:
            loss(model, batch).backward()
        counts.append(counter.get_total_flops())
        diffora.core.attach.detach(model)
    assert within.config["time_budget"]["share"] == counts[1] / counts[0] <= 0.75
    attached = diffora.attach(model, within, rank=2, shared_rank=1)
    adapted = {int(name[0]) for name, _ in diffora.core.lowrank.lowrank_layers(attached)}
    assert adapted == set(range(within.lowest_layer, 4))


def test_gates_of_layers_of_different_sizes_are_compared_as_in_a_run():
    torch.manual_seed(0)
    small = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
    large = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)]
    model = nn.Sequential(nn.Sequential(*small), nn.Sequential(*large))
    grid = find_grid(model, ["0.*", "1.*"])
    gates = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.6, 0.4], [0.0, 0.45, 0.55]]
    mask = torch.tensor([[True, False, False], [True, False, False], [False] * 3, [False] * 3])
    everything = Selection.from_mask(grid, mask, method="standalone", rho=0.4, seed=0, gamma_bar=gates)
    batch = torch.randn(5, 8)
    found = diffora.within_time(model, everything, batch, 0.9, loss=lambda net, rows: net(rows).pow(2).mean())
    expected = choose(torch.tensor(gates), grid.shapes, "global", 0.4, 8, None, lowest_layer=found.lowest_layer).mask
    assert found.lowest_layer == 1 and found.mask().equal(expected)
    assert found.names() == ["1.0.0", "1.1.2"]


def test_impossible_arguments_are_refused():
    make, batches, loss = next(iter(CASES.values()))
    model, batch = make(), batches()[0]
    found = diffora.select(model, "random", k=1)
    for budget, words in ((0.2, r"too small: .* has the share 0\.\d+"), (0, "above 0"), ("a", "above 0")):
        with pytest.raises(diffora.UserError, match=words):
            diffora.within_time(model, found, batch, budget, loss=loss)
    for head, words in (
        (["top"], "head: top is not a module of this model"),
        ("classifier", "must be a list of names"),
    ):
        with pytest.raises(diffora.UserError, match=words):
            diffora.within_time(model, found, batch, 0.9, loss=loss, head=head)


def test_the_path_of_a_selection_is_none():
    with pytest.raises(UserError, match="selection is a str: it must be what"):
        diffora.within_time(nn.Sequential(nn.Linear(2, 2)), "selection.json", torch.zeros(1, 2), 0.5)
