"""Plain texts whose loss shows what fine-tuning makes a model forget."""

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import datasets
import pyarrow.parquet

from diffora.errors import UserError, first_line
from diffora.hub import is_hub_id, why_unreachable
from diffora.settings.checks import LENGTH, PATH, ROWS, Help, whole
from diffora.tasks.sources.lines import BadLine, json_lines, utf8

FORMATS = "a .txt file (one text a line), a .jsonl or .parquet file with a column text, or a hub id such as owner/name"
LINE_END = re.compile(r"\r\n|\n|\r")
"""Where a .txt file is divided. `str.splitlines` would also divide a text at a form feed or U+2028."""


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Texts that the training does not use. Their loss is measured before and after fine-tuning."""

    path: Annotated[
        Annotated[str, PATH] | None,
        Help("A file of plain texts (.txt, .jsonl, .parquet) or a hub data set; null: not measured."),
    ] = None
    subset: Annotated[str | None, Help("Subset of a hub data set; null: its only one.")] = None
    split: Annotated[str, Help("Split of a hub data set.")] = "train"
    rows: Annotated[int, whole(1, ROWS), Help("The first so many texts are used.", "rows")] = 100
    max_length: Annotated[int, whole(2, LENGTH), Help("Length at which these texts are cut.", "tokens")] = 768


def read_texts(settings: Forgetting) -> list[str]:
    """The first ``rows`` texts that are not empty; none without a path.

    Raises:
        UserError: the texts cannot be read, or there are none.
    """
    if settings.path is None:
        return []
    key = f"task.forgetting.path={settings.path}"
    file = Path(settings.path).expanduser()
    try:
        if file.is_file():
            found = _texts_of_file(file)
        elif is_hub_id(settings.path) and not file.exists():
            found = _texts_of_hub(settings)
        else:
            raise UserError(f"{key} is not {FORMATS}")
        texts = list(islice((text for text in found if text.strip()), settings.rows))
    except UserError:
        raise
    except Exception as error:  # of the hub's clients, arrow, the file system
        raise UserError(f"{key} cannot be read: {first_line(error)}") from error
    if not texts:
        raise UserError(f"{key} has no text in its column text")
    return texts


def _texts_of_file(file: Path) -> Any:
    if file.suffix == ".txt":
        return iter(LINE_END.split(utf8(file)))
    if file.suffix == ".parquet":
        names = pyarrow.parquet.read_schema(file).names
        if "text" not in names:
            raise UserError(f"task.forgetting.path={file} has no column text; it has {', '.join(names)}")
        return (text or "" for text in pyarrow.parquet.read_table(file, columns=["text"]).column("text").to_pylist())
    if file.suffix == ".jsonl":
        return _texts_of_lines(file)
    raise UserError(f"task.forgetting.path={file} is not {FORMATS}")


def _texts_of_lines(file: Path) -> Any:
    with file.open("rb") as lines:
        for number, row in json_lines(lines):
            if isinstance(row, BadLine):
                raise UserError(f"{file}, line {number}: {row}")
            if not isinstance(row.get("text"), str):
                raise UserError(f"{file}, line {number}: has no text in column 'text'")
            yield row["text"]


def _texts_of_hub(settings: Forgetting) -> Any:
    """Texts of a hub data set, streamed, so that only the first part is downloaded."""
    if unreachable := why_unreachable():
        raise UserError(
            f"task.forgetting.path={settings.path} cannot be loaded: {unreachable}. Give a file of texts, or "
            "task.forgetting.path=null to leave the measure out"
        )
    stream = datasets.load_dataset(settings.path, settings.subset, split=settings.split, streaming=True)
    for row in stream:
        if not isinstance(row.get("text"), str):
            raise UserError(f"task.forgetting.path={settings.path} has no column text; it has {', '.join(row)}")
        yield row["text"]


def encode_texts(texts: list[str], tokenizer: Any, max_length: int) -> datasets.Dataset:
    """Encoded texts, cut at ``max_length``, in the form of `diffora.tasks.chat.tokens.encode`; every token counts.

    The tokenizer adds its special tokens; no end token is added. A text of one token has nothing to predict and is left
    out.
    """
    ids = [row for row in tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if len(row) > 1]
    if not ids:
        raise UserError(f"task.forgetting.max_length={max_length}: no text has two tokens within it")
    return datasets.Dataset.from_dict(
        {
            "input_ids": ids,
            "counted": [[0] + [1] * (len(row) - 1) for row in ids],
            "length": [len(row) for row in ids],
            "row": list(range(len(ids))),
            "example": list(range(len(ids))),
        }
    )
