"""The runs of a sweep, and what happens to runs with mistakes, failed runs and complete runs."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from diffora.errors import UserError
from diffora.files import write_text
from diffora.places import conf_dir
from diffora.records import read_content, write_record
from diffora.run.experiment import train
from diffora.run.record import new_record
from diffora.run.sweep import Column, Row, Table, cells, combinations, parse, slug, table_of

TABLE = Table(
    seeds={"paper": [0, 1, 2], "small": [0]},
    rows=[
        Row("ρ = 0.2", ["method=diffora", "rho=0.2"], columns={"squad": ["rank=5"]}, paper={"rte": 85.07}),
        Row("LoRA, r = 2", ["method=lora", "rank=2"], small=["method=lora", "rank=1"]),
    ],
    columns={
        "paper": {"rte": Column(["task=rte"]), "squad": Column(["task=squad", "rank=3"])},
        "small": {"paraphrase": Column(["task=paraphrase", "model=tiny"])},
    },
)


def expand(*given: str, scale: str = "paper", table: Table = TABLE) -> dict[str, dict[str, str]]:
    jobs = cells(parse(given), table, "some_table", scale)
    return {name: dict(line.split("=", 1) for line in overrides) for name, overrides in jobs.items()}


def test_a_table_has_a_run_per_row_column_and_seed_and_completes_one_seed_first():
    jobs = expand()
    assert len(jobs) == 2 * 2 * 3
    first = list(jobs)[:4]
    assert first == ["rho-0.2-rte-seed0", "rho-0.2-squad-seed0", "lora-r-2-rte-seed0", "lora-r-2-squad-seed0"]
    assert all(name.endswith(f"seed{job['seed']}") for name, job in jobs.items())
    assert expand(scale="small").keys() == {"rho-0.2-paraphrase-seed0", "lora-r-2-paraphrase-seed0"}


def test_rows_override_columns_and_a_rows_setting_for_one_column_overrides_both():
    jobs = expand()
    assert jobs["lora-r-2-squad-seed0"]["rank"] == "2"
    assert jobs["rho-0.2-squad-seed0"]["rank"] == "5" and "rank" not in jobs["rho-0.2-rte-seed0"]
    assert expand(scale="small")["lora-r-2-paraphrase-seed0"]["rank"] == "1"


def test_a_run_knows_its_cell():
    job = expand()["rho-0.2-squad-seed1"]
    assert job["experiment"] == job["cell.experiment"] == "some_table"
    assert (job["cell.row"], job["cell.column"]) == ("'ρ = 0.2'", "'squad'")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["seed=7", "cell.column=rte"], ["rho-0.2-rte-seed7", "lora-r-2-rte-seed7"]),
        (["seed=range(3,5)", "cell.row='ρ = 0.2'", "cell.column=rte"], ["rho-0.2-rte-seed3", "rho-0.2-rte-seed4"]),
        (["task=mrpc,cola", "seed=0", "cell.row='LoRA, r = 2'"], ["lora-r-2-mrpc-seed0", "lora-r-2-cola-seed0"]),
        (["method=sora,bitfit", "seed=0", "cell.column=rte"], ["sora-rte-seed0", "bitfit-rte-seed0"]),
    ],
)
def test_given_values_replace_seeds_columns_or_rows_or_choose_among_them(given, names):
    assert list(expand(*given)) == names


def test_a_row_like_another_uses_the_selection_of_the_same_column_and_seed():
    table = Table(
        seeds=TABLE.seeds, rows=[*TABLE.rows, Row("random", ["method=random"], like="ρ = 0.2")], columns=TABLE.columns
    )
    jobs = cells(parse(["seed=1"]), table, "some_table", "paper", Path("here"))
    for column in ("rte", "squad"):
        assert f"method.like='here/rho-0.2-{column}-seed1/selection.json'" in jobs[f"random-{column}-seed1"]


def test_a_task_of_the_table_keeps_its_settings():
    jobs = expand("task=squad,mrpc", "seed=0", "cell.row='ρ = 0.2'")
    assert list(jobs) == ["rho-0.2-squad-seed0", "rho-0.2-mrpc-seed0"]
    assert jobs["rho-0.2-squad-seed0"]["rank"] == "5" and "rank" not in jobs["rho-0.2-mrpc-seed0"]


def test_another_task_gets_what_all_columns_have():
    paper = {task: Column([f"task={task}", "model=roberta_base"]) for task in ("rte", "cola")}
    small = {f"{m}_task": Column([f"task={m}_task", f"model={m}", "trainer=cpu"]) for m in ("tiny", "tiny_vit")}
    columns = {"paper": paper, "small": small}
    table = Table(seeds={"paper": [0], "small": [0]}, rows=[Row("LoRA", ["method=lora"])], columns=columns)
    assert expand("task=wnli", table=table)["lora-wnli-seed0"]["model"] == "roberta_base"
    with pytest.raises(UserError, match=r"task=wnli is no column .* have model=tiny, model=tiny_vit: add model="):
        expand("task=tiny_task,wnli", scale="small", table=table)
    job = expand("task=wnli", "model=minilm", scale="small", table=table)["lora-wnli-seed0"]
    assert (job["model"], job["trainer"]) == ("minilm", "cpu")


def test_a_row_like_another_is_not_chosen_without_it(tmp_path):
    rows = [*TABLE.rows, Row("random", ["method=random"], like="ρ = 0.2")]
    table = Table(seeds=TABLE.seeds, rows=rows, columns=TABLE.columns)
    alone = parse(["seed=1", "cell.row=random", "cell.column=rte"])
    with pytest.raises(UserError, match=r"the row 'random' needs the selections of 'ρ = 0.2'.*choose that row, too"):
        cells(alone, table, "some_table", "paper", tmp_path)
    write_text(tmp_path / "rho-0.2-rte-seed1" / "selection.json", "{}")  # of an earlier sweep in this folder
    assert list(cells(alone, table, "some_table", "paper", tmp_path)) == ["random-rte-seed1"]


def test_a_recipe_does_not_replace_a_rows_own_and_debug_is_not_overridden():
    column = Column(["task=rte", "finetune.epochs=3", "task.max_train_rows=1000", "rank=3"])
    rows = [Row("DiffoRA", ["method=diffora", "recipe=roberta"])]
    table = Table(seeds={"paper": [0]}, rows=rows, columns={"paper": {"rte": column}})
    with pytest.raises(UserError, match=r"recipe=fast: the row 'DiffoRA' has recipe=roberta"):
        expand("recipe=fast", table=table)
    [job] = expand("debug=fast", table=table).values()
    assert job["debug"] == "fast" and job["rank"] == "3" and not {"finetune.epochs", "task.max_train_rows"} & job.keys()
    [job] = expand("debug=anomaly", table=table).values()
    assert (job["finetune.epochs"], job["task.max_train_rows"]) == ("3", "1000")
    [job] = expand("debug=fast", "finetune.epochs=2", table=table).values()
    assert job["finetune.epochs"] == "2"


def test_given_values_override_the_table_and_each_run_resolves_its_paths():
    jobs = expand("task=mrpc", "task.path='data/${task.name}'", "model=minilm", "rank=9", "finetune.epochs=1")
    assert len(jobs) == 2 * 3
    for job in jobs.values():
        assert (job["task"], job["model"], job["rank"]) == ("mrpc", "minilm", "9")
        assert "${task.name}" in job["task.path"] and job["finetune.epochs"] == "1"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["rank=1,2"], "rank=1,2: experiment=some_table already varies rows, columns and seeds"),
        (["cell.row=LoRA"], "cell.row=LoRA is not one of: ρ = 0.2; LoRA, r = 2"),
        (["cell.column=rte,mnli"], "cell.column=mnli is not one of: rte; squad"),
        (["finetune.lr=interval(0,1)"], "needs hydra/sweeper=optuna"),
    ],
)
def test_values_that_a_table_cannot_use_are_refused(given, words):
    with pytest.raises(UserError, match=re.escape(words)):
        expand(*given)


def test_rows_that_would_share_a_folder_are_refused():
    twins = Table(seeds=TABLE.seeds, rows=[Row("a b"), Row("a, b")], columns=TABLE.columns)
    with pytest.raises(UserError, match="same folder, a-b-rte-seed0"):
        expand(table=twins)


@pytest.mark.parametrize("text", ["ρ = 0.2", "LoRA, r = 2", "../x y=z,\\w'\"$(rm)", "R-LoRA / 0.80 d", "Ünï"])
def test_folder_names_are_safe(text):
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", slug(text))


def test_any_row_name_survives_as_an_override():
    for name in ("it's", 'a "b" \\', "x=1,2 [c] {d}", "ρ"):
        table = Table(seeds=TABLE.seeds, rows=[Row(name)], columns=TABLE.columns)
        [overrides] = cells(parse(["seed=0", "cell.column=rte"]), table, "t", "paper").values()
        [line] = [line for line in overrides if line.startswith("cell.row=")]
        assert parse([line])[0].value() == name


def test_plain_sweeps_are_every_combination():
    jobs = combinations(parse(["method=lora,diffora", "rank=range(1,4)", "logger=[csv]", "~debug"]))
    assert len(set(jobs)) == 6
    assert jobs[0] == ("method=lora", "rank=1", "logger=[csv]", "~debug")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("seed=range(0,3,0)", "seed=range(0,3,0): range() arg 3 must not be zero"),
        ("seed=range(0)", "seed=range(0) gives no value"),
        ("method=glob(nothing*)", "gives no value"),
        ("seed=range(1000000000)", "seed=range(1000000000) gives more than 10,000 values"),
        ("seed=range(1000) rank=range(1,1000)", "this sweep would have 999,000 runs; it must have at most 10,000"),
    ],
)
def test_a_sweep_without_runs_or_with_too_many_is_refused(given, words):
    loader = SimpleNamespace(get_group_options=lambda group, results_filter=None: ["lora"])
    with pytest.raises(UserError) as error:
        combinations(parse(given.split(), loader))
    assert words in str(error.value)


def test_interpolations_in_a_table_are_kept():
    node = OmegaConf.create({"rows": [{"name": "a", "set": ["task.path=x/${task.name}"]}]})
    assert table_of(node).rows[0].set == ["task.path=x/${task.name}"]


# Whole sweeps. A simple function replaces the run.


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Runs a sweep in a folder of its own; returns the names of the folders that were run."""
    monkeypatch.chdir(tmp_path)

    def start(*overrides, fails=(), status="completed"):
        ran = []

        def run(cfg):
            folder = Path(HydraConfig.get().runtime.output_dir)
            assert HydraConfig.get().job.num == len(ran)
            ran.append(folder.name)
            record = new_record(cfg, None)
            write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
            if folder.name in fails:
                write_record(folder, record | {"status": "failed", "error": "no luck"})
                raise RuntimeError("no luck")
            write_text(folder / "adapter" / "adapter_config.json", "{}")
            files = ["config.yaml", "adapter/adapter_config.json"]
            write_record(folder, record | {"status": status, "files": files})

        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            GlobalHydra.instance().hydra.multirun("config", run, list(overrides), with_log_configuration=False)
        return ran

    return start


