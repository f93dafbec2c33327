"""task=text: people's own texts with classes or numbers."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from scipy import stats
from sklearn import metrics as sk
from tables import write
from transformers import AutoTokenizer

from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.run.evaluate import evaluate, output_of, read_request
from diffora.run.experiment import run
from diffora.tasks.base import Split, get_task
from diffora.tasks.texts.divide import choose_validation
from diffora.tasks.texts.read import LONGEST

WORDS = {"bug": "it closes", "other": "where is the office", "billing": "the invoice is wrong"}
SHORT = "model=tiny trainer=cpu logger=csv method=lora task.max_length=32 finetune.epochs=1 finetune.batch_size=8"


def tickets(n: int = 30) -> list[dict]:
    """Rows with the columns text and label; the first class in the file is not the first by name."""
    names = list(WORDS)
    return [{"text": f"{WORDS[names[i % 3]]} {i}", "label": names[i % 3]} for i in range(n)]


@pytest.fixture
def task(cfg):
    return lambda path, *overrides: get_task(cfg("task=text", f"task.path={path}", *overrides).task)


def problems_of(task) -> str:
    with pytest.raises(UserError) as caught:
        task.load()
    return "\n".join(caught.value.problems)


# --- files ---


def test_all_formats_give_the_same_rows(task, tmp_path):
    rows = tickets()
    rows[3]["text"] = 'it says "no",\tand closes'
    loaded = [task(write(tmp_path / f"t.{kind}", rows)).load() for kind in ("csv", "tsv", "jsonl", "parquet")]
    assert len({found.data_hash for found in loaded}) == 1
    assert len(loaded[0].train) == 27 and len(loaded[0].validation["validation"]) == 3
    assert 'it says "no",\tand closes' in loaded[1].train["text"][:] + loaded[1].validation["validation"]["text"][:]


def test_classes_are_sorted_by_name_or_by_number(task, tmp_path):
    named, numbered = task(write(tmp_path / "a.csv", tickets())), tmp_path / "b.jsonl"
    assert list(named.head()["id2label"].values()) == ["billing", "bug", "other"]
    write(numbered, [{"text": f"t {i}", "label": (2, 10, -1)[i % 3]} for i in range(12)])
    assert list(task(numbered).head()["id2label"].values()) == ["-1", "2", "10"]


def test_the_hash_depends_on_the_names_of_the_classes(task, tmp_path):
    one = task(write(tmp_path / "a.csv", tickets())).load()
    renamed = [row | {"label": row["label"].upper()} for row in tickets()]
    other = task(write(tmp_path / "b.csv", renamed)).load()
    assert one.train["label"][:] == other.train["label"][:] and one.data_hash != other.data_hash


def test_class_names_and_whole_floats_of_parquet(task, tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    rows = datasets.Dataset.from_list([{"text": f"t {i}", "label": i % 2} for i in range(8)], features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    assert list(task(tmp_path / "a.parquet").head()["id2label"].values()) == ["no", "yes"]
    write(tmp_path / "b.parquet", [{"text": f"t {i}", "label": float(i % 2)} for i in range(8)])
    assert list(task(tmp_path / "b.parquet").head()["id2label"].values()) == ["0", "1"]


def test_one_two_and_three_columns_of_text(task, tmp_path):
    rows = [{"a": f"a{i}", "b": f"b{i}", "label": f"c{i}", "topic": "xy"[i % 2]} for i in range(10)]
    file = write(tmp_path / "t.csv", rows)
    one = task(file, "task.text_columns=a", "task.label_column=topic").load().train
    assert one.column_names == ["text", "label", "number"]
    pair = task(file, "task.text_columns=[b,label]", "task.label_column=topic")
    found = pair.load().train
    assert found.column_names == ["text", "text2", "label", "number"] and pair.spec.text_columns == ("text", "text2")
    assert [second[1:] for second in found["text2"]] == [first[1:] for first in found["text"]]
    joint = task(file, "task.text_columns=[a,b,label]", "task.label_column=topic")
    assert "a0 | b0 | c0" in [*joint.load().train["text"], *joint.load().validation["validation"]["text"]]
    assert any("joined into one text" in note for note in joint.accounts["train"].notes)


def test_a_folder_with_its_own_validation_and_test_files(task, tmp_path):
    write(tmp_path / "train.csv", tickets())
    write(tmp_path / "validation.jsonl", [*tickets(4), {"text": "new", "label": "bug"}])
    write(tmp_path / "test.tsv", [{"text": "one"}, {"text": "two"}])
    given = task(tmp_path)
    rows = given.load()
    assert len(rows.train) == 30 and len(rows.validation["validation"]) == 5
    assert rows.validation["validation"]["label"][:] == [1, 2, 0, 1, 1]
    assert "4 of 5 rows are training rows too" in "".join(given.accounts["validation"].notes)
    assert given.test_splits == ("test",) and given.load_split("test").column_names == ["text", "number"]


# --- dividing ---


def divided(rows: list[tuple[str, int]], fraction: float, seed: int = 0) -> np.ndarray:
    texts, labels = zip(*rows, strict=True)
    table = pa.table({"text": pa.chunked_array([list(texts)]), "label": pa.chunked_array([list(labels)])})
    return choose_validation(table, fraction, seed, by_class=True)


@pytest.mark.parametrize("seed", range(20))
def test_equal_texts_stay_together_and_every_class_is_in_training(seed):
    rng = np.random.default_rng(seed)
    rows = [(f"t{rng.integers(30)}", int(rng.integers(5) ** 2)) for _ in range(60)]  # a text may have several labels
    fraction = float(rng.choice([0.05, 0.3, 0.9]))
    chosen = divided(rows, fraction, seed)
    train = [row for row, is_chosen in zip(rows, chosen, strict=True) if not is_chosen]
    validation = [row for row, is_chosen in zip(rows, chosen, strict=True) if is_chosen]
    assert not {text for text, _ in train} & {text for text, _ in validation}
    assert {label for _, label in train} == {label for _, label in rows} and validation


def test_each_class_gives_its_share():
    rows = [(f"t{i}", int(i >= 80)) for i in range(100)] + [("only", 2)]
    chosen = divided(rows, 0.1)
    assert [chosen[:80].sum(), chosen[80:100].sum(), chosen[100]] == [8, 2, 0]
    assert (chosen != divided(rows, 0.1, seed=1)).any() and (chosen == divided(rows, 0.1)).all()
    assert divided([("a", 0), ("b", 0), ("c", 1), ("d", 1)], 0.1).sum() == 2  # at least one of each class


def test_the_division_is_recorded_and_repeats_are_counted(task, tmp_path):
    rows = tickets()
    given = task(write(tmp_path / "t.csv", [*rows, *rows[:4]]), "task.split_seed=7", "task.validation_fraction=0.2")
    loaded = given.load()
    n = len(loaded.validation["validation"])
    assert given.accounts["train"].dropped == {
        "taken for validation, task.validation_fraction=0.2, task.split_seed=7": n
    }
    assert not any("different labels" in note for note in given.accounts["train"].notes)
    assert "4 rows have the text of an earlier row" in "".join(given.accounts["train"].notes)
    assert not set(loaded.train["text"]) & set(loaded.validation["validation"]["text"])
    again = task(tmp_path / "t.csv", "task.split_seed=7", "task.validation_fraction=0.2")
    assert again.load_split("validation")["text"][:] == loaded.validation["validation"]["text"][:]


def test_doubtful_labels_are_noted(task, tmp_path):
    rows = tickets()
    given = task(write(tmp_path / "t.csv", [*rows, rows[0] | {"label": "bug"}, rows[1] | {"label": "bug"}]))
    given.load()
    contradictory = sum(row["label"] != "bug" for row in rows[:2])
    assert f"{contradictory} texts have rows with different labels" in given.accounts["train"].notes
    many = task(write(tmp_path / "m.csv", [{"text": f"t {i}", "label": f"l {i % 20}"} for i in range(25)]))
    many.load()
    assert "column 'label' has 20 different labels in 25 rows: are they classes?" in many.accounts["train"].notes


def test_numbers_that_float32_rounds_and_labels_written_as_lists_are_noted(task, tmp_path):
    numbers = [{"text": f"t {i}", "label": 16_777_216 + i} for i in range(8)]
    large = task(write(tmp_path / "n.csv", numbers), "task.kind=regression", "task.validation_fraction=0.25")
    large.load()
    assert any("different numbers in column 'label' are" in note for note in large.accounts["train"].notes)
    usual = task(
        write(tmp_path / "u.csv", [{"text": f"t {i}", "label": i / 10} for i in range(8)]), "task.kind=regression"
    )
    usual.load()
    assert not any("float32" in note for note in usual.accounts["train"].notes)
    lists = task(write(tmp_path / "l.csv", [{"text": f"t {i}", "label": f"['{'xy'[i % 2]}']"} for i in range(8)]))
    lists.load()
    assert any("labels written as lists, such as ['x']: are they classes?" in n for n in lists.accounts["train"].notes)


# --- mistakes ---

BAD = [
    ("text,topics\na,x\nb,y\n", ["task.label_column=topic"], "no column 'topic' (task.label_column); it has"),
    ("text,topics\na,x\nb,y\n", ["task.label_column=topic"], "perhaps task.label_column=topics"),
    ("Texts,label\na,x\nb,y\n", [], "perhaps task.text_columns=[Texts]"),
    ("text,text,label\na,a,x\nb,b,y\n", [], "2 columns are called 'text'"),
    ("text,label\na,x\nb,x\n", [], "all rows have the same label 'x'; at least two classes"),
    ("text,label\na,x\nb,\nc,y\nd,\n", [], "row 2 (data rows, counted from 1), column 'label': no label"),
    ("text,label\na,x\nb,\nc,y\nd,\n", [], "(and 1 more such row)"),
    ("text,label\na,x\n ,y\n", [], "row 2 (data rows, counted from 1), column 'text': the text is empty"),
    ("text,label\na,x\nb,y\ntext,label\nc,x\n", [], "line 4 repeats the header, as where two files were joined"),
    ("Text;Label\na;x\nb;y\n", [], "its fields are separated by semicolons; separate them by commas"),
    ("text,label\na,0.5\nb,1.25\n", [], "task.kind=regression"),
    ("text,label\na,0.0\nb,1.0\n", [], "or write whole numbers (1 in place of 1.0) if they are classes"),
    ("text,label\n", [], "no rows"),
    ("text;label\na;x\n", [], "separated by semicolons; separate them by commas"),
    ("text;body;label\na;b;x\n", ["task.text_columns=[text,body]"], "separated by semicolons; separate them by commas"),
    (
        "text,label\na,1\nb,high\n",
        ["task.kind=regression"],
        "row 2 (data rows, counted from 1), column 'label': \"high",
    ),
    ('text,label\na,1\nb,"1,5"\n', ["task.kind=regression"], '"1,5" is not a number'),
    ("text,label\na,1\nb,1e99\n", ["task.kind=regression"], '"1e99" is too large'),
    ("text,label\na,2\nb,2.0\n", ["task.kind=regression"], "all rows have the same number"),
    ("text,label\na,x\nb,y\n", [], "no class has two different texts"),
]


@pytest.mark.parametrize(("content", "overrides", "words"), BAD, ids=[words[:30] for *_, words in BAD])
def test_mistakes_in_the_rows(task, tmp_path, content, overrides, words):
    (tmp_path / "t.csv").write_text(content)
    found = problems_of(task(tmp_path / "t.csv", *overrides))
    assert words in found and str(tmp_path) in found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": 3, "label": "x"}', "line 3, column 'text': 3 is not text"),
        ('{"text": "a", "label": ["x"]}', "line 3, column 'label': [\"x\"] is not a label"),
        ('{"text": "\\ud800", "label": "x"}', "line 3, column 'text': '\\ud800' is not valid Unicode"),
        ('{"text": "a", "label": "x"', "line 3 is not JSON"),
    ],
)
def test_mistakes_in_json_lines(task, tmp_path, line, words):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "x"}\n\n' + line + "\n")
    assert words in problems_of(task(tmp_path / "t.jsonl"))


def test_a_class_only_in_validation(task, tmp_path):
    write(tmp_path / "train.csv", tickets())
    write(tmp_path / "validation.csv", [{"text": "a", "label": "Bug"}, {"text": "b", "label": "sales"}])
    found = problems_of(task(tmp_path))
    assert "validation.csv, row 1" in found and "'bug' is meant" in found and "(and 1 more such row)" in found


def test_a_validation_file_of_another_name_is_not_ignored(task, tmp_path):
    write(tmp_path / "train.csv", tickets())
    write(tmp_path / "dev.csv", tickets())
    assert "dev.csv is not read under this name; call it validation.csv" in problems_of(task(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "task.path=null"),
        (["task.path=rows.xlsx"], "csv, tsv, jsonl, parquet"),
        (["task.path=a.csv", "task.text_columns=[]"], "at least one column"),
        (["task.path=a.csv", "task.text_columns=[a,a]"], "names a column twice"),
        (["task.path=a.csv", "task.text_columns=[label]"], "task.label_column=label is in task.text_columns too"),
    ],
)
def test_impossible_settings(cfg, overrides, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        get_task(cfg("task=text", *overrides).task)


def test_no_such_file_and_no_such_split(task, tmp_path):
    assert "gone.csv does not exist" in problems_of(task(tmp_path / "gone.csv"))
    with pytest.raises(UserError, match="is one file; it has the splits all, train, validation"):
        task(write(tmp_path / "t.csv", tickets())).load_split("test")


def test_very_long_texts_are_cut_and_counted(task, tmp_path):
    rows = tickets(6)
    rows[0]["text"] = "a" * (LONGEST + 5)
    given = task(write(tmp_path / "t.csv", rows), "task.validation_fraction=0.01")
    loaded = given.load()
    longest = max(map(len, [*loaded.train["text"], *loaded.validation["validation"]["text"]]))
    assert longest == LONGEST and sum(given.accounts["train"].changed.values()) == 1


# --- metrics ---


def test_classification_metrics_match_scikit_learn(task, tmp_path):
    given = task(write(tmp_path / "t.csv", tickets()))
    given.load()
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, 101), rng.choice([0, 2], 101)
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), 3).float()
    found = given.score({"logits": logits, "labels": torch.tensor(labels)}, Split(None, None))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    for name in ("macro", "weighted"):
        assert found[f"{name}_f1"] == pytest.approx(sk.f1_score(labels, predicted, average=name))


def test_regression_metrics_match_scipy(task):
    given = task("t.csv", "task.kind=regression")
    rng = np.random.default_rng(0)
    labels, scores = rng.normal(size=50).astype("f4"), rng.normal(size=50).astype("f4")
    outputs = {"logits": torch.tensor(scores)[:, None], "labels": torch.tensor(labels)}
    found = given.score(outputs, Split(None, None))
    assert list(found) == ["loss", "pearson", "spearman", "mse"]
    assert found["mse"] == pytest.approx(((labels - scores) ** 2).mean(), rel=1e-5) and found["mse"] == found["loss"]
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, scores)[0], abs=1e-5)
    assert found["spearman"] == pytest.approx(stats.spearmanr(labels, scores)[0], abs=1e-5)


# --- whole runs ---


def test_a_run_and_new_rows(cfg, tmp_path):
    write(tmp_path / "t.csv", tickets())
    folder = tmp_path / "runs" / "one"
    record = run(cfg("task=text", f"task.path={tmp_path / 't.csv'}", *SHORT.split()), folder).record
    assert record["classes"] == ["billing", "bug", "other"] and record["main_metric"] == "accuracy"
    assert {"validation/accuracy", "validation/macro_f1", "validation/weighted_f1"} <= record["metrics"].keys()
    assert "billing" in (folder / "adapter" / "README.md").read_text()

    rows = [{"text": f"{WORDS[name]} again", "label": name} for name in ("other", "bug")]  # fewer classes, other order
    place = write(tmp_path / "new.jsonl", rows)
    found = evaluate(read_request([f"run={folder}", f"task.path={place}", f"output={tmp_path / 'out'}"]))
    assert found["all"].keys() == {"loss", "accuracy", "macro_f1", "weighted_f1"}
    [first, _] = map(json.loads, (tmp_path / "out" / "all.jsonl").read_text().splitlines())
    assert list(first["probabilities"]) == record["classes"]
    assert first["prediction"] == max(first["probabilities"], key=first["probabilities"].get)
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-5)

    [score] = evaluate(read_request([f"run={folder}", f"output={tmp_path / 'own'}"])).values()  # the same rows again
    assert score["accuracy"] == pytest.approx(record["metrics"]["validation/accuracy"], abs=1e-6)

    write(place, [{"text": "a", "label": "sales"}])
    with pytest.raises(UserError, match=r"\"sales\" is not a class of the training rows"):
        evaluate(read_request([f"run={folder}", f"task.path={place}", f"output={tmp_path / 'bad'}"]))


def test_validation_rows_that_may_have_been_trained_on_are_refused(cfg, tmp_path, caplog):
    """They are drawn from the training rows: others if the file has changed, or with another seed of the draw."""
    place = write(tmp_path / "t.csv", tickets())
    folder = run(cfg("task=text", f"task.path={place}", *SHORT.split()), tmp_path / "run").folder
    words = [f"run={folder}", f"output={tmp_path / 'out'}"]
    for changed in ("task.split_seed=7", "task.validation_fraction=0.4"):
        with pytest.raises(UserError, match=r"split=validation: these rows are drawn from the training rows"):
            evaluate(read_request([*words, changed]))
    assert not (tmp_path / "out").exists()
    evaluate(read_request([*words, f"task.path={place}"]))  # all rows: the user has asked for them
    assert f"task.path={place} has the rows that the run was trained on" in caplog.text
    write(place, [*tickets(), {"text": "a new one", "label": "bug"}])
    with pytest.raises(UserError, match="the data or the settings of the task are not those of the run"):
        evaluate(read_request([*words[:1], f"output={tmp_path / 'other'}"]))


def test_test_rows_that_are_training_rows_are_counted(cfg, tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.csv", tickets())
    write(tmp_path / "data" / "validation.csv", tickets()[:5])
    write(tmp_path / "data" / "test.csv", [*tickets()[:4], {"text": "never seen before", "label": "bug"}])
    words = ["task=text", f"task.path={tmp_path / 'data'}", "predict=true", *SHORT.split()]
    record = run(cfg(*words), tmp_path / "run").record
    assert "4 of 5 rows are training rows too: the score may be too high" in record["data"]["test"]["notes"]


def test_evaluations_that_start_together_have_folders_of_their_own(tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    folders = {output_of({}, tmp_path / "run") for _ in range(20)}
    assert len(folders) > 18 and {folder.parent for folder in folders} == {tmp_path / "run"}


def test_an_adapter_away_from_its_run_knows_its_classes(cfg, tmp_path):
    """Rows without labels, and rows of some classes only, do not say what the classes are."""
    write(tmp_path / "t.csv", tickets())
    composed = cfg("task=text", f"task.path={tmp_path / 't.csv'}", *SHORT.split())
    adapter = tmp_path / "moved"
    shutil.move(run(composed, tmp_path / "run").folder / "adapter", adapter)
    words = [f"adapter={adapter}", "task=text", "model=tiny", "task.max_length=32"]
    new = write(tmp_path / "new.csv", [{"text": "where is it"}])
    assert evaluate(read_request([*words, f"task.path={new}", f"output={tmp_path / 'a'}"])) == {"all": {}}
    line = json.loads((tmp_path / "a" / "all.jsonl").read_text())
    assert list(line["probabilities"]) == ["billing", "bug", "other"]
    some = write(tmp_path / "some.csv", [row for row in tickets() if row["label"] != "bug"])
    found = evaluate(read_request([*words, f"task.path={some}", f"output={tmp_path / 'b'}"]))
    assert found["all"].keys() >= {"accuracy", "loss"}


def test_another_file_needs_no_splits_like_those_of_the_run(cfg, tmp_path):
    """`evaluate` gives up names of splits and of a subset that ``task.path`` does not have, unless they are given."""
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    place = [f"task.path={tmp_path}", "task.train_split=learn", "task.validation_split=dev"]
    (tmp_path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(cfg("task=text", *place)))
    words = [f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]

    def names(*more: str) -> tuple[str, str]:
        task = read_request([*words, *more]).cfg.task
        return task.train_split, task.validation_split

    file = write(tmp_path / "new.csv", tickets())
    assert names() == names(f"task.path={file.parent}") == ("learn", "dev")
    assert names(f"task.path={file}") == ("train", "validation")
    with pytest.raises(UserError, match="is one file, which has no splits"):
        names(f"task.path={file}", "task.train_split=learn")
    (tmp_path / "run" / "config.yaml").write_text(
        OmegaConf.to_yaml(cfg("task=text", "task.path=owner/name", "task.subset=small"))
    )
    assert read_request([*words, f"task.path={file}"]).cfg.task.subset is None
    assert read_request([*words, "task.path=owner/other"]).cfg.task.subset == "small"


def test_a_run_on_numbers_and_its_test_file(cfg, tmp_path):
    rows = [{"text": f"{'good ' * (i % 5)} meal {i}", "label": i % 5 / 5} for i in range(24)]
    write(tmp_path / "data" / "train.jsonl", rows)
    write(tmp_path / "data" / "test.csv", [{"text": "a meal"}, {"text": "a good meal"}])
    given = ["task=text", f"task.path={tmp_path / 'data'}", "task.kind=regression", "predict=true", *SHORT.split()]
    folder = tmp_path / "run"
    record = run(cfg(*given), folder).record
    assert {"validation/pearson", "validation/spearman", "validation/mse"} <= record["metrics"].keys()
    facts = record["metric_facts"]
    assert facts["mse"] == {"unit": "", "maximise": False} and facts["pearson"]["maximise"]
    [file] = folder.rglob("test.jsonl")
    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == [0, 1]
    write(tmp_path / "new.csv", [{"text": "good meal"}])
    found = evaluate(read_request([f"run={folder}", f"task.path={tmp_path / 'new.csv'}", f"output={tmp_path / 'out'}"]))
    assert found == {"all": {}}
    assert isinstance(json.loads((tmp_path / "out" / "all.jsonl").read_text())["prediction"], float)


def test_a_dry_run_counts_the_head_of_all_classes(cfg, tmp_path):
    write(tmp_path / "t.csv", tickets())
    overrides = ["task=text", f"task.path={tmp_path / 't.csv'}", "dry_run=true", *SHORT.split()]
    three = run(cfg(*overrides), tmp_path / "a").record["params"]["head"]
    write(tmp_path / "t.csv", [row | {"label": f"{row['label']}{i % 2}"} for i, row in enumerate(tickets())])
    assert run(cfg(*overrides), tmp_path / "b").record["params"]["head"] > three


@pytest.mark.parametrize(("text", "noted"), [("the poet was tired", False), ("reembolso factura", True)])
def test_many_unknown_tokens_are_noted(task, tmp_path, text, noted):
    rows = [{"text": " ".join([text] * (i + 1)), "label": "ab"[i % 2]} for i in range(20)]
    own = task(write(tmp_path / "rows.csv", rows), "task.max_length=32")
    loaded, tokenizer = own.load(), AutoTokenizer.from_pretrained(EMBEDDED)
    split = Split(loaded.train, own.encode(loaded.train, tokenizer, training=True))
    ids = [number for row in split.encoded["input_ids"] for number in row]
    share = ids.count(tokenizer.unk_token_id) / len(ids)
    notes = [note for note in own.account("train", split).record()["notes"] if "unknown" in note]
    assert (share > 0.1) == noted
    words = f"{share:.0%} of the tokens are unknown to the model's tokenizer: use a model for this language"
    assert notes == [words] * noted


def test_numbers_of_parquet_may_be_of_any_size_and_precision(task, tmp_path):
    content = {"text": [f"text {i}" for i in range(30)], "label": np.array([i / 4 for i in range(30)], np.float16)}
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(content), file)
    assert task(file, "task.kind=regression").load_split("all")["label"][:4] == [0.0, 0.25, 0.5, 0.75]
    content["label"] = np.array([1e300, *range(29)])
    pq.write_table(pa.table(content), file)
    found = problems_of(task(file, "task.kind=regression"))
    assert "row 1 (data rows, counted from 1), column 'label'" in found and "is too large a number" in found
    content["label"][0] = np.inf
    pq.write_table(pa.table(content), file)
    assert "row 1 (data rows, counted from 1), column 'label'" in problems_of(task(file, "task.kind=regression"))


def test_texts_that_differ_in_outer_white_space_stay_together(task, tmp_path):
    rows = [{"text": f"text {i // 2}{' ' * (i % 2)}", "label": ("a", "b")[i // 2 % 2]} for i in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = task(tmp_path / "a.parquet", "task.validation_fraction=0.3").load()
    parts = found.train, found.validation["validation"]
    train, validation = ({text.strip() for text in part["text"]} for part in parts)
    assert validation and not train & validation
