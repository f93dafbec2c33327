"""The files for GLUE's server: names, labels and order against its rules, and eleven of them in a zip."""

import re
import subprocess
import sys
import zipfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import REPO
from omegaconf import OmegaConf

from diffora.errors import UserError
from diffora.tasks.base import Split, get_task
from diffora.tasks.glue import TASKS
from diffora.tasks.glue_submission import TEST_SETS, bundle

# name of the file, rows in it without the header, what may stand in its second column (gluebenchmark.com, sample files)
OFFICIAL = {
    "CoLA.tsv": (1063, {"0", "1"}),
    "SST-2.tsv": (1821, {"0", "1"}),
    "MRPC.tsv": (1725, {"0", "1"}),
    "STS-B.tsv": (1379, None),
    "QQP.tsv": (390965, {"0", "1"}),
    "MNLI-m.tsv": (9796, {"entailment", "neutral", "contradiction"}),
    "MNLI-mm.tsv": (9847, {"entailment", "neutral", "contradiction"}),
    "QNLI.tsv": (5463, {"entailment", "not_entailment"}),
    "RTE.tsv": (3000, {"entailment", "not_entailment"}),
    "WNLI.tsv": (146, {"0", "1"}),
    "AX.tsv": (1104, {"entailment", "neutral", "contradiction"}),
}


def task_of(name, path=None):
    target = "diffora.tasks.glue.GlueTask"
    return get_task(
        OmegaConf.create({"_target_": target, "name": name, "path": path, "max_train_rows": None, "max_length": 32})
    )


def write_test_split(task, folder, split, numbers, labels=None):
    columns = {name: [f"text {n}" for n in numbers] for name in task.spec.text_columns}
    columns |= {} if numbers is None else {"idx": list(numbers)}
    columns |= {} if labels is None else {"label": labels}
    pa.parquet.write_table(pa.table(columns), folder / f"{split}.parquet")


def read(file):
    header, *lines = file.read_text().splitlines()
    assert header == "index\tprediction"
    return dict(line.split("\t") for line in lines)


def test_the_eleven_test_sets():
    assert {t.file: (t.n_rows, set(t.labels) or None) for t in TEST_SETS.values()} == OFFICIAL
    wanted = {(name, split) for name, spec in TASKS.items() for split in spec.test_splits}
    assert wanted == set(TEST_SETS)


@pytest.mark.parametrize(("name", "split"), TEST_SETS)
def test_predictions_have_the_row_number_of_the_source(tmp_path, name, split):
    """Also if the source is shuffled, and only part of the rows are predicted, in any order."""
    task = task_of(name, str(tmp_path))
    numbers = [4, 0, 3, 1, 2]
    write_test_split(task, tmp_path, split, numbers)
    rows = task.load_split(split)
    width = task.spec.num_labels
    logits = torch.randn(5, width, generator=torch.Generator().manual_seed(1)) * 4
    order = torch.tensor([2, 4, 0, 1, 3])
    outputs = {"row": order, "logits": logits[order]}
    file, zipped = task.write_predictions(tmp_path / "out", split, outputs, Split(rows, rows))
    with zipfile.ZipFile(zipped) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {file.name: file.read_bytes()}
    assert file.name == {s: t.file for (n, s), t in TEST_SETS.items() if n == name}[split]
    found = read(file)
    assert list(found) == ["0", "1", "2", "3", "4"]
    for row, number in enumerate(numbers):
        if name == "stsb":
            assert float(found[str(number)]) == pytest.approx(min(max(logits[row, 0].item(), 0), 5), abs=1e-4)
        else:
            label = int(logits[row].argmax())
            names = task.spec.label_names
            as_text = name in ("mnli", "qnli", "rte")
            assert found[str(number)] == (names[label] if as_text else str(label))


def test_scores_are_cut_to_the_scale(tmp_path):
    task = task_of("stsb", str(tmp_path))
    write_test_split(task, tmp_path, "test", range(3))
    rows = task.load_split("test")
    outputs = {"row": torch.arange(3), "logits": torch.tensor([[-0.3], [5.2], [2.25]])}
    file, _ = task.write_predictions(tmp_path, "test", outputs, Split(rows, rows))
    assert {key: float(value) for key, value in read(file).items()} == {"0": 0, "1": 5, "2": 2.25}
    outputs["logits"][1] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        task.write_predictions(tmp_path, "test", outputs, Split(rows, rows))


def test_rows_without_numbers_are_counted(tmp_path):
    task = task_of("mrpc", str(tmp_path))
    pa.parquet.write_table(pa.table({"sentence1": ["a"] * 3, "sentence2": ["b"] * 3}), tmp_path / "test.parquet")
    rows = task.load_split("test")
    outputs = {"row": torch.arange(3), "logits": torch.eye(3)[:, :2]}
    assert read(task.write_predictions(tmp_path, "test", outputs, Split(rows, rows))[0]) == {
        "0": "0",
        "1": "1",
        "2": "0",
    }


def test_other_splits_are_written_as_json_lines(tmp_path):
    task = task_of("rte", str(tmp_path))
    write_test_split(task, tmp_path, "validation", range(2), labels=[0, 1])
    rows = task.load_split("validation")
    outputs = {"row": torch.arange(2), "logits": torch.eye(2), "labels": torch.tensor([0, 1])}
    [file] = task.write_predictions(tmp_path, "validation", outputs, Split(rows, rows))
    assert file.name == "validation.jsonl" and '"prediction": "not_entailment"' in file.read_text()


