"""The papers' settings: every method with every recipe on every GLUE task, and the values against the papers."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from diffora.errors import UserError
from diffora.places import conf_dir
from diffora.run.check import check
from diffora.run.composition import composition_problems
from diffora.run.experiment import run

METHODS = sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml"))
RECIPES = [None, *sorted(file.stem for file in (conf_dir() / "recipe").glob("*.yaml"))]
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "qnli", "mnli", "wnli", "rte")

# RM-LoRA, Table 4: epochs and SoRA's lambda; for all: learning rate 1e-3, 1e-5 for full fine-tuning, batch 32
TABLE_4 = {
    "cola": (3, 0.001),
    "sst2": (3, 0.005),
    "mrpc": (5, 0.001),
    "stsb": (3, 0.001),
    "qqp": (3, 0.005),
    "qnli": (3, 0.0001),
    "mnli": (3, 0.005),
    "wnli": (5, 0.01),
    "rte": (3, 0.005),
}


@pytest.fixture(scope="module")
def composed():
    """Task sections by (recipe, task), and whole configurations by method."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        tasks = {
            (recipe, task): compose("config", [f"task={task}", *([f"recipe={recipe}"] if recipe else [])]).task
            for recipe in RECIPES
            for task in GLUE
        }
        return tasks, {method: compose("config", [f"method={method}"]) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_accepts_every_recipe_on_every_task(composed, method):
    """Composing hundreds of configurations takes minutes. Methods do not change ``task``, so only it is replaced."""
    tasks, methods = composed
    cfg = methods[method].copy()
    for (_, name), task in tasks.items():
        with open_dict(cfg):
            cfg.task = task
        _, checked = check(cfg)
        assert checked.name == name


@pytest.mark.parametrize("name", GLUE)
def test_rm_lora_is_table_4(cfg, name):
    epochs, lam = TABLE_4[name]
    sora = cfg("method=sora", "recipe=rm_lora", f"task={name}")
    f = sora.finetune
    assert (f.lr, f.batch_size, f.epochs, f.warmup_steps, f.early_stop, f.dropout) == (0.001, 32, epochs, 0, None, 0.0)
    assert (sora.method.lam, sora.task.max_length) == (lam, 128)
    full = cfg("method=full_ft", "recipe=rm_lora", f"task={name}").finetune
    assert (full.lr, full.batch_size, full.epochs) == (0.00001, 32, epochs)


def test_the_roberta_recipe_is_in_the_ranges_of_appendix_d(cfg):
    given = cfg("recipe=roberta", "model=roberta_base", "task=cola")
    assert 4 <= given.rank <= 12 and 0.2 <= given.rho <= 0.7
    assert (given.finetune.lr, given.finetune.epochs) == (3e-4, 6)  # from Table 6, like all other values


def test_without_recipe_the_tasks_own_recipe_is_used(cfg):
    assert cfg("method=sora", "task=wnli").method.lam == 1e-3
    assert cfg("method=full_ft", "task=wnli").finetune.lr == cfg().model.full_ft_lr
    assert cfg("task=rte").finetune.epochs == 50


def test_given_values_override_a_recipe(cfg):
    given = cfg("method=full_ft", "recipe=rm_lora", "task=rte", "finetune.lr=1e-4", "finetune.epochs=1")
    assert (given.finetune.lr, given.finetune.epochs) == (1e-4, 1)


@pytest.mark.parametrize("name", ["paraphrase", "squad"])
def test_a_recipe_without_settings_for_a_task_says_so(cfg, name):
    with pytest.raises(UserError) as caught:
        check(cfg("recipe=rm_lora", f"task={name}"))
    assert len(caught.value.problems) == 1
    assert f"task={name}: it has them for cola, sst2" in caught.value.problems[0]


def test_an_unknown_recipe_is_named_with_the_known_ones():
    assert composition_problems(["recipe=rm_lore", "task=rte"]) == [
        "recipe=rm_lore is not one of: fast, rm_lora, roberta; did you mean rm_lora?"
    ]


def test_a_recipe_without_a_needed_value_says_which(cfg):
    broken = cfg("method=lora", "task=mrpc")
    with open_dict(broken):
        del broken.task.recipe["alpha"]
    with pytest.raises(UserError, match=r"method\.alpha: Interpolation key 'task\.recipe\.alpha' not found"):
        check(broken)


@pytest.fixture
def counts(cfg, tmp_path, monkeypatch):
    """Parameters as a dry run counts them, without its memory estimate, which takes longest."""
    monkeypatch.setattr("diffora.run.dry_run._memory", lambda *arguments: {})
    return lambda *overrides: run(cfg("dry_run=true", *overrides), tmp_path).record["params"]


@pytest.mark.parametrize(
    ("overrides", "count"),  # trained parameters in millions, with the head, as RM-LoRA's Table 1 counts
    [
        (["method=lora", "rank=4"], 1.26),
        (["method=rm_lora", "rank=4"], 1.26),
        (["method=r_lora", "rank=8"], 1.92),
        (["method=adalora", "rank=4", "method.init_rank=8"], 1.92),
        (["method=adalora", "rank=8", "method.init_rank=16"], 3.25),
        (["method=sora", "rank=8"], 1.92),
        (["method=sora", "rank=16"], 3.25),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_counts_of_rm_loras_table_1(counts, overrides, count):
    assert counts("recipe=rm_lora", *overrides)["trainable"] / 1e6 == pytest.approx(count, abs=0.005)


@pytest.mark.parametrize(
    ("overrides", "count"),  # adapter parameters, as DiffoRA's Table 8 counts
    [
        (["method=houlsby", "method.size=32"], 1.20),
        (["method=pfeiffer", "method.size=64"], 1.19),
        (["method=lora", "rank=8"], 1.33),
        (["method=flora", "rank=8"], 1.33),
        (["method=bitfit"], 0.10),
        (["method=diffora", "recipe=roberta"], 1.35),
        (["method=diffora", "recipe=roberta", "method.budget=1.32M"], 1.32),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_counts_of_table_8(counts, overrides, count):
    assert counts("model=roberta_base", "task=cola", *overrides)["adapter"] / 1e6 == pytest.approx(count, abs=0.005)
