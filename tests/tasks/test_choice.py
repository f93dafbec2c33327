"""task=choice: rows and labels in every spelling, batches, the simultaneous search, whole runs."""

import csv
import itertools
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import save_family

from diffora.backbones.load import load_backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.hypergradient import simultaneous
from diffora.core.lowrank import set_gates
from diffora.core.split import divided, shared_tables
from diffora.errors import UserError
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run
from diffora.settings.read import model_of
from diffora.tasks.base import Split, get_task
from diffora.tasks.batches import joined, parts_of

SHORT = "model=tiny trainer=cpu logger=csv task.max_length=32 finetune.batch_size=8"
LONG = ["the farmer", "a teacher was seen", "the gardener in the market", "somebody"]


def rows(n: int = 30, fewer: bool = True) -> list[dict]:
    """Rows with the columns context, choices, label; with ``fewer`` some have only two or three choices."""
    found = []
    for i in range(n):
        choices = LONG[: 2 + i % 3] if fewer else LONG
        found.append({"context": f"who told x{i}", "choices": list(choices), "label": i % len(choices)})
    return found


def write(file: Path, content: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), file)
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(content[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(content)
    return file


def columns(content: list[dict]) -> list[dict]:
    """The rows with one column for each choice."""
    return [
        {"context": row["context"], **{f"ending{i}": choice for i, choice in enumerate(row["choices"])}}
        | {"label": row["label"]}
        for row in content
    ]


ENDINGS = "task.choice_columns=[ending0,ending1,ending2,ending3]"


@pytest.fixture
def task(cfg):
    return lambda path, *overrides: get_task(cfg("task=choice", f"task.path={path}", *overrides).task)


def problems_of(task) -> str:
    with pytest.raises(UserError) as caught:
        task.load()
    return "\n".join(caught.value.problems)


def notes_of(task) -> str:
    task.load()
    return "\n".join(note for account in task.accounts.values() for note in account.notes)


# --- rows ---


def test_all_formats_give_the_same_rows(task, tmp_path):
    full = rows(fewer=False)
    loaded = [task(write(tmp_path / f"a.{kind}", full)).load() for kind in ("jsonl", "parquet")]
    loaded += [
        task(write(tmp_path / f"b.{kind}", columns(full)), ENDINGS).load()
        for kind in ("csv", "tsv", "jsonl", "parquet")
    ]
    assert len({found.data_hash for found in loaded}) == 1
    assert len(loaded[0].train) == 27 and len(loaded[0].validation["validation"]) == 3
    assert loaded[0].train[0] == {
        "context": "who told x0",
        "start": "",
        "choices": LONG,
        "label": 0,
        "number": 1,
    }


def test_rows_with_fewer_choices(task, tmp_path):
    listed = task(write(tmp_path / "a.jsonl", rows()))
    assert "rows have 2, 3 or 4 choices" in notes_of(listed)
    apart = task(
        write(tmp_path / "b.jsonl", [columns(rows())[2], *columns(rows())]), ENDINGS, "task.validation_fraction=0.2"
    )
    assert {len(choices) for choices in apart.load().train["choices"]} == {2, 3, 4}
    assert listed.most_choices == 4


@pytest.mark.parametrize("kind", ["number", "text of a number", "letter", "small letter", "text", "from 1"])
def test_the_right_choice_in_every_spelling(task, tmp_path, kind):
    spell = {
        "number": lambda row: row["label"],
        "text of a number": lambda row: f" {row['label']}",
        "letter": lambda row: "ABCD"[row["label"]],
        "small letter": lambda row: "abcd"[row["label"]],
        "text": lambda row: row["choices"][row["label"]],
        "from 1": lambda row: row["label"] + 1,
    }[kind]
    content = [row | {"label": spell(row)} for row in rows()]
    more = ["task.first_label=1"] if kind == "from 1" else []
    found = task(write(tmp_path / "a.jsonl", content), *more).load()
    assert found.data_hash == task(write(tmp_path / "b.jsonl", rows())).load().data_hash


def test_class_names_of_a_hub_data_set_are_numbers(task, tmp_path, monkeypatch):
    features = datasets.Features(
        sent1=datasets.Value("string"), sent2=datasets.Value("string"),
        **{f"ending{i}": datasets.Value("string") for i in range(4)}, label=datasets.ClassLabel(names=list("0123")),
    )  # fmt: skip
    content = [
        {"sent1": f"A man {i}.", "sent2": "He", **{f"ending{j}": LONG[j] for j in range(4)}, "label": i % 4}
        for i in range(12)
    ]
    made = datasets.Dataset.from_list(content, features=features)
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda name, config: asked.append((name, config)) or datasets.DatasetDict(train=made, validation=made),
    )
    swag = task("allenai/swag", "task=swag")
    found = swag.load()
    assert asked == [("allenai/swag", "regular")]
    assert found.train[5] == {"context": "A man 5.", "start": "He", "choices": LONG, "label": 1, "number": 6}


def test_several_columns_of_context(task, tmp_path):
    content = [{"a": f"one {i}", "b": "two", **rows()[i]} for i in range(20)]
    found = task(write(tmp_path / "a.jsonl", content), "task.context_columns=[a,b]", "task.start_column=context").load()
    assert found.train[0]["context"] == "one 0 two" and found.train[0]["start"] == "who told x0"
    alone = task(tmp_path / "a.jsonl", "task.context_columns=a").load()
    assert alone.train[0]["context"] == "one 0"


@pytest.mark.parametrize(
    ("changed", "column", "message"),
    [
        ({"label": 4}, "label", "4 is not the number of a choice: they are 0 to 2"),
        ({"label": 3}, "label", "they are 0 to 2; if labels count from 1: task.first_label=1"),
        ({"label": -1}, "label", "-1 is not the number of a choice"),
        ({"label": None}, "label", "null in place of a label"),
        ({"label": "A"}, "label", '"A" is not the number of a choice'),
        ({"choices": ["one"]}, "choices", "are too few choices: at least two are needed"),
        ({"choices": []}, "choices", "are too few choices"),
        ({"choices": ["one", " "]}, "choices", '" " is an empty choice; rows with fewer choices'),
        ({"choices": ["one", None]}, "choices", "null in place of a choice (choice 2)"),
        ({"choices": ["one", 2]}, "choices", "2 is not text (choice 2)"),
        ({"choices": "one;two"}, "choices", '"one;two" is not a list of choices'),
        ({"context": 3}, "context", "3 is not text"),
        ({"context": None}, "context", "null in place of a text"),
    ],
)  # fmt: skip
def test_a_faulty_row_is_named(task, tmp_path, changed, column, message):
    content = rows()
    content[7] |= changed
    found = problems_of(task(write(tmp_path / "a.jsonl", content)))
    assert f"a.jsonl, line 8, column '{column}': {message}" in found or (
        f"a.jsonl, line 8, column '{column}': " in found and message in found
    )


def test_labels_that_are_neither_letters_nor_texts_of_choices(task, tmp_path):
    content = [row | {"label": "ABCD"[row["label"]]} for row in rows()]
    content[0]["label"] = "C"
    assert '"C" is not the letter of a choice: they are A to B' in problems_of(
        task(write(tmp_path / "a.jsonl", content))
    )
    content = [row | {"label": row["choices"][row["label"]]} for row in rows()]
    content[0]["label"] = "nobody"
    found = problems_of(task(write(tmp_path / "b.jsonl", content)))
    assert '"nobody" is not the text of a choice: the farmer; a teacher was seen' in found
    content[0] |= {"choices": ["x", "x"], "label": "x"}
    assert "is the text of more than one choice" in problems_of(task(write(tmp_path / "c.jsonl", content)))


def test_labels_that_could_be_numbers_or_texts_are_refused(task, tmp_path):
    content = [{"context": f"2 - {i}", "choices": ["1", "0"], "label": str(i % 2)} for i in range(10)]
    file = write(tmp_path / "a.jsonl", content)
    found = problems_of(task(file))
    assert (
        "line 1, column 'label': \"0\" may be the number of a choice or its text: say which with task.label_kind="
        in found
    )
    number, text = (task(file, f"task.label_kind={kind}").load().train["label"][:] for kind in ("number", "text"))
    assert [1 - label for label in number] == text


def test_one_odd_row_does_not_decide_how_labels_are_read(task, tmp_path):
    """Labels that are texts of choices, which are numbers; in one row a choice is there twice."""
    content = [{"context": f"{i}", "choices": ["1", "2", "3", "0"], "label": str(i % 4)} for i in range(19)]
    content.append({"context": "twice", "choices": ["2", "2", "1", "0"], "label": "2"})
    found = problems_of(task(write(tmp_path / "a.jsonl", content)))
    assert "may be the number of a choice or its text: say which with task.label_kind= (and 18 more" in found


def test_a_file_without_rows_is_said_to_have_none(task, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    assert problems_of(task(tmp_path / "a.jsonl")) == f"{tmp_path / 'a.jsonl'}: no rows."


def test_a_label_after_a_row_without_one(task, tmp_path):
    content = rows(6)
    del content[0]["label"]
    file = write(tmp_path / "a.jsonl", content)
    with pytest.raises(UserError, match=r"line 2, column 'label': 1 is a label, but other rows have none \(and 4 more"):
        task(file).load_split("all")
    write(file, [content[0], *({**row, "label": -1} for row in content[1:])])
    assert "label" not in task(file).load_split("all").column_names


def test_other_mistakes(task, tmp_path):
    file = write(tmp_path / "a.csv", columns(rows(fewer=False)))
    assert "no column 'choices' (task.choices_column); it has context, ending0, " in problems_of(task(file))
    found = problems_of(task(file, "task.choice_columns=[Ending0,ending1]", "task.start_column=x"))
    assert "no column 'x' (task.start_column)" in found
    assert "no column 'Ending0' (task.choice_columns); it has " in found
    assert "perhaps task.choice_columns=[ending0,ending1]." in found
    empty = [row | {"ending3": ""} for row in columns(rows(fewer=False))]
    found = problems_of(task(write(tmp_path / "b.csv", empty), ENDINGS))
    assert "b.csv, row 1 (data rows, counted from 1), column 'ending3': \"\" is an empty choice; rows with" in found
    gap = [{k: v for k, v in row.items() if k != "ending1"} for row in columns(rows(fewer=False))[:3]]
    content = [columns(rows(fewer=False))[0], *gap]
    found = problems_of(task(write(tmp_path / "c.jsonl", content), ENDINGS))
    assert "c.jsonl, line 2, column 'ending1': null in place of a choice (choice 2) (and 2 more such rows)" in found


def test_what_is_strange_is_said(task, tmp_path):
    content = [row | {"choices": ["x", "x", *row["choices"]], "label": 0, "context": " "} for row in rows()]
    content = [row | {"choices": [*row["choices"], f"y{i}"]} for i, row in enumerate(content)]
    notes = notes_of(task(write(tmp_path / "a.jsonl", content)))
    for words in (
        "30 rows have the same choice twice",
        "30 rows have no context",
        "has the same place in all rows: label 0",
    ):
        assert words in notes


@pytest.mark.parametrize(
    ("labels", "n_rows", "more", "said"),
    [
        ((1, 2, 3), 30, [], True),
        ((0, 1, 2, 3), 30, [], False),
        ((1, 2, 3), 9, [], False),  # few rows
        ((1, 2, 3), 30, ["task.first_label=1"], False),
        (("B", "C"), 30, [], False),
    ],
)
def test_labels_that_may_count_from_1_are_noted(task, tmp_path, labels, n_rows, more, said):
    content = [
        row | {"label": label} for row, label in zip(rows(n_rows, fewer=False), itertools.cycle(labels), strict=False)
    ]
    notes = notes_of(task(write(tmp_path / "a.jsonl", content), *more))
    words = "no row has the first choice as the right one; if labels count from 1: task.first_label=1"
    assert (words in notes) is said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.choices_column=null"], "task.choices_column=null needs task.choice_columns"),
        (["task.context_columns=[]"], "task.context_columns=[] must name at least one column"),
        (["task.label_column=context"], "the column 'context' is named twice"),
        (["task.choice_columns=[a]"], "must be a list of columns, each once"),
        (["task.first_label=2"], "must be a whole number of at least 0, at most 1"),
    ],
)
def test_impossible_settings(cfg, overrides, message):
    with pytest.raises(UserError) as caught:
        get_task(cfg("task=choice", "task.path=a.csv", *overrides).task)
    assert message in str(caught.value)