def test_real_test_split_with_and_without_its_labels(real_data, tmp_path):
    """This file has gold labels and GLUE's own has none. The submission is the same."""
    table = pa.parquet.read_table(real_data / "mrpc" / "test.parquet")
    bare = table.drop_columns(["label"]).take(torch.randperm(len(table)).numpy())
    pa.parquet.write_table(bare, tmp_path / "test.parquet")
    written = []
    for folder, source in ((real_data / "mrpc", table), (tmp_path, bare)):
        task = task_of("mrpc", str(folder))
        rows = task.load_split("test")
        assert ("label" in rows.column_names) == (source is table)
        guess = torch.tensor([len(a) % 2 for a in rows["sentence1"]])
        outputs = {"row": torch.arange(len(rows)), "logits": torch.eye(2)[guess]}
        written.append(task.write_predictions(tmp_path, "test", outputs, Split(rows, rows))[0].read_text())
    assert written[0] == written[1] and len(written[0].splitlines()) == 1726


def test_the_diagnostic_set_is_predicted_if_it_is_available(tmp_path):
    assert task_of("mnli").test_splits == ("test_matched", "test_mismatched", "ax")  # the hub has it
    assert task_of("mnli", str(tmp_path)).test_splits == ("test_matched", "test_mismatched")
    (tmp_path / "ax-00000-of-00001.parquet").touch()
    assert task_of("mnli", str(tmp_path)).test_splits == ("test_matched", "test_mismatched", "ax")
    assert task_of("rte", str(tmp_path)).test_splits == ("test",)


# --- eleven in a zip ---


@pytest.fixture
def small_qqp(monkeypatch):
    """The one large test set, cut down."""
    monkeypatch.setitem(OFFICIAL, "QQP.tsv", (50, {"0", "1"}))
    monkeypatch.setitem(TEST_SETS, ("qqp", "test"), replace(TEST_SETS["qqp", "test"], n_rows=50))


def write_tables(folder, leave_out=()):
    for name, (n_rows, labels) in OFFICIAL.items():
        if name not in leave_out:
            value = "1.5" if labels is None else sorted(labels)[0]
            run = folder / f"run-{name}" / "predictions"
            run.mkdir(parents=True)
            lines = (f"{i}\t{value}" for i in range(n_rows))
            (run / name).write_text("\n".join(["index\tprediction", *lines]) + "\n")
    return folder


def test_a_submission_has_the_eleven_tables_and_nothing_else(small_qqp, tmp_path):
    write_tables(tmp_path / "runs")
    assert bundle([tmp_path / "runs"], tmp_path / "a.zip") == []
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert set(archive.namelist()) == set(OFFICIAL) and archive.testzip() is None
        for name in OFFICIAL:
            assert archive.read(name) == (tmp_path / "runs" / f"run-{name}" / "predictions" / name).read_bytes()
    bundle([tmp_path / "runs"], tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_missing_tables_are_named_and_filled_only_on_request(small_qqp, tmp_path):
    write_tables(tmp_path / "runs", leave_out=("QNLI.tsv", "AX.tsv", "STS-B.tsv"))
    with pytest.raises(UserError, match=r"missing: STS-B\.tsv, QNLI\.tsv, AX\.tsv\."):
        bundle([tmp_path / "runs"], tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()
    assert bundle([tmp_path / "runs"], tmp_path / "a.zip", True) == ["STS-B.tsv", "QNLI.tsv", "AX.tsv"]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        lines = archive.read("QNLI.tsv").decode().splitlines()
    assert len(lines) == 5464 and lines[1] == "0\tnot_entailment" and lines[-1] == "5462\tnot_entailment"
    with pytest.raises(UserError, match="no predictions in"):
        bundle([tmp_path / "nowhere"], tmp_path / "b.zip", True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("index\tprediction\n0\t1\n", "WNLI.tsv: 1 rows, the test set has 146"),
        ("0\t1\n", "is not a table of index and prediction"),
        ("", "is not a table of index and prediction"),
        ("index\tprediction\n" + "0\t1\n" * 146, "the indices are not 0 to 145, each once"),
        ("index\tprediction\n" + "".join(f"{i}\tentailment\n" for i in range(146)), "'entailment', expected 0, 1"),
    ],
)
def test_what_the_server_would_refuse_is_refused_here(small_qqp, tmp_path, content, expected):
    write_tables(tmp_path / "runs")
    (tmp_path / "runs" / "run-WNLI.tsv" / "predictions" / "WNLI.tsv").write_text(content)
    with pytest.raises(UserError) as caught:
        bundle([tmp_path / "runs"], tmp_path / "a.zip")
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]


def test_two_runs_of_one_task_are_refused(small_qqp, tmp_path):
    write_tables(tmp_path / "runs")
    write_tables(tmp_path / "more", leave_out=set(OFFICIAL) - {"RTE.tsv"})
    with pytest.raises(UserError, match=r"RTE\.tsv is there more than once: .*more/run-RTE.*runs/run-RTE"):
        bundle([tmp_path / "runs", tmp_path / "more"], tmp_path / "a.zip")
    assert bundle([tmp_path / "runs", tmp_path / "runs" / "run-RTE.tsv"], tmp_path / "a.zip") == []  # one file twice


def test_the_script(tmp_path):
    script = [sys.executable, str(REPO / "scripts" / "glue_submission.py")]
    write_tables(tmp_path / "runs", leave_out=("AX.tsv", "QQP.tsv"))
    output = ["--output", str(tmp_path / "a.zip")]
    failed = subprocess.run([*script, str(tmp_path / "runs"), *output], capture_output=True, text=True)
    assert failed.returncode == 1
    assert re.fullmatch(r"error: the server needs all eleven .*: QQP\.tsv, AX\.tsv.*\n", failed.stderr)
    done = subprocess.run([*script, str(tmp_path / "runs"), *output, "--fill-missing"], capture_output=True, text=True)
    assert done.returncode == 0 and "the majority class in QQP.tsv, AX.tsv" in done.stdout
