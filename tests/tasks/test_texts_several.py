"""task=text task.kind=multilabel: rows with any number of classes, from the file to the predictions."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn import metrics as sk
from tables import write
from test_text import SHORT
from torch.nn import functional as F
from transformers import AutoTokenizer

from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run
from diffora.tasks.base import Split, get_task
from diffora.tasks.batches import parts_of
from diffora.tasks.texts.divide import choose_validation

NAMES = ("cheap", "fast", "tasty")
FLAGS = "task.label_columns=[x,y]"


def reviews(n: int = 40) -> list[tuple[str, list[str]]]:
    """Texts with 0 to 3 classes each."""
    rng = np.random.default_rng(0)
    return [
        (f"row {i} is {' '.join(found)}", found)
        for i in range(n)
        for found in [[n for n in NAMES if rng.random() < 0.5]]
    ]


def as_text(rows, sign: str) -> list[dict]:
    return [{"text": text, "label": sign.join(found)} for text, found in rows]


@pytest.fixture
def task(cfg):
    return lambda path, *more: get_task(cfg("task=text", "task.kind=multilabel", f"task.path={path}", *more).task)


def problems_of(task) -> str:
    with pytest.raises(UserError) as caught:
        task.load()
    return "\n".join(caught.value.problems)


# --- reading ---


def test_all_spellings_give_the_same_rows(task, tmp_path):
    rows = reviews()
    lists = [{"text": text, "label": found} for text, found in rows]
    flags = [{"text": text} | {name: int(name in found) for name in NAMES} for text, found in rows]
    columns = f"task.label_columns=[{','.join(NAMES)}]"
    tasks = [
        task(write(tmp_path / "a.jsonl", lists)),
        task(write(tmp_path / "a.parquet", lists)),
        task(write(tmp_path / "semi.csv", as_text(rows, "; "))),
        task(write(tmp_path / "comma.jsonl", as_text(rows, ","))),
        task(write(tmp_path / "bar.tsv", as_text(rows, "|"))),
        task(write(tmp_path / "slash.csv", as_text(rows, "/")), "task.label_separator='/'"),
        task(write(tmp_path / "flags.csv", flags), columns),
        task(write(tmp_path / "flags.parquet", flags), columns),
        task(
            write(tmp_path / "true.jsonl", [{k: bool(v) if k in NAMES else v for k, v in r.items()} for r in flags]),
            columns,
        ),
    ]
    loaded = [given.load() for given in tasks]
    assert len({found.data_hash for found in loaded}) == 1
    assert tasks[0].spec.label_names == NAMES
    found = {**dict(zip(loaded[0].train["text"], loaded[0].train["label"], strict=True))}
    assert all(found[text] == [NAMES.index(n) for n in names] for text, names in rows if text in found)
    assert "column 'label': classes are separated at ';'" in tasks[2].accounts["train"].notes


def test_class_numbers_with_names_as_the_hub_stores_them(task, tmp_path):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.List(datasets.ClassLabel(names=["b", "a"]))
    )
    rows = datasets.Dataset.from_list(
        [{"text": f"t {i}", "label": [i % 2] * (i % 3)} for i in range(12)], features=features
    )
    rows.to_parquet(tmp_path / "a.parquet")
    given = task(tmp_path / "a.parquet")
    found = given.load().train
    assert given.spec.label_names == ("a", "b")
    by_text = dict(zip(found["text"], found["label"], strict=True))
    assert all(label == ([1 - int(text[2:]) % 2] if int(text[2:]) % 3 else []) for text, label in by_text.items())


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        ("text,label\na,x;y\nb,\"x,y\"\n", [], "column 'label' has ';' and ','; say which one separates the classes"),
        ("text,x,y\na,1,0\nb,2,0\n", [FLAGS], "row 2 (data rows, counted from 1), column 'x': \"2\" is not 0 or 1"),
        ("text,x,y\na,1,0\nb,1,\n", [FLAGS], "row 2 (data rows, counted from 1), column 'y': \"\" is not 0 or 1"),
        ("text,x,z\na,1,0\n", [FLAGS], "no column 'y' (task.label_columns); it has text, x, z"),
        ("text,x,y\na,0,0\nb,0,0\n", [FLAGS], "no row has a class"),
        ("text,label\na,\"['x', 'y']\"\nb,['x']\nc,[]\n", [], "has lists written as text, such as ['x', 'y'];"),
        ("text,label\na,\nb,\n", [], "column 'label' is empty in all 2 rows"),
        ("text,label\na,x\nb,x\nc,\n", [], "the rows have no class but 'x'; at least two classes are needed"),
    ],
)  # fmt: skip
def test_mistakes_in_the_rows(task, tmp_path, content, more, words):
    (tmp_path / "t.csv").write_text(content)
    assert words in problems_of(task(tmp_path / "t.csv", *more))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['["x"]', '"x;y"'], "line 2, column 'label': \"x;y\" is not a list, but a list in earlier rows"),
        (['"x"', '["x"]'], "line 2, column 'label': [\"x\"] is a list, but text in earlier rows"),
        (['["x"]', '[["y"]]'], "line 2, column 'label': [[\"y\"]] is not a list of classes"),
        (
            ['["x", "y"]', "null"],
            "row 2 (data rows, counted from 1), column 'label': no label; every row needs a label",
        ),
    ],
)
def test_mistakes_in_json_lines(task, tmp_path, lines, words):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "t{i}", "label": {line}}}\n' for i, line in enumerate(lines)))
    assert words in problems_of(task(tmp_path / "t.jsonl"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.kind=classification", "task.label_columns=[a,b]"], "is for task.kind=multilabel"),
        (["task.kind=regression", "task.label_separator=x"], "is for task.kind=multilabel"),
        (["task.label_columns=[a]"], "must name at least two columns"),
        (["task.label_columns=[a,a]"], "names a column twice"),
        (["task.label_columns=[a,text]"], "task.label_columns=text is in task.text_columns too"),
        (["task.label_columns=[a,b]", "task.label_separator=x"], "hold 0 or 1"),
    ],
)
def test_impossible_settings(task, overrides, words):
    with pytest.raises(UserError, match=words):
        task("a.csv", *overrides)


def test_lists_need_multilabel(cfg, tmp_path):
    for file in ("t.jsonl", "t.parquet"):
        path = write(tmp_path / file, [{"text": text, "label": found} for text, found in reviews()])
        assert "task.kind=multilabel takes lists of classes" in problems_of(
            get_task(cfg("task=text", f"task.path={path}").task)
        )
    one = get_task(
        cfg(
            "task=text", f"task.path={write(tmp_path / 't.csv', [r for r in as_text(reviews(), ';') if r['label']])}"
        ).task
    )
    one.load()
    assert any("labels made of others" in note for note in one.accounts["train"].notes)


def test_known_classes_decide_what_separates(task, tmp_path):
    """A new file may have rows of one class each, whose names have a comma."""
    given = task(
        write(tmp_path / "t.csv", [{"text": f"t {i}", "label": ("a, b;c", "c", "a, b")[i % 3]} for i in range(9)])
    )
    assert "has ';' and ','" in problems_of(given)
    given.expect(["a, b", "c"])
    assert given.load_split("all")["label"][:3] == [[0, 1], [1], [0]]


# --- dividing ---


@pytest.mark.parametrize("seed", range(10))
def test_every_class_is_in_training_and_most_in_validation(seed):
    rng = np.random.default_rng(seed)
    rates = rng.uniform(0.05, 0.6, 6)
    labels = [np.flatnonzero(rng.random(6) < rates).tolist() for _ in range(200)]
    texts = [f"t{rng.integers(150)}" for _ in labels]  # a text may have several labels
    table = pa.table(
        {"text": pa.chunked_array([texts]), "label": pa.chunked_array([pa.array(labels, pa.list_(pa.int64()))])}
    )
    chosen = choose_validation(table, 0.2, seed, by_class=True)
    train = {label for row, out in zip(labels, chosen, strict=True) if not out for label in row}
    assert train == {label for row in labels for label in row}
    assert not {t for t, out in zip(texts, chosen, strict=True) if out} & {
        t for t, out in zip(texts, chosen, strict=True) if not out
    }
    assert 0.1 < chosen.mean() < 0.3
    counts = np.bincount([label for row in labels for label in row], minlength=6)
    present = np.bincount([label for row, out in zip(labels, chosen, strict=True) if out for label in row], minlength=6)
    assert (present[counts >= 10] > 0).all()


# --- loss and metrics ---


def encoded(task, tmp_path, n=12):
    given = task(write(tmp_path / "t.csv", as_text(reviews(n), ";")), "task.max_length=16")
    rows, tokenizer = given.load().train, AutoTokenizer.from_pretrained(EMBEDDED)
    return given, Split(rows, given.encode(rows, tokenizer, training=True)), given.collate(tokenizer, training=True)


def test_batches_and_counts(task, tmp_path):
    given, split, collate = encoded(task, tmp_path)
    batch = collate(split.encoded[:])
    wanted = [[float(i in row) for i in range(3)] for row in split.rows["label"]]
    assert batch["labels"].tolist() == wanted
    dummy = given.dummy(4, type("M", (), {"main_input_name": "input_ids"}))
    assert dummy["labels"].shape == (4, 3) and dummy["labels"].dtype == torch.float32


def test_the_loss_is_the_mean_over_rows_and_classes(task, tmp_path):
    given, split, collate = encoded(task, tmp_path)
    batch = collate(split.encoded[:])
    logits = torch.randn(len(split.rows), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, y = logits.sigmoid(), batch["labels"].double()
    formula = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    output = type("Output", (), {"logits": logits})
    torch.testing.assert_close(given.loss(output, batch), formula)
    rows = {int(row): i for i, row in enumerate(batch["row"])}
    parts = [
        (given.loss(type("Output", (), {"logits": logits[[rows[int(r)] for r in part["row"]]]}), part), share)
        for part, share in parts_of(batch, 3, given)
    ]
    torch.testing.assert_close(sum(loss * share for loss, share in parts), formula)


def cases():
    rng = np.random.default_rng(0)
    random = rng.random((40, 5)) < 0.4
    yield "random", random, rng.random((40, 5)) < 0.4
    yield "never predicted", random, random & (np.arange(5) != 2)
    yield "absent class", random & (np.arange(5) != 1), rng.random((40, 5)) < 0.4
    yield "absent and never predicted", random & (np.arange(5) != 1), random & (np.arange(5) != 1)
    yield "nothing predicted", random, np.zeros_like(random)
    yield "rows without a class", np.zeros_like(random), rng.random((40, 5)) < 0.4
    yield "nothing at all", np.zeros_like(random), np.zeros_like(random)
    yield "one row", random[:1], random[1:2]


@pytest.mark.parametrize(("labels", "predicted"), [c[1:] for c in cases()], ids=[c[0] for c in cases()])
def test_metrics_match_scikit_learn(task, labels, predicted):
    given = task("t.csv")
    given.expect([f"c{i}" for i in range(5)])
    logits = torch.tensor(np.where(predicted, 1.5, -0.5))
    logits[0, 0] = 0.0 if predicted[0, 0] else logits[0, 0]  # exactly 0.5 counts as predicted
    outputs = {"row": torch.arange(len(labels)), "logits": logits, "labels": torch.tensor(labels).float()}
    found = given.score(outputs, Split(None, None))
    assert list(found) == ["loss", *given.metrics]
    for name in ("micro", "macro", "weighted"):
        assert found[f"{name}_f1"] == pytest.approx(
            sk.f1_score(labels, predicted, average=name, zero_division=0), abs=1e-6
        )
    assert found["subset_accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-6)
    assert found["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, outputs["labels"].double()).item())
    values = sk.precision_recall_fscore_support(labels, predicted, average=None, zero_division=0)
    for row, *wanted in zip(given.class_results(outputs).rows(), *values, strict=True):
        assert [row[k] for k in ("precision", "recall", "f1", "support")] == pytest.approx(wanted, abs=1e-6)
    for line, flags in zip(given.predictions(outputs, Split(None, None)), predicted, strict=True):
        assert line["class_number"] == np.flatnonzero(flags).tolist() and len(line["probabilities"]) == 5


# --- a whole run ---


def test_a_run_and_new_rows(cfg, tmp_path):
    write(tmp_path / "t.csv", as_text(reviews(), ";"))
    folder = tmp_path / "run"
    given = ["task=text", "task.kind=multilabel", f"task.path={tmp_path / 't.csv'}", *SHORT.split()]
    result = run(cfg(*given), folder)
    assert result.record["classes"] == list(NAMES) and result.record["main_metric"] == "micro_f1"
    assert result.model.config.problem_type == "multi_label_classification"
    assert "multi_label_classification" in (folder / "adapter" / "README.md").read_text()
    assert (folder / "classes.csv").read_text().count("\n") == 4 and not (folder / "confusion.png").exists()
    out = tmp_path / "own"
    [score] = evaluate(read_request([f"run={folder}", f"output={out}"])).values()
    assert score["micro_f1"] == pytest.approx(result.record["metrics"]["validation/micro_f1"], abs=1e-6)
    write(tmp_path / "new.jsonl", [{"text": "fast and cheap"}])
    assert evaluate(
        read_request([f"run={folder}", f"task.path={tmp_path / 'new.jsonl'}", f"output={tmp_path / 'new'}"])
    ) == {"all": {}}
    [line] = map(json.loads, (tmp_path / "new" / "all.jsonl").read_text().splitlines())
    assert line["prediction"] == [name for name, p in line["probabilities"].items() if p >= 0.5]


@pytest.mark.parametrize("named", [True, False])
def test_null_in_a_list_is_refused_with_its_row(task, tmp_path, named):
    kind = datasets.ClassLabel(names=["a", "b"]) if named else datasets.Value("string")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.List(kind))
    labels = [[0], [1, None], [0, 1], [None]] if named else [["a"], ["b", None], ["a", "b"], [None]]
    rows = [{"text": f"t {i}", "label": label} for i, label in enumerate(labels)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    said = (
        "row 2 (data rows, counted from 1), column 'label': the list of labels has a null in it (and 1 more such row)"
    )
    assert said in problems_of(task(tmp_path / "a.parquet"))


def test_a_separator_can_be_white_space(task, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"t{i},{'x y' if i % 2 else 'y'}\n" for i in range(8)))
    given = task(tmp_path / "t.csv", "task.label_separator=' '")
    given.load()
    assert given.spec.label_names == ("x", "y")


def test_empty_names_and_spaces(task, tmp_path):
    table = pa.table(
        {"text": [f"t{i}" for i in range(6)], "label": [["x ", ""], [" x", "y"], [], ["y", "y"], ["x"], ["y"]]}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    given = task(tmp_path / "t.parquet")
    given.load()
    assert given.spec.label_names == ("x", "y")
    assert given.load_split("all")["label"][:4] == [[0], [0, 1], [], [1]]
