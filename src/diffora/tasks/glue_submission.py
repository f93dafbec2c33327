"""Submissions to GLUE's server (gluebenchmark.com): one zip with a table of predictions for each of eleven test sets.

A table has the header ``index<TAB>prediction`` and one line for each row of the test set. File names, labels and sizes
are those of the benchmark (Wang et al. 2019).
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffora.errors import UserError
from diffora.files import atomic

if TYPE_CHECKING:  # the script `scripts/glue_submission.py` must start without torch
    from torch import Tensor

HEADER = "index\tprediction"


@dataclass(frozen=True)
class TestSet:
    """One of the eleven test sets.

    Attributes:
        file: name of its table in the zip.
        n_rows: number of rows.
        labels: the server's names of the classes, in label order; empty for scores from 0 to 5.
        majority: the most frequent label of the training set, or the middle of the scale for scores.
    """

    file: str
    n_rows: int
    labels: tuple[str, ...]
    majority: str


_NUMBERS = ("0", "1")
_TWO = ("entailment", "not_entailment")
_THREE = ("entailment", "neutral", "contradiction")

TEST_SETS: dict[tuple[str, str], TestSet] = {
    ("cola", "test"): TestSet("CoLA.tsv", 1063, _NUMBERS, "1"),
    ("sst2", "test"): TestSet("SST-2.tsv", 1821, _NUMBERS, "1"),
    ("mrpc", "test"): TestSet("MRPC.tsv", 1725, _NUMBERS, "1"),
    ("stsb", "test"): TestSet("STS-B.tsv", 1379, (), "2.5"),
    ("qqp", "test"): TestSet("QQP.tsv", 390_965, _NUMBERS, "0"),
    ("mnli", "test_matched"): TestSet("MNLI-m.tsv", 9796, _THREE, "contradiction"),
    ("mnli", "test_mismatched"): TestSet("MNLI-mm.tsv", 9847, _THREE, "contradiction"),
    ("qnli", "test"): TestSet("QNLI.tsv", 5463, _TWO, "not_entailment"),
    ("rte", "test"): TestSet("RTE.tsv", 3000, _TWO, "entailment"),
    ("wnli", "test"): TestSet("WNLI.tsv", 146, _NUMBERS, "0"),
    ("mnli", "ax"): TestSet("AX.tsv", 1104, _THREE, "contradiction"),
}


def table(test_set: TestSet, numbers: Sequence[int], logits: "Tensor") -> str:
    """The content of a test set's file, in the order of its rows.

    Args:
        numbers: [n] the benchmark's number of each row.
        logits: [n, number of classes], or [n, 1] for scores, which are clamped to the scale.
    """
    if test_set.labels:
        predictions = [test_set.labels[i] for i in logits.argmax(dim=1).tolist()]
    else:
        predictions = [f"{score:.4f}" for score in logits[:, 0].clamp(0, 5).tolist()]
    lines = (f"{number}\t{prediction}" for number, prediction in sorted(zip(numbers, predictions, strict=True)))
    return "\n".join([HEADER, *lines]) + "\n"


def bundle(folders: Sequence[Path], output: Path, fill_missing: bool = False) -> list[str]:
    """Make one submission of the tables of several runs.

    Args:
        folders: folders of runs with ``predict=true``; the folders below them are searched too.
        output: the zip to write.
        fill_missing: for a test set without predictions, write the majority class of its training set in every row.

    Returns:
        Names of the tables that were filled in this way.

    Raises:
        UserError: some tables are missing, there twice, or in a form that the server refuses. Nothing is written.
    """
    problems: list[str] = []
    contents: dict[str, str] = {}
    filled: list[str] = []
    for test_set in TEST_SETS.values():
        found = sorted({file.resolve() for folder in folders for file in folder.rglob(test_set.file)})
        if len(found) > 1:
            problems.append(
                f"{test_set.file} is there more than once: {', '.join(map(str, found))}; name one of the runs"
            )
        elif found:
            contents[test_set.file] = found[0].read_text(encoding="utf-8")
            problems += [f"{found[0]}: {fault}" for fault in _faults(test_set, contents[test_set.file])]
        else:
            filled.append(test_set.file)
            lines = (f"{number}\t{test_set.majority}" for number in range(test_set.n_rows))
            contents[test_set.file] = "\n".join([HEADER, *lines]) + "\n"
    if len(filled) == len(TEST_SETS):
        problems.append(f"no predictions in {', '.join(map(str, folders))}: runs with predict=true write them")
    elif filled and not fill_missing:
        problems.append(
            f"the server needs all eleven tables; missing: {', '.join(filled)}. Name the runs that have them, or give "
            "--fill-missing to write the majority class in every row"
        )
    if problems:
        raise UserError(problems)
    _zip(output, contents)
    return filled


def pack(folder: Path) -> Path:
    """Zip the tables that one run wrote to a folder, as ``GLUE.zip`` in the same folder.

    The zip holds this run's part of a submission; `bundle` makes a submission of the runs for all tasks.
    """
    files = [folder / test_set.file for test_set in TEST_SETS.values()]
    _zip(folder / "GLUE.zip", {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()})
    return folder / "GLUE.zip"


def _zip(output: Path, contents: dict[str, str]) -> None:
    with atomic(output) as scratch, zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(
                zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED
            )  # ZipInfo without a time, so equal tables give equal zips


def _faults(test_set: TestSet, content: str) -> list[str]:
    """Why the server would refuse a table; one message for each reason."""
    header, *lines = content.splitlines() or [""]
    rows = [line.split("\t") for line in lines]
    if header != HEADER or any(len(row) != 2 for row in rows):
        return ["is not a table of index and prediction"]
    faults = []
    numbers, predictions = [row[0] for row in rows], [row[1] for row in rows]
    if len(rows) != test_set.n_rows:
        faults.append(f"{len(rows)} rows, the test set has {test_set.n_rows}")
    elif set(numbers) != set(map(str, range(test_set.n_rows))):
        faults.append(f"the indices are not 0 to {test_set.n_rows - 1}, each once")
    wrong = next((value for value in predictions if not _fits(test_set, value)), None)
    if wrong is not None:
        wanted = ", ".join(test_set.labels) if test_set.labels else "a number from 0 to 5"
        faults.append(f"prediction {wrong!r}, expected {wanted}")
    return faults


def _fits(test_set: TestSet, value: str) -> bool:
    """Whether the server accepts a prediction."""
    if test_set.labels:
        return value in test_set.labels
    try:
        return 0 <= float(value) <= 5
    except ValueError:
        return False
