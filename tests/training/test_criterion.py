"""Label smoothing and class weights: the training loss against its formula, and what stays as it is."""

from types import SimpleNamespace

import datasets
import ddp_finetune
import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from small import rows_of, small_task
from test_finetune import fit, module_of

from diffora.errors import UserError
from diffora.settings.sections import FineTune
from diffora.tasks.base import get_task
from diffora.training.criterion import Criterion, criterion_of


def settings(**changes):
    return FineTune(epochs=1, batch_size=8, lr=1e-2, warmup_steps=0, early_stop=None, **changes)


def by_hand(logits, labels, weights, smoothing):
    """[sum over terms of w[y] (1-e) (-log p[y]) + e/C sum_c w[c] (-log p[c])] / sum w[y], term by term in float64."""
    total, norm = 0.0, 0.0
    for row, label in zip(logits.reshape(-1, logits.shape[-1]).tolist(), labels.reshape(-1).tolist(), strict=True):
        if label < 0:
            continue
        top = max(row)
        log_sum = top + torch.tensor([x - top for x in row], dtype=torch.float64).exp().sum().log().item()
        costs = [log_sum - x for x in row]
        total += weights[label] * (1 - smoothing) * costs[label]
        total += smoothing / len(row) * sum(w * cost for w, cost in zip(weights, costs, strict=True))
        norm += weights[label]
    return total / norm


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.2, 3.0, 0.7]])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])  # rows, and tokens of rows
def test_the_loss_is_its_formula(shape, weights, smoothing):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(*shape, 3, dtype=torch.float64, generator=generator) * 3
    labels = torch.randint(0, 3, shape, generator=generator)
    if len(shape) == 2:
        labels[0, 2:] = -100
    criterion = Criterion(small_task(), smoothing, None if weights is None else torch.tensor(weights))
    if not smoothing and weights is None:
        labels = labels.clamp(min=0)  # the task's own loss has one label for each row
        logits, labels = logits.reshape(-1, 3), labels.reshape(-1)
    found = criterion.loss(SimpleNamespace(logits=logits), {"labels": labels})
    exact = [float(torch.tensor(w)) for w in weights or [1.0] * 3]
    assert found.item() == pytest.approx(by_hand(logits, labels, exact, smoothing), rel=1e-12)


@pytest.mark.parametrize("cut", [[2, 4], [1, 4], [3, 4]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_parts_of_a_batch_add_up_with_weights_below_one(cut, smoothing):
    """The gradients of a step are those of the whole batch. Some parts have no term, all sums of weights are odd."""
    torch.set_num_threads(1)
    task = ddp_finetune.CausalLMTask(SimpleNamespace(name="lm", score="loss"))
    weights = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 50 + 1e-3
    whole = [ddp_finetune.batch(i) for i in range(3)]
    parts = [ddp_finetune.some(b, slice(start, end)) for b in whole for start, end in zip([0, *cut], cut, strict=False)]
    at_once = ddp_finetune.gradients(whole, Criterion(task, smoothing, weights))
    found = ddp_finetune.gradients(parts, Criterion(task, smoothing, weights), accumulate_grad_batches=2)
    torch.testing.assert_close(found, at_once, rtol=1e-9, atol=1e-12)
    unweighted = ddp_finetune.gradients(whole, Criterion(task, smoothing))
    assert not torch.allclose(at_once, unweighted, rtol=1e-3)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = [0] * 17 + [1] * 5
    train = datasets.Dataset.from_dict({"labels": labels})
    criterion = criterion_of(settings(class_weights="balanced"), small_task(), train)
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=np.array(labels))
    assert criterion.weights.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    tokens = datasets.Dataset.from_dict({"labels": [[0, -100, 1], [0, 0]]})
    assert criterion_of(settings(class_weights="balanced"), small_task(), tokens).weights.tolist() == pytest.approx(
        [4 / (2 * 3), 4 / (2 * 1)]
    )


def test_weights_by_class_are_in_the_order_of_the_classes():
    names = list(small_task().head()["id2label"].values())
    criterion = criterion_of(settings(class_weights={names[1]: 3.0}), small_task(), rows_of(8))
    assert criterion.weights.tolist() == [1.0, 3.0]
    assert criterion_of(settings(class_weights=[2, 5]), small_task(), rows_of(8)).weights.tolist() == [2.0, 5.0]


def test_evaluation_is_neither_weighted_nor_smoothed(deberta):
    scores = []
    for criterion in (None, Criterion(small_task(), 0.3, torch.tensor([0.1, 9.0]))):
        module = module_of(deberta, lr=0.0)
        module.criterion = criterion or module.criterion
        torch.manual_seed(0)
        fit(module, epochs=1)
        scores.append(module.history[0])
    assert scores[0].pop("train/loss") != pytest.approx(scores[1].pop("train/loss"), rel=1e-3)
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("mrpc", {"class_weights": [1, 2, 3]}, "has 3 numbers; task=mrpc has the 2 classes"),
        ("mrpc", {"class_weights": {"equivalen": 2}}, "finetune.class_weights.equivalen: there is no such class; did"),
        ("stsb", {"label_smoothing": 0.1}, "finetune.label_smoothing=0.1: task=stsb does not choose one of several"),
        ("squad", {"class_weights": "balanced"}, "finetune.class_weights: task=squad does not choose one of several"),
        ("alpaca", {"label_smoothing": 0.1, "class_weights": [1]},
         "finetune.label_smoothing=0.1 and finetune.class_weights: task=alpaca does not"),
    ],
)  # fmt: skip
def test_tasks_and_weights_that_do_not_fit_are_refused(cfg, task, changes, words):
    with pytest.raises(UserError) as error:
        criterion_of(settings(**changes), get_task(cfg(f"task={task}").task), rows_of(8))
    assert words in error.value.problems[0]


def test_a_run_is_refused_before_it_writes_anything(cfg, tmp_path):
    from diffora.run.experiment import run

    overrides = ["experiment=quickstart", "method=lora", "task.train_rows=16", "task.validation_rows=16"]
    with pytest.raises(UserError, match="has 3 numbers"):
        run(cfg(*overrides, "finetune.class_weights=[1,2,3]"), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_with_equal_weights_the_loss_of_words_is_the_tasks_own(cfg):
    """`task=tokens`: pieces that stand for no word do not count, and a batch without a word has the loss 0."""
    task = get_task(cfg("task=tokens", "task.path=some/folder").task)
    assert task.classifies
    generator = torch.Generator().manual_seed(0)
    output = SimpleNamespace(logits=torch.randn(4, 6, 3, dtype=torch.float64, generator=generator))
    labels = torch.randint(0, 3, (4, 6), generator=generator)
    labels[0], labels[1, 3:] = -100, -100
    criterion = Criterion(task, 0.0, torch.ones(3))
    for part in (slice(None), slice(0, 1)):
        batch = {"labels": labels[part], "row": torch.arange(4)[part]}
        ours = criterion.loss(SimpleNamespace(logits=output.logits[part]), batch)
        theirs = task.loss(SimpleNamespace(logits=output.logits[part]), batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        assert criterion.weight(batch) == task.weight(batch)
