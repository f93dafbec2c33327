"""The selectors that look at the weights only."""

import copy

import pytest
import torch
from families import random_model
from peft.helpers import KappaTuneSelector
from torch import nn

import diffora
from diffora.core.grid import find_grid
from diffora.errors import UserError
from diffora.run.experiment import run
from diffora.scoring.criteria import condition_number, ranked_in_types, signal_to_noise
from diffora.scoring.spectra import spectral_scores

EACH = pytest.mark.parametrize("selector", ["kappa", "spectrum"])


def test_kappa_orders_modules_as_peft_does():
    model = random_model("bert")
    grid = find_grid(model)
    scores = dict(zip(grid.modules, spectral_scores(model, grid, "kappa").flatten().tolist(), strict=True))
    peft = KappaTuneSelector(model, show_progress=False)
    theirs = [name for name in peft.get_best_targets() if name in scores]
    assert sorted(scores, key=scores.get, reverse=True) == theirs and len(theirs) == grid.n_modules
    chosen = diffora.select(model, "kappa", k=2, scope="global")
    assert set(chosen.names()) == set(theirs[:4]) and chosen.selector == "kappa" and chosen.config["scope"] == "global"


@EACH
def test_conv1d_bfloat16_and_missing_modules(selector):
    gpt2 = random_model("gpt2")
    grid, usual = find_grid(gpt2), copy.deepcopy(gpt2)
    for name in grid.modules:
        layer = usual.get_submodule(name)
        linear = nn.Linear(*layer.weight.shape)
        linear.weight.data = layer.weight.data.T.contiguous()
        usual.set_submodule(name, linear)
    found = spectral_scores(gpt2, grid, selector)
    torch.testing.assert_close(found, spectral_scores(usual, find_grid(usual), selector), rtol=1e-4, atol=1e-9)
    assert found.std() > 0
    half = copy.deepcopy(usual).bfloat16()
    exact = spectral_scores(copy.deepcopy(half).float(), grid, selector)
    assert torch.equal(spectral_scores(half, grid, selector), exact)
    t5 = random_model("t5", "AutoModelForSeq2SeqLM")
    grid = find_grid(t5)
    assert torch.equal(spectral_scores(t5, grid, selector).isnan(), ~grid.present)


def test_spectrum_takes_the_best_share_of_each_type():
    model = random_model("bert", num_hidden_layers=4)
    grid = find_grid(model)
    chosen = diffora.select(model, "spectrum", scope="global", k=3)  # 12 of 24: two of the four layers for each type
    snr = [[signal_to_noise(model.get_submodule(name).weight.detach()) for name in row] for row in grid.names]
    best = torch.tensor(snr) >= torch.tensor(snr).sort(0, descending=True).values[1]
    assert torch.equal(chosen.mask(), best) and best.sum(0).tolist() == [2] * 6


def test_spectrum_under_a_time_budget_ranks_among_the_layers_that_it_allows():
    values = torch.tensor([[9.0, 1.0], [8.0, 2.0], [1.0, 4.0], [2.0, 3.0]], dtype=torch.float64)
    ranked = ranked_in_types(values, lowest_layer=2)[2:]
    assert torch.equal(ranked, ranked_in_types(values[2:]))
    assert ranked.argmax(0).tolist() == [1, 0] and (ranked.max(0).values > ranked.min(0).values.max()).all()


@EACH
def test_a_weight_that_cannot_be_used_is_named(selector):
    model = random_model("bert")
    linear = model.get_submodule("encoder.layer.1.output.dense")
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=rf"{selector}: the weight of encoder\.layer\.1\.output\.dense has values"):
        diffora.select(model, selector)
    linear.weight = nn.Parameter(linear.weight.nan_to_num().to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="is quantised and cannot be read"):
        diffora.select(model, selector)


def test_a_module_wider_than_pefts_limit_is_scored_too():
    wide = torch.randn(2, 16_385)
    values = torch.linalg.svdvals(wide)
    assert condition_number(wide) == pytest.approx((values[0] / values[-1]).item(), rel=1e-4)


@EACH
def test_a_run_gives_the_scores_of_the_library_and_records_the_cost(cfg, quick, tmp_path, selector, tiny):
    small = [*quick, "task.train_rows=64", "finetune.epochs=1", f"method.selector={selector}", "search_only=true"]
    result = run(cfg(*small), tmp_path)
    grid = find_grid(tiny)
    torch.testing.assert_close(
        torch.tensor(result.selection.scores, dtype=torch.float64), spectral_scores(tiny, grid, selector)
    )
    assert result.record["time"]["search_s"] > 0


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModel

    from diffora.hub import EMBEDDED

    return AutoModel.from_pretrained(EMBEDDED, dtype="float32")
