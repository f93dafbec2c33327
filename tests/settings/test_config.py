"""All mistakes in a configuration are named at once, and every key of a settings class is in conf/."""

import importlib.util
import json
import shlex
from dataclasses import MISSING, fields

import fuzz_values
import pytest
from hydra.utils import get_class
from omegaconf import open_dict

from diffora.cli import added_paths
from diffora.errors import UserError
from diffora.methods.base import DIALS
from diffora.methods.selecting import parse_budget
from diffora.places import conf_dir
from diffora.run.arguments import named_values
from diffora.run.check import check
from diffora.run.composition import composition_problems, sweeps
from diffora.run.evaluate import read_request
from diffora.run.setting import setting_facts
from diffora.run.sweep import parse
from diffora.settings.identity import config_hash, differences, plain
from diffora.settings.read import keys_of
from diffora.settings.sections import FineTune, Recipe, Search, Settings, Trainer
from diffora.tasks.base import Task

OPTUNA = importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper")  # an extra
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in conf_dir().iterdir()
    if folder.is_dir() and (folder.name != "hparams_search" or OPTUNA)
}


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, names in GROUPS.items() for name in names])
def test_every_shipped_choice_composes_and_is_valid(cfg, choice, monkeypatch):
    monkeypatch.setattr("diffora.loop.own.find_spec", lambda name: True)  # loggers need packages that are no dependency
    given = {"model=hf": ["model.path=some/model"], "task=imagefolder": ["task.path=some/folder"]}
    given["task=text"] = given["task=choice"] = given["task=seq2seq"] = ["task.path=some/file.csv"]
    given["task=tokens"] = ["task.path=some/file.conll"]
    composed = cfg(choice, *given.get(choice, []))
    settings, _ = check(composed)
    assert settings.composed == plain(composed)


@pytest.mark.parametrize("section", [Trainer, FineTune, Search])
def test_a_key_that_is_left_out_has_the_value_that_a_run_starts_from(cfg, section):
    """Otherwise a configuration without the key, such as that of an older run, would silently mean something else."""
    composed = plain(cfg("method=diffora", "task=paraphrase", "model=tiny"))[section.__name__.lower()]
    defaults = {
        field.name: field.default if field.default is not MISSING else field.default_factory()
        for field in fields(section)
        if not (field.default is MISSING and field.default_factory is MISSING)
    }
    recipe = {"dropout"} if section is FineTune else set()  # its value depends on the task
    assert {name: composed[name] for name in defaults.keys() - recipe} == {
        name: value for name, value in defaults.items() if name not in recipe
    }
    assert len(defaults) > 5


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("google/vit-base", "vit-base"),
        ("/data/models/my model/", "my-model"),
        ("'embedded:tiny_vit'", "embedded-tiny_vit"),
        ("..", "hf"),
    ],
)
def test_a_model_of_model_hf_is_named_by_its_path(cfg, path, name):
    assert cfg("model=hf", f"model.path={path}").model.name == name


def test_model_hf_needs_a_path(cfg):
    with pytest.raises(UserError) as error:
        check(cfg("model=hf"))
    assert error.value.problems == ["model.path=null must be a hub id or a folder"]


@pytest.mark.parametrize("method", GROUPS["method"])
@pytest.mark.parametrize("task", ["mrpc", "stsb", "paraphrase"])  # the other tasks differ only in their recipes
def test_every_method_can_be_combined_with_every_kind_of_task(cfg, method, task):
    check(cfg(f"method={method}", f"task={task}"))


def test_every_key_of_every_settings_class_is_in_a_configuration(cfg):
    """A key that is in no file of conf/ could only be set with a plus sign, and users would not find it."""
    present: dict[str, set[str]] = {}
    for group, names in GROUPS.items():
        for name in names:
            composed = plain(cfg(f"{group}={name}", *(["model.path=some/model"] if name == "hf" else [])))
            for section in ("task", "method"):
                kind = composed[section]["_target_"]
                present.setdefault(kind, set()).update(leaves({section: composed[section]}))
            present.setdefault("", set()).update(leaves(composed))
    for where, keys in present.items():
        for key in keys_of_class(where):
            assert any(k == key or k.startswith(f"{key}.") for k in keys), (where, key)


