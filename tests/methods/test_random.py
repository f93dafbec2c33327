"""Random selections: which draw is used, and its size. Also selections that are given as a list."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import TYPES
from torch import nn

from diffora.core.counts import adapter_parameters
from diffora.core.draws import draw_of_same_size, draw_of_same_types
from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.run.check import check

SMALL, LARGE = (8, 8), (8, 32)


@pytest.mark.parametrize(("shared_rank", "ways"), [(None, 3), (2, 1)])
def test_method_like_draws_evenly_among_selections_of_the_same_size(shared_rank, ways):
    """Each layer needs its large module and one of two small ones; with sharing, no other choice has the same size."""
    shapes = [[SMALL, SMALL, LARGE]] * 2
    mask = torch.tensor([[True, False, True], [True, False, True]])
    size = adapter_parameters(shapes, mask, 4, shared_rank)
    counts: Counter[tuple[bool, ...]] = Counter()
    for seed in range(400):
        drawn = draw_of_same_size(shapes, mask, "layer", 4, shared_rank, seed)
        assert drawn.sum(1).tolist() == [2, 2] and adapter_parameters(shapes, drawn, 4, shared_rank) == size
        counts[tuple(drawn.flatten().tolist())] += 1
    expected = 400 / ways
    assert len(counts) == ways and all(abs(n - expected) < 4 * math.sqrt(expected) for n in counts.values())


def test_with_global_scope_layers_may_have_different_numbers_of_modules():
    shapes = [[SMALL] * 3] * 2
    mask = torch.tensor([[True, True, True], [False, False, False]])
    sizes = {draw_of_same_size(shapes, mask, "global", 4, None, seed).sum(1).tolist()[0] for seed in range(40)}
    assert sizes == {0, 1, 2}  # there is one with 3: itself


def test_if_no_draw_has_the_same_size_modules_are_exchanged_for_equal_ones(monkeypatch):
    """If three types are selected in every layer, they have no shared pairs. Most other selections need such pairs."""
    monkeypatch.setattr("diffora.core.draws.DRAWS", 50)
    shapes = [[SMALL, SMALL, SMALL, SMALL, LARGE, LARGE]] * 12
    mask = torch.tensor([[True, True, True, False, False, False]] * 12)
    drawn = [draw_of_same_size(shapes, mask, "layer", 4, 2, seed) for seed in range(5)]
    assert len({str(d) for d in drawn}) == 5
    for d in drawn:
        assert d[:, :4].sum(1).eq(3).all() and not d[:, 4:].any()
        assert adapter_parameters(shapes, d, 4, None) == adapter_parameters(shapes, mask, 4, None)


def test_a_selection_that_is_the_only_one_of_its_size_gives_none(monkeypatch):
    monkeypatch.setattr("diffora.core.draws.DRAWS", 50)
    shapes = [[SMALL, LARGE]] * 8
    assert draw_of_same_size(shapes, torch.tensor([[False, True]] * 8), "layer", 4, None, 1) is None


def test_random_draws_by_the_seed_or_by_method_draw(cfg, deberta):
    grid = find_grid(deberta(), "encoder.layer.*", TYPES)

    def chosen(*overrides: str) -> list[list[str]]:
        settings, _ = check(cfg("method=random", "task=paraphrase", "model=tiny", *overrides))
        return settings.method.choose(grid, None, 0).selected

    assert chosen("seed=3") == chosen("seed=3", "method.draw=3") == chosen("seed=4", "method.draw=3")
    assert len({str(chosen(f"method.draw={draw}")) for draw in range(8)}) > 4


def test_random_reads_the_selection_in_method_like(cfg, deberta, tmp_path):
    grid = find_grid(deberta(), "encoder.layer.*", TYPES)
    mask = torch.zeros(grid.n_layers, grid.n_types, dtype=torch.bool)
    mask[:, [0, 2, 4]] = True
    pattern = Selection.from_mask(grid, mask, method="diffora", rho=0.5, seed=0, k=3, rank=7)
    pattern.save(tmp_path / "selection.json")
    overrides = ["method=random", "task=paraphrase", "model=tiny", f"method.like={tmp_path}/selection.json"]
    settings, _ = check(cfg(*overrides))
    drawn = settings.method.choose(grid, None, 0)
    assert drawn.rank == 7 and drawn.selected != pattern.selected
    assert adapter_parameters(grid.shapes, drawn.mask(), 7, 2) == adapter_parameters(grid.shapes, mask, 7, 2)
    with pytest.raises(UserError, match="does not go with"):
        check(cfg(*overrides, "method.budget=100k"))


def test_a_draw_has_the_size_of_a_pattern_with_a_rank_of_its_own(cfg, deberta, tmp_path):
    """At rank 4 a larger module costs as much more as a shared pair, which a draw of rank 3 must not make use of."""
    grid = find_grid(deberta(), "encoder.layer.*", TYPES)
    mask = torch.tensor([[True, True, False, False, False, False], [False, False, True, True, False, False]])
    pattern = Selection.from_mask(grid, mask, method="diffora", rho=0.4, seed=0, rank=3)
    pattern.save(tmp_path / "selection.json")
    overrides = ["method=random", "task=paraphrase", "model=tiny", "rank=4", "method.scope=global"]
    settings, _ = check(cfg(*overrides, f"method.like={tmp_path}/selection.json"))
    assert settings.method.rank_elsewhere == 2
    drawn = [replace(settings.method, draw=draw).choose(grid, None, 0).mask() for draw in range(10)]
    assert len({adapter_parameters(grid.shapes, m, 3, 2) for m in [mask, *drawn]}) == 1


def test_draws_of_the_same_types_change_layers_only():
    shapes = [[SMALL, SMALL, LARGE], [SMALL, None, LARGE], [SMALL, SMALL, LARGE], [SMALL, SMALL, LARGE]]
    mask = torch.tensor([[True, True, False], [True, False, False], [True, False, True], [True, True, False]])
    drawn = [draw_of_same_types(shapes, mask, seed) for seed in range(200)]
    assert all(d.sum(0).tolist() == [4, 2, 1] and not d[1, 1] and not d.equal(mask) for d in drawn)
    counts = Counter(tuple(d.flatten().tolist()) for d in drawn)  # 3 ways for one type, 4 for another, less 1
    assert len(counts) == 11 and all(abs(n - 200 / 11) < 4 * math.sqrt(200 / 11) for n in counts.values())
    assert draw_of_same_types(shapes, torch.tensor([[True, False, False]] * 4), 0) is None


def test_method_keep_types_draws_other_layers_for_the_same_types(cfg, deberta, tmp_path):
    grid = find_grid(deberta(), "encoder.layer.*", TYPES)
    mask = torch.zeros(grid.n_layers, grid.n_types, dtype=torch.bool)
    mask[0, [0, 2, 4]] = True
    Selection.from_mask(grid, mask, method="diffora", rho=0.2, seed=0).save(tmp_path / "selection.json")
    base = ["method=random", "task=paraphrase", "model=tiny", "method.keep=types"]
    like = [*base, f"method.like={tmp_path}/selection.json"]
    settings, _ = check(cfg(*like, "method.scope=global"))
    drawn = settings.method.choose(grid, None, 0).mask()
    assert drawn.sum(0).equal(mask.sum(0)) and not drawn.equal(mask)
    with pytest.raises(UserError, match=r"method\.keep=types needs method\.scope=global"):
        check(cfg(*like))
    with pytest.raises(UserError, match=r"method\.keep=types needs method\.like"):
        check(cfg(*base, "method.scope=global"))


@pytest.mark.parametrize("given", ["output.dense,attention.self.key_proj", "key,ffn_output", "key,output.dense"])
def test_a_list_of_modules_or_parts_is_selected_in_every_layer(cfg, deberta, given):
    grid = find_grid(deberta(), "encoder.layer.*", TYPES)
    base = ["method=diffora", "task=paraphrase", "model=tiny"]
    settings, _ = check(cfg(*base, f"method.selection=[{given}]"))
    settings.method.check(nn.Module(), grid)
    selection = settings.method.choose(grid, None, 0)
    assert selection.selected == [["attention.self.key_proj", "output.dense"]] * grid.n_layers
    settings, _ = check(cfg(*base, "method.selection=[output]"))
    with pytest.raises(UserError, match=r"names output; a layer has attention.*, or, by their parts, .*key"):
        settings.method.check(nn.Module(), grid)
