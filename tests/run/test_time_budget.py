"""``method.time_budget`` in runs: shares equal to those of computed steps, refusals, files and resuming."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffora.core.attach import attach
from diffora.core.counts import above
from diffora.core.lowrank import lowrank_layers
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.loop.parts import Parts
from diffora.run import steptime
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.run.record import read_record
from diffora.run.steptime import Counted, Timed, find_lowest, limit_layers

SHORT = ["trainer=cpu", "logger=none", "task.train_rows=32", "task.validation_rows=16", "finetune.epochs=1"]
SHORT += ["experiment=quickstart", "finetune.warmup_steps=0", "finetune.batch_size=8", "task.max_length=16"]
RANDOM = ["method=random", "method.time_budget=0.75"]


def loaded(cfg, folder, *more):
    settings, task = check(cfg(*SHORT, *more))
    return Parts.load(settings, folder, task), settings.method


def test_counted_operations_are_those_of_a_computed_step(cfg, tmp_path):
    parts, method = loaded(cfg, tmp_path, *RANDOM, "model.kernel=fused", "finetune.dropout=0.1")
    counted = Counted(parts.settings, method, parts.task).from_layer(2)
    model, grid = parts.model.train(), parts.grid
    everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
    numbers = (method.rank, None, method.alpha, method.dropout)
    attach(model, above(grid.names, 2), everything, *numbers, freeze=False)
    batch = parts.task.dummy(8, model)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        parts.task.loss(model(**parts.task.inputs(batch)), batch).backward()
    assert counted.cost == counter.get_total_flops()
    assert counted.share == counted.cost / counted.cost_everywhere < 1


def test_a_run_within_a_time_budget_adapts_upper_layers_only_and_its_file_gives_the_same_run(cfg, tmp_path):
    more = ["method.budget=14k", "method.weight_sharing=true"]
    result = run(cfg(*SHORT, *RANDOM, *more), tmp_path / "run")
    facts, lowest = result.record["step_time"], result.selection.lowest_layer
    assert lowest == facts["lowest_layer"] == 2 and result.record["selection"]["lowest_layer"] == 2
    tried = {int(layer): share["share"] for layer, share in facts["by_lowest_layer"].items()}
    assert tried[2] <= 0.75 < tried[1] and facts["selection"]["share"] <= 0.75 and facts["from"] == "model"
    adapted = {int(name.split(".")[3]) for name, _ in lowrank_layers(result.model)}
    assert adapted == {2, 3} and 12_000 < result.record["params"]["adapter"] <= 14_000
    file = tmp_path / "run" / "selection.json"
    assert Selection.load(file) == result.selection
    others = [o for o in SHORT if "search" not in o]
    again = run(cfg(*others, "method=diffora", f"method.selection={file}"), tmp_path / "again")
    assert again.record["history"] == result.record["history"]
    like = run(cfg(*SHORT, "method=random", f"method.like={file}", "method.draw=9"), tmp_path / "like")
    assert like.selection.lowest_layer == 2 and not any(like.selection.selected[:2])
    assert like.record["params"]["adapter"] == result.record["params"]["adapter"]


def test_timed_steps_leave_the_model_and_random_numbers_as_they_were(cfg, tmp_path):
    parts, method = loaded(cfg, tmp_path, *RANDOM, "method.time_from=measured")
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    flags = [p.requires_grad for p in parts.model.parameters()]
    torch.manual_seed(1)
    timed = Timed(parts, method)
    share = timed.from_layer(3)
    assert share.low <= share.share <= share.high and share.cost > 0 and share.cost_everywhere > 0
    method_selection = method.choose(parts.grid, None, 0)
    assert timed.of_selection(method_selection).share > 0
    after = parts.model.state_dict()
    assert after.keys() == before.keys() and all(after[name].equal(before[name]) for name in before)
    assert [p.requires_grad for p in parts.model.parameters()] == flags and not parts.model.training
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1).equal(drawn)


def test_measured_shares_decide_and_a_resumed_run_does_not_measure_again(cfg, tmp_path, monkeypatch):
    shares = iter([0.5, 0.9, 0.7, 0.65])  # layer 4, layer 2, layer 3, the selection

    def compare(self, adapters):
        return steptime.Share(next(shares), 1.0, 2.0, 0.1, 0.9)

    monkeypatch.setattr(Timed, "_compare", compare)
    overrides = [*SHORT, *RANDOM, "method.time_from=measured", "finetune.epochs=2"]
    first = run(cfg(*overrides, "search_only=true"), tmp_path / "run")
    assert first.record["step_time"]["lowest_layer"] == 2 and first.record["step_time"]["selection"]["low"] == 0.1
    resumed = run(cfg(*overrides, "resume=true"), tmp_path / "run")  # `shares` has no more values
    assert resumed.record["step_time"] == first.record["step_time"] and resumed.selection == first.selection


def test_a_budget_below_the_forward_pass_is_refused_with_the_least_share(cfg, tmp_path):
    for more in (["dry_run=true"], []):
        with pytest.raises(UserError, match=r"time_budget=0.3 is too small: .* at least method.time_budget=0\.5\d+"):
            run(cfg(*SHORT, "method=random", "method.time_budget=0.3", *more), tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.json"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=diffora", "method.selection=[key]", "method.time_budget=0.6"], "does not go with method.selection"),
        (["method=diffora", "method.adapter=a", "method.time_budget=0.6"], "does not go with method.adapter"),
        (["method=random", "method.like=a.json", "method.time_budget=0.6"], "does not go with method.time_budget"),
        (["method=diffora", "method.time_from=measured"], "needs method.time_budget"),
        (["method=diffora", "method.time_budget=0"], "a number above 0, at most 1"),
        (["method=diffora", "method.time_budget=1.1"], "a number above 0, at most 1"),
        (["method=diffora", "method.time_budget=.6", "method.time_from=measured", "trainer.devices=2"], "one device"),
        (["method=diffora", "method.time_budget=.6", "method.time_from=measured", "trainer.num_nodes=2"], "one device"),
        (["method=diffora", "method.time_budget=.6", "method.time_from=measured", "trainer=ddp"], "one device"),
        (["method=diffora", "method.time_budget=.6", "method.time_from=measured", "trainer.compile=true"], "compile"),
    ],
)
def test_settings_that_do_not_go_together(cfg, overrides, words):
    with pytest.raises(UserError, match=words):
        check(cfg(*overrides))


def test_a_dry_run_in_the_folder_decides_nothing(cfg, tmp_path):
    run(cfg(*SHORT, "method=random", "method.time_budget=0.95", "dry_run=true"), tmp_path)
    assert read_record(tmp_path)["step_time"]["budget"] == 0.95
    parts, method = loaded(cfg, tmp_path, *RANDOM, "resume=true")
    assert limit_layers(parts, method)["budget"] == 0.75


def test_a_budget_of_1_restricts_nothing(cfg, tmp_path):
    parts, method = loaded(cfg, tmp_path, "method=random", "method.time_budget=1")
    facts = limit_layers(parts, method)
    assert facts["lowest_layer"] == 0 and parts.grid.lowest_layer == 0


def test_shares_fall_with_the_lowest_layer(cfg, tmp_path):
    parts, method = loaded(cfg, tmp_path, *RANDOM)
    meter = Counted(parts.settings, method, parts.task)
    meter.from_layer = functools.cache(meter.from_layer)
    shares = [meter.from_layer(lowest).share for lowest in range(4)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1
    for budget in (0.6, 0.8, 0.95):
        facts = find_lowest(budget, meter, parts.grid)
        assert facts["lowest_layer"] == next(i for i, share in enumerate(shares) if share <= budget)


def test_a_budget_of_parameters_is_for_the_layers_that_the_time_leaves(cfg, tmp_path):
    """2,688 parameters are enough for rank 1 to 3 in the top layer, but not in all layers."""
    more = ["method=random", "method.weight_sharing=false", "method.time_budget=0.65", "method.budget=3k"]
    found = run(cfg(*SHORT, *more, "dry_run=true"), tmp_path / "dry").record
    assert found["step_time"]["lowest_layer"] == 3 and 0 < found["params"]["adapter"] <= 3000
    result = run(cfg(*SHORT, *more), tmp_path / "run")
    assert result.record["params"]["adapter"] == found["params"]["adapter"]
    with pytest.raises(UserError, match=r"method\.budget=100 is too small"):
        run(cfg(*SHORT, *more[:-1], "method.budget=100"), tmp_path / "small")


def test_steps_on_augmented_images_can_be_timed(cfg, tmp_path):
    more = ["task=digits", "model=tiny_vit", "method=random", "method.time_budget=0.9", "method.time_from=measured"]
    settings, task = check(cfg(*more, "trainer=cpu", "logger=none", "task.max_train_rows=64", "finetune.batch_size=8"))
    parts = Parts.load(settings, tmp_path, task)
    assert Timed(parts, settings.method).from_layer(parts.grid.n_layers - 1).share > 0