def keys_of_class(target):
    """The keys of a task's or a method's class, or of the sections that all runs have."""
    if not target:
        return [*keys_of(Settings), *keys_of(Recipe, "task.recipe.")]
    kind = get_class(target)
    if issubclass(kind, Task):
        return [key for key in keys_of(kind.settings, "task.") if not key.startswith("task.recipe.")]
    return [key for key in keys_of(kind, "method.") if key.removeprefix("method.") not in DIALS]


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def messages(cfg, *overrides):
    with pytest.raises(UserError) as error:
        check(cfg(*overrides))
    return error.value.problems


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rho=1.5", "rho=1.5 must be a number in [0, 1]"),
        ("rho=-0.1", "rho=-0.1 must be a number in [0, 1]"),
        ("rho=half", "rho='half' must be a number"),
        ("rank=0", "rank=0 must be a whole number of at least 1"),
        ("rank=two", "rank='two' must be a whole number"),
        ("rank=2.5", "rank=2.5 must be a whole number"),
        ("seed=-1", "seed=-1 must be a whole number of at least 0"),
        ("seed=null", "seed=null must be"),
        ("finetune.lr=-1e-3", "finetune.lr=-0.001 must be a number above 0"),
        ("finetune.lr=nan", "finetune.lr=nan must be a number above 0"),
        ("finetune.batch_size=0", "finetune.batch_size=0 must be a whole number of at least 1"),
        ("finetune.epochs=0", "finetune.epochs=0"),
        ("finetune.dropout=16", "finetune.dropout=16 must be a number in [0, 1)"),
        ("finetune.warmup_steps=-1", "finetune.warmup_steps=-1"),
        ("finetune.max_steps=0", "finetune.max_steps=0 must be a whole number of at least 1"),
        (
            "finetune.eval_every=1.0",
            "finetune.eval_every=1.0 must be a whole number of steps such as 500, or a fraction",
        ),
        (
            "finetune.eval_every=2.5",
            "finetune.eval_every=2.5 must be a whole number of steps such as 500, or a fraction",
        ),
        ("finetune.eval_every=0", "finetune.eval_every=0 must be a whole number of steps such as 500, or a fraction"),
        ("finetune.lora_plus_ratio=0", "finetune.lora_plus_ratio=0 must be a number above 0"),
        ("finetune.label_smoothing=1", "finetune.label_smoothing=1 must be a number in [0, 1)"),
        ("finetune.class_weights=blanced", "finetune.class_weights='blanced' must be balanced, or numbers above 0"),
        ("finetune.class_weights=[1,0]", "finetune.class_weights=[1, 0] must be balanced, or numbers above 0"),
        ("finetune.class_weights={a: x}", "finetune.class_weights={'a': 'x'} must be balanced, or numbers above 0"),
        ("trainer.compile=1", "trainer.compile=1 must be true or false"),
        ("trainer.callbacks=x", "trainer.callbacks='x' must be a list of {_target_: module.Class, <its arguments>}"),
        ("search.order=3", "search.order=3 must be one of 1, 2"),
        ("search.gamma_lr=0", "search.gamma_lr=0 must be a number above 0"),
        ("method.alpha=0", "method.alpha=0 must be a number above 0"),
        ("method.shared_rank=0", "method.shared_rank=0"),
        ("method.weight_sharing=maybe", "method.weight_sharing='maybe' must be true or false"),
        ("method.selection=nowhere.json", "no selection file at nowhere.json"),
        (
            "method.selector=magic",
            "method.selector='magic' must be one of search, attribution, one_shot, gradient, activation,",
        ),
        ("method.score_batches=0", "method.score_batches=0 must be a whole number of at least 1"),
        ("method.scope=row", "method.scope='row' must be one of layer, global"),
        ("method.budget=0", "method.budget=0 must be a number of parameters above 0"),
        ("method.budget=-350k", "method.budget='-350k' must be a number of parameters above 0"),
        ("method.budget=much", "method.budget='much' must be a number of parameters above 0"),
        ("method.budget=0.0001k", "method.budget='0.0001k' must be a number of parameters above 0"),
        ("method.budget=0.35m", "such as 350000, 350k or 0.35M"),
        ("method.budget=2.5", "method.budget=2.5 must be a number of parameters above 0"),
        ("task.max_train_rows=0", "task.max_train_rows=0"),
        ("model.path=/no/such/folder", "model.path=/no/such/folder is not a folder"),
        ("trainer.precision=8", "trainer.precision=8 must be one of"),
        ("search.accumulate=3", "must be a multiple of search.accumulate=3"),
        ("+search.epoch=3", "unknown key search.epoch: did you mean search.epochs"),
        ("+method.ranks=3", "method=diffora has no setting method.ranks"),
    ],
)
def test_each_mistake_has_its_message(cfg, override, words):
    found = messages(cfg, override)
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("houlsby", "method.size=0", "method.size=0 must be a whole number of at least 1"),
        ("pfeiffer", "method.init_std=-1", "method.init_std=-1 must be a number above 0"),
        ("pfeiffer", "method.activation=sin", "method.activation='sin' must be one of gelu, relu, silu, tanh"),
        ("sora", "method.lam=-0.1", "method.lam=-0.1 must be a number of at least 0"),
        ("sora", "method.lam_start=0.1", "method.lam_start=0.1 must lie between 0 and method.lam=0.001"),
        ("sora", "method.stages=0", "method.stages=0 must be a whole number of at least 1"),
        ("r_lora", "method.regulariser.weight=-1", "method.regulariser.weight=-1 must be a number of at least 0"),
        ("r_lora", "method.regulariser.form=cube", "method.regulariser.form='cube' must be one of squared, mean_norm"),
        ("r_lora", "+method.regulariser.wait=1", "method=r_lora has no setting method.regulariser.wait"),
        ("gm_lora", "method.mask.rank=5", "method.mask.rank=5 must not be above rank=4"),
        ("gm_lora", "method.mask.rank=0", "method.mask.rank=0 must be a whole number of at least 1"),
        (
            "gm_lora",
            "method.mask.rank=all",
            "method.mask.rank='all' must be a whole number of at least 1, at most 1,000,000,000, or half, or null",
        ),
        (
            "gm_lora",
            "method.mask.head=true",
            "with method.mask.start=0 never trains the head",
        ),
        ("diffora", "method.mask.target=update", "method.mask.target=update needs method.mask.rank, the directions to"),
        ("diffora", "method.mask.head=true", "method.mask.head=true needs method.mask.rank"),
        ("rm_lora", "method.mask.every=day", "method.mask.every='day' must be one of step, epoch"),
        ("diffora", "method.mask.rank=5", "method.mask.rank=5 must not be above rank=4"),
        ("adalora", "method.init_rank=2", "method.init_rank=2 must be above rank=2"),
        ("bitfit", "finetune.lora_plus_ratio=4", "lora_plus_ratio=4: method=bitfit trains no B of a low-rank update"),
        ("vera", "finetune.lora_plus_ratio=4", "lora_plus_ratio=4: method=vera trains no B of a low-rank update"),
        ("peft", "method.config._target_=peft.DoraConfig", "peft.DoraConfig does not exist in PEFT; did you mean"),
    ],
)
def test_each_mistake_in_a_methods_settings_has_its_message(cfg, method, override, words):
    found = messages(cfg, "task=mrpc", f"method={method}", override)
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize("given", ["{0:1,1:5}", "{0:2,bug:3}"])
def test_class_weights_of_classes_whose_names_are_numbers(cfg, given):
    composed = cfg(f"finetune.class_weights={given}")
    settings, _ = check(composed)
    expected = {"0": 1, "1": 5} if "1:5" in given else {"0": 2, "bug": 3}
    assert settings.finetune.class_weights == settings.composed["finetune"]["class_weights"] == expected
    # A record from a file has texts as keys.
    assert differences(json.loads(json.dumps(plain(composed))), plain(composed)) == []
    assert len(config_hash(composed)) == 16


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("finetune.class_weights={1.5:2}", "finetune.class_weights.1.5"),
        ("finetune.class_weights={true:2}", "finetune.class_weights.True"),
        ("+finetune.optimizer={_target_: torch.optim.SGD, 3: 1}", "finetune.optimizer.3"),
    ],
)
def test_other_keys_must_be_texts(cfg, override, key):
    assert messages(cfg, override)[0].startswith(f"{key}: the name of a setting must be text")


