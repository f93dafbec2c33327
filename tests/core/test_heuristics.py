"""Heuristics: what they select, in which scopes, and that no tie ever decides."""

import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from families import random_model

import diffora
from diffora.core.dam import modules_per_layer
from diffora.core.grid import find_grid
from diffora.core.heuristics import BY_LAYER, HEURISTICS, KINDS, heuristic_problem, heuristic_scores, usual_sizes
from diffora.core.parts import part_of
from diffora.errors import UserError
from diffora.places import conf_dir
from diffora.run.check import check
from diffora.run.experiment import run

T5 = "t5", "AutoModelForSeq2SeqLM"


@pytest.fixture(autouse=True)
def no_ties():
    """A tie at the threshold warns. Here each warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("bert", {"qv": 2, "attention": 4, "ffn": 2}),
        ("llama", {"qv": 2, "attention": 4, "ffn": 3}),
        ("vit", {"qv": 2, "attention": 4, "ffn": 2}),
    ],
)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_kind_is_selected_in_every_layer(family, wanted, scope):
    model = random_model(family)
    for name, size in wanted.items():
        chosen = diffora.select(model, name, scope=scope)
        assert [len(row) for row in chosen.selected] == [size, size]
        assert {part_of(kind) for kind in chosen.selected[0]} <= set(KINDS[name]) and chosen.config == {
            "scope": scope,
            "left_out": chosen.config["left_out"],
        }


def test_encoder_and_decoder_with_cross_attention():
    model = random_model(*T5)
    sizes = {name: [len(row) for row in diffora.select(model, name).selected] for name in KINDS}
    assert sizes == {"qv": [2, 2, 4, 4], "attention": [4, 4, 8, 8], "ffn": [2, 2, 2, 2]}
    for name, layers in {"lower": [0, 2], "upper": [1, 3], "alternate": [1, 3]}.items():  # of each stack
        chosen = diffora.select(model, name, scope="global")
        assert [i for i, row in enumerate(chosen.selected) if row] == layers and len(chosen.names()) == 16


@pytest.mark.parametrize(
    ("name", "n", "k", "layers"),
    [
        ("lower", 6, None, [0, 1, 2]),
        ("upper", 6, None, [3, 4, 5]),
        ("alternate", 6, None, [1, 3, 5]),
        ("upper", 6, 1, [5]),
        ("lower", 6, 5, [0, 1, 2, 3, 4]),
        ("lower", 5, None, [0, 1, 2]),
        ("upper", 5, None, [2, 3, 4]),
        ("alternate", 5, None, [0, 2, 4]),
    ],
)
def test_whole_layers_are_selected(name, n, k, layers):
    chosen = diffora.select(random_model("bert", num_hidden_layers=n), name, scope="global", k=k)
    assert [i for i, row in enumerate(chosen.selected) if len(row) == 6] == layers
    assert len(chosen.names()) == 6 * len(layers)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        (
            "qv",
            {"k": 3},
            r"selector=qv: k=3 would select 3 modules of each layer, .* possible: k=2; without k, the rule",
        ),
        ("alternate", {"scope": "global", "k": 2}, r"would select 10 modules in all, .* not tell apart; without k"),
        ("lower", {"scope": "global", "k": 4}, r"would select 20 modules in all"),
        ("lower", {}, r"selects whole layers, so it needs scope='global'"),
    ],
)
def test_a_number_that_a_tie_would_decide_is_refused(name, more, words):
    with pytest.raises(UserError, match=words):
        diffora.select(random_model("bert", num_hidden_layers=5), name, **more)


def test_names_that_do_not_show_the_kind_are_refused():
    with pytest.raises(UserError, match=r"qv: the names of .*h\.0 do not show its query and value; it has attn.c_attn"):
        diffora.select(random_model("gpt2"), "qv")
    assert [len(row) for row in diffora.select(random_model("gpt2"), "attention").selected] == [2, 2]


def test_modules_of_an_unknown_kind_are_named(caplog):
    model = random_model("bert")
    for layer in model.encoder.layer:
        layer.extra = torch.nn.Linear(16, 16)
    assert [len(row) for row in diffora.select(model, "ffn").selected] == [2, 2]
    assert "selector=ffn: not selected, as their names do not show what they are: extra" in caplog.text


@pytest.mark.parametrize("name", HEURISTICS)
def test_scores_are_nan_where_there_is_no_module(name):
    grid = find_grid(random_model(*T5))
    assert torch.equal(heuristic_scores(name, grid).isnan(), ~grid.present)


# --- in a run ---


def refused(cfg, tmp_path, *overrides):
    with pytest.raises(UserError) as error:
        run(cfg("experiment=quickstart", *overrides), tmp_path / "run")
    assert not (tmp_path / "run/selection.json").exists()
    return str(error.value)


def test_a_run_refuses_what_a_tie_would_decide_before_it_writes(cfg, tmp_path):
    words = refused(cfg, tmp_path, "method.selector=qv")
    assert "rho=0.5 would select 3 modules of each layer" in words and "possible: rho=0.34" in words
    words = refused(cfg, tmp_path, "method.selector=lower", "method.scope=global", "rho=0.4")
    assert "possible: rho=0.25, rho=0.5, rho=0.75" in words


@pytest.mark.parametrize("name", BY_LAYER)
def test_whole_layers_need_the_whole_grid(cfg, name):
    with pytest.raises(UserError, match=rf"selector={name} selects whole layers, so it needs method\.scope=global"):
        check(cfg("experiment=quickstart", f"method.selector={name}"))
    check(cfg("experiment=quickstart", f"method.selector={name}", "method.scope=global"))


def test_a_budget_that_would_choose_the_number_is_refused(cfg):
    budget = "experiment=quickstart", "method.selector=qv", "method.budget=20k"
    with pytest.raises(UserError, match=r"qv does not go with method\.scope=global and method\.budget"):
        check(cfg(*budget, "method.scope=global"))
    check(cfg(*budget))


def test_only_layers_that_may_have_adapters_count(cfg):
    """With a time budget, the lower layers have no adapters."""
    model = random_model("bert", num_hidden_layers=4)
    upper = replace(find_grid(model), lowest_layer=2)
    quick = "experiment=quickstart", "method.selector=qv", "method.scope=global"
    method = check(cfg(*quick, "rho=0.34"))[0].method
    method.check(model, find_grid(model))
    with pytest.raises(UserError, match=r"would select 8 modules in all, .* possible: rho=0\.17"):
        method.check(model, upper)
    method = check(cfg(*quick, "rho=0.17"))[0].method
    method.check(model, upper)
    assert [len(row) for row in method.choose(upper, None, 0).selected] == [0, 0, 2, 2]


def test_a_run_without_a_search(cfg, quick, tmp_path):
    settings = [*quick, "task.train_rows=64", "finetune.epochs=1", "method.selector=upper", "method.scope=global"]
    result = run(cfg(*settings), tmp_path)
    assert [len(row) for row in result.selection.selected] == [0, 0, 6, 6]
    assert result.selection.selector == "upper" and result.record["time"]["search_s"] == 0


def test_the_experiment_of_all_selectors_asks_for_numbers_that_suit():
    rows = yaml.safe_load((conf_dir() / "experiment/selection_matters.yaml").read_text())["hydra"]["sweeper"]["rows"]
    settings = [dict(text.split("=", 1) for text in row["set"]) for row in rows]
    found = [each for each in settings if each.get("method.selector") in HEURISTICS]
    assert {each["method.selector"] for each in found} == set(HEURISTICS)
    for grid in (find_grid(random_model(family, num_hidden_layers=4)) for family in ("bert", "llama", "vit")):
        for each in found:
            sizes = [grid.n_modules] if each.get("method.scope") == "global" else grid.sizes
            counts = [modules_per_layer(float(each["rho"]), size) for size in sizes]
            scores = heuristic_scores(each["method.selector"], grid)
            assert sum(counts) == sum(usual_sizes(each["method.selector"], scores))
            assert heuristic_problem(scores, counts, []) == ""
