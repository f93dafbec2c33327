"""The task table, its YAML recipes, and the metrics against scikit-learn and scipy."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from sklearn import metrics as sk

from diffora.errors import UserError
from diffora.tasks.base import get_task
from diffora.tasks.glue import TASKS, compute_metrics, get_spec

CONF = Path(__file__).parents[2] / "conf" / "task"

# DiffoRA Table 6: lr, batch, epochs, shared rank, rank, alpha, dropout, warm-up, early stop. WNLI has RTE's.
TABLE_6 = {
    "mnli": (3e-4, 196, 7, 2, 4, 16, 0.25, 4000, None),
    "rte": (7e-4, 32, 50, 2, 4, 16, 0.2, 900, None),
    "qnli": (6e-4, 64, 5, 1, 6, 16, 0.35, 3000, None),
    "mrpc": (1e-3, 16, 14, 2, 4, 16, 0, 900, None),
    "qqp": (8e-4, 64, 5, 2, 4, 16, 0, 2000, None),
    "sst2": (1e-4, 32, 5, 2, 4, 16, 0, 3000, None),
    "cola": (3e-4, 16, 6, 2, 4, 16, 0.15, 900, 5),
    "stsb": (7e-4, 16, 7, 2, 4, 16, 0, 900, None),
    "wnli": (7e-4, 32, 50, 2, 4, 16, 0.2, 900, None),
}


def logits_for(predictions: np.ndarray, num_labels: int, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(len(predictions), num_labels, generator=torch.Generator().manual_seed(seed))
    return noise + 2 * torch.nn.functional.one_hot(torch.tensor(predictions), num_labels)


def test_every_task_has_a_yaml_and_every_yaml_a_task():
    of_glue = {file.stem for file in CONF.glob("*.yaml") if "glue.GlueTask" in file.read_text()}
    assert of_glue == set(TASKS)


@pytest.mark.parametrize("name", TABLE_6)
def test_yaml_carries_table_6(name):
    text = (CONF / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    keys = ("lr", "batch_size", "epochs", "shared_rank", "rank", "alpha", "dropout", "warmup_steps", "early_stop")
    assert tuple(config["recipe"][key] for key in keys) == TABLE_6[name]
    assert isinstance(config["recipe"]["lr"], float)  # YAML 1.1 reads 1e-3 as text
    assert config["recipe"]["rho"] == 0.5
    assert (config["name"], config["path"], config["max_train_rows"], config["max_length"]) == (name, None, None, 128)
    assert f"python train.py method=diffora task={name}" in text


def test_paraphrase_yaml():
    config = yaml.safe_load((CONF / "paraphrase.yaml").read_text())
    assert "path" not in config and config["train_rows"] > 0 and config["validation_rows"] > 0
    assert set(config["recipe"]) == set(yaml.safe_load((CONF / "mrpc.yaml").read_text())["recipe"])


@pytest.mark.parametrize("spec", TASKS.values(), ids=lambda spec: spec.name)
def test_table_is_consistent(spec):
    assert spec.main_metric in spec.metrics
    assert spec.num_labels == {"mnli": 3, "stsb": 1}.get(spec.name, 2)
    assert spec.is_regression == (spec.name == "stsb")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, spec.num_labels, generator=generator)
    labels = torch.rand(20, generator=generator) * 5 if spec.is_regression else torch.arange(20) % spec.num_labels
    values = compute_metrics(spec, logits, labels)
    assert tuple(values) == spec.metrics
    assert all(type(value) is float for value in values.values())


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match=r"task\.name=SST-2 .*did you mean 'sst2'.*mrpc"):
        get_spec("SST-2")
    assert get_spec("mrpc") is TASKS["mrpc"]


@pytest.mark.parametrize("seed", range(5))
def test_classification_metrics_match_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(0, 2, 101), rng.integers(0, 2, 101)
    logits = logits_for(predictions, 2, seed)
    pair = compute_metrics(TASKS["mrpc"], logits, torch.tensor(labels))
    assert pair["accuracy"] == pytest.approx(sk.accuracy_score(labels, predictions), abs=1e-6)
    assert pair["f1"] == pytest.approx(sk.f1_score(labels, predictions), abs=1e-6)  # of class 1
    matthews = compute_metrics(TASKS["cola"], logits, torch.tensor(labels))["matthews"]
    assert matthews == pytest.approx(sk.matthews_corrcoef(labels, predictions), abs=1e-6)

    labels, predictions = rng.integers(0, 3, 101), rng.integers(0, 3, 101)
    three = compute_metrics(TASKS["mnli"], logits_for(predictions, 3, seed), torch.tensor(labels))
    assert three["accuracy"] == pytest.approx(sk.accuracy_score(labels, predictions), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_regression_metrics_match_scipy(seed):
    rng = np.random.default_rng(seed)
    labels = np.round(rng.uniform(0, 5, 101) * 2) / 2  # many ties
    scores = np.round(labels + rng.normal(0, 1.5, 101), 1)
    values = compute_metrics(TASKS["stsb"], torch.tensor(scores)[:, None].float(), torch.tensor(labels).float())
    assert values["pearson"] == pytest.approx(stats.pearsonr(scores, labels)[0], abs=1e-5)
    assert values["spearman"] == pytest.approx(stats.spearmanr(scores, labels)[0], abs=1e-5)
    assert values["corr"] == pytest.approx((values["pearson"] + values["spearman"]) / 2)


@pytest.mark.parametrize(("label", "prediction"), [(0, 0), (1, 1), (0, 1), (1, 0), (None, 0), (None, 1), (1, None)])
def test_matthews_of_constant_columns_is_zero(label, prediction):
    mixed = np.arange(12) % 2
    labels = mixed if label is None else np.full(12, label)
    predictions = mixed if prediction is None else np.full(12, prediction)
    assert compute_metrics(TASKS["cola"], logits_for(predictions, 2), torch.tensor(labels)) == {"matthews": 0.0}


def test_matthews_of_few_rows_is_that_of_scikit_learn_also_if_a_column_is_constant():
    """torchmetrics gives 0.58 for three of four right in a split with one class."""
    for labels, predictions in itertools.product(itertools.product((0, 1), repeat=4), repeat=2):
        found = compute_metrics(TASKS["cola"], logits_for(np.array(predictions), 2), torch.tensor(labels))
        assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(labels, predictions), abs=1e-6)


def test_f1_without_positives_is_zero():
    values = compute_metrics(TASKS["mrpc"], logits_for(np.zeros(8, int), 2), torch.zeros(8, dtype=torch.long))
    assert values == {"accuracy": 1.0, "f1": 0.0}


@pytest.mark.parametrize("scores", [[2.5] * 6, [math.nan] * 6, [0, 1, 2, 3, 4, math.inf]])
def test_correlation_of_degenerate_scores_is_zero(scores):
    values = compute_metrics(TASKS["stsb"], torch.tensor(scores)[:, None], torch.arange(6).float() / 2)
    assert values == {"pearson": 0.0, "spearman": 0.0, "corr": 0.0}
    constant_labels = compute_metrics(TASKS["stsb"], torch.arange(6.0)[:, None], torch.full((6,), 3.0))
    assert constant_labels == {"pearson": 0.0, "spearman": 0.0, "corr": 0.0}


@pytest.mark.parametrize("shapes", [((5, 3), (5,)), ((5, 2), (4,)), ((0, 2), (0,)), ((5, 2), (5, 1))])
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="expected logits"):
        compute_metrics(TASKS["mrpc"], torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_validation_rows_that_are_loaded_alone_are_those_of_the_run(cfg):
    """Generated validation rows leave out training rows, so they depend on how many of these there are."""

    def rows_of(loaded):
        return [loaded[name][:] for name in ("sentence1", "sentence2", "label")]

    task = get_task(cfg("task=paraphrase", "model=tiny").task)
    assert rows_of(task.load_split("validation")) == rows_of(task.load().validation["validation"])
    fewer = get_task(cfg("task=paraphrase", "model=tiny", "task.train_rows=1").task)
    assert rows_of(fewer.load_split("validation")) != rows_of(task.load_split("validation"))