def test_two_weights_for_one_class_are_refused(cfg):
    composed = cfg("finetune.class_weights={0:1}")
    composed.finetune.class_weights = {0: 1, "0": 2}
    with pytest.raises(UserError, match=r"class_weights\.0: the name of a setting must be text, which 0 is not"):
        check(composed)


def test_all_mistakes_come_at_once(cfg):
    found = messages(cfg, "rho=2", "rank=0", "finetune.lr=-1", "search.epochs=0", "method.alpha=-1", "model.path=/no/x")
    assert len(found) == 6


@pytest.mark.parametrize(
    ("text", "number"),
    [(350_000, 350_000), ("350k", 350_000), ("0.35M", 350_000), ("1.1M", 1_100_000), ("0.0000019M", 1), ("0.29k", 290)],
)
def test_a_budget_is_parsed_as_an_exact_decimal(text, number):
    assert parse_budget(text) == number


def test_with_a_budget_the_mask_may_exceed_the_given_rank(cfg):
    check(cfg("method.budget=1M", "method.mask.rank=8"))


def test_warm_start_needs_a_selector_that_trains_a_and_b(cfg):
    found = messages(cfg, "method.warm_start=true", "method.selector=gradient")
    assert found == ["method.warm_start=true needs a selector that trains A and B, which gradient does not"]
    assert "method.budget" in messages(cfg, "method.warm_start=true", "method.budget=350k")[0]
    check(cfg("method.warm_start=true", "method.budget=350k", "method.scope=global"))