# --- batches ---


@pytest.fixture
def made(cfg, tmp_path):
    """A task, its tokenizer, its encoded rows and a model with another head than zero."""

    def make(*overrides, first=0):
        content = [row | {"label": row["label"] + first} for row in rows()]
        file, overrides = write(tmp_path / "rows.jsonl", content), [*overrides, f"task.first_label={first}"]
        composed = cfg("task=choice", f"task.path={file}", *SHORT.split(), *overrides)
        task = get_task(composed.task)
        processor = task.processor(model_of(composed.model))
        part = task.load_split("all")
        split = Split(part, task.encode(part, processor, training=False))
        backbone = load_backbone(model_of(composed.model), task.model_request(), processor)
        torch.nn.init.normal_(backbone.model.classifier.weight)
        return task, processor, split, backbone

    return make


def test_a_row_has_the_same_scores_alone_and_in_a_batch_with_more_choices(made):
    task, processor, split, backbone = made()
    model, collate = backbone.model.eval(), task.collate(processor, training=False)
    batch = collate(split.encoded[0:9])
    assert batch["input_ids"].shape[:2] == (9, 4) and batch["n_choices"].tolist() == [2, 3, 4] * 3
    with torch.no_grad():
        together = task.outputs(model(**task.inputs(batch)), batch)
        wide = joined(collate(split.encoded[0:1]), collate(split.encoded[2:3]), task, processor.pad_token_id)
        both = task.outputs(model(**task.inputs(wide)), wide)
        for i in range(9):
            part = collate(split.encoded[i : i + 1])
            alone = task.outputs(model(**task.inputs(part)), part)
            torch.testing.assert_close(alone["logits"][0], together["logits"][i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both["logits"], together["logits"][[0, 2]], rtol=1e-4, atol=1e-5)
    assert torch.isneginf(together["logits"][0, 2:]).all() and together["logits"][0, :2].isfinite().all()


@pytest.mark.parametrize("first", [0, 1])
def test_the_scores_are_those_of_each_choice_by_itself(made, first):
    """transformers' head gives one score for each sequence; a row compares those of its choices."""
    task, processor, split, backbone = made(first=first)
    model = backbone.model.eval()
    outputs = task.outputs(*_run(task, model, task.collate(processor, False)(split.encoded[0:6])))
    for i, row in enumerate(rows()[:6]):
        encoded = processor([row["context"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(**{name: values[None] for name, values in encoded.items()}).logits[0]
        torch.testing.assert_close(outputs["logits"][i, : len(expected)], expected, rtol=1e-4, atol=1e-5)
    lines = task.predictions(outputs, split)
    assert sum(lines[1]["probabilities"]) == pytest.approx(1, abs=1e-5) and len(lines[1]["probabilities"]) == 3
    best = int(np.argmax(lines[1]["probabilities"]))
    assert lines[1]["prediction"] == best + first and lines[1]["choice"] == rows()[1]["choices"][best]
    right = [line["prediction"] == row["label"] + first for line, row in zip(lines, rows(), strict=False)]
    assert task.score(outputs, split)["accuracy"] == np.mean(right)


def _run(task, model, batch):
    with torch.no_grad():
        return model(**task.inputs(batch)), batch


def test_gradients_are_finite_and_micro_batches_do_not_divide_rows(made):
    task, processor, split, backbone = made()
    batch = task.collate(processor, True)(split.encoded[0:7])
    model = backbone.model.eval()
    head = model.classifier.weight

    def gradient(parts):
        losses = [task.loss(model(**task.inputs(part)), part) * share for part, share in parts]
        return torch.autograd.grad(sum(losses), head)[0]

    whole, parts = gradient([(batch, 1.0)]), gradient(list(parts_of(batch, 3, task)))
    assert whole.isfinite().all() and whole.abs().sum() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


# --- runs ---


@pytest.mark.parametrize("update", ["simultaneous", pytest.param("alternating", marks=pytest.mark.slow)])
def test_a_run_searches_trains_resumes_and_is_evaluated(cfg, tmp_path, update):
    torch.set_num_threads(1)
    file = write(tmp_path / "rows.jsonl", rows(24))
    composed = cfg(
        "method=diffora", "task=choice", f"task.path={file}", *SHORT.split(), f"search.update={update}",
        "search.epochs=1", "search.accumulate=2", "finetune.epochs=2", "finetune.lr=0.01",
    )  # fmt: skip
    whole = run(composed, tmp_path / "run")
    record = whole.record
    assert record["status"] == "completed" and 0 <= record["metrics"]["validation/accuracy"] <= 1
    if update == "alternating":
        return
    again = shutil.copytree(whole.folder, tmp_path / "again")
    next((again / "checkpoints").glob("finetune-0002-*.ckpt")).unlink()
    (again / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    composed.resume = True
    resumed = run(composed, again).record
    assert resumed["metrics"] == record["metrics"] and resumed["history"] == record["history"]

    evaluate(read_request([f"run={whole.folder}", "split=validation", f"output={tmp_path / 'a'}"]))
    scores = json.loads((tmp_path / "a" / "metrics.json").read_text())["metrics"]["validation"]
    assert scores["accuracy"] == pytest.approx(record["metrics"]["validation/accuracy"], abs=1e-6)
    assert scores["loss"] == pytest.approx(record["metrics"]["validation/loss"], rel=1e-3)
    new = write(tmp_path / "new.jsonl", [{"context": "who", "choices": ["a", "b", "c", "d", "e", "f"]}])
    assert evaluate(read_request([f"run={whole.folder}", f"task.path={new}", f"output={tmp_path / 'b'}"])) == {
        "all": {}
    }
    [line] = map(json.loads, (tmp_path / "b" / "all.jsonl").read_text().splitlines())
    assert len(line["probabilities"]) == 6  # more choices than any training row


def test_the_simultaneous_search_takes_the_two_gradients_of_separate_passes(cfg, tmp_path):
    """The gates get the gradient of the validation rows, A and B that of the training rows, all choices of a row."""
    file = write(tmp_path / "rows.jsonl", rows(12))
    composed = cfg("task=choice", f"task.path={file}", *SHORT.split())
    task = get_task(composed.task)
    processor = task.processor(model_of(composed.model))
    part = task.load_split("all")
    encoded = task.encode(part, processor, training=True)
    torch.manual_seed(0)
    model = load_backbone(model_of(composed.model), task.model_request(), processor).model.eval()
    grid = find_grid(model)
    layers = attach(
        model, grid.names, torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool), rank=2, shared_rank=None, alpha=4
    )
    for layer in itertools.chain(*layers):
        torch.nn.init.normal_(layer.lora_bt, std=0.1)
    train, valid = (task.collate(processor, True)(encoded[rows]) for rows in ([0, 1, 3], [2, 5, 4]))
    gates = torch.full((len(layers), len(layers[0])), 0.5, requires_grad=True)
    set_gates(layers, gates)
    pairs = [p for row in layers for layer in row for p in (layer.lora_a, layer.lora_bt)]
    head = [parameter.requires_grad_(True) for parameter in model.classifier.parameters()]

    def separate(batch, parameters):
        return torch.autograd.grad(task.loss(model(**task.inputs(batch)), batch), parameters, allow_unused=True)

    expected = [*separate(train, [*pairs, *head]), *separate(valid, [gates])]
    whole = joined(train, valid, task, processor.pad_token_id)
    each = task.sequences(whole)
    with divided(layers, shared_tables(model), 3 * each, 6 * each):
        logits = model(**task.inputs(whole)).logits
        losses = [
            task.loss(type("Output", (), {"logits": logits[rows]}), {k: v[rows] for k, v in whole.items()})
            for rows in (slice(3), slice(3, None))
        ]
        found = simultaneous(*losses, pairs, head, gates)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert expected[-1].abs().sum() > 0


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "distilbert", "mpnet")]


@pytest.mark.parametrize("name", ["roberta", "deberta-v2", *SLOW])
def test_every_family_with_a_head_for_choices(cfg, tmp_path, name):
    place = save_family(tmp_path / name, name)
    file = write(tmp_path / "rows.jsonl", rows(12))
    composed = cfg("task=choice", f"task.path={file}", "model=hf", f"model.path={place}", "task.max_length=60")
    task = get_task(composed.task)
    part = task.load_split("all")
    processor = task.processor(model_of(composed.model))
    encoded = task.encode(part, processor, training=False)
    model = load_backbone(model_of(composed.model), task.model_request(), processor).model.eval()
    batch, single = (task.collate(processor, False)(encoded[rows]) for rows in ([0, 1, 2], [0]))
    with torch.no_grad():
        wide, alone = model(**task.inputs(batch)).logits[0, :2], model(**task.inputs(single)).logits[0]
    torch.testing.assert_close(wide, alone, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_head_for_choices(cfg, tmp_path):
    place = save_family(tmp_path / "gpt2", "gpt2")
    file = write(tmp_path / "rows.jsonl", rows(12))
    composed = cfg(
        "method=lora",
        "task=choice",
        f"task.path={file}",
        "model=hf",
        f"model.path={place}",
        "trainer=cpu",
        "task.max_length=60",
    )
    with pytest.raises(UserError, match="is a gpt2 model, which has no head for task=choice: it needs"):
        run(composed, tmp_path / "run")
