"""Settings that can be refused only when the backbone is known. They are refused before search and training."""

import json

import pytest
import torch
from conftest import TYPES
from hydra.utils import get_class
from safetensors.torch import load_file, save_file

from diffora.core.grid import find_grid
from diffora.errors import UserError
from diffora.methods.base import Method
from diffora.run.experiment import run
from diffora.training.steps import check_stages, warmup_steps

WIDTH = 16  # width of the small model; its FFN has 32


@pytest.fixture
def refused(cfg, deberta):
    model = deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES, {"attention_output": TYPES[3], "ffn_output": TYPES[5]})

    def problems(*overrides):
        composed = cfg("task=mrpc", *overrides)
        method = get_class(composed.method._target_).from_config(composed)
        try:
            method.check(model, grid)
            check_stages(composed, method, grid, None)
        except UserError as error:
            return error.problems
        return []

    return problems


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("lora", "rank"),
        ("flora", "rank"),
        ("diffora", "rank"),
        ("diffora", "method.shared_rank"),
        ("diffora", "search.rank"),
        ("random", "rank"),
        ("share_only", "method.shared_rank"),
        ("adalora", "method.init_rank"),
        ("rslora", "rank"),
        ("houlsby", "method.size"),
    ],
)
@pytest.mark.parametrize("value", [WIDTH + 1, 10**9])
def test_a_rank_above_a_modules_width_is_refused_with_the_module(refused, method, key, value):
    """C: `rank=1000000000`, and any `rank` above the module's width."""
    if method == "rslora" and value == 10**9:
        pytest.skip("PEFT's r has a smaller bound of its own")
    assert refused(f"method={method}", f"{key}={WIDTH}") == []
    [problem] = refused(f"method={method}", f"{key}={value}")
    assert f"={value}" in problem and "encoder.layer.0." in problem and f"{WIDTH}" in problem


def test_a_list_of_modules_limits_the_rank_by_its_own_widths(refused):
    given = ("method=diffora", "method.selection=[intermediate.dense]", "method.weight_sharing=false")
    assert refused(*given, f"rank={WIDTH}") == []
    assert "rank=17 must not be above 16" in refused(*given, "rank=17")[0]


def test_a_budget_gives_no_rank_above_the_width_of_a_module(cfg, deberta):
    grid = find_grid(deberta(), "encoder.layer.*", TYPES)
    composed = cfg("task=mrpc", "method.budget=1M")
    method = get_class(composed.method._target_).from_config(composed)
    with pytest.warns(UserWarning, match="method.budget=1M allows more than rank 16"):
        assert method.choose(grid, torch.rand(2, 6), 0).rank == WIDTH


def test_a_warm_up_longer_than_the_run_is_refused_before_it_starts(cfg):
    """A given warm-up must fit into the run. The recipe's own warm-up is shortened to fit."""
    given = ("task=mrpc", "finetune.epochs=2", "finetune.batch_size=10")
    assert warmup_steps(cfg(*given), 100) == 2
    assert warmup_steps(cfg(*given, "finetune.warmup_steps=20"), 100) == 20
    with pytest.raises(UserError, match=r"finetune\.warmup_steps=21 must be at most 20, the steps of this run"):
        check_stages(cfg(*given, "finetune.warmup_steps=21"), Method(), None, 100)


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("gm_lora", "method.mask.start=20", "method.mask.start=20 must be less than 20, the steps of this run"),
        ("diffora", "method.mask={rank: half, start: 99}", "method.mask.start=99 must be less than 20"),
        ("sora", "method.stages=21", "method.stages=21 must be at most 20, the steps of this run (100 rows,"),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(cfg, deberta, method, override, message):
    given = [f"method={method}", override, "finetune.batch_size=10", "finetune.epochs=2", "task=mrpc"]
    composed = cfg(*given)
    method = get_class(composed.method._target_).from_config(composed)
    grid = find_grid(deberta(), "encoder.layer.*", TYPES)
    with pytest.raises(UserError) as error:
        check_stages(composed, method, grid, 100)
    assert message in str(error.value)
    check_stages(composed, method, grid, 1000)


def test_a_selection_that_does_not_depend_on_the_scores_gives_a_warning(refused, caplog):
    for rho, word in (("0.1", "none"), ("1", "all")):
        caplog.clear()
        assert refused("method=diffora", f"rho={rho}") == []
        assert f"rho={float(rho):g}" in caplog.text.replace("1.0", "1") and f"selects {word} of" in caplog.text
    caplog.clear()
    refused("method=diffora", "rho=0.5")
    assert caplog.text == ""


def test_a_warm_start_from_the_wrong_tensors_is_refused(cfg, quick, tmp_path):
    """Similar to B18: the file of A and B is damaged, or comes from another search."""
    given = [*quick, "search.epochs=1", "finetune.epochs=1", "method.warm_start=true", "finetune.warmup_steps=0"]
    run(cfg(*given), tmp_path / "first")
    selection, tensors = tmp_path / "first" / "selection.json", tmp_path / "first" / "selection.safetensors"
    again = [*given, f"method.selection={selection}"]
    with pytest.raises(UserError, match=r"the search had rank 4 at .*, rank=3 does not"):
        run(cfg(*again, "rank=3"), tmp_path / "rank")
    own = load_file(tensors)
    save_file({name: value for name, value in own.items() if not name.endswith("scaling")}, tensors)
    with pytest.raises(UserError, match=r"selection\.safetensors has no scale of .*encoder"):
        run(cfg(*again), tmp_path / "unscaled")
    save_file({"x": torch.zeros(1)}, tensors)
    with pytest.raises(UserError, match=r"selection\.safetensors has no A and B of .*encoder"):
        run(cfg(*again), tmp_path / "lacking")
    tensors.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"selection\.safetensors is damaged"):
        run(cfg(*again), tmp_path / "damaged")
    content = json.loads(selection.read_text())
    selection.write_text(json.dumps(content | {"gamma_bar": content["gamma_bar"][:1]}))
    with pytest.raises(UserError, match="'gamma_bar' must have 4 layers of 6"):
        run(cfg(*again), tmp_path / "short")