def test_a_method_rejects_a_knob_it_does_not_have(cfg):
    assert messages(cfg, "method=lora", "+method.shared_rank=2") == ["method=lora has no setting method.shared_rank"]
    assert messages(cfg, "method=full_ft", "+rank=2") == ["method=full_ft has no rank"]
    assert messages(cfg, "method=lora", "+rho=0.5") == ["method=lora has no rho"]


def test_all_composition_errors_are_explained_at_once():
    found = composition_problems(
        ["method=diffroa", "task=mrpcc", "finetune.epoch=3", "rank=0", "task.path_=x", "hydra.run.dir=/tmp/x"]
    )
    text = "\n".join(found)
    assert f"method=diffroa is not one of: {', '.join(GROUPS['method'])}" in text
    assert f"task=mrpcc is not one of: {', '.join(GROUPS['task'])}" in text
    assert "unknown key finetune.epoch: did you mean finetune.epochs" in text
    assert "task=mrpc has no setting task.path_" in text


def test_arguments_of_an_optimiser_without_a_plus_are_explained():
    [problem] = composition_problems(["method=lora", "finetune.optimizer._target_=torch.optim.SGD"])
    assert problem.startswith("finetune.optimizer._target_: write finetune.optimizer='{_target_: ")


def test_a_second_order_search_cannot_be_compiled(cfg):
    found = messages(cfg, "search.order=2", "trainer.compile=true")
    assert found == ["search.order=2 differentiates twice, which does not go with trainer.compile=true"]


