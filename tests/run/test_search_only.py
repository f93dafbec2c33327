"""``search_only=true``: the same selection as a whole run's, and a run that a whole run can go on from."""

import pytest

from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.report.page import write
from diffora.report.runs import gather
from diffora.run.check import check
from diffora.run.evaluate import read_request
from diffora.run.experiment import run
from diffora.run.record import read_record
from diffora.run.terminal import how_to_use, print_selection


@pytest.fixture
def short(quick) -> list[str]:
    return [*quick, "finetune.epochs=1"]


def test_the_selection_is_that_of_a_whole_run_which_can_go_on_from_it(cfg, short, tmp_path, capsys):
    whole = run(cfg(*short), tmp_path / "whole")
    only = run(cfg(*short, "search_only=true"), tmp_path / "only")
    assert only.selection == whole.selection and Selection.load(tmp_path / "only/selection.json") == whole.selection
    record = read_record(tmp_path / "only")
    assert (
        record["status"] == "selected"
        and record["metrics"] == {}
        and record["setting_id"] == whole.record["setting_id"]
    )
    assert set(record["files"]) == set(record["digests"]) == {"config.yaml", "selection.json"}
    assert not (tmp_path / "only/adapter").exists() and (tmp_path / "only/gamma.png").is_file()
    printed = " ".join(capsys.readouterr().out.split())
    assert "12 of 24 modules selected" in printed and "resume=true hydra.run.dir=" in printed

    with pytest.raises(UserError, match="holds a run \\(selected\\) already"):
        run(cfg(*short), tmp_path / "only")
    again = run(cfg(*short, "search_only=true", "resume=true"), tmp_path / "only")
    assert again.record["status"] == "selected" and again.model is None  # nothing was loaded
    with pytest.raises(UserError, match="or it only selected"):
        read_request([f"run={tmp_path / 'only'}"])

    further = run(cfg(*short, "resume=true"), tmp_path / "only")
    assert further.record["status"] == "completed" and further.metrics == whole.metrics
    assert further.record["time"]["search_s"] == record["time"]["search_s"]  # it did not search again
    done = run(cfg(*short, "search_only=true", "resume=true"), tmp_path / "only")
    assert done.record["status"] == "completed"  # the selection is a part of the complete run


def test_what_does_not_go_with_it_is_refused_in_one_message(cfg):
    with pytest.raises(UserError) as refused:
        check(cfg("task=mrpc", "model=tiny", "method=lora", "search_only=true", "predict=true"))
    assert "method=lora selects no modules" in str(refused.value) and "predict=true" in str(refused.value)
    with pytest.raises(UserError, match=r"search_only=true does not go with method.selection=\['query'\]"):
        check(cfg("experiment=quickstart", "method.selection=[query]", "search_only=true"))


def test_settings_of_the_search_that_another_selector_does_not_read_are_named(cfg, quick, tmp_path, caplog):
    changed = ["search.readout=early_gradient", "search.patience=3", "search.relaxation=sigmoid"]
    changed += ["search.epochs=9", "search.lr=0.5", "search.rank=3"]
    changed += ["search.update=simultaneous", "search.gamma_lr=0.9", "search.masks=99", "search.train_steps=2"]
    read = ["method.selector=activation", "method.score_batches=2"]
    run(cfg(*quick, *read, "search_only=true", *changed), tmp_path / "run")
    for setting in changed:
        assert f"{setting} has no effect: method.selector=activation does not read it" in caplog.text
    assert "head_warmup" not in caplog.text and "batch" not in caplog.text
    unread = ["method.score_batches=2", "search.max_rows=64", "search.valid_fraction=0.9", "search.batch_size=4"]
    run(cfg(*quick, "method.selector=kappa", "search_only=true", *unread), tmp_path / "kappa")
    for setting in unread:
        assert f"{setting} has no effect: method.selector=kappa does not read it" in caplog.text
    assert "rows used" not in caplog.text


def test_settings_of_the_search_are_named_where_no_selector_runs(cfg, quick, tmp_path, caplog):
    changed = ["search.epochs=9", "search.max_rows=50", "search.lr=0.5", "method.score_batches=2"]
    run(cfg(*quick, "method.selector=qv", "rho=0.34", "search_only=true", *changed), tmp_path / "run")
    for setting in changed:
        assert f"{setting} has no effect: no selector runs" in caplog.text
    assert caplog.text.count("has no effect") == len(changed)


