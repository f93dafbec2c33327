"""``search.ensemble``: a member is the search of a run with its seed; a stopped ensemble goes on where it was."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import SEARCH, Stopped, assert_equal_runs, run_of, stop

from diffora.core.ensemble import member_seed
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.run.check import check
from diffora.run.figures import dam_heatmap
from diffora.run.record import read_record
from diffora.scoring.bilevel import SearchModule

SELECT = [*SEARCH, "search_only=true"]


def members_of(folder):
    return json.loads((folder / "members.json").read_text())["members"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A whole run with an ensemble of two searches."""
    return run_of(*SEARCH, "search.ensemble=2", folder=tmp_path_factory.mktemp("two") / "run")


def test_members_are_searches_of_runs_with_their_seeds(two, tmp_path):
    runs = [run_of(*SELECT, f"seed={member_seed(0, number)}", folder=tmp_path / str(number)) for number in range(2)]
    alone = [run.selection for run in runs]
    for run in runs:  # an ensemble of one is a plain search
        assert (run.selection.ensemble, run.selection.confidence, run.selection.scores) == (1, None, None)
        assert "certainty" not in run.record["selection"] and not (run.folder / "members.json").exists()
    found = members_of(two.folder)
    assert [member["scores"] for member in found] == [each.gamma_bar for each in alone]
    assert [member["selected"] for member in found] == [each.selected for each in alone]
    assert [member["split_hash"] for member in found] == [each.split_hash for each in alone]
    assert alone[0].gamma_bar != alone[1].gamma_bar and alone[0].split_hash != alone[1].split_hash

    logs = [np.log(np.array(each.gamma_bar)) for each in alone]  # averaged by hand
    scores = np.mean([(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in logs], axis=0)
    np.testing.assert_allclose(np.array(two.selection.scores), scores, rtol=1e-6, atol=1e-9)
    best = [sorted(row) for row in np.argsort(-scores, axis=1)[:, :3]]
    types = two.selection.types
    assert [sorted(map(types.index, row)) for row in two.selection.selected] == best


def test_the_selection_says_how_sure_it_is_and_the_record_what_it_cost(two):
    loaded, found = Selection.load(two.folder / "selection.json"), members_of(two.folder)
    assert loaded == two.selection and loaded.ensemble == 2 and loaded.gamma_bar is None
    assert torch.tensor(loaded.confidence).sum(-1).tolist() == pytest.approx([3.0] * 4)  # K of each layer, always
    assert two.record["time"]["search_s"] == pytest.approx(sum(each["seconds"] for each in found), abs=0.01)
    assert two.record["selection"]["certainty"] == loaded.certainty == str(loaded).splitlines()[1]
    assert dam_heatmap(loaded).startswith(b"\x89PNG")


def test_fine_tuning_starts_as_if_there_had_been_no_other_members(two, tmp_path):
    given = f"method.selection={two.folder / 'selection.json'}"
    assert_equal_runs(two, run_of(*SEARCH, "search.ensemble=2", given, folder=tmp_path / "given"))


@pytest.mark.parametrize("member", [1, 2])
def test_a_stopped_ensemble_goes_on_and_finishes_alike(two, tmp_path, monkeypatch, member):
    """It is stopped in round 2 of one member. The members before it are not searched again."""
    folder, searches = tmp_path / "run", []
    start, step = SearchModule.on_fit_start, SearchModule.training_step

    def counted(self):
        searches.append(self.seed)
        return start(self)

    def stopping(self, batch, batch_idx):
        if self.seed == member_seed(0, member - 1) and self.current_epoch == 1 and batch_idx == 1:
            raise Stopped
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SearchModule, "training_step", stopping)
        with pytest.raises(Stopped):
            run_of(*SELECT, "search.ensemble=2", folder=folder)
    monkeypatch.setattr(SearchModule, "on_fit_start", counted)
    resumed = run_of(*SELECT, "search.ensemble=2", "resume=true", folder=folder)
    assert searches == [member_seed(0, number) for number in range(member - 1, 2)]
    assert resumed.selection == two.selection
    assert [each["scores"] for each in members_of(folder)] == [each["scores"] for each in members_of(two.folder)]


def test_a_run_that_stops_after_its_ensemble_uses_it(tmp_path):
    quick, folder = [*SEARCH, "method.selector=gradient", "search.ensemble=2"], tmp_path / "run"
    stop(*quick, folder=folder, epoch=0)
    before = (folder / "members.json").read_bytes()
    resumed = run_of(*quick, "resume=true", folder=folder)
    assert (folder / "members.json").read_bytes() == before
    assert_equal_runs(resumed, run_of(*quick, folder=tmp_path / "whole"))