def test_a_knob_of_another_method_is_explained():
    found = composition_problems(["method=lora", "method.shared_rank=2", "search.epochs=1", "rho=0.5"])
    assert len(found) == 3 and all(line.startswith("method=lora has no setting") for line in found)


def test_recipes_give_defaults_and_the_users_values_override_them(cfg):
    recipe = cfg("task=cola")
    assert (recipe.rank, recipe.finetune.lr, recipe.finetune.early_stop) == (4, 3e-4, 5)
    given = cfg("task=cola", "rank=8", "finetune.lr=1e-2")
    assert (given.rank, given.finetune.lr, given.finetune.epochs) == (8, 1e-2, 6)


def test_the_hash_depends_only_on_settings_that_change_results(cfg):
    base = config_hash(cfg("task=mrpc"))
    assert base == config_hash(cfg("task=mrpc", "resume=true", "logger=csv", "debug=default"))
    work = "trainer.num_proc=2", "trainer.num_workers=1", "trainer.cache_prefix_limit=1"
    assert base == config_hash(cfg("task=mrpc", *work))
    assert len({base, *(config_hash(cfg("task=mrpc", o)) for o in ("seed=1", "rank=5", "finetune.lr=1e-2"))}) == 4


@pytest.mark.parametrize("key", ["finetune.weight_decay=0", "finetune.clip=1", "rho=1", "method.alpha=8"])
def test_whole_numbers_have_one_hash_however_they_are_written(cfg, key):
    """A run that was started with one form is continued with the other, and both are one row of a report."""
    one, other = cfg("task=mrpc", key), cfg("task=mrpc", f"{key}.0")
    assert config_hash(one) == config_hash(other) and not differences(plain(one), plain(other))
    assert setting_facts(one, None)["setting_id"] == setting_facts(other, None)["setting_id"]


def test_a_key_that_is_null_and_one_that_an_older_version_lacks_are_the_same(cfg):
    composed = cfg("task=mrpc")
    with open_dict(composed):
        composed.finetune.new_key = None
    assert config_hash(composed) == config_hash(cfg("task=mrpc"))


def test_differences_name_key_and_both_values(cfg):
    old, new = plain(cfg("rank=4")), plain(cfg("rank=8", "resume=true"))
    assert differences(old, new) == ["rank: 4 -> 8", "search.rank: 4 -> 8"]


