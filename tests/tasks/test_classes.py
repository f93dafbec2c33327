"""Results by class: equal to scikit-learn's, for every task with classes, in the files and on the screen."""

import csv
import io
import warnings

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn import metrics as sk

from diffora.run.classes import SHOWN, print_classes, write_classes
from diffora.run.figures import MOST_CLASSES, confusion_matrix
from diffora.tasks import classes
from diffora.tasks.base import get_task
from diffora.tasks.classes import COLUMNS, ClassResults


def made(n: int, rows: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(labels, predicted classes): the last class has no row and the one before it is never predicted."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n - 1, rows)
    predicted = np.where(rng.random(rows) < 0.6, labels, rng.integers(0, n, rows))
    return labels, np.where(predicted == n - 2, 0, predicted)


def results(n: int, names: list[str] | None = None, rows: int = 200) -> ClassResults:
    labels, predicted = made(n, rows)
    return ClassResults.of_classes(names or [f"c{i}" for i in range(n)], torch.tensor(predicted), torch.tensor(labels))


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_results_match_scikit_learn(n):
    labels, predicted = made(n)
    found = results(n)
    wanted = sk.precision_recall_fscore_support(labels, predicted, labels=range(n), average=None, zero_division=0)
    for row, *values in zip(found.rows(), *wanted, strict=True):
        assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(values, abs=1e-6)
    np.testing.assert_array_equal(found.confusion.numpy(), sk.confusion_matrix(labels, predicted, labels=range(n)))
    for i, row in enumerate(found.rows()):
        wrong = predicted[(labels == i) & (predicted != i)]
        if len(wrong):
            assert row["confused_rows"] == (wrong == int(row["confused_with"][1:])).sum() == np.bincount(wrong).max()
        else:
            assert row["confused_with"] == row["confused_rows"] == ""


@pytest.mark.parametrize("n", [2, 3, 7, 40, 1000])
def test_averages_match_scikit_learn(n):
    labels, predicted = made(n, rows=3000)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # as in a run; torchmetrics then takes rows x classes^2 bytes
    try:
        found = results(n, rows=3000).averages()
    finally:
        torch.use_deterministic_algorithms(was)
    for name in ("macro", "weighted"):
        wanted = sk.f1_score(labels, predicted, average=name, zero_division=0)
        assert found[f"{name}_f1"] == pytest.approx(wanted, abs=1e-9)


def test_many_classes_have_no_confusion_matrix(tmp_path, monkeypatch):
    whole = results(40)
    monkeypatch.setattr(classes, "MOST_CONFUSED", 39)
    found = results(40)
    assert found.confusion is None and [file.name for file in write_classes(tmp_path, found)] == ["classes.csv"]
    assert [list(row.values())[:6] for row in found.rows()] == [list(row.values())[:6] for row in whole.rows()]


def test_a_checkpoint_keeps_the_results(tmp_path):
    found = results(5)
    torch.save(vars(found), tmp_path / "x.pt")
    again = ClassResults(**torch.load(tmp_path / "x.pt", weights_only=True))
    assert again.csv() == found.csv() and torch.equal(again.confusion, found.confusion)


def test_only_right_predictions_confuse_nothing():
    labels = torch.tensor([0, 1, 1])
    rows = ClassResults.of_classes(["a", "b"], labels, labels).rows()
    assert [row["f1"] for row in rows] == [1, 1] and not any(row["confused_with"] for row in rows)


def test_the_file_has_any_name_and_reads_back(tmp_path):
    names = ['a, "quoted" one', "línea\nnueva", "[bold]not markup", "意图"]
    files = write_classes(tmp_path, results(4, names), "test_")
    assert [file.name for file in files] == ["test_classes.csv", "test_confusion.png"]
    rows = list(csv.DictReader(io.StringIO(files[0].read_text())))
    assert [row["class"] for row in rows] == names and list(rows[0]) == list(COLUMNS)
    console = Console(width=120, file=io.StringIO(), force_terminal=False)
    print_classes(files[0], console, "rows")
    assert (
        "[bold]not markup" in console.file.getvalue() and "never predicted: [bold]not markup" in console.file.getvalue()
    )


def test_on_a_narrow_screen_no_number_is_cut(tmp_path):
    [file, *_] = write_classes(tmp_path, results(4, [f"a class with a long name, number {i}" for i in range(4)]))
    console = Console(width=72, file=io.StringIO(), force_terminal=False)
    print_classes(file, console, "rows")
    text = console.file.getvalue()
    assert "…" not in text and all(head in text for head in ("precision", "recall", "predicted"))
    for row in csv.DictReader(io.StringIO(file.read_text())):
        assert f"{float(row['f1']):.4f}" in text


def test_the_table_shows_the_worst_of_many_classes(tmp_path):
    [file, _] = write_classes(tmp_path, results(77, rows=2000))
    console = Console(width=120, file=io.StringIO())
    print_classes(file, console, "rows")
    text = console.file.getvalue()
    rows = {row["class"]: row for row in csv.DictReader(io.StringIO(file.read_text()))}
    assert f"the {SHOWN} of 77 classes with the lowest F1" in text
    shown = [line.split()[1] for line in text.splitlines() if line.startswith("│ c")]
    present = [name for name, row in rows.items() if int(row["support"]) or int(row["predicted"])]
    assert shown == sorted(present, key=lambda name: (float(rows[name]["f1"]), -int(rows[name]["support"])))[:SHOWN]


@pytest.mark.parametrize("n", [2, MOST_CLASSES, 1000])
def test_the_picture(n):
    names = [f"{'a very long name of a class ' * (i % 2)}{'$x_$' * (i == 0)}意{i}" for i in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = confusion_matrix(results(n, names))
    assert png.startswith(b"\x89PNG")
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    assert 400 < width < 3000 and 300 < height < 3000


@pytest.mark.parametrize("overrides", ["task=mrpc", "task=mnli", "task=digits model=tiny_vit", "task=paraphrase"])
def test_every_task_with_classes_has_results(cfg, overrides):
    task = get_task(cfg(*overrides.split()).task)
    if not task.head().get("id2label"):
        task.load()
    n = task.head()["num_labels"]
    logits, labels = torch.randn(30, n), torch.arange(30) % n
    outputs = {"row": torch.arange(30), "logits": logits, "labels": labels}
    found = task.class_results(outputs)
    assert list(found.names) == list(task.head()["id2label"].values())
    assert found.correct.sum() == (logits.argmax(1) == labels).sum() and found.support.sum() == 30
    assert task.class_results({key: outputs[key] for key in ("row", "logits")}) is None  # no labels


@pytest.mark.parametrize("name", ["stsb", "squad"])
def test_other_tasks_have_none(cfg, name):
    task = get_task(cfg(f"task={name}").task)
    assert task.class_results({"row": torch.arange(3), "logits": torch.randn(3, 1), "labels": torch.randn(3)}) is None
    assert task.class_results({"row": torch.arange(3)}) is None


def test_probabilities_are_in_the_predictions_of_glue(cfg):
    task = get_task(cfg("task=mnli").task)
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    lines = task.predictions({"row": torch.arange(5), "logits": logits}, None)
    for line, shares in zip(lines, logits.double().softmax(1), strict=True):
        assert list(line["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-6)
        assert (
            line["prediction"]
            == task.spec.label_names[line["class_number"]]
            == max(line["probabilities"], key=line["probabilities"].get)
        )