CELLS = ("experiment=table4_sample_rate", "scale=small", "seed=0,1", "cell.column=digits", "cell.row='ρ = 0.4'")
NAMES = ["rho-0.4-digits-seed0", "rho-0.4-digits-seed1"]
FOLDER = Path("outputs/table4_sample_rate-small")


def test_a_failed_run_does_not_stop_the_others_and_the_same_command_repeats_it(sweep, capsys):
    with pytest.raises(UserError) as caught:
        sweep(*CELLS, fails=NAMES[1:2])
    first, *failed = caught.value.problems
    assert first == "1 of 2 runs failed; the same command does what is missing"
    assert failed == [f"{FOLDER / NAMES[1]}: no luck"]
    assert sweep(*CELLS) == NAMES[1:2]
    assert sweep(*CELLS) == []
    assert f"runs: 2 in {FOLDER}, 2 complete" in capsys.readouterr().out
    record = json.loads((FOLDER / NAMES[1] / "run.json").read_text())
    cell = {key: record[key] for key in ("experiment", "row", "column", "scale", "seed")}
    expected = ("table4_sample_rate", "ρ = 0.4", "digits", "small", 1)
    assert tuple(cell.values()) == expected


def test_a_sweep_that_only_selects_is_complete_with_selections_and_a_whole_sweep_is_not(sweep, capsys):
    assert sweep(*CELLS, "search_only=true", status="selected") == NAMES
    assert sweep(*CELLS, "search_only=true") == []
    assert "2 complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        sweep(*CELLS, status="selected")  # as if the runs ended before their records were written again
    assert sweep(*CELLS) == NAMES
    assert sweep(*CELLS, "search_only=true") == []  # a whole run has its selection