WHOLE = "must be a whole number of at least"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # C: settings that caused an unexpected error
        ("seed=4294967296", f"seed=4294967296 {WHOLE} 0, at most 4,294,967,295"),
        ("finetune=null", "finetune=null must be a group of settings: "),
        ("finetune=5", "finetune=5 must be a group of settings: "),
        ("~task", "task is missing: choose one with task=<name>"),
        ("trainer.strategy=foo", "trainer.strategy='foo' must be one of auto, ddp, ddp_find_unused"),
        ("finetune.batch_size=99999999999999999999", f"{WHOLE} 1, at most 1,000,000,000"),
        # similar cases
        ("task=null", "task=null is not one of: alpaca, chat"),
        ("model=null", "model=null is not one of: bart_base, bert_base"),
        ("method=null", "method=null is not one of: adalora"),
        (
            "logger=null",
            "logger=null is not one of: comet, csv, mlflow, none, tensorboard, trackio, wandb; logger=[] for",
        ),
        ("recipe=5", "recipe=5 is not one of: fast, rm_lora, roberta"),
        ("trainer=5", "trainer=5 is not one of: cpu"),
        ("cell=5", "cell=5 must be a group of settings: experiment, row, column"),
        ("search=null", "search=null must be a group of settings: epochs, "),
        ("~search", "search is missing"),
        ("~method", "method is missing: choose one with method=<name>"),
        ("~model", "model.path is missing: choose one with model=<name>"),
        ("~finetune.lr", "finetune.lr is missing"),
        ("~task.max_length", "task.max_length is missing"),
        ("~seed", "seed is missing"),
        ("seed={a: 1}", f"seed={{'a': 1}} {WHOLE} 0"),
        ("seed=1.0", f"seed=1.0 {WHOLE} 0"),
        ("+seeds={}", "unknown key seeds: did you mean seed?"),
        ("scale=small", "scale=small is for tables, and this run is of none"),
        ("+logger.foo=1", "unknown key logger.foo"),
        ("+task.recipe.epoch=1", "unknown key task.recipe.epoch: did you mean task.recipe.epochs?"),
        ("finetune.lr=inf", "finetune.lr=inf must be a number above 0"),
        ("finetune.lr=1e-300", "finetune.lr=1e-300 must be a number above 0, at most 1,000,000,000, at least 1e-12"),
        ("method=houlsby method.init_std=0", "method.init_std=0 must be a number above 0"),
        ("model.dtype=float16 trainer.precision=bf16-mixed", "use model.dtype=bfloat16 or float32"),
        ("finetune.lr=1e308", "finetune.lr=1e+308 must be a number above 0, at most 1,000,000,000"),
        ("finetune.weight_decay=nan", "finetune.weight_decay=nan must be a number of at least 0"),
        ("finetune.lr=${model.name}", "finetune.lr='deberta_v3_base' must be a number above 0"),
        ("task.recipe.lr=nan", "task.recipe.lr=nan must be a number above 0"),
        ("+model.config.x={a: [inf]}", "model.config.x.a[0]=inf must be a number, at most 1,000,000,000 in size"),
        ("model.candidates=[[a]]", "model.candidates=[['a']] must be a list of the linear modules"),
        ("trainer.num_workers=100000", "trainer.num_workers=100000 must be a whole number of at least 0, at most 256"),
        ("method.selection=5", "method.selection=5 must be the name of a file or folder"),
        ("method.selection=[]", "method.selection=[] must be the name of a file or folder"),
        ("method.selection=[1]", "method.selection=[1] must be the name of a file or folder"),
        ("method.selection=conf", "method.selection: conf is not a regular file"),
        # B14 and B18
        ("method.regulariser.weight=nan", "method.regulariser.weight=nan must be a number of at least 0"),
        ("method.alpha=inf", "method.alpha=inf must be a number above 0"),
        ("method.selection=[key] method.warm_start=true", "method.warm_start=true needs the file of a search"),
        ("method.warm_start=true search.rank=9", "method.warm_start=true needs search.rank=9 to be rank=4"),
        ("method=sora method.lam=inf", "method.lam=inf must be a number of at least 0"),
        ("method=adalora method.beta1=nan", "method.beta1=nan must be a number between 0 and 1"),
        ("method=random method.draw=4294967296", f"method.draw=4294967296 {WHOLE} 0"),
        ("method=dora method.config.lora_alpha=nan", "method.config.lora_alpha=nan must be a number above 0"),
        ("method=eva method.config.eva_config.rho=inf", "method.config.eva_config.rho=inf must be a number"),
        ("method=vera method.config.r=100000", "method.config.r=100000 must be a whole number of at least 1"),
    ],
)
def test_one_message_says_what_is_accepted(overrides, words):
    """Cases B14, B18 and C of docs/project/reliability.md, and similar ones."""
    given = [overrides] if " [" in overrides or "{" in overrides else overrides.split(" ")
    found = composition_problems(given)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("output=null", "output=null must be the name of a file or folder"),
        ("output=5", "output=5 must be the name of a file or folder"),
        ("output=", "output='' must be the name of a file or folder"),
        ("batch_size=true", f"batch_size=true {WHOLE} 1"),
        ("batch_size=99999999999999999999", f"{WHOLE} 1, at most 1,000,000,000"),
        ("split=[]", "split=[] must be the name of a split, or a list of names"),
        ("run=elsewhere", "run= is given twice: 'x' and 'elsewhere'"),
    ],
)
def test_arguments_of_an_evaluation_are_checked_before_the_run_is_read(argument, words):
    with pytest.raises(UserError) as error:
        read_request(["run=x", argument])
    assert len(error.value.problems) == 1 and words in error.value.problems[0]