def test_settings_of_the_choice_are_named_where_the_selection_is_given(cfg, quick, tmp_path, caplog):
    changed = ["rho=0.9", "method.selector=kappa", "method.scope=global"]
    run(cfg(*quick, "method.selection=[key]", *changed), tmp_path / "run")
    for setting in changed:
        assert f"{setting} has no effect: method.selection says what is selected" in caplog.text


def test_settings_of_adapters_that_others_make_useless_are_named(cfg, quick, tmp_path, caplog):
    useless = ["method.shared_rank=1", "method.regulariser.form=mean_norm"]
    run(cfg(*quick, "method.selector=random", "method.weight_sharing=false", *useless), tmp_path / "run")
    for setting in useless:
        assert f"{setting} has no effect" in caplog.text
    caplog.clear()
    run(cfg(*quick, "method.selector=random", "method.regulariser.weight=0.1", *useless), tmp_path / "read")
    assert "has no effect" not in caplog.text


def test_a_drawn_selection_needs_no_search(cfg, quick, tmp_path):
    done = run(cfg(*quick, "method.selector=random", "search_only=true"), tmp_path / "run")
    assert done.record["status"] == "selected" and done.record["time"]["search_s"] == 0
    written = read_record(tmp_path / "run")
    with pytest.raises(UserError, match="holds a run"):
        run(cfg(*quick, "method.selector=random", "search_only=true"), tmp_path / "run")
    run(cfg(*quick, "method.selector=random", "dry_run=true"), tmp_path / "run")
    assert read_record(tmp_path / "run") == written  # a dry run does not replace it


def test_the_printed_selection_counts_the_modules_that_are_there(tmp_path, capsys):
    selection = Selection(
        method="diffora",
        rho=0.4,
        seed=0,
        types=["encoder.block.*.attention.q", "encoder.block.*.attention.v", "decoder.block.*.attention.q"],
        modules=[["e0.q", "e0.v", None], ["e1.q", "e1.v", None], [None, None, "d0.q"]],
        selected=[["encoder.block.*.attention.q"], [], ["decoder.block.*.attention.q"]],
    )
    selection.save(tmp_path / "selection.json")
    record = {"method": "diffora", "task": "rewrite", "model": "tiny_t5", "seed": 0, "time": {"search_s": 0.0}}
    record |= {"settings": {"rank": 4, "method": {"alpha": 8}}, "selection": selection.summary()}
    print_selection(record, tmp_path)
    printed = capsys.readouterr().out
    assert "2 of 5 modules selected" in printed
    rows = [line.replace("│", " ").split() for line in printed.splitlines() if "block" in line]
    assert [row[1:] for row in rows] == [["1/2", "1"], ["0/2"], ["1/1", "1"]]  # layers of a block count from 1
    assert str(selection).splitlines()[1:] == [
        "encoder.block.* layer 1: encoder Q",
        "encoder.block.* layer 2: none",
        "decoder.block.* layer 1: decoder Q",
    ]
    assert "2 of 5 modules" in selection.to_yaml("axolotl", rank=4)


def test_a_report_has_them_in_its_list_and_not_among_results_or_failures(cfg, short, tmp_path):
    run(cfg(*short, "method.selector=random", "search_only=true"), tmp_path / "runs/only")
    for name in ("first", "second"):  # without and with a complete run
        page, *_ = write(gather([tmp_path / "runs"]), tmp_path / name, [tmp_path / "runs"])
        text = page.read_text()
        assert "ended with their selection (search_only=true): 1." in text and '"selected"' in text
        assert "failed, unfinished" not in text and "no completed run" not in text
        if name == "first":
            assert "0 completed runs" in text
            run(cfg(*(o for o in short if "search" not in o), "method=lora"), tmp_path / "runs/lora")
    assert "1 completed runs" in text


def test_paths_in_the_printed_advice_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {"settings": {"rank": 4, "method": {"alpha": 8}}, "selection": {"rank": None}}
    lines = how_to_use(record, tmp_path / "a run, x=1")
    assert lines[1] == "  resume=true \"hydra.run.dir='a run, x=1'\""
    assert lines[-1].endswith("lora_config(rank=4, alpha=8)")
    assert how_to_use(record, tmp_path / "plain")[3] == "  method.selection=plain/selection.json"
