"""Dry runs: parameter counts of the papers, ranges for searches, and settings that are refused first."""

import re

import pytest
from processes import train

from diffora.errors import UserError
from diffora.run.experiment import run
from diffora.run.record import read_record


def test_dry_run_counts_the_papers_parameters_without_network(tmp_path):
    folder = tmp_path / "run"
    out = train("dry_run=true", "method=lora", "rank=2", f"hydra.run.dir={folder}")
    record = read_record(folder)
    assert record["status"] == "dry_run" and record["params"]["adapter"] == 331_776 and "331,776" in out
    assert sorted(f.name for f in folder.iterdir()) == ["run.json"]


@pytest.mark.parametrize(
    ("overrides", "adapter"),
    [
        (["method=lora", "rank=8", "model=roberta_base"], 1_327_104),
        (["method=full_ft"], 183_831_552),
        (["method=full_ft", "model=roberta_base"], 124_055_040),
        (["method=houlsby", "method.size=16"], 608_640),  # 0.61M
        (["method=houlsby", "method.size=8"], 313_536),  # 0.31M
        (["method=pfeiffer", "method.size=32"], 599_424),  # 0.60M
        (["method=pfeiffer", "method.size=16"], 304_320),  # 0.30M
        (["method=bitfit"], 102_912),  # 0.1M
        (["method=flora", "rank=8", "model=roberta_base"], 1_331_712),  # 1.33M
        (["method=rm_lora", "rank=4"], 663_552),  # with the head of 592,130: 1.26M
        (["method=adalora", "rank=2"], 497_880),
        (["method=head_only"], 0),
        (["method=share_only"], 2 * (4 * 1536 + 2 * 3840)),
        (["method=diffora"], 359_417),
        (["method=diffora", "method.weight_sharing=false"], 331_776),
    ],
)
def test_dry_run_counts(cfg, tmp_path, overrides, adapter):
    record = run(cfg("dry_run=true", *overrides), tmp_path).record
    assert record["params"]["adapter"] == adapter
    if overrides == ["method=diffora"]:
        assert (record["params"]["adapter_min"], record["params"]["adapter_max"]) == (239_616, 454_656)


def test_dry_run_gives_ranges_for_global_selections_and_budgets(cfg, tmp_path, capsys):
    def dry(*overrides):
        params = run(cfg("dry_run=true", *overrides), tmp_path).record["params"]
        return params, capsys.readouterr().out

    params, out = dry("method.scope=global")
    assert "36 of 72 modules" in out and "K =" not in out
    # Most parameters: all 24 FFN modules and 12 attention modules. Fewest: 36 attention modules and no FFN module, if
    # the 12 other attention modules are of one type.
    assert params["adapter_max"] == 4 * (24 * 3840 + 12 * 1536) + 2 * 4 * 1536
    assert params["adapter_min"] == 4 * 36 * 1536 + 2 * (1536 + 2 * 3840)
    assert params["adapter_min"] < params["adapter"] < params["adapter_max"]
    params, out = dry("method.budget=0.35M")
    assert params["adapter"] == 350_000 and (params["rank_min"], params["rank_max"]) == (3, 5)
    assert "rank 3 to 5 within the budget" in out and "at most" in out
    params, out = dry("method.budget=350k", "method.scope=global", "method.selector=activation")
    assert f"{params['modules_min']} to {params['modules_max']} of 72 modules within the budget" in out
    assert 0 < params["modules_min"] < params["modules_max"] < 72
    params, out = dry("method.budget=350k", "method.selector=random")
    assert 350_000 - 36 * 3840 < params["adapter"] <= 350_000 and "36 of 72 modules selected, rank " in out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rho=0.1", "method.weight_sharing=false"], "there is no adapter to train"),
        (["method.scope=global", "method.budget=100", "method.weight_sharing=false"], "at least one is selected"),
        (["method.budget=100"], "method.budget=100 is too small: 7424 parameters are the least"),
    ],
)
def test_settings_that_leave_nothing_to_train_are_refused_in_a_dry_run(cfg, quick, tmp_path, overrides, words):
    for dry in ("true", "false"):
        with pytest.raises(UserError, match=re.escape(words)):
            run(cfg(*quick, *overrides, f"dry_run={dry}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