def test_equal_failures_are_reported_once(sweep):
    with pytest.raises(UserError) as caught:
        sweep(*CELLS, fails=NAMES)
    assert caught.value.problems[1:] == [f"{FOLDER / NAMES[0]} and 1 more: no luck"]


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff\xfe", b"[" * 5000, b'{"status": 5}'])
def test_a_run_with_a_broken_record_runs_again(sweep, content, capsys):
    """C: run.json that is [], {} or not UTF-8 stopped a whole sweep"""
    sweep(*CELLS)
    (FOLDER / NAMES[0] / "run.json").write_bytes(content)
    assert sweep(*CELLS) == NAMES[:1]
    assert f"{FOLDER / NAMES[0] / 'run.json'}" in "".join(capsys.readouterr())


def test_a_complete_run_whose_adapter_is_missing_runs_again(sweep, capsys):
    sweep(*CELLS)
    (FOLDER / NAMES[1] / "adapter" / "adapter_config.json").unlink()
    assert sweep(*CELLS) == NAMES[1:]
    said = "".join(capsys.readouterr())
    assert f"{FOLDER / NAMES[1]} is recorded as complete, but adapter/adapter_config.json is missing" in said


def test_a_folder_where_no_run_can_be_written_is_named(sweep):
    Path("file").touch()
    with pytest.raises(UserError, match="a part of this path is a file"):
        sweep(*CELLS, "hydra.sweep.dir=file/here")


def test_runs_with_other_settings_in_the_folder_are_refused(sweep):
    sweep(*CELLS)
    with pytest.raises(UserError) as caught:
        sweep(*CELLS, "finetune.lr=0.5")
    problems = caught.value.problems
    assert f"{FOLDER / NAMES[0]} was started with other settings" in problems[0] and "hydra.sweep.dir=" in problems[0]
    assert "finetune.lr: 0.003 -> 0.5" in problems
    assert len(sweep(*CELLS, "finetune.lr=0.5", "hydra.sweep.dir=elsewhere")) == 2


def test_nothing_starts_unless_every_configuration_is_right(sweep):
    with pytest.raises(UserError) as caught:
        sweep(*CELLS, "finetune.lr=-1", "finetune.epochs=0")
    assert [problem.split("=")[0] for problem in caught.value.problems] == ["finetune.epochs", "finetune.lr"]
    with pytest.raises(UserError) as caught:
        sweep(*CELLS[:4], "rho=0.3", "method=lora,bitfit")
    *problems, hint = caught.value.problems
    assert [problem.split(";")[0] for problem in problems] == [
        f"method={method} has no setting rho" for method in ("lora", "bitfit")
    ]
    assert "use ++, as in ++search.epochs=1" in hint
    assert not FOLDER.exists()


def test_composition_errors_are_explained_once(sweep, monkeypatch):
    from diffora.run import composition

    asked = []

    def explain(overrides, paths, primary):
        asked.append(overrides)
        return []

    monkeypatch.setattr(composition, "composition_problems", explain)
    cells = ("experiment=table3_random", "scale=small", "cell.row='LoRA, r = 1','LoRA, r = 2'")
    with pytest.raises(UserError, match=r"Could not override 'seed\.x'"):
        sweep(*cells, "seed.x=choice(3)")
    assert len(asked) == 1


def test_a_list_of_one_value_is_that_value(sweep):
    assert sweep(*CELLS, "finetune.lr=range(1,2)") == NAMES
    assert OmegaConf.load(FOLDER / NAMES[0] / "config.yaml").finetune.lr == 1


def test_a_setting_of_one_rows_method_is_given_with_two_plus_signs(sweep):
    rows = ("experiment=table1_glue", "scale=small", "seed=0", "cell.column=digits", "cell.row='Houlsby, 8'")
    assert sweep(*rows, "++method.size=3") == ["houlsby-8-digits-seed0"]
    config = OmegaConf.load("outputs/table1_glue-small/houlsby-8-digits-seed0/config.yaml")
    assert config.method.size == 3


def test_rows_that_take_their_size_from_others_run_last(sweep):
    given = ("experiment=table5_weight_sharing", "scale=small", "seed=0,1", "cell.column=digits")
    ran = sweep(*given, "cell.row=sharing,'random, sharing','LoRA, r = 2'")
    assert ran == [
        "sharing-digits-seed0", "lora-r-2-digits-seed0", "sharing-digits-seed1", "lora-r-2-digits-seed1",
        "random-sharing-digits-seed0", "random-sharing-digits-seed1",
    ]  # fmt: skip


def test_a_dry_run_lists_the_runs_and_starts_none(sweep, capsys):
    assert sweep(*CELLS, "dry_run=true") == []
    out = capsys.readouterr().out
    assert "runs: 2" in out and all(name in out for name in NAMES)
    assert not FOLDER.exists()


def test_numbers_of_a_table_that_a_recipe_does_not_change_are_named(sweep, capsys):
    given = ("experiment=minilm_glue", "task.path=none", "cell.column=cola", "cell.row='full FT'", "dry_run=true")
    sweep(*given, "recipe=rm_lora", "finetune.batch_size=8")
    assert "recipe=rm_lora does not change what the table sets: finetune.epochs, task.recipe.search_epochs\n" in (
        capsys.readouterr().out
    )
    sweep(*given)
    assert "does not change" not in capsys.readouterr().out


def test_a_plain_sweep_resumes_in_its_folder(sweep):
    given = ("experiment=quickstart", "method=lora,bitfit", "hydra.sweep.dir=here")
    names = [f"{number}-{method}-paraphrase-tiny-seed0" for number, method in enumerate(("lora", "bitfit"))]
    with pytest.raises(UserError, match=r"1 of 2 runs failed; .* with resume=true hydra\.sweep\.dir=here"):
        sweep(*given, fails=names[:1])
    with pytest.raises(UserError, match="holds a run"):
        sweep(*given)
    assert sweep(*given, "resume=true") == names[:1]


def test_complete_runs_of_other_data_are_refused(sweep, monkeypatch):
    given = ("experiment=quickstart", "method=lora", "seed=0,1", "hydra.sweep.dir=here", "resume=true")
    names = [f"{seed}-lora-paraphrase-tiny-seed{seed}" for seed in range(2)]
    with pytest.raises(UserError):
        sweep(*given, fails=names[1:])
    record = read_content(file := Path("here") / names[0] / "run.json")
    write_record(file.parent, record | {"data_hash": "rows"})
    monkeypatch.setattr("diffora.run.sweep_check.data_now", lambda settings, task: "others")
    with pytest.raises(UserError, match=r"0-lora-paraphrase-tiny-seed0 is complete, but .*\n.*other content"):
        sweep(*given)
    monkeypatch.setattr("diffora.run.sweep_check.data_now", lambda settings, task: "rows")
    assert sweep(*given) == names[1:]


def test_several_tables_in_one_sweep(sweep):
    ran = sweep("experiment=table4_sample_rate,table3_random", "scale=small", "seed=0", "cell.column=digits",
                "cell.row='LoRA, r = 2'")  # fmt: skip
    assert ran == ["lora-r-2-digits-seed0"] * 2
    assert {file.parts[1] for file in Path().glob("outputs/*/*/run.json")} == {
        "table4_sample_rate-small",
        "table3_random-small",
    }


def test_several_experiments_in_a_given_folder_get_folders_of_their_own(sweep):
    given = ("experiment=table4_sample_rate,table3_random,quickstart", "scale=small", "cell.column=digits", "seed=0")
    sweep(*given, "cell.row='LoRA, r = 2'", "hydra.sweep.dir=here", "dry_run=true")
    sweep("experiment=table4_sample_rate,table3_random", *given[1:], "cell.row='LoRA, r = 2'", "hydra.sweep.dir=here")
    assert {file.parts[1] for file in Path().glob("here/*/*/run.json")} == {
        "table4_sample_rate-small",
        "table3_random-small",
    }


def test_the_hash_of_a_configuration_ignores_row_names(cfg):
    from diffora.settings.identity import config_hash

    given = cfg("experiment=quickstart")
    named = cfg("experiment=quickstart", "cell.row=a", "cell.experiment=b", "scale=small")
    assert config_hash(given) == config_hash(named) != config_hash(cfg("experiment=quickstart", "rank=3"))


def test_folders_may_be_named_by_the_overrides_the_seed_included(sweep):
    names = sweep("experiment=quickstart", "seed=0,1", "hydra.sweep.subdir=${hydra.job.override_dirname}")
    assert len(set(names)) == 2 and all("seed=" in name for name in names)


def test_a_folder_for_a_single_run_and_several_values_of_resume_are_refused(sweep):
    with pytest.raises(UserError, match=r"hydra\.run\.dir= is of a single run: give a sweep hydra\.sweep\.dir="):
        sweep("experiment=quickstart", "seed=0,1", "hydra.run.dir=here")
    with pytest.raises(UserError, match="resume=true,false: a sweep takes one value of it"):
        sweep("experiment=quickstart", "seed=0,1", "resume=true,false")


def test_a_setting_of_some_methods_is_given_to_their_runs_only(sweep, capsys):
    """C: a message advises `++search.epochs=1` for a sweep over lora and diffora. This advice must work."""
    given = ("experiment=quickstart", "method=lora,diffora", "hydra.sweep.dir=here")
    with pytest.raises(UserError) as caught:
        sweep(*given, "search.epochs=1")
    problem, advice = caught.value.problems
    assert problem.startswith("method=lora has no setting search.epochs") and "++search.epochs=1" in advice
    assert len(sweep(*given, "++search.epochs=1,2")) == 3
    out = capsys.readouterr().out
    assert "++search.epochs is left out of 2 of 4 runs, which have no search.epochs" in out
    assert "1 runs are the same as others, and left out" in out
    epochs = [OmegaConf.load(file).get("search", {}).get("epochs") for file in sorted(Path("here").glob("*/*.yaml"))]
    assert sorted(epochs, key=str) == [1, 2, None]


def test_a_setting_that_no_run_has_is_still_refused(sweep):
    with pytest.raises(UserError, match=r"unknown key search\.epoch: did you mean search\.epochs"):
        sweep("experiment=quickstart", "method=diffora", "++search.epoch=1", "hydra.sweep.dir=here")


def test_missing_devices_are_reported_before_anything_starts(sweep, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=r"trainer\.devices=99 must be at most"):
        sweep(
            "experiment=quickstart", "method=lora,bitfit", "trainer=cpu", "trainer.devices=99", "finetune.batch_size=99"
        )
    with pytest.raises(UserError, match="is the current folder"):
        sweep("experiment=quickstart", "method=lora,bitfit", "hydra.sweep.dir=''")


@pytest.fixture
def elsewhere(monkeypatch):
    """A list: what a launcher that may use other machines does with its runs. If it is empty, they run here."""
    kind = Plugins.instance().class_name_to_class["hydra_plugins.diffora_table.TableSweeper"]
    setup = kind.setup
    launches = []

    def set_up(self, **given):
        setup(self, **given)
        self.local, here = False, self.runner.launch
        self.runner.launch = lambda batch, initial_job_idx: (launches or [here])[0](batch, initial_job_idx)

    monkeypatch.setattr(kind, "setup", set_up)
    return launches


def test_other_machines_get_the_whole_path_of_a_sweep(sweep, elsewhere, tmp_path):
    seen = []
    elsewhere.append(lambda batch, first: seen.extend(batch) or [])
    with pytest.raises(UserError, match="it did not end"):
        sweep(*CELLS)
    assert [f"hydra.sweep.dir='{tmp_path / FOLDER}'" in overrides for overrides in seen] == [True, True]


def test_runs_that_ended_where_this_machine_cannot_see_them_are_named(sweep, elsewhere):
    elsewhere.append(lambda batch, first: [JobReturn(status=JobStatus.COMPLETED) for _ in batch])
    with pytest.raises(UserError, match="all machines must see the folder of the sweep"):
        sweep(*CELLS)


def test_a_sweep_is_not_started_again_in_each_process_of_several_gpus(tmp_path, monkeypatch):
    """`trainer=ddp` takes all devices. Lightning would start the command again for each of them, with its -m."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("diffora.run.experiment.found_devices", lambda accelerator: 4)
    GlobalHydra.instance().clear()
    overrides = ["experiment=quickstart", "method=lora", "seed=0,1", "trainer=ddp", "hydra.mode=MULTIRUN"]
    with (
        initialize_config_dir(str(conf_dir()), version_base="1.3"),
        pytest.raises(UserError, match=r"trainer\.devices=auto in a sweep would start the sweep again"),
    ):
        GlobalHydra.instance().hydra.multirun("config", train, overrides, with_log_configuration=False)