def test_modules_that_a_layer_lacks_have_no_confidence(tmp_path):
    done = run_of(
        *["method=diffora", "task=rewrite", "model=tiny_t5", "trainer=cpu", "logger=[csv]", "task.train_rows=32"],
        *["task.validation_rows=8", "finetune.batch_size=8", "method.selector=gradient", "search.ensemble=3"],
        *["method.score_batches=1", "method.scope=global", "search_only=true"],
        folder=tmp_path / "run",
    )
    selection = done.selection
    missing = [[name is None for name in row] for row in selection.modules]
    assert any(map(any, missing))
    for table in (selection.scores, selection.confidence, *(each["scores"] for each in members_of(done.folder))):
        assert [[value is None for value in row] for row in table] == missing
    assert Selection.load(done.folder / "selection.json") == selection
    total = sum(value for row in selection.confidence for value in row if value is not None)
    assert total == pytest.approx(len(selection.names()))
    assert f"of {sum(selection.sizes())} modules decided" in selection.certainty


def test_a_head_of_no_checkpoint_is_drawn_again_for_each_member_and_then_restored(tmp_path, monkeypatch):
    heads = []
    from diffora.scoring.one_pass_stages import MeasureStage

    start = MeasureStage.on_fit_start

    def noted(self):
        heads.append(self.model.classifier.weight.detach().clone())
        return start(self)

    monkeypatch.setattr(MeasureStage, "on_fit_start", noted)
    quick = [*SELECT, "method.selector=gradient", "method.score_batches=1"]
    done = run_of(*quick, "search.ensemble=3", folder=tmp_path / "run")
    assert len({tuple(head.flatten().tolist()) for head in heads}) == 3
    assert torch.equal(done.model.classifier.weight.detach(), heads[0])


def test_scores_that_do_not_depend_on_the_seed_get_no_confidence(tmp_path, caplog):
    (tmp_path / "sizes.py").write_text(
        "import torch\n"
        "def by_place(model, grid, batches, loss):\n"
        "    return torch.arange(grid.n_layers * grid.n_types, dtype=torch.float).view(grid.n_layers, -1)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        done = run_of(*SELECT, "method.selector=sizes.by_place", "search.ensemble=2", folder=tmp_path / "run")
    assert done.selection.confidence is None and done.selection.ensemble == 2
    assert "members of the ensemble have the same scores" in caplog.text
    assert read_record(done.folder)["selection"]["certainty"] == ""


def test_what_does_not_go_with_an_ensemble_is_said(cfg, tmp_path, caplog):
    with pytest.raises(UserError, match=r"method\.warm_start=true does not go with search.ensemble=3"):
        check(cfg("experiment=quickstart", "search.ensemble=3", "method.warm_start=true"))
    with pytest.raises(UserError, match=r"search\.ensemble=0 must be a whole number of at least 1"):
        check(cfg("experiment=quickstart", "search.ensemble=0"))
    with pytest.raises(UserError, match=r"search\.ensemble=3: method.selector=kappa reads weights only"):
        check(cfg("experiment=quickstart", "search.ensemble=3", "method.selector=kappa"))
    run_of(*SELECT, "method.selector=random", "search.ensemble=3", folder=tmp_path / "run")
    assert "search.ensemble=3 has no effect" in caplog.text


def test_the_adapter_is_that_of_the_selected_modules(two):
    """The ensemble leaves none of its own adapters in the model."""
    names = {key.split(".lora_")[0] for key in load_file(two.folder / "adapter/adapter_model.safetensors")}
    assert sum(any(module in name for name in names) for module in two.selection.names()) == len(two.selection.names())


def test_raw_gradients_of_a_search_are_averaged_as_they_are_and_facts_too(tmp_path):
    """``search.readout=early_gradient`` gives no gates, so no logarithm is taken."""
    done = run_of(
        *SELECT, "search.ensemble=2", "search.readout=early_gradient", "method.scope=global", folder=tmp_path / "run"
    )
    values = [np.array(each["scores"]) for each in members_of(done.folder)]
    assert min(map(np.min, values)) < 0
    wanted = np.mean([(x - x.mean()) / x.std() for x in values], axis=0)
    np.testing.assert_allclose(np.array(done.selection.scores), wanted, rtol=1e-6, atol=1e-9)
    assert done.selection.gamma_bar is None and done.selection.readout == "early_gradient"
