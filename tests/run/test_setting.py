"""The setting in a run's record: which values follow the seed, and which runs have the same setting."""

import pytest
from omegaconf import OmegaConf

from diffora.core.selection import Selection
from diffora.run.setting import seed_followers, selection_source, setting_facts

RANDOM = ("method=random", "task=mrpc", "model=tiny", "trainer=cpu", "logger=[csv]")


def selection_file(folder, seed, selected=("a",), **more):
    """A selection.json that the search of a run with this seed made."""
    made = {"method": "diffora", "selector": "search", "rho": 0.5, "k": 1, "config": {"search": {"lr": 0.1}}}
    names = {"types": ["a", "b"], "modules": [["0.a", "0.b"]], "selected": [list(selected)]}
    Selection(**{**made, **names, "seed": seed, **more}).save(folder / "selection.json")
    return folder / "selection.json"


def test_runs_that_differ_in_seed_folder_and_machine_have_one_setting(cfg):
    one = setting_facts(cfg(*RANDOM, "task.path=/home/a/data", "model.path=/home/a/deberta"), "d1")
    long = "/mnt/" + "a folder with a long name " * 5 + "/deberta"
    other = ["task.path=/mnt/b", f"model.path='{long}'", "trainer.num_workers=4", "trainer.accelerator=auto"]
    other += ["trainer.num_nodes=2", "trainer.num_proc=2", "trainer.cache_prefix_limit=1"]
    more = ["seed=7", "resume=true", "predict=true", "logger.csv=false", "cell.row=x"]
    assert setting_facts(cfg(*RANDOM, *other, *more), "d1") == one
    assert one["settings"]["task"]["data"] == "d1" and one["settings"]["model"]["path"] == "deberta"
    assert not one["settings"].keys() & {"seed", "resume", "predict", "logger", "cell", "scale"}


@pytest.mark.parametrize(
    ("change", "data"),
    [
        ("trainer.precision=bf16-mixed", "d1"),
        ("model.path=/home/a/finetuned", "d1"),
        ("finetune.lr=0.5", "d1"),
        ("task.recipe.warmup_steps=3", "d1"),
        ("method.draw=7", "d1"),
        ("seed=0", "d2"),  # other data below the same path
    ],
)
def test_values_that_change_a_result_change_the_setting(cfg, change, data):
    base = [*RANDOM, "task.path=/home/a/data", "model.path=/home/a/deberta"]
    assert setting_facts(cfg(*base, change), data)["setting_id"] != setting_facts(cfg(*base), "d1")["setting_id"]


def test_folders_of_one_name_with_other_models_are_two_settings(cfg, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    composed = cfg("method=lora", "task=mrpc", "model=tiny", f"model.path={folder}")
    one, other = (setting_facts(composed, "d1", backbone=digest * 16) for digest in ("1a2b", "ffff"))
    assert one["setting_id"] != other["setting_id"] and one["settings"]["model"]["path"] == "model (1a2b1a2b)"
    hub = cfg("method=lora", "task=mrpc", "model=minilm")
    assert setting_facts(hub, "d1", backbone="1a2b" * 16) == setting_facts(hub, "d1")


def test_selections_that_were_searched_on_other_data_are_other_settings(tmp_path):
    search = {"search": {"lr": 0.1}, "data_hash": "d1", "task": "mrpc", "model": "/a/deberta"}
    made = {}
    for change in ({}, {"task": "rte"}, {"data_hash": "d2"}, {"model": "/b/other"}, {"model": "/b/deberta"}):
        made[str(change)] = selection_source(selection_file(tmp_path, 0, config=search | change)).made
    assert len(set(made.values())) == 4 and made["{}"] == made["{'model': '/b/deberta'}"]


def test_a_value_made_from_the_seed_follows_the_seed_and_a_given_value_does_not(cfg):
    facts = setting_facts(cfg(*RANDOM, "seed=3"), None)
    assert facts["follows_seed"] == ["method.draw"] and facts["settings"]["method"]["draw"] == "${seed}"
    given = setting_facts(cfg(*RANDOM, "seed=3", "method.draw=3"), None)
    assert given["follows_seed"] == [] and given["settings"]["method"]["draw"] == 3
    vera = setting_facts(cfg(*RANDOM[1:], "method=vera", "seed=3"), None)
    assert vera["follows_seed"] == ["method.config.projection_prng_key"]


def test_a_value_may_follow_the_seed_through_another_value():
    cfg = OmegaConf.create(
        {
            "seed": 2,
            "a": {"b": "${seed}", "c": "${.b}", "d": "x-${a.c}", "e": [1, "${seed}"], "f": "${table.${name}}"},
            "g": "${a}",
            "h": 2,
            "name": "s${seed}",
            "table": {"s2": "only for this seed"},
        }
    )
    written = {("a", "b"): "${seed}", ("a", "c"): "${.b}", ("a", "d"): "x-${a.c}", ("a", "e"): "[1, '${seed}']"}
    written |= {("name",): "s${seed}", ("a", "f"): "${table.${name}}"} | {("g", name): "${a}" for name in "bcdef"}
    assert seed_followers(cfg) == written


@pytest.mark.parametrize("key", ["selection", "like"])
def test_a_selection_file_is_identified_by_the_search_that_made_it(cfg, tmp_path, key):
    method = ["method=diffora" if key == "selection" else "method=random", *RANDOM[1:]]

    def facts(name, seed, **more):
        (tmp_path / name).mkdir()
        return setting_facts(cfg(*method, f"method.{key}={selection_file(tmp_path / name, seed, **more)}"), None)

    one, other = facts("one", 1), facts("other", 2, selected=("b",))
    assert one["setting_id"] == other["setting_id"]  # what each search selects is its result, not its setting
    source, second = one["sources"][f"method.{key}"], other["sources"][f"method.{key}"]
    assert (source["seed"], second["seed"]) == (1, 2) and source["selects"] != second["selects"]
    assert source["made"].startswith("search (rho 0.5, ") and one["settings"]["method"][key] == source["made"]
    for change in ({"rho": 0.25}, {"config": {"search": {"lr": 0.2}}}, {"selector": "gradient"}):
        assert facts(next(iter(change)), 1, **change)["setting_id"] != one["setting_id"]


def test_a_list_of_modules_and_a_missing_file_are_settings_by_their_value(cfg, tmp_path):
    modules = setting_facts(cfg("method=diffora", *RANDOM[1:], "method.selection=[key,value]"), None)
    assert modules["sources"] == {} and modules["settings"]["method"]["selection"] == ["key", "value"]
    missing = setting_facts(cfg(*RANDOM, f"method.like={tmp_path}/none.json"), None)
    assert missing["sources"] == {} and missing["settings"]["method"]["like"] == f"{tmp_path}/none.json"


def test_a_selection_file_whose_path_is_made_from_the_seed(cfg, tmp_path):
    for seed in range(2):
        (tmp_path / f"seed{seed}").mkdir()
        selection_file(tmp_path / f"seed{seed}", seed)
    like = f"method.like='{tmp_path}/seed${{seed}}/selection.json'"
    found = [setting_facts(cfg(*RANDOM, like, f"seed={seed}"), None) for seed in range(2)]
    assert found[0]["setting_id"] == found[1]["setting_id"]
    assert found[0]["follows_seed"] == ["method.draw", "method.like"]