def test_a_file_with_a_wrong_choice_in_its_defaults_is_named(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /task: nowhere\n")
    [problem] = composition_problems(["experiment=mine"], [f"file://{tmp_path}"])
    assert problem.startswith("experiment=mine asks for task/nowhere, which is not one of: alpaca, chat")


@pytest.mark.parametrize("group", ["task", "method"])
def test_a_removed_group_is_named_together_with_its_settings(group):
    found = composition_problems(["model=tiny", f"~{group}", f"{group}.alpha.x=1", "seed=-1"])
    assert f"{group} is missing: choose one with {group}=<name>" in found
    assert any(f"unknown key {group}.alpha.x" in problem for problem in found)


def test_a_warm_start_needs_the_tensors_beside_the_selection_file(cfg, tmp_path):
    """Similar to B18: the mistake is found before data and backbone are loaded."""
    types, modules = ["a"], [["m.0.a"]]
    content = {"format": 1, "method": "diffora", "types": types, "modules": modules, "rho": 0.5, "seed": 0}
    file = tmp_path / "selection.json"
    file.write_text(json.dumps(content | {"selected": [["a"]]}))
    found = messages(cfg, f"method.selection={file}", "method.warm_start=true")
    assert found == [
        f"method.warm_start=true needs {tmp_path / 'selection.safetensors'}, which a search with "
        "method.warm_start=true leaves"
    ]
    check(cfg(f"method.selection={file}"))
    file.write_text(json.dumps(content | {"selected": 5}))
    assert "selected=5 must be a list of lists" in messages(cfg, f"method.selection={file}")[0]


def test_messages_list_choices_from_the_users_config_dir(tmp_path, monkeypatch):
    """C: composition errors are explained with the user's own config folders."""
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("defaults: [mrpc]\n")
    monkeypatch.setattr("sys.argv", ["train.py", "--config-dir", str(tmp_path), "task=mine"])
    assert added_paths() == [f"file://{tmp_path}"]
    assert composition_problems(["task=mine", "seed=-1"], added_paths()) == [
        f"seed=-1 {WHOLE} 0, at most 4,294,967,295"
    ]
    assert "mine, mnli" in composition_problems(["task=mime"], added_paths())[0]
    assert composition_problems(["task=mine"], ["file:///no/such"]) == ["--config-dir=/no/such is not a folder"]


def test_no_value_of_a_setting_causes_an_unexpected_error(cfg):
    """A few random values: each is accepted and can be written, or there are messages. `make faults` tests more."""
    bases = [cfg(*base) for base in fuzz_values.BASES]
    taken = refused = 0
    for _key, _value, changed in fuzz_values.cases(bases, seed=0, most=120):
        found = fuzz_values.outcome(changed)
        taken, refused = taken + (found is None), refused + (found is not None)
    assert refused > taken > 0


def test_overrides_with_several_values_are_found():
    given = ["rank=1,2", "seed=range(0,2)", "method.selection=[a,b]", "task.path='a,b'", "rank=3"]
    assert sweeps(given) == ["rank=1,2", "seed=range(0,2)"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task.path", "tickets (1).csv"),
        ("task.label_column", "größe"),
        ("task.label_column", "it's, a [x]=1"),
        ("task.path", "a\\b $HOME (1)\\"),
    ],
)
def test_a_value_that_needs_quotes_is_shown_with_them(key, value):
    [problem] = composition_problems(["method=lora", "task=text", f"{key}={value}"])
    shown = problem.removeprefix(f"{key}={value} cannot be read: write ")
    assert shown != problem
    [override] = parse(shlex.split(shown))
    assert (override.key_or_group, override.value()) == (key, value)
    wrong = []
    assert list(named_values([f"{key}={value}", f"{key}=plain"], wrong)) == [(f"{key}=plain", key, "plain")]
    assert wrong == [problem]
